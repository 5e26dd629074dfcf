"""Tests of lab/spectrum.py, of the constants of editing and of the error of the toy."""
import numpy as np
import pytest
import torch

import toy_flow
from flow import ab2, euler, heun
from lab import edit as editing, spectrum
from plumbing.config import generator
from plumbing.testing import call, one_line

LAMBDA = torch.tensor([30.0, 4.0, 1.0, 0.2, 0.0], dtype=torch.float64)


def test_spectrum_is_that_of_the_covariance_and_pooled_within_classes():
    g = generator(0)
    labels = torch.arange(4000) % 4
    means = 3 * torch.randn(4, 5, generator=g)
    x = means[labels] + torch.randn(4000, 5, generator=g) * LAMBDA.float().sqrt()
    total, within = spectrum.spectrum(x.view(4000, 5, 1, 1).numpy()), spectrum.spectrum(x, labels)
    expected = np.linalg.eigvalsh(np.cov(x.double().numpy().T))[::-1].copy()
    assert torch.allclose(total, torch.from_numpy(expected), atol=1e-8)
    assert torch.allclose(within, LAMBDA, rtol=0.1, atol=1e-8)
    between = means.double()[labels].var(0).sum()
    assert total.sum() - within.sum() == pytest.approx(between.item(), rel=0.05)
    assert spectrum.effective_dimension(torch.ones(7)) == pytest.approx(7)
    assert spectrum.effective_dimension(torch.tensor([5.0, 0.0])) == pytest.approx(1)


@pytest.mark.parametrize("n", [40, 4])                            # more latents than d, fewer
def test_shrinking_scales_the_principal_directions_within_the_classes(n):
    x = torch.randn(2 * n, 6, generator=generator(0)) * torch.tensor([4., 3, 2, 1, 1, .1])
    labels, rows = torch.arange(2 * n) % 2, torch.arange(0, 2 * n, 3)
    x[labels == 1] += 10
    same, means, first = spectrum.shrink(x, labels, rows, [
        torch.ones_like, torch.zeros_like, lambda lam: (lam == lam.max()).double()])
    assert (same - x[rows]).abs().max() < 1e-4
    centers = torch.stack([x[labels == k].mean(0) for k in (0, 1)])
    assert (means - centers[labels[rows]]).abs().max() < 1e-4
    assert torch.linalg.matrix_rank(first - means, atol=1e-3) == 1


@pytest.mark.parametrize("sampler, order", [(euler, 1), (ab2, 2)])
def test_gain_goes_to_the_exact_flows_with_the_order_of_the_sampler(sampler, order):
    coarse, fine = ((spectrum.gain(LAMBDA, n, 2.0, sampler) - LAMBDA.sqrt()).abs()[:4]
                    for n in (400, 800))
    assert (fine < 0.02).all()
    ratio = (coarse.square().sum() / fine.square().sum()).sqrt()
    assert ratio.item() == pytest.approx(2 ** order, rel=0.1)


def test_one_step_ends_at_the_mean_and_a_sampler_can_evaluate_at_the_end():
    assert spectrum.gain(LAMBDA, 1).abs().max() < 1e-12
    assert spectrum.error(LAMBDA, 1) == pytest.approx(1)
    assert spectrum.gain(LAMBDA, 5, 1.0, heun).isfinite().all()


def test_the_gain_is_what_a_sampler_does_to_the_standard_deviation_of_gaussian_samples():
    means, std = torch.tensor([2.0, -1.0]), torch.tensor([3.0, 0.5])

    def velocity(x, t):                                   # E[x1 - x0 | xt = x], by regression
        cov = t * std ** 2 - (1 - t)
        return means + cov / ((1 - t) ** 2 + t ** 2 * std ** 2) * (x - t * means)
    x = euler(velocity, torch.randn(20000, 2, generator=generator(0)), 5, 3.0)
    assert torch.allclose(x.mean(0), means, atol=0.05)
    assert torch.allclose(x.std(0).double(), spectrum.gain(std.double() ** 2, 5, 3.0), rtol=0.02)


def test_a_common_scale_of_the_latents_changes_only_the_best_shift_of_euler():
    for scale in (0.25, 3.0):
        assert spectrum.error(scale ** 2 * LAMBDA, 5, 2 * scale) == pytest.approx(
            spectrum.error(LAMBDA, 5, 2.0), rel=1e-9)
    (a, best), (b, again) = (spectrum.best_shift(k * LAMBDA, 5) for k in (1, 4))
    assert b / a == pytest.approx(2, rel=0.05) and again == pytest.approx(best, rel=0.01)
    assert best <= min(spectrum.error(LAMBDA, 5, s) for s in (1.0, 2.5, 6.67))


def test_eulers_gain_is_symmetric_about_the_square_of_the_shift():
    lam = 9 * torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0], dtype=torch.float64)
    ratio = spectrum.gain(lam, 10, 3.0) / lam.sqrt()
    assert torch.allclose(ratio, ratio.flip(0)) and (ratio[1:3] > ratio[:2]).all()
    assert 0.87 < ratio[2] < 0.89


def test_consistency_has_no_bias_and_separates_the_class_from_the_common_mean():
    g, labels = generator(1), torch.arange(60) % 3
    noise = [spectrum.consistency(torch.randn(60, 48, generator=g), labels, seed)
             for seed in range(40)]
    for key in ("within", "all", "class"):                # 20 a class: the biased one is 0.05
        assert abs(np.mean([n[key] for n in noise])) < 0.005
    x = 0.1 * torch.randn(60, 48, generator=g)
    x[:, 0] += 10                                         # the same for all classes
    found = spectrum.consistency(x, labels)
    assert 0.5 < found["all"] < 1 and abs(found["class"]) < 0.03
    found = spectrum.consistency(10 * torch.eye(48)[labels], labels)
    assert found["class"] == found["within"] - found["all"] > 0.3
    two = torch.tensor([[1.0, 0], [0.6, 0.8]])            # one pair: its cosine
    assert spectrum.resultant(two) == pytest.approx(0.6)


def test_spectrum_on_the_command_line(tmp_path, monkeypatch):
    x, labels = torch.randn(300, 6, generator=generator(0)), torch.arange(300) % 3
    monkeypatch.setattr(spectrum, "read", lambda folder, images, device: (x, labels))
    result = call(spectrum, "a", "b", "--shift", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "a: 300 latents of 6 dimensions" in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.split()[1:2] == ["ab2"]]
    assert len(rows) == 2 * len(spectrum.STEPS)
    first = float(rows[0].split("|")[1].split()[0])
    assert first == pytest.approx(spectrum.error(spectrum.spectrum(x), 3, 2.0, ab2), abs=1e-4)
    one_line(call(spectrum, cwd=tmp_path), "folder")
    one_line(call(spectrum, "a", "--shift", 0, cwd=tmp_path), "--shift", code=2)


def test_spectrum_refuses_what_does_not_fit(tmp_path, monkeypatch):
    class Large:
        latent_dim, image_size, patch = 392, 256, 16
    monkeypatch.setattr(spectrum, "load_ae", lambda path, device: Large())
    one_line(call(spectrum, tmp_path, cwd=tmp_path), "100,352", "--size")


def test_editing_is_measured_on_the_split_that_is_asked_for(monkeypatch):
    g, seeds, seen = generator(0), [], []
    images = torch.randint(256, (20, 3, 32, 32), generator=g, dtype=torch.uint8)
    cover = torch.zeros(20, 32, 32, dtype=torch.uint8)
    cover[:, 10:20, 12:16] = 255

    def shapes(n, size, seed, masks):
        seeds.append(seed)
        return images, torch.arange(20) % 10, [str(k) for k in range(10)], cover

    def edit(model, ae, x, masks, labels, seed=0, **options):
        seen.append((masks.sum((1, 2)).unique().tolist(), options))
        return editing.to_uint8(x)

    class Same:                                           # an autoencoder that changes nothing
        image_size, encode, decode = 32, staticmethod(lambda x: x), staticmethod(lambda z: z)
    monkeypatch.setattr(editing, "shapes", shapes)
    monkeypatch.setattr(editing, "edit", edit)
    for options in (dict(scale=3.0), dict(split="train", margin=0)):
        editing.measure_edit(torch.nn.Linear(1, 1), Same, 20, **options)
    assert seeds == [editing.SHAPES_SPLITS[split][1] for split in ("test", "train")]
    assert seen == [([14 * 8], dict(scale=3.0)), ([10 * 4], {})]


def test_candidates_change_one_constant_at_a_time(capsys):
    tried = []

    def measure(**options):
        tried.append(options)
        return dict(edit_judge_new_class=0.5, edit_judge_old_class=0.1,
                    edit_vs_reconstruction_psnr_outside_db=25.0)
    base = dict(steps=10, **editing.EDIT)
    editing.candidates(measure, base)
    assert tried[0] == base and len(tried) == 1 + sum(map(len, editing.GRID.values()))
    assert all(len(set(t.items()) - set(base.items())) == 1 for t in tried[1:])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(tried)


def test_the_toys_error_is_that_of_points_in_their_cell_and_of_points_in_another(monkeypatch):
    """The docstring's labelings: symmetric ones lose no point, however inconsistent."""
    found = dict(mixed=toy_flow.measure(toy_flow.Exact(0.6), 0.6, 0, 2000, 1.0)[0])
    for name, labels in dict(separable=toy_flow.SEPARABLE.tolist(),
                             tetrominoes=[0, 0, 0, 1, 2, 0, 1, 1, 2, 2, 3, 1, 2, 3, 3, 3],
                             symmetric=[0, 1, 0, 1, 2, 3, 2, 3] * 2).items():
        monkeypatch.setattr(toy_flow, "SEPARABLE", torch.tensor(labels))
        found[name] = toy_flow.measure(toy_flow.Exact(0.0), 0.0, 0, 2000, 1.0)[0]
    value = lambda key: [found[name][key] for name in found]
    assert value("consistency") == pytest.approx([0.58, 0.97, 0.96, 0.56], abs=0.02)
    assert value("rmse@5") == pytest.approx([0.82, 0.14, 0.33, 0.13], abs=0.03)
    assert value("within@5") == pytest.approx([0.14] * 4, abs=0.04)
    assert value("moved@5") == pytest.approx([0.19, 0, 0.11, 0.01], abs=0.02)
    assert found["mixed"]["moved@20"] < found["mixed"]["moved@5"] / 3
