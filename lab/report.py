"""From results/*.tsv to RESULTS.md: every table and curve in it is made here.

    python -m lab.report                # RESULTS.md, and the curves in assets/; seconds
    python -m lab.report --pictures     # also the maps and images, from lab.evidence's models

A section appears once its experiment has been measured.  README.md's short table, between the
markers <!-- headline --> and <!-- /headline -->, is filled as well.
"""
import re, textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flow import auto_shift
from lab import evidence, maps
from plumbing import config
from plumbing.config import UserError, field
from plumbing.draw import GRAY, Canvas, chart


@dataclass
class Config:
    """The flags of `python -m lab.report`."""
    preset: str = field("small", "whose rows: the preset of lab.evidence that made them")
    results: str = field("results", "folder of the tables")
    file: str = field("RESULTS.md", "the file to write")
    readme: str = field("README.md", "the file whose short table is filled")
    assets: str = field("assets", "folder of the figures")
    models: str = field("out/evidence", "folder of the trained models, for --pictures")
    pictures: bool = field(False, "also draw the figures that need the trained models")


PRESETS = {name: {} for name in evidence.PRESETS}
ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------- numbers out of rows

# the key of a cell unless its row or column overrides it
USUAL = dict(dit="base", shift="-", steps=10, scale=1.0)


class Numbers:
    """The rows of one preset, unless a key names another: `values` picks numbers out of them,
    `cell` formats them."""

    def __init__(self, folder, preset):
        self.preset = preset
        speedrun = evidence.Table(folder, "speedrun", "stage change steps batch", "cpu_seconds "
                                  "psnr accuracy frechet conv")
        self.files = evidence.tables(folder) | dict(speedrun=speedrun)
        self.tables = {name: t.rows() for name, t in self.files.items()}

    def rows(self, table, **key):
        """The rows with the key's values; a key that the table has no column for is ignored."""
        key = {k: evidence.Table.show(v) for k, v in (dict(preset=self.preset) | key).items()
               if k in self.files[table].columns}
        return [r for r in self.tables[table] if all(r[k] == v for k, v in key.items())]

    def values(self, table, column, **key):
        """One number per seed, in order of the seeds -> float64 (seeds,), perhaps empty."""
        if table == "generation" and key.get("steps") == "decoded":
            table, column = "latents", column if column == "psnr" else f"decoded_{column}"
        if table == "latents":               # other statistics do not change the reconstruction
            key["latent"] = key["latent"].partition("_")[0]
        trained = self.rows("generation", preset=key.get("preset", self.preset))
        end = max((int(r["trained"]) for r in trained), default=0)
        rows = self.rows(table, **USUAL | dict(trained=end) | key)
        rows.sort(key=lambda r: int(r.get("seed", 0)))
        return np.array([float(r[column]) for r in rows if r.get(column, "-") != "-"])

    def cell(self, table, column, digits, **key):
        """'.939 ± .004', or '-' where nothing was measured; no deviation for one seed, or for a
        whole number that is always the same."""
        values = self.values(table, column, **key)
        if not len(values):
            return "-"
        spread = values.std(ddof=1) if len(values) > 1 else None

        def short(v):
            text = f"{v:.{digits}f}"
            return re.sub(r"^(-?)0\.", r"\1.", text) if digits > 2 else text
        alone = spread is None or not (spread or digits)
        return short(values.mean()) + ("" if alone else f" ± {short(spread)}")

    def note(self, command, table, **key):
        """The line under a table: how it was measured."""
        rows = self.rows(table, **key)
        seeds = sorted({r["seed"] for r in rows if "seed" in r}, key=int)
        counts = sorted({int(r["n"]) for r in rows if "n" in r})
        if "preset" in key:
            command += f" --preset {key['preset']}"
        parts = [f"`python -m lab.evidence {command}`", f"seeds {', '.join(seeds)}",
                 *(f"n = {n:,}" for n in counts[-1:]), "mean ± standard deviation over the seeds"]
        return f"*{'; '.join(parts)}*"

# ---------------------------------------------------------------- the tables


class Section(NamedTuple):
    """One experiment in RESULTS.md.

    rows: pairs of a label and a key; columns: (head, table, column, digits, key); a cell is the
    mean of the column over the rows of results/<table>.tsv with both keys.  Rows without any
    number are dropped.  measured: the table and the key that must have rows, or the section does
    not appear.  figures: pairs of a file and its caption.
    """
    title: str
    finding: str
    label: str
    rows: list
    columns: tuple
    command: str
    measured: tuple
    figures: tuple = ()
    note: str = ""

    def table(self, N, rows=None):
        """-> Markdown; the first column is text, the others are numbers."""
        width = len(self.label.split("|")) - 1
        lines = [f"| {self.label} | {' | '.join(c[0] for c in self.columns)} |",
                 "| --- |" + " --: |" * (len(self.columns) + width)]
        for label, key in rows or self.rows:
            cells = [N.cell(table, column, digits, **more | key)
                     for _, table, column, digits, more in self.columns]
            if set(cells) != {"-"}:
                lines.append(f"| {label} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def markdown(self, N):
        """-> heading, finding, figures, table, note."""
        table, key = self.measured
        note = self.note or N.note(self.command, table, **key)
        finding = self.finding if N.preset == "small" else ""     # other rows may say otherwise
        parts = [f"## {self.title}", paragraph(finding)]
        for name, caption in self.figures:
            parts += [f"![{name}](assets/{name}.png)", paragraph(f"*{caption}*")]
        parts += [self.table(N), paragraph(note)]
        return "\n\n".join(filter(None, parts))


def paragraph(text):
    """Any text -> lines of at most 100 characters."""
    return textwrap.fill(" ".join(text.split()), 100, break_long_words=False,
                         break_on_hyphens=False)


def scores(more="", table="generation", **key):
    """The two columns that score samples."""
    return (("accuracy" + more, table, "accuracy", 3, key),
            ("Frechet" + more, table, "frechet", 2, key))


def rulers(table="generation", **key):
    """A column for each of evidence.SCORES; first those that see color, texture and diversity."""
    return tuple((name, table, column, digits, key) for name, column, digits in (
        ("random conv", "conv", 1), ("recall", "recall", 3), ("factors", "factors", 2),
        ("accuracy", "accuracy", 3), ("Frechet", "frechet", 2), ("color", "color", 2),
        ("precision", "precision", 3), ("KID", "kid", 3)))


def beside(more="", table="generation", **key):
    """The same, SVG next to the VAE."""
    svg, vae = (scores(f", {z.upper()}{more}", table, latent=z, **key) for z in ("svg", "vae"))
    return svg[0], vae[0], svg[1], vae[1]


def speedrun(title, stage, finding):
    """A section of results/speedrun.tsv, of which every row is one short run."""
    rows = [row.split("\t")[1:4] for row in (ROOT / "results/speedrun.tsv").read_text().splitlines()
            if row.startswith(stage + "\t")]
    what = "decoded " if stage == "ae" else ""
    columns = [("CPU seconds", "cpu_seconds", 0), ("PSNR, dB", "psnr", 2),
               (what + "accuracy", "accuracy", 3), (what + "Frechet", "frechet", 2),
               (what + "random conv", "conv", 1)]
    return Section(
        title, finding, "change | steps | batch",
        [(" | ".join(row), dict(stage=stage, change=row[0], steps=row[1], batch=row[2]))
         for row in rows],
        tuple((head, "speedrun", column, digits, {}) for head, column, digits in columns
              if stage == "ae" or column != "psnr"),
        "", ("speedrun", dict(stage=stage)),
        note="*One seed, one thread of a busy machine, schedules as long as the run; n = 1,000. "
             "Measured with throw-away variants of `ae.py` and `dit.py` that were not kept.*")


NAMES = {"svg": "SVG", "vae": "VAE", "dino": "DINO only", "unaligned": "DINO + residual, unaligned",
         "pixels": "raw pixels"}
named = lambda *latents: [(NAMES[z], dict(latent=z)) for z in latents]
BOTH = (*beside(scale=1.0), *beside(", w = 2", scale=2.0))
GUIDED = (*scores(scale=1.0), *scores(", w = 2", scale=2.0))
PSNR, SSIM = ("PSNR, dB", "latents", "psnr", 2, {}), ("SSIM", "latents", "ssim", 3, {})
DECODED = ("reconstruction Frechet", "latents", "decoded_frechet", 2, {})
LINEAR = ("linear, mean token", "latents", "linear", 3, {})
SHIFTED = (*scores(", 3 steps", steps=3, latent="svg"),
           *scores(", 10 steps", steps=10, latent="svg"))
KEPT = sorted({k for p in evidence.PRESETS.values() for k in p["kept"]})
ENCODERS = sorted({k for p in evidence.PRESETS.values() for k in p["encoders"]})
AUTO = f"auto ({auto_shift(16, 112):.2f})"             # of 16 tokens with 112 channels

INTRO = """
Generated by `python -m lab.report` from the rows in [results/](results): do not edit it by hand.
The line below each table gives the command that measured its rows.

**Setup.** The data set is `shapes` (32 px, ten classes). So that everything could be measured with
three seeds on a CPU, the models are smaller than the default's: preset `{preset}` of
`lab/evidence.py`, in which a seed determines both stages and the noise. Only the section "The
default" shows the default. The machine was a two-core AMD EPYC without a GPU, torch 2.13, one
thread per run; the {trainings} trainings that were timed took {hours:.1f} hours of one core.

**Scores.** Samples are drawn evenly over the classes. The judge is a small CNN trained on the
labels of `shapes` (`lab/judge.py`); it shares nothing with the encoder. *Accuracy* is the fraction
of samples that the judge classifies as the requested class. *Frechet* is the Frechet distance
between the judge's features of the samples and those of 5,000 training images (0.04 for held-out
images). *w* is the guidance scale, 1 unless given. Samples take ten Euler steps unless another
number is given.

**Neutral rulers.** The judge learned to ignore everything but the shape. Three other Frechet
distances to the same 5,000 images did not: *factors*, in the same CNN trained to predict all that
an image was drawn from (class, colors, place, scale, angle, gradients, texture, lines, noise);
*random conv*, in the standardized channel statistics of random convolutions; *color*, of the mean
colors of 4 x 4 squares. *Precision* and *recall* (k = 3) and *KID* are measured in the random
convolutions too, beside as many training images as samples.

**Baseline.** The VAE (`ae.py --latent vae`) uses DINO in its perceptual loss but not in its latent.
Its encoder is the residual's network; its decoder and DiT have the same hidden sizes as SVG's and
train for as many steps.
"""
LIMITS = """
- **The judge sees only shape.** Recolored to one red on one gray, held-out images keep an accuracy
of 1.000 and have a Frechet distance of .26, far below that of any samples here; three images per
class, repeated, have an accuracy of 1.000 too (see
[What each ruler sees](#what-each-ruler-sees)). So the scores of samples of the smaller models say
next to nothing about color and little about texture and diversity.
- **The rulers disagree.** At the default's budget (see [The default](#the-default)) SVG is ahead in
accuracy, in the judge's Frechet distance and in factors; the VAE is ahead in random conv and in
color, and in recall with guidance.
- **The VAE was not tuned**: neither the weight of its KL divergence (1e-4) nor the number of its
channels (16), and the time shifts were chosen on SVG.
- **The pretraining is not counted.** SVG's tiny encoder was pretrained for 13 minutes on unlabeled
images of the same generator; the VAE had no such help.
- The time shifts and the constants of editing were chosen with the same judge that reports them.
"""

SECTIONS = [
    Section(
        "What each ruler sees",
        """Three images of each class, repeated, raise every Frechet distance to about thirty times
        its floor and lower recall to 0 (copies leave its balls no radius), but accuracy stays at
        1.000 and precision at .844; ten of each class have a lower Frechet distance in the judge,
        .32, than any samples in this file. So accuracy does not suffice, nor does precision, which
        recoloring even raises, and distances need recall beside them; the tables of the smaller
        models below were measured before these rulers. Among the distances, the judge's moves least
        when all images get the same colors, and that of the mean colors does not move in a blur.
        Permuted channels rightly change no score: `shapes` draws red, green and blue alike, so the
        result is a sample of the same distribution.""",
        "held-out images",
        [("untouched", dict(change="untouched")),
         ("RGB permuted in each image", dict(change="permuted")),
         ("all in the same red on the same gray", dict(change="recolored")),
         ("ten of each class, repeated", dict(change="ten")),
         ("three of each class, repeated", dict(change="three")),
         ("blurred 3 x 3, twice", dict(change="blurred"))],
        rulers("rulers"), "rulers", ("rulers", {})),
    Section(
        "The default",
        """What `python ae.py && python dit.py && python sample.py` trains, and the VAE at the same
        sizes and steps. With three or ten steps SVG has about twice the accuracy and a lower
        Frechet distance in the judge and in factors. The VAE has a lower one in random conv and in
        color (level at three unguided steps in the former), and a higher recall with guidance. One
        step is too few for both. The last rows are the floors: held-out images, decoded from their
        latents and as they are.""",
        "latent | Euler steps | guidance",
        [(f"{NAMES[z]} | {k} | {w}", dict(latent=z, steps=k, scale=w))
         for k, w in ((1, 1), (3, 1), (3, 2), (10, 1), (10, 2)) for z in evidence.PAIR]
        + [(f"{NAMES[z]}, decode(encode(x)) | |", dict(latent=z, steps="decoded"))
           for z in evidence.PAIR]
        + [("held-out images | |", dict(latent="pixels", steps="decoded"))],
        (*rulers(preset="full"), ("PSNR, dB", "generation", "psnr", 2, dict(preset="full"))),
        "default", ("generation", dict(preset="full", latent="vae")),
        (("steps", "1, 2, 3, 5, 10, 25 Euler steps from the same noise, a row each, guidance 2, "
          "seed 0: SVG on the left, VAE on the right."),)),
    Section(
        "Few steps (Figure 8a, Table 2a)",
        """At every number of Euler steps SVG has the higher mean accuracy and the lower mean
        Frechet distance; without guidance, three steps of SVG are ahead of fifty of the VAE. After
        ten steps little changes for either. Guidance raises both accuracies; from five steps on it
        lowers the VAE's Frechet distance, while from two steps on it raises SVG's. The last row,
        decoded held-out images, shows the loss in the autoencoder alone: the VAE's is larger.""",
        "Euler steps | guidance",
        [(f"{k} | {w:g}", dict(steps=k, scale=w)) for w in (1.0, 2.0) for k in evidence.STEPS]
        + [("decode(encode(x)) |", dict(steps="decoded"))],
        beside(), "steps", ("generation", dict(latent="vae", dit="base")),
        (("fewsteps", "Thin: guidance 2. Bars: one standard deviation."),
         ("strip", "1, 2, 3, 5, 10, 25 Euler steps from the same noise, a row each, guidance 2, "
          "seed 0: SVG on the left, VAE on the right."))),
    Section(
        "Training speed (Figure 1)",
        """After half of its training SVG has a higher accuracy than the VAE at the end and, without
        guidance, a lower Frechet distance; with guidance 2 these two are level. After 125 steps
        both are near chance (.1). For the time of a step see [Cost](#cost).""",
        "training steps", [(f"{k:,}", dict(trained=k)) for k in KEPT],
        BOTH, "training", ("generation", dict(latent="vae", dit="base", steps=10)),
        (("training", "Ten Euler steps. Thin: guidance 2."),)),
    Section(
        "Separable latents (Figure 2)",
        """From the mean token of DINO a kNN or a linear probe tells the class, and the residual
        beside it, matched or not, takes little of that away. From the VAE's mean token both find
        .16 to .22, against .10 to .11 from raw pixels. SVG inherits this from the encoder, whose
        tokens its latent contains.""",
        "latent", named("svg", "dino", "unaligned", "vae", "pixels"),
        (("channels", "latents", "channels", 0, {}), ("kNN, mean token", "latents", "knn", 3, {}),
         LINEAR, ("kNN, all tokens", "latents", "knn_flat", 3, {}),
         ("linear, all tokens", "latents", "linear_flat", 3, {})),
        "maps", ("latents", dict(latent="vae")),
        (("maps", "The mean token of 1,000 held-out images: PCA above, t-SNE below. Seed 0."),)),
    Section(
        "Velocity fields (Figure 3)",
        """Within a class the directions from noise to sample agree more in SVG's latents, and few
        Euler steps end nearer to where fifty do: clearly with one or two steps, by little with
        five. Straightness (displacement / path length) hardly differs. Consistency is the norm of
        the mean of 50 unit vectors from noise to sample in each class: .14 for unrelated vectors
        and about .71 at most, because noise makes up half of each.""",
        "latent", named("svg", "vae"),
        (("direction consistency", "paths", "consistency", 3, {}),
         ("straightness", "paths", "straightness", 3, {}),
         ("error of 1 step", "paths", "error1", 3, {}), ("2 steps", "paths", "error2", 3, {}),
         ("5 steps", "paths", "error5", 3, {})), "fields", ("paths", dict(latent="vae"))),
    Section(
        "How semantic must the encoder be? (new)",
        """Both stages were trained on encoders from random to shipped; those between are
        checkpoints of a separate pretraining run of 800 steps. The better a kNN on the encoder's
        tokens, the better the samples score and the more the directions within a class agree;
        straightness does not follow. The encoder is not all that differs: the perceptual loss of
        stage 1 compares features of the encoder under test, and the accuracy of decoded images
        rises from .665 to .971.""",
        "encoder",
        [("random" if k == 0 else f"{k} steps", dict(latent=f"encoder{k}", step=k))
         for k in ENCODERS]
        + [("shipped, 2,400 steps", dict(latent="svg", step="shipped")),
           ("none (VAE)", dict(latent="vae", step="none"))],
        (("its kNN", "encoders", "knn", 3, {}), PSNR,
         ("decoded accuracy", "latents", "decoded_accuracy", 3, {}), *scores(),
         scores(", 3 steps", steps=3)[1], ("straightness", "paths", "straightness", 3, {}),
         ("consistency", "paths", "consistency", 3, {})),
        "encoder", ("generation", dict(latent="encoder0")), (("encoder", "Ten Euler steps."),)),
    Section(
        "The residual and its matching (Figure 5, Table 4)",
        """Sixteen residual channels raise the PSNR by eight decibels. Samples of DINO's tokens
        alone score higher, but the judge does not see the colors that they lack. Matched and
        unaligned latents score alike, within one standard deviation. With normalization per channel
        that is expected, since it undoes any common factor of the residual; with one scalar it
        means that this residual encoder did not need the matching. Made four times larger, the
        unaligned residual lowers the accuracy from .543 to .321.""",
        "latent | normalized by",
        [(f"{NAMES[z]} | {how}", dict(latent=z + end)) for z in ("dino", "svg", "unaligned")
         for how, end in (("channel", ""), ("one scalar", "_scalar"))]
        + [(f"the same, residual x {evidence.LOUD} | one scalar", dict(latent="unaligned_loud"))],
        (PSNR, SSIM, DECODED, *GUIDED), "residual", ("generation", dict(latent="dino")),
        (("residual", "Held-out images, then decoded from: DINO only, unaligned, SVG, VAE. "
          "Seed 0."),)),
    Section(
        "Still a representation? (Table 4)",
        """A linear classifier of single tokens of 1,000 images predicts background, or the class of
        the object that covers the token (truth: the generator's masks). SVG's tokens, which contain
        the encoder's, serve it nearly as well as the encoder's alone; the VAE's little better than
        raw pixels.""",
        "tokens of", [("bare encoder", dict(latent="dino")),
                      *named("svg", "unaligned", "vae", "pixels")],
        (LINEAR, ("segmentation, mIoU", "dense", "miou", 3, {}),
         ("token accuracy", "dense", "accuracy", 3, {})), "dense", ("dense", dict(latent="vae"))),
    Section(
        "Which layer (Table 6)",
        """With tokens of the encoder's second block, of four, samples score far worse. The PSNR and
        SSIM are equal within one standard deviation; in the paper an earlier layer reconstructs
        better.""",
        "block", [("1", dict(latent="layer1")), ("2", dict(latent="layer2")),
                  ("3", dict(latent="layer3")), ("4, the last", dict(latent="svg"))],
        (PSNR, SSIM, DECODED, ("kNN of the latent", "latents", "knn", 3, {}), *GUIDED),
        "layer", ("generation", dict(latent="layer2"))),
    Section(
        "Size of the DiT (Figure 8b)",
        """At each of three widths of equal depth SVG has the better means, and it gains more by
        width: its accuracy rises from .371 to .641, the VAE's from .183 to .237. Width 96 is below
        the 112 channels of SVG's latent (see the experiment on width below).""",
        "DiT's width", [("96", dict(dit="narrow")), ("144", dict(dit="base")),
                        ("192", dict(dit="wide"))],
        BOTH, "scaling", ("generation", dict(dit="wide"))),
    Section(
        "Guidance",
        """SVG's mean accuracy is highest at guidance 2; the VAE's still rises at 4. The mean
        Frechet distance is lowest without guidance for SVG and at 2 for the VAE.""",
        "guidance", [(f"{w:g}", dict(scale=w)) for w in (1.0, 1.5, 2.0, 3.0, 4.0)],
        beside(), "guidance", ("generation", dict(latent="vae", scale=4.0))),
    Section(
        "Time shift in sampling",
        """With three steps 2.5 has the best means, and RAE's rule (`auto`), which was made for far
        larger latents and gives less than 1 here, the worst. With ten steps all five are equal
        within one standard deviation.""",
        "shift", [(AUTO if s == "auto" else s, dict(shift=s))
                  for s in evidence.EXPERIMENTS["shift"].shifts],
        SHIFTED,
        "shift", ("generation", dict(latent="svg", shift="auto"))),
    Section(
        "Time shift in training", "All sampled with the default's shift, 4.", "shift",
        [(AUTO, dict(dit="shiftauto")), ("1", dict(dit="shift1")), ("2.5", dict(dit="base")),
         ("6.67", dict(dit="shift6.67"))],
        SHIFTED,
        "trainshift", ("generation", dict(dit="shiftauto"))),
    Section(
        "Noise on the decoder's latents (RAE)",
        """As in RAE the reconstructions get worse and the samples score better, most of all with
        guidance. (In RAE the encoder is fixed; here the residual encoder is trained with the noisy
        decoder.) The neutral measure of [Limits](#limits) disagrees: with noise 0.4 and 8 residual
        channels, at the default's budget, it was 71 instead of 59 (one seed, trial).""",
        "noise", [("none", dict(latent="svg")), ("0.4", dict(latent="noise"))],
        (PSNR, DECODED, *GUIDED), "noise", ("generation", dict(latent="noise"))),
    Section(
        "Width of the DiT against channels of the latent (RAE)",
        """A DiT of four blocks learns the latent of a single image for 300 steps. On SVG's 112
        channels the final loss falls from .27 to .06 between the widths 96 and 128; on the VAE's 16
        channels the width makes little difference. `dit.py` warns when the width is not above the
        number of channels.""",
        "DiT's width", [(str(w), dict(width=w)) for w in evidence.WIDTHS],
        tuple((f"loss, {NAMES[z]} ({n} channels)", "width", "loss", 4, dict(latent=z))
              for z, n in evidence.CHANNELS.items()), "width", ("width", {})),
    Section(
        "Editing (Figure 10)",
        """`lab/edit.py` changes the class inside a mask. The judge classifies .63 of the edited
        images as the new class, and .003 of the plain reconstructions. Outside the mask, which
        touches most of the 4 x 4 tokens, the PSNR is five decibels below that of the plain
        reconstruction. The constants of editing were chosen on the same held-out images.""",
        "latent", named("svg"),
        (("new class", "editing", "new_class", 3, {}), ("old class", "editing", "old_class", 3, {}),
         ("new class, before the edit", "editing", "floor", 3, {}),
         ("PSNR outside the mask, dB", "editing", "psnr_outside", 2, {}),
         ("of the plain reconstruction", "editing", "psnr_outside_plain", 2, {}),
         ("edit against plain reconstruction", "editing", "psnr_outside_to_plain", 2, {})),
        "editing", ("editing", {}),
        (("edit", "The default's model, seed 0: original, reconstruction, mask, edit to a class "
          "drawn at random; and so on."),)),
    speedrun(
        "Speedrun, stage 1", "ae",
        """What was tried to make the default faster, on the way to it. Muon in place of AdamW
        gives more than two decibels at equal steps, for a fifth more time. On the residual encoder
        it makes the latents harder to generate (next table), so the default uses it on the decoder
        only. A decoder without convolutions at full resolution costs little more than half per
        step; at equal CPU time it is level in decibels and behind in the other scores."""),
    speedrun(
        "Speedrun, stage 2", "dit",
        """Samples of ten unguided steps. At equal steps the latents of the two autoencoders with
        more decibels score worse. Larger learning rates with a shorter warm-up score better."""),
    Section(
        "Cost",
        """SVG's stage 1 was timed only once, beside other work. Its variants below, which have the
        same sizes, took 172 s against the VAE's 148 s, and equal time in stage 2. The machine was
        shared, so differences of a tenth mean nothing.""",
        "latent", named("svg", "vae", "dino", "unaligned")
        + [("SVG, block 2", dict(latent="layer2")), ("SVG, noisy decoder", dict(latent="noise"))],
        (("stage 1, s", "cost", "seconds", 0, dict(stage="ae", dit="-")),
         ("stage 2, s", "cost", "seconds", 0, dict(stage="dit"))),
        "", ("cost", dict(latent="svg")),
        note="*Seconds of one core; mean ± standard deviation over the timed runs, which "
             "are those without an interruption. Writing the latent cache counted as stage 1.*"),
]


def measured(N):
    """-> dict of the sections with rows, by title; of two with one title, the first."""
    found = {}
    for s in SECTIONS:
        if N.rows(s.measured[0], **s.measured[1]):
            found.setdefault(s.title, s)
    return found


def results(N):
    """-> the text of RESULTS.md."""
    seconds = [float(r["seconds"]) for r in N.rows("cost")]
    intro = INTRO.strip().format(preset=N.preset, trainings=len(seconds),
                                  hours=sum(seconds) / 3600)
    limits = [paragraph(f"- {item}") for item in LIMITS.split("\n- ")[1:]]
    parts = ["# Results", *map(paragraph, intro.split("\n\n")), "## Limits", "\n".join(limits),
             *(section.markdown(N) for section in measured(N).values())]
    return "\n\n".join(parts) + "\n"


def headline(N):
    """-> the README's short table: the default with three and with ten steps, and its floors."""
    default = measured(N)["The default"]
    return default._replace(columns=default.columns[:4]).table(
        N, [row for row in default.rows if row[1]["steps"] != 1])


def fill(text, name, block):
    """Replace the text between <!-- name --> and <!-- /name -->, if these markers are there."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
                  lambda m: f"{m[1]}{block}\n{m[2]}", text, flags=re.S)

# ---------------------------------------------------------------- the curves

BLUE, RED = "#2f6fb7", "#d0342c"


def curves(N, folder):
    """fewsteps.png, training.png and encoder.png, unless a point is missing."""
    def both(title, xs, column, xlabel, axis, **options):
        """A panel: SVG and VAE over xs, the values of `axis`; thin: with guidance."""
        series = [("" if thin else NAMES[z], color, thin,
                   [N.values("generation", column, latent=z, scale=w, **{axis: x}) for x in xs])
                  for z, color in (("svg", BLUE), ("vae", RED))
                  for thin, w in ((False, 1.0), (True, 2.0))]
        return title, series, xs, xlabel, options

    for name, axis, xs, xlabel in (("fewsteps", "steps", evidence.STEPS, "Euler steps"),
                                   ("training", "trained", KEPT, "training steps")):
        xs = [x for x in xs if N.rows("generation", latent="vae", dit="base", **{axis: x})]
        write(Path(folder) / f"{name}.png", [
            both("Frechet distance", xs, "frechet", xlabel, axis),
            both("accuracy", xs, "accuracy", xlabel, axis, logy=False)])

    rows = next(s for s in SECTIONS if s.command == "encoder").rows[:-1]
    keys = [key for _, key in rows if N.rows("encoders", **key)]
    over = lambda table, column: [N.values(table, column, **key) for key in keys]
    knn = [float(v[0]) for v in over("encoders", "knn")]
    panel = lambda title, *series, **options: (title, series, knn, "kNN of the encoder",
                                               dict(options, logx=False))
    write(Path(folder) / "encoder.png", [
        panel("Frechet distance", ("", BLUE, False, over("generation", "frechet"))),
        panel("accuracy", ("samples", BLUE, False, over("generation", "accuracy")),
              ("decoded", GRAY, True, over("latents", "decoded_accuracy")), logy=False),
        panel("paths", ("straightness", BLUE, False, over("paths", "straightness")),
              ("consistency", RED, False, over("paths", "consistency")), logy=False)])


def write(path, panels):
    """Charts side by side, unless one has fewer than two points."""
    if all(len(values) > 1 and all(map(len, values)) for p in panels for *_, values in p[1]):
        sheet = Canvas(530 * len(panels), 360)
        for i, (*panel, options) in enumerate(panels):
            sheet.paste(chart(*panel, **options), 530 * i, 0)
        config.atomic(path, sheet.done().save)
        print(f"wrote {path}")


def main(argv=None):
    """The command line."""
    c = config.parse(Config, PRESETS, argv)
    N, readme = Numbers(c.results, c.preset), Path(c.readme)
    if not N.rows("generation"):
        raise UserError(f"{c.results}: no rows of preset {c.preset}; `python -m lab.evidence all` "
                        "makes them")
    texts = {Path(c.file): results(N)}
    if readme.is_file() and "The default" in measured(N):
        texts[readme] = fill(readme.read_text(), "headline", headline(N))
    for path, text in texts.items():
        config.atomic(path, lambda temporary: Path(temporary).write_text(text))
        print(f"wrote {path}")
    curves(N, c.assets)
    if c.pictures:
        maps.draw(Path(c.models) / c.preset, Path(c.assets))


if __name__ == "__main__":
    with config.one_line_errors():
        main()
