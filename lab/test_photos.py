"""Tests of photographs: their encoder, their judge, their scores.  The images are made here."""
import math, shlex
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import ae, dit, metrics, sample
from data import SHAPES_SPLITS, load_images
from dino import DINOv3, PatchEmbed, ViTConfig, load_dino, rebuild
from lab import evidence, judge, pretrain, standin
from plumbing import config, weights
from plumbing.testing import call, one_line
from plumbing.weights import TINY

COLORS = dict(ash=(90, 90, 90), berry=(200, 30, 60), clover=(40, 180, 50))


@pytest.fixture
def photos(tmp_path):
    """A folder sorted by class: 3 x 30 images to train on, 3 x 20 held out, 32 px."""
    rng = np.random.default_rng(0)
    for split, count in dict(train=30, val=20).items():
        for name, color in COLORS.items():
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-40, 40, (32, 32, 3)) + rng.integers(-20, 20, 3)
                pixels = (np.array(color) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return tmp_path / "photos"


# ---------------------------------------------------------------- views

def test_views_of_photographs_are_parts_of_them_in_other_colors():
    c = pretrain.Config(size=32, crop=16, steps=100)
    flat = torch.tensor([0.5, 0.0, -0.5]).view(3, 1, 1).expand(1000, 3, 32, 32)
    a, b, other = (pretrain.photo_views(flat, c, config.generator(s)) for s in (0, 0, 1))
    assert a.shape == (1000, 3, 16, 16) and torch.equal(a, b) and not torch.equal(a, other)
    assert a.std((2, 3)).max() < 1e-5 and a.abs().max() <= 1         # no edge, nothing from outside
    pixel = a[:, :, 0, 0]
    same = ((pixel - flat[0, :, 0, 0]).abs().amax(1) < 1e-5).double().mean()
    gray = ((pixel.amax(1) - pixel.amin(1)) < 1e-5).double().mean()
    assert abs(same - 0.2 * 0.8) < 0.04 and abs(gray - 0.2) < 0.04, (same, gray)


def test_views_of_photographs_have_the_area_asked_for():
    axis = torch.linspace(-0.3, 0.3, 64)
    ramp = torch.stack([axis.expand(64, 64)] * 3).expand(400, 3, 64, 64)      # gray, from left
    ramp = torch.cat([ramp, ramp.mT])                                         # and from above

    def slopes(c, step):
        x = pretrain.photo_views(ramp, c, config.generator(0), step)[:, 0]
        side = x.shape[-1]
        whole = 0.6 * 64 / 63 * (side - 1) / side
        across = (x[:400, :, -1] - x[:400, :, 0]).mean(1) / whole
        return side, across, (x[400:, -1] - x[400:, 0]).mean(1) / whole

    c = pretrain.Config(size=64, crop=32, area=(20, 50), steps=100, finish=0.1)
    side, across, down = slopes(c, 0)
    assert side == 32 and abs((across > 0).double().mean() - 0.5) < 0.08 and (down > 0).all()
    # brightness and contrast change the slopes, but on average they are the sides: E sqrt(area)
    for found in across.abs(), down:
        assert abs(found.mean() - (0.5 ** 1.5 - 0.2 ** 1.5) / 0.3 * 2 / 3) < 0.03, found.mean()
    side, later, _ = slopes(c, 90)
    assert side == 48 and later.abs().mean() > 1.2 * across.abs().mean()
    assert slopes(pretrain.Config(size=64), 2400)[0] == 64                    # never upsampled


def test_the_decoupled_loss_leaves_the_partner_out():
    z = torch.nn.functional.normalize(torch.randn(8, 5), dim=1)
    total = 0.0
    for i in range(8):
        similar = [math.exp((z[i] @ z[j]).item() / 0.2) for j in range(8)]
        partner = similar[(i + 4) % 8]
        total -= math.log(partner / (sum(similar) - similar[i] - partner))
    assert abs(pretrain.contrastive_loss(z, 0.2, True).item() - total / 8) < 1e-5


# ---------------------------------------------------------------- the stem and the files


def test_the_stem_with_norms_is_the_one_of_the_trial():
    c = ViTConfig(dim=128, patch=8, stem=48, stem_norm=True)
    embed = PatchEmbed(c)
    found = [(m.in_channels, m.out_channels, m.stride[0]) for m in embed.modules()
             if isinstance(m, nn.Conv2d)]
    assert found == [(3, 48, 2), (48, 96, 2), (96, 96, 1), (96, 96, 1), (96, 128, 2)]
    assert [type(m) for m in embed.stem] == [nn.Conv2d, nn.GroupNorm, nn.GELU] * 4
    assert embed(torch.zeros(2, 3, 32, 48)).shape == (2, 24, 128)
    plain = PatchEmbed(ViTConfig(dim=128, patch=16, stem=8))
    assert [type(m) for m in plain.stem] == [nn.Conv2d, nn.GELU] * 3
    assert plain(torch.zeros(2, 3, 32, 48)).shape == (2, 6, 128)


SMALL = ("--size 32 --crop 16 --dim 32 --depth 1 --stem 8 --stem_norm --decoupled --batch 8 "
         "--steps 4 --warmup 1 --keep 0,2 --device cpu").split()


@pytest.mark.parametrize("muon", [[], ["--muon", "0.02"]])
def test_an_encoder_of_photographs_is_written_with_what_it_knows(muon, photos, tmp_path,
                                                                 monkeypatch):
    flags = ["--data", photos, *SMALL, *muon, "--note", "for tests"]
    result = call(pretrain, *flags, "--out", "whole", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.count("knn_pixels: ") == 3, result.stderr
    saved = config.load(tmp_path / "whole/dino_photos.pt")
    assert {"knn", "knn_cls", "linear", "knn_pixels"} == set(saved["measured"])
    assert saved["measured"]["knn_pixels"] > 0.9 and saved["pretraining"]["note"] == "for tests"
    again = call(pretrain, "--measure", "whole/dino_photos.pt", "--data", photos, cwd=tmp_path)
    assert again.stdout in result.stdout and again.stdout.count("\n") == 4
    words = shlex.split(saved["command"])
    same = config.parse(pretrain.Config, pretrain.PRESETS, words[3:])
    assert words[:3] == ["python", "-m", "lab.pretrain"] and saved["minutes"] > 0
    assert config.plain(same) == saved["pretraining"]
    assert saved["model"]["norm.weight"].dtype == torch.float16

    real, parts = config.save, [*flags, "--out", "parts", "--save_every", "3"]

    def save(path, made):
        real(path, made)
        if made.get("step") == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(config, "save", save)
    one_line(call(pretrain, *parts, cwd=tmp_path), "interrupted")
    monkeypatch.setattr(config, "save", real)
    assert "resuming from step 3" in call(pretrain, *parts, cwd=tmp_path).stdout
    files = ["dino_photos.pt", "dino_photos_0.pt", "dino_photos_2.pt"]
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == files
    nets = [load_dino(tmp_path / folder / name) for name in files for folder in ("whole", "parts")]
    states = [net.state_dict() for net in nets]
    for whole, resumed in zip(states[::2], states[1::2]):
        assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    final, _, first, _ = (state["blocks.0.mlp.fc1.weight"] for state in states[:4])
    assert not torch.equal(final, first)

    again = rebuild(vars(nets[0].config))                        # as ae.pt does
    again.load_state_dict(states[0])
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(x)[0], nets[0](x)[0]) and nets[0].config.stem_norm


def test_another_encoder_is_measured_on_the_same_photographs(photos, tmp_path):
    result = call(pretrain, "--measure", "tiny", "--data", photos, "--size", "32", "--probe",
                  "berry,clover", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = dict(line.split(": ") for line in result.stdout.splitlines())
    held, truth, _ = load_images(photos, 32, "test", tmp_path / "cache", "berry,clover")
    images, labels, names = load_images(photos, 32, "train", tmp_path / "cache", "berry,clover")
    assert names == ["berry", "clover"] and len(held) == 40
    net = load_dino("tiny")
    mean = lambda x: net(net.normalize(torch.from_numpy(np.array(x)) / 127.5 - 1))[0].mean(1)
    assert float(found["knn"]) == pytest.approx(
        metrics.knn(mean(images), labels, mean(held), truth), abs=1e-4)
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("photos", "cache")] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["data"]         # nothing is trained


def test_encoders_made_before_the_stem_had_norms_are_rebuilt():
    saved = torch.load(TINY, weights_only=True)
    assert "stem_norm" not in saved["config"]
    rebuild(saved["config"]).load_state_dict(saved["model"])


def test_a_wrong_probe_ends_before_the_training(photos, tmp_path):
    one_line(call(pretrain, "--data", photos, *SMALL, "--probe", "plum", "--out", "x",
                  cwd=tmp_path), "--classes", "plum")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("flags, word", [
    ("--data x", "--out"), ("--data x --target color --out y", "--data shapes"),
    ("--area 70,12", "--area"), ("--crop 12", "--crop"), ("--stem_norm --stem 12", "--stem_norm"),
    ("--finish 2", "--finish")])
def test_impossible_flags_of_photographs(flags, word, tmp_path):
    one_line(call(pretrain, *flags.split(), cwd=tmp_path), word, code=2)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- which encoder stage 1 takes


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """Where weights/dino_photos.pt is in these tests: a small random encoder, once it is called."""
    path = tmp_path / "weights" / "dino_photos.pt"
    for module in (ae, weights):
        monkeypatch.setattr(module, "PHOTOS", path)

    def make():
        c = ViTConfig(dim=32, depth=1, heads=1, hidden=64, patch=8, stem=8, registers=2,
                      stem_norm=True, mean=(0.5,) * 3, std=(0.5,) * 3)
        torch.manual_seed(0)
        config.save(path, dict(kind="dino", version=config.VERSION, config=vars(c),
                               model=DINOv3(c).half().state_dict()))
        return path
    return make


def test_photographs_get_the_encoder_of_photographs(embedded, photos, tmp_path, capsys):
    def pick(*flags):
        c = config.parse(ae.Config, ae.PRESETS, ["--data", str(photos), *flags])
        return ae.choose_encoder(c), capsys.readouterr().out
    found, why = pick()
    assert found == "tiny" and why.startswith("--encoder tiny, because there is no ")
    run = partial(call, ae, "--preset", "debug", "--data", photos, "--images", 20, "--warmup", 1,
                  "--out", "made", cwd=tmp_path)
    one_line(run("--encoder", "photos"), "dino_photos.pt: no such file",
             "python -m lab.pretrain --preset photos")
    embedded()
    assert pick() == ("photos", f"--encoder photos, because --data {photos} holds photographs\n")
    for flags, encoder in ((["--encoder", "tiny"], "tiny"), (["--data", "shapes"], "tiny"),
                           (["--data", "shapes-color"], "tiny"),
                           (["--encoder", "auto.pth"], "auto.pth")):
        assert pick(*flags) == (encoder, "")

    result = run("--steps", 1)
    assert "--encoder photos, because" in result.stdout and "shapes" not in result.stdout
    assert "without a GAN, " in result.stdout
    assert config.load(tmp_path / "made/ae.pt")["config"]["encoder"] == "photos"
    assert "finished at step 1" in run("--steps", 1, "--encoder", "photos").stdout
    assert "resuming from step 1" in run("--steps", 2, "--warmup", 1).stdout     # the same command
    one_line(run("--encoder", "tiny"), "--encoder photos (now tiny)")
    assert ae.load_ae(tmp_path / "made/ae.pt").dino.config.stem_norm


def test_the_perceptual_loss_may_look_through_random_views():
    g = partial(config.generator, 0)
    x = torch.linspace(-1, 1, 64).expand(200, 3, 64, 64)             # brighter to the right
    net, (a, b) = load_dino("tiny"), ae.same_view((x, 1 - x), g())
    assert torch.allclose(b, 1 - a, atol=1e-5) and a.abs().max() <= 1.0001       # the same view
    down, right = a[:, 0, 33, 32] - a[:, 0, 31, 32], a[:, 0, 32, 33] - a[:, 0, 32, 31]
    angle, zoom = torch.atan2(down, right), torch.hypot(down, right) * 63 / 4
    assert 0.7 < zoom.quantile(0.05) < 0.8 and 1.25 < zoom.quantile(0.95) < 1.42
    assert all(20 < n < 80 for n in angle.histc(4, -math.pi, math.pi))           # any angle
    assert 0.1 < a[:, 0, 31:33, 31:33].mean((1, 2)).abs().max() < 0.27           # up to 1/8
    x, y = torch.rand(2, 2, 3, 32, 32, generator=g()) * 2 - 1
    a, b = ae.same_view((x, y), g(1))
    assert torch.equal(a, ae.same_view((x, y), g(1))[0]) and not torch.equal(a[0], a[1])
    assert ae.perceptual_loss(net, *ae.same_view((x, x.clone()), g())) == 0
    assert ae.perceptual_loss(net, a, b) != ae.perceptual_loss(net, x, y)


def test_the_default_compares_the_images_themselves(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(ae, "same_view", lambda images, g: drawn.append(len(images)) or images)
    monkeypatch.setattr(ae, "evaluate", lambda c, model, *_: model)
    for view, expected in (("auto", []), ("yes", [2, 2])):
        result = call(ae, "--preset", "debug", "--images", 32, "--steps", 2, "--warmup", 1,
                      "--perceptual_view", view, "--out", view, cwd=tmp_path)
        assert result.returncode == 0 and drawn == expected, result.stderr
    tables = [(tmp_path / view / "ae.tsv").read_text() for view in ("auto", "yes")]
    assert tables[0] == tables[1]                                # nothing else changes
    for view, expected in (("auto", [2]), ("no", [])):           # of photographs
        drawn.clear()
        c = ae.Config(data="pictures", perceptual_view=view)
        ae.choose_perceptual(c, SimpleNamespace(dino=load_dino("tiny")), "cpu")(
            *torch.zeros(2, 2, 3, 32, 32), None)
        assert drawn == expected


@pytest.mark.parametrize("latent", ["svg", "unaligned", "dino", "vae"])
def test_the_decoder_may_get_a_louder_residual(latent):
    usual, loud = (ae.AutoEncoder(ae.Config(**ae.PRESETS["debug"], latent=latent, residual_gain=k),
                                  load_dino("tiny")).eval() for k in (1.0, 4.0))
    loud.load_state_dict(usual.state_dict())
    x = torch.rand(2, 3, 32, 32, generator=config.generator(0)) * 2 - 1
    a, b = usual.encode(x), loud.encode(x)
    assert torch.equal(a, b)                                    # what the DiT learns is the same
    if latent in ("svg", "unaligned"):
        a[:, -16:] *= 4
        assert not torch.allclose(usual.decode(b), loud.decode(b), atol=1e-3)
    assert torch.allclose(usual.decode(a), loud.decode(b), atol=1e-5)
    again = loud.train()(x, config.generator(0))[0]
    if latent != "vae":                                         # the same path in training
        loud.gain.fill_(1)
        same = torch.equal(again, loud(x, config.generator(0))[0])
        assert same == (latent == "dino")


def test_the_presets_of_photographs_are_one_run():
    a, d, s = (config.parse(m.Config, m.PRESETS, ["--preset", "photos"]) for m in (ae, dit, sample))
    assert a.out == d.out == s.out == "out/photos" and a.encoder == "photos" and a.size == 64
    assert d.dim > 128 + a.residual_dim and (s.scale, s.shift, s.columns) == (2.5, "", 10)
    assert [s.weak] == [f"dit_{step}.pt" for step in d.keep]


# ---------------------------------------------------------------- the judge


def test_a_judge_of_a_folder_knows_its_classes(photos, tmp_path):
    file = tmp_path / "mine" / "judge-mine.pt"
    result = call(judge, "--preset", "debug", "--data", photos, "--steps", "40", "--out", file,
                  cwd=tmp_path)
    assert result.returncode == 0 and "accuracy: 1.0000" in result.stdout, result.stdout
    made = metrics.load_judge(file)
    assert made.class_names == list(COLORS) and made.head.out_features == 3
    assert config.load(file)["accuracy"] == 1.0 and len(list(file.parent.iterdir())) == 1
    held, labels, _ = load_images(photos, 32, "test", tmp_path / "cache")
    assert torch.equal(metrics.judge_images(made, held.copy())[1], labels)

    assert metrics.find_judge(COLORS, file.parent) == file
    file.rename(file.with_name("judge_train.pt"))                # unfinished runs do not count
    assert metrics.find_judge(COLORS, tmp_path / "mine") is None
    assert metrics.find_judge(metrics.load_judge().class_names, tmp_path / "mine") == metrics.JUDGE


def test_a_judge_grows_with_the_images():
    small, large = metrics.Judge(8, 32), metrics.Judge(8, 64)
    assert (small.head.in_features, large.head.in_features) == (32, 64)
    for made, size in ((small, 32), (large, 64)):
        assert made.body(torch.zeros(1, 3, size, size)).shape[2:] == (4, 4)


def test_a_judge_of_a_folder_does_not_replace_the_shipped_one(photos, tmp_path):
    one_line(call(judge, "--data", photos, cwd=tmp_path), "--out", code=2)
    one_line(call(judge, "--data", photos, "--factors", "--out", "x", cwd=tmp_path), "--factors",
             code=2)


# ---------------------------------------------------------------- evidence


@pytest.fixture
def tested(photos, tmp_path, monkeypatch):
    """lab.evidence's Config, of tiny models of the folder."""
    monkeypatch.chdir(tmp_path)
    return config.parse(evidence.Config, evidence.PRESETS, [
        "--preset", "debug", "--n", "20", "--kept", "2", "--results", str(tmp_path / "rows"),
        "--ae", f"--preset debug --data {photos} --encoder tiny --images 60 --steps 2 --warmup 1",
        "--dit", "--preset debug --steps 2 --warmup 1"])


def test_photographs_are_measured_by_the_rulers_of_their_own_data_set(tested, photos):
    row = evidence.measure_generation(tested, "svg", "base", 0, 2, "ab2", 2, 1.0, "-")
    folder = tested.out + "/debug/svg-0"
    model, decoder = sample.load(folder)
    rulers = sample.Scorer(decoder, folder=folder)
    labels = sample.balanced_labels([0, 1, 2], 20)
    expected = rulers(sample.generate(model, decoder, labels, 2), labels)
    assert row.pop("accuracy") == row.pop("frechet") == row.pop("factors") == "-"    # no judge
    assert row == pytest.approx({name: expected[name] for name in row}) and len(row) == 6

    row = evidence.measure_latents(tested, "pixels", 0)
    assert row["knn"] > 0.9 and row["decoded_accuracy"] == "-"        # the classes are three colors
    held = rulers.real_images("test", 2000)
    assert row["decoded_conv"] == pytest.approx(rulers(*held)["conv"])
    svg = evidence.measure_latents(tested, "svg", 0)
    assert svg["channels"] == 112 and svg["psnr"] > 5
    keys = dict(preset="photos", latent="svg", seed=0)
    evidence.tables("rows")["latents"].add(**keys, **svg)            # '-' and all
    assert evidence.tables("rows")["latents"].has(**keys)

    row = evidence.measure_memorization(tested, "svg", "base", 0)
    assert row["n"] == 20 and row["judge_near"] == "-" and 0 <= row["conv_near"] <= 1
    with pytest.MonkeyPatch.context() as patch:                      # mirrored copies
        train = rulers.real_images("train", 20)[0]
        patch.setattr(sample, "generate", lambda *a, **k: train.flip(-1))
        row = evidence.measure_memorization(tested, "svg", "base", 0)
    assert {row[f"{k}_{end}"] for k in ("conv", "pixels") for end in ("median", "near")} == {1.0}

    tested.judge = "--size 32 --steps 2 --width 8 --batch 8"
    row, made = evidence.measure_judges(tested, "svg", "base", 0), "out/evidence/debug/judge2"
    second = sample.Scorer(decoder, folder=made)
    assert config.load(made + "/judge.pt")["config"]["width"] == 8 and second.judge is not None
    found = second(sample.generate(model, decoder, labels, 10, 2.0), labels)
    assert row == {name: found[name] for name in ("n", "accuracy", "frechet")}


def test_the_controls_share_all_but_the_encoder(tested, photos, monkeypatch):
    ran = []
    monkeypatch.setattr(evidence, "command", lambda *a: ran.append([*map(str, a)]))
    c = config.parse(evidence.Config, evidence.PRESETS, [
        "--preset", "photos", "--results", "rows", "--ae", f"--preset photos --data {photos}"])
    for latent in ("svg", "encoder0", "encodertiny"):
        evidence.stage1(c, latent, 0)
    (_, svg, *_), (module, made, *_), (_, random, *_), (_, tiny, *_) = ran
    same = f"--preset photos --data {photos} "
    assert svg == same and tiny == same + "--encoder tiny --perceptual_net photos"
    assert random == same + "--encoder out/evidence/photos/encoder0/dino_photos_0.pt " + (
        "--perceptual_net photos")
    assert "lab.pretrain" in module
    assert made.endswith(f"--keep 0,400,1200 --data {photos} --steps 1 --keep 0")
    assert {c.preset for c in map(evidence.settings, (c,))} == {"photos"}


def test_memorization_tells_copies_from_new_images():
    g = config.generator(0)
    train, held, new = (torch.randn(n, 8, generator=g) for n in (500, 400, 400))
    assert evidence.memorization(train, held, held) == (0.5, 0.05)
    assert evidence.memorization(train, held, train[:100]) == (1, 1)
    half = torch.cat([new[:100], train[:100] + 1e-3])
    median, near = evidence.memorization(train, held, half)
    assert abs(median - 0.75) < 0.05 and abs(near - 0.525) < 0.03
    assert evidence.memorization(train, held, 10 + new) == (0, 0)


# ---------------------------------------------------------------- scores


@pytest.fixture
def scene(photos, tmp_path, monkeypatch):
    """-> sample.Config and an autoencoder that changes nothing, both of the folder."""
    monkeypatch.chdir(tmp_path)
    made = SimpleNamespace(
        config=SimpleNamespace(data=str(photos), size=32, classes="", images=0), image_size=32,
        class_names=list(COLORS), encode=lambda x: x, decode=lambda z: z)
    return sample.Config(out=str(tmp_path / "run"), sweep=(1, 5)), made


def drawn(images, labels):
    """What sample.py draws with: labels -> images of these classes, seconds, NFE."""
    def draw(asked, steps=10, scale=1.0, shift=1.0):
        rows = [(labels == k).nonzero()[i % 20, 0] for i, k in enumerate(asked)]
        return images[torch.stack(rows)], 1.0, steps
    return partial(draw, shift=1.0)


def test_photographs_are_scored_by_what_needs_no_training_and_by_a_judge(scene, capsys):
    c, made = scene
    scorer = sample.choose_scorer(c, made, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("not scored: factors")
    assert "accuracy and frechet" in lines[0] and f"--data {made.config.data}" in lines[0]
    assert lines[1].startswith("--n 1000: 60 instead") and c.n == 60

    held, labels, _ = load_images(made.config.data, 32, "test")
    draw = drawn(torch.from_numpy(held.copy()), labels)
    sample.print_scores(c, draw, [0, 1, 2], scorer)
    shown = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert "sample_accuracy" not in shown and "real_factors_frechet" not in shown
    assert shown["n"] == "60" and float(shown["sample_recall"]) > 0.5
    for score in ("conv_frechet", "color_frechet", "precision", "kid"):       # the held-out images
        assert shown[f"sample_{score}"] == shown[f"real_{score}"] == shown[f"decoded_real_{score}"]

    judge.main(["--preset", "debug", "--data", made.config.data, "--steps", "40", "--out", c.out])
    capsys.readouterr()
    scorer = sample.choose_scorer(c, made, "cpu")
    assert capsys.readouterr().out == "not scored: factors, known only of shapes\n"
    sample.sweep(c, draw, [0, 1, 2], scorer, [1])
    table = [line.split("\t") for line in open(f"{c.out}/sweep.tsv").read().splitlines()]
    assert table[0] == "steps scale nfe accuracy frechet conv recall n seed shift".split()
    assert len(table) == 5 and all(row[3] == "1.0000" and row[7] == "60" for row in table[1:])


def test_the_reference_of_a_sorted_folder_has_every_class_in_every_part(scene):
    c, made = scene
    scorer = sample.Scorer(made, folder=c.out)
    images, labels = scorer.real_images("train", 30)
    assert labels.bincount().tolist() == [10, 10, 10] and labels[:12].unique().tolist() == [0, 1, 2]
    train, _, _ = load_images(made.config.data, 32, "train")
    gray = images[labels == 0].float().mean((0, 2, 3))
    assert (gray - 90).abs().max() < 20                          # an image keeps its label
    assert len(scorer.real_images("train", 5000)[0]) == len(train) == 90


def test_the_scores_of_shapes_use_the_same_images_as_ever(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SHAPES_SPLITS, "train", (200, 0))
    made = SimpleNamespace(config=SimpleNamespace(data="shapes", classes=""), image_size=16)
    scorer = object.__new__(sample.Scorer)
    scorer.ae, scorer.drawn = made, True
    images, labels = scorer.real_images("train", 120)
    all_images, all_labels, _ = load_images("shapes", 16)
    assert np.array_equal(images, all_images[:120]) and torch.equal(labels, all_labels[:120])


@pytest.mark.parametrize("change, words", [
    (dict(n=0), "--n is 0"), (dict(data="gone"), "gone: no such folder"),
    (dict(FEWEST=61), "60 held-out images are too few")])
def test_when_nothing_is_scored_it_says_why(change, words, scene, capsys, monkeypatch):
    c, made = scene
    c.n, made.config.data = change.get("n", 1000), change.get("data", made.config.data)
    monkeypatch.setattr(sample, "FEWEST", change.get("FEWEST", sample.FEWEST))
    assert sample.choose_scorer(c, made, "cpu") is None
    out = capsys.readouterr().out
    assert out.startswith("nothing is scored: ") and words in out and out.count("\n") == 1


@pytest.mark.filterwarnings("ignore")
def test_the_stand_in_measures_both_stages(photos, tmp_path, monkeypatch):
    """The presets are the smallest here; the command, the random weights and the row are real."""
    monkeypatch.setitem(standin.SIZES, "vits16plus", ViTConfig(dim=64, depth=1, heads=2, patch=8))
    for module in ae, dit:
        monkeypatch.setitem(module.PRESETS, "imagenette", module.PRESETS["debug"])
    monkeypatch.setattr(ae, "load_lpips", None)                         # never the published one
    flags = ["--data", photos, "--classes", "all", "--size", 32, "--images", 10, "--out",
             tmp_path / "run", "--results", tmp_path, "--steps", 3]
    for stage in "ae", "dit":
        standin.main([*map(str, flags), "--stage", stage])
    rows = standin.table(tmp_path).rows()
    assert [(r["stage"], r["taken"]) for r in rows] == [("ae", "3"), ("dit", "3")]
    losses = (tmp_path / "run/ae.tsv").read_text().splitlines()
    assert [float(r["before"]) for r in rows][0] == float(losses[1].split("\t")[1])
    assert all(float(r["seconds"]) > 0 and 0.1 < float(r["gigabytes"]) < 100 for r in rows)
    assert ae.load_ae(tmp_path / "run/ae.pt").config.images == 10
    # 250 images of 256 px at once took more than 20 GB when they were decoded
    assert [ae.at_once(size) for size in (32, 64, 256, 4096)] == [250, 250, 15, 1]
