"""The goals for one H200, and what `python -m lab.bench --preset imagenette` measured there.

Without a GPU nothing here runs, and each line says so.
"""
import importlib, subprocess, sys, tempfile, time
from pathlib import Path

import torch

from dino import SIZES, DINOv3
from lab.bench import dit_flops, seconds


def goals(m, rows):
    """-> dict from each goal to what was measured here, both as text."""
    rows = {row["stage"]: row for row in rows if m.c.preset == "imagenette" and "ratio" in row}

    def show(stage, form):
        return form(rows[stage]) if stage in rows else "not run: needs --preset imagenette"
    times = lambda row: f"{row['ratio']:.1f} times"
    table = {
        "DiT-XL step, 256 tokens, batch 256: 55% of the matrix rate, about 610 img/s": lambda: show(
            "DiT step, XL", lambda row: f"{row['share']:.0%}, {row['images_per_second']:,.0f} img/s"
                                        f" at batch {row['batch']}"),
        "AE step at 256 px: 3 times the speed of float32/TF32": lambda: show("AE step", times),
        "25 guided steps of DiT-XL: 4 times the speed of float32/TF32": lambda: show(
            "25 guided steps, XL", times),
        "DINOv3 features: no slower than transformers, compiled": lambda: transformers_ratio(m),
        "the default chain: 90 s": default_chain,
        "80 epochs of ImageNet with DiT-XL, on paper: no goal": lambda: show(
            "DiT step, XL", lambda row: on_paper(row["images_per_second"]))}
    return {k: run() if m.device.type == "cuda" else "not run: no GPU" for k, run in table.items()}


def on_paper(images_per_second, epochs=80):
    """Hours = epochs * 1,281,167 images / (img/s) / 3600.  Eight GPUs take an eighth if the
    all-reduce hides behind the backward pass.  512 px, 1,024 tokens: scaled by `dit_flops`."""
    hours = epochs * 1_281_167 / images_per_second / 3600
    more = dit_flops(1152, 28, 1024, 392) / dit_flops(1152, 28, 256, 392)
    return (f"{hours:,.0f} h on one GPU, {hours / 8:,.0f} h on eight; "
            f"at 512 px {hours * more:,.0f} h and {hours * more / 8:,.0f} h")


def transformers_ratio(m, batch=256, size=256):
    """How many times as fast our vits16plus is as transformers' compiled one."""
    try:
        theirs = importlib.import_module("transformers")             # not a dependency
    except ImportError:
        return "not run: transformers is not installed"
    s = SIZES["vits16plus"]
    model = theirs.DINOv3ViTModel(theirs.DINOv3ViTConfig(
        hidden_size=s.dim, intermediate_size=s.hidden, num_hidden_layers=s.depth,
        num_attention_heads=s.heads, num_register_tokens=s.registers, use_gated_mlp=s.swiglu))
    pixels, took = torch.randn(batch, 3, size, size, device=m.device), []
    for network in (DINOv3(s).freeze().to(m.device), torch.compile(model.eval().to(m.device))):
        with torch.no_grad(), m.autocast():
            took.append(seconds(lambda: network(pixels), m.c.repeats, m.device))
    return f"{took[1] / took[0]:.2f} times as fast, {batch / took[0]:,.0f} img/s"


def default_chain():
    """How long the three default commands take, including the data."""
    began, root = time.time(), Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        for script in ("ae.py", "dit.py", "sample.py"):
            command = [sys.executable, root / script]
            if subprocess.run(command, cwd=folder, capture_output=True).returncode:
                return f"not run: {script} failed"
    return f"{time.time() - began:.0f} s"
