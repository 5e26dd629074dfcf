"""Stage 3: draw images from noise and score them.

    python sample.py                              # 16 s on two CPU cores: a grid and its scores
    python sample.py --sweep 1,2,3,5,10,25,50     # how few steps are enough: images and a table
    python sample.py --gif                        # the path from noise to image, animated
    python sample.py --npz 50000 --seed 1         # for ADM's evaluator (FID)

Reads out/<preset>/dit.pt and its autoencoder (until you train the default: weights/shapes, which
ships); writes samples.png (another setting's is named by what differs, such as samples-scale1.png),
sweep.png and sweep.tsv (the paper's Figure 8a and Table 2a), trajectory.gif and samples.npz to
out/<preset>.  Samples are scored by the rulers of metrics.py, which share nothing with the encoder;
those that know classes need a judge of these classes, judge*.pt in the same folder or in weights/
(`python -m lab.judge`).  NFE is the number of model evaluations per sample: one for each step, two
with guidance.

For editing and interpolation see `python -m lab.edit --help`.
"""
import re, shlex, time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ae import at_once, load_ae
from data import DRAWN, evenly, load_images, to_float, to_uint8
from dit import check_pair, check_shift, load_dit, resolve_shift
from flow import ab2, euler, guided, heun, times
from metrics import JUDGE, PREDICTOR, Rulers, find_judge
from plumbing import config
from plumbing.config import UserError, at_least, field, require
from plumbing.draw import grid_image, save_gif, save_grid

# Letters: B batch, C latent channels, h w latent grid, S image side.

# ---- EXERCISE 2: midpoint ----
SAMPLERS = dict(ab2=ab2, euler=euler, heun=heun)


@dataclass
class Config:
    """Stage 3."""
    preset: str = field("shapes", "the preset whose folder is read if --out is empty")
    out: str = field("", "the folder that stage 2 wrote; out/<preset> if empty")
    steps: int = field(10, "sampler steps", also=["nfe"])
    scale: float = field(3.0, "guidance scale; 1: no guidance", also=["guidance", "cfg"])
    weak: str = field("", "an early state of the DiT, dit_1000.pt of `dit.py --keep 1000`, to "
                      "guide away from; empty: only from no class")
    t_lo: float = field(0.0, "guide from this time on (0 is noise)")
    t_hi: float = field(1.0, "guide up to this time (1 is data)")
    shift: str = field("", "time shift of the steps, a number or auto; empty: the DiT's own")
    sampler: str = field("ab2", "euler: first order; ab2: second order at the same cost; heun: "
                         "second order, two evaluations per step", tuple(SAMPLERS))
    seed: int = field(0, "seed of the noise; the noise is the same for any number of steps")
    classes: str = field("", "of the grids: names or numbers, with commas; empty: all, ten at "
                       "most; scores are of all")
    columns: int = field(16, "images per class in the grid")
    n: int = field(1000, "samples to score; of photographs at most as many as are held out; 0: "
                   "none", also=["samples"])
    sweep: tuple = field((), "numbers of steps to compare: a grid and a table")
    gif: bool = field(False, "write the trajectories as an animation")
    npz: int = field(0, "write this many samples, balanced over the classes, to samples.npz")
    batch: int = field(250, "samples at a time")
    device: str = field("auto", "cuda, cpu, ...; auto uses a GPU when there is one")
    precision: str = field("auto", "of the networks; auto: bf16 where it is fast, fp16 on a GPU "
                           "without it, else float32", ("auto", *config.PRECISIONS))

    def check(self):
        """ValueError for impossible values."""
        at_least(self, steps=1, columns=1, batch=1, n=0, npz=0, seed=0)
        require(0 <= self.t_lo <= self.t_hi <= 1, "0 <= --t_lo <= --t_hi <= 1 must hold")
        require(all(self.sweep), "--sweep: every number of steps must be at least 1")
        if self.shift:
            check_shift("--shift", self.shift)


PRESETS = {
    "shapes": dict(),          # 2 CPU cores, 16 s
    "debug": dict(steps=2, columns=2, n=100),              # noise, but all code runs
    # One shared core: 8 samples/s. To the eye clearer than guidance 2 without `weak`, which scores
    # better (RESULTS.md, Photographs).
    "photos": dict(columns=10, scale=2.5, weak="dit_1000.pt"),
    "imagenette": dict(steps=25, columns=4, batch=16),     # not run on real weights
}

# ---------------------------------------------------------------- load and generate

# the default, trained; `python -m lab.ship` wrote it
SHIPPED = Path(__file__).parent / "weights" / "shapes"


def find_run(c):
    """-> the folder to read the models from: --out; but SHIPPED, which is announced, if --out was
    not given and stage 1 of the default has not been started."""
    started = [*Path(c.out).glob("ae.*"), *Path(c.out).glob("dit.*")]
    if started or "out" in c.explicit or c.preset != "shapes":
        return c.out
    print(f"{c.out}: nothing trained yet, so these are the weights that ship, weights/shapes; "
          "`python ae.py && python dit.py` trains your own")
    return SHIPPED


def load(out, device="cpu"):
    """The models of a folder -> DiT, AutoEncoder.

    The autoencoder is the one whose latents the DiT learned: out/ae.pt, or ae.pt where stage 2 read
    it (`dit.py --ae`).  Raises UserError if a file is missing or unreadable.
    """
    model = load_dit(Path(out) / "dit.pt", device)
    for folder in (Path(out), Path(model.ae_folder)):
        if (folder / "ae.pt").is_file():
            ae = load_ae(folder / "ae.pt", device)
            if ae.fingerprint == model.ae_fingerprint:
                return model, ae
    return model, load_ae(Path(out) / "ae.pt", device)             # `generate` will refuse it


def load_weak(c, folder, device):
    """The early state of the DiT that --weak names, or None; says so if only the preset names it
    and it is not there.  Raises UserError."""
    if not c.weak:
        return None
    path = Path(folder) / c.weak
    if not path.is_file() and "weak" not in c.explicit:
        return print(f"guided away from no class only, because there is no {path}")
    return load_dit(path, device)


def draw_noise(model, ae, n, seed):
    """The starting points of n samples, (n, C, h, w), on the CPU: the same on every device."""
    side = ae.image_size // ae.patch
    return torch.randn(n, model.channels, side, side, generator=config.generator(seed))


@torch.no_grad()
def generate(model, ae, labels, steps=10, scale=1.0, shift=None, seed=0, sampler=ab2,
             t_range=(0.0, 1.0), batch=250, callback=None, noise=None, precision="auto", weak=None):
    """Draw one image per label -> uint8 (B, 3, S, S) on the CPU.

    model, ae: from `load`; labels: int64 (B,), `model.classes` means no class; steps, sampler,
    scale, t_range, weak: as in flow.py; shift: of the times, None for the model's own; seed: of the
    noise, unless `noise` (B, C, h, w) is given; batch: samples at a time; callback(start, i, t, x)
    gets the states of the samples from `start` on; precision: of the networks.

    Raises ValueError for labels outside 0..classes, UserError if `model` or `weak` was trained on
    the latents of another autoencoder.
    """
    for trained in (model, weak) if weak else (model,):
        check_pair(trained, ae)
    labels = torch.as_tensor(labels)
    if not ((labels >= 0) & (labels <= model.classes)).all():
        raise ValueError(f"labels must be in 0..{model.classes}")
    noise = draw_noise(model, ae, len(labels), seed) if noise is None else noise
    shift = shift or getattr(model, "sample_shift", 1.0)
    device, autocast = config.setup(next(model.parameters()).device, precision=precision)
    images = []
    for start in range(0, len(labels), batch):
        x, y = (a[start:start + batch].to(device) for a in (noise, labels))
        see = callback and (lambda i, t, x, start=start: callback(start, i, t, x))
        with autocast():
            # ---- EXERCISE 10: guided_star ----
            velocity = guided(model, y, model.classes, scale, t_range, weak)
            z = sampler(velocity, x, steps, shift, see)                        # (B, C, h, w)
            images.append(to_uint8(ae.decode(z)))
    return torch.cat(images)


def measure(model, ae, labels, **options):
    """`generate` -> images, seconds, NFE (counted, not computed from the number of steps)."""
    sizes = []                                          # of the batches that the models evaluate
    hooks = [m.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
             for m in (model, options.get("weak")) if m]
    began = time.time()
    images = generate(model, ae, labels, **options)
    for hook in hooks:
        hook.remove()
    return images, time.time() - began, sum(sizes) / len(labels)


def choose(text, names, flag="--classes"):
    """'disc,3' -> class numbers; '' -> all, ten at most.  UserError: no such class."""
    numbers = {str(k): k for k in range(len(names))} | {name: k for k, name in enumerate(names)}
    parts = [part.strip() for part in text.split(",")] if text else [*map(str, range(len(names)))]
    for part in parts:
        if part not in numbers:
            raise UserError(f"{flag} {part}: no such class; there are "
                            + ", ".join(names[:20]) + (" ..." if len(names) > 20 else ""))
    return [numbers[part] for part in parts][:None if text else 10]


def balanced_labels(classes, n):
    """n > 0 labels in order, every class equally often (or one more time)."""
    return torch.tensor(classes)[torch.arange(n) * len(classes) // n]


def grid_name(c):
    """samples.png, or samples-steps5-scale1.png: the flags whose values differ from the preset's,
    so that the grid of one setting does not replace that of another."""
    usual, name = Config(**PRESETS[c.preset]), "samples"
    for flag in "steps scale weak t_lo t_hi shift sampler seed classes columns".split():
        value = getattr(c, flag)
        if value != getattr(usual, flag):
            name += f"-{flag}" + (f"{value:g}" if isinstance(value, float) else str(value))
    return re.sub(r"[^\w.,+-]", "_", name) + ".png"


def warn_if_unguided(c, shift):
    """Print a warning if the sampler evaluates no time from --t_lo to --t_hi."""
    at = torch.tensor(times(c.steps, shift)).tolist()   # in float32, as `guided` compares them
    outside = lambda t: max(c.t_lo - t, t - c.t_hi)
    nearest = min(at if c.sampler == "heun" else at[:-1], key=outside)
    if c.scale != 1 and outside(nearest) > 0:
        print(f"warning: nothing is guided: no step is at a time from --t_lo {c.t_lo:g} to --t_hi "
              f"{c.t_hi:g}; the nearest is at {nearest:.3f}")

# ---------------------------------------------------------------- scores

# a key of `Rulers` and the name under which it is printed
SCORES = dict(accuracy="accuracy", frechet="frechet", factors="factors_frechet",
              conv="conv_frechet", color="color_frechet", precision="precision", recall="recall",
              kid="kid")
# ---- EXERCISE 6: coverage ----


class Scorer(Rulers):
    """Scores samples, (uint8 (n, 3, S, S), labels (n,)), against 5,000 training images of the
    autoencoder's data set, and measures the floors.

    folder: where a judge of its classes may be, besides weights/; without one there is no accuracy
    and no frechet.  UserError: the data set is not there.
    """

    def __init__(self, ae, device="cpu", precision="auto", folder="."):
        self.ae, self.drawn = ae, ae.config.data in DRAWN
        judge = JUDGE if ae.config.data == "shapes" else find_judge(ae.class_names, folder)
        super().__init__(self.real_images("train", 5000)[0], device, judge,
                         PREDICTOR if self.drawn else None)
        _, self.autocast = config.setup(device, precision=precision)

    def real_images(self, split, n):
        """-> uint8 (n, 3, S, S), or all if there are fewer, in random order, and their labels."""
        c = self.ae.config
        images, labels, _ = load_images(c.data, self.ae.image_size, split, classes=c.classes)
        rows = torch.arange(len(labels))[:n]                        # `shapes` are in random order
        if not self.drawn:                                          # a folder is sorted by class
            rows = evenly(len(labels), n)
            rows = rows[torch.randperm(len(rows), generator=config.generator(0))]
        return torch.from_numpy(images[rows.numpy()]), labels[rows]

    def floors(self, n):
        """What perfect samples would score: n held-out images -> their scores after a pass through
        the autoencoder, and without it."""
        (held, labels), step = self.real_images("test", n), at_once(self.ae.image_size)
        with self.autocast():
            decoded = torch.cat([to_uint8(self.ae.decode(self.ae.encode(
                to_float(held.numpy(), slice(i, i + step), None, self.device))))
                for i in range(0, len(held), step)])
        return self(decoded, labels), self(held, labels)


FEWEST = 50                    # held-out images: the distances of fewer say little


def choose_scorer(c, ae, device):
    """-> a Scorer, or None if nothing can be scored; prints what is not scored and why.  Lowers
    --n to the number of held-out photographs: scores are comparable only at equal n."""
    if not c.n:
        return print("nothing is scored: --n is 0")
    try:
        scorer = Scorer(ae, device, c.precision, c.out)
        if ae.config.data == "shapes":
            return scorer
        held = len(load_images(ae.config.data, ae.image_size, "test", classes=ae.config.classes)[1])
    except UserError as error:                              # the folder of images is gone
        return print(f"nothing is scored: {error}")
    if held < FEWEST:
        return print(f"nothing is scored: {held} held-out images are too few")
    missing = [] if scorer.predictor else ["factors, known only of shapes"]
    if not scorer.judge:
        chosen = ["--classes", ae.config.classes] if ae.config.classes else []
        command = shlex.join(["python", "-m", "lab.judge", "--data", ae.config.data, *chosen,
                              "--size", str(ae.image_size), "--out", c.out])
        missing.append(f"accuracy and frechet: no judge*.pt in {c.out} or weights/ knows these "
                       f"classes; `{command}` trains one")
    if missing:
        print("not scored: " + "; ".join(missing))
    if held < c.n:
        print(f"--n {c.n}: {held} instead, as many as there are held-out images")
        c.n = held
    return scorer

# ---------------------------------------------------------------- the command


def main(argv=None):
    """The command line."""
    c = config.parse(Config, PRESETS, argv)
    device, autocast = config.setup(c.device, precision=c.precision)
    model, ae = load(folder := find_run(c), device)
    weak = load_weak(c, folder, device)
    out, classes = Path(c.out), choose(c.classes, ae.class_names)
    shift = resolve_shift(c.shift, ae) if c.shift else model.sample_shift
    # ---- EXERCISE 3: a function of t ----
    options = dict(steps=c.steps, scale=c.scale, shift=shift, seed=c.seed, batch=c.batch,
                   sampler=SAMPLERS[c.sampler], t_range=(c.t_lo, c.t_hi), weak=weak,
                   precision=c.precision)
    draw = partial(measure, model, ae, **options)       # labels -> images, seconds, NFE
    print(f"stage 3 on {config.describe(device, c.precision)}; DiT of step {model.step}; {c.steps} "
          f"{c.sampler} steps, guidance {c.scale:g}{f' away from {c.weak}' if weak else ''}, shift "
          f"{shift:g}, seed {c.seed}")
    warn_if_unguided(c, shift)
    if config.rank() == 0:                              # under torchrun only --npz is shared out
        show(c, draw, ae, classes, device)
        if c.gif:
            trajectory(out / "trajectory.gif", draw, ae, classes, c.steps, autocast)
    if c.npz:
        write_npz(out / "samples.npz", c, draw, ae, torch.arange(c.npz) % model.classes)


def show(c, draw, ae, classes, device):
    """The grid, the scores, and --sweep."""
    path = Path(c.out) / grid_name(c)
    images, _, nfe = draw(torch.tensor(classes).repeat_interleave(c.columns))
    save_grid(path, images, c.columns)
    print(f"wrote {path}: one row per class: "
          + ", ".join(ae.class_names[k] for k in classes) + f"\nnfe: {nfe:g}")
    scorer, every = choose_scorer(c, ae, device), range(len(ae.class_names))
    if scorer:
        print_scores(c, draw, every, scorer)
    if c.sweep:
        sweep(c, draw, every, scorer, classes)


def print_scores(c, draw, classes, scorer):
    """The scores of --n samples and, below them, their floors."""
    labels = balanced_labels(classes, c.n)
    images, seconds, _ = draw(labels)
    print(f"n: {c.n}\nsamples_per_second: {c.n / seconds:.0f}")
    rows = scorer(images, labels), *scorer.floors(c.n)
    for key in filter(rows[0].__contains__, SCORES):
        for name, row in zip(("sample", "decoded_real", "real"), rows):
            print(f"{name}_{SCORES[key]}: {row[key]:.3f}")


def sweep(c, draw, classes, scorer, shown=None):
    """sweep.png: one row per number of steps, from the same noise, of the classes `shown`, or all.
    sweep.tsv, if there is a scorer: scores with and without guidance."""
    out, shown = Path(c.out), shown or classes
    labels = torch.tensor(shown).repeat_interleave(max(1, 20 // len(shown)))
    rows = torch.cat([draw(labels, steps=steps)[0] for steps in c.sweep])
    save_grid(out / "sweep.png", rows, len(labels))
    print(f"wrote {out / 'sweep.png'}: one row per number of steps")
    if not scorer:
        print("no sweep.tsv, because nothing is scored")
        return
    labels, lines = balanced_labels(classes, c.n), []
    for steps in c.sweep:
        for scale in dict.fromkeys((1.0, c.scale)):
            images, _, nfe = draw(labels, steps=steps, scale=scale)
            row = scorer(images, labels)
            keys = [k for k in ("accuracy", "frechet", "conv", "recall") if k in row]
            found = "\t".join(f"{row[k]:.4f}" for k in keys)
            lines.append(f"{steps}\t{scale:g}\t{nfe:g}\t{found}\t{c.n}\t{c.seed}\t"
                         f"{draw.keywords['shift']:g}")
    header = "\t".join(["steps", "scale", "nfe", *keys, "n", "seed", "shift"])
    text = "\n".join([header, *lines]) + "\n"
    config.atomic(out / "sweep.tsv", lambda path: Path(path).write_text(text))
    print(f"wrote {out / 'sweep.tsv'}:\n{text.expandtabs(10)}", end="")


def trajectory(path, draw, ae, classes, steps, autocast):
    """An animation of the states from noise to image, each decoded as if it were a latent."""
    frames, columns = [], 5

    def see(start, i, t, x):
        with autocast():
            frames.append(grid_image(to_uint8(ae.decode(x)), columns))
    labels = torch.tensor(classes).repeat_interleave(columns)
    draw(labels, steps=max(20, steps), batch=len(labels), callback=see)
    save_gif(path, frames, [80] * (len(frames) - 1) + [1500])
    print(f"wrote {path}")


def write_npz(path, c, draw, ae, labels):
    """samples.npz in the layout of ADM's evaluator: arr_0 uint8 (n, S, S, 3), arr_1 the labels.
    Under torchrun each process draws every world-th batch; the samples are the same."""
    array, shape = path.with_suffix(".npy"), (len(labels), ae.image_size, ae.image_size, 3)

    def fill(images):
        for k in range(config.rank(), -(-len(labels) // c.batch), config.world()):
            part = slice(k * c.batch, (k + 1) * c.batch)
            drawn, _, _ = draw(labels[part], seed=c.seed + k * 1_000_003)
            images[part] = drawn.permute(0, 2, 3, 1).numpy()
    config.atomic_array(array, shape, np.uint8, fill)
    if config.rank() == 0:
        images = np.load(array, mmap_mode="r")
        config.atomic(path, lambda part: np.savez(part, arr_0=images, arr_1=labels.numpy()))
        array.unlink()
    print(f"wrote {path}: uint8 {shape}")


if __name__ == "__main__":
    with config.one_line_errors():
        main()
