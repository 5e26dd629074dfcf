"""The experiments of RESULTS.md, one command each, on the embedded data and without a download
(except those of photographs).

    python -m lab.evidence                     # lists them
    python -m lab.evidence residual            # Figure 5, Table 4: the residual and its matching
    python -m lab.evidence all --seeds 0       # all of them; use two terminals for two cores,
    python -m lab.evidence all --seeds 1,2     # each with its own seeds
    python -m lab.evidence all --preset debug --results out/debug    # the same code in minutes
    python -m lab.evidence photos_long --preset photos-long          # needs Tiny ImageNet

An experiment trains what it needs in out/evidence/<preset>/, with the commands that it prints, and
adds its measurements as rows to results/*.tsv.  What is already there is skipped, so a killed run
resumes with the same command.  `python -m lab.report` writes RESULTS.md from the rows.
Samples are scored by the rulers of metrics.py, which share nothing with the encoder.
"""
import functools, itertools, shlex, sys, time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

import ae, dit, sample
from ae import load_ae, load_latents, load_pictures, measure_statistics
from data import FACTORS, evenly, hue_classes, load_images, shapes, to_float, to_uint8
from dino import load_dino
from dit import DiT, load_dit, resolve_shift
from flow import ab2, euler, flow_loss, guided, times
from lab import edit, judge, pretrain, spectrum
from metrics import extract, knn, linear_classes, linear_probe, psnr, ssim
from plumbing import config
from plumbing.config import UserError, field, require
from plumbing.fetch import file_lock

# Letters: n images, C latent channels, h w latent grid, N = h w tokens, P patch side.


@dataclass
class Config:
    """What all experiments share."""
    preset: str = field("small", "a named set of the options below; its name is in every row")
    out: str = field("out/evidence", "folder of the trained models")
    results: str = field("results", "folder of the tables")
    seeds: tuple = field((0, 1, 2), "seeds of both stages and of the noise")
    n: int = field(1000, "samples to score")
    ae: str = field("", "flags of ae.py, as one string")
    dit: str = field("", "flags of dit.py, as one string")
    pretrain: str = field("", "flags of lab.pretrain, as one string")
    judge: str = field("--size 64 --steps 2000 --width 16", "flags of lab.judge, for a second one")
    families: str = field("--batch 128 --steps 2000", "the same, for an encoder of one factor")
    kept: tuple = field((), "steps whose DiT is kept; the last is the one that is scored")
    encoders: tuple = field((), "pretraining steps after which the encoder is tested")

    def check(self):
        """ValueError for impossible values."""
        require(self.seeds and self.kept, "--seeds and --kept must name at least one number")
        require(self.n >= 20, "--n must be at least 20")


PRETRAINING = "--steps 800 --keep 0,100,200,300,400,600"
PLAIN = "--preset photos --residual_gain 1"        # the rows are older than the preset's gain
PRESETS = {
    # One core of an AMD EPYC: stage 1 and stage 2 1 min each. 10 steps, guidance 2, seed 9:
    # accuracy .727, random conv 56 (SVG); .253, 26 (VAE with 8 channels).
    "small": dict(ae="--ch 16 --steps 400", pretrain=PRETRAINING, encoders=(0, 300, 600),
                  dit="--dim 144 --depth 4 --heads 4 --steps 700 --no-logit_normal",
                  kept=(100, 200, 400, 700)),
    # The default sizes of ae.py and dit.py: 3 and 4 min of one core.
    "full": dict(pretrain=PRETRAINING, encoders=(0, 300, 600), kept=(250, 500, 1000, 1600)),
    "debug": dict(ae="--preset debug", dit="--preset debug", seeds=(0,), n=40, kept=(10, 20),
                  pretrain="--preset debug --keep 0,10", families="--preset debug",
                  encoders=(0, 10)),
    # Ten classes at 64 px; as many samples as images are held out.
    # Without a network: --ae with the flags below and --data FOLDER.
    "photos": (photos := dict(
        ae=f"{PLAIN} --steps 700 --gan_start 300", n=500, kept=(300, 600, 1250),
        dit="--preset photos --dim 192 --depth 4 --heads 6 --steps 1250",
        pretrain="--preset photos --keep 0,400,1200", encoders=(0, 400, 1200))),
    "photos-plain": photos | dict(ae=f"{PLAIN} --steps 700 --gan 0"),
    "photos-long": photos | dict(ae=f"{PLAIN} --steps 1600 --gan_start 800"),
    "photos-full": photos | dict(ae="--preset photos", dit="--preset photos",
                                 kept=(1000, 2500, 5000)),
}


class Experiment(NamedTuple):
    """measures: for each table, the latents that get rows in it, 'latent:dit' for one DiT only.
    The rest is for generation: triples of sampler, steps and guidance, the DiTs, the sampler's
    time shifts ('-': the DiT's own), and whether the weights kept in training are scored too."""
    about: str
    measures: dict
    settings: tuple = (("ab2", 3, 1.0), ("ab2", 10, 1.0), ("ab2", 10, 2.0))
    dits: tuple = ("base",)
    shifts: tuple = ("-",)
    kept: bool = False


# ---- EDIT HERE: what is compared ----
LATENTS = {                               # flags of ae.py
    "svg": "", "vae": "--latent vae", "vavae": "--latent vae --align 0.1", "dino": "--latent dino",
    "unaligned": "--latent unaligned", "noise": "--noise 0.4", "layer2": "--layer 2",
    "gain16": "--residual_gain 16",
    **{f"residual{n}": f"--residual_dim {n}" for n in (2, 4, 8, 32)},
    # the tuned VAE as the small preset's ablations use it: 400 steps gave 21.3 dB with seed 9, but
    # 16.4 with 0 and 1, because a color was lost
    "vae8": "--latent vae --vae_dim 8 --kl 1e-5 --steps 700",
    **{f"vae{n}-{kl}": f"--latent vae --vae_dim {n} --kl {kl}"
       for n in (8, 16, 32, 112) for kl in ("1e-7", "1e-5", "1e-4")},
}    # also "encoder" and a step, "tiny", "shape" or "color"; and any with a suffix: see `derive`
DITS = {                                  # flags of dit.py
    "base": "", "narrow": "--dim 96 --heads 4", "wide": "--dim 192 --heads 4",
    "shift1": "--shift 1", "shift4": "--shift 4", "shift6.67": "--shift 6.67",
    "repa": "--repa 0.5", "longer": "--steps 7800",
    "uniform": "--no-logit_normal", "logit": "--logit_normal",
}
FAMILIES = ("shape", "color")             # encoders that were trained to predict one factor
TUNED = "vae8-1e-5"                       # first in the mean rank of "baseline"'s scores
CHANNELS = {"svg": 112, "vae8": 8}       # SVG's lies within WIDTHS, of a DiT:
WIDTHS = (48, 96, 128, 192)
FEW = (1, 2, 3, 5, 10, 50)
PAIR, FOUR = ("svg", "vae8"), ("svg", "dino", "unaligned", "vae8")
LOUD = tuple(f"svg_x{k}" for k in (0.25, 0.5, 1, 2, 4, 8))
EVERY = ("encoder*", "encodershape", "encodercolor", "svg")      # encoder*: all of --encoders
CHANGES = ("untouched", "permuted", "recolored", "ten", "three", "blurred")
LOST = ("unchanged", "paler", "softened")          # of photographs, what few steps do to samples
UNGUIDED = (("ab2", 10, 1.0),)
BOTH = (("ab2", 10, 1.0), ("ab2", 10, 2.0))
DUO, REST = ("svg", "vae"), ("dino", "unaligned", TUNED, "vavae")     # these on photographs
CONTROLS = ("encoder0", "encodertiny", "vae112-1e-5")
SHRUNK = tuple(itertools.product(("euler", "ab2"), (3, 5, 25)))
PHOTOS = (*itertools.product(("euler",), (1, 2, 3, 5, 10, 25), (1.0,)),
          *itertools.product(("ab2",), (2, 3, 5, 10, 25), (1.0,)),
          *itertools.product(("ab2",), (3, 10, 25), (2.0,)))
LONGER = (*itertools.product(("euler",), (1, 2, 3, 5, 10, 25), (1.0,)),
          *itertools.product(("ab2",), (3, 10, 25), (1.0, 2.0)))
HEADLINE = tuple((sampler, steps, scale) for sampler in ("ab2", "euler")
                 for steps, scale in ((3, 1.0), (3, 2.0), (5, 3.0), (10, 1.0), (10, 3.0)))

# what guidance leads away from -> its velocity, from the DiT, the states of it that were kept
# after so many steps, and x, t, y, no class.  Some are exercises, whose numbers come first.
AWAY = {
    "no class": lambda now, kept, x, t, y, none: now(x, t, none),
    "no class, rescaled (CFG-Zero*)": lambda now, kept, x, t, y, none: rescaled(now, x, t, y, none),
    "no class, at time .95 t": lambda now, kept, x, t, y, none: now(x, 0.95 * t, none),
    "no class, at time 1.05 t": lambda now, kept, x, t, y, none: now(x, (1.05 * t).clamp(max=1),
                                                                     none),
    "the DiT of step 1000": lambda now, kept, x, t, y, none: kept(1000)(x, t, y),
    "the DiT of step 1000, no class": lambda now, kept, x, t, y, none: kept(1000)(x, t, none),
    "the DiT of step 500, no class": lambda now, kept, x, t, y, none: kept(500)(x, t, none),
}
SCALES = {"1": lambda t: 1, "2": lambda t: 2, "3": lambda t: 3, "5 - 4 t": lambda t: 5 - 4 * t,
          "1 + 4 t": lambda t: 1 + 4 * t}
AWAYS = [("0", "no class", "3", 10, "ab2"), ("0", "nothing", "1", 10, "ab2"),
         ("2", "no class", "3", 10, "euler"), ("2", "no class", "3", 5, "midpoint"),
         ("3", "no class", "1 + 4 t", 10, "ab2"), ("3", "no class", "5 - 4 t", 10, "ab2"),
         ("10", "no class, rescaled (CFG-Zero*)", "3", 10, "ab2"),
         *(("11", "the DiT of step 1000", w, 10, "ab2") for w in "23"),
         *(("-", away, w, steps, "ab2") for away in [*AWAY][2:4] + [*AWAY][5:]
           for w, steps in (("2", 3), ("2", 10), ("3", 10)))]

EXPERIMENTS = {
    "rulers": Experiment(
        "new: what each ruler sees, measured on altered held-out images", dict(rulers=CHANGES)),
    "default": Experiment(
        "the headline, with --preset full: what the default's own budget gives, against baselines",
        dict(generation=("svg", "vae", TUNED, "vae:longer", "vavae", "vae:repa"),
             latents=("svg", "vae", TUNED, "vavae", "pixels"),
             spectra=("svg", "vae", TUNED, "vavae")), settings=HEADLINE),
    "baseline": Experiment(
        "the VAE's channels and KL weight, with --seeds 9, which no other experiment uses",
        dict(generation=(name := tuple(z for z in LATENTS if "-1e" in z)), latents=name),
        settings=BOTH),
    "baseline2": Experiment(
        "the tuned VAE's normalization and shifts, with --seeds 9",
        dict(generation=(f"{TUNED}_scalar", TUNED, f"{TUNED}:shift1", f"{TUNED}:shift4", "svg")),
        settings=BOTH, shifts=("1.5", "3", "6")),
    "steps": Experiment(
        "Figure 8a, Table 2a: few steps, by sampler and shift, with the class and without (w = 0)",
        dict(generation=PAIR + ("encoder0",), latents=PAIR + ("encoder0", "pixels")),
        settings=tuple(itertools.product(("euler",), FEW, (1.0,))),
        shifts=("1.5", "3", "6")),
    "samplers": Experiment(
        "the same with the second-order sampler, and without the class",
        dict(generation=PAIR + ("encoder0",)),
        settings=(*itertools.product(("ab2",), FEW, (1.0,)),
                  *itertools.product(("euler", "ab2"), (3, 10, 50), (0.0, 2.0)))),
    "matched": Experiment(
        "few steps again, by SVG's DiT after fewer training steps, as good as the VAE's at the end",
        dict(generation=("svg",)), tuple(itertools.product(("euler",), FEW[2:], (1.0,))),
        shifts=("3",), kept=True),
    "training": Experiment(
        "Figure 1: the same during training",
        dict(generation=PAIR), settings=BOTH, kept=True),
    "fields": Experiment(
        "Figure 3 on the real latents: consistency, straightness; the spectrum of the latents",
        dict(paths=PAIR + ("dino", "encoder0"), spectra=PAIR + ("dino", "encoder0"))),
    "residual": Experiment(
        "Figure 5, Table 4: no residual, unaligned, matched",
        dict(latents=FOUR, generation=FOUR)),
    "width": Experiment(
        "the number of residual channels",
        dict(latents=(name := ("residual2", "residual4", "residual8", "svg", "residual32")),
             generation=name)),
    "matching": Experiment(
        "the residual's loudness beside DINO's, normalized by one scalar",
        dict(generation=LOUD, spectra=LOUD)),
    "maps": Experiment(
        "Figure 2: how separable the latents are (lab.report --pictures draws the maps)",
        dict(latents=FOUR + ("pixels",))),
    "dense": Experiment(
        "Table 4: still a representation? linear segmentation from single tokens",
        dict(dense=FOUR + ("pixels",))),
    "encoder": Experiment(
        "new: how semantic must the encoder be? checkpoints, and encoders of one factor",
        dict(latents=EVERY, generation=EVERY, paths=EVERY, encoders=EVERY)),
    "dissociation": Experiment(
        "new: an encoder that knows shape or color, a DiT conditioned on shape or color",
        dict(generation=tuple(f"encoder{a}{b}" for a in FAMILIES for b in ("", "_color"))),
        settings=BOTH),
    "layer": Experiment(
        "Table 6: tokens of an earlier layer",
        dict(latents=("layer2", "svg"), generation=("layer2", "svg"))),
    "scaling": Experiment(
        "Figure 8b: three sizes of DiT", dict(generation=PAIR), BOTH, ("narrow", "base", "wide")),
    "guidance": Experiment(
        "guidance from 1 to 4", dict(generation=PAIR),
        tuple(("ab2", 10, w) for w in (1.0, 1.5, 2.0, 3.0, 4.0))),
    "times": Experiment(
        "uniform times in training, with --preset full",
        dict(generation=("svg:uniform", f"{TUNED}:uniform")), HEADLINE),
    "away": Experiment(
        "new: guidance away from something else, with --preset full", dict(guided=("svg",))),
    "trainshift": Experiment(
        "the time shift in training", dict(generation=("svg",)), BOTH,
        ("shift1", "base", "shift4", "shift6.67")),
    "noise": Experiment(
        "RAE: a decoder trained on noisy latents",
        dict(latents=("noise", "svg"), generation=("noise", "svg"))),
    "narrow": Experiment("RAE: a DiT narrower than the latent", dict(width=PAIR)),
    "editing": Experiment("Figure 10: change the class inside a mask", dict(editing=("svg",))),
    "photos": Experiment(
        "photographs, with --preset photos like all below: few steps, reconstruction, copies",
        dict(generation=DUO, latents=DUO + ("pixels",), spectra=DUO, memorization=DUO,
             judges=DUO, shrunk=DUO), PHOTOS),
    "photos_controls": Experiment(
        "SVG on random weights, on the encoder of shapes; a wide VAE; --preset photos-long",
        dict(generation=CONTROLS, latents=CONTROLS, spectra=CONTROLS, judges=CONTROLS,
             shrunk=CONTROLS, detail=CONTROLS), LONGER),
    "photos_baselines": Experiment(
        "the other latents of photographs, with --preset photos-long",
        dict(generation=REST + ("vae:repa",), latents=REST, spectra=REST, judges=REST, shrunk=REST,
             detail=REST), LONGER),
    "photos_tuning": Experiment(
        "the VAE's KL weight on photographs, with --preset photos-long --seeds 0",
        dict(generation=(name := ("vae", "vae16-1e-5")), latents=name),
        (("euler", 3, 1.0), ("euler", 25, 1.0), *BOTH)),
    "photos_gain": Experiment(
        "a residual that is louder for the decoder than in the latent",
        dict(latents=(name := ("svg", "gain16")), generation=name), PHOTOS),
    "photos_dose": Experiment(
        "how semantic must the encoder be? its pretraining, with --preset photos-long",
        dict(latents=(name := ("encoder*", "svg")), generation=name),
        (("euler", 3, 1.0), ("euler", 25, 1.0), *BOTH)),
    "photos_long": Experiment(
        "a longer stage 1, with --preset photos-long",
        dict(generation=DUO, latents=DUO, spectra=DUO, judges=DUO, shrunk=DUO,
             detail=DUO + ("pixels",), rulers=LOST), LONGER),
    "photos_full": Experiment(
        "SVG and the VAE at the size of ae.py's preset photos, with --preset photos-full",
        dict(generation=DUO, latents=DUO, judges=DUO, memorization=DUO, detail=DUO), PHOTOS),
    "photos_times": Experiment(
        "logit-normal times in training, with --preset photos-plain",
        dict(generation=("svg:logit",)), (("euler", 3, 1.0), ("euler", 25, 1.0), *BOTH)),
    "photos_training": Experiment(
        "photographs during training", dict(generation=DUO), BOTH, kept=True),
}
# -------------------------------------

# ---------------------------------------------------------------- tables


class Table:
    """results/<name>.tsv: rows of `columns`, the first `keys` of which identify a row."""

    def __init__(self, folder, name, keys, values):
        self.path, self.keys = Path(folder) / f"{name}.tsv", keys.split()
        self.columns = self.keys + values.split()

    def lines(self):
        """-> those below the header; UserError when the file has other columns."""
        if not self.path.is_file():
            return []
        first, *lines = self.path.read_text().splitlines()
        if first.split("\t") != self.columns:
            raise UserError(f"{self.path}: its columns are not {' '.join(self.columns)}; "
                            "move it away, or give another --results")
        return lines

    def rows(self):
        """-> a list of dicts of strings."""
        return [dict(zip(self.columns, line.split("\t"))) for line in self.lines()]

    def has(self, **row):
        """Whether a row with the keys of `row` is there."""
        start = "".join(self.show(row[k]) + "\t" for k in self.keys)
        return any(line.startswith(start) for line in self.lines())

    def add(self, **row):
        """Append a row, unless it is there, and print it as `key: value` lines."""
        if set(row) != set(self.columns):
            raise ValueError(f"{self.path}: {set(row) ^ set(self.columns)}")
        with file_lock(self.path):                            # two terminals may share a table
            if self.has(**row):
                return
            with open(self.path, "a") as file:
                if file.tell() == 0:
                    file.write("\t".join(self.columns) + "\n")
                file.write("\t".join(self.show(row[k]) for k in self.columns) + "\n")
        print(f"[{self.path.stem}: {' '.join(self.show(row[k]) for k in self.keys)}]")
        for name in self.columns[len(self.keys):]:
            print(f"{name}: {self.show(row[name])}", flush=True)

    @staticmethod
    def show(value):
        """A value as it is written to a file."""
        return f"{value:.5g}" if isinstance(value, float) else str(value)


SCORES = "accuracy frechet factors conv color precision recall kid"       # of metrics.Rulers


def tables(folder):
    """-> all of them, by name."""
    layout = dict(
        rulers=("preset change seed", f"n {SCORES}"),
        latents=("preset latent seed", "channels psnr ssim knn linear knn_flat linear_flat "
                 f"decoded_{SCORES.replace(' ', ' decoded_')}"),
        dense=("preset latent seed", "tokens miou accuracy"),
        generation=("preset latent dit seed trained sampler steps scale shift", f"n {SCORES}"),
        paths=("preset latent dit seed", "n consistency straightness error1 error2 error5"),
        spectra=("preset latent seed", "dimensions effective largest error3 error10 ab3 ab10 "
                 "shift3 shift10 consistency consistency_all"),
        shrunk=("preset latent seed sampler steps", f"n {SCORES}"),
        encoders=("preset step", "knn linear color"),
        width=("latent channels width seed", "parameters loss"),
        editing=("preset latent seed", "n new_class old_class floor psnr_outside "
                 "psnr_outside_plain psnr_outside_to_plain"),
        guided=("preset latent exercise away_from scale steps sampler seed", f"n {SCORES}"),
        memorization=("preset latent dit seed", "n conv_median conv_near judge_median judge_near "
                      "pixels_median pixels_near"),
        judges=("preset latent dit seed", "n accuracy frechet"),
        detail=("preset latent dit seed sampler steps", "n contrast detail"),
        cost=("preset stage latent dit seed", "seconds"))
    return {name: Table(folder, name, *columns) for name, columns in layout.items()}


def axes(c, e, table, kinds):
    """What a table has a row of for each latent and seed -> a list of partial keys."""
    if table == "width":
        return [dict(width=width) for width in WIDTHS]
    if table == "shrunk":
        return [dict(sampler=sampler, steps=steps) for sampler, steps in SHRUNK]
    if table == "detail":
        return [dict(dit="base", sampler="euler", steps=steps) for steps in (2, 3, 5, 25)]
    if table == "guided":
        return [dict(zip(("exercise", "away_from", "scale", "steps", "sampler"), row))
                for row in AWAYS]
    if table != "generation":
        return [dict(dit="base")]
    return [dict(dit=kind, trained=trained, sampler=sampler, steps=steps, scale=scale, shift=shift)
            for kind in kinds for trained in (c.kept if e.kept else [last_step(c, kind)])
            for (sampler, steps, scale), shift in itertools.product(e.settings, e.shifts)]


def rows(c, name):
    """The rows that an experiment consists of: pairs of a table and the row's key."""
    e, layout = EXPERIMENTS[name], tables(c.results)
    for seed, (table, latents) in itertools.product(c.seeds, e.measures.items()):
        if latents[0] == "encoder*":
            latents = [*(f"encoder{step}" for step in c.encoders), *latents[1:]]
        for latent in latents:
            latent, _, kind = latent.partition(":")
            for more in axes(c, e, table, [kind] if kind else e.dits):
                key = dict(more, preset=c.preset, latent=latent, change=latent,
                           channels=CHANNELS.get(latent),
                           seed=0 if latent in ("pixels", *LOST) else seed,    # nothing is random
                           step="shipped" if latent == "svg" else latent.removeprefix("encoder"))
                yield table, {k: key[k] for k in layout[table].keys}

# ---------------------------------------------------------------- training


def command(module, flags, seed, out, *more):
    """Print a command line and run it in this process."""
    argv = [*flags.split(), "--seed", str(seed), *map(str, more), "--out", str(out)]
    name = module.__name__
    script = f"-m {name}" if "." in name else f"{name}.py"
    print(f"\n$ python {script} {shlex.join(argv)}", flush=True)
    module.main(argv)


def timed(c, stage, latent, kind, seed, path, train):
    """Call train(), and add its time to the table of costs unless it resumed an earlier run."""
    fresh, began = not path.is_file(), time.time()
    train()
    if fresh:
        tables(c.results)["cost"].add(preset=c.preset, stage=stage, latent=latent, dit=kind,
                                      seed=seed, seconds=round(time.time() - began))


def settings(c):
    """The flags of ae.py that all latents share -> its Config."""
    return config.parse(ae.Config, ae.PRESETS, c.ae.split())


def encoder_file(c, name):
    """What --encoder takes.  name: how many steps of pretraining it had, one of FAMILIES, or tiny.
    """
    if name == "tiny":
        return name
    apart = name if name in (*FAMILIES, "0") else ""     # random weights need no pretraining
    folder = Path(c.out) / c.preset / f"encoder{apart}"
    flags = (f"{c.families} --target {name}" if name in FAMILIES else
             f"{c.pretrain} --data {settings(c).data}" + " --steps 1 --keep 0" * (name == "0"))
    last = config.parse(pretrain.Config, pretrain.PRESETS, f"{flags} --out {folder}".split()).file
    path = last if name in FAMILIES else last.with_stem(f"{last.stem}_{name}")
    with file_lock(folder):                        # another terminal may need it too
        if not path.is_file():
            command(pretrain, flags, 0, folder)
    return path


def stage1(c, latent, seed):
    """Train the autoencoder of that name, unless it is trained -> its folder."""
    folder = Path(c.out) / c.preset / f"{latent}-{seed}"
    path, (name, _, suffix) = folder / "ae.pt", latent.partition("_")
    with file_lock(path):
        if path.is_file() and config.load(path)["fingerprint"]:
            pass
        elif suffix:                                                    # nothing to train
            derive(stage1(c, name, seed) / "ae.pt", path, suffix)
        else:
            # one perceptual network for all encoders, the encoder of svg
            chosen = LATENTS[name] if name in LATENTS else (
                f"--encoder {encoder_file(c, name.removeprefix('encoder'))} "
                f"--perceptual_net {ae.choose_encoder(settings(c))}")
            timed(c, "ae", latent, "-", seed, path,
                  lambda: command(ae, f"{c.ae} {chosen}", seed, folder))
    return folder


def derive(source, target, suffix):
    """Write the same autoencoder with other statistics or labels.

    scalar: one mean and one standard deviation for all channels.  x<k>: the same, and then the
    residual's channels k times larger, as an encoder that is not matched might make them; the
    decoder divides by k, so the reconstruction is the same.  color: the classes are colors.
    """
    checkpoint, model = config.load_kind(source, "ae", "python -m lab.evidence"), load_ae(source)
    if suffix == "color":
        checkpoint["config"]["data"] = "shapes-color"
        checkpoint["class_names"] = list(load_images("shapes-color", 32)[2])
    else:
        device, autocast = config.setup("cpu")
        measure_statistics(model, load_pictures(model.config)[0], autocast, device, scalar=True)
        if suffix != "scalar":
            model.std[-checkpoint["config"]["residual_dim"]:] /= float(suffix.removeprefix("x"))
        checkpoint["config"]["normalize"] = "scalar"
    checkpoint["model"] = model.state_dict()
    checkpoint["fingerprint"] = config.fingerprint(checkpoint["model"])
    config.save(target, checkpoint)


def last_step(c, kind):
    """How long a DiT of that kind is trained."""
    return config.parse(dit.Config, dit.PRESETS, f"{c.dit} {DITS[kind]}".split()).steps


def stage2(c, latent, kind, seed):
    """Train the DiT of that kind on that latent, unless it is trained -> its folder."""
    source = stage1(c, latent, seed)
    folder = source if kind == "base" else source.with_name(f"{latent}-{kind}-{seed}")
    flags = f"{c.dit} {DITS[kind]} --keep {','.join(map(str, c.kept))}"
    where = () if kind == "base" else ("--ae", source)
    path = folder / "dit.pt"
    with file_lock(path):
        if not path.is_file() or load_dit(path).step < last_step(c, kind):
            timed(c, "dit", latent, kind, seed, path,
                  lambda: command(dit, flags, seed, folder, *where))
    return folder

# ---------------------------------------------------------------- measuring
# Each takes the key of a row and returns its values.


@functools.cache
def scorer(data="shapes", classes="", size=32, folder="."):
    """The rulers and their view of a data set's real images, once per process."""
    names = load_images(data, size, classes=classes)[2]
    return sample.Scorer(SimpleNamespace(config=SimpleNamespace(data=data, classes=classes),
                                         image_size=size, class_names=names), "cpu", folder=folder)


def scorer_of(about, folder="."):
    """The scorer of an ae.Config's images, which are the same for both classes of `shapes`, with
    the judge in a folder if there is one."""
    data = "shapes" if about.data == "shapes-color" else about.data
    return scorer(data, about.classes, about.size, folder)


def color_classes(images):
    """The class of `shapes-color` that weights/factors.pt sees in each image, uint8 (n, 3, S, S)
    -> int64 (n,).  On held-out images it is right about .77, and within one class about .98."""
    *_, drawn = shapes(60_000, 1, factors=True)             # by these lab.judge standardized them
    std, mean = torch.std_mean(drawn, 0)
    found = extract(scorer().predictor, images)[:, -len(mean):] * std + mean
    _, front, *_ = found.split(list(FACTORS.values()), 1)                      # (n, 3)
    return hue_classes(front)


def scores(images, labels, about=ae.Config()):
    """uint8 (n, 3, S, S), labels (n,), the ae.Config whose images they should be like -> dict of n
    and SCORES, '-' for what nobody knows of these classes; of `shapes-color`, accuracy is the
    fraction of objects with the requested hue."""
    found = scorer_of(about)(images, labels)
    if about.data == "shapes-color":
        found["accuracy"] = (color_classes(images) == labels).double().mean().item()
    return {name: found.get(name, "-") for name in ("n", *SCORES.split())}


def encode_all(model, images):
    """uint8 (n, 3, S, S) -> latents (n, C, h, w)"""
    _, autocast = config.setup("cpu")
    with autocast():
        return torch.cat([model.encode(to_float(images, slice(i, i + 250)))
                          for i in range(0, len(images), 250)])


def as_patches(images, P=8):
    """uint8 (n, 3, S, S) -> pixels in the shape of a latent (n, 3 P P, S / P, S / P): the floor."""
    n, S = len(images), images.shape[-1]
    x = torch.as_tensor(images).float().view(n, 3, S // P, P, S // P, P)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(n, 3 * P * P, S // P, S // P)


def latents_of(c, latent, seed):
    """-> function from uint8 images (n, 3, S, S) to latents (n, C, h, w), or to raw pixels."""
    if latent == "pixels":
        return as_patches
    model = load_ae(stage1(c, latent, seed) / "ae.pt")
    return lambda images: encode_all(model, images)


def measure_rulers(c, change, seed):
    """The scores of real images after one change: of `shapes` from a stream of their own, of
    photographs those held out."""
    about = settings(c)
    if about.data == "shapes":
        images, y, _, cover, factors = shapes(c.n, 32, 10 + seed, masks=True, factors=True)
    else:
        images, y = scorer_of(about).real_images("test", c.n)
    if change in ("ten", "three"):                     # a few images of each class, repeated
        few = torch.cat([(y == k).nonzero()[:10 if change == "ten" else 3, 0] for k in y.unique()])
        few = few.repeat(-(-c.n // len(few)))[:c.n]
        images, y = images[few], y[few]
    x = images / 255
    if change == "permuted":                           # red, green and blue, in each image anew
        channels = torch.rand(c.n, 3, generator=config.generator(seed)).argsort(1)
        x = x[torch.arange(c.n)[:, None], channels]
    elif change == "recolored":                        # red on gray; gradients and textures stay
        back, front = factors.split(list(FACTORS.values()), 1)[:2]
        to_gray, to_red = 0.5 - back, torch.tensor([0.8, 0.2, 0.2]) - front           # (n, 3)
        x = x + to_gray[..., None, None].lerp(to_red[..., None, None], cover[:, None] / 255)
    elif change == "blurred":
        for _ in range(2):
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    elif change == "paler":
        x = x.mean((1, 2, 3), keepdim=True).lerp(x, 0.7)
    elif change == "softened":
        x = x.lerp(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), 0.5)
    return scores(to_uint8(2 * x - 1), y, about)


def measure_latents(c, latent, seed):
    """Reconstruction, and how well the latents separate the classes."""
    about = settings(c)
    held, labels = scorer_of(about).real_images("test", 2000)
    if about.data == "shapes":                           # images that nothing was trained on
        x, y, _ = shapes(2000 if c.preset == "debug" else 5000, 32, seed=4)
    else:
        x, y = scorer_of(about).real_images("train", 5000)
    encode = latents_of(c, latent, seed)
    a, b = encode(x.numpy()), encode(held.numpy())
    row, back = dict(channels=a.shape[1], psnr="-", ssim="-"), held[:1000]
    if latent != "pixels":
        model = load_ae(stage1(c, latent, seed) / "ae.pt")
        real = to_float(held.numpy(), slice(0, 1000))
        _, autocast = config.setup("cpu")
        with autocast():
            back = torch.cat([model.decode(z) for z in b[:1000].split(250)])
        row.update(psnr=psnr(real, back).mean().item(), ssim=ssim(real, back).mean().item())
        back = to_uint8(back)
    found = scores(back, labels[:1000], about)
    row.update({f"decoded_{name}": found[name] for name in SCORES.split()})
    flat, pooled = (a.flatten(1), b.flatten(1)), (a.mean((2, 3)), b.mean((2, 3)))
    for name, (train, test) in (("", pooled), ("_flat", flat)):
        some = not name or latent in (*FOUR, "pixels")         # a probe of 1,792 numbers is slow
        row["knn" + name] = knn(train, y, test, labels) if some else "-"
        row["linear" + name] = linear_probe(train, y, test, labels) if some else "-"
    return row


def mean_iou(predicted, truth, classes):
    """Segmentation: int64 (n,) twice, in [0, classes) -> intersection over union, in [0, 1], the
    mean over the classes that occur in either."""
    pairs = torch.bincount(truth * classes + predicted, minlength=classes ** 2)
    pairs = pairs.view(classes, classes)                                # the confusion matrix
    both = pairs.diagonal().double()
    either = pairs.sum(0) + pairs.sum(1) - both
    return (both / either)[either > 0].mean().item()


def measure_dense(c, latent, seed):
    """A linear classifier of single tokens: background, or the class of the object that covers at
    least half of the patch, by the generator's own masks."""
    encode, parts = latents_of(c, latent, seed), []
    for stream in (4, 5):                                          # for training, for the score
        images, y, _, mask = shapes(1000, 32, seed=stream, masks=True)
        z = encode(images.numpy())
        cover = F.adaptive_avg_pool2d(mask[:, None].float() / 255, z.shape[-1])
        truth = torch.where(cover[:, 0] >= 0.5, y[:, None, None] + 1, 0)              # (n, h, w)
        parts += [z.permute(0, 2, 3, 1).flatten(0, 2), truth.flatten()]               # (n N, C)
    x, y, xt, yt = parts
    found = linear_classes(x, y, xt)
    return dict(tokens=len(yt), miou=mean_iou(found, yt, 11),
                accuracy=(found == yt).double().mean().item())


def samples(c, latent, dit, seed, steps=10, scale=1.0, shift="-", sampler="ab2", trained=None):
    """c.n samples of a trained pair, evenly over the classes -> images, labels, the autoencoder.
    shift: '-' for the DiT's own; trained: the step of weights that were kept in training."""
    folder = stage2(c, latent, dit, seed)
    model, decoder = sample.load(folder, "cpu")
    if trained not in (None, model.step):
        model = load_dit(folder / f"dit_{trained}.pt")
    labels = sample.balanced_labels(range(model.classes), c.n)
    shift = None if shift == "-" else resolve_shift(shift, decoder)
    return sample.generate(model, decoder, labels, steps, scale, shift, seed,
                           sample.SAMPLERS[sampler]), labels, decoder


def measure_generation(c, latent, dit, seed, trained, sampler, steps, scale, shift):
    """The scores of a trained pair's samples."""
    images, labels, decoder = samples(c, latent, dit, seed, steps, scale, shift, sampler, trained)
    return scores(images, labels, decoder.config)


def rescaled(model, x, t, y, none):
    """The velocity for no class, projected onto that for y (CFG-Zero*, arXiv 2503.18886)."""
    v, low = model(x, t, y).flatten(1), model(x, t, none).flatten(1)
    return ((v * low).sum(1, keepdim=True) / low.square().sum(1, keepdim=True) * low).view_as(x)


@torch.no_grad()
def midpoint(velocity, x, steps, shift=1.0, callback=None):
    """Second order with two evaluations per step, the second in its middle."""
    at = times(steps, shift)
    for now, then in zip(at, at[1:]):
        half = x + (then - now) / 2 * velocity(x, now)
        x = x + (then - now) * velocity(half, (now + then) / 2)
    return x


def measure_guided(c, latent, exercise, away_from, scale, steps, sampler, seed):
    """The scores of samples that are guided away from one of AWAY."""
    folder = stage2(c, latent, "base", seed)
    model, decoder = sample.load(folder, "cpu")
    nearest = lambda step: min(c.kept, key=lambda k: abs(k - step))
    kept = functools.cache(lambda step: load_dit(folder / f"dit_{nearest(step)}.pt"))
    y = sample.balanced_labels(range(model.classes), c.n)
    none, (_, autocast) = torch.full_like(y, model.classes), config.setup("cpu")

    def velocity(x, t):
        t, w = torch.full((len(x),), t), SCALES[scale](t)
        v = model(x, t, y).float()
        if w == 1:
            return v
        low = AWAY[away_from](model, kept, x, t, y, none).float()
        return low + w * (v - low)
    with autocast():
        z = (sample.SAMPLERS | dict(midpoint=midpoint))[sampler](
            velocity, sample.draw_noise(model, decoder, c.n, seed), steps, model.sample_shift)
        images = torch.cat([to_uint8(decoder.decode(part)) for part in z.split(250)])
    return scores(images, y, decoder.config)


def measure_judges(c, latent, dit, seed):
    """Samples of ten guided steps under a second judge: another seed, two thirds of the width."""
    about, folder = settings(c), Path(c.out) / c.preset / "judge2"
    with file_lock(folder):                        # another terminal may need it too
        if not (folder / "judge.pt").is_file():
            classes = ("--classes", about.classes) if about.classes else ()
            command(judge, c.judge, 1, folder, "--data", about.data, *classes)
    images, labels, decoder = samples(c, latent, dit, seed, scale=2.0)
    found = scorer_of(decoder.config, str(folder))(images, labels)
    return {name: found[name] for name in ("n", "accuracy", "frechet")}


def memorization(train, held, fake):
    """Are samples copies?  Features of training images (n, d), of held-out ones (m, d) and of
    samples (k, d) -> two fractions of the samples: those nearer to their nearest training row than
    half of the held-out rows are to theirs, and those nearer than all but 5 % of them.

    About .5 and .05 for new images of the same distribution, 1 and 1 for copies.  Samples that are
    smoother or more typical than images raise both without a copy.
    """
    def nearest(x, train=train.double()):
        return torch.cat([torch.cdist(rows, train).amin(1) for rows in x.double().split(1000)])

    usual, found = nearest(held), nearest(fake)
    return tuple((found < usual.quantile(q)).double().mean().item() for q in (0.5, 0.05))


def measure_memorization(c, latent, dit, seed):
    """`memorization` of samples of ten steps without guidance, which may copy an image or its
    mirror image: in random convolutions, in the judge's features, in pixels.  The held-out images
    pass through the autoencoder too, because what it decodes is smoother and so nearer to all."""
    fake, _, decoder = samples(c, latent, dit, seed)
    rulers, (_, autocast) = scorer_of(decoder.config), config.setup("cpu")
    train, held = rulers.real_images("train", 5000)[0], rulers.real_images("test", c.n)[0]
    z = encode_all(decoder, held.numpy())
    with autocast():
        held = to_uint8(torch.cat([decoder.decode(part) for part in z.split(250)]))
    row, seen = dict(n=len(fake)), []
    for images in (torch.cat([train, train.flip(-1)]), held, fake):
        seen.append(rulers.features(images)[0] | dict(pixels=images.flatten(1).float()))
    for name, key in (("conv", "conv"), ("judge", "frechet"), ("pixels", "pixels")):
        found = memorization(*(x[key] for x in seen)) if key in seen[0] else ("-", "-")
        row[f"{name}_median"], row[f"{name}_near"] = found
    return row


def contrast_and_detail(images):
    """uint8 (n, 3, S, S) -> two means over the images.  contrast: the standard deviation of the
    luminance, black 0 and white 1; detail: the mean absolute difference between neighboring pixels
    over it.  Blur lowers detail; colors that are paler by one factor lower contrast alone."""
    gray = torch.tensor([0.299, 0.587, 0.114], dtype=torch.double)              # of Rec. 601
    y = torch.einsum("nchw,c->nhw", torch.as_tensor(images).double() / 255, gray)
    contrast = y.flatten(1).std(1)
    step = (y.diff(dim=1).abs().mean((1, 2)) + y.diff(dim=2).abs().mean((1, 2))) / 2
    return contrast.mean().item(), (step / contrast.clamp(min=0.01)).mean().item()


def measure_detail(c, latent, dit, seed, sampler, steps):
    """What few steps take from the samples: contrast, detail."""
    images = (scorer_of(settings(c)).real_images("test", c.n)[0] if latent == "pixels" else
              samples(c, latent, dit, seed, steps, sampler=sampler)[0])
    return dict(zip(("n", "contrast", "detail"), (len(images), *contrast_and_detail(images))))


def measure_paths(c, latent, dit, seed, fine=50):
    """Figure 3 on the real latents, as toy_flow.py measures it in 2-D.

    consistency: the mean cosine between the vectors from noise to sample of two samples of a class;
    half of a vector's squared length is noise, hence about 1/2 at most.
    straightness: displacement / path length.  error: root mean square distance per dimension from
    few Euler steps to `fine` steps from the same noise.
    """
    model, decoder = sample.load(stage2(c, latent, dit, seed), "cpu")
    each = max(2, c.n // 20)
    y = torch.arange(model.classes).repeat_interleave(each)
    x0 = sample.draw_noise(model, decoder, len(y), seed)
    velocity = guided(model, y, model.classes, 1)
    _, autocast = config.setup("cpu")
    length, before = torch.zeros(len(y)), [x0]

    def callback(i, t, x):
        length.add_((x - before[0]).flatten(1).norm(dim=1))
        before[0] = x
    with autocast():
        x1 = euler(velocity, x0, fine, model.sample_shift, callback)
        rough = {k: euler(velocity, x0, k, model.sample_shift) for k in (1, 2, 5)}
    moved = (x1 - x0).flatten(1)
    unit = F.normalize(moved, dim=1).view(model.classes, each, -1)
    return dict(n=len(y), consistency=sum(map(spectrum.resultant, unit)) / model.classes,
                straightness=(moved.norm(dim=1) / length).mean().item(),
                **{f"error{k}": (x - x1).square().mean().sqrt().item() for k, x in rough.items()})


def measure_spectra(c, latent, seed):
    """What the latents alone say about few steps: lab/spectrum.py, with the class given."""
    x, labels = spectrum.read(stage1(c, latent, seed), 10 * c.n, "cpu")
    lam, found = spectrum.spectrum(x, labels), spectrum.consistency(x, labels, seed)
    row = dict(dimensions=len(lam), effective=spectrum.effective_dimension(lam),
               largest=lam[0].item(), consistency=found["within"], consistency_all=found["all"])
    for steps in (3, 10):
        row[f"shift{steps}"], row[f"error{steps}"] = spectrum.best_shift(lam, steps)
        row[f"ab{steps}"] = spectrum.best_shift(lam, steps, ab2)[1]
    return row


@functools.cache
def shrunk(folder, n):
    """Real latents as few steps would leave them if they were Gaussian -> a dict from each of
    SHRUNK, sampler and steps, to n latents (n, d); their labels."""
    x, labels = spectrum.read(folder, 5000, "cpu")
    rows = evenly(len(x), n)
    factors = [lambda lam, name=name, steps=steps: lam.clamp(min=1e-12).rsqrt() * spectrum.gain(
        lam, steps, 3.0, sample.SAMPLERS[name]) for name, steps in SHRUNK]
    return dict(zip(SHRUNK, spectrum.shrink(x, labels, rows, factors))), labels[rows]


def measure_shrunk(c, latent, seed, sampler, steps):
    """The scores of real latents that have lost what a Gaussian's few steps would lose: no DiT."""
    folder = stage1(c, latent, seed)
    model, (_, autocast) = load_ae(folder / "ae.pt"), config.setup("cpu")
    found, labels = shrunk(folder, c.n)
    side = model.image_size // model.patch
    with autocast():
        images = torch.cat([to_uint8(model.decode(z.view(len(z), -1, side, side)))
                            for z in found[sampler, steps].split(250)])
    return scores(images, labels, model.config)


def measure_width(c, latent, channels, width, seed, steps=300):
    """RAE's test (arXiv 2510.11690, section 4.1): can a DiT of that width learn the latent of one
    image?  The loss over the last tenth of the steps; 0 would be perfect."""
    folder, (device, autocast) = stage1(c, latent, 0), config.setup("cpu")
    cache, _ = load_latents(load_ae(folder / "ae.pt"), folder, device, autocast)
    x1 = torch.from_numpy(cache[0, seed:seed + 1].astype("float32")).expand(64, -1, -1, -1)
    torch.manual_seed(seed)
    model = DiT(channels, 1, width, 4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.99), weight_decay=0, fused=True)
    y, losses = torch.zeros(64, dtype=torch.long), []
    for step in range(20 if c.preset == "debug" else steps):
        with autocast():
            loss = flow_loss(model, x1, y, generator=config.generator(seed, step))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tail = losses[-max(1, len(losses) // 10):]
    return dict(parameters=sum(p.numel() for p in model.parameters()), loss=sum(tail) / len(tail))


def measure_encoders(c, step):
    """The bare encoder on held-out images; color: R2 of the object's color by linear regression."""
    found = pretrain.measure(load_dino("tiny" if step == "shipped" else encoder_file(c, step)), 32)
    return dict(knn=found["knn"], linear=found["linear"], color=found["r2_front"])


def measure_editing(c, latent, seed):
    """Figure 10 on held-out images.  floor: how often the judge classifies the plain reconstruction
    as the new class; psnr_*: outside the mask."""
    model, decoder = sample.load(stage2(c, latent, "base", seed), "cpu")
    n = min(200, c.n)
    found = edit.measure_edit(model, decoder, n, seed)
    return dict(n=n, new_class=found["edit_judge_new_class"],
                old_class=found["edit_judge_old_class"],
                floor=found["reconstruction_judge_new_class"],
                psnr_outside=found["edit_psnr_outside_db"],
                psnr_outside_plain=found["reconstruction_psnr_outside_db"],
                psnr_outside_to_plain=found["edit_vs_reconstruction_psnr_outside_db"])


MEASURES = dict(rulers=measure_rulers, latents=measure_latents, dense=measure_dense,
                generation=measure_generation, paths=measure_paths, encoders=measure_encoders,
                width=measure_width, editing=measure_editing, spectra=measure_spectra,
                memorization=measure_memorization, judges=measure_judges, guided=measure_guided,
                shrunk=measure_shrunk, detail=measure_detail)


def main(argv=None):
    """The command line: names of experiments, then flags."""
    argv = sys.argv[1:] if argv is None else list(argv)
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    names, c = argv[:count], config.parse(Config, PRESETS, argv[count:])
    if not names:
        print(__doc__.strip() + "\n\nexperiments:")
        for name, e in EXPERIMENTS.items():
            print(f"    {name:10} {e.about}")
        return
    for name in names:
        if name not in ("all", *EXPERIMENTS):
            print(f"{name}: no such experiment; there are all, {', '.join(EXPERIMENTS)}",
                  file=sys.stderr)
            sys.exit(2)
    if "all" in names:                              # except those of photographs
        names = [name for name in EXPERIMENTS if not name.startswith("photos")]
    began, found = time.time(), tables(c.results)
    for name in names:
        for table, key in rows(c, name):
            if not found[table].has(**key):
                about = {k: v for k, v in key.items() if k != "preset"}
                found[table].add(**key, **MEASURES[table](c, **about))
    print(f"all rows are in {c.results}/, {time.time() - began:.0f} s; "
          "`python -m lab.report` makes tables and figures from them")


if __name__ == "__main__":
    with config.one_line_errors():
        main()
