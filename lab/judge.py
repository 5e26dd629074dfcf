"""Train the CNNs that score samples; the model is in metrics.py.

A judge learns to classify images; for `shapes` there is another network, which predicts all factors
of an image.  sample.py finds the judge of its classes, judge*.pt in its --out or in weights/.

    python -m lab.judge                     reports that the shipped weights/judge.pt is finished
    python -m lab.judge --out out/judge     trains one like it; 2 CPU cores: 44 s
    python -m lab.judge --preset factors --out out/judge     weights/factors.pt: 90 s of one core
    python -m lab.judge --data ~/photos --size 64 --out out/mine     out/mine/judge.pt
    python -m lab.judge --preset photos --overwrite    weights/judge-photos.pt: 10 min of one core
    python -m lab.judge --preset debug      the same path in seconds, to out/debug
"""
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import FACTORS, SHAPE_NAMES, load_images, shapes
from metrics import JUDGE, Judge, extract
from plumbing import config
from plumbing.config import field, require

COMMAND = "python -m lab.judge"


@dataclass
class Config:
    """The flags of `python -m lab.judge`."""
    preset: str = field("shapes", "shapes; factors; photos; debug: the same path in seconds")
    data: str = field("shapes", "shapes, a folder, or the name of a data set")
    classes: str = field("", "only these classes of a folder")
    factors: bool = field(False, "predict all factors, not just the class; writes factors.pt")
    out: str = field("", "folder to write to, or a file that ends in .pt; empty: weights/ of this "
                     "project, or out/debug")
    size: int = field(32, "side of the images in pixels")
    count: int = field(20000, "training images, of shapes; a tenth as many fresh ones measure the "
                       "accuracy")
    width: int = field(24, "channels of the first stage; the features are four times as many, "
                       "at 64 px eight times")
    steps: int = field(1000, "optimizer steps")
    batch: int = field(128, "images per step")
    lr: float = field(4e-3, "peak learning rate")
    seed: int = field(0, "seed of weights, batches, augmentation; not of the training images")
    device: str = field("auto", "auto, cpu, cuda, mps")
    save_every: int = field(200, "steps between two checkpoints")
    overwrite: bool = field(False, "start from scratch and replace what is there")

    def check(self):
        """ValueError for impossible values."""
        config.check_training(self)
        config.at_least(self, size=8, count=10, width=1)
        require(self.data == "shapes" or not self.factors, "--factors needs --data shapes")
        require(self.data == "shapes" or self.preset == "photos" or Path(self.out) != JUDGE.parent,
                f"--data needs --out; {JUDGE.parent} has the judges of the presets")

    @property
    def file(self):
        """The Path of the result."""
        name = "factors.pt" if self.factors else "judge.pt"
        return Path(self.out) if self.out.endswith(".pt") else Path(self.out) / name


PRESETS = {
    "shapes": dict(out=str(JUDGE.parent)),      # 1 CPU core, 60 s: held-out accuracy 1.000
    # Held-out error in standard deviations: colors .16, center .14, scale .22, angle .50, gradient
    # .81, texture .60, lines .48, noise .24; accuracy 1.000
    "factors": dict(out=str(JUDGE.parent), factors=True, count=60000, steps=1500),
    # Seed 0, 10 min of one core: accuracy .898 on the 500 validation images.
    "photos": dict(out=str(JUDGE.with_name("judge-photos.pt")), data="tiny-imagenet",
                   classes="easy-ten", size=64, steps=2000),
    "debug": dict(count=1000, width=8, steps=20, batch=32, save_every=5),  # 5 s
}
# ---- EDIT HERE for ablations: what the judge learns to ignore ----
SHIFT, BLUR, GRAIN = 2, 0.6, 0.08     # pixels; weight of a 3 x 3 mean; noise in units of [-1, 1]
PHOTO_SHIFT = 1 / 8                   # of a photograph, in sides
# ------------------------------------------------------------------
CLASSES = len(SHAPE_NAMES)


def augment(images, g, shift=SHIFT):
    """uint8 (B, 3, S, S) -> float32 in about [-1, 1]: mirrored, shifted, blurred, noisy, all drawn
    from generator g.  Generated images are a little soft and grainy; that must not change
    their class."""
    B, S = len(images), images.shape[-1]

    def uniform(*shape):
        return torch.rand(B, *shape, generator=g)

    place = torch.arange(S) + torch.randint(-shift, shift + 1, (2, B, 1), generator=g)
    y, x = place.clamp(0, S - 1)                                         # (B, S): the edge repeats
    x = torch.where(uniform(1) < 0.5, x, S - 1 - x)
    images = images[torch.arange(B)[:, None, None, None], torch.arange(3)[:, None, None],
                    y[:, None, :, None], x[:, None, None, :]].float() / 127.5 - 1
    soft = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = images.lerp(soft, BLUR * uniform(1, 1, 1) * (uniform(1, 1, 1) < 0.5))
    return images + GRAIN * uniform(1, 1, 1) * torch.randn(images.shape, generator=g)


def loss_of(found, labels, targets, classes=CLASSES):
    """Cross entropy of the class; with more outputs (B, 10 + 16), also the factors' error."""
    loss = F.cross_entropy(found[:, :classes], labels, label_smoothing=0.05)
    return loss + 3 * F.mse_loss(found[:, classes:], targets) if found.shape[1] > classes else loss


def triangle(c, step):
    """The learning rate: up for 15 % of the steps, then linearly down to zero."""
    return c.lr * min((step + 1) / (0.15 * c.steps), (1 - step / c.steps) / 0.85)


def load(c, split):
    """-> uint8 images (M, 3, S, S), labels (M,), class names, and the factors of `shapes` (M, 16);
    those of photographs are (M, 0)"""
    if c.data == "shapes":
        count, seed = (c.count, 0) if split == "train" else (c.count // 10, 1)
        return shapes(count, c.size, seed, factors=True)
    images, labels, names = load_images(c.data, c.size, split, classes=c.classes)
    return torch.from_numpy(np.array(images)), labels, names, torch.zeros(len(labels), 0)


def train(c):
    """Train a judge, or resume an unfinished run."""
    done, name = c.file, c.file.stem
    unfinished = done.with_stem(f"{name}_train")
    if done.exists() and not unfinished.exists() and not c.overwrite:
        accuracy = config.load_kind(done, "judge", COMMAND)["accuracy"]
        print(f"{done}: finished, accuracy {accuracy:.4f}; --overwrite starts from scratch")
        return
    # If both files exist, the unfinished one is newer: an earlier --overwrite left it.
    checkpoint = config.resume(unfinished, "judge_train", c, COMMAND)
    device, autocast = config.setup(c.device)
    torch.manual_seed(c.seed)
    images, labels, names, targets = load(c, "train")
    fresh, truth, _, true_targets = load(c, "test")
    if c.factors:
        std, mean = torch.std_mean(targets, 0)
        targets = (targets - mean) / std
    classes = len(names)
    shift = SHIFT if c.data == "shapes" else round(PHOTO_SHIFT * c.size)
    model = Judge(c.width, c.size, classes + c.factors * targets.shape[1])
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, weight_decay=0.05)
    start, begin = 0, time.time()
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, begin = checkpoint["step"], begin - checkpoint["seconds"]
    about = dict(version=config.VERSION, class_names=list(names),
                 config={k: v for k, v in config.plain(c).items() if k not in config.MAY_CHANGE})

    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters:,} parameters; {config.describe(device)}\n"
          f"data: {c.data}, {len(images):,} images of {c.size} x {c.size}, {classes} classes\n"
          f"{config.flags(c)}\n"
          f"checkpoint: {unfinished}, every {c.save_every} of {c.steps} steps", flush=True)

    def save(step):
        config.save(unfinished, dict(
            kind="judge_train", **about, step=step, seconds=time.time() - begin,
            model=model.state_dict(), optimizer=optimizer.state_dict()))

    loop = config.Loop(name, c, optimizer, unfinished, save, start, rate=triangle)
    for step in loop:
        # The batch is a function of (seed, step): a resumed run sees the same batches.
        g = config.generator(c.seed, step)
        chosen = torch.randint(len(images), (c.batch,), generator=g)
        x = images[chosen].float() / 127.5 - 1 if c.factors else augment(images[chosen], g, shift)
        with autocast():
            found = model(x.to(device, memory_format=torch.channels_last)).float()
        loss = loss_of(found, labels[chosen].to(device), targets[chosen].to(device), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loop.log(loss, loss=loss.detach())

    # Measured as it ships: half precision on disk, float32 in use.
    half = {k: v.cpu().half() if v.is_floating_point() else v.cpu()
            for k, v in model.state_dict().items()}
    model.load_state_dict(half)
    found = extract(model.eval(), fresh, device)
    accuracy = (found[:, :classes].argmax(1) == truth).double().mean().item()
    if c.factors:                               # in standard deviations: 1 is a constant's error
        error = (found[:, classes:] - (true_targets - mean) / std).square().mean(0)
        for factor, part in zip(FACTORS, error.split(list(FACTORS.values()))):
            print(f"error_{factor}: {part.mean().sqrt():.3f}")
    config.save(done, dict(kind="judge", **about, step=max(start, c.steps), accuracy=accuracy,
                           model=half))
    unfinished.unlink(missing_ok=True)
    print(f"accuracy: {accuracy:.4f}\nminutes: {(time.time() - begin) / 60:.2f}\n"
          f"parameters: {parameters}\nfile: {done}")


def main(argv=None):
    """The command line."""
    train(config.parse(Config, PRESETS, argv))


if __name__ == "__main__":
    with config.one_line_errors():
        main()
