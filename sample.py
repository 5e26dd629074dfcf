"""Stage 3: noise to pictures.  What the network looks like, the checkpoints say.

    python sample.py                              # a grid, a row a class, and its scores
    python sample.py --sweep 1,2,3,5,10,25,50     # how few steps are enough: a strip and a table
    python sample.py --gif                        # the way from noise to picture
    python sample.py --npz 50000 --seed 1         # for the ADM evaluator (FID)

Reads out/<preset>/ae.pt and dit.pt; writes samples.png, sweep.png and sweep.tsv, trajectory.gif,
samples.npz beside them.  N steps are N evaluations of the model, 2 N with guidance (NFE).
On `shapes` samples are scored by the judge of metrics.py, which shares nothing with the encoder.
"""
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import config
from ae import load_ae, save_grid, to_uint8
from config import UserError, field, require
from data import load_images, to_float
from dit import check_shift, load_dit, resolve_shift
from flow import euler, guided, heun
from metrics import judge_images, load_judge, score

# Letters: B batch, C latent channels, h w latent grid, S picture side.


@dataclass
class Config:
    """Stage 3."""
    preset: str = field("shapes", "whose folder to read, when --out is not given")
    out: str = field("", "the folder that stages 1 and 2 wrote; out/<preset> if empty")
    steps: int = field(10, "sampler steps")
    scale: float = field(2.0, "guidance; 1: none")
    t_lo: float = field(0.0, "guide from this time on (0 is noise)")
    t_hi: float = field(1.0, "guide up to this time (1 is data)")
    shift: str = field("", "time shift of the steps, a number or auto; empty: the DiT's own")
    sampler: str = field("euler", "euler, or heun: second order, twice the evaluations",
                         ("euler", "heun"))
    seed: int = field(0, "the same seed is the same noise, at any number of steps")
    classes: str = field("", "names or numbers with commas between; all (ten at most) if empty")
    columns: int = field(16, "pictures a class in the grid")
    n: int = field(1000, "samples that are scored (shapes only); 0: none")
    sweep: str = field("", "numbers of steps with commas between: strip picture and table")
    gif: bool = field(False, "write the trajectory as an animation")
    npz: int = field(0, "write that many samples, classes drawn evenly, to samples.npz")
    batch: int = field(250, "samples at a time")
    device: str = field("auto", "cuda, cpu, ...; auto takes a GPU when there is one")

    def check(self):
        """Impossible values end here."""
        for name in ("steps", "columns", "batch"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        if self.shift:
            check_shift("--shift", self.shift)
        for name in ("n", "npz", "seed"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative")
        require(0 <= self.t_lo <= self.t_hi <= 1, "0 <= --t_lo <= --t_hi <= 1 is wanted")
        require(all(s.strip().isdigit() and int(s) for s in self.sweep.split(",") if self.sweep),
                "--sweep must be whole numbers with commas between, such as 1,2,5,10")


PRESETS = {"shapes": dict(), "debug": dict(steps=2, columns=2, n=100),
           "imagenette": dict(steps=25, columns=4, batch=16)}      # not run on real weights

# ---------------------------------------------------------------- the sampler


@torch.no_grad()
def generate(model, ae, labels, steps=10, scale=1.0, shift=None, seed=0, sampler=euler,
             t_range=(0.0, 1.0), batch=250, callback=None):
    """Draw one picture a label -> uint8 (B, 3, S, S) on the CPU.

    model, ae: from load_dit and load_ae; labels int64 (B,), `model.classes` for none; steps, scale:
    of the sampler and the guidance; shift None: the one the model was made for; seed: of the noise,
    drawn on the CPU so that every device starts from the same; callback(start, i, t, x) sees the
    states.  Raises UserError if the two belong to different runs.
    """
    labels = torch.as_tensor(labels)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= model.classes:
        raise ValueError(f"labels must be in 0..{model.classes}")
    if getattr(model, "ae", None) not in (None, getattr(ae, "fingerprint", None)):
        raise UserError("the DiT learned the latents of another autoencoder than this one")
    shift = shift or getattr(model, "sample_shift", 1.0)
    device = next(model.parameters()).device
    _, autocast = config.setup(device)
    side = ae.image_size // ae.patch
    noise = torch.randn(len(labels), model.channels, side, side,
                        generator=config.generator(seed))
    images = []
    for start in range(0, len(labels), batch):
        y = labels[start:start + batch].to(device)
        see = callback and (lambda i, t, x, start=start: callback(start, i, t, x))
        with autocast():
            velocity = guided(model, y, model.classes, scale, t_range)
            z = sampler(velocity, noise[start:start + batch].to(device), steps, shift, see)
            images.append(to_uint8(ae.decode(z)))
    return torch.cat(images)


def load(out, device):
    """-> (DiT, AutoEncoder) of a folder; refuses two that do not belong together."""
    model, ae = load_dit(Path(out) / "dit.pt", device), load_ae(Path(out) / "ae.pt", device)
    if model.ae != ae.fingerprint:
        raise UserError(f"{out}/dit.pt learned the latents of another autoencoder than "
                        f"{out}/ae.pt; run `python dit.py --out {out} --overwrite`")
    return model, ae


def choose(text, names):
    """'disc,3' -> class numbers; all, or the first ten, if the text is empty."""
    if not text:
        return list(range(min(10, len(names))))
    chosen = []
    for part in (p.strip() for p in text.split(",")):
        if part in names:
            chosen.append(names.index(part))
        elif part.isdigit() and int(part) < len(names):
            chosen.append(int(part))
        else:
            raise UserError(f"--classes {part}: no such class; there are "
                            + ", ".join(names[:20]) + (" ..." if len(names) > 20 else ""))
    return chosen

# ---------------------------------------------------------------- scores


class Scorer:
    """The judge's view of samples: the share that it takes for the class asked for, and the Frechet
    distance of its features to those of 5,000 training pictures."""

    def __init__(self, ae, device):
        self.judge = load_judge(device=device)
        train, _, _ = load_images(ae.dataset, ae.image_size, "train", classes=ae.subset)
        self.reference, _ = judge_images(self.judge, torch.from_numpy(train[:5000].copy()))
        held, self.labels, _ = load_images(ae.dataset, ae.image_size, "test", classes=ae.subset)
        self.held, self.ae, self.device = held, ae, device

    def __call__(self, images, labels):
        """uint8 (B, 3, S, S), labels (B,) -> dict(accuracy, frechet, ...)"""
        return score(self.judge, images, labels, self.reference)

    def floors(self, n):
        """What perfect samples would score: held-out pictures, and those once through the
        autoencoder."""
        n = min(n, len(self.held))
        real = torch.from_numpy(self.held[:n].copy())
        _, autocast = config.setup(self.device)
        with autocast():
            back = torch.cat([to_uint8(self.ae.decode(self.ae.encode(
                to_float(self.held, slice(i, min(n, i + 250)), None, self.device))))
                for i in range(0, n, 250)])
        return dict(real=self(real, self.labels[:n]), decoded=self(back, self.labels[:n]))


def even(classes, n):
    """n labels, every class equally often (but for a remainder), in order."""
    return torch.tensor(classes).repeat_interleave(-(-n // len(classes)))[:n]

# ---------------------------------------------------------------- the command


def main(argv=None):
    """The command line."""
    c = config.parse(Config, PRESETS, argv)
    device, _ = config.setup(c.device)
    model, ae = load(c.out, device)
    out, classes = Path(c.out), choose(c.classes, ae.classes)
    shift = resolve_shift(c.shift, ae) if c.shift else model.sample_shift
    options = dict(scale=c.scale, shift=shift, seed=c.seed, batch=c.batch,
                   sampler=heun if c.sampler == "heun" else euler, t_range=(c.t_lo, c.t_hi))
    nfe = c.steps * (2 if c.sampler == "heun" else 1) * (2 if c.scale != 1 else 1)
    print(f"stage 3 on {config.describe(device)}; {c.steps} {c.sampler} steps (NFE {nfe}), "
          f"guidance {c.scale:g}, shift {shift:g}, seed {c.seed}; DiT of step {model.step}")
    scorer = Scorer(ae, device) if c.n and ae.dataset == "shapes" else None

    labels = torch.tensor(classes).repeat_interleave(c.columns)
    save_grid(out / "samples.png", generate(model, ae, labels, c.steps, **options), c.columns)
    print(f"wrote {out / 'samples.png'}: a row each of "
          + ", ".join(ae.classes[k] for k in classes))
    if scorer:
        labels = even(classes, c.n)
        began = time.time()
        images = generate(model, ae, labels, c.steps, **options)
        seconds = time.time() - began
        floors, result = scorer.floors(c.n), scorer(images, labels)
        print(f"n: {c.n}\nsamples_per_second: {c.n / seconds:.0f}")
        for name, row in (("sample", result), ("decoded_real", floors["decoded"]),
                          ("real", floors["real"])):
            print(f"{name}_accuracy: {row['accuracy']:.3f}\n{name}_frechet: {row['frechet']:.2f}")
    if c.sweep:
        sweep(c, model, ae, classes, options, scorer)
    if c.gif:
        trajectory(out / "trajectory.gif", model, ae, classes, c.steps, options)
    if c.npz:
        write_npz(out / "samples.npz", model, ae, c, options)


def sweep(c, model, ae, classes, options, scorer):
    """sweep.png: a row a number of steps, the same noise; sweep.tsv: scores with and without
    guidance."""
    counts = [int(s) for s in c.sweep.split(",")]
    out, rows = Path(c.out), []
    labels = torch.tensor(classes).repeat_interleave(max(1, 20 // len(classes)))
    strip = torch.cat([generate(model, ae, labels, n, **options) for n in counts])
    save_grid(out / "sweep.png", strip, len(labels))
    lines = ["steps\tscale\tnfe\taccuracy\tfrechet\tn\tseed\tshift"]
    if scorer:
        labels = even(classes, c.n)
        print("steps  guidance  accuracy  Frechet")
        for n in counts:
            for scale in dict.fromkeys((1.0, c.scale)):
                images = generate(model, ae, labels, n, **{**options, "scale": scale})
                row = scorer(images, labels)
                nfe = n * (2 if c.sampler == "heun" else 1) * (2 if scale != 1 else 1)
                print(f"{n:5d}  {scale:8g}  {row['accuracy']:8.3f}  {row['frechet']:7.2f}")
                lines.append(f"{n}\t{scale:g}\t{nfe}\t{row['accuracy']:.4f}\t{row['frechet']:.4f}"
                             f"\t{c.n}\t{c.seed}\t{options['shift']:g}")
        config.atomic(out / "sweep.tsv", lambda t: Path(t).write_text("\n".join(lines) + "\n"))
    print(f"wrote {out / 'sweep.png'}: a row each of {c.sweep} steps")


def trajectory(path, model, ae, classes, steps, options):
    """An animation of the states from noise to picture, each decoded as if it were a latent."""
    frames = []
    device = next(model.parameters()).device
    _, autocast = config.setup(device)

    def see(start, i, t, x):
        with autocast():
            sheet = to_uint8(ae.decode(x))
        side, columns = ae.image_size, 5
        sheet = sheet.view(-1, columns, 3, side, side).permute(0, 3, 1, 4, 2)
        picture = Image.fromarray(sheet.reshape(-1, columns * side, 3).numpy())
        zoom = max(1, 64 // side)
        frames.append(picture.resize((picture.width * zoom, picture.height * zoom), 0))
    labels = torch.tensor(classes).repeat_interleave(5)
    generate(model, ae, labels, max(20, steps), callback=see, **{**options, "batch": len(labels)})
    durations = [80] * (len(frames) - 1) + [1500]
    config.atomic(path, lambda t: frames[0].save(t, "GIF", save_all=True, loop=0,
                                                   append_images=frames[1:], duration=durations))
    print(f"wrote {path}")


def write_npz(path, model, ae, c, options):
    """samples.npz in the layout that ADM's evaluator reads: arr_0 uint8 (n, S, S, 3), and arr_1 the
    labels."""
    labels = torch.arange(c.npz) % model.classes
    images = np.empty((c.npz, ae.image_size, ae.image_size, 3), np.uint8)
    for k, start in enumerate(range(0, c.npz, c.batch)):
        part = generate(model, ae, labels[start:start + c.batch], c.steps,
                        **{**options, "seed": c.seed + k * 1_000_003})
        images[start:start + c.batch] = part.permute(0, 2, 3, 1).numpy()
    config.atomic(path, lambda t: np.savez(t, arr_0=images, arr_1=labels.numpy()))
    print(f"wrote {path}: {images.shape} uint8")


if __name__ == "__main__":
    with config.one_line_errors():
        main()
