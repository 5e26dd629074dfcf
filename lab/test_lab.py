"""Tests of the lab and of the checks of the exercises."""
import dataclasses, inspect, json, math, re, shlex, shutil, time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ae, data, dino, dit, flow, metrics, sample, toy_flow
from dino import load_dino
from exercises import check
from flow import flow_loss
from lab import bench, edit as editing, evidence, goals, growth, judge, maps, pretrain, report
from plumbing import config
from plumbing.config import UserError
from plumbing.testing import ROOT, call, one_line, run

# ---------------------------------------------------------------- pretrain.py


def test_the_contrastive_loss_is_nt_xent():
    z = torch.nn.functional.normalize(torch.randn(8, 5), dim=1)
    total = 0.0
    for i in range(8):
        similar = [math.exp((z[i] @ z[j]).item() / 0.2) for j in range(8)]
        total -= math.log(similar[(i + 4) % 8] / (sum(similar) - similar[i]))
    assert abs(pretrain.contrastive_loss(z, 0.2).item() - total / 8) < 1e-5


def test_views_are_a_function_of_the_generator():
    c, x = pretrain.Config(), torch.rand(6, 3, 32, 32) * 2 - 1
    a, b, other = (pretrain.views(x, c, config.generator(0, step)) for step in (3, 3, 4))
    assert a.shape == x.shape and torch.equal(a, b) and not torch.equal(a, other)


@pytest.mark.parametrize("target", ["views", "shape", "color"])
def test_a_resumed_pretraining_equals_the_uninterrupted_one(target, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "measure", lambda *_: {})       # it draws 7,000 shapes
    small = ["--preset", "debug", "--target", target, "--images", "100", "--steps", "8",
             "--keep", "0,4"]
    assert call(pretrain, *small, "--out", "whole", cwd=tmp_path).returncode == 0
    real = config.save

    def save(path, saved):
        real(path, saved)
        if saved.get("step") == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(config, "save", save)
    parts = [*small, "--out", "parts", "--save_every", "3"]
    one_line(call(pretrain, *parts, cwd=tmp_path), "interrupted")
    monkeypatch.setattr(config, "save", real)
    one_line(call(pretrain, *parts, "--lr", "1", cwd=tmp_path), "--lr 0.002 (now 1.0)")
    other = "shape" if target == "views" else "views"
    one_line(call(pretrain, *parts, "--target", other, cwd=tmp_path), f"--target {target}")
    assert "resuming from step 3" in call(pretrain, *parts, cwd=tmp_path).stdout
    assert "finished" in call(pretrain, *parts, cwd=tmp_path).stdout
    files = ["dino_tiny.pt", "dino_tiny_0.pt", "dino_tiny_4.pt"]
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == files
    for name in files:
        whole, resumed = (load_dino(tmp_path / folder / name) for folder in ("whole", "parts"))
        for a, b in zip(whole.parameters(), resumed.parameters()):
            assert torch.equal(a, b)
    assert whole.config.dim == 32 and whole.patch == 8


@pytest.mark.parametrize("flags, word", [
    ("--keep x", "--keep"), ("--dim 33", "--dim"), ("--size 30", "--size"),
    ("--check vits16 ", "--check needs"), ("--check vitb16 x.jpg", "--check needs")])
def test_impossible_flags_of_the_pretraining(flags, word, tmp_path):
    one_line(call(pretrain, *flags.split(), cwd=tmp_path), word, code=2)


def test_a_check_needs_a_readable_image(tmp_path):
    (tmp_path / "x.jpg").write_text("no image")
    one_line(call(pretrain, "--check", "vits16", "x.jpg", cwd=tmp_path), "x.jpg", "not a readable")


# ---------------------------------------------------------------- judge.py


def train_judge(out, *more):
    """A debug judge -> its weights."""
    judge.main(["--preset", "debug", "--out", str(out), "--device", "cpu", *more])
    return config.load(out / "judge.pt")["model"]


def test_a_resumed_judge_is_the_uninterrupted_one(tmp_path, monkeypatch, capsys):
    whole, cut = train_judge(tmp_path / "whole"), tmp_path / "cut"
    save, calls = config.save, []

    def dies(path, obj):                                          # in the middle of the third save
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(path, obj)
    monkeypatch.setattr(config, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        train_judge(cut)
    monkeypatch.setattr(config, "save", save)
    assert not (cut / "judge.pt").exists()
    with pytest.raises(UserError, match="--lr"):                  # another recipe is another run
        train_judge(cut, "--lr", "0.1")
    assert "resuming" not in capsys.readouterr().out
    again = train_judge(cut)
    assert "resuming from step 10" in capsys.readouterr().out
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    assert [p.name for p in cut.iterdir()] == ["judge.pt"]

    before = (cut / "judge.pt").stat().st_mtime_ns                # finished: touches nothing
    train_judge(cut, "--seed", "7")
    assert "finished" in capsys.readouterr().out
    assert (cut / "judge.pt").stat().st_mtime_ns == before
    other = train_judge(cut, "--seed", "7", "--overwrite")
    assert not torch.equal(other["head.weight"], whole["head.weight"])


def test_the_default_command_leaves_the_shipped_judge_alone(tmp_path):
    before = metrics.JUDGE.stat().st_mtime_ns
    result = run("lab.judge", cwd=tmp_path)
    assert result.returncode == 0 and "finished, accuracy 1.0000" in result.stdout
    assert metrics.JUDGE.stat().st_mtime_ns == before and not list(tmp_path.iterdir())


def test_the_network_of_all_factors_is_trained_like_the_judge(tmp_path, capsys):
    judge.main(["--preset", "debug", "--factors", "--out", str(tmp_path), "--device", "cpu"])
    network = metrics.load_judge(tmp_path / "factors.pt")
    assert network.head.out_features == 10 + sum(data.FACTORS.values())
    shown = capsys.readouterr().out
    assert all(f"error_{name}: " in shown for name in data.FACTORS)
    found, labels, targets = torch.randn(8, 26), torch.arange(8), torch.randn(8, 16)
    alone = judge.loss_of(found[:, :10], labels, targets)
    both = judge.loss_of(found, labels, targets)
    assert torch.allclose(both - alone, 3 * (found[:, 10:] - targets).square().mean(), atol=1e-5)


def test_augmented_images_are_repeatable_and_in_range():
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    a, b = (judge.augment(images, config.generator(3)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == images.shape and a.dtype == torch.float32
    assert 0.9 < a.abs().max() < 1.6
    assert not torch.equal(a, judge.augment(images, config.generator(4)))


def test_slerp_turns_evenly_on_the_sphere_and_survives_parallel_noise():
    a, b = torch.randn(2, 5, 3, 4, 4, generator=config.generator(0)).unbind(0)
    flat = lambda x: x.flatten(1).double()
    assert torch.allclose(editing.slerp(a, b, 0.0), a, atol=1e-6)
    assert torch.allclose(editing.slerp(a, b, 1.0), b, atol=1e-6)
    angle = lambda p, q: F.cosine_similarity(flat(p), flat(q)).clamp(-1, 1).acos()
    w = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])                   # one for each sample
    m = editing.slerp(a, b, w)
    assert torch.allclose(angle(a, m), w * angle(a, b), atol=1e-3)
    norm = flat(a).norm(dim=1).lerp(flat(b).norm(dim=1), w.double())
    assert torch.allclose(flat(m).norm(dim=1), norm, rtol=1e-5) and m.dtype == a.dtype
    assert torch.allclose(editing.slerp(a, 3 * a, 0.5), 2 * a, atol=1e-5)         # parallel
    for other in (a, -a):                                         # no angle; no unique arc
        assert torch.allclose(editing.slerp(a, other, 0.25), a.lerp(other, 0.25), atol=1e-5)
    assert editing.slerp(a[:0], b[:0], 0.5).shape == (0, 3, 4, 4)


def test_between_blends_the_velocities_of_two_classes(work):
    model, encoder = sample.load(work / "out" / "debug", "cpu")
    between = editing.Between(model, torch.tensor([1, 1, 1]), torch.tensor([2, 2, 2]),
                              torch.tensor([0.0, 0.5, 1.0]))
    x = torch.randn(4, model.channels, 4, 4, generator=config.generator(0))
    t = torch.full((4,), 0.3)
    v = between(x, t, torch.tensor([0, 1, 2, 3]))
    pure = [model(x, t, torch.full((4,), k)) for k in (1, 2, model.classes)]
    expected = torch.stack([pure[0][0], (pure[0][1] + pure[1][1]) / 2, pure[1][2], pure[2][3]])
    assert torch.allclose(v, expected, atol=1e-5)
    ends = sample.generate(between, encoder, [0, 2], 2, 2.0, seed=4)
    assert torch.equal(ends, sample.generate(model, encoder, [1, 2], 2, 2.0, seed=4))


def test_edit_keeps_what_the_mask_leaves_out(work):
    model, encoder = sample.load(work / "out" / "debug", "cpu")
    x = data.to_float(data.shapes(3, 32, 1)[0].numpy(), slice(None))
    autocast, seen, decode = config.setup("cpu")[1], [], encoder.decode
    with autocast():
        z = encoder.encode(x)
        plain = data.to_uint8(encoder.decode(z))
    labels, empty = torch.tensor([3, 4, 5]), torch.zeros(3, 32, 32)
    edit = lambda mask, **more: editing.edit(model, encoder, x, mask, labels, 6, **more)
    for t_edit in (0.0, 0.2, 0.95):                               # exactly, wherever it turns back
        assert torch.equal(edit(empty, t_edit=t_edit), plain)
    encoder.decode = lambda latents: seen.append(latents) or decode(latents)
    corner = empty.clone()
    corner[:, :8, :8] = 1                                         # exactly the first token
    edit(corner, blur=0.5)
    changed = (seen.pop() - z).abs().amax(1) > 0                               # (B, h, w)
    assert changed[:, 0, 0].all() and changed.sum() == 3
    soft = edit(corner, blur=0.5, fade=0)
    assert ((seen.pop() - z).abs().amax(1) > 0).sum() > 3         # the rim stays open
    full = edit(empty + 1, seed=1)
    assert not torch.equal(full, plain) and full.shape == soft.shape == (3, 3, 32, 32)
    assert torch.equal(full, edit(empty + 1, seed=1))
    assert not torch.equal(full, edit(empty + 1, seed=2))
    encoder.fingerprint = "another"
    with pytest.raises(config.UserError, match="another autoencoder"):
        edit(empty)


def test_held_out_shapes_come_with_their_masks(work):
    images, labels, _, cover = data.shapes(60, 32, data.SHAPES_SPLITS["test"][1], masks=True)
    held, truth, _ = data.load_images("shapes", 32, "test", work / "out/data")
    assert np.array_equal(held[:60], images.numpy()) and torch.equal(truth[:60], labels)
    assert (cover > 0).flatten(1).any(1).all()


def test_edit_on_the_command_line(work, tmp_path):
    held = data.load_images("shapes", 32, "test", work / "out/data")[0][3]
    Image.fromarray(held.transpose(1, 2, 0)).save(tmp_path / "held.png")
    white = Image.new("L", (64, 64))
    white.paste(255, (8, 8, 56, 56))
    white.save(tmp_path / "mask.png")
    Image.new("L", (9, 9)).save(tmp_path / "black.png")
    (tmp_path / "note.txt").write_text("not an image")
    base = ["--preset", "debug", "--edit", tmp_path / "held.png", "--to", "star"]
    edit = lambda *flags: call(editing, *base, *flags, cwd=work)
    sheets = []
    for mask in ("4,4,28,28", tmp_path / "mask.png"):             # the same place, given twice
        result = edit("--mask", mask, "--source", 0)
        assert result.returncode == 0 and "wrote" in result.stdout, result.stderr
        sheets.append(np.asarray(Image.open(work / "out/debug/edit.png")))
    assert sheets[0].shape == (64, 8 * 64, 3) and np.array_equal(*sheets)
    assert np.array_equal(sheets[0][::2, :64:2], held.transpose(1, 2, 0))      # the image itself
    for mask, word in (("4,4,40,28", "box"), ("5,5,5,9", "box"), ("1,2,3", "box"),
                       ("-1,2,3,4", "box"), ("no.png", "no such file"),
                       (tmp_path / "note.txt", "not a readable image"),
                       (tmp_path / "black.png", "white")):
        one_line(edit(f"--mask={mask}"), "--mask", word)
    box = ["--mask", "4,4,28,28"]
    one_line(edit(*box, "--to", "stair"), "--to stair", "star")
    one_line(edit(*box, "--to", "star,disc"), "--to", "one class")
    one_line(edit(*box, "--source", 10), "--source 10")
    one_line(edit(*box, "--edit", "no.png"), "--edit", "no such file")


def test_edit_held_out_and_interpolate_on_the_command_line(work):
    result = call(editing, "--preset", "debug", "--edit", "held-out", cwd=work)
    assert "edit_n: 20" in result.stdout and "edit_psnr_outside_db:" in result.stdout
    result = call(editing, "--preset", "debug", "--interpolate", cwd=work)
    assert "interpolate_slerp_accuracy:" in result.stdout, result.stderr
    assert Image.open(work / "out/debug/interpolate.png").size == (640, 640)


@pytest.mark.parametrize("flags, word", [
    ([], "--interpolate"), (["--edit", "a.png"], "--to"), (["--to", "star"], "--edit"),
    (["--edit", "a.png", "--to", "star"], "--mask"), (["--mask", "1,1,2,2"], "--edit"),
    (["--edit", "held-out", "--mask", "1,1,2,2"], "--mask"),
    (["--edit", "held-out", "--t_edit", "1"], "--t_edit"),
    (["--edit", "held-out", "--interpolate"], "--interpolate"),
    (["--interpolate", "--to", "star"], "--to")])
def test_bad_flags_of_edit(flags, word, tmp_path):
    one_line(call(editing, *flags, cwd=tmp_path), word, code=2)


def evidence_config(*flags):
    """lab.evidence's Config."""
    return config.parse(evidence.Config, evidence.PRESETS, [*map(str, flags)])


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
    z = evidence.as_patches(images)
    assert z.shape == (3, 192, 4, 4)
    patch = images[1, :, 8:16, 16:24].float()
    assert torch.equal(z[1, :, 1, 2].view(3, 8, 8), patch)


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """Rows of an experiment on `--preset debug`, as a user makes them; two of its four latents."""
    folder = tmp_path_factory.mktemp("measured")
    fewer = evidence.EXPERIMENTS["fields"]._replace(
        measures=dict(paths=("svg", "vae:base"), spectra=("svg",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evidence.EXPERIMENTS, "fields", fewer)
        result = call(evidence, "fields", "--preset", "debug", cwd=folder)
        assert result.returncode == 0, result.stderr
        assert "straightness: " in result.stdout and "shift10: " in result.stdout
        (folder / "log").write_text(result.stdout)
        yield folder


def test_the_commands_that_evidence_prints_are_those_that_it_ran(measured):
    commands = re.findall(r"\$ python (\w+)\.py (.*)", (measured / "log").read_text())
    assert [name for name, _ in commands] == ["ae", "dit"] * 2
    for name, flags in commands[:2]:
        result = call(dict(ae=ae, dit=dit)[name], *flags.split(), cwd=measured)
        assert result.returncode == 0 and "finished at step 20" in result.stdout, result.stderr


def test_evidence_resumes_and_does_nothing_twice(measured):
    rows = evidence.tables(measured / "results")["paths"].rows()
    assert [r["latent"] for r in rows] == ["svg", "vae"]
    for r in rows:
        assert 0 < float(r["straightness"]) <= 1 and -0.1 < float(r["consistency"]) < 0.6
    before = (measured / "results/paths.tsv").read_text()
    again = call(evidence, "fields", "--preset", "debug", cwd=measured)
    assert again.returncode == 0 and "$ python" not in again.stdout
    assert (measured / "results/paths.tsv").read_text() == before
    one_line(call(evidence, "nothing", cwd=measured), "nothing: no such experiment", code=2)
    one_line(call(evidence, "fields", "--seeds", "a", cwd=measured), "--seeds", code=2)
    listing = call(evidence, cwd=measured)
    assert listing.returncode == 0
    assert all(name in listing.stdout for name in evidence.EXPERIMENTS)
    one_line(call(report, "--preset", "debug", cwd=measured), "lab.evidence all")


def test_every_job_measures_what_its_row_says(monkeypatch, tmp_path):
    """A measurement gets the key of its row, all of it, and each seed has rows of its own."""
    c, seen = evidence_config("--results", tmp_path), []
    for name, measure in list(evidence.MEASURES.items()):
        def stub(c, name=name, measure=measure, **about):
            inspect.signature(measure).bind(c, **about)
            seen.append((name, about))
            table = evidence.tables(tmp_path)[name]
            return dict.fromkeys(table.columns[len(table.keys):], 0.0)
        monkeypatch.setitem(evidence.MEASURES, name, stub)
    for name in evidence.EXPERIMENTS:
        seen.clear()
        evidence.main([name, "--results", str(tmp_path)])
        found = evidence.tables(tmp_path)
        assert all(found[table].has(**key) for table, key in evidence.rows(c, name))
        fixed = {table for table, key in evidence.rows(c, name)           # nothing random in it
                 if key.get("change") in evidence.LOST}
        for table in {t for t, about in seen if "seed" in about} - fixed:
            assert {about["seed"] for t, about in seen if t == table} == {0, 1, 2}, (name, table)
    seen.clear()
    evidence.main(["all", "--results", str(tmp_path)])
    assert not seen                                               # nothing new


def test_mean_iou_of_a_small_case():
    # two of three tokens of class 1 found, one taken for class 0: 2/3 and 2/3; class 2 is nowhere
    found, truth = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1])
    assert evidence.mean_iou(found, truth, 3) == pytest.approx(2 / 3)
    assert evidence.mean_iou(truth, truth, 3) == 1


def test_the_changes_of_the_rulers(measured, monkeypatch):
    monkeypatch.chdir(measured)
    shown, c = {}, evidence_config("--preset", "debug", "--n", 100)
    for change in (*evidence.CHANGES, *evidence.LOST):
        monkeypatch.setattr(evidence, "scores", lambda *a, change=change: shown.update({change: a}))
        evidence.measure_rulers(c, change, 0)
    x, y, about = shown["untouched"]
    assert about.data == "shapes" and torch.equal(shown["unchanged"][0], x)
    contrast, detail = evidence.contrast_and_detail(x)
    assert evidence.contrast_and_detail(shown["paler"][0]) == pytest.approx(
        (0.7 * contrast, detail), rel=0.02)
    assert evidence.contrast_and_detail(shown["softened"][0])[1] < 0.95 * detail
    assert torch.equal(x, data.shapes(100, 32, 10)[0])
    assert len(shown["three"][0].unique(dim=0)) == 30 and len(shown["three"][1]) == 100
    again = shown["permuted"][0]
    assert torch.equal(again.sort(1).values, x.sort(1).values) and not torch.equal(again, x)
    cover = data.shapes(100, 32, 10, masks=True)[3][:, None].expand(-1, 3, -1, -1)
    red = (shown["recolored"][0].double() * (cover == 255)).sum((2, 3)) / (cover == 255).sum((2, 3))
    assert (red.median(0).values / 255 - torch.tensor([0.8, 0.2, 0.2])).abs().max() < 0.03
    assert torch.allclose(shown["blurred"][0][..., 2:-2, 2:-2].double().mean(),
                          x[..., 2:-2, 2:-2].double().mean(), atol=1)


def test_other_statistics_of_the_same_autoencoder(measured, monkeypatch):
    monkeypatch.chdir(measured)
    c = evidence_config("--preset", "debug")
    plain, scalar, loud = (ae.load_ae(evidence.stage1(c, "svg" + variant, 0) / "ae.pt")
                           for variant in ("", "_scalar", "_x4"))
    x = data.to_float(data.shapes(20, 32, 0)[0].numpy(), slice(None))
    a, b = scalar.encode(x), loud.encode(x)
    assert len(set(scalar.std.flatten().tolist())) == 1 < len(set(plain.std.flatten().tolist()))
    assert torch.equal(a[:, :-16], b[:, :-16]) and loud.config.normalize == "scalar"
    assert torch.allclose(a[:, -16:] * 4, b[:, -16:], atol=1e-4)
    assert torch.allclose(scalar.decode(a), loud.decode(b), atol=1e-4)
    assert torch.allclose(plain.decode(plain.encode(x)), scalar.decode(a), atol=1e-4)
    assert len({m.fingerprint for m in (plain, scalar, loud)}) == 3


def test_a_dit_of_another_width_reads_the_autoencoder_where_it_is(measured, monkeypatch, capsys):
    monkeypatch.chdir(measured)
    c = evidence_config("--preset", "debug", "--n", 20)
    row = evidence.measure_generation(c, "svg", "wide", 0, 10, "ab2", 2, 1.0, "auto")
    assert row["n"] == 20 and 0 <= row["accuracy"] <= 1 and row["frechet"] > 0
    folder = measured / "out/evidence/debug/svg-wide-0"
    assert "--ae out/evidence/debug/svg-0 --out out/evidence/debug/svg-wide-0" \
        in capsys.readouterr().out
    assert (folder / "dit_10.pt").is_file() and not (folder / "ae.pt").exists()
    assert not list(folder.glob("latents*"))
    row = evidence.measure_width(c, "svg", 112, 48, 0)
    assert row["parameters"] == 199360 and row["loss"] > 0
    maps.draw_strip(measured / "out/evidence/debug", measured / "strip.png", (1, 2), ("svg",))
    maps.draw_few(measured / "out/evidence/debug", measured / "few.png", 0, ("svg", "no such"))
    trained = measured / "out/evidence/debug/svg-0"
    shutil.copy(trained / "dit_10.pt", trained / "dit_1000.pt")
    maps.draw_parts(trained, measured / "parts.png")
    maps.draw_pair(trained.parent, measured / "pair.png", 2, ("svg",))
    width, height = Image.open(measured / "pair.png").size
    assert height == 5 * width                                # two columns, a row for each class
    assert all((measured / f"{name}.png").is_file() for name in ("strip", "few", "parts"))


def test_tokens_that_differ_get_different_colors():
    z = torch.zeros(2, 8, 2, 2)
    z[0, :3, 0, 1], z[1, 2:6, 1], z[1, 7, 0] = 5.0, -3.0, 4.0     # one token, twice a pair of them
    seen = maps.token_colors(z, 4)
    assert seen.shape == (2, 3, 8, 8) and seen.dtype == torch.uint8
    colors = seen[..., ::4, ::4].movedim(1, -1).reshape(8, 3)
    assert [len(colors[k].unique(dim=0)) for k in ([0, 2, 3], [4, 5], [6, 7])] == [1, 1, 1]
    assert len(colors.unique(dim=0)) == 4


def test_report_numbers(tmp_path):
    table = evidence.tables(tmp_path)["generation"]
    for latent, base in (("svg", 1.0), (report.VAE, 4.0)):
        for seed in (0, 1, 2):
            table.add(preset="small", latent=latent, dit="base", seed=seed, trained=10,
                      sampler="ab2", steps=10, scale=1.0, shift="-", n=50,
                      **dict.fromkeys(evidence.SCORES.split(), "-")
                      | dict(accuracy=0.5, frechet=base + seed))
    N = report.Numbers(tmp_path, "small")
    assert N.cell("generation", "frechet", 2, latent="svg") == "2.00 ± 1.00"
    assert N.cell("generation", "accuracy", 3, latent="svg") == ".500 ± .000"
    assert N.cell("generation", "accuracy", 3, latent="svg", steps=25) == "-"
    table.add(preset="small", latent=report.VAE, dit="base", seed=0, trained=10, sampler="ab2",
              steps=10, scale=4.0, shift="-", n=50, **dict.fromkeys(evidence.SCORES.split(), "-")
              | dict(accuracy=0.5))
    text = report.results(report.Numbers(tmp_path, "small"))
    assert "| guidance | latent | accuracy | Frechet |\n| --- | --: | --: | --: |\n" in text
    assert "| 1 | SVG | .500 ± .000 | 2.00 ± 1.00 |\n" in text
    assert "| 4 | VAE | .500 | - |\n" in text and "| 4 | SVG |" not in text
    assert "`; seeds 0, 1, 2, of some cells fewer; n = 50; mean ± s" in " ".join(text.split())
    assert "| 25 | 1 |" not in text
    assert "## Guidance" in text and "## Few steps" not in text and "## Editing" not in text
    assert "## The default" not in text
    table.add(preset="full", latent="vae", dit="base", seed=0, trained=20, sampler="ab2", steps=3,
              scale=2.0, shift="-", n=50, **dict.fromkeys(evidence.SCORES.split(), 0.25))
    evidence.tables(tmp_path)["latents"].add(
        preset="full", latent="pixels", seed=0,
        **dict.fromkeys(evidence.tables(tmp_path)["latents"].columns[3:], 0.5))
    N = report.Numbers(tmp_path, "small")
    assert ("| VAE, 16 channels | ab2 | 3 | 2 | 0.2 | .250 | 0.25 | .250 | 0.25 | 0.25 | .250 | "
            ".250 |") in report.results(N)
    assert "lab.evidence default --preset full" in report.results(N)
    assert N.cell("generation", "frechet", 2, latent="svg") == "2.00 ± 1.00"
    assert report.headline(N).splitlines()[2:] == [
        "| VAE, 16 channels | ab2 | 3 | 2 | 0.2 | .250 | 0.25 | .250 |",
        "| held-out images | | | | 0.5 | .500 | 0.50 | .500 |"]
    later = ("**Not measured yet**: the preset in full; the preset in full, few steps; the preset "
             "in full, during training; reconstruction and ten steps; few steps; few steps ")
    assert later in " ".join(text.split())
    table.add(preset="photos", latent="vae", dit="base", seed=0, trained=20,
              sampler="euler", steps=3, scale=1.0, shift="-", n=50,
              **dict.fromkeys(evidence.SCORES.split(), 0.25) | dict(factors="-"))
    text = report.results(report.Numbers(tmp_path, "small"))
    assert "## Photographs: few steps\n" in text
    assert later.replace("ten steps; few steps; ", "ten steps; ") in " ".join(text.split())
    flat = " ".join(text.split())
    assert flat.index("(5) VA-VAE") < flat.index("on a stand-in. ## Photographs: few steps")
    assert ("| latent | sampler | guidance | random conv, 3 steps | Frechet, 3 steps | accuracy, "
            "3 steps |\n| --- | --: | --: | --: | --: | --: |\n"
            "| VAE, 16 channels | euler | 1 | 0.2 | 0.25 | .250 |\n") in text
    text = "a\n<!-- headline -->\nold\n<!-- /headline -->\nb"
    assert report.fill(text, "headline", "new") == text.replace("old", "new")
    assert report.fill("none", "headline", "new") == "none"


def test_contrast_and_detail():
    """Paler images lose contrast, blurred ones detail, and the random ones here both have."""
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    of = lambda x: np.array(evidence.contrast_and_detail((x * 255).round().byte()))
    contrast, detail = of(x)
    assert abs(contrast - 0.193) < 0.01 and abs(detail - 1.12) < 0.05     # sqrt(4 / pi) if normal
    assert np.allclose(of(x / 2 + 0.25), (contrast / 2, detail), rtol=0.01)
    assert of(F.avg_pool2d(x, 3, 1, 1))[1] < 0.8 * detail


def test_results_md_is_what_the_rows_say():
    """Nobody types a number: RESULTS.md is what lab/report.py makes of results/ now."""
    N = report.Numbers(ROOT / "results", "small")
    assert (ROOT / "RESULTS.md").read_text() == report.results(N), \
        "run `python -m lab.report`"
    readme = (ROOT / "README.md").read_text()
    assert report.fill(readme, "headline", report.headline(N)) == readme, \
        "run `python -m lab.report`"
    exercises = (ROOT / "exercises/README.md").read_text()
    assert exercises.count("<!-- effect") and report.effects(N, exercises) == exercises
    named = " ".join(re.sub(r"--preset \S+|,", "", s.command) for s in report.SECTIONS)
    assert set(named.split()) == set(evidence.EXPERIMENTS)
    for s in report.measured(N).values():
        assert all((ROOT / f"assets/{name}.png").is_file() for name, _ in s.figures)


def test_the_findings_quote_their_tables():
    """A fraction or distance in a finding is the rounded mean of a cell below it."""
    N = report.Numbers(ROOT / "results", "small")
    known = {".1", ".4809", ".2759"}                           # chance; losses of the authors
    for s in report.measured(N).values():
        means = [float(m) for m in re.findall(r"\| (\d*\.\d+)", s.table(N))]
        for quoted in re.findall(r"(?<![\w.])\.\d+", s.finding):
            digits = len(quoted) - 1
            assert quoted in known or any(abs(m - float(quoted)) <= 0.5 * 10 ** -digits + 1e-9
                                          for m in means), (s.title, quoted)


def test_pca_finds_the_plane_and_tsne_the_groups():
    g = config.generator(1)
    plane = torch.randn(200, 2, generator=g) * torch.tensor([3.0, 1.0])
    x = plane @ torch.linalg.qr(torch.randn(20, 20, generator=g))[0][:2]
    flat = maps.pca(x)
    expected = (plane - plane.mean(0)).double()
    assert torch.allclose(torch.cdist(flat, flat), torch.cdist(expected, expected), atol=1e-4)
    y = torch.arange(150) % 3
    x = torch.randn(3, 30, generator=g)[y] * 2 + 0.3 * torch.randn(150, 30, generator=g)
    flat = maps.tsne(x, perplexity=15, steps=200)
    assert flat.isfinite().all() and metrics.knn(flat[:75], y[:75], flat[75:], y[75:], k=5) == 1
    assert torch.equal(flat, maps.tsne(x, perplexity=15, steps=200))
    with pytest.raises(ValueError, match="perplexity"):
        maps.tsne(x, perplexity=150)


EXERCISE_TEXT = (ROOT / "exercises" / "README.md").read_text()


# ---------------------------------------------------------------- the project as it is


@pytest.mark.parametrize("n", map(str, range(1, 13)))
def test_an_exercise_is_not_solved_marked_and_described(n, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "OUT", tmp_path)          # what the reader trained does not count
    began = time.time()
    solved, line = check.verdict(check.EXERCISES[n])
    assert not solved and "Error" not in line and "\n" not in line and time.time() - began < 60
    title = check.EXERCISES[n].__doc__
    text = re.search(rf"^## {n}\. {title}\n(.+?)(?=^## |\Z)", EXERCISE_TEXT, re.M | re.S)[1]
    row = re.search(rf"^\| {n} \| {title} \| (.+?) \|", EXERCISE_TEXT, re.M)[1]
    assert f"python exercises/check.py {n}" in text
    mark = re.compile(rf"# ---- .*EXERCISE {n}: .* ----$", re.M)
    marked = {str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")]
              if not p.name.startswith("test") and mark.search(p.read_text())}
    named = set(re.findall(r"`([\w/]+\.py)`", row))
    assert named and named <= marked, (named, marked)
    assert all(f"`{name}`" in text for name in marked), (marked, text)


def test_there_are_twelve_exercises():
    assert list(check.EXERCISES) == [str(n) for n in range(1, 13)]
    assert EXERCISE_TEXT.count("\n## ") == 12


def test_the_commands_in_the_exercises_have_flags_that_exist():
    modules = dict(ae=ae, data=data, dit=dit, sample=sample, toy_flow=toy_flow, pretrain=pretrain,
                   judge=judge)
    lines = re.findall(r"python (?:-m lab\.)?(\w+)(?:\.py)?((?: --?[\w-]+(?: [^-\s&`#]+)?)*)",
                       EXERCISE_TEXT)
    lines = [(name, shlex.split(flags)) for name, flags in lines if name in modules]
    assert len(lines) >= 20 and {name for name, _ in lines} == set(modules)
    for name, flags in lines:
        if "midpoint" not in flags:                      # exercise 2 makes that one
            config.parse(modules[name].Config, modules[name].PRESETS, flags)


def test_the_command_line_of_the_exercises(tmp_path):
    result = run("exercises/check.py", "4", "exercise_9", cwd=tmp_path)
    assert result.returncode == 1 and "Error" not in result.stderr
    four, nine = result.stdout.splitlines()
    assert four.startswith("exercise 4: not yet: consistency 0.97"), four
    assert nine.startswith("exercise 9: not yet: "), nine
    listed = call(check, cwd=tmp_path)
    assert listed.returncode == 0 and " 2  A better step\n" in listed.stdout
    for name in ("13", "exercise_0", "midpoint"):
        result = call(check, "4", name, cwd=tmp_path)
        assert result.returncode == 2 and name in result.stderr and not result.stdout


# ---------------------------------------------------------------- solutions


def stratified(x1, shift=1.0, generator=None, logit_normal=False, shuffled=True):
    x0, B = torch.randn(x1.shape, generator=generator), len(x1)
    order = torch.randperm(B, generator=generator) if shuffled else torch.arange(B)
    t = (order + torch.rand(B, generator=generator, dtype=torch.float64)) / B
    t = torch.special.ndtri(t).sigmoid() if logit_normal else t
    return x0, flow.shift_time(t, shift).float()


def midpoint(velocity, x, steps, shift=1.0, callback=None, time_of=float):
    x, at = x if x.dtype == torch.float64 else x.float(), flow.times(steps, shift)
    for i, (a, b) in enumerate(zip(at, at[1:])):
        if callback:
            callback(i, time_of(a), x)
        there = x + (b - a) / 2 * velocity(x, time_of(a))
        x = x + (b - a) * velocity(there, time_of((a + b) / 2)).to(x.dtype)
    if callback:
        callback(steps, time_of(1.0), x)
    return x


def midpoint_of_tensors(velocity, x, *args):
    return midpoint(velocity, x, *args, time_of=lambda t: torch.full((len(x),), t))


def changing_guidance(model, y, null, scale, t_range=(0.0, 1.0), weak=None):
    def velocity(x, t):
        now = scale(float(t)) if callable(scale) else scale
        return plain_guided(model, y, null, now, t_range, weak)(x, t)
    return velocity


def guided_star(model, y, null, scale, t_range=(0.0, 1.0), over=(1, 2, 3), calls=1):
    def velocity(x, t):
        t = torch.as_tensor(t).expand(len(x))
        if scale == 1 or not t_range[0] <= float(t[0]) < t_range[1]:
            return model(x, t, y)
        none = torch.full_like(y, null)
        if calls == 1:
            v_y, v_null = model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, none])).chunk(2)
        else:
            v_null, v_y = model(x, t, none), model(x, t, y)
        norm = v_null.square().sum(over, keepdim=True).clamp(min=1e-12)
        v_null = (v_y * v_null).sum(over, keepdim=True) / norm * v_null
        return v_null + scale * (v_y - v_null)
    return velocity


def heart(p):
    """Two arcs above, two straight lines below; the exact signed distance."""
    x, y = p[..., 0].abs() / 1.6, (0.95 - p[..., 1]) / 1.6
    along = 0.5 * (x + y).clamp(min=0)
    below = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - along, y - along))
    above = torch.hypot(x - 0.25, y - 0.75) - 0.125 ** 0.5
    return 1.6 * torch.where(x + y > 1, above, below * torch.sign(x - y))


def coverage(real, fake, k=3):
    radius = torch.cdist(real, real).kthvalue(k + 1).values
    return (torch.cdist(real, fake) <= radius[:, None]).any(1).double().mean().item()


class ChannelMatching(ae.DistributionMatching):
    """Sixteen means and deviations of the residual, two of DINO's."""

    def __init__(self, momentum=0.02):
        super().__init__(momentum)
        self.register_buffer("running", torch.cat([torch.zeros(16), torch.ones(16),
                                                   torch.tensor([0.0, 1.0])]))

    @torch.no_grad()
    def measure(self, r, h):
        return torch.cat([r.mean((0, 1)), r.std((0, 1)), h.mean((0, 1)).mean()[None],
                          h.std((0, 1)).mean()[None]])

    def forward(self, r, h):
        now = self.measure(r, h) if self.training else self.running
        if self.training:
            self.seen += 1
            self.running.lerp_(now, max(self.momentum, 1 / self.seen.item()))
        return (r - now[:16]) / (now[16:32] + 1e-6) * now[-1] + now[-2]


plain_guided, plain_rulers, plain_attention = flow.guided, metrics.Rulers.__call__, dit.attention


class ExerciseSolver:
    """Changes the project as the reader would, until the test ends."""

    def __init__(self, monkeypatch, folder):
        self.monkeypatch, self.folder = monkeypatch, folder

    def set(self, *modules, **values):
        for module in modules:
            for name, value in values.items():
                self.monkeypatch.setattr(module, name, value, raising=False)

    def solve_1(self, draw=stratified):
        self.set(flow, draw=draw)

    def solve_2(self, solver=midpoint, shown=None):
        self.set(flow, midpoint=solver)
        self.monkeypatch.setitem(sample.SAMPLERS, "midpoint", shown or solver)
        known = dataclasses.fields(sample.Config)
        flag = next(f for f in known if f.name == "sampler")
        self.set(flag, metadata={**flag.metadata, "choices": tuple(sample.SAMPLERS)})

    def solve_3(self, guidance=changing_guidance):
        self.set(flow, sample, guided=guidance)

    def solve_4(self, labels=(0, 0, 2, 3, 0, 0, 3, 2, 2, 3, 1, 1, 3, 2, 1, 1)):
        self.set(toy_flow, SEPARABLE=torch.tensor(labels))

    def solve_5(self, shape=heart, version=2):
        self.monkeypatch.setitem(data.SHAPES, "heart", shape)
        self.set(data, SHAPE_NAMES=tuple(data.SHAPES), VERSION=version)

    def solve_6(self, measure=coverage, print_too=True):
        def score(rulers, images, labels):
            return dict(plain_rulers(rulers, images, labels),
                        coverage=measure(rulers.real["conv"], rulers.features(images)[0]["conv"]))
        self.set(metrics, coverage=measure)
        self.monkeypatch.setattr(metrics.Rulers, "__call__", score)
        if print_too:
            self.monkeypatch.setitem(sample.SCORES, "coverage", "coverage")

    def solve_7(self, exponent=0.5, steps=300):
        """Two runs whose decoders leave errors of Laplace and of another distribution."""
        for name in ("l1", "l2"):
            (self.folder / name).mkdir()
            (self.folder / name / "ae.pt").touch()

        def load_ae(path):
            rng, l1 = torch.Generator().manual_seed(0), path.parent.name == "l1"

            def decode(x):
                error = torch.rand(x.shape, generator=rng).log() * torch.randn(
                    x.shape, generator=rng).sign()
                return x + 0.1 * error.sign() * error.abs() ** (1 if l1 else exponent)
            return SimpleNamespace(encode=lambda x: x, decode=decode,
                                   config=SimpleNamespace(steps=300 if l1 else steps))
        self.set(check, OUT=self.folder)
        self.set(ae, load_ae=load_ae)

    def solve_8(self, matching=ChannelMatching):
        self.set(ae, DistributionMatching=matching)

    def solve_9(self, rotates=True):
        grid = []

        def positions(model, h, w, device):
            grid[:] = dino.rope(h, w, dino.rope_periods(model.dim // model.blocks[0].heads))
            return torch.zeros(h * w, model.dim)

        def attention(q, k, v):
            q, k = (dino.rotate(a, *grid) if rotates else a for a in (q, k))
            return plain_attention(q, k, v)
        self.set(dit.DiT, positions=positions)
        self.set(dit, attention=attention)

    def solve_10(self, star=guided_star, used=True):
        self.set(flow, guided_star=star)
        if used:
            self.set(sample, guided=lambda *args: star(*args[:5]))

    def solve_11(self, label_of=lambda y, null: y):
        def guided(model, y, null, scale, t_range=(0.0, 1.0), weak=None):
            def velocity(x, t):
                t = torch.as_tensor(t).expand(len(x))
                v, low = model(x, t, y), weak(x, t, label_of(y, null))
                return low + scale * (v - low)
            return velocity if weak else plain_guided(model, y, null, scale, t_range)
        self.set(sample, guided=guided)

    def solve_12(self):
        self.set(torch.linalg, qr=lambda a: (torch.eye(3).expand_as(a), None))


@pytest.fixture
def exercise_solver(monkeypatch, tmp_path):
    return ExerciseSolver(monkeypatch, tmp_path)


@pytest.mark.parametrize("n, options", [
    *((str(n), {}) for n in range(1, 13)), ("2", dict(solver=midpoint_of_tensors)),
    ("2", dict(solver=lambda *a: midpoint(*a, time_of=torch.tensor))),
    ("10", dict(star=lambda *a: guided_star(*a, calls=2)))])
def test_a_solved_exercise_passes(n, options, exercise_solver):
    getattr(exercise_solver, f"solve_{n}")(**options)
    solved, line = check.verdict(check.EXERCISES[n])
    assert solved, line


def ranked(key, shift, logit_normal):
    """Times in the order of a key, one in each interval."""
    u = (key.argsort().argsort() + 0.5) / len(key)
    return flow.shift_time(torch.special.ndtri(u).sigmoid() if logit_normal else u, shift)


def from_noise(x1, shift=1.0, generator=None, logit_normal=False):
    x0 = torch.randn(x1.shape, generator=generator)
    return x0, ranked(x0[:, 0], shift, logit_normal)


def from_data(x1, shift=1.0, generator=None, logit_normal=False):
    return torch.randn(x1.shape, generator=generator), ranked(x1[:, 0], shift, logit_normal)


def from_size_of_noise(x1, shift=1.0, generator=None, logit_normal=False):
    x0 = torch.randn(x1.shape, generator=generator)
    return x0, ranked(x0[:, 0].abs(), shift, logit_normal)


def partly_from_noise(x1, shift=1.0, generator=None, logit_normal=False):
    x0 = torch.randn(x1.shape, generator=generator)
    key = 0.1 * x0[:, 0] + 0.99 ** 0.5 * torch.randn(len(x1), generator=generator)
    return x0, ranked(key, shift, logit_normal)


def unshuffled(*args):
    return stratified(*args, shuffled=False)


def unshifted(x1, shift=1.0, generator=None, logit_normal=False):
    return stratified(x1, 1.0, generator, logit_normal)


def unseeded(x1, shift=1.0, generator=None, logit_normal=False):
    return stratified(x1, shift, None, logit_normal)


def always_uniform(x1, shift=1.0, generator=None, logit_normal=False):
    return stratified(x1, shift, generator)


def always_two(model, y, null, scale, t_range=(0.0, 1.0)):
    def velocity(x, t):
        t = torch.as_tensor(t).expand(len(x))
        w = scale(float(t[0])) if callable(scale) else scale
        return (1 - w) * model(x, t, torch.full_like(y, null)) + w * model(x, t, y)
    return velocity


@pytest.mark.parametrize("n, options, words", [
    ("1", dict(draw=from_noise), "depend"), ("1", dict(draw=from_data), "depend"),
    ("1", dict(draw=from_size_of_noise), "depend"), ("1", dict(draw=partly_from_noise), "depend"),
    ("1", dict(draw=unshifted), "off by"), ("1", dict(draw=unseeded), "generator"),
    ("1", dict(draw=flow.draw), "no time"), ("1", dict(draw=always_uniform), "off by"),
    ("1", dict(draw=unshuffled), "shuffle"),
    ("2", dict(solver=flow.heun), "middle"), ("2", dict(solver=flow.euler), "8 evaluations"),
    ("2", dict(shown=flow.heun), "--sampler"),
    ("2", dict(solver=lambda *a: 1 / 0), "test_lab.py"),
    ("3", dict(guidance=always_two), "expected"),
    ("4", dict(labels=[0] * 16), "sixteen"),
    ("5", dict(version=1), "VERSION"), ("5", dict(shape=data.SHAPES["arrow"]), "mirror"),
    ("5", dict(shape=lambda p: 2 * heart(p)), "slope"),
    ("5", dict(shape=data.SHAPES["disc"]), "1.00"),
    ("6", dict(measure=lambda a, b, k=3: metrics.precision_recall(a, b, k)[1]), "slow loop"),
    ("6", dict(print_too=False), "print"),
    ("7", dict(exponent=1.5), "expected"), ("7", dict(steps=200), "steps"),
    ("9", dict(rotates=False), "expected"),
    ("10", dict(star=lambda *a: guided_star(*a, over=(0, 1, 2, 3))), "off"),
    ("10", dict(used=False), "generate"),
    ("11", dict(label_of=lambda y, null: torch.full_like(y, null)), "class")])
def test_a_wrong_solution_does_not_pass(n, options, words, exercise_solver):
    getattr(exercise_solver, f"solve_{n}")(**options)
    solved, line = check.verdict(check.EXERCISES[n])
    assert not solved and words in line, line


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
        counted = bench.operations(bench.dit_step(m, (192, 2, 3), side), m.autocast)
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
