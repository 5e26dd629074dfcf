"""Part of the tests; to be merged."""
import json
from types import SimpleNamespace

import pytest
import torch

import ae, dit
from dino import load_dino
from flow import flow_loss
from lab import bench, goals, growth
from plumbing.testing import call, one_line

# ---------------------------------------------------------------- bench.py, goals.py, growth.py

DEBUG_ROWS = ["feed", "features, tiny", "AE step", "decoding", "2 guided steps, tiny",
              "DiT step, tiny"]


def test_the_bench_prints_every_row_and_says_what_was_not_run(tmp_path):
    result = call(bench, "--preset", "debug", "--device", "cpu", "--goals", cwd=tmp_path)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and "TFLOP/s" in lines[0]
    assert [line[:24].strip() for line in lines[1:8]] == ["stage", *DEBUG_ROWS]
    assert all("not run" not in line and "-" in line for line in lines[2:8])
    assert lines[9] == "goals on one H200" and len(lines) == 16
    assert all(line.endswith(": not run: no GPU") for line in lines[10:])
    assert not list(tmp_path.iterdir())
    one_line(call(bench, "--repeats", "0", cwd=tmp_path), "--repeats", code=2)


def test_the_bench_as_json(tmp_path):
    result = call(bench, "--preset", "debug", "--device", "cpu", "--json", "--repeats", "1",
                  "--no-float32", cwd=tmp_path)
    found = json.loads(result.stdout)
    assert [row["stage"] for row in found["rows"]] == DEBUG_ROWS and found["matrix_tflops"] > 0
    for row in found["rows"]:
        assert row["images_per_second"] > 0 and row["memory_gb"] > 0 and "ratio" not in row
        assert ("tflops" in row) == (row["stage"] != "feed")


def debug_models():
    """What the rows of the debug preset share."""
    return bench.Models(bench.Config(preset="debug", repeats=1), torch.device("cpu"),
                        lambda: torch.autocast("cpu", enabled=False))


def test_counted_operations_are_those_of_the_formula():
    m = debug_models()
    for side in (4, 12):                                  # plain attention, and the fused call
        counted = bench.operations(lambda: bench.dit_step(m, (192, 2, 3), side)(2, m.autocast)) / 2
        by_hand = bench.dit_flops(192, 2, side ** 2, m.ae.latent_dim)
        assert counted == pytest.approx(by_hand, rel=0.03)
    assert bench.dit_flops(1152, 28, 256, 392) == pytest.approx(0.72e12, rel=0.02)       # DiT-XL


def test_a_row_that_is_too_slow_or_too_large_is_not_run():
    m, refuse = debug_models(), lambda: pytest.fail("was built")
    row = bench.measure(m, "DiT step, XL", 256, refuse, 1e12, 1e11, torch.float32)
    assert "not run: about 7,680 s" in bench.text(row)
    row = bench.measure(m, "DiT step", 1, lambda: m.dit((100_000, 1000, 1)), 1, 1e11, torch.float32)
    assert "not run: not enough memory" in bench.text(row)


def test_the_largest_batch_is_found_by_doubling_or_halving():
    def step(batch):
        if batch > 100:
            raise torch.OutOfMemoryError
    assert bench.largest_batch(step, 3) == 96 and bench.largest_batch(step, 256) == 64
    assert bench.largest_batch(lambda batch: None, 64, most=512) == 512


def test_goals_beside_what_a_gpu_measured(monkeypatch):
    monkeypatch.setattr(goals, "transformers_ratio", lambda m: "1.10 times as fast")
    monkeypatch.setattr(goals, "default_chain", lambda: "80 s")
    m = SimpleNamespace(c=bench.Config(preset="imagenette"), device=torch.device("cuda"))
    rows = [dict(stage="DiT step, XL", share=.5, images_per_second=500, batch=256, ratio=4),
            dict(stage="AE step", ratio=3.21), dict(stage="25 guided steps, XL", not_run="why")]
    assert list(goals.goals(m, rows).values()) == [
        "50%, 500 img/s at batch 256", "3.2 times", "not run: needs --preset imagenette",
        "1.10 times as fast", "80 s",
        "57 h on one GPU, 7 h on eight; at 512 px 252 h and 31 h"]


def test_transformers_runs_the_same_encoder(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert "times as fast" in goals.transformers_ratio(debug_models(), batch=1, size=64)


def test_growth_exponents_table_and_plot(tmp_path, monkeypatch):
    xs = [1, 2, 4, 8, 16]
    assert growth.exponent(xs, [3 * x ** 1.7 for x in xs]) == pytest.approx(1.7)
    sizes = []
    monkeypatch.setattr(bench.Models, "dit", lambda m, shape: sizes.append(shape) or dit.DiT(
        m.ae.latent_dim, 10, 8, 1, 2))                    # the steps run, on a very small model
    monkeypatch.setattr(growth, "seconds", lambda work, repeats, device: (work(), len(sizes))[1])
    result = call(bench, "--preset", "debug", "--device", "cpu", "--growth", cwd=tmp_path)
    assert result.returncode == 0 and "width" in result.stdout, result.stderr
    assert {(64, 1, 4), (512, 1, 4), (128, 8, 4)} <= set(sizes)
    header, *rows = (tmp_path / "results/growth.tsv").read_text().splitlines()
    assert header.split() == ["preset", "device", "axis", "value", "milliseconds", "exponent"]
    assert len(rows) == 25 and all(float(row.split("\t")[-1]) > 0 for row in rows)
    assert (tmp_path / "assets/growth.png").stat().st_size > 10_000
    assert dit.attention.__name__ == "attention"          # put back


def test_twice_the_resolution_works_end_to_end():
    """As 512 px with models of 256: the grid and the positions follow the input."""
    c = ae.Config(**{**ae.PRESETS["debug"], "size": 64})
    auto = ae.AutoEncoder(c, load_dino("tiny")).train()
    x = torch.rand(2, 3, 128, 128) * 2 - 1
    y, _ = auto(x)
    loss = (y - x).abs().mean() + ae.perceptual_loss(auto.dino, y, x)
    loss.backward()
    assert y.shape == x.shape and torch.isfinite(loss)
    z = auto.eval().encode(x)
    assert z.shape == (2, auto.latent_dim, 16, 16) and auto.decode(z).shape == x.shape
    model = dit.DiT(auto.latent_dim, 10, 128, 1, 4)
    losses, _ = flow_loss(model, z, torch.tensor([0, 10]))
    losses.mean().backward()
    assert torch.isfinite(losses).all() and model.out.weight.grad.abs().sum() > 0
    assert model.positions(16, 16, "cpu").unique(dim=0).shape == (256, 128)
