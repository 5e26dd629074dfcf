"""Pretraining of the tiny encoder: self-supervised contrastive learning on unlabeled shapes.

Two random views of an image must recognize each other among the views of all images in the batch
(SimCLR, arXiv 2002.05709).  Writes dino_tiny.pt, which `--encoder tiny` of ae.py loads.

With --target the same encoder is trained with supervision instead, to know one thing: the class of
an image (shape), or the colors of background and object (color), a nuisance for the class.

    python -m lab.pretrain --overwrite             # the encoder in weights/ from scratch, 13 min
    python -m lab.pretrain --target shape --batch 128 --steps 2000 --out out/shape
    python -m lab.pretrain --target color --batch 128 --steps 2000 --out out/color
                                                   # 3 min each of one core, 1 of them to draw
    python -m lab.pretrain --preset debug          # the same path in seconds, to out/debug
    python -m lab.pretrain --check vits16plus 000000039769.jpg
                                # compares a published encoder with known values, on a COCO image

weights/dino_tiny.pt: 0.49 M parameters, seed 0, 2,400 steps of 256 unlabeled shapes, 13.1 minutes
on one to two cores of an AMD EPYC (bfloat16); held-out kNN .998, linear probe .998, pixels .272;
R^2 of the colors .68 (background) and .53 (object).  Random weights: .118, .195; .98, .57.
"""
import copy, math, sys, time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from data import FACTORS, SHAPE_NAMES, shapes, to_float
from dino import DINOv3, ViTConfig, load_dino
from metrics import knn, linear_probe
from plumbing import config
from plumbing.config import UserError, field, require
from plumbing.weights import TINY

# the targets that are supervised, with the outputs of a head
LABELED = dict(shape=len(SHAPE_NAMES), color=6)


@dataclass
class Config:
    """Pretraining of the tiny encoder; labels train only a --target other than views."""
    preset: str = field("tiny", "a named set of the options below")
    out: str = field("", "folder of dino_tiny.pt; weights/ for the preset tiny if empty")
    size: int = field(32, "side of an image in pixels; a multiple of the patch")
    patch: int = field(8, "side of a patch in pixels")
    dim: int = field(96, "width; heads are 32 wide")
    depth: int = field(4, "blocks")
    stem: int = field(32, "width of the convolutional stem; 0: a linear patch map")
    target: str = field("views", "what is learned: views, two of one image recognize each other; "
                        "shape, its class; color, its two colors", ("views", *LABELED))
    # ---- EDIT HERE for ablations: what two views of an image share ----
    images: int = field(100_000, "training images, `shapes` that the other stages do not see")
    temperature: float = field(0.2, "of the contrastive loss")
    turn: float = field(0.3, "largest rotation of a view, in radians")
    zoom: float = field(0.2, "largest change of scale of a view")
    # -------------------------------------------------------------------
    steps: int = field(2400, "optimizer steps")
    batch: int = field(256, "images per step, two views of each")
    lr: float = field(2e-3, "learning rate")
    warmup: int = field(200, "steps of linear warm-up")
    decay: bool = field(True, "cosine decay of the learning rate to zero")
    ema: float = field(0.995, "decay of the averaged weights, which are the ones that ship")
    seed: int = field(0, "all randomness is a function of (seed, step)")
    device: str = field("auto", "cuda, cpu, ...; auto takes a GPU if there is one")
    save_every: int = field(200, "steps between checkpoints")
    keep: tuple = field((), "steps after which a copy of the encoder is kept, "
                        "dino_tiny_<step>.pt; 0 is before training")
    overwrite: bool = field(False, "start from scratch and replace what is there")

    def check(self):
        """ValueError for impossible values."""
        config.check_training(self)
        for name, least in (("batch", 2), ("dim", 32), ("depth", 1), ("images", 2)):
            require(getattr(self, name) >= least, f"--{name} must be at least {least}")
        require(self.dim % 32 == 0, "--dim must be a multiple of 32")
        require(self.patch in (4, 8, 16), "--patch must be 4, 8 or 16")
        require(self.size > 0 and self.size % self.patch == 0,
                "--size must be a multiple of --patch")
        require(self.target == "views" or Path(self.out) != TINY.parent,
                f"--target {self.target} needs --out; {TINY} has the target views")
        require(self.temperature > 0, "--temperature must be positive")


PRESETS = {
    "tiny": dict(out=str(TINY.parent)),   # 1 to 2 CPU cores, 13 min: kNN .998, linear probe .998
    "debug": dict(images=1000, dim=32, depth=1, stem=8, steps=20, batch=32, warmup=5,
                  save_every=10),         # 2 CPU cores, 8 s
}

# ---------------------------------------------------------------- views, model, loss


def views(x, c, g):
    """One random view of each image: x (B, 3, S, S) in [-1, 1] -> the same shape, similar range.

    Shifted, rotated, scaled, mirrored; the colors rotated in RGB space (which can invert them;
    one view in five becomes gray); a gradient, a faint grating and noise added.  Only the shape
    survives all of that, so the shape is what the encoder learns.
    """
    B, S = len(x), x.shape[-1]

    def uniform(*shape, low=0.0, high=1.0):
        return (torch.rand(B, *shape, generator=g) * (high - low) + low).to(x.device)

    turn, zoom = uniform(low=-c.turn, high=c.turn), 1 + uniform(low=-c.zoom, high=c.zoom / 2)
    aspect = uniform(low=-0.1, high=0.1).exp()
    mirror = torch.where(uniform() < 0.5, -1.0, 1.0)
    move = uniform(2, low=-1, high=1) * ((1 - zoom).abs() + 0.1)[:, None]
    theta = torch.stack([
        torch.stack([turn.cos() * zoom * aspect * mirror, -turn.sin() * zoom, move[:, 0]], -1),
        torch.stack([turn.sin() * zoom * mirror, turn.cos() * zoom / aspect, move[:, 1]], -1)], 1)
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False),
                      padding_mode="reflection", align_corners=False)

    mean = x.mean((2, 3), keepdim=True)
    # ---- EXERCISE 12: keep the colors ----
    rotation = torch.linalg.qr(torch.randn(B, 3, 3, generator=g))[0].to(x.device)
    mixed = torch.einsum("bij,bjhw->bihw", rotation, x - mean)
    mixed = mixed * uniform(1, 1, 1, low=-0.4, high=0.5).exp()
    gray = 1.5 * mixed.mean(1, keepdim=True).expand_as(mixed)
    x = torch.where(uniform(1, 1, 1) < 0.2, gray, mixed) + uniform(3, 1, 1, low=-0.5, high=0.5)

    axis = torch.linspace(-1, 1, S, device=x.device)

    def ramp(direction):                          # a linear gradient across the image, (B, S, S)
        return (direction.cos()[:, None, None] * axis
                + direction.sin()[:, None, None] * axis[:, None])
    pitch, phase = uniform(1, 1, low=3, high=14), uniform(1, 1, high=2 * math.pi)
    grating = (ramp(uniform(high=math.pi)) * pitch + phase).sin()
    x = x + uniform(1, 1, 1, high=0.08) * uniform(3, 1, 1) * grating[:, None]
    gradient = ramp(uniform(high=2 * math.pi))
    x = x + uniform(3, 1, 1, low=-0.15, high=0.15) * gradient[:, None]
    return x + uniform(1, 1, 1, high=0.04) * torch.randn(x.shape, generator=g).to(x.device)


class Student(nn.Module):
    """The encoder with two projection heads that are discarded after training: one reads the class
    token, the other the mean patch token, so that both learn to describe the image."""

    def __init__(self, c, width=512, out=128):
        super().__init__()
        self.net = DINOv3(ViTConfig(
            dim=c.dim, depth=c.depth, heads=c.dim // 32, hidden=4 * c.dim, patch=c.patch,
            registers=2, stem=c.stem, mean=(0.5,) * 3, std=(0.5,) * 3))

        def head():
            if c.target in LABELED:             # linear, so that the token itself must know
                return nn.Linear(c.dim, LABELED[c.target])
            return nn.Sequential(
                nn.Linear(c.dim, width), nn.BatchNorm1d(width), nn.GELU(),
                nn.Linear(width, width), nn.BatchNorm1d(width), nn.GELU(),
                nn.Linear(width, out))
        self.heads = nn.ModuleList(head() for _ in range(2))

    def forward(self, x):
        """[-1, 1] (B, 3, S, S) -> what the heads say of class token and mean patch token, (B, out)
        each: embeddings, or with the targets in LABELED, predictions"""
        patches, cls = self.net(self.net.normalize(x))
        return [head(z).float() for head, z in zip(self.heads, (cls, patches.mean(1)))]


def contrastive_loss(z, temperature):
    """NT-Xent (SimCLR, arXiv 2002.05709, eq. 1): z (2B, d), rows i and i + B are two views of one
    image; each must identify the other among all 2B - 1."""
    z = F.normalize(z, dim=1)
    similar = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    return F.cross_entropy(similar, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def draw_batch(c, images, truth, g, device):
    """A random batch from uint8 images (M, 3, S, S) -> what the student sees, (B, 3, S, S) or two
    views (2B, 3, S, S); the loss of what one of its heads says."""
    index = torch.randint(len(images), (c.batch,), generator=g)
    if c.target == "views":
        x = to_float(images, index, None, device)
        return (torch.cat([views(x, c, g), views(x, c, g)]),
                partial(contrastive_loss, temperature=c.temperature))
    mirrored = torch.rand(c.batch, generator=g) < 0.5             # this changes neither target
    criterion = F.cross_entropy if c.target == "shape" else F.mse_loss
    return (to_float(images, index, mirrored, device),
            partial(criterion, target=truth[index].to(device)))


def colors(factors):
    """The factors of `shapes` (n, 16) -> (n, 6): RGB of the background, RGB of the object."""
    return factors[:, :FACTORS["back"] + FACTORS["front"]]


def r_squared(x, y, xt, yt):
    """The fraction of the variance of yt (m, k) that a linear regression, fitted to x (n, d) and y
    (n, k), explains from xt (m, d) -> (k,).  1: all of it; 0 or less: nothing."""
    x, xt = (F.pad(a.double(), (0, 1), value=1.0) for a in (x, xt))
    y, yt = y.double(), yt.double()
    error = yt - xt @ torch.linalg.lstsq(x, y).solution
    return 1 - error.square().sum(0) / (yt - yt.mean(0)).square().sum(0)


@torch.no_grad()
def measure(net, size, references=5000, held_out=2000):
    """What the encoder knows of held-out shapes -> dict: the class, by kNN and linear probe
    (accuracies); r2_back and r2_front, the colors of background and object, by linear regression
    from the mean patch token (R^2)."""
    def embed(images):
        device = net.norm.weight.device
        parts = [net(net.normalize(to_float(images, slice(i, i + 500), None, device)))
                 for i in range(0, len(images), 500)]
        return [torch.cat(part).cpu() for part in zip(*((p.mean(1), c) for p, c in parts))]
    x, y, _, factors = shapes(references, size, seed=4, factors=True)
    xt, yt, _, factors_t = shapes(held_out, size, seed=5, factors=True)
    (patch, cls), (patch_t, cls_t) = embed(x.numpy()), embed(xt.numpy())
    flat, flat_t = x.flatten(1).float(), xt.flatten(1).float()
    back, front = r_squared(patch, colors(factors), patch_t, colors(factors_t)).view(2, 3).mean(1)
    return dict(knn=knn(patch, y, patch_t, yt), knn_cls=knn(cls, y, cls_t, yt),
                linear=linear_probe(patch, y, patch_t, yt), knn_pixels=knn(flat, y, flat_t, yt),
                r2_back=back.item(), r2_front=front.item())

# ---------------------------------------------------------------- training


def build(c, device):
    """-> student, the averaged encoder (both on the device), optimizer; drawn from the seed."""
    torch.manual_seed(c.seed)
    student = Student(c).to(device).train()
    ema = copy.deepcopy(student.net).requires_grad_(False).eval()
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.04),
                                   dict(params=vectors, weight_decay=0.0)],
                                  c.lr, (0.9, 0.95), fused=True)
    return student, ema, optimizer


def train(c):
    """Run or resume the pretraining; writes dino_tiny.pt in half precision."""
    device, autocast = config.setup(c.device)
    path, unfinished = Path(c.out) / "dino_tiny.pt", Path(c.out) / "dino_tiny.train.pt"
    checkpoint = config.resume(unfinished, "dino_train", c, "python -m lab.pretrain")
    if checkpoint is None and path.is_file() and not c.overwrite:
        print(f"{path}: finished; --overwrite starts from scratch")
        return
    student, ema, optimizer = build(c, device)
    start, before = 0, 0.0
    if checkpoint:
        start, before = checkpoint["step"], checkpoint["minutes"]
        student.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    def save(step):
        config.save(unfinished, dict(
            kind="dino_train", version=config.VERSION, config=config.plain(c), step=step,
            minutes=minutes(), model=student.state_dict(), ema=ema.state_dict(),
            optimizer=optimizer.state_dict()))

    def write(path):
        config.save(path, dict(
            kind="dino", version=config.VERSION, config=vars(ema.config),
            pretraining=config.plain(c), minutes=minutes(),
            model={k: v.half() for k, v in ema.state_dict().items()}))

    def minutes():
        return before + (time.time() - began) / 60

    images, truth, _, factors = shapes(c.images, c.size, seed=3, factors=True)
    if c.target == "color":
        std, mean = torch.std_mean(colors(factors), 0)
        truth = (colors(factors) - mean) / std
    print(f"pretraining on {config.describe(device)}: {c.images:,} images, target {c.target}\n"
          f"encoder {sum(p.numel() for p in ema.parameters()) / 1e6:.2f} M; {c.steps} steps of "
          f"{c.batch}\n{config.flags(c)}")
    loop, began = config.Loop("dino", c, optimizer, unfinished, save, start), time.time()
    for step in loop:
        if step in c.keep:
            write(path.with_name(f"dino_tiny_{step}.pt"))
        g = config.generator(c.seed, step)                    # all randomness of this step
        x, loss_of = draw_batch(c, images.numpy(), truth, g, device)
        with autocast():
            answers = student(x)
        loss = sum(loss_of(answer) for answer in answers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        with torch.no_grad():
            weight = max(1 - c.ema, 1 / (step + 10))
            torch._foreach_lerp_(list(ema.parameters()), list(student.net.parameters()), weight)
        loop.log(loss, loss=loss)
    write(path)
    unfinished.unlink(missing_ok=True)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.2f} MB\nminutes: {minutes():.1f}")
    for name, value in measure(load_dino(path, device), c.size).items():
        print(f"{name}: {value:.4f}")

# ---------------------------------------------------------------- published encoders

# The first five values of the real weights on COCO val2017 000000039769.jpg, 224 x 224 bilinear, as
# transformers' conversion script records them: class token, first patch.  Its tolerance is 1e-3.
KNOWN = {
    "vits16plus": ((-0.471349, -1.365778, -0.317983, 0.377219, -0.769085),
                   (0.144551, -0.388117, -0.393433, -0.157695, -0.600380)),
    "vits16": ((0.463561, -0.415609, 0.408236, -0.126613, -0.286636),
               (-0.038754, -0.250895, -0.016392, -0.455473, 0.571582)),
}


@torch.no_grad()
def check(name, image):
    """Print the first values of a published encoder on an image file, next to the known ones."""
    try:
        with Image.open(image) as opened:
            resized = opened.convert("RGB").resize((224, 224), Image.BILINEAR)
    except OSError as error:
        raise UserError(f"{image}: not a readable image ({error})") from None
    model = load_dino(name)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 127.5 - 1
    patches, cls = model(model.normalize(pixels))
    for what, mine, known in zip(("cls", "first_patch"), (cls[0], patches[0, 0]), KNOWN[name]):
        mine = mine[:5].tolist()
        print(f"{what}: " + " ".join(f"{v:.6f}" for v in mine))
        print(f"{what}_known: " + " ".join(f"{v:.6f}" for v in known))
        print(f"{what}_max_difference: {max(abs(a - b) for a, b in zip(mine, known)):.6f}")


def main(argv=None):
    """The command line; `--check NAME IMAGE` compares with the known values instead."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--check"]:
        if len(argv) != 3 or argv[1] not in KNOWN:
            print(f"error: --check needs {' or '.join(KNOWN)}, and an image", file=sys.stderr)
            sys.exit(2)
        return check(*argv[1:])
    train(config.parse(Config, PRESETS, argv))


if __name__ == "__main__":
    with config.one_line_errors():
        main()
