"""How the labels decide what few steps cost: the paper's Figure 3, as a controlled 2-D experiment.

    python toy_flow.py                   28 s on one CPU core; a GPU would not help
    python toy_flow.py --preset debug    the same path in a few seconds

The targets are sixteen small Gaussians on a 4 x 4 grid; the source is noise from N(0, I), centered
among them.  Only the labels of the targets change:

    separable   each of four classes owns one quadrant (as in DINO's features: classes are apart)
    entangled   each class owns one cell in every row, column and quadrant (as in a VAE's)
    mix m       a point has its entangled label with probability m, else its separable one

The flow is conditioned on the class; without conditioning, the problems would be identical.  The
velocity is computed in two ways: in closed form (exact for a mixture of Gaussians) and by a small
MLP, both through `flow_loss`, `guided` and `euler` of flow.py.

Consistency falls with every label that is mixed; the error of five exact steps does not follow: .14
.74 .82 .71 for mix 0 .3 .6 1.  One step ends at the class mean: its error is the standard deviation
of the class.  After that,

    error^2 = that of points that reach their cell: (.14)^2 at 5 steps for every mix, ~ 1/steps^2
            + fraction that ends in another cell x (distance of the cells)^2, ~ 1/steps only

Noise near the boundary between two cells changes sides if Euler moves the boundary.  Mixed classes
have seven cells and thus most boundaries; entangled ones four, far apart: fewer points move, but
farther.  Separable classes lose none because each is its own mirror image at every boundary.  Try
as SEPARABLE: tetrominoes, [0, 0, 0, 1, 2, 0, 1, 1, 2, 2, 3, 1, 2, 3, 3, 3], are as consistent
(.96) but not symmetric: .34; [0, 1, 0, 1, 2, 3, 2, 3] * 2 is as inconsistent as mix .6: .13.

Writes out/toy/toy_flow.png, toy_flow.gif and toy_flow.tsv.
"""
import math, time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from flow import euler, flow_loss, guided
from metrics import energy_distance
from plumbing.config import (at_least, atomic, field, generator, one_line_errors, parse, require,
                             setup)
from plumbing.draw import GRAY, INK, Canvas, Plane, chart, save_gif


@dataclass
class Config:
    """The flags of `python toy_flow.py`."""
    preset: str = field("default", "a named set of the flags below")
    out: str = field("out/toy", "folder for the figure, the animation and the table")
    steps: int = field(1000, "training steps of each MLP")
    batch: int = field(512, "points per training step")
    samples: int = field(2000, "points integrated for the measurements, over all four classes")
    seeds: int = field(5, "repetitions: data, noise and initial weights all change")
    seed: int = field(0, "the first of the seeds")
    scale: float = field(1.0, "classifier-free guidance; 1 is the plain conditional model")

    def check(self):
        """ValueError for impossible values."""
        at_least(self, steps=1, batch=1, samples=40, seeds=1, seed=0)
        require(0 <= self.scale <= 10, "--scale must lie between 0 and 10")


PRESETS = dict(
    # One CPU core, 28 s, exact flow, separable / entangled: consistency .973 +-.002 / .048 +-.016,
    # straightness .955 +-.001 / .757 +-.002, distance at 5 steps .138 +-.002 / .711 +-.033.
    default=dict(),
    # One CPU core, 5 s: the exact flow as above, the MLPs hardly trained.
    debug=dict(out="out/toy_debug", steps=40, batch=128, samples=400, seeds=2),
)

# ---------------------------------------------------------------- EDIT HERE for ablations

GRID = torch.tensor([-2.25, -0.75, 0.75, 2.25])       # in standard deviations of the noise
CENTERS = torch.stack([GRID.repeat(4), GRID.flip(0).repeat_interleave(4)], 1)    # (16, 2)
SPREAD = 0.15                                         # standard deviation of a cell
# The class of each cell, row by row from the top.
# ---- EXERCISE 4: half entangled ----
SEPARABLE = torch.tensor([0, 0, 1, 1,  0, 0, 1, 1,  2, 2, 3, 3,  2, 2, 3, 3])
# A small Sudoku, as even as sixteen cells allow: the mean of every class is the origin.  A single
# Euler step always ends at the class mean, so here it is useless.
ENTANGLED = torch.tensor([0, 1, 2, 3,  2, 3, 0, 1,  1, 0, 3, 2,  3, 2, 1, 0])
MIXES = (0.0, 0.3, 0.6, 1.0)                          # must include 0 and 1, for the figure
STEPS = (1, 2, 3, 5, 10, 20)

CLASSES, NULL = 4, 4                                  # NULL: the index that means "no class"
FINE = 200                                            # steps of the reference solution
MEASURE = 10 ** 9                                     # a "step" for rng that no training reaches


def points(n, mix, rng):
    """n targets x1 (n, 2) and labels y (n,).  The same rng gives the same points for every mix:
    two runs differ only in their labels."""
    cell = torch.randint(16, (n,), generator=rng)
    x1 = CENTERS[cell] + SPREAD * torch.randn(n, 2, generator=rng)
    swap = torch.rand(n, generator=rng) < mix
    return x1, torch.where(swap, ENTANGLED[cell], SEPARABLE[cell])


def cell_weights(mix):
    """p(cell | class) -> (5, 16); the last row, for no class, is always uniform."""
    sep, ent = (nn.functional.one_hot(a, CLASSES).T / 4 for a in (SEPARABLE, ENTANGLED))
    return torch.cat([(1 - mix) * sep + mix * ent, torch.full((1, 16), 1 / 16)])


# ---------------------------------------------------------------- the two velocities


class Exact:
    """E[x1 - x0 | xt = x, y] when each class is a mixture of Gaussians: nothing is learned."""

    def __init__(self, mix):
        self.log_w = cell_weights(mix).log()

    def __call__(self, x, t, y):
        """x (B, 2), t (B,), y (B,) -> velocity (B, 2)."""
        t = t[:, None]
        # In cell k, xt ~ N(t m_k, var I) with var = (1 - t)^2 + t^2 s^2.  Bayes' rule gives the
        # probability of each cell (|x|^2 is common to all and cancels).  Given the cell, xt and
        # x1 - x0 are jointly Gaussian, and the expectation is linear in x.
        var = (1 - t) ** 2 + (t * SPREAD) ** 2
        fit = (t * (x @ CENTERS.T) - t ** 2 * CENTERS.square().sum(1) / 2) / var     # (B, 16)
        mean = (self.log_w[y] + fit).softmax(1) @ CENTERS                            # (B, 2)
        return mean + (t * SPREAD ** 2 - (1 - t)) / var * (x - t * mean)


class MLP(nn.Module):
    """The learned velocity: position and time, plus an embedding of the class."""

    def __init__(self, width=64):
        super().__init__()
        self.inp, self.cls = nn.Linear(3, width), nn.Embedding(CLASSES + 1, width)
        self.net = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                 nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, t, y):
        """x (B, 2), t (B,), y (B,) -> velocity (B, 2)."""
        return self.net(self.inp(torch.cat([x, t[:, None]], 1)) + self.cls(y))


def train(mix, seed, steps, batch):
    """-> an MLP trained on one labeling; seed determines points, noise, times, initial weights."""
    torch.manual_seed(seed)                               # for the initial weights only
    model = MLP()
    opt = torch.optim.Adam(model.parameters(), fused=True)
    for step in range(steps):
        rng = generator(seed, step)                       # the same for every mix
        x1, y = points(batch, mix, rng)
        # One label in ten is hidden: classifier-free guidance needs an unconditional model too.
        y = torch.where(torch.rand(batch, generator=rng) < 0.1, NULL, y)
        # Half a cosine from 0.02 to 0: without the decay the ends of the paths stay ragged.
        opt.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / steps))
        loss = flow_loss(model, x1, y, generator=rng)[0].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model.eval()


# ---------------------------------------------------------------- measurements


def measure(model, mix, seed, samples, scale):
    """Integrate the same noise with few steps and with many -> (dict of numbers, y (n,), path).

    path (FINE + 1, n, 2) is the fine solution.  Lengths are in standard deviations of the noise.
    """
    rng, each = generator(seed, MEASURE), samples // CLASSES
    # Noise is drawn first, so that it does not depend on the labels.
    y = torch.arange(CLASSES).repeat_interleave(each)
    x0 = torch.randn(len(y), 2, generator=rng)
    cells = cell_weights(mix)[:CLASSES].multinomial(2 * each, True, generator=rng)
    real = CENTERS[cells] + SPREAD * torch.randn(*cells.shape, 2, generator=rng)
    real, again = real.split(each, 1)                     # two samples (4, n / 4, 2) for the floor
    velocity, path = guided(model, y, NULL, scale), []
    fine = euler(velocity, x0, FINE, callback=lambda i, t, x: path.append(x))
    path = torch.stack(path)

    # Consistency is the resultant length: the norm of the mean of a class's unit vectors, 1 if all
    # travel in one direction, 0 if they cancel.  A mean angle would be undefined where they cancel.
    direction = nn.functional.normalize(fine - x0, dim=1).view(CLASSES, each, 2)
    # Straightness is displacement / path length: 1 for a straight path.
    straight = (fine - x0).norm(dim=1) / path.diff(dim=0).norm(dim=2).sum(0)
    found = dict(consistency=direction.mean(1).norm(dim=1).mean().item(),
                 straightness=straight.mean().item())

    def apart(x, y):
        """Class by class: if pooled, a point that ends in another class would not count."""
        return float(np.mean([energy_distance(a, b) for a, b in zip(x.view_as(y), y)]))
    cell = lambda x: torch.cdist(x, CENTERS).argmin(1)
    for n in STEPS:
        x = euler(velocity, x0, n)
        error, moved = (x - fine).square().sum(1), cell(x) != cell(fine)
        found[f"rmse@{n}"] = error.mean().sqrt().item()
        found[f"moved@{n}"] = moved.double().mean().item()
        found[f"within@{n}"] = (error * ~moved).mean().sqrt().item()     # the rest: moved points
        found[f"energy@{n}"] = apart(x, real)
    return found | {f"energy@{FINE}": apart(fine, real), "floor": apart(again, real)}, y, path


def experiment(c):
    """Train and measure every labeling with every seed -> two dicts.

    table: (velocity, mix, quantity) -> (mean, std) over the seeds; shown: mix -> the y and path of
    `measure`, x1 and labels of `points`, for the figure: the exact flow of the first seed.
    """
    table, shown, start = {}, {}, time.time()
    for mix in MIXES:
        runs = dict(learned=[], exact=[])
        for seed in range(c.seed, c.seed + c.seeds):
            model = train(mix, seed, c.steps, c.batch)
            for kind, velocity in dict(learned=model, exact=Exact(mix)).items():
                found, y, path = measure(velocity, mix, seed, c.samples, c.scale)
                runs[kind].append(found)
            shown.setdefault(mix, (y, path, *points(1200, mix, generator(seed, MEASURE + 1))))
        for kind, found in runs.items():
            for key in found[0]:
                values = torch.tensor([f[key] for f in found], dtype=torch.float64)
                std = values.std().item() if len(values) > 1 else math.nan
                table[kind, mix, key] = values.mean().item(), std
        print(f"  mix {mix:.1f} done, {time.time() - start:.0f} s", flush=True)
    return table, shown


# ---------------------------------------------------------------- the figure

COLORS = ("#2f6fb7", "#e07b28", "#2c9a62", "#a8438f")             # one for each class
SIDES = {0.0: ("separable: a class is a region", INK),
         1.0: ("entangled: a class is everywhere", "#d0342c")}
EXTENT = 3.05                                                     # panels show [-3.05, 3.05]^2


def flow_panel(side, shown, each=14, now=FINE, tail=FINE, dot=3.4, every=2):
    """Noise, targets and `each` paths per class: their last `tail` steps before state `now`."""
    y, path, x1, labels = shown
    plane = Plane(side, EXTENT)
    plane.scatter(x1, labels, [color + "58" for color in COLORS], 2)
    plane.dots(path[0, ::every], "#00000026", 1.6)
    # The first few of each class: the same noise in both panels.
    few = torch.cat([(y == c).nonzero()[:each, 0] for c in range(CLASSES)])
    plane.paths(path[now - tail:now + 1, few], y[few], COLORS, dot, starts=tail == FINE)
    return plane


def field_panel(side, shown, c):
    """The mean velocity of all paths of class c at each position, over all times."""
    y, path, x1, labels = shown
    plane, path = Plane(side, EXTENT), path[:, y == c]
    plane.dots(x1[labels == c], COLORS[c] + "58", 1.6)
    plane.mean_arrows(path[:-1].flatten(0, 1), path.diff(dim=0).flatten(0, 1) * FINE, COLORS[c],
                      length=0.22)
    return plane


def figure(shown, table):
    """The README's figure, from the results of `experiment` -> Pillow image."""
    canvas = Canvas(1600, 912)
    canvas.text(40, 22, "Same points, same noise; only the labels differ", 34)
    canvas.text(1190, 34, "black: noise, faint: targets, lines: the exact flow", 19, GRAY, "ra")
    for left, (mix, (name, color)) in zip((40, 630), SIDES.items()):
        number = lambda key: f"{table['exact', mix, key][0]:.2f}"
        canvas.text(left, 80, name, 24, color)
        canvas.paste(flow_panel(560, shown[mix]), left, 116)
        canvas.text(left, 688, f"direction consistency {number('consistency')}", 25, color)
        canvas.text(left + 560, 688, f"straightness {number('straightness')}", 25, color, "ra")
        for c in range(CLASSES):
            canvas.paste(field_panel(131, shown[mix], c), left + 143 * c, 734)
        canvas.text(left, 876, "mean velocity at each place, one class at a time", 19, GRAY)
    # Unbiased, the floor is 0 up to chance; shown is its mean plus one standard deviation, or the
    # larger of the two labelings'.
    floor = max(np.nan_to_num(table["exact", mix, "floor"]).sum() for mix in SIDES)
    for top, title, key, limits, shade in (
            (80, "distance to the 200-step solution", "rmse", (0.02, 4), None),
            (476, "energy distance to real points", "energy", (8e-4, 4),
             (floor, "real against real"))):
        series = [("", color, kind == "exact", [[table[kind, mix, f"{key}@{n}"][0]] for n in STEPS])
                  for mix, (_, color) in SIDES.items() for kind in ("exact", "learned")]
        canvas.paste(chart(title, series, STEPS, "Euler steps", 376, 396, limits=limits,
                           floor=shade), 1210, top)
    canvas.text(1256, 876, "thin: exact, thick: learned", 19, GRAY)
    return canvas.done()


def animation(shown, frames=40):
    """The exact flow from noise to targets -> a list of images with one palette."""
    images = []
    for now in np.linspace(0, FINE, frames).round().astype(int).tolist():
        canvas = Canvas(800, 446)
        for left, (mix, (name, color)) in zip((10, 410), SIDES.items()):
            canvas.text(left, 12, name, 20, color)
            canvas.paste(flow_panel(380, shown[mix], 50, now, min(now, 14), 2.6, 6), left, 44)
        canvas.line([(10, 436), (10 + 780 * now / FINE, 436)], INK, 3)
        images.append(canvas.done())
    # One palette for all frames and no dithering: pixels that do not change take no bytes.
    palette = images[frames // 2].quantize(64)
    return [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]


# ---------------------------------------------------------------- main


def show(title, table, keys):
    """Print a row for each velocity and mix, a column for each key."""
    print(f"\n{title}\n{'':17}" + "".join(f"{key.split('@')[-1]:>15}" for key in keys))
    for kind in ("exact", "learned"):
        for mix in MIXES:
            cells = [table[kind, mix, key] for key in keys]
            print(f"{kind:>8}  mix {mix:3.1f}" + "".join(f"{m:8.3f} +-{s:.3f}" for m, s in cells))


def main(argv=None):
    """The command line: train, measure, print, draw."""
    c, start = parse(Config, PRESETS, argv), time.time()
    setup("cpu", threads=1)               # matrices this small gain nothing from more threads
    size = sum(p.numel() for p in MLP().parameters())
    print(f"toy_flow: {len(MIXES)} labelings x {c.seeds} seeds; MLP of {size:,} parameters, "
          f"{c.steps} steps of {c.batch}; cpu x 1 thread, float32")
    table, shown = experiment(c)
    print(f"\nmean +- standard deviation over {c.seeds} seeds, {c.samples} points each")
    show("within a class; both are at most 1", table, ["consistency", "straightness"])
    show(f"distance to the {FINE}-step solution from the same noise, by Euler steps (root "
         "mean square; the noise has a std of 1 per axis)", table, [f"rmse@{n}" for n in STEPS])
    show("fraction of points that end in another cell than with many steps", table,
         [f"moved@{n}" for n in STEPS])
    show("the same distance, if those points had none", table, [f"within@{n}" for n in STEPS])
    show("energy distance to real points of the class, by Euler steps; floor: real against real",
         table, [f"energy@{n}" for n in (*STEPS, FINE)] + ["floor"])

    out = Path(c.out)
    rows = ["velocity\tmix\tquantity\tmean\tstd\tseeds\n"]
    rows += ["\t".join(map(str, k)) + f"\t{mean:.6f}\t{std:.6f}\t{c.seeds}\n"
             for k, (mean, std) in table.items()]
    atomic(out / "toy_flow.tsv", lambda file: Path(file).write_text("".join(rows)))
    atomic(out / "toy_flow.png", figure(shown, table).save)
    frames = animation(shown)
    save_gif(out / "toy_flow.gif", frames, [600] + [60] * (len(frames) - 2) + [1800])
    print()
    for kind in ("exact", "learned"):
        for mix, (name, _) in SIDES.items():
            for key in ("consistency", "straightness", "rmse@5"):
                print(f"{kind}_{name.split(':')[0]}_{key.replace('@', '_')}: "
                      f"{table[kind, mix, key][0]:.3f}")
    print(f"seconds: {time.time() - start:.0f}\nimage: {out / 'toy_flow.png'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
