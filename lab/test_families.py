"""Tests of encoders that know something else, and of `shapes` under other labels."""
import colorsys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ae, data
from data import COLOR_NAMES, SHAPES_SPLITS, hue_classes, load_images, shapes
from lab import evidence, pretrain
from plumbing import config
from plumbing.config import UserError
from plumbing.testing import ROOT, call, left, one_line

# ---------------------------------------------------------------- shapes-color


@pytest.fixture
def few(monkeypatch, tmp_path):
    """200 training and 200 held-out images, in an empty folder."""
    monkeypatch.setitem(SHAPES_SPLITS, "train", (200, 0))
    monkeypatch.setitem(SHAPES_SPLITS, "test", (200, 1))
    monkeypatch.chdir(tmp_path)


def test_shapes_color_is_shapes_under_the_hue_that_was_drawn(few, tmp_path):
    for split in SHAPES_SPLITS:
        images, labels, names = load_images("shapes-color", 16, split)
        same, classes, _ = load_images("shapes", 16, split)
        assert np.array_equal(images, same) and names == list(COLOR_NAMES) and len(names) == 10
        assert labels.dtype == torch.int64 and not torch.equal(labels, classes)
        _, _, _, factors = shapes(200, 16, SHAPES_SPLITS[split][1], factors=True)
        assert torch.equal(labels, hue_classes(factors[:, 3:6]))
    assert len(left(tmp_path / "out/data")) == 2                 # one copy of each split
    with pytest.raises(UserError, match="--classes"):
        load_images("shapes-color", 16, classes="red")


def test_the_hues_are_named_and_nearly_balanced():
    for k, name in enumerate(COLOR_NAMES):                       # the middle of each, and its ends
        for turn in (0, -0.4, 0.4):
            angle = torch.tensor(2 * torch.pi * (k + turn) / len(COLOR_NAMES))
            rgb = 0.5 + 0.1 * torch.stack([(angle - a).cos() for a in (0.0, 2.0944, 4.1888)])
            assert hue_classes(rgb[None]).item() == hue_classes(255 * rgb[None]).item() == k
    for name, hue in dict(red=0, yellow=60, green=120, cyan=180, blue=240, purple=300).items():
        rgb = torch.tensor([colorsys.hsv_to_rgb(hue / 360, 1, 1)])
        assert COLOR_NAMES[hue_classes(rgb).item()] == name
    _, _, _, factors = shapes(20_000, 1, 0, factors=True)
    share = torch.bincount(hue_classes(factors[:, 3:6]), minlength=10) / 20_000
    assert share.min() > 0.085 and share.max() < 0.115, share


def test_the_accuracy_of_shapes_color_asks_for_the_hue(few):
    held, labels, _ = load_images("shapes-color", 32, "test")
    images = torch.from_numpy(held.copy())
    found = evidence.color_classes(images)
    right = (found == labels).double().mean().item()
    row = evidence.scores(images, labels, ae.Config(data="shapes-color"))
    assert found.dtype == torch.int64
    assert row["accuracy"] == right and 0.68 < right < 0.9, right             # chance: .1
    near = (found - labels + 1) % 10 < 3                                      # or the next hue
    assert near.double().mean() > 0.95
    shape = evidence.scores(images, load_images("shapes", 32, "test")[1])
    assert shape.pop("accuracy") > 0.98 and row.pop("accuracy") and shape == row


def test_an_autoencoder_of_shapes_color_hands_over_the_hues(few):
    c = SimpleNamespace(data="shapes-color", size=16, classes="", images=0)
    images, labels, _ = ae.load_pictures(c)
    same, hues, _ = load_images("shapes-color", 16)
    assert np.array_equal(images, same) and torch.equal(labels, hues)


# ---------------------------------------------------------------- pretrain --target


def test_a_supervised_batch_has_the_labels_of_its_images():
    images, labels, _ = shapes(50, 32, 0)
    for target, truth in dict(shape=labels, color=torch.rand(50, 6)).items():
        c = pretrain.Config(target=target, batch=40)
        x, loss_of = pretrain.draw_batch(c, images.numpy(), truth, config.generator(0), "cpu")
        pixels = data.to_uint8(x).numpy()
        index = [next(k for k, image in enumerate(images.numpy())
                      if (image == p).all() or (image == p[:, :, ::-1]).all()) for p in pixels]
        mirrored = sum((images.numpy()[k] != p).any() for k, p in zip(index, pixels))
        assert 8 < mirrored < 32
        if target == "shape":
            perfect = 50 * torch.nn.functional.one_hot(truth[index], 10).float()
        else:
            perfect = truth[index]
        assert loss_of(perfect) < 1e-6 < 0.01 < loss_of(perfect.roll(1, 0))


def test_r_squared_is_that_of_a_known_regression():
    g = torch.Generator().manual_seed(0)
    x, xt = torch.randn(4000, 3, generator=g), torch.randn(4000, 3, generator=g)
    noise = torch.randn(2, 4000, 1, generator=g)
    y, yt = (a[:, :1] + 5 + n for a, n in zip((x, xt), noise))
    y, yt = (torch.cat([b, 2 * a[:, 1:2]], 1) for a, b in zip((x, xt), (y, yt)))
    half, all = pretrain.r_squared(x, y, xt, yt).tolist()
    assert abs(half - 0.5) < 0.05 and abs(all - 1) < 1e-6
    assert pretrain.r_squared(x[:, 2:], y, xt[:, 2:], yt).abs().max() < 0.01


def test_an_encoder_trained_for_color_learns_color(tmp_path, monkeypatch):
    c = config.parse(pretrain.Config, pretrain.PRESETS, [
        "--preset", "debug", "--target", "color", "--steps", "80", "--lr", "0.005",
        "--out", str(tmp_path)])
    measure, found = pretrain.measure, []
    monkeypatch.setattr(pretrain, "measure", lambda net, size: (
        found.append(measure(net, size, 600, 300)), found[-1])[1])
    pretrain.train(c)
    before = measure(pretrain.build(c, "cpu")[1], c.size, 600, 300)
    assert found[0]["r2_front"] > before["r2_front"] + 0.05, (found, before)
    assert found[0]["r2_back"] > 0.9 and found[0]["knn"] < 0.3, found


def test_the_shipped_encoder_is_not_replaced_by_another_target(tmp_path):
    one_line(call(pretrain, "--target", "color", "--overwrite", cwd=tmp_path), "--out", code=2)
    assert (ROOT / "weights/dino_tiny.pt").is_file()
