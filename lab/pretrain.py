"""Pretraining of the small encoders: self-supervised contrastive learning on unlabeled images.

Two random views of an image must recognize each other among the views of all images in the batch
(SimCLR, arXiv 2002.05709).  Writes dino_tiny.pt, which `--encoder tiny` of ae.py loads; with
--data, from photographs, dino_photos.pt.  A file tells how it was made and what it knows.

With --target the same encoder is trained with supervision instead, to know one thing: the class of
an image (shape), or the colors of background and object (color), a nuisance for the class.

    python -m lab.pretrain --overwrite             # the encoder in weights/ from scratch, 13 min
    python -m lab.pretrain --target shape --batch 128 --steps 2000 --out out/shape
    python -m lab.pretrain --target color --batch 128 --steps 2000 --out out/color
    python -m lab.pretrain --preset debug          # the same path in seconds, to out/debug
    python -m lab.pretrain --preset photos --overwrite     # weights/dino_photos.pt, 53 min
    python -m lab.pretrain --preset photos --data ~/photos --classes all --measure tiny
                                # what another encoder knows of your photographs
    python -m lab.pretrain --check vits16plus 000000039769.jpg
                                # compares a published encoder with known values, on a COCO image

weights/dino_tiny.pt: 0.49 M parameters, seed 0, 2,400 steps of 256 unlabeled shapes, 13.1 minutes
on one to two cores of an AMD EPYC (bfloat16); held-out kNN .998, linear probe .998, pixels .272;
R^2 of the colors .68 (background) and .53 (object).  Random weights: .118, .195; .98, .57.

weights/dino_photos.pt: 1.45 M parameters, seed 0, 3,200 steps of 256 of the 5,000 images of ten
classes of Tiny ImageNet (ImageNet's, for research), without labels, 53.0 minutes of one shared core
of an AMD EPYC (bfloat16).  On 500 held-out images of these classes, kNN and linear probe:

    after 0, 400, 1,200 and all steps   .480 / .576, .724 / .826, .828 / .840, .848 / .876
    the encoder of shapes, pixels       .552 / .718, .372

and on 1,000 of 20 other classes, which it was not trained on:

    this encoder, that of shapes        .410 / .484, .241 / .333
    random weights, pixels              .193 / .234, .168

The same steps on 45,000 images of 170 classes (68.8 minutes of one shared core) give an encoder
that knows ten classes which neither has seen no better, .692 / .760 against .708 / .756 on 500
images (pixels .398), and the ten classes above less well, .758 / .820.  Its pictures of the new
classes are not better either (RESULTS.md, Photographs: which encoder).  So it does not ship.

Muon made the largest difference.  kNN and linear probe after 250 steps (3.6 to 4.3 minutes, one
seed):

    AdamW 2e-3                          .612 / .684
    Muon .02, .05 on the matrices       .678 / .764, .684 / .776
    Muon .02, all 180 classes of a      .600 / .708
    subset of Tiny ImageNet
"""
import copy, math, shlex, sys, time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from data import FACTORS, SHAPE_NAMES, evenly, load_images, shapes, to_float
from dino import DINOv3, ViTConfig, load_dino
from metrics import knn, linear_probe
from plumbing import config, muon
from plumbing.config import UserError, field, require
from plumbing.weights import TINY

# the targets that are supervised, with the outputs of a head
LABELED = dict(shape=len(SHAPE_NAMES), color=6)


@dataclass
class Config:
    """Pretraining of an encoder; labels train only a --target other than views."""
    preset: str = field("tiny", "a named set of the options below")
    out: str = field("", "folder of the result; weights/ for the presets tiny and photos if empty")
    data: str = field("shapes", "shapes, or photographs: a folder or the name of a data set")
    classes: str = field("", "of photographs: only these classes")
    probe: str = field("", "of photographs: the classes that test the encoder; empty: --classes")
    measure: str = field("", "only test this encoder (tiny, a DINOv3 name, or a file) on --data")
    note: str = field("", "a sentence for the file, such as the license of the images")
    size: int = field(32, "side of an image in pixels; a multiple of the patch")
    patch: int = field(8, "side of a patch in pixels")
    dim: int = field(96, "width; heads are 32 wide")
    depth: int = field(4, "blocks")
    stem: int = field(32, "width of the convolutional stem; 0: a linear patch map")
    stem_norm: bool = field(False, "group norms in the stem, and two more convolutions")
    target: str = field("views", "what is learned: views, two of one image recognize each other; "
                        "shape, its class; color, its two colors", ("views", *LABELED))
    # ---- EDIT HERE for ablations: what two views of an image share ----
    images: int = field(100_000, "training images at most; `shapes` that no other stage sees")
    temperature: float = field(0.2, "of the contrastive loss")
    decoupled: bool = field(False, "leave a view's partner out of the loss's denominator")
    turn: float = field(0.3, "of shapes: largest rotation of a view, in radians")
    zoom: float = field(0.2, "of shapes: largest change of scale of a view")
    crop: int = field(0, "of photographs: side of a view in pixels; 0: --size")
    area: tuple = field((12, 70), "of photographs: smallest and largest view, in % of the area")
    finish: float = field(0.12, "of photographs: the last part of the steps, with views of 1.5 "
                          "times the side and 30 to 100 % of the area")
    # -------------------------------------------------------------------
    steps: int = field(2400, "optimizer steps")
    batch: int = field(256, "images per step, two views of each")
    lr: float = field(2e-3, "learning rate")
    muon: float = field(0.0, "learning rate of Muon on the matrices, without weight decay; 0: "
                        "AdamW")
    weight_decay: float = field(0.04, "of AdamW, on the matrices")
    warmup: int = field(200, "steps of linear warm-up")
    decay: bool = field(True, "cosine decay of the learning rate to zero")
    ema: float = field(0.995, "decay of the averaged weights, which are the ones that ship")
    seed: int = field(0, "all randomness is a function of (seed, step)")
    device: str = field("auto", "cuda, cpu, ...; auto takes a GPU if there is one")
    save_every: int = field(200, "steps between checkpoints")
    keep: tuple = field((), "steps after which a copy of the encoder is kept and tested, "
                        "dino_tiny_<step>.pt; 0 is before training")
    overwrite: bool = field(False, "start from scratch and replace what is there")

    def check(self):
        """ValueError for impossible values."""
        config.check_training(self)
        config.at_least(self, batch=2, dim=32, depth=1, images=2, stem=0, crop=0, muon=0,
                        weight_decay=0)
        require(self.dim % 32 == 0, "--dim must be a multiple of 32")
        require(self.patch in (4, 8, 16), "--patch must be 4, 8 or 16")
        require(self.size > 0 and self.size % self.patch == self.crop % self.patch == 0,
                "--size and --crop must be multiples of --patch")
        require(not self.stem_norm or self.stem and self.stem % 8 == 0,
                "--stem_norm needs a --stem that is a multiple of 8")
        require(self.target == "views" or self.data == "shapes", f"--target {self.target} needs "
                "--data shapes")
        require(self.measure or Path(self.out) != TINY.parent or self.target == "views"
                and (self.data == "shapes" or self.preset == "photos"),
                f"--target and --data need --out; {TINY.parent} has the encoders of the presets")
        require(self.temperature > 0, "--temperature must be positive")
        require(len(self.area) == 2 and 0 < self.area[0] <= self.area[1] <= 100,
                "--area must be two percentages, such as 12,70")
        require(0 <= self.finish <= 1, "--finish must be in [0, 1]")

    @property
    def file(self):
        """The Path of the result."""
        return Path(self.out) / ("dino_tiny.pt" if self.data == "shapes" else "dino_photos.pt")


PRESETS = {
    "tiny": dict(out=str(TINY.parent)),   # 1 to 2 CPU cores, 13 min: kNN .998, linear probe .998
    "debug": dict(images=1000, dim=32, depth=1, stem=8, steps=20, batch=32, warmup=5,
                  save_every=10),         # 2 CPU cores, 8 s
    # 1 CPU core, shared, 53 min: kNN .848, linear probe .876
    "photos": dict(out=str(TINY.parent), data="tiny-imagenet", classes="easy-ten", size=64, crop=32,
                   dim=128, depth=6, stem=48, stem_norm=True, decoupled=True, muon=0.04, ema=0.998,
                   steps=3200, note="Trained on images of ImageNet (ten classes of Tiny ImageNet, "
                                    "no labels), for research."),
}

# ---------------------------------------------------------------- views, model, loss


def uniforms(B, g, device):
    """-> function that draws (B, *shape) uniform numbers from generator g."""
    def uniform(*shape, low=0.0, high=1.0):
        return (torch.rand(B, *shape, generator=g) * (high - low) + low).to(device)
    return uniform


def views(x, c, g):
    """One random view of each image: x (B, 3, S, S) in [-1, 1] -> the same shape, similar range.

    Shifted, rotated, scaled, mirrored; the colors rotated in RGB space (which can invert them;
    one view in five becomes gray); a gradient, a faint grating and noise added.  Only the shape
    survives all of that, so the shape is what the encoder learns.
    """
    B, S, uniform = len(x), x.shape[-1], uniforms(len(x), g, x.device)
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


def photo_views(x, c, g, step=0):
    """One random view of each photograph: x (B, 3, S, S) in [-1, 1] -> (B, 3, side, side) in the
    same range, --crop pixels wide and, at the end of training, half as wide again.

    A part of the image, mirrored or not; 4 in 5 with other brightness, contrast, saturation and
    hue; 1 in 5 gray; 3 in 10 blurred (as SimCLR's, appendix A).
    """
    B, uniform = len(x), uniforms(len(x), g, x.device)
    side, area = c.crop or c.size, c.area
    if step >= (1 - c.finish) * c.steps:
        side, area = min(c.size, side * 3 // 2 // c.patch * c.patch), (30, 100)

    width = uniform(low=area[0], high=area[1]).div(100).sqrt()
    aspect = uniform(low=-1, high=1).mul(math.log(4 / 3) / 2).exp()
    extent = torch.stack([width * aspect, width / aspect], -1).clamp(max=1)     # (B, 2): of x, y
    center = uniform(2, low=-1, high=1) * (1 - extent)
    mirror = torch.stack([(uniform() < 0.5) * 2 - 1, torch.ones_like(width)], -1)
    theta = torch.cat([torch.diag_embed(extent * mirror), center[:, :, None]], 2)   # (B, 2, 3)
    x = F.grid_sample(x, F.affine_grid(theta, (B, 3, side, side), align_corners=False),
                      padding_mode="reflection", align_corners=False)

    # saturation, hue and brightness are one matrix: black is 0 here, not -1
    changed = uniform(4, 1, 1) * 2 - 1
    changed = torch.where(uniform(1, 1, 1) < 0.8, changed, torch.zeros_like(changed))
    bright, contrast, saturation = (1 + 0.4 * changed[:, :3]).unbind(1)         # (B, 1, 1) each
    saturation = torch.where(uniform(1, 1) < 0.2, torch.zeros_like(saturation), saturation)
    hue = 0.2 * math.pi * changed[:, 3]
    cycle = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=x.device) / 3 ** 0.5
    gray = torch.tensor([0.299, 0.587, 0.114], device=x.device).expand(3, 3)    # of Rec. 601
    turn = hue.cos() * torch.eye(3, device=x.device) + (1 - hue.cos()) / 3 + hue.sin() * cycle
    matrix = bright * (saturation * turn + (1 - saturation) * gray)             # (B, 3, 3)
    x = (matrix @ (x + 1).flatten(2)).view_as(x)
    mean = (gray[0] @ x.mean((2, 3)).T).view(B, 1, 1, 1)
    x = ((x - mean) * contrast[..., None] + mean - 1).clamp(-1, 1)
    soft = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return x.lerp(soft, uniform(1, 1, 1) * (uniform(1, 1, 1) < 0.3))


class Student(nn.Module):
    """The encoder with two projection heads that are discarded after training: one reads the class
    token, the other the mean patch token, so that both learn to describe the image."""

    def __init__(self, c, width=512, out=128):
        super().__init__()
        self.net = DINOv3(ViTConfig(
            dim=c.dim, depth=c.depth, heads=c.dim // 32, hidden=4 * c.dim, patch=c.patch,
            registers=2, stem=c.stem, stem_norm=c.stem_norm, mean=(0.5,) * 3, std=(0.5,) * 3))

        def head():
            if c.target in LABELED:             # linear, so that the token itself must know
                return nn.Linear(c.dim, LABELED[c.target])
            return nn.Sequential(
                nn.Linear(c.dim, width), nn.BatchNorm1d(width), nn.GELU(),
                nn.Linear(width, width), nn.BatchNorm1d(width), nn.GELU(),
                nn.Linear(width, out))
        self.heads = nn.ModuleList(head() for _ in range(2))

    def matrices(self):
        """The weights that --muon trains: those of the stem and the blocks."""
        parts = (self.net.patch_embed.stem, self.net.blocks)
        return [p for part in parts for p in part.parameters() if p.ndim > 1]

    def forward(self, x):
        """[-1, 1] (B, 3, S, S) -> what the heads say of class token and mean patch token, (B, out)
        each: embeddings, or with the targets in LABELED, predictions"""
        patches, cls = self.net(self.net.normalize(x))
        return [head(z).float() for head, z in zip(self.heads, (cls, patches.mean(1)))]


def contrastive_loss(z, temperature, decoupled=False):
    """NT-Xent (SimCLR, arXiv 2002.05709, eq. 1): z (2B, d), rows i and i + B are two views of one
    image; each must identify the other among all 2B - 1.  decoupled: the denominator has only the
    2B - 2 views of other images (arXiv 2110.06848, eq. 6), which suits small batches better."""
    z = F.normalize(z, dim=1)
    similar = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    if not decoupled:
        return F.cross_entropy(similar, partner)
    others = similar.scatter(1, partner[:, None], float("-inf"))
    return (others.logsumexp(1) - similar.gather(1, partner[:, None])[:, 0]).mean()


def training_images(c):
    """-> uint8 images (M, 3, S, S), what --target asks of each: its class or its two colors"""
    if c.data != "shapes":
        load_exam(c)                            # a mistake in --probe must show now, not later
        images, labels, _ = load_images(c.data, c.size, "train", classes=c.classes)
        some = evenly(len(images), c.images)
        return (images if len(some) == len(images) else images[some.numpy()]), labels[some]
    images, labels, _, factors = shapes(c.images, c.size, seed=3, factors=True)
    if c.target == "color":
        std, mean = torch.std_mean(colors(factors), 0)
        return images.numpy(), (colors(factors) - mean) / std
    return images.numpy(), labels


def draw_batch(c, images, truth, g, device, step=0):
    """A random batch from uint8 images (M, 3, S, S) -> what the student sees, (B, 3, S, S) or two
    views (2B, 3, S, S); the loss of what one of its heads says."""
    index = torch.randint(len(images), (c.batch,), generator=g)
    if c.target == "views":
        x = to_float(images, index, None, device)
        view = views if c.data == "shapes" else partial(photo_views, step=step)
        return (torch.cat([view(x, c, g), view(x, c, g)]),
                partial(contrastive_loss, temperature=c.temperature, decoupled=c.decoupled))
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
    """What the encoder knows of held-out shapes -> dict: the class, see `know_classes`; r2_back and
    r2_front, the colors of background and object, by linear regression from the mean patch token
    (R^2)."""
    x, y, _, factors = shapes(references, size, seed=4, factors=True)
    xt, yt, _, factors_t = shapes(held_out, size, seed=5, factors=True)
    found, patch, patch_t = know_classes(net, x.numpy(), y, xt.numpy(), yt)
    back, front = r_squared(patch, colors(factors), patch_t, colors(factors_t)).view(2, 3).mean(1)
    return dict(found, r2_back=back.item(), r2_front=front.item())


def load_exam(c, references=5000):
    """What tests an encoder of photographs -> the four arguments of `know_classes`."""
    images, labels, _ = load_images(c.data, c.size, "train", classes=c.probe or c.classes)
    held, truth, _ = load_images(c.data, c.size, "test", classes=c.probe or c.classes)
    if len(images) < 20:
        raise UserError(f"--data {c.data}: {len(images)} training images are too few")
    some = evenly(len(images), references)
    return images[some.numpy()], labels[some], held, truth


@torch.no_grad()
def know_classes(net, images, labels, held, truth):
    """uint8 images (n, 3, S, S) with labels (n,), held-out ones (m, 3, S, S) with theirs -> the
    accuracies of a kNN (k = 20) on mean patch tokens, class tokens and pixels, and of a linear
    probe on mean patch tokens; the mean patch tokens (n, D), (m, D)."""
    def embed(images):
        device = net.norm.weight.device
        parts = [net(net.normalize(to_float(images, slice(i, i + 500), None, device)))
                 for i in range(0, len(images), 500)]
        return [torch.cat(part).cpu() for part in zip(*((p.mean(1), c) for p, c in parts))]
    (patch, cls), (patch_t, cls_t) = embed(images), embed(held)
    flat, flat_t = (torch.from_numpy(np.array(x)).flatten(1).float() for x in (images, held))
    return dict(knn=knn(patch, labels, patch_t, truth), knn_cls=knn(cls, labels, cls_t, truth),
                linear=linear_probe(patch, labels, patch_t, truth),
                knn_pixels=knn(flat, labels, flat_t, truth)), patch, patch_t


def report(c, net):
    """Measure an encoder on the data of a Config and print it -> dict"""
    found = (measure(net, c.size) if c.data == "shapes" else
             know_classes(net, *load_exam(c))[0])
    for name, value in found.items():
        print(f"{name}: {value:.4f}")
    return found

# ---------------------------------------------------------------- training


def build(c, device):
    """-> student, the averaged encoder (both on the device), optimizer; drawn from the seed."""
    torch.manual_seed(c.seed)
    student = Student(c).to(device).train()
    ema = copy.deepcopy(student.net).requires_grad_(False).eval()
    if c.muon:
        return student, ema, muon.optimizer([*student.parameters()], student.matrices(), c.lr,
                                            c.muon, (0.9, 0.95))
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=c.weight_decay),
                                   dict(params=vectors, weight_decay=0.0)],
                                  c.lr, (0.9, 0.95), fused=True)
    return student, ema, optimizer


def write(c, path, ema, minutes):
    """Test an encoder as it ships, in half precision, and write it with what was found."""
    half, shipped = {k: v.half() for k, v in ema.state_dict().items()}, copy.deepcopy(ema)
    shipped.load_state_dict(half)
    found = report(c, shipped)
    config.save(path, dict(
        kind="dino", version=config.VERSION, config=vars(ema.config), model=half,
        pretraining=config.plain(c), minutes=minutes, measured=found,
        command=shlex.join(["python", "-m", "lab.pretrain", "--preset", c.preset,
                            *config.given(c)])))
    print(f"minutes: {minutes:.1f}\nwrote {path}: {path.stat().st_size / 1e6:.2f} MB")


def train(c):
    """Run or resume the pretraining; writes c.file."""
    device, autocast = config.setup(c.device)
    path, unfinished = c.file, c.file.with_suffix(".train.pt")
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

    def minutes():
        return before + (time.time() - began) / 60

    images, truth = training_images(c)
    print(f"pretraining on {config.describe(device)}: {len(images):,} images, target {c.target}\n"
          f"encoder {sum(p.numel() for p in ema.parameters()) / 1e6:.2f} M; {c.steps} steps of "
          f"{c.batch}\n{config.flags(c)}")
    loop, began = config.Loop("dino", c, optimizer, unfinished, save, start), time.time()
    for step in loop:
        if step in c.keep:
            write(c, path.with_stem(f"{path.stem}_{step}"), ema, minutes())
        g = config.generator(c.seed, step)                    # all randomness of this step
        x, loss_of = draw_batch(c, images, truth, g, device, step)
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
    write(c, path, ema, minutes())
    unfinished.unlink(missing_ok=True)

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
    c = config.parse(Config, PRESETS, argv)
    if c.measure:
        report(c, load_dino(c.measure, config.setup(c.device)[0]))
    else:
        train(c)


if __name__ == "__main__":
    with config.one_line_errors():
        main()
