"""Tests: oracles, invariants, the defects that this field ships again and again, the command line.

    python -m pytest test_all.py

Letters as in the files under test.
"""
import ast, contextlib, copy, hashlib, importlib, io, json, math, os, re, resource, shutil, signal
import struct, subprocess, sys, tarfile, threading, time, types, zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

import ae, data, dino, dit, flow, metrics, sample, toy_flow
from exercises import check as exercises
from lab import bench, evidence, report
from plumbing import config, fetch, lpips as perceptual
from plumbing.config import UserError
from dino import DINOv3, ViTConfig, load_dino, read_safetensors
from plumbing.lpips import LPIPS, load_lpips

HERE = Path(__file__).parent
torch.set_num_threads(1)                 # small sums: a second thread only waits


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder where the README's first command has run, on `--preset debug`."""
    folder = tmp_path_factory.mktemp("work")
    first = next(line for line in README.splitlines() if line.startswith("pip install"))
    scripts = re.findall(r"python (\w+\.py)", first)
    assert scripts == ["ae.py", "dit.py", "sample.py"]
    for command in scripts:
        result = run(command, "--preset", "debug", cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


def run(script, *args, cwd, **more):
    """One of the scripts as a user starts it."""
    return subprocess.run([*start(script), *map(str, args)], cwd=cwd, text=True,
                          capture_output=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(HERE)},
                          **more)


def start(script):
    """ae.py, or a module such as lab.evidence -> the beginning of its command line."""
    return [sys.executable, *([str(HERE / script)] if script.endswith(".py") else ["-m", script])]


def one_line(result, *words, code=1):
    """A user's error: the exit status, one clear line at the end, no traceback."""
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, last


# ---------------------------------------------------------------- flow.py: closed forms


def gaussian_velocity(mean, std):
    """E[x1 - x0 | x_t] for data N(mean, std^2): linear in x."""
    def model(x, t, *_):
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))[:, None]
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std ** 2 - (1 - t)) / variance * (x - t * mean)
    return model


def test_the_exact_velocity_of_a_gaussian_transports_noise_to_it():
    x0 = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = 2 + 0.5 * x0                                          # the flow's own map
    errors = [(flow.euler(gaussian_velocity(2.0, 0.5), x0, n) - exact).abs().max().item()
              for n in (50, 100)]
    assert 0.4 < errors[1] / errors[0] < 0.6                      # Euler: first order
    errors = [(flow.heun(gaussian_velocity(2.0, 0.5), x0, n) - exact).abs().max().item()
              for n in (20, 40)]
    assert 0.2 < errors[1] / errors[0] < 0.3                      # Heun: second order
    shifted = flow.euler(gaussian_velocity(2.0, 0.5), x0, 400, shift=4.0)
    assert (shifted - exact).abs().max() < 0.02                   # the clock does not move the end


def test_the_loss_of_the_exact_velocity_is_its_closed_form():
    """E|v - E[v|x_t]|^2 of N(m, s^2) at t is s^2 / ((1-t)^2 + t^2 s^2)."""
    g = torch.Generator().manual_seed(0)
    x1 = 2 + 0.5 * torch.randn(200_000, 1, generator=g)
    loss, t = flow.flow_loss(gaussian_velocity(2.0, 0.5), x1, shift=2.5, generator=g)
    wanted = 0.25 / ((1 - t) ** 2 + 0.25 * t ** 2)
    assert loss.shape == t.shape == (200_000,)
    assert abs((loss - wanted).mean()) < 0.01
    assert abs(t.median() - 1 / 3.5) < 0.005                      # median of t / (t + 2.5 (1 - t))


def test_shift_time():
    t = torch.linspace(0, 1, 11)
    assert torch.allclose(flow.shift_time(t, 1.0), t)
    assert torch.allclose(flow.shift_time(t, 2.5), 0.4 * t / (1 + (0.4 - 1) * t))   # the authors'
    assert (flow.shift_time(t[1:-1], 2.0) < t[1:-1]).all()        # more time near noise


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_steps_asked_are_steps_done(steps):
    calls, seen = [], []
    flow.euler(lambda x, t: calls.append(t) or torch.ones_like(x), torch.zeros(2, 3), steps,
               callback=lambda i, t, x: seen.append((i, t)))
    assert len(calls) == steps and calls[0] == 0 and len(seen) == steps + 1 and seen[-1][1] == 1
    calls.clear()
    flow.heun(lambda x, t: calls.append(t) or torch.ones_like(x), torch.zeros(2, 3), steps)
    assert len(calls) == 2 * steps
    with pytest.raises(ValueError):
        flow.euler(lambda x, t: x, torch.zeros(1), 0)


def test_guidance_blends_every_channel_and_scale_one_costs_one_call():
    sizes = []

    def model(x, t, y):
        sizes.append(len(x))
        return x * 0 + y.view(-1, 1, 1, 1)
    x, y = torch.zeros(4, 7, 2, 2), torch.full((4,), 3)
    v = flow.guided(model, y, 10, 2.0)(x, torch.tensor(0.5))
    assert torch.equal(v, torch.full_like(v, 10 + 2 * (3 - 10)))  # all seven channels
    assert sizes == [8]                                           # both halves in one call
    flow.guided(model, y, 10, 1.0)(x, 0.5)
    flow.guided(model, y, 10, 2.0, t_range=(0.6, 1.0))(x, 0.5)    # outside: plain conditional
    assert sizes == [8, 4, 4]


def test_the_samplers_state_stays_float32():
    x = flow.euler(lambda x, t: torch.ones_like(x).bfloat16(), torch.ones(1).bfloat16(), 1000)
    assert x.dtype == torch.float32 and abs(x.item() - 2) < 1e-3   # bfloat16 would stay at 1


# ---------------------------------------------------------------- data.py


def test_shapes_are_a_function_of_the_seed_and_of_nothing_else():
    x, y, names = data.shapes(1100, 32, seed=5)
    again, _, _, mask = data.shapes(300, 32, seed=5, masks=True)
    assert x.shape == (1100, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert len(names) == 10 and torch.equal(x[:300], again)       # a longer set begins so
    assert (y[:1000].bincount() == 100).all()
    assert not torch.equal(x, data.shapes(1100, 32, seed=6)[0])
    big = F.avg_pool2d(data.shapes(20, 64, seed=5)[0].float(), 2)
    assert (big - x[:20].float()).abs().mean() < 6                # the same pictures at any size
    area = mask.float().mean((1, 2)) / 255
    assert 0.03 < area.min() and area.max() < 0.6


def test_the_class_is_not_in_the_pixels():
    x, y, _ = data.shapes(5000, 32, seed=11)
    xt, yt, _ = data.shapes(1000, 32, seed=12)
    pixels = metrics.knn(x.flatten(1).float(), y, xt.flatten(1).float(), yt)
    assert 0.15 < pixels <= 0.30


def picture(path, size=(50, 40), mode="RGB", **more):
    rng = np.random.default_rng(abs(hash(path.name)) % 2 ** 32)
    array = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(array).convert(mode).save(path, **more)


@pytest.fixture
def folder(tmp_path):
    """Two classes of pictures of several kinds."""
    for name in ("cats", "d\u00f6gs"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            suffix = ("jpg", "png", "webp")[i % 3]
            picture(tmp_path / "pictures" / name / f"{i:02d}.{suffix}")
    return tmp_path / "pictures"


def test_a_folder_of_pictures(folder, tmp_path):
    x, y, names = data.load_images(folder, 16, "train", cache=tmp_path / "cache")
    xt, yt, _ = data.load_images(folder, 16, "test", cache=tmp_path / "cache")
    assert names == ["cats", "d\u00f6gs"] and x.shape == (22, 3, 16, 16) and len(xt) == 2
    assert y.tolist() == [0] * 11 + [1] * 11 and isinstance(x, np.memmap)
    picture(folder / "cats" / "new.png")                          # a changed folder: a new cache
    assert len(data.load_images(folder, 16, "train", cache=tmp_path / "cache")[0]) == 23
    assert data.load_images(folder, 8, "train", cache=tmp_path / "cache")[0].shape[-1] == 8


def test_odd_pictures_become_what_a_person_expects(tmp_path):
    red = np.zeros((60, 80, 3), np.uint8)
    red[..., 0] = 200
    image, path = Image.fromarray(red), tmp_path / "x.png"

    def stored(picture, name="x.png", **more):
        picture.save(tmp_path / name, **more)
        return data.decode(tmp_path / name, 16).mean((1, 2))
    assert np.allclose(stored(image.convert("P")), [200, 0, 0], atol=6)
    assert np.allclose(stored(image.convert("CMYK"), "x.jpg"), [200, 0, 0], atol=12)
    assert np.allclose(stored(image.convert("L")), 60, atol=2)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    assert np.allclose(stored(clear), 255, atol=1)                # transparency over white
    grey16 = Image.fromarray(np.full((40, 40), 32896, np.uint16))
    assert np.allclose(stored(grey16), 128, atol=1)
    assert stored(image, "x.gif", save_all=True, append_images=[image]).shape == (3,)
    assert stored(Image.new("RGB", (3, 500), (1, 2, 3))).shape == (3,)        # tiny and thin
    turned = Image.new("RGB", (40, 20), "white")
    turned.paste("black", (0, 0, 20, 20))
    exif = turned.getexif()
    exif[0x0112] = 3                                              # upside down
    turned.save(tmp_path / "t.jpg", exif=exif)
    array = data.decode(tmp_path / "t.jpg", 16)
    assert array.shape == (3, 16, 16)
    with pytest.raises(Exception):
        (tmp_path / "z.png").write_bytes(b"")
        data.decode(tmp_path / "z.png", 16)


def test_unreadable_pictures_are_named_and_more_than_one_percent_stop(folder, tmp_path, capsys):
    for i in range(200):
        picture(folder / "cats" / f"more{i}.png", (8, 8))
    (folder / "cats" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    x, y, _ = data.load_images(folder, 8, "train", cache=tmp_path / "cache")
    printed = capsys.readouterr()
    assert "broken.jpg" in printed.out + printed.err and "skipped 1 of" in printed.out
    assert len(x) == len(y)
    for i in range(5):
        (folder / "cats" / f"broken{i}.jpg").write_bytes(b"")
    with pytest.raises(config.UserError, match="more than 1 %"):
        data.load_images(folder, 8, "train", cache=tmp_path / "cache")


def test_bad_folders_end_in_one_line(tmp_path):
    for make, words in ((lambda r: None, "no such folder"), (lambda r: r.mkdir(), "no sub-folders"),
                        (lambda r: (r / "a").mkdir(), "no pictures")):
        make(tmp_path / "root")
        with pytest.raises(config.UserError, match=words):
            data.load_images(tmp_path / "root", 8, "train", cache=tmp_path / "cache")
    (tmp_path / "root" / "A").mkdir()
    with pytest.raises(config.UserError, match="differ only in case"):
        data.list_folder(tmp_path / "root", "train")


# ---------------------------------------------------------------- metrics.py and the judge


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=config.generator(seed), dtype=torch.float64)


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 16, 16)
    b = a + torch.tensor([0.02, 0.2]).view(2, 1, 1, 1)            # 20 log10(2 / 0.02) = 40 dB
    assert torch.allclose(metrics.psnr(a, b), torch.tensor([40.0, 20.0]), atol=1e-4)
    assert metrics.psnr(a, a).isinf().all()


def slow_ssim(a, b):
    """Wang's formula, pixel by pixel, with an explicit two-dimensional window."""
    g = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)]
                  for i in range(11)])
    g /= g.sum()
    values = []
    for c in range(a.shape[0]):
        for i in range(a.shape[1] - 10):
            for j in range(a.shape[2] - 10):
                x, y = a[c, i:i + 11, j:j + 11].numpy(), b[c, i:i + 11, j:j + 11].numpy()
                mx, my = (g * x).sum(), (g * y).sum()
                vx, vy = (g * (x - mx) ** 2).sum(), (g * (y - my) ** 2).sum()
                cov = (g * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + 4e-4) * (2 * cov + 3.6e-3)
                              / ((mx ** 2 + my ** 2 + 4e-4) * (vx + vy + 3.6e-3)))
    return float(np.mean(values))


def test_ssim_is_the_slow_loop():
    a = randn(2, 3, 14, 17).tanh()
    b = (a + 0.3 * randn(2, 3, 14, 17, seed=1)).tanh()
    got = metrics.ssim(a, b)
    assert got.shape == (2,)
    for i in range(2):
        assert abs(got[i] - slow_ssim(a[i], b[i])) < 1e-9
    assert torch.allclose(metrics.ssim(a, a), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(metrics.ssim(a.float(), b.float()), got.float(), atol=1e-5)


def exact_normal(mean, cov, n=400):
    """Points whose sample mean and covariance are exactly those given."""
    x = randn(n, len(mean))
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return x @ torch.linalg.cholesky(cov).T + mean


def test_frechet_of_two_gaussians_that_do_not_commute():
    A = torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    B = torch.tensor([[1.0, -0.5], [-0.5, 2.0]], dtype=torch.float64)
    assert not torch.allclose(A @ B, B @ A)
    # 2 x 2: tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))
    trace = math.sqrt((A @ B).trace() + 2 * math.sqrt(torch.det(A @ B)))
    want = 1.5 ** 2 + 2 ** 2 + A.trace() + B.trace() - 2 * trace
    zero, there = torch.zeros(2, dtype=torch.float64), torch.tensor([1.5, -2.0]).double()
    assert abs(metrics.frechet(exact_normal(zero, A), exact_normal(there, B)) - want) < 1e-9


@pytest.mark.parametrize("n, d", [(500, 8), (20, 64), (2, 3), (30, 1)])
def test_frechet_of_a_set_with_itself_is_zero(n, d):
    x = 1e3 + 10 * randn(n, d)
    assert metrics.frechet(x, x) < 1e-8
    assert abs(metrics.frechet(x, x + 2) - 4 * d) < 1e-6          # a shift alone, even where n < d


def test_kid_is_the_slow_double_loop():
    a, b = randn(9, 5), randn(7, 5, seed=1) + 0.5
    k = lambda x, y: (float(x @ y) / 5 + 1) ** 3
    within = lambda x: np.mean([k(p, q) for i, p in enumerate(x)
                                for j, q in enumerate(x) if i != j])
    want = within(a) + within(b) - 2 * np.mean([k(p, q) for p in a for q in b])
    assert abs(metrics.kid(a, b) - want) < 1e-12


def test_kid_is_unbiased_and_sees_a_shift():
    same = torch.tensor([metrics.kid(randn(20, 6, seed=2 * s), randn(30, 6, seed=2 * s + 1))
                         for s in range(400)])
    assert same.mean().abs() < 3 * same.std() / 20                # zero within its standard error
    assert same.min() < 0                                         # a biased one is never negative
    assert metrics.kid(randn(500, 6), randn(500, 6, seed=1) + 1) > 0.5


def test_energy_distance_is_the_slow_loop(monkeypatch):
    a, b = randn(9, 2), randn(7, 2, seed=1) + 1
    within = lambda x: np.mean([float((p - q).norm()) for i, p in enumerate(x)
                                for j, q in enumerate(x) if i != j])
    want = 2 * np.mean([float((p - q).norm()) for p in a for q in b]) - within(a) - within(b)
    assert abs(metrics.energy_distance(a, b) - want) < 1e-12
    many = metrics.energy_distance(randn(2300, 2), randn(1700, 2, seed=1))       # several chunks
    assert abs(many) < 0.01


def test_energy_distance_of_two_points_apart():
    a, b = torch.zeros(3, 2), torch.tensor([[3.0, 4.0]] * 2)
    assert metrics.energy_distance(a, b) == pytest.approx(10)


def test_knn_votes_are_weighted():
    """Two near neighbours outvote three far ones at k = 5; without weights they would lose."""
    angle = torch.tensor([0.0, 0.1, 1.2, 1.3, 1.4, 3.2, 3.6, 4.0, 4.4, 4.7])
    train = torch.stack([angle.cos(), angle.sin()], 1)
    train = train - train.mean(0) + 7                             # the mean is taken off
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
    query = train[:1] + 0.01
    assert metrics.knn(train, labels, query, torch.tensor([0]), k=5) == 1.0
    assert metrics.knn(train, labels, query, torch.tensor([1]), k=5) == 0.0


def test_knn_and_probe_on_clusters():
    y = torch.arange(600) % 3
    x = 8 * torch.eye(16, dtype=torch.float64)[y] + randn(600, 16)
    assert metrics.knn(x[:400], y[:400], x[400:], y[400:]) == 1.0
    assert metrics.linear_probe(x[:400], y[:400], x[400:], y[400:]) == 1.0
    chance = metrics.linear_probe(randn(400, 4), y[:400], randn(200, 4, seed=1), y[400:])
    assert 0.2 < chance < 0.5
    with torch.inference_mode():                                  # as inside an evaluation
        z = x.clone()
        assert metrics.linear_probe(z[:400], y[:400], z[400:], y[400:]) == 1.0
    with torch.autocast("cpu", torch.bfloat16):                   # and within its context
        assert metrics.linear_probe(x[:400].float(), y[:400], x[400:].float(), y[400:]) == 1.0


def test_probe_is_at_the_optimum_and_repeats():
    y = torch.arange(300) % 3
    x = torch.eye(5)[y] + randn(300, 5).float()
    first = metrics.linear_probe(x, y, x, y)
    torch.manual_seed(99)
    assert metrics.linear_probe(x, y, x, y) == first
    assert metrics.linear_probe(x.bfloat16(), y, x.bfloat16(), y) == pytest.approx(first, abs=0.03)


@pytest.mark.parametrize("call, words", [
    (lambda: metrics.psnr(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16)), "differ"),
    (lambda: metrics.psnr(*[torch.zeros(2, 3, 16, 16, dtype=torch.uint8)] * 2), "uint8"),
    (lambda: metrics.ssim(*[torch.zeros(2, 3, 10, 16)] * 2), "11"),
    (lambda: metrics.ssim(*[torch.full((2, 3, 16, 16), math.nan)] * 2), "NaN"),
    (lambda: metrics.frechet(torch.zeros(1, 3), torch.zeros(5, 3)), "few"),
    (lambda: metrics.frechet(torch.zeros(5, 3), torch.zeros(5, 4)), "widths"),
    (lambda: metrics.kid(torch.zeros(5, 3), torch.full((5, 3), math.inf)), "NaN or infinity"),
    (lambda: metrics.energy_distance(torch.zeros(5), torch.zeros(5)), r"\(n, d\)"),
    (lambda: metrics.knn(torch.ones(9, 2), torch.zeros(9).long(), torch.ones(1, 2),
                         torch.zeros(1).long()), "at least 20"),
    (lambda: metrics.linear_probe(torch.ones(9, 2), torch.zeros(8).long(), torch.ones(1, 2),
                                  torch.zeros(1).long()), "9 whole numbers"),
    (lambda: metrics.judge_images(metrics.Judge().eval(), torch.zeros(1, 3, 32, 32)), "uint8"),
    (lambda: metrics.judge_images(metrics.Judge(), data.shapes(2)[0]), "training mode"),
])
def test_wrong_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---------------------------------------------------------------- the judge


@pytest.fixture(scope="module")
def judge():
    return metrics.load_judge()


def test_the_judge_knows_fresh_shapes(judge):
    images, labels, _ = data.shapes(2000, 32, seed=1234)
    reference = metrics.judge_images(judge, data.shapes(2000, 32, seed=0)[0])[0]
    real = metrics.score(judge, images, labels, reference)
    assert real["accuracy"] >= 0.99 and real["n"] == 2000
    assert real["frechet"] < 0.1 and abs(real["kid"]) < 0.01      # the floor
    noise = (randn(*images[:500].shape) * 60 + 128).clamp(0, 255).to(torch.uint8)
    bad = metrics.score(judge, noise, labels[:500], reference)
    assert bad["accuracy"] < 0.2 and bad["frechet"] > 100 * real["frechet"] and bad["kid"] > 1
    assert metrics.JUDGE.stat().st_size < 1_000_000


def test_the_judge_is_frozen_and_blind_to_batch_mates(judge):
    images = data.shapes(64, 32, seed=5)[0]
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    together = metrics.judge_images(judge, images)[0]
    alone = metrics.judge_images(judge, images, batch=1)[0]
    assert torch.allclose(together, alone, atol=1e-5) and together.dtype == torch.float32
    assert torch.equal(metrics.judge_images(judge, images.numpy())[0], together)
    logits = judge(images.float() / 127.5 - 1)
    assert torch.equal(logits.argmax(1), metrics.judge_images(judge, images)[1])
    with torch.autocast("cpu", torch.bfloat16):                   # precision is the judge's own
        assert torch.equal(metrics.judge_images(judge, images)[0], together)


def test_the_judge_reads_other_sizes(judge):
    images, labels, _ = data.shapes(300, 64, seed=1234)
    assert (metrics.judge_images(judge, images)[1] == labels).double().mean() >= 0.99


def train(out, *more):
    metrics.main(["--preset", "debug", "--out", str(out), "--device", "cpu", *more])
    return config.load(out / "judge.pt")["model"]


def test_a_resumed_judge_is_the_uninterrupted_one(tmp_path, monkeypatch, capsys):
    whole = train(tmp_path / "whole")

    save, calls = config.save, []
    def dies(path, obj):                                          # in the middle of the third save
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(path, obj)
    monkeypatch.setattr(config, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    monkeypatch.setattr(config, "save", save)
    with pytest.raises(config.UserError, match="--lr"):           # another recipe is another run
        train(tmp_path / "cut", "--lr", "0.1")
    assert "going on" not in capsys.readouterr().out
    again = train(tmp_path / "cut")
    assert "going on from step 10" in capsys.readouterr().out
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["judge.pt"]

    before = (tmp_path / "cut/judge.pt").stat().st_mtime_ns       # finished: touches nothing
    train(tmp_path / "cut", "--seed", "7")
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "cut/judge.pt").stat().st_mtime_ns == before
    other = train(tmp_path / "cut", "--seed", "7", "--overwrite")
    assert not torch.equal(other["head.weight"], whole["head.weight"])


def test_a_killed_judge_goes_on(tmp_path):
    command = [sys.executable, str(HERE / "metrics.py"), "--preset", "debug", "--device", "cpu",
               "--save_every", "1", "--steps", "40"]
    subprocess.run([*command, "--out", tmp_path / "a"], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--out", tmp_path / "b"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not (tmp_path / "b/judge_train.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "b/judge.pt").exists()
    done = subprocess.run([*command, "--out", tmp_path / "b"], check=True, capture_output=True,
                          text=True).stdout
    assert "accuracy: " in done and "going on from step" in done
    a, b = (config.load(tmp_path / name / "judge.pt") for name in "ab")
    assert a["accuracy"] == b["accuracy"]
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_the_default_command_leaves_the_shipped_judge_alone():
    before = metrics.JUDGE.stat().st_mtime_ns
    out = subprocess.run([sys.executable, HERE / "metrics.py"], capture_output=True, text=True)
    assert out.returncode == 0 and "finished" in out.stdout
    assert metrics.JUDGE.stat().st_mtime_ns == before


# ---------------------------------------------------------------- dino.py: against transformers

NAMES = """cls_token embeddings.cls_token cls_token
storage_tokens embeddings.register_tokens reg_token
mask_token embeddings.mask_token -
patch_embed.proj embeddings.patch_embeddings patch_embed.proj
attn.proj attention.o_proj attn.proj
ls1.gamma layer_scale1.lambda1 gamma_1
ls2.gamma layer_scale2.lambda1 gamma_2
mlp.fc1 mlp.up_proj mlp.fc1
mlp.fc2 mlp.down_proj mlp.fc2
mlp.w1 mlp.gate_proj mlp.fc1_g
mlp.w2 mlp.up_proj mlp.fc1_x
mlp.w3 mlp.down_proj mlp.fc2
norm norm norm"""                                             # Meta's (ours), transformers', timm's


def random_vit(swiglu):
    """Every parameter random, so that each of them matters; no bias for k."""
    model = DINOv3(ViTConfig(dim=128, depth=3, heads=2, hidden=192, swiglu=swiglu)).freeze()
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
        if "norm" in name and name.endswith("weight"):
            p.add_(1)
    return model


def layouts(model):
    """The same weights as four files: Meta's, transformers', timm's with q and v bias, timm's."""
    meta, hf, timm = model.state_dict(), {}, {}
    for name, t in list(meta.items()):
        name_hf, part = name.replace("blocks.", "layer."), t.chunk(3)
        if name.endswith("qkv.weight"):
            timm[name] = t
            for x, rows in zip("qkv", part):
                hf[name_hf.replace("attn.qkv", f"attention.{x}_proj")] = rows
        elif name.endswith("qkv.bias"):
            for x, rows in ("q", part[0]), ("v", part[2]):
                hf[name_hf.replace("attn.qkv", f"attention.{x}_proj")] = rows
                timm[name.replace("qkv.bias", f"{x}_bias")] = rows
            meta[name + "_mask"] = torch.tensor([1., 0., 1.]).repeat_interleave(128)
        else:
            row = next(row.split() for row in NAMES.splitlines() if row.split()[0] in name)
            hf[name_hf.replace(row[0], row[1])] = t[None] if name == "mask_token" else t
            timm[name.replace(row[0], row[2])] = t
    del timm["-"]
    meta |= {"rope_embed.periods": model.periods.bfloat16(), "local_cls_norm.bias": torch.ones(128)}
    plain = {k: v for k, v in timm.items() if not k.endswith(("q_bias", "v_bias"))}
    return {layout: {k: v.clone() for k, v in tensors.items()}
            for layout, tensors in dict(meta=meta, hf=hf, qkvb=timm, timm=plain).items()}


@pytest.mark.parametrize("swiglu", [False, True])
def test_vit_is_transformers_vit_in_every_layout(swiglu, tmp_path):
    from safetensors.torch import save_file
    from transformers import DINOv3ViTConfig, DINOv3ViTModel
    ours = random_vit(swiglu)
    files = layouts(ours)
    hf = DINOv3ViTModel(DINOv3ViTConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, num_register_tokens=4,
        intermediate_size=192, use_gated_mlp=swiglu, hidden_act=["gelu", "silu"][swiglu])).eval()
    hf.load_state_dict({k.replace("layer.", "model.layer.") if k[:6] == "layer." else k: v
                        for k, v in files["hf"].items()}, strict=True)
    next(b for n, b in hf.named_buffers() if n.endswith("inv_freq")).copy_(1 / ours.periods)

    hf.save_pretrained(tmp_path)                              # model.safetensors: `layer.N`
    save_file(files["qkvb"], tmp_path / "timm.safetensors")
    for name, content in {
            "memory.pth": {"state_dict": hf.state_dict()},    # `model.layer.N`
            "timm.bin": files["qkvb"], "meta.pth": files["meta"], "wrapped.pth":
            {"teacher": {f"module.backbone.{k}": v for k, v in files["meta"].items()}}}.items():
        torch.save(content, tmp_path / name)
    models = [load_dino(path) for path in tmp_path.iterdir() if path.suffix != ".json"]
    assert len(models) == 6
    for h, w in (64, 64), (96, 160), (192, 176):              # 132 patches: the fused attention
        x = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(h))
        with torch.no_grad():
            want, (patches, cls) = hf(x).last_hidden_state, ours(x)
            assert patches.shape == (2, h * w // 256, 128) and want.std() > 0.3
            assert (patches - want[:, 5:]).abs().max() < 1e-4
            assert (cls - want[:, 0]).abs().max() < 1e-4
            for model in models:
                again = model(x)
                assert torch.equal(again[0], patches) and torch.equal(again[1], cls)
    # timm's usual file has no bias: the same as a mask of zeros, which is what Meta released
    for key in files["meta"]:
        if key.endswith("bias_mask"):
            files["meta"][key] = torch.zeros(384, dtype=torch.bfloat16)
    torch.save(files["meta"], tmp_path / "zero.pth")
    save_file(files["timm"], tmp_path / "plain.safetensors")
    plain, zero = load_dino(tmp_path / "plain.safetensors"), load_dino(tmp_path / "zero.pth")
    assert plain.config == zero.config == ours.config
    assert torch.equal(plain(x)[0], zero(x)[0]) and not torch.equal(plain(x)[0], ours(x)[0])


def test_dino_sources(tmp_path, monkeypatch):
    c = ViTConfig(dim=96, depth=1, heads=3, patch=8, registers=2, stem=16, mean=(0.5, 0.5, 0.4))
    model = DINOv3(c).half()
    saved = dict(kind="dino", version=config.VERSION, config=vars(c), model=model.state_dict())
    torch.save(saved, tmp_path / "tiny.pt")
    monkeypatch.setattr(dino, "TINY", tmp_path / "tiny.pt")
    x, state = torch.randn(2, 3, 32, 16), torch.get_rng_state()
    tiny = load_dino("tiny")
    assert torch.equal(torch.get_rng_state(), state)          # loading draws no random numbers
    assert torch.equal(tiny(x)[0], model.float().eval()(x)[0]) and tiny.config == c
    for name, mean in ("a.pth", 0.485), ("a-sat493m.pth", 0.430), ("a-eadcf0ff.pth", 0.430):
        torch.save(layouts(random_vit(True))["meta"], tmp_path / name)
        assert load_dino(tmp_path / name).config.mean[0] == mean
    periods = torch.arange(1.0, 9.0)                          # a file's own count: heads of 32
    torch.save({**layouts(random_vit(True))["meta"], "rope_embed.periods": periods},
               tmp_path / "heads.pth")
    model = load_dino(tmp_path / "heads.pth")
    assert model.config.heads == 4 and torch.equal(model.periods, periods)
    monkeypatch.setenv("NOVAE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")   # nobody answers there
    monkeypatch.setattr(fetch, "WAIT", 0)
    torch.save({**saved, "kind": "ae"}, tmp_path / "ae.pt")
    for source, why in [(tmp_path / "ae.pt", "holds ae, not dino"), ("vits61", "no model name"),
                        ("vits16plus", "timm/vit_small_plus_patch16_dinov3.*'tiny'")]:
        with pytest.raises(config.UserError, match=why):
            load_dino(source)
    for name in "vits16plus.safetensors", "dinov3_vits16_pretrain_lvd1689m-08c60483.pth":
        (tmp_path / name).touch()
    assert dino.find_weights("vits16plus").name == "vits16plus.safetensors"
    assert dino.find_weights("vits16").name.endswith("08c60483.pth")


def test_loader_names_everything_that_is_wrong(tmp_path):
    good, path = layouts(random_vit(True)), tmp_path / "x.pth"

    def refused(layout, *words, drop=(), **change):
        torch.save({k: v for k, v in {**good[layout], **change}.items() if k not in drop}, path)
        with pytest.raises(config.UserError) as error:
            load_dino(path)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)

    for layout in good:                                       # each tensor, under the file's name
        for key in good[layout]:
            if not any(s in key for s in ("mask_token", "periods", "local_cls", ".0.", ".2.")):
                refused(layout, f"{key} is missing", drop=[key])
    refused("meta", "cls_token is missing", "blocks.2.norm1.bias is missing", "junk is unexpected",
            "norm.weight has shape (7,) and not (128,)", drop=("cls_token", "blocks.2.norm1.bias"),
            **{"junk": torch.ones(1), "norm.weight": torch.ones(7)})
    name, ones = "blocks.1.attn.qkv.bias", torch.ones(384)
    refused("meta", f"{name}_mask holds NaN", **{name + "_mask": ones * torch.nan})
    refused("meta", "a bias for k", **{name + "_mask": ones, name: ones})
    refused("hf", "a bias for k", **{"layer.0.attention.k_proj.bias": torch.ones(128)})
    refused("hf", "layer.0.mlp.gate_proj.weight has shape (9, 128) and not (192, 128)",
            **{"layer.0.mlp.gate_proj.weight": torch.ones(9, 128)})
    for bad in [1., 0.], [1., torch.nan], [[1.]], [], [1., 2., 3.]:
        refused("meta", "periods", **{"rope_embed.periods": torch.tensor(bad)})
    for junk in {}, [1], torch.ones(2), {"model": {"fc.weight": torch.ones(2)}}:
        torch.save(junk, path)
        with pytest.raises(config.UserError, match="no DINOv3 encoder"):
            load_dino(path)


def test_k_bias_is_masked_eps_periods():
    model, x = random_vit(False), torch.randn(1, 3, 64, 96)
    before = model(x)[0]
    for block in model.blocks:
        block.attn.qkv.bias[128:256] += 5
    assert torch.equal(model(x)[0], before)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    assert dino.rope_periods(64).tolist() == [
        1, 1.3359375, 1.78125, 2.375, 3.15625, 4.21875, 5.625, 7.5, 10, 13.3125, 17.75, 23.75,
        31.625, 42.25, 56.25, 75]


def test_published_sizes():
    counts = [21_601_152, 28_697_472, 85_669_632, 303_154_176, 403_915_776, 840_633_600,
              6_716_043_264 - 2 * 4096]                       # Meta's 7B has local_cls_norm besides
    with torch.device("meta"):
        models = [DINOv3(c) for c in dino.SIZES.values()]
    assert [sum(p.numel() for p in m.parameters()) for m in models] == counts


@pytest.mark.parametrize("tokens", [21, 150])                 # the plain products; the fused call
def test_attention_is_softmax(tokens):
    q, k, v = torch.randn(3, 2, 3, tokens, 16)
    out = dino.attention(q, k, v)
    for i in 0, tokens - 1:
        weights = torch.stack([(q[1, 2, i] * k[1, 2, j]).sum() / 4 for j in range(tokens)]).exp()
        want = (weights[:, None] * v[1, 2]).sum(0) / weights.sum()
        assert (out[1, 2, i] - want).abs().max() < 1e-5
    assert (out - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-5


def test_frozen_stays_frozen(tmp_path):
    torch.save(layouts(random_vit(True))["meta"], tmp_path / "x.pth")
    model = load_dino(tmp_path / "x.pth")
    parent = torch.nn.ModuleList([model, torch.nn.Linear(2, 2)]).train()
    assert parent[1].training and not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        model(torch.randn(1, 3, 32, 32))                      # fills the cache of angles
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    model(model.normalize(x))[0].square().sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())


def write(path, header, data=b"", pad=0):
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()).ljust(pad)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype, shape, *offsets):
    return dict(dtype=dtype, shape=shape, data_offsets=offsets)


def test_safetensors_reader_equals_the_package(tmp_path):
    from safetensors.torch import save_file
    path = tmp_path / "x.safetensors"
    tensors = {str(d): (torch.rand(3, 5) * 99).to(d) for d in dino.DTYPES.values()}
    tensors |= dict(scalar=torch.tensor(2.5), empty=torch.empty(0, 4), odd=torch.ones(3).byte())
    save_file(tensors, path, metadata=dict(format="pt"))
    read = read_safetensors(path)
    assert read.keys() == tensors.keys() and len(dino.DTYPES) == 10
    for name, t in tensors.items():
        assert read[name].dtype == t.dtype and torch.equal(read[name], t), name
    # not aligned; and a header of 15392 bytes, which begins like an HTML page, " <"
    for pad in 115, 15392:
        write(path, dict(a=entry("U8", [1], 0, 1), b=entry("F32", [1], 1, 5)), b"\1\0\0\0\x40", pad)
        assert read_safetensors(path)["b"].item() == 2


def test_safetensors_reader_refuses(tmp_path):
    path, four = tmp_path / "x.safetensors", b"\0" * 4
    one = entry("F32", [1], 0, 4)
    for header, data, why in [
            (dict(a=one), four[:2], "truncated"), (dict(a=one), 2 * four, "bytes after"),
            (dict(a=one, b=entry("F16", [2], 2, 6)), 2 * four, "overlaps"),
            (dict(a=one, b=entry("U8", [2], 6, 8)), 2 * four, "hole"),
            (dict(a=entry("F32", [1], -4, 0)), four, "hole"),
            (dict(a=entry("F32", [1], 0, 2**70)), four, "truncated"),
            (dict(a=entry("F32", [2], 0, 4)), four, "does not take 4"),
            (dict(a=entry("F32", [-1, -1], 0, 4)), four, "of shape"),
            (dict(a=entry("F32", [0, 2**70], 0, 0)), b"", "malformed"),
            (dict(a=entry("F8_E4M3", [1], 0, 1)), b"\0", "of dtype F8"),
            (dict(a=entry("F32", 3, 0, 4)), four, "malformed"), (dict(a=3), b"", "malformed"),
            (dict(a=dict(dtype="F32")), b"", "malformed"), (b"{" * 9, b"", "malformed"),
            (b'{"a":' * 9999, b"", "malformed"), (b"{\xff}", b"", "malformed"),
            (b"[]", b"", "no safetensors file")]:
        write(path, header, data)
        with pytest.raises(config.UserError, match="x.safetensors: .*" + why):
            read_safetensors(path)
    write(path, dict(a=entry("F32", [64], 0, 256)), b"\0" * 256)
    whole = path.read_bytes()
    for content in [*(whole[:n] for n in range(0, len(whole), 7)), b"\xff" * 99,
                    b"\xff" * 8 + b"{}", b"<!DOCTYPE html><html>",
                    b"version https://git-lfs.github.com/spec/v1\nsize 9\n"]:
        path.write_bytes(content)
        with pytest.raises(config.UserError, match="empty|truncated|LFS|HTML"):
            read_safetensors(path)


# ---------------------------------------------------------------- fetch.py: a server in the test

BODY = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """server.files: path -> bytes; server.plan: path -> what to do instead, in order: a status, a
    redirect's headers, "cut" after half, "plain": knows no ranges, tells no length."""

    def do_GET(self):
        server, body = self.server, self.server.files.get(self.path)
        server.log.append((self.path, dict(self.headers)))
        act = (server.plan.get(self.path) or [404 if body is None else None]).pop(0)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and act != "plain" else 0
        status, headers = 206 if start else 200, {}
        if isinstance(act, (int, dict)):
            status, headers, body = (act, {}, b"") if isinstance(act, int) else (302, act, b"")
        elif start:
            place = f"{start}-{len(body) - 1}" if start < len(body) else "*"
            status = 416 if place == "*" else 206
            headers["Content-Range"] = f"bytes {place}/{len(body)}"
        self.send_response(status)
        if act != "plain":
            headers["Content-Length"] = max(len(body) - start, 0)
        for header in headers.items():
            self.send_header(*map(str, header))
        self.end_headers()
        self.wfile.write(body[start:(start + len(body)) // 2 if act == "cut" else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Starts servers on 127.0.0.1; the last is the hub."""
    servers = []

    def start(**files):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.files, server.plan, server.log = {f"/{k}": v for k, v in files.items()}, {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        return servers.append(server) or server
    monkeypatch.setattr(fetch, "WAIT", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("NOVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield start
    for server in servers:
        server.shutdown(), server.server_close()


def refuses(*words, call, **more):
    with pytest.raises(config.UserError) as error:
        call(**more)
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value), error.value


def left(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def threads(function, *args, **more):
    """Three at once, as ranks are."""
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(function, *args, **more) for _ in range(3)]
        return [job.result() for job in jobs]


def test_a_cut_download_goes_on_where_it_stopped(serve, tmp_path, monkeypatch):
    server, path, part = serve(f=BODY), tmp_path / "new/f", tmp_path / "new/.f.part"
    known = dict(size=len(BODY), sha256=SHA, md5=hashlib.md5(BODY).hexdigest())
    get = lambda **k: fetch.fetch(server.url + "/f", path, **(k or known)).read_bytes()
    ranges = lambda: [h.get("Range") for _, h in server.log]
    server.plan["/f"] = ["cut", 503, "cut", 429]
    monkeypatch.setattr(fetch, "TRIES", 3)                        # in a row that bring nothing new
    assert get() == get() == BODY and left(path.parent) == ["f"]
    assert ranges() == [None] + ["bytes=131072-"] * 2 + ["bytes=196608-"] * 2      # whole chunks
    for begun, act, asked in [
            (BODY[:9], None, ["bytes=9-"]), (BODY, None, []),     # of an earlier run; killed late
            (BODY[:9], "plain", ["bytes=9-"]),                    # a server without ranges: again
            (BODY + b"x", None, ["bytes=300001-", None]),         # longer than the file: again
            (b"x" * 9, None, ["bytes=9-", None])]:                # of another version: wrong sum
        path.unlink(), part.write_bytes(begun)
        server.plan["/f"], server.log[:] = [act] if act else [], []
        assert get() == BODY and ranges() == asked and left(path.parent) == ["f"]
    path.unlink(), part.write_bytes(BODY)                         # size unknown: 416 says enough
    assert get(sha256=SHA) == BODY and ranges()[2:] == ["bytes=300000-"]
    path.unlink(), monkeypatch.setattr(fetch, "TRIES", 1)
    server.plan["/f"] = ["cut"]
    refuses("truncated, 131,072 of 300,000", "goes on from there", call=get)
    assert left(path.parent) == [".f.part"] and get() == BODY


def test_downloads_that_fail_say_why_in_one_line(serve, tmp_path, monkeypatch):
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    server, path = serve(f=BODY, lfs=lfs, html=b"\n<!DOCTYPE html>", empty=b""), tmp_path / "x/f"

    def get(name="f", hub=False, **more):
        at = fetch.HUB + "/a/b/resolve/main/" if hub else server.url + "/"
        fetch.fetch(at + name, path, **more)
    server.plan = {"/f": [403, 418] + [503] * fetch.TRIES, "/a/b/resolve/main/f": [401, 403]}
    for words, more in [
            ("refuses it .HTTP 403", {}), ("HTTP 418", {}), ("fails .HTTP 503.; try later", {}),
            ("not there any more .HTTP 404", dict(name="other")),
            (f"gated.*{server.url}/a/b, and set HF_TOKEN", dict(hub=True)),   # page, variable
            ("the token in HF_TOKEN is refused", dict(hub=True, token="secret")),
            ("Git-LFS pointer", dict(name="lfs", size=9)), ("HTML page", dict(name="html")),
            ("empty", dict(name="empty")), ("its sha256 is wrong.*removed", dict(sha256="0" * 64)),
            ("its md5 is wrong", dict(md5="0")), ("300,000 bytes and not 7", dict(size=7))]:
        with pytest.raises(config.UserError, match=words):
            get(**more)
        assert left(path.parent) == []
    assert len(server.log) == 2 + fetch.TRIES + 9

    class Full(io.BytesIO):
        def write(self, chunk):
            raise OSError(28, "No space left on device")
    fetch._part(path).write_bytes(BODY[:99])
    with monkeypatch.context() as m:
        m.setattr(fetch, "open", lambda *_: Full(), raising=False)
        refuses("disk is full", "NOVAE_CACHE", call=get)
    server.shutdown(), server.server_close()
    refuses("no connection", f"without a network, get it elsewhere and save it as {path}", call=get)
    refuses("nonsense", call=lambda: fetch.fetch("nonsense:/x", path))
    assert left(path.parent) == []
    path.write_bytes(b"by hand")                                  # wrong, but not ours to delete
    refuses("md5 is wrong", "delete it", call=get, md5="0" * 32)
    assert path.read_bytes() == b"by hand"
    path.write_bytes((15392).to_bytes(8, "little") + b"{}")       # begins like a page, with " <"
    get()


def test_a_redirect_gets_no_token_and_the_hubs_own_sum_is_checked(serve, tmp_path):
    store, hub, at = serve(f=BODY), serve(), "/a/b/resolve/main/f"
    hub.plan[at] = [{"Location": store.url + "/f", "X-Linked-Etag": f'"{sha}"'}
                    for sha in (SHA, "0" * 64)]
    get = lambda name: fetch.fetch(fetch.HUB + at, tmp_path / name, token="secret\n").read_bytes()
    assert get("a") == BODY
    refuses("sha256 is wrong", call=get, name="b")
    tokens = [[h.get("Authorization") for _, h in server.log] for server in (hub, store)]
    assert tokens == [["Bearer secret"] * 2, [None] * 2]
    threads(fetch.fetch, store.url + "/f", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == BODY and len(store.log) == 3


def tgz(path, *members):
    """members: (name, bytes), or (name, a tarfile type, which is one byte)"""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = content if len(content) == 1 else tarfile.REGTYPE, "a"
            info.size = len(content) * (info.type == tarfile.REGTYPE)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def test_archives_land_whole_inside_or_not_at_all(tmp_path):
    path, out, good = tmp_path / "x.tgz", tmp_path / "out", ("top/a", b"hello")
    whole = tgz(path, good, ("top/b/c", b"xx"))
    for word, bad in [("damaged", whole[:-20]), ("damaged", b"no archive"), ("damaged", b"")] + [
            (word, tgz(path, good, bad)) for word, bad in [
                ("outside", ("../evil", b"xx")), ("outside", ("/tmp/evil", b"xx")),
                ("outside", ("a/../../b", b"xx")), ("link", ("l", tarfile.SYMTYPE)),
                ("link", ("l", tarfile.LNKTYPE)), ("device", ("d", tarfile.CHRTYPE)),
                ("device", ("d", tarfile.FIFOTYPE)), ("than 9,000", ("big", b"12" * 5000))]]:
        path.write_bytes(bad)
        refuses(word, call=fetch.unpack, archive=path, folder=out, most_bytes=9000)
        assert left(tmp_path) == ["x.tgz"]
    path.write_bytes(whole)
    (tmp_path / ".out.part").mkdir()                              # of a run that was killed
    assert fetch.unpack(path, out) == out and left(tmp_path) == ["out", "x.tgz"]
    assert (out / "a").read_bytes() == b"hello" and (out / "b/c").exists()
    tgz(path, ("a", b"xx"), ("b", b"xx"))                         # no top folder: all of it
    assert left(fetch.unpack(path, tmp_path / "out2")) == ["a", "b"]


def test_dino_weights_come_from_the_hub_once(serve, tmp_path, monkeypatch, capsys):
    from safetensors.torch import save
    c, state = ViTConfig(dim=64, depth=1, heads=1, hidden=96), {}
    for k, v in DINOv3(c).state_dict().items():
        if k != "mask_token" and "qkv.bias" not in k:
            state[dino.theirs("timm", k)] = v
    body, at = save(state), "{}/resolve/main/model.safetensors"
    timm = at.format("timm/vit_small_patch16_dinov3.lvd1689m")
    meta = at.format("facebook/dinov3-vits16-pretrain-lvd1689m")
    server = serve(**{timm: body, meta: body, timm.replace("small", "base"): body})
    monkeypatch.setitem(dino.SIZES, "vits16", c)
    for name in "vits16", "hf:vits16":
        monkeypatch.setitem(dino.SUMS, name, (len(body), hashlib.sha256(body).hexdigest()))
    for _ in range(2):
        model = load_dino("vits16")
        assert model.config == c and model(torch.randn(1, 3, 32, 48))[0].shape == (1, 6, 64)
    assert len(server.log) == 1 and capsys.readouterr().out.count(dino.LICENSE) == 1
    server.plan["/" + meta] = [401]
    refuses("facebook/dinov3-vits16-", "HF_TOKEN", "'tiny'", call=load_dino, source="hf:vits16")
    monkeypatch.setenv("HF_TOKEN", "secret")
    load_dino("hf:vits16")
    assert server.log[-1][1]["Authorization"] == "Bearer secret"
    refuses("on request", call=load_dino, source="vitl16plus")
    refuses("is no vitb16", call=load_dino, source="vitb16")


class TinyTimm(torch.nn.Module):
    """As much of timm's VisionTransformer as TimmViT asks for."""
    num_prefix_tokens, num_features, pretrained_cfg = 1, 8, dict(mean=(0.5,) * 3, std=(0.25,) * 3)

    def __init__(self, patch):
        super().__init__()
        self.patch_embed = torch.nn.Conv2d(3, 8, patch, patch)
        self.patch_embed.patch_size = (patch, patch)

    def forward_features(self, x):
        return torch.nn.functional.pad(self.patch_embed(x).flatten(2), (1, 0)).transpose(1, 2)

    def forward_intermediates(self, x, norm, output_fmt, intermediates_only):
        return [self.forward_features(x)[:, 1:]]


def test_encoders_of_timm(monkeypatch):
    asked = []

    def create_model(name, pretrained, num_classes, dynamic_img_size):
        asked.append((name, pretrained))
        if name == "resnet":
            raise TypeError("unexpected keyword argument dynamic_img_size")
        if name == "unknown":
            raise RuntimeError("Unknown model (unknown)\nmore")
        return TinyTimm(int(name))
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    for patch, counted in (16, 16), (14, 16), (8, 8):             # DINOv2's 14 counts as 16
        model = load_dino(f"timm:{patch}")
        x = model.normalize(torch.ones(2, 3, 32, 64))
        patches, cls = model(x)
        assert model.patch == counted and model.dim == 8 and x.mean() == 2 and not cls.any()
        assert patches.shape == model.features(x)[0].shape == (2, 32 * 64 // counted ** 2, 8)
        assert not model.train().training and not any(p.requires_grad for p in model.parameters())
        again = dino.rebuild(vars(model.config))                  # as a checkpoint does
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x)[0], patches) and again.config == model.config
    assert asked[-2:] == [("8", True), ("8", False)]
    assert dino.rebuild(vars(ViTConfig(dim=64, heads=1))).dim == 64
    refuses("no patch tokens", call=load_dino, source="timm:resnet")
    refuses("timm:unknown: Unknown model", call=load_dino, source="timm:unknown")
    monkeypatch.setitem(sys.modules, "timm", None)
    refuses("pip install timm", call=load_dino, source="timm:16")


# ---------------------------------------------------------------- data.py: archives, classes
def jpeg(shade, kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade,) * 3).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("name", ["imagenette", "imagewoof"])
def test_an_archive_end_to_end(name, serve, tmp_path, monkeypatch):
    url, sums = data.ARCHIVES[name]
    stem, kind = url.rpartition("/")[2], [*sums][0]
    ids = [*data.WORDS][:10:9] if name == "imagenette" else [*data.WORDS][10::9]
    members = [(f"{stem[:-4]}/{split}/{folder}/{i}.JPEG", jpeg(40 * i)) for split, n in
               (("train", 3), ("val", 2)) for folder in ids for i in range(n)]
    body = tgz(tmp_path / "x.tgz", *members, (f"{stem[:-4]}/noisy.csv", b"xx"))
    server = serve(**{stem: body})
    load = lambda split="train", **k: data.load_images(name, 16, split, tmp_path / "own", **k)
    monkeypatch.setitem(data.ARCHIVES, name, (f"{server.url}/{stem}", sums))
    refuses(f"its {kind} is wrong", call=load)                    # the real one's
    monkeypatch.setitem(data.ARCHIVES, name, (
        f"{server.url}/{stem}", {kind: hashlib.new(kind, body).hexdigest()}))
    (x, y, names), (xt, _, _) = load(), load("test")
    assert x.shape == (6, 3, 16, 16) and y.tolist() == [0] * 3 + [1] * 3 and len(xt) == 4
    assert names == [data.WORDS[i] for i in ids] and abs(int(x[1].max()) - 40) < 3
    for classes in ids[1], names[1].upper(), f" {ids[1]},{names[1]}":
        x, y, chosen = load(classes=classes)
        assert len(x) == 3 and y.tolist() == [0] * 3 and chosen == names[1:]
    assert len(server.log) == 2


def test_some_of_a_folders_classes(tmp_path):
    for name in "a", "b", "Stra\u00dfe", "du\u0308nn":             # the last as macOS writes it
        (tmp_path / "root" / name).mkdir(parents=True)
        for file in "0.jpg", "1.jpg", "._0.jpg":
            (tmp_path / "root" / name / file).touch()
    chosen = lambda classes: data.list_folder(tmp_path / "root", "train", classes)[2]
    (tmp_path / "list.txt").write_text("\ufeffb\r\n\n a \n", encoding="utf-8")
    assert chosen("") == ["Stra\u00dfe", "a", "b", "du\u0308nn"]
    assert chosen("b,a") == chosen(str(tmp_path / "list.txt")) == ["a", "b"]
    assert chosen("d\u00fcnn , STRASSE") == ["Stra\u00dfe", "du\u0308nn"]
    assert len(data.list_folder(tmp_path / "root", "train")[0]) == 4         # not the ._ files
    for classes, words in ("a,c", "no class 'c'.*a, b"), ("no.txt", "'no.txt'"), (",", "names no"):
        with pytest.raises(config.UserError, match=words):
            chosen(classes)
    refuses("shapes", call=data.load_images, name="shapes", size=8, classes="disc", cache=tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_pictures_that_would_hurt(tmp_path, capsys):
    red = Image.new("RGB", (80, 60), (200, 0, 0))
    load = lambda name: data.decode(tmp_path / name, 8)
    Image.new("RGB", (1, 60_000), (200, 0, 0)).save(tmp_path / "thin.png")
    assert (data.decode(tmp_path / "thin.png", 256)[0] == 200).all()         # not 4 gigapixels
    for array in np.full((9, 9), 0.5, np.float32), np.full((9, 9), 32896, np.int32):
        Image.fromarray(array).save(tmp_path / "x.tif")
        assert (load("x.tif") == 128).all()
    red.save(tmp_path / "exif.png", exif=b"Exif\0\0no exif")
    assert (load("exif.png")[0] == 200).all()                     # damaged EXIF, a good picture
    red.save(tmp_path / "bomb.png")
    bomb = bytearray((tmp_path / "bomb.png").read_bytes())
    bomb[16:24] = bytes([0, 0, 48, 0] * 2)                        # IHDR: width, height
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match="12288 x 12288 pixels are too many"):
        load("bomb.png")
    red.save(tmp_path / "eps.jpg", "EPS")                         # would start another program
    with pytest.raises(UnidentifiedImageError):
        load("eps.jpg")
    a, b = tmp_path / "root/a", tmp_path / "root/b"
    a.mkdir(parents=True)
    odd = os.fsdecode(b"\xe9") if sys.platform == "linux" else "\u00e9"        # no UTF-8
    for i in range(200):                                          # no JPEG either
        (a / f"{odd}{i:03}.jpg").write_bytes(jpeg(i, "PNG") if i else b"text")
    x, y, _ = data.load_images(tmp_path / "root", 8, cache=tmp_path / "own")
    assert len(x) == len(y) == 179 and x[0].max() == 1 and x[-1].min() == 198
    assert data._printable(odd) + "000.jpg: Unid" in capsys.readouterr().out
    (a / f"{odd}000.jpg").unlink(), b.mkdir()
    (b / "0.png").touch(), (b / "1.png").touch()                  # all that one class has is bad
    refuses("no picture of b", call=data.load_images, name=a.parent, size=8, cache=tmp_path / "own")


def test_a_killed_decoding_is_not_taken_for_whole(tmp_path):
    for i in range(80):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i:02d}.jpg").write_bytes(jpeg(100 + i))
    code = ("import sys, os, data; n, decode = [], data.decode\n"
            "data.decode = lambda *a: n.append(0) or (os._exit(9) if len(n) > 30 else decode(*a))\n"
            "data.load_images(sys.argv[1], 8, cache=sys.argv[2])")
    here, out = os.path.dirname(data.__file__), tmp_path / ".own"
    killed = subprocess.run([sys.executable, "-c", code, tmp_path, out], cwd=here)
    assert killed.returncode == 9 and list(out.glob("*/.images.part.npy"))
    x, y, _ = threads(data.load_images, tmp_path, 8, cache=out)[-1]
    assert x.shape == (72, 3, 8, 8) and (x.min(axis=(1, 2, 3)) >= 99).all() and y.sum() == 36
    assert not list(out.glob("*/.images.part.npy"))


# ---------------------------------------------------------------- perceptual.py

CONVS = dict(zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
                 (64, 64, 128, 128) + (256,) * 3 + (512,) * 6))

@pytest.fixture(scope="session")
def weights():                                     # random, in the two published layouts
    g, vgg, c = torch.Generator().manual_seed(0), {"classifier.0.weight": torch.zeros(2, 2)}, 3
    for n, out in CONVS.items():
        vgg[f"features.{n}.weight"] = torch.randn(out, c, 3, 3, generator=g) * (2 / (9 * c)) ** 0.5
        vgg[f"features.{n}.bias"], c = 0.1 * torch.randn(out, generator=g), out
    return dict(vgg=vgg, heads={f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=g)
                                for i, c in enumerate((64, 128, 256, 512, 512))})

@pytest.fixture(scope="session")
def model(weights, tmp_path_factory):              # the real VGG file has the format before zip
    folder = tmp_path_factory.mktemp("w")
    torch.save(weights["vgg"], folder / "v.pth", _use_new_zipfile_serialization=False)
    torch.save(weights["heads"], folder / "h.pth")
    return load_lpips(vgg=folder / "v.pth", heads=folder / "h.pth")

def pictures(seed, n=2):
    return torch.rand(2, n, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1

def slow(x, y, vgg, heads):                        # one pair, place by place, in float64
    a, b = ((v[None].double() - torch.tensor([-.030, -.088, -.188]).double().view(1, 3, 1, 1))
            / torch.tensor([.458, .448, .450]).double().view(1, 3, 1, 1) for v in (x, y))
    total, ends = 0.0, (2, 7, 14, 21, 28)
    for n in CONVS:
        weight, bias = (vgg[f"features.{n}.{k}"].double() for k in ("weight", "bias"))
        a, b = (F.conv2d(v, weight, bias, padding=1).clamp(min=0) for v in (a, b))
        if n in ends:
            h, w = a.shape[2:]
            head = heads[f"lin{ends.index(n)}.model.1.weight"].flatten().double()
            for i in range(h * w):
                p, q = (v[0, :, i // w, i % w] for v in (a, b))
                p, q = (v / (v.pow(2).sum().sqrt() + 1e-10) for v in (p, q))
                total = total + head.dot((p - q) ** 2) / (h * w)
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
    return total

def test_against_the_formula_and_its_gradient(model, weights):
    x, y = pictures(1)
    u, v = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.nn.ModuleList([model]).train()
    assert not any(m.training for m in model.modules())
    wanted = torch.stack([slow(a, b, **weights) for a, b in zip(v, y)])
    fast = model(u, y.requires_grad_())
    assert wanted.min() > 0.01 and torch.allclose(fast.double(), wanted, rtol=1e-5)
    fast.sum().backward(), wanted.sum().backward()
    assert (u.grad - v.grad).norm() < 1e-3 * v.grad.norm() and v.grad.norm() > 0
    assert y.grad is None and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x, x), torch.zeros(2)) and torch.allclose(model(y, x), fast, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, y)
    assert rough.dtype == torch.float32 and torch.allclose(rough, fast, rtol=.02)

def test_against_the_package(model, weights):
    lpips = pytest.importorskip("lpips")
    theirs = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    for name, p in theirs.named_parameters():                 # net.sliceK.N.weight, linK.model...
        key = "features." + name.split(".", 2)[2] if name.startswith("net.") else name
        p.data.copy_((weights["vgg"] | weights["heads"])[key])
    assert torch.allclose(model(*pictures(2)), theirs(*pictures(2)).flatten(), rtol=1e-4)

def test_dead_places_leave_the_gradient_finite(weights):
    dead, (x, y) = LPIPS(), pictures(4)
    dead.features.load_state_dict({k[9:]: v - 2 * ("bias" in k) for k, v in weights["vgg"].items()
                                   if k.startswith("features.")})
    assert any((m.abs().sum(1) == 0).any() for m in dead.maps(x))
    d = dead(x.requires_grad_(), y)
    d.sum().backward()
    assert d.isfinite().all() and x.grad.isfinite().all()

def test_impossible_shapes():
    for x, y in ((1, 3, 32, 32), (2, 3, 32, 32)), ((1, 1, 32, 32),) * 2, ((1, 3, 15, 32),) * 2:
        with pytest.raises(ValueError, match="one shape"):
            LPIPS()(torch.zeros(x), torch.zeros(y))

@pytest.mark.parametrize("which, to, said", [
    ("vgg", {"features.28.bias": None}, "features.28.bias is missing"),
    ("vgg", {"features.0.weight": torch.zeros(64, 1, 3, 3)}, r"\(64, 1, 3, 3\), not \(64, 3, 3"),
    ("vgg", {"features.30.weight": torch.zeros(2)}, "features.30.weight is unexpected"),
    ("vgg", {"features.0.bias": torch.full((64,), torch.nan)}, "not finite"),
    ("heads", {"lin0.model.1.weight": torch.full((1, 64, 1, 1), -.1)}, "negative"),
    ("heads", {"classifier.0": 1, "a": 0, "b": 0, "c": 0}, "classifier.0 is unexpected.*1 more"),
    ("heads", [1], "holds a list"), ("vgg", b"<!DOCTYPE html>", "HTML"), ("heads", b"", "empty"),
    ("vgg", 9999, "truncated"), ("vgg", 0, "empty"), ("heads", None, "no such file")])
def test_wrong_files_are_refused_in_one_line(weights, tmp_path, which, to, said):
    paths, bad = {k: tmp_path / f"{k}.pth" for k in weights}, tmp_path / f"{which}.pth"
    [torch.save(weights[k], paths[k]) for k in weights]
    if isinstance(to, dict):
        torch.save({k: v for k, v in {**weights[which], **to}.items() if v is not None}, bad)
    elif isinstance(to, list):
        torch.save(to, bad)
    else:
        bad.write_bytes(bad.read_bytes()[:to] if isinstance(to, int) else to or b"")
    if to is None:
        bad.unlink()
    with pytest.raises(UserError, match=said) as caught:
        load_lpips(**paths)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)

def test_files_left_out_come_from_the_cache(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("NOVAE_CACHE", str(tmp_path))
    for k, name in dict(vgg="vgg16-397923af.pth", heads="lpips-v0.1-vgg.pth").items():
        torch.save(weights[k], tmp_path / name)
        wrong = "its sha256 is wrong" if k == "vgg" else "has .* bytes and not"   # no size of VGG's
        with pytest.raises(UserError, match=f"{name}: {wrong}"):
            load_lpips(**({} if k == "vgg" else dict(vgg=tmp_path / "vgg16-397923af.pth")))
    monkeypatch.setattr(perceptual, "VGG", dict(url="http://127.0.0.1:1/"))     # there: not asked
    monkeypatch.setattr(perceptual, "HEADS", dict(url="http://127.0.0.1:1/"))
    assert torch.equal(load_lpips().heads[4], weights["heads"]["lin4.model.1.weight"])


# ---------------------------------------------------------------- ae.py


def tiny_ae(**flags):
    """An untrained autoencoder of the debug preset."""
    torch.manual_seed(0)
    c = ae.Config(**{**ae.PRESETS["debug"], **flags})
    return ae.AutoEncoder(c, dino.load_dino("tiny"))


def test_the_matched_residual_has_the_scale_of_dino():
    match = ae.DistributionMatching().train()
    h = torch.randn(8, 16, 96) * torch.rand(96) * 3 + 1
    r = torch.randn(8, 16, 5) * 7 - 4
    out = match(r, h)

    def scalars(x):                                               # per channel, then averaged
        return x.mean((0, 1)).mean(), x.std((0, 1), correction=0).mean()
    assert torch.allclose(torch.stack(scalars(out)), torch.stack(scalars(h)), atol=1e-3)
    r.requires_grad_()
    (match(r, h) * torch.arange(5.0)).sum().backward()            # no gradient through statistics
    slope = r.grad / torch.arange(5.0).clamp(min=1e-9)
    assert torch.allclose(slope[..., 1:], slope[0, 0, 1].expand_as(slope[..., 1:]))


@pytest.mark.parametrize("latent", ["svg", "dino", "unaligned", "vae"])
def test_a_latent_does_not_depend_on_its_batch_mates(latent):
    model = tiny_ae(latent=latent).train()
    x = data.to_float(data.shapes(12, 32, 0)[0].numpy(), slice(None))
    model(x, torch.Generator().manual_seed(0))
    model.eval()
    together, alone = model.encode(x), torch.cat([model.encode(x[i:i + 1]) for i in range(12)])
    assert together.shape == (12, model.latent_dim, 4, 4)
    assert (together - alone).abs().max() < 1e-4
    assert model.decode(together).shape == x.shape and model.decode(together).abs().max() <= 1


def test_the_autoencoder_leaves_its_encoder_frozen():
    model = tiny_ae().train()
    before = copy.deepcopy(model.dino.state_dict())
    assert model.training and not any(m.training for m in model.dino.modules())
    x = data.to_float(data.shapes(8, 32, 0)[0].numpy(), slice(None))
    y, _ = model(x)
    ((y - x).abs().mean() + ae.perceptual_loss(model.dino, y, x)).backward()
    assert all(p.grad is None for p in model.dino.parameters())
    assert all(p.grad is not None for p in model.residual.head.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.dino.state_dict().items())


def test_a_masked_sample_loses_its_whole_residual():
    model = tiny_ae(mask_prob=0.5, latent="unaligned").train()
    x = data.to_float(data.shapes(16, 32, 0)[0].numpy(), slice(None))
    r = model.tokens(x, torch.Generator().manual_seed(1))[0][..., model.dino.dim:]
    masked = (r == model.mask_token).all(-1).all(-1)
    assert 2 < masked.sum() < 14
    assert (model.eval().tokens(x)[0][..., model.dino.dim:] != model.mask_token).any(-1).all()


def test_statistics_go_both_ways():
    model = tiny_ae().eval()
    x = data.shapes(200, 32, 0)[0].numpy()
    device, autocast = config.setup("cpu")
    ae.measure_statistics(model, x, autocast, device)
    z = model.encode(data.to_float(x, slice(None)))
    assert z.mean((0, 2, 3)).abs().max() < 0.05 and (z.std((0, 2, 3)) - 1).abs().max() < 0.05
    raw = model.grid(model.tokens(data.to_float(x, slice(None)))[0], data.to_float(x, slice(None)))
    assert torch.allclose(z * model.std + model.mean, raw, atol=1e-4)


def test_adaptive_weight_is_the_ratio_of_the_gradients_and_is_bounded():
    w = nn.Parameter(torch.tensor([2.0, 0.0]))
    nll, g = (w * torch.tensor([3.0, 0.0])).sum(), (w * torch.tensor([0.0, 4.0])).sum()
    assert abs(ae.adaptive_weight(nll, g, w, 1e9) - 0.75) < 1e-3
    assert ae.adaptive_weight(nll, g, w, 0.05) == pytest.approx(0.05)


def test_random_crops_and_the_average_of_the_weights(tmp_path, monkeypatch):
    images = data.shapes(6, 36, 0)[0].numpy()
    crops = ae.random_crops(images, torch.tensor([3, 0, 3]), 32, config.generator(1))
    assert crops.shape == (3, 3, 32, 32)
    windows = [images[3, :, y:y + 32, x:x + 32] for y in range(5) for x in range(5)]
    assert any(np.array_equal(crops[0], w) for w in windows)
    monkeypatch.chdir(tmp_path)
    c = config.parse(ae.Config, ae.PRESETS, ["--preset", "debug", "--crop", "random", "--ema",
                                             "0.9", "--gan", "0.5", "--gan_start", "10"])
    model = ae.train(c)                                  # all the options of the real preset
    saved = config.load("out/debug/ae.pt")
    trained = [p for n, p in model.named_parameters() if not n.startswith("dino.")]
    assert all(torch.equal(a, b) for a, b in zip(trained, saved["ema"]))


def matching_rank(rank, folder, part):
    """One of two processes, in a test below."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet",
                                         rank=rank, world_size=2)
    match = ae.DistributionMatching().train()
    torch.save(match.measure(*(x[rank::2] for x in part)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_share_the_batch_statistics(tmp_path):
    part = torch.randn(8, 4, 5) * 3 + 1, torch.randn(8, 4, 7)
    torch.multiprocessing.spawn(matching_rank, (str(tmp_path), part), nprocs=2)
    whole = ae.DistributionMatching().measure(*part)
    for rank in (0, 1):
        assert torch.allclose(config.load(tmp_path / f"{rank}.pt"), whole, atol=1e-5)


def test_the_papers_sizes():
    decoder = ae.Decoder(392, 128, [1, 1, 2, 2, 4], 2)
    assert abs(sum(p.numel() for p in decoder.parameters()) / 1e6 - 43.08) < 0.05
    c = ae.Config(enc_dim=384, enc_depth=6, enc_stem=0)
    residual = ae.ResidualEncoder(c, 16, 8)
    assert abs(sum(p.numel() for p in residual.parameters()) / 1e6 - 11.19) < 0.15


# ---------------------------------------------------------------- dit.py


def test_the_dit_at_initialisation_predicts_zero():
    model = dit.DiT(12, 10, 32, 2, 2)
    for h, w in ((4, 4), (2, 6)):                                 # any grid
        v = model(torch.randn(3, 12, h, w), torch.rand(3), torch.tensor([0, 4, 10]))
        assert v.shape == (3, 12, h, w) and not v.any()


def awake(model):
    """Random weights in the layers that begin at zero."""
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    return model


def test_the_dit_sees_time_label_and_place():
    model = awake(dit.DiT(12, 10, 64, 2, 2)).eval()
    x, t, y = torch.randn(1, 12, 4, 4), torch.tensor([0.5]), torch.tensor([3])
    v = model(x, t, y)
    assert (model(x, t + 0.01, y) - v).abs().max() > 1e-4         # time is scaled for its sinusoid
    assert (model(x, t, y + 1) - v).abs().max() > 1e-4
    rolled = model(x.roll(1, 3), t, y).roll(-1, 3)
    assert (rolled - v).abs().max() > 1e-4                        # positions break the symmetry
    same = model(torch.cat([x, x.flip(0) * 2]), torch.cat([t, t]), torch.cat([y, y]))
    assert (same[:1] - v).abs().max() < 1e-5


def test_the_published_sizes():
    for size, wanted in (("S", 33.25), ("B", 131.08), ("L", 458.86), ("XL", 675.99)):
        with torch.device("meta"):
            model = dit.DiT(392, 1000, *dit.SIZES[size])
        count = sum(p.numel() for p in model.parameters()) / 1e6   # the authors' count has 256 x D
        assert abs(count - wanted) < 0.5, (size, count)            # of fixed positions in it


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    model = awake(dit.DiT(12, 10, 64, 2, 2))
    x1, y = torch.randn(10, 12, 4, 4), torch.arange(10)
    pair, results = flow.draw(x1, 2.5, config.generator(0)), []
    for micro in (0, 4):                                          # 4 + 4 + 2
        model.zero_grad()
        losses, t = dit.gradients(model, x1, y, pair, micro, contextlib.nullcontext)
        results.append((losses, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_auto_shift_is_raes_rule():
    assert flow.auto_shift(256, 768) == pytest.approx(6.93, abs=0.01)
    assert flow.auto_shift(256, 392) == pytest.approx(4.95, abs=0.01)


# ---------------------------------------------------------------- config.py: files


@pytest.mark.parametrize("content, words", [
    (b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\noid", "Git-LFS"),
    (b"<!DOCTYPE html><html>", "HTML"), (b"\x80\x02garbage", "not a readable checkpoint")])
def test_files_that_are_no_checkpoints(tmp_path, content, words):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(config.UserError, match=words):
        config.load(tmp_path / "x.pt")


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    torch.save(dict(kind="ae", x=Evil()), tmp_path / "x.pt")
    with pytest.raises(config.UserError):
        config.load(tmp_path / "x.pt")
    assert not (tmp_path / "owned").exists()
    for source in HERE.rglob("*.py"):
        for call in re.findall(r"torch\.load\((.*)\)", source.read_text()):
            assert "weights_only=True" in call or source.name == "test_all.py", source
        assert "allow_pickle" not in source.read_text() or source.name == "test_all.py"


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    config.save(path, dict(a=1))
    before = path.read_bytes()

    def full(obj, file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(config.UserError, match="No space left.*untouched"):
        config.save(path, dict(a=2))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.pt"]


def test_parse_flag_over_preset_over_default():
    c = config.parse(dit.Config, dit.PRESETS, ["--preset", "debug", "--steps", "7"])
    assert (c.steps, c.batch, c.out, c.seed) == (7, 32, "out/debug", 0) and c.said == ["steps"]


@pytest.mark.parametrize("script, flags, word", [
    ("ae.py", ["--stepz", "3"], "stepz"), ("ae.py", ["--step", "3"], "--step"),
    ("dit.py", ["--lr", "fast"], "--lr"), ("dit.py", ["--lr", "nan"], "--lr"),
    ("ae.py", ["--latent", "gan"], "--latent"), ("ae.py", ["--preset", "none"], "--preset"),
    ("ae.py", ["--steps", "0"], "--steps"), ("dit.py", ["--dim", "100", "--heads", "3"], "--heads"),
    ("sample.py", ["--sweep", "1,x"], "--sweep"), ("sample.py", ["--dim", "64"], "--dim"),
    ("sample.py", ["--t_lo", "0.9", "--t_hi", "0.1"], "--t_lo"),
    ("sample.py", ["--edit", "a.png"], "--to"), ("sample.py", ["--to", "star"], "--edit"),
    ("sample.py", ["--edit", "a.png", "--to", "star"], "--mask"),
    ("sample.py", ["--mask", "1,1,2,2"], "--edit"), ("sample.py", ["--t_edit", "1"], "--t_edit"),
    ("sample.py", ["--edit", "held-out", "--mask", "1,1,2,2"], "--mask"),
    ("sample.py", ["--edit", "held-out", "--gif"], "--gif")])
def test_bad_flags_exit_with_two_and_say_which(script, flags, word, capsys):
    module = dict(ae=ae, dit=dit, sample=sample)[script[:-3]]
    with pytest.raises(SystemExit) as stop:
        config.parse(module.Config, module.PRESETS, flags)
    assert stop.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- the command line


def test_the_debug_chain_writes_what_it_promises(work):
    out = work / "out" / "debug"
    for name in ("ae.pt", "dit.pt", "latents.npy", "labels.npy", "reconstructions.png",
                 "preview.png", "samples.png"):
        assert (out / name).stat().st_size > 0, name
    model, encoder = sample.load(out, "cpu")
    x = torch.from_numpy(data.load_images("shapes", 32, "train", work / "out/data")[0][:6].copy())
    cache = np.load(out / "latents.npy", mmap_mode="r")
    assert cache.shape == (2, 1000, encoder.latent_dim, 4, 4) and cache.dtype == np.float16
    for flipped in (0, 1):                                        # plain and mirrored
        z = encoder.encode(data.to_float(x.numpy(), slice(None), torch.tensor(bool(flipped))))
        assert (torch.tensor(cache[flipped, :6]).float() - z).abs().mean() < 0.03
    again = run("ae.py", "--preset", "debug", cwd=work)
    assert again.returncode == 0 and "finished at step 20" in again.stdout


def test_generate(work):
    model, encoder = sample.load(work / "out" / "debug", "cpu")
    labels = torch.tensor([0, 1, 2, 3, 10])
    images = sample.generate(model, encoder, labels, steps=3, scale=2.0, seed=1)
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, sample.generate(model, encoder, labels, 3, 2.0, seed=1))
    assert not torch.equal(images, sample.generate(model, encoder, labels, 3, 2.0, seed=2))
    parts = sample.generate(model, encoder, labels, 3, 2.0, seed=1, batch=2)
    assert (parts.int() - images.int()).abs().float().mean() < 1.0     # batches change nothing
    with pytest.raises(ValueError):
        sample.generate(model, encoder, torch.tensor([11]))
    encoder.fingerprint = "another"
    with pytest.raises(config.UserError, match="another autoencoder"):
        sample.generate(model, encoder, labels)


def test_sample_writes_sweep_gif_and_npz(work):
    result = run("sample.py", "--preset", "debug", "--sweep", "1,2", "--gif", "--npz", 20,
                 "--classes", "disc,3", cwd=work)
    assert result.returncode == 0, result.stderr
    out = work / "out" / "debug"
    rows = (out / "sweep.tsv").read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("steps\tscale")
    arrays = np.load(out / "samples.npz")
    assert arrays["arr_0"].shape == (20, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert Image.open(out / "trajectory.gif").n_frames > 10
    assert "sample_frechet:" in result.stdout and "real_frechet:" in result.stdout


def test_slerp_turns_evenly_on_the_sphere_and_survives_parallel_noise():
    a, b = torch.randn(2, 5, 3, 4, 4, generator=config.generator(0)).unbind(0)
    flat = lambda x: x.flatten(1).double()
    assert torch.allclose(sample.slerp(a, b, 0.0), a, atol=1e-6)
    assert torch.allclose(sample.slerp(a, b, 1.0), b, atol=1e-6)
    angle = lambda p, q: F.cosine_similarity(flat(p), flat(q)).clamp(-1, 1).acos()
    w = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])                   # one for each sample
    m = sample.slerp(a, b, w)
    assert torch.allclose(angle(a, m), w * angle(a, b), atol=1e-3)
    norm = flat(a).norm(dim=1).lerp(flat(b).norm(dim=1), w.double())
    assert torch.allclose(flat(m).norm(dim=1), norm, rtol=1e-5) and m.dtype == a.dtype
    assert torch.allclose(sample.slerp(a, 3 * a, 0.5), 2 * a, atol=1e-5)          # parallel
    for other in (a, -a):                                         # no angle; no one shortest way
        assert torch.allclose(sample.slerp(a, other, 0.25), a.lerp(other, 0.25), atol=1e-5)
    assert sample.slerp(a[:0], b[:0], 0.5).shape == (0, 3, 4, 4)


def test_between_two_classes_velocities_are_blended(work):
    model, encoder = sample.load(work / "out" / "debug", "cpu")
    between = sample.Between(model, torch.tensor([1, 1, 1]), torch.tensor([2, 2, 2]),
                             torch.tensor([0.0, 0.5, 1.0]))
    x, t = randn(4, model.channels, 4, 4).float(), torch.full((4,), 0.3)
    v = between(x, t, torch.tensor([0, 1, 2, 3]))
    pure = [model(x, t, torch.full((4,), k)) for k in (1, 2, model.classes)]
    wanted = torch.stack([pure[0][0], (pure[0][1] + pure[1][1]) / 2, pure[1][2], pure[2][3]])
    assert torch.allclose(v, wanted, atol=1e-5)
    ends = sample.generate(between, encoder, [0, 2], 2, 2.0, seed=4)
    assert torch.equal(ends, sample.generate(model, encoder, [1, 2], 2, 2.0, seed=4))


def test_edit_keeps_what_the_mask_leaves_out(work):
    model, encoder = sample.load(work / "out" / "debug", "cpu")
    x = data.to_float(data.shapes(3, 32, 1)[0].numpy(), slice(None))
    autocast, seen, decode = config.setup("cpu")[1], [], encoder.decode
    with autocast():
        z = encoder.encode(x)
        plain = ae.to_uint8(encoder.decode(z))
    labels, empty = torch.tensor([3, 4, 5]), torch.zeros(3, 32, 32)
    for t_edit in (0.0, 0.2, 0.95):                               # exactly, wherever it turns round
        assert torch.equal(sample.edit(model, encoder, x, empty, labels, 6, t_edit=t_edit), plain)
    encoder.decode = lambda latents: seen.append(latents) or decode(latents)
    corner = empty.clone()
    corner[:, :8, :8] = 1                                         # exactly the first token
    sample.edit(model, encoder, x, corner, labels, 6, blur=0.5)
    changed = (seen.pop() - z).abs().amax(1) > 0                               # (B, h, w)
    assert changed[:, 0, 0].all() and changed.sum() == 3
    soft = sample.edit(model, encoder, x, corner, labels, 6, blur=0.5, fade=0)
    assert ((seen.pop() - z).abs().amax(1) > 0).sum() > 3         # the rim stays open
    full = sample.edit(model, encoder, x, empty + 1, labels, 6, seed=1)
    assert not torch.equal(full, plain) and full.shape == soft.shape == (3, 3, 32, 32)
    assert torch.equal(full, sample.edit(model, encoder, x, empty + 1, labels, 6, seed=1))
    assert not torch.equal(full, sample.edit(model, encoder, x, empty + 1, labels, 6, seed=2))
    with pytest.raises(ValueError):
        sample.edit(model, encoder, x, empty, torch.tensor([11, 0, 0]))


def test_the_masks_of_held_out_shapes_are_theirs(work):
    images, labels, _, cover = data.shapes(60, 32, data.SHAPES_SPLITS["test"][1], masks=True)
    held, truth, _ = data.load_images("shapes", 32, "test", work / "out/data")
    assert np.array_equal(held[:60], images.numpy()) and torch.equal(truth[:60], labels)
    assert (cover > 0).flatten(1).any(1).all()


def test_edit_and_interpolate_on_the_command_line(work, tmp_path):
    held = data.load_images("shapes", 32, "test", work / "out/data")[0][3]
    Image.fromarray(held.transpose(1, 2, 0)).save(tmp_path / "held.png")
    white = Image.new("L", (64, 64))
    white.paste(255, (8, 8, 56, 56))
    white.save(tmp_path / "mask.png")
    (tmp_path / "note.txt").write_text("no picture")
    edit = ["--preset", "debug", "--edit", tmp_path / "held.png", "--to", "star"]
    sheet = work / "out/debug/edit.png"
    sheets = []
    for mask in ("4,4,28,28", tmp_path / "mask.png"):             # the same place, said twice
        result = run("sample.py", *edit, "--mask", mask, "--source", 0, cwd=work)
        assert result.returncode == 0 and "stage 3" not in result.stdout, result.stderr
        sheets.append(np.asarray(Image.open(sheet)))
    assert sheets[0].shape == (64, 8 * 64, 3) and np.array_equal(*sheets)
    assert np.array_equal(sheets[0][::2, :64:2], held.transpose(1, 2, 0))      # the picture itself
    result = run("sample.py", "--preset", "debug", "--edit", "held-out", "--n", 20, cwd=work)
    assert "edit_n: 20" in result.stdout and "edit_psnr_outside_db:" in result.stdout
    for mask, words in (("4,4,40,28", ["--mask", "box"]), ("5,5,5,9", ["--mask", "box"]),
                        ("1,2,3", ["--mask", "box"]), ("no.png", ["--mask", "no such file"]),
                        (tmp_path / "note.txt", ["--mask", "not a picture"])):
        one_line(run("sample.py", *edit, "--mask", mask, cwd=work), *words)
    Image.new("L", (9, 9)).save(tmp_path / "black.png")
    one_line(run("sample.py", *edit, "--mask", tmp_path / "black.png", cwd=work), "--mask", "white")
    box = ["--mask", "4,4,28,28"]
    one_line(run("sample.py", *edit, *box, "--to", "stair", cwd=work), "--to stair", "star")
    one_line(run("sample.py", *edit, *box, "--to", "star,disc", cwd=work), "--to", "one class")
    one_line(run("sample.py", *edit, *box, "--source", "10", cwd=work), "--source 10")
    one_line(run("sample.py", *edit, *box, "--edit", "no.png", cwd=work), "--edit", "no such file")
    result = run("sample.py", "--preset", "debug", "--interpolate", "--n", 20, cwd=work)
    assert "interpolate_slerp_accuracy:" in result.stdout, result.stderr
    assert Image.open(work / "out/debug/interpolate.png").size == (640, 640)


def test_without_a_cache_stage_2_encodes_as_it_goes(work, tmp_path):
    result = run("ae.py", "--preset", "debug", "--cache", "no", "--out", tmp_path, cwd=work)
    assert result.returncode == 0 and not (tmp_path / "latents.npy").exists(), result.stderr
    result = run("dit.py", "--preset", "debug", "--out", tmp_path, cwd=work)
    assert result.returncode == 0, result.stderr
    biases = [config.load(folder / "dit.pt")["model"]["inp.bias"]
              for folder in (tmp_path, work / "out/debug")]
    assert torch.allclose(*biases, atol=2e-3)            # the cache is half precision, no more


def test_the_real_sizes_take_steps_at_256_px(tmp_path, monkeypatch):
    """All three stages of the imagenette preset on random weights and generated photographs."""
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            picture(tmp_path / "photos" / name / f"{i}.jpg", (330, 300))
    torch.manual_seed(0)
    torch.save(DINOv3(dino.SIZES["vits16plus"]).state_dict(), tmp_path / "random.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ae, "load_lpips", lambda device: LPIPS().to(device))
    flags = ["--preset", "imagenette", "--steps", "2"]
    c = config.parse(ae.Config, ae.PRESETS, flags + [
        "--data", "photos", "--encoder", "random.pth", "--batch", "1", "--gan_start", "1"])
    model = ae.train(c)
    assert model.latent_dim == 392 and model.image_size == 256
    assert len(config.load("out/imagenette/ae.pt")["critic"]) > 0
    stage2 = config.parse(dit.Config, dit.PRESETS, flags + [
        "--batch", "2", "--size", "S", "--shift", "auto", "--micro_batch", "1"])
    net = dit.train(stage2)
    assert np.load("out/imagenette/latents.npy", mmap_mode="r").shape == (2, 4, 392, 16, 16)
    images = sample.generate(net, ae.load_ae("out/imagenette/ae.pt"), [0, 1], 1, 1.0)
    assert images.shape == (2, 3, 256, 256)


def test_more_steps_and_overwrite(work, tmp_path):
    shutil.copytree(work / "out" / "debug", tmp_path / "d")
    more = run("dit.py", "--preset", "debug", "--out", tmp_path / "d", "--steps", 25, cwd=work)
    assert more.returncode == 0 and "going on from step 20" in more.stdout, more.stderr
    other = run("dit.py", "--preset", "debug", "--out", tmp_path / "d", "--lr", 0.1, cwd=work)
    one_line(other, "dit.pt", "--lr", "--overwrite")
    fresh = run("dit.py", "--preset", "debug", "--out", tmp_path / "d", "--lr", 0.01,
                "--steps", 3, "--overwrite", cwd=work)
    assert fresh.returncode == 0 and dit.load_dit(tmp_path / "d" / "dit.pt").step == 3


def test_missing_files_say_which_command_makes_them(work, tmp_path):
    one_line(run("dit.py", "--out", tmp_path, cwd=work), "ae.pt", "python ae.py")
    shutil.copy(work / "out/debug/ae.pt", tmp_path)
    one_line(run("sample.py", "--out", tmp_path, cwd=work), "dit.pt", "python dit.py")
    one_line(run("dit.py", "--out", tmp_path, cwd=work), "latents.npy", "python ae.py")
    shutil.copy(work / "out/debug/dit.pt", tmp_path / "ae.pt")
    one_line(run("dit.py", "--out", tmp_path, cwd=work), "holds dit, not ae")
    one_line(run("ae.py", "--device", "abacus", "--preset", "debug", cwd=work), "--device abacus")
    one_line(run("ae.py", "--data", tmp_path / "no", "--out", tmp_path / "o", cwd=work), "--data")


def test_a_damaged_checkpoint_is_refused_and_left_alone(work, tmp_path):
    whole = (work / "out/debug/ae.pt").read_bytes()
    (tmp_path / "ae.pt").write_bytes(whole[:len(whole) // 2])
    one_line(run("ae.py", "--preset", "debug", "--out", tmp_path, cwd=work), "ae.pt", "truncated")
    assert (tmp_path / "ae.pt").read_bytes() == whole[:len(whole) // 2]
    newer = config.load(work / "out/debug/ae.pt")
    torch.save({**newer, "version": 99}, tmp_path / "ae.pt")
    one_line(run("dit.py", "--out", tmp_path, cwd=work), "version 99")


def test_a_loss_that_is_not_finite_stops_the_run(work, tmp_path):
    result = run("ae.py", "--preset", "debug", "--lr", 1e30, "--out", tmp_path / "nan", cwd=work)
    one_line(result, "loss is not finite", "--lr")
    assert not (tmp_path / "nan" / "ae.pt").exists()
    shutil.copytree(work / "out/debug", tmp_path / "d")
    before = (tmp_path / "d" / "dit.pt").read_bytes()
    result = run("dit.py", "--preset", "debug", "--lr", 1e30, "--clip", 1e30, "--overwrite",
                 "--out", tmp_path / "d", cwd=work)
    one_line(result, "loss is not finite", "--lr")
    assert (tmp_path / "d" / "dit.pt").read_bytes() == before


def test_a_full_disk_ends_in_one_line_and_leaves_what_was_there(work, tmp_path):
    """A limit on the size of a file stands for the full disk."""
    shutil.copytree(work / "out/debug", tmp_path / "d")
    before = (tmp_path / "d" / "dit.pt").read_bytes()
    result = run("dit.py", "--preset", "debug", "--steps", 25, "--out", tmp_path / "d", cwd=work,
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2))
    one_line(result, "dit.pt", "could not be written", "untouched")
    assert (tmp_path / "d" / "dit.pt").read_bytes() == before
    assert not [f for f in os.listdir(tmp_path / "d") if f.startswith(".")]


def test_a_width_below_the_latents_channels_is_warned_of(work, tmp_path):
    shutil.copytree(work / "out/debug", tmp_path / "d")
    result = run("dit.py", "--preset", "debug", "--out", tmp_path / "d", "--dim", 64, "--overwrite",
                 cwd=work)
    assert result.returncode == 0 and "warning: width 64 is not above" in result.stdout


@pytest.mark.parametrize("script, file", [("ae.py", "ae.pt"), ("dit.py", "dit.pt")])
def test_a_killed_run_ends_with_the_same_bits(work, tmp_path, script, file):
    """kill -9 in the middle, the same command again: weights equal to an uninterrupted run's."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ["--preset", "debug", "--steps", 40, "--save_every", 5]
    for folder in (whole, broken):
        folder.mkdir()
        if script == "dit.py":
            for name in ("ae.pt", "latents.npy", "latents.json", "labels.npy"):
                shutil.copy(work / "out/debug" / name, folder)
    assert run(script, *flags, "--out", whole, cwd=work).returncode == 0
    process = subprocess.Popen([sys.executable, str(HERE / script), *map(str, flags), "--out",
                                str(broken)], cwd=work, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not (broken / file).exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    step = config.load(broken / file)["step"]
    assert 0 < step < 40, "the run was over before it could be killed"
    result = run(script, *flags, "--out", broken, cwd=work)
    assert result.returncode == 0 and f"going on from step" in result.stdout, result.stderr
    a, b = config.load(whole / file), config.load(broken / file)
    for part in ("model", "ema") if script == "dit.py" else ("model",):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part


def test_ctrl_c_saves_and_says_how_to_go_on(work, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(HERE / "ae.py"), "--preset", "debug", "--steps", "5000",
         "--save_every", "5", "--out", str(tmp_path)], cwd=work, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "ae.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in out
    assert "Traceback" not in err
    step = config.load(tmp_path / "ae.pt")["step"]
    assert f"stopped at step {step}" in out
    one_line(run("dit.py", "--out", tmp_path, cwd=work), "unfinished")


def test_the_chain_on_a_folder_of_pictures(folder, work, tmp_path):
    for script in ("ae.py", "dit.py", "sample.py"):
        flags = ["--data", folder] if script == "ae.py" else []
        flags += ["--steps", 3]
        result = run(script, "--preset", "debug", "--out", tmp_path / "own", *flags, cwd=work)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "own" / "samples.png").exists()


# ---------------------------------------------------------------- evidence.py and report.py


def test_linear_classes_and_mean_iou():
    g = config.generator(0)
    y = torch.arange(300) % 3
    x = torch.eye(3)[y] * 4 + 0.1 * torch.randn(300, 3, generator=g)
    found = metrics.linear_classes(x[:200], y[:200], x[200:])
    assert (found == y[200:]).all()
    # two of three tokens of class 1 found, one taken for class 0: 2/3 and 2/3; class 2 is nowhere
    found, truth = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1])
    assert metrics.mean_iou(found, truth, 3) == pytest.approx(2 / 3)
    assert metrics.mean_iou(truth, truth, 3) == 1
    with pytest.raises(ValueError):
        metrics.mean_iou(found, truth[:4], 3)


def test_pca_finds_the_plane_and_tsne_the_groups():
    g = config.generator(1)
    plane = torch.randn(200, 2, generator=g) * torch.tensor([3.0, 1.0])
    x = plane @ torch.linalg.qr(torch.randn(20, 20, generator=g))[0][:2]
    flat = metrics.pca(x)
    wanted = plane - plane.mean(0)
    assert torch.allclose(torch.cdist(flat, flat), torch.cdist(wanted.double(), wanted.double()),
                          atol=1e-4)                    # the same picture up to a turn
    y = torch.arange(150) % 3
    x = torch.randn(3, 30, generator=g)[y] * 2 + 0.3 * torch.randn(150, 30, generator=g)
    flat = metrics.tsne(x, perplexity=15, steps=200)
    assert flat.isfinite().all() and metrics.knn(flat[:75], y[:75], flat[75:], y[75:], k=5) == 1
    assert torch.equal(flat, metrics.tsne(x, perplexity=15, steps=200))
    with pytest.raises(ValueError, match="perplexity"):
        metrics.tsne(x, perplexity=150)


def tiny_ae(**more):
    """A small autoencoder on the embedded encoder, in eval mode."""
    torch.manual_seed(0)
    c = ae.Config(ch=8, enc_dim=32, enc_depth=1, enc_stem=8, **more)
    return ae.AutoEncoder(c, load_dino("tiny")).eval()


def test_an_earlier_layer_is_what_features_says():
    x = data.to_float(data.shapes(4, 32, 0)[0].numpy(), slice(None))
    model = tiny_ae(layer=2, latent="dino")
    wanted = model.dino.features(model.dino.normalize(x))[1][:, 3:]         # cls and two registers
    assert torch.allclose(model.tokens(x)[0], F.layer_norm(wanted, (96,)), atol=1e-6)
    last = tiny_ae(latent="dino")
    assert torch.equal(last.tokens(x)[0], last.dino(last.dino.normalize(x))[0])
    with pytest.raises(UserError, match="--layer 9: this encoder has 4 blocks"):
        tiny_ae(layer=9).tokens(x)


def test_one_scalar_normalises_everything_together():
    images = data.shapes(200, 32, 0)[0].numpy()
    x = data.to_float(images, slice(None))
    spread = {}
    for scalar in (False, True):
        model = tiny_ae()
        ae.measure_statistics(model, images, contextlib.nullcontext, "cpu", scalar)
        z = model.encode(x)
        spread[scalar] = z.std((0, 2, 3))
        assert z.mean().abs() < 1e-3 and abs(z.std() - 1) < 1e-3
        assert len(model.std.unique()) == (1 if scalar else 112)
        assert torch.allclose(model.decode(z), model.decoder(model.grid(
            model.tokens(x)[0], x)).clamp(-1, 1), atol=1e-3)
    assert (spread[False] - 1).abs().max() < 1e-2 < spread[True].std()


def test_the_decoder_learns_from_noisy_latents_only_in_training():
    x = data.to_float(data.shapes(4, 32, 0)[0].numpy(), slice(None))
    model = tiny_ae(noise=0.5, mask_prob=0.0)
    plain = tiny_ae(mask_prob=0.0)
    assert torch.equal(model(x)[0], plain(x)[0])                          # eval: none
    model.train(), plain.train()
    noisy = [model(x, config.generator(s))[0] for s in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])
    assert not torch.equal(noisy[0], plain(x, config.generator(0))[0])


def test_steps_that_are_kept(work, tmp_path):
    folder = tmp_path / "kept"
    shutil.copytree(work / "out/debug", folder)
    result = run("dit.py", "--preset", "debug", "--out", folder, "--overwrite", "--keep", "5,20",
                 cwd=work)
    assert result.returncode == 0, result.stderr
    early, last = dit.load_dit(folder / "dit_5.pt"), dit.load_dit(folder / "dit_20.pt")
    assert (early.step, last.step) == (5, 20)
    for a, b in zip(last.parameters(), dit.load_dit(folder / "dit.pt").parameters()):
        assert torch.equal(a, b)
    one_line(run("dit.py", "--keep", "5;20", cwd=work), "--keep", code=2)
    one_line(run("dino.py", "--keep", "x", cwd=work), "--keep", code=2)


def test_a_lock_that_does_not_wait(tmp_path):
    with fetch.alone(tmp_path / "a") as first:
        assert first
        with fetch.alone(tmp_path / "a", wait=False) as second:
            assert not second
    with fetch.alone(tmp_path / "a", wait=False) as third:
        assert third


def test_a_table_keeps_each_row_once(tmp_path, capsys):
    table = evidence.Table(tmp_path, "t", "latent seed", "psnr")
    assert table.rows() == [] and not table.has(latent="svg", seed=0)
    table.add(latent="svg", seed=0, psnr=20.123456)
    table.add(latent="svg", seed=0, psnr=99.0)                   # measured twice: the first stays
    table.add(latent="svg", seed=1, psnr=21.0)
    assert table.rows() == [dict(latent="svg", seed="0", psnr="20.123"),
                            dict(latent="svg", seed="1", psnr="21")]
    assert "psnr: 20.123" in capsys.readouterr().out
    with pytest.raises(ValueError, match="ssim"):
        table.add(latent="svg", seed=2, ssim=1)
    with pytest.raises(UserError, match="columns"):
        evidence.Table(tmp_path, "t", "latent", "ssim").rows()


def test_the_floor_of_raw_pixels_holds_each_pixel_once():
    images = data.shapes(3, 32, 0)[0]
    z = evidence.patches_of(images)
    assert z.shape == (3, 192, 4, 4)
    patch = images[1, :, 8:16, 16:24].float()
    assert torch.equal(z[1, :, 1, 2].view(3, 8, 8), patch)


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """Rows of two experiments on `--preset debug`, as a user makes them."""
    folder = tmp_path_factory.mktemp("measured")
    result = run("lab.evidence", "fields", "width", "--preset", "debug", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "$ python ae.py --preset debug --latent vae --seed 0" in result.stdout
    assert "straightness: " in result.stdout
    return folder


def test_evidence_goes_on_and_does_nothing_twice(measured):
    rows = evidence.tables(measured / "results")["paths"].rows()
    assert [r["latent"] for r in rows] == ["svg", "vae"]
    for r in rows:
        assert 0 < float(r["straightness"]) <= 1 and 0 < float(r["consistency"]) < 1
    before = (measured / "results/paths.tsv").read_text()
    again = run("lab.evidence", "fields", "--preset", "debug", cwd=measured)
    assert again.returncode == 0 and "$ python" not in again.stdout
    assert (measured / "results/paths.tsv").read_text() == before
    one_line(run("lab.evidence", "nothing", cwd=measured), "nothing: no such experiment", code=2)
    one_line(run("lab.evidence", "fields", "--seeds", "a", cwd=measured), "--seeds", code=2)
    listing = run("lab.evidence", cwd=measured)
    assert listing.returncode == 0
    assert all(name in listing.stdout for name in evidence.EXPERIMENTS)
    one_line(run("lab.report", "--preset", "debug", cwd=measured), "evidence.py all")


def test_every_experiment_has_jobs_and_its_table():
    c = config.parse(evidence.Config, evidence.PRESETS, ["--preset", "small"])
    for name in evidence.EXPERIMENTS:
        assert evidence.jobs(c, name), name
    assert set(report.TABLES) == set(evidence.EXPERIMENTS) | {"cost", "exercises"}


def test_every_job_measures_what_its_row_says(monkeypatch, tmp_path):
    """A job that looks at the loop's last seed fills three rows with one measurement."""
    calls = []
    for name in [n for n in dir(evidence) if n.startswith("measure_")]:
        monkeypatch.setattr(evidence, name, lambda c, *about: calls.append(about) or {})
    monkeypatch.setattr(evidence.Table, "add", lambda self, **row: calls.append(row))
    c = config.parse(evidence.Config, evidence.PRESETS, ["--results", str(tmp_path)])
    for name in evidence.EXPERIMENTS:
        for what, work in evidence.jobs(c, name):
            calls.clear()
            work()
            if len(calls) == 2 and "seed" in calls[1]:
                assert calls[0][-1] == calls[1]["seed"] and calls[0][0] == calls[1]["latent"], what
            elif len(calls) == 1:                                        # several rows: scores
                assert what.split()[-3:] == [str(k) for k in calls[0][:3]], what


def test_report_numbers(tmp_path):
    table = evidence.tables(tmp_path)["generation"]
    for latent, base in (("svg", 1.0), ("vae", 4.0)):
        for seed in (0, 1, 2):
            table.add(preset="small", latent=latent, dit="base", seed=seed, trained=10, steps=10,
                      scale=1.0, shift="-", n=50, recognised=0.5, frechet=base + seed)
    N = report.Numbers(tmp_path, "small")
    assert N.scores("svg", 10, 1.0) == [".500 ± .000", "2.00 ± 1.00"]
    assert N.scores("svg", 25, 1.0) == ["-", "-"]
    assert "| 10 | 1 | .500 ± .000 | .500 ± .000 | 2.00 ± 1.00 | 5.00 ± 1.00 | 2.8 ± 1.0 |" \
        in report.steps(N)                                       # 4/1, 5/2, 6/3: 2.83 +- 1.04
    text = "a\n<!-- steps -->\nold\n<!-- /steps -->\nb"
    assert report.fill(text, dict(steps="new")) == "a\n<!-- steps -->\nnew\n<!-- /steps -->\nb"
    with pytest.raises(UserError, match="width"):
        report.fill(text, dict(width="x"))


def test_the_readme_shows_what_results_hold():
    """Nobody types a number: the tables are what report.py makes of results/ now."""
    N = report.Numbers(HERE / "results", "small")
    assert N.tables["generation"], "results/generation.tsv has no rows"
    blocks = {name: make(N) for name, make in report.TABLES.items()}
    assert report.fill(README, blocks) == README, "run `python -m lab.report`"


# ---------------------------------------------------------------- the house and the README

CORE = "flow toy_flow data dino ae dit sample metrics".split()


def imports(path):
    """The modules that a file imports, dotted, project's packages spelled out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_import_direction_and_the_five_packages():
    for path in [*HERE.glob("*.py"), *HERE.glob("*/*.py")]:
        found = {m.split(".")[0] for m in imports(path)}
        if "test" in path.name:
            continue
        own = {p.stem for p in HERE.glob("*.py")} | {"plumbing", "lab", "exercises"}
        if path.parent.name == "plumbing":
            assert found & own <= {"plumbing"}, path
        if path.parent == HERE:
            assert not found & {"lab", "exercises"}, path
        third = {m for m in found - own if m not in sys.stdlib_module_names}
        assert third <= {"torch", "numpy", "tqdm", "PIL", "requests"}, (path, third)
    assert imports(HERE / "flow.py") <= {"math", "torch"}


def test_importing_does_no_work(tmp_path):
    modules = [*CORE, *(f"{p.parent.name}.{p.stem}" for p in HERE.glob("*/*.py")
                        if "test" not in p.name)]
    code = "; ".join(f"import {m}" for m in modules)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                            capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert result.returncode == 0 and not result.stdout and not os.listdir(tmp_path), result.stderr


README = (HERE / "README.md").read_text() if (HERE / "README.md").exists() else ""


def test_the_readme_names_what_there_is():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (HERE / path).exists(), path
    for name in set(re.findall(r"\b(\w+\.py)\b", README)):
        assert list(HERE.rglob(name)), name
    for name, lines in re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README):
        assert abs(len(next(HERE.rglob(name)).read_text().splitlines()) - int(lines)) <= 10, name


COMMANDS = sorted({line.split("#")[0].strip() for block in re.findall(r"```(?:sh|bash)\n(.*?)```",
                   README, re.S) for line in block.splitlines() if line.startswith("python ")})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_the_readmes_commands_exists(command):
    for part in command.split("&&"):
        words = part.split()
        if words[1:3] == ["-m", "pytest"] or words[1] == "test_all.py":
            continue
        if words[1] == "-m":
            words = words[1:]
        module, flags = importlib.import_module(words[1].removesuffix(".py")), words[2:]
        while module is evidence and flags and not flags[0].startswith("-"):
            assert flags[0] in (*evidence.EXPERIMENTS, "all")
            flags = flags[1:]
        config.parse(module.Config, module.PRESETS, flags)


# ---------------------------------------------------------------- exercises.py


def test_twelve_exercises_are_not_yet_solved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)                          # what the reader trained does not count
    assert list(exercises.EXERCISES) == [f"exercise_{n}" for n in range(1, 13)]
    for name, check in exercises.EXERCISES.items():
        assert len(check.__doc__.splitlines()) >= 3, name
        began = time.time()
        assert exercises.main([name]) == 1
        said = capsys.readouterr().out
        assert said.startswith(f"{name}: not yet: ") and said.count("\n") == 1, said
        assert "Error" not in said and time.time() - began < 60, said


@pytest.mark.parametrize("n", range(1, 13))
def test_the_lines_of_an_exercise_are_marked(n):
    marked = {p.name for p in HERE.glob("*.py") if p.name not in ("check.py", "test_all.py")
              and re.search(rf"# ---- .*EXERCISE {n}: .* ----$", p.read_text(), re.M)}
    text = exercises.EXERCISES[f"exercise_{n}"].__doc__
    assert marked and any(name.split(".")[0] in text for name in marked), marked


def test_solved_exercises_pass(monkeypatch, capsys):
    def midpoint(velocity, x, steps, shift=1.0, callback=None):
        x, at = x if x.dtype == torch.float64 else x.float(), flow.times(steps, shift)
        for i, (a, b) in enumerate(zip(at, at[1:])):
            if callback:
                callback(i, a, x)
            x = x + (b - a) * velocity(x + (b - a) / 2 * velocity(x, a), (a + b) / 2).to(x.dtype)
        if callback:
            callback(steps, 1.0, x)
        return x

    def draw(x1, shift=1.0, generator=None):
        t = torch.randn(len(x1), generator=generator).sigmoid()
        return torch.randn(x1.shape, generator=generator), flow.shift_time(t, shift)

    def recall(real, fake, k=3):
        radii = torch.cdist(fake, fake).kthvalue(k + 1).values
        return (torch.cdist(real, fake) <= radii).any(1).double().mean().item()
    half = torch.tensor([0, 0, 2, 3, 0, 0, 3, 2, 2, 3, 1, 1, 3, 2, 1, 1])
    for module, name, value in ((flow, "midpoint", midpoint), (flow, "draw", draw),
                                (metrics, "recall", recall), (toy_flow, "SEPARABLE", half)):
        monkeypatch.setattr(module, name, value, raising=False)
    assert exercises.main(["exercise_1", "exercise_2", "exercise_4", "exercise_6"]) == 0
    assert capsys.readouterr().out.count(": passed: ") == 4
    monkeypatch.setattr(flow, "midpoint", flow.heun)     # second order too, but not the midpoint
    assert exercises.main(["exercise_2"]) == 1 and "middle" in capsys.readouterr().out
    monkeypatch.setattr(flow, "midpoint", lambda *a: 1 / 0)
    assert exercises.main(["exercise_2"]) == 1 and "ZeroDivision" in capsys.readouterr().out


def test_the_command_of_the_exercises(tmp_path):
    result = run("test_all.py", "exercise_4", cwd=tmp_path)
    assert result.returncode == 1 and result.stdout.startswith("exercise_4: not yet: consistency")
    one_line(run("test_all.py", "exercise_13", cwd=tmp_path), "exercise_1,", "exercise_12", code=2)


if __name__ == "__main__" and sys.argv[1:]:              # python test_all.py exercise_3
    sys.exit(exercises.main(sys.argv[1:]))
