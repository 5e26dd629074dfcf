"""Tests of what meets a learner in the first hour: warnings, names of files, tables of losses,
references in the texts, the weights that ship."""
import ast, re, shutil
from types import SimpleNamespace

import pytest
import torch

import ae, dit, sample
from dino import load_dino
from lab import edit as editing, ship
from plumbing import config
from plumbing.testing import ROOT, call, left, one_line

@pytest.mark.parametrize("module, flag, words", [
    (sample, "--guidance=2", ["did you mean --scale?"]), (sample, "--cfg", ["mean --scale?"]),
    (sample, "-scale", ["mean --scale?"]), (ae, "--latents", ["mean --latent?"]),
    (dit, "--learning-rate", ["mean --lr?"]), (dit, "--epochs", ["mean --steps?"]),
    (dit, "--no-cahce", ["mean --no-cache?"]), (ae, "--save-every", ["mean --save_every?"]),
    (ae, "--zebra", ["--zebra", "--help"]), (ae, "shapes", ["'shapes'", "--flag value"])])
def test_an_unknown_flag_is_told_what_was_meant(module, flag, words, tmp_path):
    result = call(module, flag, cwd=tmp_path)
    one_line(result, *words, code=2)
    assert "--guidance" not in result.stderr.replace("--guidance;", "")      # one of the two names


def test_every_second_name_is_no_flag_and_is_used_once():
    for module in (ae, dit, sample):
        fields = config.dataclasses.fields(module.Config)
        also = [name for f in fields for name in f.metadata["also"]]
        assert len({*also}) == len(also) and not {*also} & {f.name for f in fields}


@pytest.mark.parametrize("name, latent, warned", [
    ("photos", "svg", True), ("shapes", "svg", False), ("shapes-color", "dino", False),
    ("photos", "vae", False)])                           # a VAE's latent has none of its tokens
def test_the_encoder_of_shapes_on_other_images_is_warned_of(name, latent, warned, capsys):
    c = ae.Config(**{**ae.PRESETS["debug"], "data": name, "latent": latent, "encoder": "tiny"})
    c.explicit, model = [], ae.AutoEncoder(c, load_dino("tiny"))
    model.class_names = ["a"]
    ae.announce(c, torch.device("cpu"), model, 10)
    assert ("warning: the tiny encoder knows only shapes" in capsys.readouterr().out) == warned


def test_a_warm_up_as_long_as_the_run_is_warned_of(capsys):
    for warmup, rate, warned in ((120, None, True), (119, None, False), (120, len, False)):
        c = SimpleNamespace(steps=120, warmup=warmup)
        config.Loop("x", c, None, "x.pt", None, rate=rate)
        assert ("warning: the learning rate still warms up" in capsys.readouterr().out) == warned


def test_the_grid_of_another_setting_has_another_name():
    def name(*flags):
        return sample.grid_name(config.parse(sample.Config, sample.PRESETS, flags))
    assert name() == name("--steps", "10", "--out", "a") == name("--preset", "debug") == (
        "samples.png") == name("--n", "0", "--gif", "--batch", "9", "--device", "cpu")
    assert name("--scale", "1", "--steps", "5") == "samples-steps5-scale1.png"
    assert name("--preset", "debug", "--steps", "10") == "samples-steps10.png"
    assert name("--classes", "../a b,3", "--t_lo", ".25") == "samples-t_lo0.25-classes.._a_b,3.png"


@pytest.mark.parametrize("flags, nearest", [
    ("--t_lo .71 --t_hi .74", "0.750"), ("--t_lo .9", "0.750"), ("--t_lo .7 --t_hi .75", None),
    ("--t_lo .9 --sampler heun", None), ("--t_hi 0", None), ("", None),
    ("--t_lo .71 --t_hi .74 --scale 1", None)])
def test_a_guidance_interval_without_a_step_is_warned_of(flags, nearest, capsys):
    c = config.parse(sample.Config, sample.PRESETS, ["--steps", "4", *flags.split()])
    sample.warn_if_unguided(c, 1.0)                      # at 0, 1/4, 1/2, 3/4; heun's also at 1
    found = capsys.readouterr().out
    assert f"the nearest is at {nearest}\n" in found if nearest else not found


def take_steps(table, start=0, stop=None):
    """A loop of 120 steps that is saved at the 70th; it is killed before the step `stop`."""
    c = SimpleNamespace(steps=120, save_every=70, lr=1.0, warmup=2, decay=False)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    loop = config.Loop("x", c, optimizer, "x.pt", lambda step: None, start, losses=table)
    for step in loop:
        if step == stop:
            return
        loop.log(loss=torch.tensor(float(step)), parts=f"{step / 2} by half of t {step / 4:.2f}")


def test_the_losses_of_a_run_are_in_a_table_which_a_resumed_run_continues(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole.tsv", tmp_path / "killed.tsv"
    take_steps(whole)
    rows = [line.split("\t") for line in whole.read_text().splitlines()]
    assert rows[0] == ["step", "loss", "parts", "parts_1"]
    assert rows[2] == ["50", "49.0000", "24.5", "12.25"]
    assert [row[0] for row in rows[1:]] == ["1", "50", "70", "100", "120"]
    take_steps(killed, stop=110)
    assert killed.read_text().splitlines()[-1].startswith("100\t")        # past the checkpoint
    take_steps(killed, start=70)
    assert killed.read_text() == whole.read_text()
    take_steps(killed, stop=60)                                           # --overwrite
    assert len(killed.read_text().splitlines()) == 3
    monkeypatch.setattr(config, "rank", lambda: 1)
    take_steps(tmp_path / "rank1.tsv")
    assert not (tmp_path / "rank1.tsv").exists()


def test_the_lines_to_read_are_where_the_readme_says():
    text, total = (ROOT / "README.md").read_text(), 0
    rows = re.findall(r"^\| `(\w+\.py):(\d+)-(\d+)` \| `(\w+)`(?:, `(\w+)`)? \|", text, re.M)
    assert len(rows) == len(re.findall(r"`\w+\.py:\d", text)) > 5
    for file, first, last, begin, end in rows:
        nodes = ast.parse((ROOT / file).read_text()).body
        named = {node.name: node for node in nodes if hasattr(node, "name")}
        right = named[begin].lineno, named[end or begin].end_lineno
        assert (int(first), int(last)) == right, (file, first, last, "run lab.report")
        total += int(last) - int(first) + 1
    assert 550 < total < 650, "the README says 600"

# ---------------------------------------------------------------- the weights that ship

SHIPPED_FILES = sorted(sample.SHIPPED.glob("*.pt"))


def test_the_weights_that_ship_are_a_small_pair_made_by_the_default_commands():
    assert [p.name for p in SHIPPED_FILES] == ["ae.pt", "dit.pt"]
    assert sum(p.stat().st_size for p in SHIPPED_FILES) <= 16e6
    model, encoder = sample.load(sample.SHIPPED)
    dit.check_pair(model, encoder)
    assert encoder.fingerprint == config.fingerprint(encoder.state_dict())   # of the rounded values
    for path in SHIPPED_FILES:
        saved = config.load(path)
        state = saved["model" if path.stem == "ae" else "ema"]
        assert saved["made"] == f"python {path.stem}.py --preset shapes --seed 0"
        assert {v.dtype for v in state.values()} <= {torch.float16, torch.int64}
        assert not {"optimizer", "scaler"} & {*saved} and ("model" in saved) == (path.stem == "ae")


def test_a_fresh_clone_draws_and_edits_with_the_weights_that_ship(tmp_path):
    before = sorted(sample.SHIPPED.parent.rglob("*"))
    for module, flags in ((sample, "--n 0 --steps 2 --columns 2"),
                          (editing, "--edit held-out --n 20 --steps 1")):
        result = call(module, *flags.split(), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        said = [line for line in result.stdout.splitlines() if "weights/shapes" in line]
        assert len(said) == 1 and "python ae.py && python dit.py" in said[0]
    assert left(tmp_path / "out/shapes") == ["edit.png", "samples-steps2-columns2.png"]
    assert sorted(sample.SHIPPED.parent.rglob("*")) == before
    result = call(sample, "--out", sample.SHIPPED / "none", cwd=tmp_path)      # it was asked for
    one_line(result, "none/dit.pt", "no such file", "python dit.py")
    one_line(call(sample, "--preset", "debug", cwd=tmp_path), "out/debug/dit.pt", "python dit.py")
    one_line(call(dit, cwd=tmp_path), "out/shapes/ae.pt", "python ae.py")


@pytest.mark.parametrize("name", ["ae.pt", "ae.tsv"])
def test_who_has_begun_to_train_does_not_get_other_weights(name, tmp_path):
    (tmp_path / "out/shapes").mkdir(parents=True)
    (tmp_path / "out/shapes" / name).touch()
    result = call(sample, cwd=tmp_path)
    one_line(result, "out/shapes/dit.pt: no such file", "python dit.py")
    assert not result.stdout


def test_a_run_of_ones_own_is_used_and_can_be_shipped(tmp_path):
    own, small = tmp_path / "out/shapes", tmp_path / "out/small"
    for path in SHIPPED_FILES:                           # as training leaves them
        saved = config.load(path)
        part = "model" if path.stem == "ae" else "ema"
        state = {k: v.float() * 1.0001 if v.is_floating_point() else v
                 for k, v in saved[part].items()}
        more = dict(step=7, model=state, optimizer={}, ae_fingerprint="of-float32")
        if path.stem == "ae":
            more = dict(model=state, optimizer={}, fingerprint="of-float32")
        config.save(own / path.name, saved | {part: state} | more)
    result = call(sample, "--n", 0, "--steps", 1, "--columns", 1, cwd=tmp_path)
    assert "DiT of step 7;" in result.stdout and "weights/shapes" not in result.stdout
    result = call(ship, "--to", "out/small", cwd=tmp_path)
    assert result.returncode == 0 and "`python dit.py --preset shapes --seed 0`" in result.stdout
    assert "of-float32" not in (sample.load(small)[0].ae_fingerprint, config.load(
        small / "ae.pt")["fingerprint"])
    for a, b in zip(sample.load(own), sample.load(small)):
        for p, q in zip(a.state_dict().values(), b.state_dict().values()):
            assert p.dtype == q.dtype and torch.allclose(p, q, rtol=1e-3, atol=1e-6)
    for module in (ae, dit):
        one_line(call(module, "--out", small, "--steps", 3000, cwd=tmp_path), "only weights",
                 "--overwrite")
    shutil.copy(own / "dit.pt", small)                   # of the autoencoder before rounding
    one_line(call(ship, "--run", small, cwd=tmp_path), "another autoencoder")
    one_line(call(ship, "--run", "out/none", cwd=tmp_path), "out/none/ae.pt", "python ae.py")


@pytest.mark.parametrize("module, flags, made", [
    (ae, "", ""), (ae, "--latent vae --no-decay --mult 1,1,2,2 --device cpu --out x",
                   " --latent vae --mult 1,1,2,2 --no-decay"),
    (dit, "--steps 9 --model S --keep 3,4 --ae y", " --model S --dim 384 --depth 12 --steps 9")])
def test_what_ships_names_its_command(module, flags, made):
    saved = config.plain(config.parse(module.Config, module.PRESETS, flags.split()))
    plain = f"python {module.__name__}.py --preset shapes"
    assert ship.command(module, saved) == f"{plain}{made} --seed 0"
