"""Tests of what meets a learner in the first hour: warnings, names of files, tables of losses,
references in the texts."""
import ast, re
from types import SimpleNamespace

import pytest
import torch

import ae, dit, sample
from dino import load_dino
from plumbing import config
from plumbing.testing import ROOT, call, one_line

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
