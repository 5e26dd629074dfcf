"""Tests of the core, of its command line, and of what the texts say.

    python -m pytest                      # all three test files
    python test_all.py exercise_2         # the check of an exercise
"""
import ast, contextlib, copy, importlib, math, os, re, resource, shutil, signal, subprocess
import sys, time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import ae, data, dino, dit, flow, metrics, sample, toy_flow
from dino import DINOv3, ViTConfig, load_dino
from exercises import check
from lab import evidence, spectrum
from plumbing import config, gan, muon
from plumbing.config import UserError, generator
from plumbing.lpips import LPIPS
from plumbing.testing import ROOT, call, one_line, picture, refuses, run, start, threads

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
    for sampler in (flow.heun, flow.ab2):
        errors = [(sampler(gaussian_velocity(2.0, 0.5), x0, n) - exact).abs().max().item()
                  for n in (80, 160)]
        assert 0.2 < errors[1] / errors[0] < 0.3                  # second order
        unequal = sampler(gaussian_velocity(2.0, 0.5), x0, 320, shift=4.0)
        assert (unequal - exact).abs().max() < 1e-4               # Euler's error: .02
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
    for sampler in (flow.euler, flow.ab2):
        calls, seen = [], []
        end = sampler(lambda x, t: calls.append(t) or torch.ones_like(x), torch.zeros(2, 3), steps,
                      callback=lambda i, t, x: seen.append((i, t)))
        assert len(calls) == steps and calls[0] == 0 and torch.allclose(end, torch.ones(2, 3))
        assert len(seen) == steps + 1 and seen[-1][1] == 1
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


def test_guidance_away_from_a_weaker_model_asks_it_for_no_class():
    asked = []

    def model(factor):
        return lambda x, t, y: asked.append((factor, y.tolist())) or x * 0 + factor * y[0]
    x, y = torch.zeros(2, 3, 2, 2), torch.tensor([4, 4])
    v = flow.guided(model(1), y, 10, 3.0, weak=model(0.5))(x, 0.5)
    assert torch.equal(v, torch.full_like(v, 5 + 3 * (4 - 5)))
    assert asked == [(1, [4, 4]), (0.5, [10, 10])]
    flow.guided(model(1), y, 10, 1.0, weak=model(0.5))(x, 0.5)
    assert asked[2:] == [(1, [4, 4])]                             # at scale 1 it is not asked


@pytest.mark.parametrize("sampler", [flow.euler, flow.ab2])
def test_the_samplers_state_stays_float32(sampler):
    x = sampler(lambda x, t: torch.ones_like(x).bfloat16(), torch.ones(1).bfloat16(), 1000)
    assert x.dtype == torch.float32 and abs(x.item() - 2) < 1e-3   # bfloat16 would stay at 1


def test_shapes_are_a_function_of_the_seed_and_nothing_else():
    x, y, names = data.shapes(1100, 32, seed=5)
    again, _, _, mask = data.shapes(300, 32, seed=5, masks=True)
    assert x.shape == (1100, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert len(names) == 10 and torch.equal(x[:300], again)       # a longer set begins with it
    assert (y[:1000].bincount() == 100).all()
    assert not torch.equal(x, data.shapes(1100, 32, seed=6)[0])
    big = F.avg_pool2d(data.shapes(20, 64, seed=5)[0].float(), 2)
    assert (big - x[:20].float()).abs().mean() < 6                # the same images at every size
    area = mask.float().mean((1, 2)) / 255
    assert 0.03 < area.min() and area.max() < 0.6


def test_the_factors_are_those_that_were_drawn():
    plain, labels, _ = data.shapes(1100, 32, seed=5)
    x, _, _, mask, factors = data.shapes(1100, 32, seed=5, masks=True, factors=True)
    assert torch.equal(x, plain) and torch.equal(data.shapes(1100, 32, 5, factors=True)[3], factors)
    found = dict(zip(data.FACTORS, factors.split(list(data.FACTORS.values()), 1)))
    assert found["noise"].max() <= data.NOISE and found["texture"].max() <= data.TEXTURE
    assert found["texture"].eq(0).double().mean() == pytest.approx(0.5, abs=0.05)
    disc, mask = labels == 0, mask.double() / 255
    area = mask[disc].mean((1, 2)) * 4
    assert torch.allclose(area, math.pi * (0.86 * found["scale"][disc, 0].double()) ** 2, rtol=0.02)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    middle = torch.stack([mask.sum(1) @ axis.double(), mask.sum(2) @ axis.double()], 1)
    middle = middle / mask.sum((1, 2))[:, None]
    assert torch.allclose(middle[disc], found["center"][disc].double(), atol=0.01)
    for name, where in (("back", 1 - mask), ("front", mask)):
        mean = (x * where[:, None]).sum((2, 3)) / where.sum((1, 2))[:, None] / 255
        assert (mean - found[name]).square().mean().sqrt() < 0.07        # lines, gradients, clamps


def test_the_class_is_not_in_the_pixels():
    x, y, _ = data.shapes(5000, 32, seed=11)
    xt, yt, _ = data.shapes(1000, 32, seed=12)
    pixels = metrics.knn(x.flatten(1).float(), y, xt.flatten(1).float(), yt)
    assert 0.15 < pixels <= 0.30


def test_to_float_and_back():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 3, 16, 16).repeat(2, 0)
    x = data.to_float(images, torch.tensor([1, 0]), torch.tensor([True, False]))
    assert x.min() == -1 and x.max() == 1 and torch.equal(x[0], x[1].flip(-1))
    assert torch.equal(data.to_uint8(x)[1], torch.from_numpy(images[0]))
    assert data.to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def test_a_folder_is_decoded_once_and_again_when_it_changes(folder, tmp_path):
    load = lambda size=16, split="train": data.load_images(folder, size, split, tmp_path / "cache")
    (x, y, names), (xt, _, _) = load(), load(split="test")
    assert names == ["cats", "d\u00f6gs"] and x.shape == (22, 3, 16, 16) and len(xt) == 2
    assert y.tolist() == [0] * 11 + [1] * 11 and isinstance(x, np.memmap)
    made = [p.stat().st_mtime_ns for p in sorted(tmp_path.glob("cache/*/*"))]
    load(), load(split="test")
    assert made == [p.stat().st_mtime_ns for p in sorted(tmp_path.glob("cache/*/*"))]
    picture(folder / "cats" / "new.png")
    assert len(load()[0]) == 23 and load(8)[0].shape[-1] == 8
    refuses("shapes", call=data.load_images, name="shapes", size=8, classes="disc", cache=tmp_path)


def test_an_interrupted_decoding_is_not_taken_for_complete(tmp_path):
    for i in range(80):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (100 + i,) * 3).save(tmp_path / "ab"[i % 2] / f"{i:02d}.jpg")
    code = ("import sys, os, data; from plumbing import photos; n, decode = [], photos.decode\n"
            "photos.decode = lambda *a: n.append(0) or (os._exit(9) if n[30:] else decode(*a))\n"
            "data.load_images(sys.argv[1], 8, cache=sys.argv[2])")
    out = tmp_path / ".own"
    killed = subprocess.run([sys.executable, "-c", code, tmp_path, out], cwd=ROOT)
    assert killed.returncode == 9 and list(out.glob("*/.images.part.npy"))
    x, y, _ = threads(data.load_images, tmp_path, 8, cache=out)[-1]
    assert x.shape == (72, 3, 8, 8) and (x.min(axis=(1, 2, 3)) >= 99).all() and y.sum() == 36
    assert not list(out.glob("*/.images.part.npy"))


def test_a_page_of_examples(folder, tmp_path):
    flags = ["--data", folder, "--size", 32, "--columns", 13]
    result = call(data, *flags, cwd=tmp_path)
    assert result.returncode == 0 and "22 images" in result.stdout
    page = np.asarray(Image.open(tmp_path / "out/data/page.png"))
    assert page.shape == (128, 13 * 64, 3)                        # two rows of 11 images, 2 white
    assert (page[:, 11 * 64:] == 255).all() and page[:, :11 * 64].std() > 20
    one_line(call(data, *flags, "--columns", 0, cwd=tmp_path), "--columns", code=2)
    one_line(call(data, "--data", tmp_path / "none", cwd=tmp_path), "no such folder")


# ---------------------------------------------------------------- toy_flow.py


@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_the_exact_velocity_is_bayes_rule_cell_by_cell(mix):
    g = generator(0)
    x, t, y = torch.randn(20, 2, generator=g), torch.rand(20, generator=g), torch.arange(20) % 5
    exact = toy_flow.Exact(mix)(x, t, y)
    for i in range(20):
        u, total, expected = t[i].item(), 0.0, torch.zeros(2, dtype=torch.float64)
        var = (1 - u) ** 2 + (u * toy_flow.SPREAD) ** 2
        for k, center in enumerate(toy_flow.CENTERS.double()):
            labels = (1 - mix) * (toy_flow.SEPARABLE[k] == y[i]) + mix * (toy_flow.ENTANGLED[k]
                                                                         == y[i])
            prior = 1 / 16 if y[i] == toy_flow.NULL else labels.item() / 4
            off = x[i].double() - u * center
            weight = prior * math.exp(-off.square().sum().item() / (2 * var))
            x1 = center + u * toy_flow.SPREAD ** 2 / var * off              # E[x1 | xt, cell]
            x0 = (1 - u) / var * off                                        # E[x0 | xt, cell]
            total, expected = total + weight, expected + weight * (x1 - x0)
        assert torch.allclose(exact[i].double(), expected / total, atol=1e-3)


def test_only_the_labels_differ_between_mixes():
    (a, y), (b, z) = (toy_flow.points(500, mix, generator(1)) for mix in (0.0, 1.0))
    assert torch.equal(a, b) and not torch.equal(y, z)
    for labels in (toy_flow.SEPARABLE, toy_flow.ENTANGLED):
        assert torch.equal(labels.bincount(), torch.full((4,), 4))


def test_the_toy_writes_its_three_files(tmp_path):
    result = call(toy_flow, "--preset", "debug", "--steps", 2, "--samples", 40, "--seeds", 1,
                  cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = dict(line.split(": ") for line in result.stdout.splitlines() if line.count(": ") == 1)
    assert float(found["exact_separable_consistency"]) > 0.9
    assert float(found["exact_entangled_consistency"]) < 0.5
    out = tmp_path / "out/toy_debug"
    assert {p.name for p in out.iterdir()} == {f"toy_flow.{kind}" for kind in ("png", "gif", "tsv")}
    assert len((out / "toy_flow.tsv").read_text().splitlines()) == 1 + 2 * 4 * 28
    one_line(call(toy_flow, "--samples", 3, cwd=tmp_path), "--samples", "40", code=2)


# ---------------------------------------------------------------- metrics.py and the judge


def randn(*shape, seed=0):
    """float64 from a standard normal."""
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
    expected = 1.5 ** 2 + 2 ** 2 + A.trace() + B.trace() - 2 * trace
    zero, there = torch.zeros(2, dtype=torch.float64), torch.tensor([1.5, -2.0]).double()
    assert abs(metrics.frechet(exact_normal(zero, A), exact_normal(there, B)) - expected) < 1e-9


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
    expected = within(a) + within(b) - 2 * np.mean([k(p, q) for p in a for q in b])
    assert abs(metrics.kid(a, b) - expected) < 1e-12


def test_kid_is_unbiased_and_sees_a_shift():
    same = torch.tensor([metrics.kid(randn(20, 6, seed=2 * s), randn(30, 6, seed=2 * s + 1))
                         for s in range(400)])
    assert same.mean().abs() < 3 * same.std() / 20                # zero within its standard error
    assert same.min() < 0                                         # a biased one is never negative
    assert metrics.kid(randn(500, 6), randn(500, 6, seed=1) + 1) > 0.5


def test_energy_distance_is_the_slow_loop():
    a, b = randn(9, 2), randn(7, 2, seed=1) + 1
    within = lambda x: np.mean([float((p - q).norm()) for i, p in enumerate(x)
                                for j, q in enumerate(x) if i != j])
    expected = 2 * np.mean([float((p - q).norm()) for p in a for q in b]) - within(a) - within(b)
    assert abs(metrics.energy_distance(a, b) - expected) < 1e-12
    many = metrics.energy_distance(randn(2300, 2), randn(1700, 2, seed=1))       # several chunks
    assert abs(many) < 0.01


def test_energy_distance_of_two_points_apart():
    a, b = torch.zeros(3, 2), torch.tensor([[3.0, 4.0]] * 2)
    assert metrics.energy_distance(a, b) == pytest.approx(10)


def slow_precision_recall(real, fake, k):
    """Row by row: is a row of one set in a ball of the other?"""
    def covered(x, balls):
        right = 0
        for p in x:
            for i, center in enumerate(balls):
                others = sorted(float((center - q).norm()) for j, q in enumerate(balls) if j != i)
                if float((p - center).norm()) <= others[k - 1]:
                    right += 1
                    break
        return right / len(x)
    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_is_the_slow_loop(k):
    real, fake = randn(40, 3), 0.6 * randn(25, 3, seed=1) + 0.7
    precision, recall = metrics.precision_recall(real, fake, k)
    assert (precision, recall) == pytest.approx(slow_precision_recall(real, fake, k))
    assert 0 < recall < precision < 1
    twice = torch.cat([real, real])                      # a second copy is a neighbor at distance 0
    assert metrics.precision_recall(twice, fake, 1)[0] == 0
    assert metrics.precision_recall(real.float(), fake.float(), k) == (precision, recall)


def test_precision_recall_tells_two_faults_apart():
    """One mode of two left out: recall halves.  Half the samples far away: precision halves."""
    two = randn(2400, 2) + 50 * (torch.arange(2400) % 2)[:, None]                # several chunks
    assert metrics.precision_recall(two, two) == (1, 1)
    precision, recall = metrics.precision_recall(two, randn(1200, 2, seed=1))
    assert precision > 0.9 and 0.4 < recall < 0.5
    precision, recall = metrics.precision_recall(randn(1200, 2), two)
    assert 0.4 < precision < 0.5 and recall > 0.9


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
    (lambda: metrics.psnr(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16)), "of one shape"),
    (lambda: metrics.psnr(*[torch.zeros(2, 3, 16, 16, dtype=torch.uint8)] * 2), "uint8"),
    (lambda: metrics.ssim(*[torch.zeros(2, 3, 10, 16)] * 2), "11"),
    (lambda: metrics.ssim(*[torch.full((2, 3, 16, 16), math.nan)] * 2), "NaN"),
    (lambda: metrics.frechet(torch.zeros(1, 3), torch.zeros(5, 3)), "n >= 2"),
    (lambda: metrics.frechet(torch.zeros(5, 3), torch.zeros(5, 4)), r"\(5, 3\) and \(5, 4\)"),
    (lambda: metrics.kid(torch.zeros(5, 3), torch.full((5, 3), math.inf)), "NaN or infinity"),
    (lambda: metrics.energy_distance(torch.zeros(5), torch.zeros(5)), r"\(n, d\)"),
    (lambda: metrics.precision_recall(torch.zeros(9, 3), torch.zeros(3, 3)), "m >= 4"),
    (lambda: metrics.precision_recall(torch.zeros(9, 3), torch.zeros(9, 3), k=0), "at least 1"),
    (lambda: metrics.knn(torch.ones(9, 2), torch.zeros(9).long(), torch.ones(1, 2),
                         torch.zeros(1).long()), "n >= 20"),
    (lambda: metrics.linear_probe(torch.ones(9, 2), torch.zeros(8).long(), torch.ones(1, 2),
                                  torch.zeros(1).long()), "9 whole numbers"),
    (lambda: metrics.judge_images(metrics.Judge().eval(), torch.zeros(1, 3, 32, 32)), "uint8"),
    (lambda: metrics.judge_images(metrics.Judge(), data.shapes(2)[0]), "training mode"),
])
def test_wrong_input_of_a_metric_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_linear_classes():
    y = torch.arange(300) % 3
    x = torch.eye(3)[y] * 4 + 0.1 * randn(300, 3)
    assert (metrics.linear_classes(x[:200], y[:200], x[200:]) == y[200:]).all()


# ---------------------------------------------------------------- the rulers


@pytest.fixture(scope="module")
def shipped_judge():
    return metrics.load_judge()


@pytest.fixture(scope="module")
def rulers():
    """-> metrics.Rulers beside 1,000 images; 500 others and their labels; the scores of these."""
    images, labels, _ = data.shapes(500, 32, 77)
    made = metrics.Rulers(data.shapes(1000, 32, 0)[0])
    return made, images, labels, made(images, labels)


def test_the_rulers_know_fresh_shapes(rulers):
    score, images, labels, real = rulers
    assert real["accuracy"] >= 0.99 and real["n"] == 500
    assert real["frechet"] < 0.2 and real["color"] < 0.2 and abs(real["kid"]) < 0.02
    assert min(real["precision"], real["recall"]) > 0.85
    noise = (randn(*images.shape) * 60 + 128).clamp(0, 255).to(torch.uint8)
    bad = score(noise, labels)
    assert bad["accuracy"] < 0.2 and bad["recall"] == 0 and bad["kid"] > 1
    assert all(bad[name] > 30 * real[name] for name in ("frechet", "factors", "conv", "color"))
    order = torch.randperm(500, generator=config.generator(0))            # sets, not sequences
    assert score(images[order], labels[order]) == pytest.approx(real, rel=1e-4, abs=1e-6)
    for name in ("judge.pt", "factors.pt"):
        assert metrics.JUDGE.with_name(name).stat().st_size < 500_000


def test_each_ruler_sees_what_it_should(rulers):
    score, images, labels, real = rulers
    few = torch.cat([(labels == k).nonzero()[:3, 0] for k in range(10)]).repeat(17)[:500]
    few = score(images[few], labels[few])                                 # three images a class
    assert few["accuracy"] >= 0.99 and few["precision"] > 0.7 and few["recall"] == 0
    assert all(few[name] > 5 * real[name] for name in ("frechet", "factors", "conv", "color"))
    blurred = F.avg_pool2d(images.float(), 3, 1, 1, count_include_pad=False).round().byte()
    blurred = score(blurred, labels)
    assert blurred["factors"] > 5 * real["factors"] and blurred["conv"] > 1.1 * real["conv"]
    assert blurred["color"] < 1.2 * real["color"] and blurred["accuracy"] >= 0.98
    inverted = score(255 - images.flip(1), labels)     # the colors are symmetric: nothing to see
    for name in ("accuracy", "recall", "frechet", "conv", "color"):
        assert inverted[name] == pytest.approx(real[name], rel=0.15), name
    darker = score((images * 0.8).byte(), labels)
    assert darker["accuracy"] >= 0.99 and darker["frechet"] < 0.5
    assert all(darker[name] > 3 * real[name] for name in ("factors", "conv", "color"))


def test_random_features_are_the_slow_loop():
    x = randn(2, 3, 16, 16).float()
    found = metrics.random_features(x)
    assert found.shape == (2, 384) and torch.equal(found, metrics.random_features(x))
    assert torch.allclose(found[1:], metrics.random_features(x[1:]), atol=1e-5)
    weight = torch.randn(32, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / math.sqrt(27)
    padded, channel = F.pad(x[1], (1, 1, 1, 1)), 5
    y = torch.tensor([[(padded[:, i:i + 3, j:j + 3] * weight[channel]).sum() for j in range(16)]
                      for i in range(16)])
    y = torch.where(y > 0, y, 0.2 * y).view(8, 2, 8, 2).mean((1, 3))
    assert torch.allclose(found[1, [channel, 32 + channel]], torch.stack([y.mean(), y.std()]),
                          atol=1e-5)


def test_the_color_grid_is_the_mean_of_each_square():
    x = randn(2, 3, 32, 32).float()
    grid = metrics.color_grid(x).view(2, 3, 4, 4)
    assert torch.allclose(grid[1, 2, 3, 0], x[1, 2, 24:, :8].mean(), atol=1e-6)


def test_the_color_distance_of_a_shift_is_known():
    a = torch.randint(0, 200, (400, 3, 1, 1), generator=config.generator(0), dtype=torch.uint8)
    a = a.expand(-1, -1, 32, 32)
    b = a + 50                                         # a shift of 100 / 255 in each of 48 numbers
    score = metrics.Rulers(a)
    distance = metrics.frechet(score.features(b)[0]["color"], score.real["color"])
    assert distance == pytest.approx(48 * (50 / 127.5) ** 2, rel=1e-4)


def test_the_other_network_knows_the_factors():
    images, _, _, factors = data.shapes(1000, 32, seed=1234, factors=True)
    network = metrics.load_judge(metrics.JUDGE.with_name("factors.pt"))
    found = metrics.extract(network, images)[:, 10:]
    fit = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1]
                       for pair in zip(found.T, factors.T)]).split(list(data.FACTORS.values()))
    fit = {name: values.max().item() for name, values in zip(data.FACTORS, fit)}
    assert min(fit[name] for name in ("back", "front", "center", "scale", "noise")) > 0.94, fit
    assert min(fit[name] for name in ("angle", "lines", "texture", "gradient")) > 0.7, fit


def test_the_judge_is_frozen_and_blind_to_batch_mates(shipped_judge):
    images = data.shapes(64, 32, seed=5)[0]
    assert not shipped_judge.training
    assert not any(p.requires_grad for p in shipped_judge.parameters())
    together = metrics.judge_images(shipped_judge, images)[0]
    alone = metrics.judge_images(shipped_judge, images, batch=1)[0]
    assert torch.allclose(together, alone, atol=1e-5) and together.dtype == torch.float32
    assert torch.equal(metrics.judge_images(shipped_judge, images.numpy())[0], together)
    logits = shipped_judge(images.float() / 127.5 - 1)
    assert torch.equal(logits.argmax(1), metrics.judge_images(shipped_judge, images)[1])
    with torch.autocast("cpu", torch.bfloat16):                   # precision is the judge's own
        assert torch.equal(metrics.judge_images(shipped_judge, images)[0], together)


def test_the_judge_reads_other_sizes(shipped_judge):
    images, labels, _ = data.shapes(300, 64, seed=1234)
    assert (metrics.judge_images(shipped_judge, images)[1] == labels).double().mean() >= 0.99


@pytest.mark.parametrize("swiglu", [False, True])
def test_the_vit_equals_transformers(swiglu, tmp_path):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel
    theirs = DINOv3ViTModel(DINOv3ViTConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, num_register_tokens=4,
        intermediate_size=192, use_gated_mlp=swiglu, hidden_act=["gelu", "silu"][swiglu])).eval()
    g = torch.Generator().manual_seed(0)
    for name, p in theirs.requires_grad_(False).named_parameters():    # so that each one matters
        p.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
        if "norm" in name and name.endswith("weight"):
            p.add_(1)
    # transformers does not round the periods to bfloat16
    next(b for n, b in theirs.named_buffers() if n.endswith("inv_freq")).copy_(
        1 / dino.rope_periods(64))
    theirs.save_pretrained(tmp_path)
    ours = load_dino(tmp_path / "model.safetensors")
    assert ours.config == ViTConfig(dim=128, depth=3, heads=2, hidden=192, swiglu=swiglu)
    for h, w in (64, 64), (96, 160), (192, 176):              # 132 patches: the fused attention
        x = torch.randn(2, 3, h, w, generator=g)
        expected = theirs(x).last_hidden_state
        patches, cls = ours(x)
        assert patches.shape == (2, h * w // 256, 128) and expected.std() > 0.3
        assert (patches - expected[:, 5:]).abs().max() < 1e-4
        assert (cls - expected[:, 0]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="patch size 16"):
        ours(x[..., 1:])


def test_k_has_no_bias_and_periods_are_rounded():
    model, x = DINOv3(ViTConfig(dim=128, depth=2, heads=2, hidden=192)).freeze(), torch.randn(
        1, 3, 64, 96)
    before = model(x)[0]
    for block in model.blocks:
        block.attn.qkv.bias[128:256] += 5
    assert torch.equal(model(x)[0], before)
    model.blocks[0].attn.qkv.bias[256:] += 5
    assert not torch.equal(model(x)[0], before)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert dino.rope_periods(64).tolist() == [
        1, 1.3359375, 1.78125, 2.375, 3.15625, 4.21875, 5.625, 7.5, 10, 13.3125, 17.75, 23.75,
        31.625, 42.25, 56.25, 75]


def test_published_sizes():
    counts = [21_601_152, 28_697_472, 85_669_632, 303_154_176, 403_915_776, 840_633_600,
              6_716_043_264 - 2 * 4096]                       # Meta's 7B also has local_cls_norm
    with torch.device("meta"):
        models = [DINOv3(c) for c in dino.SIZES.values()]
    assert [sum(p.numel() for p in m.parameters()) for m in models] == counts


@pytest.mark.parametrize("tokens", [21, 150])                 # the plain products; the fused call
def test_attention_is_softmax(tokens):
    q, k, v = torch.randn(3, 2, 3, tokens, 16)
    out = dino.attention(q, k, v)
    for i in 0, tokens - 1:
        weights = torch.stack([(q[1, 2, i] * k[1, 2, j]).sum() / 4 for j in range(tokens)]).exp()
        expected = (weights[:, None] * v[1, 2]).sum(0) / weights.sum()
        assert (out[1, 2, i] - expected).abs().max() < 1e-5
    assert (out - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-5


def test_the_shipped_encoder_is_frozen_for_good():
    state = torch.get_rng_state()
    model = load_dino("tiny")
    assert torch.equal(torch.get_rng_state(), state)          # loading draws no random numbers
    assert sum(p.numel() for p in model.parameters()) == 492_768
    parent = nn.ModuleList([model, nn.Linear(2, 2)]).train()
    assert parent[1].training and not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        model(torch.randn(1, 3, 32, 32))                      # fills the cache of angles
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    model(model.normalize(x))[0].square().sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())
    again = dino.rebuild(vars(model.config)).freeze()         # as an autoencoder's checkpoint does
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(x)[0], model(x)[0])


# ---------------------------------------------------------------- ae.py


def tiny_ae(**flags):
    """An untrained autoencoder of the debug preset, in training mode."""
    torch.manual_seed(0)
    c = ae.Config(**{**ae.PRESETS["debug"], **flags})
    return ae.AutoEncoder(c, dino.load_dino("tiny")).train()


def some_shapes(n=8):
    return data.to_float(data.shapes(n, 32, 0)[0].numpy(), slice(None))


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
def test_a_latent_does_not_depend_on_the_rest_of_its_batch(latent):
    model, x = tiny_ae(latent=latent), some_shapes(12)
    model(x, config.generator(0))
    model.eval()
    together, single = model.encode(x), torch.cat([model.encode(x[i:i + 1]) for i in range(12)])
    assert together.shape == (12, model.latent_dim, 4, 4)
    assert (together - single).abs().max() < 1e-4
    assert model.decode(together).shape == x.shape and model.decode(together).abs().max() <= 1


def test_the_autoencoder_leaves_its_encoder_frozen():
    model, x = tiny_ae(), some_shapes()
    before = copy.deepcopy(model.dino.state_dict())
    assert model.training and not any(m.training for m in model.dino.modules())
    y, _ = model(x)
    ((y - x).abs().mean() + ae.perceptual_loss(model.dino, y, x)).backward()
    assert all(p.grad is None for p in model.dino.parameters())
    assert all(p.grad is not None for p in model.residual.head.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.dino.state_dict().items())


def test_a_masked_sample_loses_its_whole_residual():
    model, x = tiny_ae(mask_prob=0.5, latent="unaligned"), some_shapes(16)
    r = model.tokens(x, config.generator(1))[0][..., model.dino.dim:]
    masked = (r == model.mask_token).all(-1).all(-1)
    assert 2 < masked.sum() < 14
    assert (model.eval().tokens(x)[0][..., model.dino.dim:] != model.mask_token).any(-1).all()


@pytest.mark.parametrize("scalar", [False, True])
def test_encode_normalizes_and_decode_undoes_it(scalar):
    model, images = tiny_ae().eval(), data.shapes(200, 32, 0)[0].numpy()
    ae.measure_statistics(model, images, contextlib.nullcontext, "cpu", scalar)
    x = data.to_float(images, slice(None))
    z, raw = model.encode(x), model.grid(model.tokens(x)[0], x)
    assert torch.allclose(z * model.std + model.mean, raw, atol=1e-4)
    assert torch.allclose(model.decode(z), model.decoder(raw).clamp(-1, 1), atol=1e-3)
    assert z.mean().abs() < 1e-3 and abs(z.std() - 1) < 1e-3
    spread = z.std((0, 2, 3))
    if scalar:                                                    # the channels keep their scales
        assert len(model.std.unique()) == 1 and spread.std() > 1e-2
    else:
        assert z.mean((0, 2, 3)).abs().max() < 0.05 and (spread - 1).abs().max() < 1e-2


def test_an_earlier_layer_is_what_features_returns():
    x, model = some_shapes(4), tiny_ae(layer=2, latent="dino")
    target = model.dino.features(model.dino.normalize(x))[1][:, 3:]         # cls and two registers
    assert torch.allclose(model.tokens(x)[0], F.layer_norm(target, (96,)), atol=1e-6)
    last = tiny_ae(latent="dino")
    assert torch.equal(last.tokens(x)[0], last.dino(last.dino.normalize(x))[0])
    with pytest.raises(UserError, match="--layer 9: this encoder has 4 blocks"):
        tiny_ae(layer=9).tokens(x)


def test_the_decoder_gets_noisy_latents_only_in_training():
    x = some_shapes(4)
    model, plain = tiny_ae(noise=0.5, mask_prob=0.0), tiny_ae(mask_prob=0.0)
    noisy = [model(x, config.generator(s))[0] for s in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])
    assert not torch.equal(noisy[0], plain(x, config.generator(0))[0])
    model, plain = tiny_ae(noise=0.5).eval(), tiny_ae().eval()
    assert torch.equal(model(x)[0], plain(x)[0])


def test_adaptive_weight_is_the_ratio_of_the_gradients_and_is_bounded():
    w = nn.Parameter(torch.tensor([2.0, 0.0]))
    rec, g = (w * torch.tensor([3.0, 0.0])).sum(), (w * torch.tensor([0.0, 4.0])).sum()
    assert abs(gan.adaptive_weight(rec, g, w, 1e9) - 0.75) < 1e-3
    assert gan.adaptive_weight(rec, g, w, 0.05) == pytest.approx(0.05)


def test_random_crops_are_windows_of_their_image():
    images = data.shapes(6, 36, 0)[0].numpy()
    crops = ae.random_crops(images, torch.tensor([3, 0, 3]), 32, config.generator(1))
    windows = [images[3, :, y:y + 32, x:x + 32] for y in range(5) for x in range(5)]
    assert crops.shape == (3, 3, 32, 32) and any(np.array_equal(crops[0], w) for w in windows)


def test_the_paper_sizes_of_the_autoencoder():
    with torch.device("meta"):
        decoder = ae.Decoder(392, 128, (1, 1, 2, 2, 4), 2)
        residual = ae.ResidualEncoder(ae.Config(enc_dim=384, enc_depth=6, enc_stem=0), 16, 8)
    assert abs(sum(p.numel() for p in decoder.parameters()) / 1e6 - 43.08) < 0.05
    assert abs(sum(p.numel() for p in residual.parameters()) / 1e6 - 11.19) < 0.15


# ---------------------------------------------------------------- dit.py


def test_the_dit_predicts_zero_at_initialization():
    model = dit.DiT(12, 10, 32, 2, 2)
    for h, w in ((4, 4), (2, 6)):                                 # any grid
        v = model(torch.randn(3, 12, h, w), torch.rand(3), torch.tensor([0, 4, 10]))
        assert v.shape == (3, 12, h, w) and not v.any()


def awake_dit(model):
    """Random weights in the layers that begin at zero."""
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    return model


def test_the_dit_sees_time_label_and_place():
    model = awake_dit(dit.DiT(12, 10, 64, 2, 2)).eval()
    x, t, y = torch.randn(1, 12, 4, 4), torch.tensor([0.5]), torch.tensor([3])
    v = model(x, t, y)
    assert (model(x, t + 0.01, y) - v).abs().max() > 1e-4         # time is scaled for its sinusoid
    assert (model(x, t, y + 1) - v).abs().max() > 1e-4
    rolled = model(x.roll(1, 3), t, y).roll(-1, 3)
    assert (rolled - v).abs().max() > 1e-4                        # positions break the symmetry
    same = model(torch.cat([x, x.flip(0) * 2]), torch.cat([t, t]), torch.cat([y, y]))
    assert (same[:1] - v).abs().max() < 1e-5


def test_the_published_sizes_of_the_dit():
    for size, wanted in (("S", 33.25), ("B", 131.08), ("L", 458.86), ("XL", 675.99)):
        with torch.device("meta"):
            model = dit.DiT(392, 1000, *dit.SIZES[size])
        count = sum(p.numel() for p in model.parameters()) / 1e6   # the authors' count has 256 x D
        assert abs(count - wanted) < 0.5, (size, count)            # of fixed positions in it


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    model = awake_dit(dit.DiT(12, 10, 64, 2, 2))
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


# ---------------------------------------------------------------- the command line


def test_the_debug_chain_writes_what_it_promises(work):
    out = work / "out" / "debug"
    model, encoder = sample.load(out, "cpu")
    for name in ("ae.pt", "dit.pt", f"latents-{encoder.fingerprint}.npy", "reconstructions.png",
                 "preview.png", "samples.png"):
        assert (out / name).stat().st_size > 0, name
    with contextlib.chdir(work):
        images, _, _ = ae.load_pictures(encoder.config)
        latents, labels = ae.load_latents(encoder, out, "cpu", contextlib.nullcontext)
    assert latents.shape == (2, 1000, encoder.latent_dim, 4, 4) and latents.dtype == np.float16
    assert isinstance(latents, np.memmap) and len(labels) == 1000
    for mirrored in (0, 1):
        x = data.to_float(images, slice(0, 6), torch.tensor(bool(mirrored)))
        z = torch.tensor(latents[mirrored, :6]).float()
        assert (z - encoder.encode(x)).abs().mean() < 0.03
    again = call(ae, "--preset", "debug", cwd=work)
    assert again.returncode == 0 and "finished at step 20" in again.stdout


def test_the_latent_cache_belongs_to_one_autoencoder(work, tmp_path):
    encoder = ae.load_ae(work / "out/debug/ae.pt")
    (tmp_path / "latents-00000000.npy").write_bytes(b"of an autoencoder that was replaced")
    with contextlib.chdir(work):
        ae.load_latents(encoder, tmp_path, "cpu", contextlib.nullcontext)
        cache = tmp_path / f"latents-{encoder.fingerprint}.npy"
        assert [p.name for p in tmp_path.glob("latents*")] == [cache.name]
        cache.write_bytes(cache.read_bytes()[:5000])
        with pytest.raises(UserError, match="delete it"):
            ae.load_latents(encoder, tmp_path, "cpu", contextlib.nullcontext)


def test_a_second_dit_on_the_same_latents(work, tmp_path):
    """--ae reads another folder; without a cache each batch is encoded as it comes."""
    flags = ["--preset", "debug", "--ae", "out/debug", "--out", tmp_path]
    assert call(dit, *flags, "--no-cache", cwd=work).returncode == 0
    assert not list(tmp_path.glob("latents*")) and not (tmp_path / "ae.pt").exists()
    biases = [config.load(folder / "dit.pt")["model"]["inp.bias"]
              for folder in (tmp_path, work / "out/debug")]
    assert torch.allclose(*biases, atol=2e-3)            # the cache is half precision, no more
    with contextlib.chdir(work):
        model, encoder = sample.load(tmp_path, "cpu")    # finds the autoencoder by itself
    assert model.ae_fingerprint == encoder.fingerprint


@pytest.mark.filterwarnings("ignore")
def test_the_real_sizes_take_steps_at_256_px(tmp_path, monkeypatch):
    """All three stages of the imagenette preset on random weights and generated photographs."""
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            picture(tmp_path / "photos" / name / f"{i}.jpg", (330, 300))
    torch.manual_seed(0)
    torch.save(dino.DINOv3(dino.SIZES["vits16plus"]).state_dict(), tmp_path / "random.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ae, "load_lpips", lambda device: LPIPS().to(device))
    flags = ["--preset", "imagenette", "--steps", "2"]
    c = config.parse(ae.Config, ae.PRESETS, flags + [
        "--data", "photos", "--encoder", "random.pth", "--batch", "1", "--gan_start", "1"])
    model = ae.train(c)
    assert model.latent_dim == 392 and model.image_size == 256
    assert len(config.load("out/imagenette/ae.pt")["gan"]["critic"]) > 0
    stage2 = config.parse(dit.Config, dit.PRESETS, flags + [
        "--batch", "2", "--model", "S", "--shift", "auto", "--micro_batch", "1"])
    net, model = dit.train(stage2), ae.load_ae("out/imagenette/ae.pt")
    latents = np.load(f"out/imagenette/latents-{model.fingerprint}.npy", mmap_mode="r")
    assert latents.shape == (2, 2, 392, 16, 16)
    assert sample.generate(net, model, [0, 1], 1, 1.0).shape == (2, 3, 256, 256)


def test_more_steps_kept_steps_and_overwrite(work, tmp_path):
    out = tmp_path / "d"
    shutil.copytree(work / "out/debug", out)
    flags = ["--preset", "debug", "--out", out]
    more = call(dit, *flags, "--steps", 25, cwd=work)
    assert more.returncode == 0 and "resuming from step 20" in more.stdout, more.stderr
    one_line(call(dit, *flags, "--lr", 0.1, cwd=work), "dit.pt", "--lr", "--overwrite")
    fresh = call(dit, *flags, "--lr", 0.01, "--steps", 3, "--keep", "2,3", "--overwrite", cwd=work)
    assert fresh.returncode == 0 and dit.load_dit(out / "dit.pt").step == 3
    early, last = dit.load_dit(out / "dit_2.pt"), dit.load_dit(out / "dit_3.pt")
    assert (early.step, last.step) == (2, 3)
    for a, b in zip(last.parameters(), dit.load_dit(out / "dit.pt").parameters()):
        assert torch.equal(a, b)
    flags = ["--out", out, "--steps", 3, "--columns", 1, "--n", 0]
    away = call(sample, *flags, "--weak", "dit_2.pt", cwd=work)
    assert "away from dit_2.pt" in away.stdout and "nfe: 6\n" in away.stdout, away.stderr
    one_line(call(sample, *flags, "--weak", "dit_9.pt", cwd=work), "dit_9.pt", "python dit.py")
    other = config.load(out / "dit_2.pt") | dict(ae_fingerprint="another")
    config.save(out / "dit_other.pt", other)
    one_line(call(sample, *flags, "--weak", "dit_other.pt", cwd=work), "another autoencoder")
    plain = call(sample, *flags, "--preset", "photos", cwd=work)   # which names a dit_1000.pt
    assert "no class only" in plain.stdout and "nfe: 6\n" in plain.stdout, plain.stderr


def test_missing_files_and_wrong_pairs_say_which_command_helps(work, tmp_path):
    debug = work / "out/debug"
    one_line(call(dit, "--out", tmp_path, cwd=work), "ae.pt", "python ae.py")
    shutil.copy(debug / "ae.pt", tmp_path)
    one_line(call(sample, "--out", tmp_path, cwd=work), "dit.pt", "python dit.py")
    shutil.copy(debug / "dit.pt", tmp_path / "ae.pt")
    one_line(call(dit, "--out", tmp_path, cwd=work), "contains dit, not ae")
    one_line(call(ae, "--device", "abacus", "--preset", "debug", cwd=work), "--device abacus")
    one_line(call(ae, "--data", tmp_path / "no", "--out", tmp_path / "o", cwd=work), "--data")
    torch.save({**config.load(debug / "ae.pt"), "fingerprint": "00000000"}, tmp_path / "ae.pt")
    torch.save({**config.load(debug / "dit.pt"), "ae_folder": str(tmp_path)}, tmp_path / "dit.pt")
    for module in (dit, sample):
        one_line(call(module, "--preset", "debug", "--out", tmp_path, cwd=work),
                 "another autoencoder", "--overwrite")


def test_a_damaged_checkpoint_is_refused_and_left_alone(work, tmp_path):
    whole = (work / "out/debug/ae.pt").read_bytes()
    (tmp_path / "ae.pt").write_bytes(whole[:len(whole) // 2])
    one_line(call(ae, "--preset", "debug", "--out", tmp_path, cwd=work), "ae.pt", "truncated")
    assert (tmp_path / "ae.pt").read_bytes() == whole[:len(whole) // 2]
    newer = config.load(work / "out/debug/ae.pt")
    torch.save({**newer, "version": 99}, tmp_path / "ae.pt")
    one_line(call(dit, "--out", tmp_path, cwd=work), "version 99")


def test_a_loss_that_is_not_finite_stops_the_run(work, tmp_path):
    result = call(ae, "--preset", "debug", "--lr", 1e30, "--out", tmp_path / "nan", cwd=work)
    one_line(result, "loss is not finite", "--lr")
    assert not (tmp_path / "nan" / "ae.pt").exists()
    shutil.copytree(work / "out/debug", tmp_path / "d")
    before = (tmp_path / "d" / "dit.pt").read_bytes()
    result = call(dit, "--preset", "debug", "--lr", 1e30, "--clip", 1e30, "--overwrite",
                  "--out", tmp_path / "d", cwd=work)
    one_line(result, "loss is not finite", "--lr")
    assert (tmp_path / "d" / "dit.pt").read_bytes() == before


def test_a_full_disk_ends_in_one_line_and_leaves_the_old_file(work, tmp_path):
    """A limit on the size of a file stands for the full disk."""
    shutil.copytree(work / "out/debug", tmp_path / "d")
    before = (tmp_path / "d" / "dit.pt").read_bytes()
    result = run("dit.py", "--preset", "debug", "--steps", 25, "--out", tmp_path / "d", cwd=work,
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2))
    one_line(result, "dit.pt", "could not be written", "untouched")
    assert (tmp_path / "d" / "dit.pt").read_bytes() == before
    assert not [f for f in os.listdir(tmp_path / "d") if f.endswith(".part.pt")]


def test_a_width_below_the_latent_channels_is_warned_of(work, tmp_path):
    result = call(dit, "--preset", "debug", "--ae", "out/debug", "--out", tmp_path, "--dim", 64,
                  cwd=work)
    assert result.returncode == 0 and "warning: width 64 is not above" in result.stdout


@pytest.mark.parametrize("script, file", [("ae.py", "ae.pt"), ("dit.py", "dit.pt")])
def test_a_killed_run_ends_with_the_same_bits(work, tmp_path, script, file):
    """kill -9 in the middle, the same command again: weights equal to an uninterrupted run's."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ["--preset", "debug", "--steps", 30, "--save_every", 4]
    flags += ["--ae", work / "out/debug"] if script == "dit.py" else ["--gan", 1, "--gan_start", 9]
    module = dict(ae=ae, dit=dit)[script[:-3]]
    assert call(module, *flags, "--out", whole, cwd=work).returncode == 0
    process = subprocess.Popen([*start(script), *map(str, flags), "--out", str(broken)], cwd=work,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (broken / file).exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    step = config.load(broken / file)["step"]
    assert 0 < step < 30, "the run was over before it could be killed"
    result = run(script, *flags, "--out", broken, cwd=work)
    assert result.returncode == 0 and "resuming from step" in result.stdout, result.stderr
    a, b = config.load(whole / file), config.load(broken / file)
    for part in ("model", "ema") if script == "dit.py" else ("model",):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part


def test_ctrl_c_saves_and_says_how_to_resume(work, tmp_path):
    process = subprocess.Popen(
        [*start("ae.py"), "--preset", "debug", "--steps", "5000", "--save_every", "5", "--out",
         str(tmp_path)], cwd=work, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "ae.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command resumes" in out
    assert "Traceback" not in err
    step = config.load(tmp_path / "ae.pt")["step"]
    assert f"stopped at step {step}" in out
    assert (tmp_path / "reconstructions.png").is_file()                   # a preview
    one_line(call(dit, "--out", tmp_path, cwd=work), "unfinished")


# Muon rounds to bfloat16: with it, two processes and one differ by 4e-4 of the weights
RANKS = ["--preset", "debug", "--precision", "float32", "--lr", "5e-4", "--muon", "0",
         "--steps", "14"]


def interrupt_rank_1(c, step, rate=config.learning_rate, signals=[signal.SIGINT]):
    """The learning rate; at step 4 one of two processes gets the signal, once."""
    if step == 4 and config.rank() == 1 and signals:
        os.kill(os.getpid(), signals.pop())
    return rate(c, step)


def two_ranks(rank, folder):
    """One of the two processes of the next test."""
    os.environ["WORLD_SIZE"] = "2"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=2)
    os.chdir(folder)
    ae.evaluate = lambda c, model, *_: model                      # saves seconds
    rate, config.learning_rate = config.learning_rate, interrupt_rank_1
    with pytest.raises(SystemExit) as stop:
        ae.main([*RANKS, "--noise", "0.4", "--out", "two"])
    assert stop.value.code == 130
    config.learning_rate = rate
    if rank == 0:
        shutil.copytree("two", "three")
    ae.main([*RANKS, "--noise", "0.4", "--out", "two"])
    with open(f"log{rank}", "w") as log, contextlib.redirect_stdout(log):
        dit.main([*RANKS, "--ae", "one", "--out", "two", "--micro_batch", "5"])
    sample.main(["--preset", "debug", "--out", "two", "--n", "0", "--npz", "20", "--batch", "3"])
    torch.distributed.destroy_process_group()


def test_two_processes_train_encode_and_sample_as_one_does(work, tmp_path, monkeypatch):
    """Interrupted, resumed, and resumed by one process alone."""
    monkeypatch.setattr(ae, "evaluate", lambda c, model, *_: model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/data").symlink_to(work / "out/data")
    assert call(ae, *RANKS, "--noise", 0.4, "--out", "one", cwd=tmp_path).returncode == 0
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    assert config.load(tmp_path / "three/ae.pt")["step"] == 10    # they stopped together
    three = call(ae, *RANKS, "--noise", 0.4, "--out", "three", cwd=tmp_path)
    assert "resuming from step 10" in three.stdout
    one = call(dit, *RANKS, "--ae", "one", "--out", "one", cwd=tmp_path)

    def weights(name, part="model"):
        state = config.load(tmp_path / name)[part]
        return torch.cat([v.double().flatten() for k, v in sorted(state.items())])
    for file, parts in (("ae.pt", ["model"]), ("dit.pt", ["model", "ema"])):
        for part in parts:
            for name in ("two", "three")[:3 - len(parts)]:
                a, b = weights(f"one/{file}", part), weights(f"{name}/{file}", part)
                assert (a - b).norm() < 1e-5 * a.norm(), (file, name)
    losses = [[float(v) for v in re.findall(r"\d\.\d+", text.split("loss:")[1])] for text in
              (one.stdout, (tmp_path / "log0").read_text())]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3) and len(losses[0]) > 4
    with contextlib.chdir(tmp_path):
        encoder = ae.load_ae("one/ae.pt")
        two = np.load(f"one/latents-{encoder.fingerprint}.npy")
        (tmp_path / "again").mkdir()
        assert np.array_equal(two, ae.load_latents(encoder, "again", *config.setup(
            "cpu", precision="float32"))[0])
        images = dict(np.load("two/samples.npz"))
        sample.main("--preset debug --out two --n 0 --npz 20 --batch 3".split())
        for name, array in np.load("two/samples.npz").items():
            assert np.array_equal(images[name], array) and len(array) == 20
    assert not [p for p in tmp_path.rglob("*") if ".part" in p.name or p.name == "samples.npy"]


def test_the_batch_is_split_evenly(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    one_line(call(ae, "--preset", "debug", cwd=tmp_path), "--batch 16", "3", code=2)


def test_float16_scales_the_loss_and_skips_a_step_that_overflows(work, tmp_path, monkeypatch):
    monkeypatch.setattr(ae, "evaluate", lambda c, model, *_: model)       # float16 is slow here
    monkeypatch.setattr(dit, "preview", lambda *_: None)
    flags = ["--preset", "debug", "--precision", "fp16", "--batch", 2, "--out", tmp_path]
    first = call(ae, *flags, "--images", 9, "--steps", 2, "--gan", 1, "--gan_start", 0, cwd=work)
    assert first.returncode == 0 and "float16" in first.stdout, first.stderr
    assert call(dit, *flags, "--steps", 2, cwd=work).returncode == 0
    for name in ("ae.pt", "dit.pt"):
        before = config.load(tmp_path / name)
        assert before["scaler"]["_growth_tracker"] == 2           # no step was skipped
    before["scaler"]["scale"] = 1e38
    config.save(tmp_path / "dit.pt", before)
    assert call(dit, *flags, "--steps", 4, cwd=work).returncode == 0
    after = config.load(tmp_path / "dit.pt")
    assert after["step"] == 4 and after["scaler"]["scale"] == pytest.approx(1e38 / 4)
    assert all(torch.equal(v, after["model"][k]) for k, v in before["model"].items())


def test_the_parts_that_cost_most_are_compiled_on_cuda(monkeypatch):
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: seen.append(type(self).__name__))
    model = tiny_ae()
    for choice, device, found in (("auto", "cpu", 0), ("no", "cuda", 0), ("yes", "cpu", 6),
                                  ("auto", "cuda", 6)):
        config.compile_parts(model, (dino.Block, ae.Decoder), choice, torch.device(device))
        assert len(seen) == found, seen                           # 4 + 1 blocks and the decoder
        seen.clear()
    assert list(model.state_dict()) == list(tiny_ae().state_dict())


def test_a_decoder_in_the_layout_of_cuda_learns_the_same():
    x, made = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = tiny_ae().train()
        model.decoder.to(memory_format=layout)
        optimizer = muon.optimizer([*model.decoder.parameters()], model.matrices(), 1e-3, 1e-2,
                                   (0.9, 0.9))
        for step in range(2):
            optimizer.zero_grad()
            (model(x, generator(0, step))[0] - x).abs().mean().backward()
            optimizer.step()
        made.append(model.decoder(model.grid(model.tokens(x, generator(0))[0], x)))
    assert torch.allclose(*made, atol=0.02)                       # Muon rounds to bfloat16


def test_a_rank_that_dies_ends_the_run(work, tmp_path):
    (tmp_path / "dies.py").write_text(
        "import sys, ae\nfrom plumbing import config\n"
        "def encode(*_):\n    if config.rank() == 1:\n        raise config.UserError('rank 1')\n"
        "ae.measure_statistics = encode\n"
        "with config.one_line_errors():\n    ae.main(sys.argv[1:])\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*torchrun, tmp_path / "dies.py", "--preset", "debug", "--steps", "2",
                             "--out", tmp_path], cwd=work, env=env, text=True, timeout=100,
                            capture_output=True)
    assert result.returncode == 1 and "error: rank 1\n" in result.stderr
    assert result.stdout.count("stage 1") == 1 and "2 x cpu" in result.stdout


def test_the_chain_on_a_folder_of_images(folder, work, tmp_path):
    for module in (ae, dit, sample):
        flags = ["--data", folder] if module is ae else []
        result = call(module, "--preset", "debug", "--out", tmp_path / "own", *flags, "--steps", 3,
                      cwd=work)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "own" / "samples-steps3.png").exists()


def test_generate_is_a_function_of_labels_and_seed(work):
    model, encoder = sample.load(work / "out" / "debug", "cpu")
    labels = torch.tensor([0, 1, 2, 3, 10])
    images = sample.generate(model, encoder, labels, steps=3, scale=2.0, seed=1)
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, sample.generate(model, encoder, labels, 3, 2.0, seed=1))
    assert not torch.equal(images, sample.generate(model, encoder, labels, 3, 2.0, seed=2))
    noise = sample.draw_noise(model, encoder, 5, 1)
    assert torch.equal(images, sample.generate(model, encoder, labels, 3, 2.0, noise=noise))
    parts = sample.generate(model, encoder, labels, 3, 2.0, seed=1, batch=2)
    assert (parts.int() - images.int()).abs().float().mean() < 1.0     # the batch changes nothing
    for label in (-1, 11):
        with pytest.raises(ValueError):
            sample.generate(model, encoder, torch.tensor([label]))
    encoder.fingerprint = "another"
    with pytest.raises(config.UserError, match="another autoencoder"):
        sample.generate(model, encoder, labels)


def test_generate_shows_every_state_of_every_batch(work):
    model, encoder = sample.load(work / "out" / "debug", "cpu")
    seen = []
    sample.generate(model, encoder, torch.arange(5), 2, batch=3,
                    callback=lambda start, i, t, x: seen.append((start, i, t, len(x))))
    assert [s[:2] for s in seen] == [(0, 0), (0, 1), (0, 2), (3, 0), (3, 1), (3, 2)]
    assert seen[0][2:] == (0.0, 3) and seen[-1][2:] == (1.0, 2)


def test_sample_writes_sweep_gif_and_npz(work):
    result = call(sample, "--preset", "debug", "--sweep", "1,2", "--gif", "--npz", 20, "--batch", 8,
                  "--classes", "disc,3", cwd=work)
    assert result.returncode == 0, result.stderr
    out = work / "out" / "debug"
    rows = [line.split("\t") for line in (out / "sweep.tsv").read_text().splitlines()]
    assert rows[0][:3] == ["steps", "scale", "nfe"]
    assert [r[:3] for r in rows[1:]] == [["1", "1", "1"], ["1", "3", "2"], ["2", "1", "2"],
                                         ["2", "3", "4"]]
    arrays = np.load(out / "samples.npz")
    assert arrays["arr_0"].shape == (20, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [*range(10)] * 2
    assert Image.open(out / "samples-classesdisc,3.png").size == (2 * 64, 2 * 64)
    assert Image.open(out / "sweep.png").size == (20 * 64, 2 * 64)
    assert Image.open(out / "trajectory.gif").n_frames > 10
    assert {"conv", "recall"} < set(rows[0])
    for key in ("n: 100", "sample_frechet:", "decoded_real_accuracy:", "real_frechet:",
                "sample_conv_frechet:", "decoded_real_recall:", "real_factors_frechet:"):
        assert key in result.stdout


def test_nfe_is_counted(work):
    inside = sum(0.3 <= t <= 0.6 for t in flow.times(10, 4.0))
    for flags, nfe in (([], 20), (["--t_lo", 0.3, "--t_hi", 0.6], 10 + inside), (["--t_lo", 1], 10),
                       (["--scale", 1], 10), (["--sampler", "heun"], 40)):
        result = call(sample, "--preset", "debug", "--steps", 10, "--shift", 4, "--n", 0,
                      "--classes", 1, *flags, cwd=work)
        assert f"\nnfe: {nfe}\n" in result.stdout and "nothing is scored" in result.stdout


def test_without_its_images_it_says_why_nothing_is_scored(work, monkeypatch):
    model, encoder = sample.load(work / "out" / "debug", "cpu")
    encoder.config = SimpleNamespace(data="photos", classes="")
    monkeypatch.setattr(sample, "load", lambda out, device: (model, encoder))
    result = call(sample, "--preset", "debug", "--n", 5, "--classes", "1", cwd=work)
    lines = [s for s in result.stdout.splitlines() if "nothing is scored" in s]
    assert len(lines) == 1 and "photos: no such folder" in lines[0]
    assert "accuracy" not in result.stdout


def test_the_autoencoder_is_found_where_stage_2_read_it(work, tmp_path):
    shutil.copy(work / "out/debug/dit.pt", tmp_path)
    model, encoder = sample.load(tmp_path, "cpu")
    assert encoder.fingerprint == model.ae_fingerprint
    other = config.load(work / "out/debug/ae.pt")
    config.save(tmp_path / "ae.pt", {**other, "fingerprint": "01234567"})
    assert sample.load(tmp_path, "cpu")[1].fingerprint == model.ae_fingerprint
    saved = config.load(tmp_path / "dit.pt")
    config.save(tmp_path / "dit.pt", {**saved, "ae_folder": str(tmp_path / "gone")})
    one_line(call(sample, "--out", tmp_path, "--n", 0, cwd=work), "another autoencoder")
    (tmp_path / "dit.pt").unlink()
    one_line(call(sample, "--out", tmp_path, cwd=work), "dit.pt", "no such file", "python dit.py")


def test_classes_are_chosen_by_name_or_number():
    names = ["cat", "dog", *map(str, range(100, 110))]
    assert sample.choose("dog, 0,dog", names) == [1, 0, 1] and sample.choose("100", names) == [2]
    assert sample.choose("", names) == list(range(10))
    for text in ("bird", "12", "-1", "cat,,dog"):
        with pytest.raises(config.UserError, match="--classes .*cat, dog"):
            sample.choose(text, names)
    assert sample.balanced_labels([4, 7, 2], 7).tolist() == [4, 4, 4, 7, 7, 2, 2]
    assert len(set(sample.balanced_labels(range(180), 500).tolist())) == 180


@pytest.mark.parametrize("flags, word", [
    (["--sweep", "1,x"], "--sweep"), (["--sweep", "1,0"], "--sweep"), (["--dim", "64"], "--dim"),
    (["--t_lo", "0.9", "--t_hi", "0.1"], "--t_lo"), (["--sampler", "rk4"], "--sampler"),
    (["--shift", "0"], "--shift"), (["--n", "-1"], "--n"), (["--steps", "0"], "--steps")])
def test_bad_flags_of_sample(flags, word, tmp_path):
    one_line(call(sample, *flags, cwd=tmp_path), word, code=2)


# ---------------------------------------------------------------- the house and the README

CORE = "flow toy_flow data dino ae dit sample metrics".split()
SOURCES = [p for p in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
           if "test" not in p.name and p.parent.name in (ROOT.name, "plumbing", "lab", "exercises")]


def imports(path):
    """The modules that a file imports, dotted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_arrows_point_down_and_there_are_five_packages():
    own = {*CORE, "plumbing", "lab", "exercises"}
    for path in SOURCES:
        found = {m.split(".")[0] for m in imports(path)}
        if path.parent.name == "plumbing":
            assert found & own <= {"plumbing"}, path
        if path.parent == ROOT:
            assert not found & {"lab", "exercises"}, path
        third = {m for m in found - own if m not in sys.stdlib_module_names}
        assert third <= {"torch", "numpy", "tqdm", "PIL", "requests"}, (path, third)
    assert imports(ROOT / "flow.py") <= {"math", "torch"}


def test_no_function_of_the_core_is_long():
    for path in (ROOT / f"{name}.py" for name in CORE):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 70, (path.name, node.name)


def test_importing_does_no_work(tmp_path):
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in SOURCES
               if p.stem not in ("__init__", "conftest")]
    code = "; ".join(f"import {m}" for m in modules)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                            capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0 and not result.stdout and not os.listdir(tmp_path), result.stderr


TEXTS = {p: p.read_text() for p in (ROOT / "README.md", ROOT / "RESULTS.md",
                                    ROOT / "exercises/README.md") if p.exists()}


def test_the_texts_name_what_there_is():
    assert len(TEXTS) == 3
    for path, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / link).exists(), (path, link)
        for name in set(re.findall(r"(?<![\w/])([\w/]+\.py)\b", text)):
            assert (ROOT / name).exists() or (path.parent / name).exists(), (path, name)


COMMANDS = sorted({part.split("#")[0].strip() for path, text in TEXTS.items()
                   if path.parent == ROOT        # the exercises ask for flags to be added
                   for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S)
                   for line in block.splitlines() for part in line.split("&&")
                   if part.strip().startswith("python ")})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_the_commands_in_the_texts_exists(command):
    words = command.split()[1:]
    if words[0] == "-c" or words[:2] == ["-m", "pytest"] or words[0] in (
            "exercises/check.py", "test_all.py"):
        return
    name, *words = words[1:] if words[0] == "-m" else words
    module = importlib.import_module(name.removesuffix(".py"))
    while words and not words[0].startswith("-"):        # names of experiments, folders
        word = words.pop(0)
        assert word in (*evidence.EXPERIMENTS, "all") or module is spectrum, command
    if words[:1] != ["--check"]:                         # lab.pretrain --check NAME IMAGE
        config.parse(module.Config, module.PRESETS, words)

# ---------------------------------------------------------------- VA-VAE and REPA


def vae_with(**flags):
    """An untrained VAE of the debug preset, in training mode."""
    torch.manual_seed(0)
    c = ae.Config(**{**ae.PRESETS["debug"], "latent": "vae", **flags})
    return ae.AutoEncoder(c, dino.load_dino("tiny")).train()


def few_shapes(n=6):
    return data.to_float(data.shapes(n, 32, 0)[0].numpy(), slice(None))


def test_alignment_loss_is_the_slow_loop():
    torch.manual_seed(0)
    z, h = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    cos = lambda a, b: (a @ b / a.norm() / b.norm()).item()
    points = [max(0, 1 - .5 - cos(a, b)) for a, b in zip(z.flatten(0, 1), h.flatten(0, 1))]
    images = [list(zip(*image)) for image in zip(z, h)]           # pairs of tokens of one image
    pairs = [max(0, abs(cos(a, b) - cos(f, g)) - .25)
             for image in images for a, f in image for b, g in image]
    slow = sum(points) / 6 + sum(pairs) / 18
    assert ae.alignment_loss(z, h).item() == pytest.approx(slow, abs=1e-5)
    assert ae.alignment_loss(h * 3, h) == 0                       # angles only


def test_alignment_trains_the_residual_encoder_and_its_own_map_only():
    model, x = vae_with(align=0.1), few_shapes()
    ae.alignment_loss(*model(x, config.generator(0))[2:]).backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"residual", "align"}
    assert model.residual.vit.patch_embed.proj.weight.grad.abs().sum() > 0


def test_without_alignment_nothing_is_added_and_with_it_the_rest_starts_the_same():
    plain, aligned = vae_with().state_dict(), vae_with(align=0.1).state_dict()
    assert set(aligned) == {*plain, "align.weight"}
    assert aligned["align.weight"].shape == (96, 16)
    assert all(torch.equal(v, aligned[k]) for k, v in plain.items())
    assert len(vae_with()(few_shapes())) == 2


def test_alignment_turns_the_mapped_latent_to_the_encoders_tokens(work, tmp_path, monkeypatch):
    monkeypatch.setattr(ae, "evaluate", lambda c, model, *_: model)       # saves seconds
    x, cosine = few_shapes(64), []
    for weight in (1e-9, 1.0):
        result = call(ae, "--preset", "debug", "--latent", "vae", "--align", weight, "--images", 64,
                      "--batch", 8, "--steps", 12, "--muon", 0, "--lr", 1e-2,
                      "--out", tmp_path / str(weight), cwd=work)
        assert result.returncode == 0, result.stderr
        model = ae.load_ae(tmp_path / str(weight) / "ae.pt")
        h = model.semantics(model.dino.normalize(x))
        cosine.append(F.cosine_similarity(model.align(model.tokens(x)[0]), h, dim=-1).mean())
    assert abs(cosine[0]) < 0.1 and cosine[1] > 0.2, cosine


def test_the_perceptual_net_can_be_fixed():
    x, y = few_shapes(), few_shapes().flip(0)
    other = dino.DINOv3(dino.ViTConfig(dim=32, depth=1, heads=1, hidden=32, patch=8)).freeze()
    tiny = ae.perceptual_loss(dino.load_dino("tiny"), y, x)
    for encoder in (other, dino.load_dino("tiny")):
        model = ae.AutoEncoder(ae.Config(**ae.PRESETS["debug"]), encoder)
        fixed, own = (ae.choose_perceptual(ae.Config(perceptual_net=net), model, "cpu")(y, x, None)
                      for net in ("tiny", "encoder"))
        assert torch.equal(fixed, tiny)
        assert torch.equal(own, ae.perceptual_loss(encoder, y, x))
    assert torch.equal(own, tiny)


@pytest.mark.parametrize("module, flags, words", [
    (ae, "--align 0.1", ["--align", "--latent vae"]),
    (ae, "--align -1 --latent vae", ["--align", "at least 0"]),
    (ae, "--perceptual_net tiny --size 36", ["--perceptual_net tiny", "--size", "36"]),
    (dit, "--repa -1", ["--repa", "at least 0"])])
def test_bad_flags_of_the_alignments(module, flags, words, tmp_path):
    one_line(call(module, *flags.split(), cwd=tmp_path), *words, code=2)


# ---------------------------------------------------------------- dit.py --repa


def dit_with_repa():
    """An untrained DiT of three blocks, its Repa, latents, labels, pair, tokens of width 8."""
    torch.manual_seed(0)
    c = dit.Config(dim=32, depth=3, heads=2, repa=0.5)
    x1, y = torch.randn(10, 12, 4, 4), torch.arange(10)
    return (dit.DiT(12, 10, 32, 3, 2), dit.Repa(c, 8), x1, y,
            flow.draw(x1, 2.5, config.generator(0)), torch.randn(10, 16, 8))


def test_repa_trains_the_early_blocks_and_its_own_map():
    model, repa, x1, y, pair, h = dit_with_repa()
    assert repa.block == 1
    losses, _ = dit.gradients(model, x1, y, pair, 0, contextlib.nullcontext, h=h, repa=repa)
    plain, _ = dit.gradients(model, x1, y, pair, 0, contextlib.nullcontext)
    assert torch.equal(losses, plain)                             # what is shown is the flow's
    # a DiT begins with gates and an output of zero: the flow's gradient ends there
    assert model.inp.weight.grad.abs().sum() > 0 and model.blocks[0].ada[1].weight.grad.any()
    assert not model.blocks[1].ada[1].weight.grad.any()
    assert all(p.grad.any() for p in repa.parameters())


def test_repa_loss_is_one_minus_the_mean_cosine():
    model, repa, x1, y, (x0, t), h = dit_with_repa()
    hidden = []
    model(x1, t, y, hidden)
    assert [z.shape for z in hidden] == [(10, 16, 32)] * 3
    found = repa.mlp(hidden[0])
    slow = [sum(F.cosine_similarity(found[i, n], h[i, n], dim=0) for n in range(16)) / 16
            for i in range(10)]
    assert torch.allclose(repa(hidden, h), 0.5 * (1 - torch.stack(slow)), atol=1e-6)
    assert torch.allclose(repa(hidden, 7 * found.detach()), torch.zeros(10), atol=1e-6)


def test_micro_batches_with_repa_give_the_gradient_of_the_whole_batch():
    (model, repa, x1, y, pair, h), results = dit_with_repa(), []
    parameters = [*model.parameters(), *repa.parameters()]
    for p in parameters:
        nn.init.normal_(p, std=0.05)
    for micro in (0, 4):                                          # 4 + 4 + 2
        for p in parameters:
            p.grad = None
        dit.gradients(model, x1, y, pair, micro, contextlib.nullcontext, h=h, repa=repa)
        results.append(torch.cat([p.grad.flatten() for p in parameters]))
    assert torch.allclose(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cache", [True, False])
def test_repas_tokens_are_those_of_the_same_mirrored_images(work, tmp_path, cache):
    """SVG's latent contains the encoder's tokens."""
    encoder = ae.load_ae(work / "out/debug/ae.pt")
    c = dit.Config(**{**dit.PRESETS["debug"], "repa": 0.5, "cache": cache})
    with contextlib.chdir(work):
        batch, _ = dit.feed(c, encoder, work / "out/debug", "cpu", contextlib.nullcontext)
        x1, _, _, h = batch(3)
        assert dit.feed(dit.Config(**{**vars(c), "repa": 0.0}), encoder, work / "out/debug", "cpu",
                        contextlib.nullcontext)[0](3)[3] is None
    inside = (x1 * encoder.std + encoder.mean).flatten(2).transpose(1, 2)[..., :encoder.dino.dim]
    assert h.shape == (32, 16, 96) and (inside - h).abs().mean() < (0.02 if cache else 1e-4)


def test_repa_learns_resumes_exactly_and_is_not_part_of_the_dit(work, tmp_path, monkeypatch):
    monkeypatch.setattr(dit, "preview", lambda *_: None)
    flags = ["--preset", "debug", "--ae", "out/debug", "--no-decay", "--repa", 0.5]
    cosine = []
    for steps, name in ((16, "whole"), (6, "broken"), (16, "broken")):
        result = call(dit, *flags, "--steps", steps, "--out", tmp_path / name, cwd=work)
        assert result.returncode == 0, result.stderr
        cosine.append(float(re.search(r"repa_cosine: (.+)", result.stdout)[1]))
    assert cosine[0] == cosine[2] > cosine[1] + 0.02
    a, b = (config.load(tmp_path / name / "dit.pt") for name in ("whole", "broken"))
    for part in ("model", "ema", "repa"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    model = dit.load_dit(tmp_path / "whole/dit.pt")               # strict
    plain = config.load(work / "out/debug/dit.pt")
    assert list(model.state_dict()) == list(plain["ema"]) == list(a["model"])
    assert "repa" not in plain and set(a) == {*plain, "repa"}
    other = call(dit, *flags[:-1], 0.1, "--out", tmp_path / "whole", cwd=work)
    one_line(other, "--repa 0.5 (now 0.1)", "--overwrite")


if __name__ == "__main__":                               # python test_all.py exercise_2
    check.main(sys.argv[1:])
