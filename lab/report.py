"""From results/*.tsv to the README: every table and curve in it is made here, so that nobody types
a number.

    python -m lab.report                # tables into README.md, curves into assets/; seconds
    python -m lab.report --pictures     # also the maps and pictures, from the models of evidence.py

A table stands in README.md between <!-- NAME --> and <!-- /NAME -->; all between is replaced.
"""
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from plumbing import config
from lab import evidence
from exercises import check as exercises
import sample
from ae import load_ae, save_grid, to_uint8
from plumbing.config import UserError, field
from data import load_images, shapes, to_float
from flow import auto_shift
from metrics import pca, tsne
from toy_flow import GREY, INK, K, PAPER, RULE, Canvas


@dataclass
class Config:
    """The flags of `python -m lab.report`."""
    preset: str = field("small", "which rows: the preset of evidence.py that made them")
    out: str = field("out/evidence", "folder of the trained models, for --pictures")
    results: str = field("results", "folder of the tables")
    readme: str = field("README.md", "the file whose tables are replaced")
    assets: str = field("assets", "folder of the pictures")
    pictures: bool = field(False, "also draw what needs the trained models")


PRESETS = {name: {} for name in evidence.PRESETS}
NAMES = {"svg": "SVG", "vae": "VAE", "dino": "DINO only", "unaligned": "DINO + residual, unaligned",
         "pixels": "raw pixels", "narrow": "96", "base": "144", "wide": "192"}
AUTO = f"auto ({auto_shift(16, 112):.2f})"             # of 16 tokens with 112 channels

# ---------------------------------------------------------------- numbers out of rows


class Numbers:
    """The rows of one preset, by table; `values` picks, `cell` shows."""

    def __init__(self, folder, preset):
        self.tables = {name: [r for r in t.rows() if r.get("preset", preset) == preset]
                       for name, t in evidence.tables(folder).items()}

    def values(self, table, column, **key):
        """One number a seed, in order of the seeds -> float64 (seeds,), perhaps empty."""
        rows = [r for r in self.tables[table] if matches(r, key)]
        rows.sort(key=lambda r: int(r.get("seed", 0)))
        return np.array([float(r[column]) for r in rows if r[column] != "-"])

    def cell(self, table, column, digits=3, **key):
        """'.939 ± .004', or '-' where nothing was measured."""
        return show(self.values(table, column, **key), digits)

    def scores(self, latent, steps, scale, dit="base", trained=None, shift="-", digits=(3, 2)):
        """Two cells: the share recognised, and the Frechet distance."""
        key = dict(latent=latent, dit=dit, steps=steps, scale=scale, shift=shift,
                   trained=trained or self.end())
        return [self.cell("generation", c, d, **key)
                for c, d in zip(("recognised", "frechet"), digits)]

    def end(self):
        """The DiT's last step."""
        return max((int(r["trained"]) for r in self.tables["generation"]), default=0)

    def note(self, name, table="generation", **key):
        """The line under a table: how it was measured."""
        rows = [r for r in self.tables[table] if matches(r, key)]
        if not rows:
            return f"*Not measured yet; `python -m lab.evidence {name}` does it.*"
        seeds = sorted({r["seed"] for r in rows if "seed" in r}, key=int)
        counts = sorted({int(r["n"]) for r in rows if "n" in r})
        parts = [f"`python -m lab.evidence {name}`", f"seeds {', '.join(seeds)}"]
        parts += [f"n = {counts[-1]:,}"] if counts else []
        return "*" + "; ".join(parts) + "; mean ± standard deviation over the seeds.*"


def matches(row, key):
    """Whether a row of strings has the key's values."""
    return all(row[k] == evidence.Table.show(v) for k, v in key.items())


def show(values, digits):
    """Numbers of several seeds -> 'mean ± deviation'; below 1 without the leading zero."""
    if not len(values):
        return "-"
    def short(v):
        text = f"{v:.{digits}f}"
        return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) and digits > 2 else text
    text = short(values.mean())
    return text + (f" ± {short(values.std(ddof=1))}" if len(values) > 1 else "")


def markdown(header, rows):
    """A table; the first column is text, the others numbers."""
    width = len(header)
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " --: |" * (width - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])

# ---------------------------------------------------------------- the tables
# Each: Numbers -> markdown.  The name is the marker in the README.

BESIDE = ["recognised, SVG", "VAE", "Frechet, SVG", "VAE"]


def beside(N, steps, scale, **key):
    """The four cells of BESIDE."""
    svg, vae = (N.scores(z, steps, scale, **key) for z in ("svg", "vae"))
    return [svg[0], vae[0], svg[1], vae[1]]


def both(N, name, rows):
    """A table with SVG beside the VAE, unguided and guided; rows: (what, key of its scores)."""
    return markdown([name, *BESIDE, *(h.replace(",", ", w = 2,") for h in BESIDE)],
                    [[what, *beside(N, 10, 1.0, **k), *beside(N, 10, 2.0, **k)]
                     for what, k in rows])


def steps(N):
    """Figure 8a: few Euler steps."""
    rows = []
    for w in (1.0, 2.0):
        for k in (1, 2, 3, 5, 10, 25, 50):
            key = dict(dit="base", steps=k, scale=w, shift="-", trained=N.end())
            a, b = (N.values("generation", "frechet", latent=z, **key) for z in ("svg", "vae"))
            seeds = min(len(a), len(b))
            rows.append([str(k), f"{w:g}", *beside(N, k, w), show(b[:seeds] / a[:seeds], 1)])
    rows.append(["decode(encode(x))", "", N.cell("latents", "decoded_recognised", latent="svg"),
                 N.cell("latents", "decoded_recognised", latent="vae"),
                 N.cell("latents", "decoded_frechet", 2, latent="svg"),
                 N.cell("latents", "decoded_frechet", 2, latent="vae"), ""])
    return markdown(["Euler steps", "guidance", *BESIDE, "ratio"],
                    rows) + "\n\n" + N.note("steps", latent="vae")


def training(N):
    """Figure 1: the same along training."""
    kept = sorted({int(r["trained"]) for r in N.tables["generation"]})
    return both(N, "training steps", [(f"{k:,}", dict(trained=k)) for k in kept]
                ) + "\n\n" + N.note("training", latent="vae")


def fields(N):
    """Figure 3 on the real latents."""
    rows = [[NAMES[z], *(N.cell("paths", c, 3, latent=z) for c in
                         ("consistency", "straightness", "error1", "error2", "error5"))]
            for z in ("svg", "vae")]
    return markdown(["latent", "direction consistency", "straightness", "error of 1 step",
                     "2 steps", "5 steps"], rows) + "\n\n" + N.note("fields", "paths", latent="vae")


def maps(N):
    """Figure 2 in numbers."""
    rows = [[NAMES[z], (N.values("latents", "channels", latent=z).astype(int).astype(str).tolist()
                        or ["-"])[0], *(N.cell("latents", c, latent=z) for c in
                                        ("knn", "linear", "knn_flat", "linear_flat"))]
            for z in ("svg", "dino", "unaligned", "vae", "pixels")]
    return markdown(["latent", "channels", "kNN, mean token", "linear, mean token",
                     "kNN, all tokens", "linear, all tokens"],
                    rows) + "\n\n" + N.note("maps", "latents", latent="vae")


def residual(N):
    """Figure 5 and Table 4: the residual, its matching, the normalisation."""
    rows = []
    for z in ("dino", "svg", "unaligned"):
        rec = [N.cell("latents", "psnr", 2, latent=z), N.cell("latents", "ssim", latent=z),
               N.cell("latents", "decoded_frechet", 2, latent=z)]
        for name, kind in (("per channel", z), ("one scalar", z + "_scalar")):
            rows.append([NAMES[z], name, *(rec if kind == z else ["", "", ""]),
                         *N.scores(kind, 10, 1.0), *N.scores(kind, 10, 2.0)])
    rows.append([f"the same, residual {evidence.LOUD} times louder", "one scalar", "", "", "",
                 *N.scores("unaligned_loud", 10, 1.0), *N.scores("unaligned_loud", 10, 2.0)])
    return markdown(["latent", "normalised by", "PSNR, dB", "SSIM", "reconstruction Frechet",
                     "recognised", "Frechet", "recognised, w = 2", "Frechet, w = 2"],
                    rows) + "\n\n" + N.note("residual", latent="dino")


def dense(N):
    """Table 4: still a representation?"""
    rows = [[NAMES[z], N.cell("latents", "linear", latent=z), N.cell("dense", "miou", latent=z),
             N.cell("dense", "accuracy", latent=z)]
            for z in ("dino", "svg", "unaligned", "vae", "pixels")]
    rows[0][0] = "bare encoder"
    return markdown(["tokens of", "linear probe", "segmentation, mIoU", "tokens right"],
                    rows) + "\n\n" + N.note("dense", "dense", latent="vae")


def encoders(N):
    """The steps of pretraining that were carried to samples, as the rows call them."""
    found = {int(m[1]) for r in N.tables["paths"]
             if (m := re.fullmatch(r"encoder(\d+)", r["latent"]))}
    return [(f"{k} steps", f"encoder{k}", str(k)) for k in sorted(found)] + [
        ("shipped, 2400 steps", "svg", "shipped")]


def encoder(N):
    """Samples against the encoder's kNN."""
    rows = [[name.replace("0 steps", "random") if step == "0" else name,
             N.cell("encoders", "knn", step=step), N.cell("latents", "psnr", 2, latent=z),
             N.cell("latents", "decoded_recognised", latent=z), *N.scores(z, 10, 1.0),
             *N.scores(z, 3, 1.0)[1:], N.cell("paths", "straightness", latent=z),
             N.cell("paths", "consistency", latent=z)] for name, z, step in encoders(N)]
    rows.append(["VAE, no encoder", "", N.cell("latents", "psnr", 2, latent="vae"),
                 N.cell("latents", "decoded_recognised", latent="vae"), *N.scores("vae", 10, 1.0),
                 *N.scores("vae", 3, 1.0)[1:], N.cell("paths", "straightness", latent="vae"),
                 N.cell("paths", "consistency", latent="vae")])
    return markdown(["encoder", "its kNN", "PSNR, dB", "decoded, recognised", "samples, recognised",
                     "Frechet", "Frechet, 3 steps", "straightness", "consistency"],
                    rows) + "\n\n" + N.note("encoder", latent="encoder0")


def layer(N):
    """Table 6."""
    rows = [[name, N.cell("latents", "psnr", 2, latent=z), N.cell("latents", "ssim", latent=z),
             N.cell("latents", "decoded_frechet", 2, latent=z), N.cell("latents", "knn", latent=z),
             *N.scores(z, 10, 1.0), *N.scores(z, 10, 2.0)]
            for name, z in (("1", "layer1"), ("2", "layer2"), ("3", "layer3"),
                            ("4, the last", "svg")) if len(N.values("latents", "psnr", latent=z))]
    return markdown(["block", "PSNR, dB", "SSIM", "reconstruction Frechet", "kNN of the latent",
                     "recognised", "Frechet", "recognised, w = 2", "Frechet, w = 2"],
                    rows) + "\n\n" + N.note("layer", latent="layer2")


def scaling(N):
    """Figure 8b: the DiT's width."""
    return both(N, "DiT's width", [(NAMES[k], dict(dit=k)) for k in ("narrow", "base", "wide")]
                ) + "\n\n" + N.note("scaling", dit="wide")


def guidance(N):
    """Guidance from 1 to 4."""
    rows = [[f"{w:g}", *beside(N, 10, w)] for w in (1.0, 1.5, 2.0, 3.0, 4.0)
            if len(N.values("generation", "frechet", latent="vae", steps=10, scale=w,
                            trained=N.end(), dit="base"))]
    return markdown(["guidance", *BESIDE],
                    rows) + "\n\n" + N.note("guidance", latent="vae", scale=4.0)


def shift(N):
    """The time shift in sampling."""
    rows = [[AUTO if s == "auto" else s, *N.scores("svg", 3, 1.0, shift=s),
             *N.scores("svg", 10, 1.0, shift=s)] for s in evidence.SHIFTS]
    return markdown(["shift in sampling", "recognised, 3 steps", "Frechet, 3 steps",
                     "recognised, 10 steps", "Frechet, 10 steps"],
                    rows) + "\n\n" + N.note("shift", latent="svg", shift="auto")


def trainshift(N):
    """The time shift in training."""
    rows = [[name, *N.scores("svg", 3, 1.0, dit=kind), *N.scores("svg", 10, 1.0, dit=kind)]
            for name, kind in ((AUTO, "shiftauto"), ("1", "shift1"), ("2.5", "base"),
                               ("6.67", "shift6.67"))
            if len(N.values("generation", "frechet", latent="svg", dit=kind))]
    return markdown(["shift in training", "recognised, 3 steps", "Frechet, 3 steps",
                     "recognised, 10 steps", "Frechet, 10 steps"],
                    rows) + "\n\n" + N.note("trainshift", dit="shiftauto")


def noise(N):
    """RAE's noisy decoder, off and on."""
    rows = [[name, N.cell("latents", "psnr", 2, latent=z),
             N.cell("latents", "decoded_frechet", 2, latent=z), *N.scores(z, 10, 1.0),
             *N.scores(z, 10, 2.0)] for name, z in (("off", "svg"), ("on, 0.4", "noise"))
            if len(N.values("latents", "psnr", latent=z))]
    return markdown(["noise", "PSNR, dB", "reconstruction Frechet", "recognised", "Frechet",
                     "recognised, w = 2", "Frechet, w = 2"],
                    rows) + "\n\n" + N.note("noise", latent="noise")


def width(N):
    """RAE's test of the DiT's width."""
    rows = [[str(w), *(N.cell("width", "loss", 4, latent=z, width=w) for z in ("svg", "vae"))]
            for w in evidence.WIDTHS]
    return markdown(["DiT's width", "loss, SVG (112 channels)", "loss, VAE (16 channels)"],
                    rows) + "\n\n" + N.note("width", "width")


def editing(N):
    """Figure 10 in numbers."""
    names = dict(new_class="judged the new class", old_class="judged the old class",
                 floor="judged the new class before the edit",
                 psnr_outside="PSNR outside the mask, dB",
                 psnr_outside_plain="of the plain reconstruction, dB",
                 psnr_outside_to_plain="edit against plain reconstruction, dB")
    rows = [[text, N.cell("editing", key, 2 if "psnr" in key else 3)]
            for key, text in names.items()]
    return markdown(["", "SVG"], rows) + "\n\n" + N.note("editing", "editing")


def cost(N):
    """What the trainings took."""
    rows = [[NAMES[z], N.cell("cost", "seconds", 0, stage="ae", latent=z),
             N.cell("cost", "seconds", 0, stage="dit", latent=z, dit="base")]
            for z in ("svg", "vae", "dino", "unaligned")]
    seconds = [float(r["seconds"]) for r in N.tables["cost"]]
    return markdown(["latent", "stage 1, s", "stage 2, s"], rows) + (
        "\n\n*Seconds on one core, mean ± standard deviation over the seeds. All "
        f"{len(seconds)} trainings that were timed took {sum(seconds) / 3600:.1f} hours of one "
        "core together.*")


def exercise_list(N):
    """The twelve, as their docstrings tell them."""
    texts = [" ".join(check.__doc__.split()) for check in exercises.EXERCISES.values()]
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))


TABLES = dict(steps=steps, training=training, fields=fields, maps=maps, residual=residual,
              dense=dense, encoder=encoder, layer=layer, scaling=scaling, guidance=guidance,
              shift=shift, trainshift=trainshift, noise=noise, width=width, editing=editing,
              cost=cost, exercises=exercise_list)


def fill(text, blocks):
    """Replace what stands between the markers of each name in `text`; UserError: no such marker."""
    for name, block in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m: m[1] + block + "\n" + m[2].lstrip("\n"), text,
                              flags=re.S)
        if count != 1:
            raise UserError(f"the README has {count} places <!-- {name} -->, one is wanted")
    return text

# ---------------------------------------------------------------- the curves

BLUE, RED = "#2f6fb7", "#d0342c"


def chart(title, series, xs, ylabel, w=520, h=360, logx=True, logy=True, places=None):
    """One panel: series of (name, colour, thin, [values by seed]) over xs; the bars are one
    standard deviation.  -> Canvas.  places: where on the axis the ticks go, all xs if None."""
    canvas, shown = Canvas(w, h), [v for _, _, _, ys in series for y in ys for v in y]
    fx, fy = (np.log if logx else np.asarray), (np.log if logy else np.asarray)
    low, high = fy(min(shown)), fy(max(shown))
    margin = 0.08 * (high - low)
    px = lambda x: 60 + (w - 90) * (fx(x) - fx(xs[0])) / (fx(xs[-1]) - fx(xs[0]))
    py = lambda v: 36 + (h - 84) * (high + margin - fy(v)) / (high - low + 2 * margin)
    canvas.draw.rectangle((46 * K, 36 * K, (w - 8) * K, (h - 48) * K), PAPER, RULE, K)
    for v in ([0.5, 1, 2, 5, 10, 20, 50] if logy else np.arange(0, 1.01, 0.2)):
        if low - margin <= fy(v) <= high + margin:
            canvas.line([(46, py(v)), (w - 8, py(v))], RULE, 1)
            canvas.text(40, py(v), f"{v:g}", 14, GREY, "rm")
    for x in places or xs:
        canvas.text(px(x), h - 42, f"{x:.3g}" if x < 1 else f"{x:g}", 14, GREY, "ma")
    for name, color, thin, ys in series:
        points = [(px(x), py(np.mean(y))) for x, y in zip(xs, ys) if len(y)]
        for x, y in zip(xs, ys):
            if len(y) > 1:
                m, s = np.mean(y), np.std(y, ddof=1)
                bottom = max(m - s, 0.02) if logy else m - s
                canvas.line([(px(x), py(m + s)), (px(x), min(py(bottom), h - 49))], color, 1)
        canvas.line(points, color, 1.2 if thin else 2.6)
        canvas.dots(points, color, 2.4 if thin else 3.6)
        at = points[-2 if thin else -1]                   # two names must not stand in one place
        canvas.text(at[0] - 6, at[1] - 10, name, 14, color, "rs")
    canvas.text(46, 8, title, 18, INK)
    canvas.text(w - 10, h - 22, ylabel, 14, GREY, "ra")
    return canvas


def curves(N, folder):
    """steps.png, training.png, encoder.png out of the rows; what was not measured is left out."""
    def over(xs, column, latent, **key):
        key = dict(dit="base", shift="-", trained=N.end()) | key
        return [N.values("generation", column, latent=latent, **key | x) for x in xs]

    def pair(xs, column, **key):
        return [(name, color, thin, over(xs, column, z, scale=w, **key))
                for z, color in (("svg", BLUE), ("vae", RED))
                for name, w, thin in ((NAMES[z], 1.0, False), (NAMES[z] + ", guided", 2.0, True))]

    def save(name, panels):
        if all(len(y) for p in panels for _, _, _, ys in p[1] for y in ys):
            drawn = [chart(*p[:4], **p[4]) for p in panels]
            sheet = Canvas(530 * len(drawn), 360)
            for i, one in enumerate(drawn):
                sheet.paste(one, 530 * i, 0)
            config.atomic(Path(folder) / name, sheet.done().save)
            print(f"wrote {Path(folder) / name}")

    counts = [1, 2, 3, 5, 10, 25, 50]
    save("fewsteps.png", [
        ("Frechet distance", pair([dict(steps=k) for k in counts], "frechet"), counts,
         "Euler steps", {}),
        ("recognised as the class asked for", pair([dict(steps=k) for k in counts], "recognised"),
         counts, "Euler steps", dict(logy=False))])
    kept = sorted({int(r["trained"]) for r in N.tables["generation"]})
    if kept:
        save("training.png", [
            ("Frechet distance, 10 steps", pair([dict(trained=k) for k in kept], "frechet",
                                                steps=10), kept, "training steps", {}),
            ("recognised, 10 steps", pair([dict(trained=k) for k in kept], "recognised", steps=10),
             kept, "training steps", dict(logy=False))])
    found = encoders(N)
    knn = [float(v[0]) if len(v := N.values("encoders", "knn", step=s)) else 0
           for _, _, s in found]
    by = lambda table, column, **key: [N.values(table, column, latent=z, **key)
                                       for _, z, _ in found]
    if len(found) > 2:
        key = dict(dit="base", steps=10, scale=1.0, shift="-", trained=N.end())
        save("encoder.png", [
            ("Frechet distance of samples", [("", BLUE, False, by("generation", "frechet", **key))],
             knn, "kNN of the encoder", dict(logx=False)),
            ("recognised", [
                ("samples", BLUE, False, by("generation", "recognised", **key)),
                ("decoded", GREY, True, by("latents", "decoded_recognised"))],
             knn, "kNN of the encoder", dict(logx=False, logy=False)),
            ("paths", [("straightness", BLUE, False, by("paths", "straightness")),
                       ("consistency", RED, False, by("paths", "consistency"))],
             knn, "kNN of the encoder", dict(logx=False, logy=False))])

# ---------------------------------------------------------------- pictures, from the models

COLORS = ("#2f6fb7", "#e07b28", "#2c9a62", "#a8438f", "#d0342c", "#8c6d31", "#e377c2", "#17a2b8",
          "#7f7f7f", "#bcbd22")
FOUR = ("svg", "dino", "unaligned", "vae")


def draw_maps(folder, path, n=1000, side=300):
    """maps.png: PCA above, t-SNE below, of the mean token of the same n pictures, by class."""
    x, y, names = shapes(n, 32, seed=5)
    sheet = Canvas(len(FOUR) * (side + 12) + 110, 2 * side + 52)
    for i, latent in enumerate(FOUR):
        z = evidence.encode_all(load_ae(folder / f"{latent}-0" / "ae.pt"), x.numpy()).mean((2, 3))
        sheet.text(i * (side + 12), 6, NAMES[latent], 17, INK)
        for j, flat in enumerate((pca(z), tsne(z))):
            panel = Canvas(side, side, PAPER)
            flat = np.asarray(flat - flat.mean(0))
            place = flat / (2.2 * np.abs(flat).max()) * side + side / 2
            for k, color in enumerate(COLORS):
                panel.dots(place[(y == k).numpy()], color + "b0", 2.6)
            sheet.paste(panel, i * (side + 12), 34 + j * (side + 12))
    for k, (name, color) in enumerate(zip(names, COLORS)):
        sheet.text(len(FOUR) * (side + 12) + 6, 40 + 24 * k, name, 16, color)
    config.atomic(path, sheet.done().save)
    print(f"wrote {path}")


def draw_residual(folder, path, n=16):
    """residual.png: the same held-out pictures, then decoded from each latent."""
    held, _, _ = load_images("shapes", 32, "test")
    x = to_float(held, slice(0, n), None)
    rows = [to_uint8(x)]
    for latent in ("dino", "unaligned", "svg", "vae"):
        model = load_ae(folder / f"{latent}-0" / "ae.pt")
        rows.append(to_uint8(model.decode(model.encode(x))))
    save_grid(path, torch.cat(rows), n)
    print(f"wrote {path}: the pictures, then decoded from dino, unaligned, svg, vae")


def draw_strip(folder, path, counts=(1, 2, 3, 5, 10, 25)):
    """strip.png: the same noise at each number of steps, SVG on the left, VAE on the right."""
    halves = []
    for latent in ("svg", "vae"):
        model, decoder = sample.load(folder / f"{latent}-0", "cpu")
        y = torch.arange(10)
        halves.append([sample.generate(model, decoder, y, k, 2.0, None, 0) for k in counts])
    save_grid(path, torch.cat([torch.cat(pair) for pair in zip(*halves)]), 20)
    print(f"wrote {path}: a row each of {', '.join(map(str, counts))} steps; SVG, then VAE")


def main(argv=None):
    """The command line."""
    c = config.parse(Config, PRESETS, argv)
    N, readme = Numbers(c.results, c.preset), Path(c.readme)
    if not N.tables["generation"]:
        raise UserError(f"{c.results}: no rows of preset {c.preset}; `python -m lab.evidence all` "
                        "makes them")
    blocks = {name: table(N) for name, table in TABLES.items()}
    if not readme.is_file():
        raise UserError(f"{readme}: no such file")
    text = fill(readme.read_text(), blocks)
    root = Path(__file__).parents[1]
    text = re.sub(r"(\| `(\w+\.py)` \| )\d+( \|)", lambda m: m[1] + str(len(
        next(root.rglob(m[2])).read_text().splitlines())) + m[3], text)
    config.atomic(readme, lambda t: Path(t).write_text(text))
    print(f"wrote {len(blocks)} tables into {readme}")
    curves(N, c.assets)
    if c.pictures:
        folder = Path(c.out) / c.preset
        for draw, name in ((draw_maps, "maps"), (draw_residual, "residual"),
                           (draw_strip, "strip")):
            draw(folder, Path(c.assets) / f"{name}.png")


if __name__ == "__main__":
    with config.one_line_errors():
        main()
