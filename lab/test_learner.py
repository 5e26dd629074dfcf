"""Tests of what meets a learner in the first hour: warnings, names of files, tables of losses,
references in the texts."""
from types import SimpleNamespace

import pytest
import torch

import ae, dit, sample
from dino import load_dino
from plumbing import config
from plumbing.testing import call, one_line

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
    c = ae.Config(**{**ae.PRESETS["debug"], "data": name, "latent": latent})
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
