"""Stage 2: a diffusion transformer learns the latents of stage 1 by flow matching.

The DiT (arXiv 2212.09748) with QK-norm as SVG trains it (arXiv 2510.15301, section 3.3): one token
a latent position, adaLN-zero, label dropout for guidance, fixed sine-cosine positions.  It reads
the latents that `ae.py` cached, so that no encoder runs in the loop.

    python dit.py                         # shapes; 4.2 minutes on two CPU cores
    python dit.py --out out/vae           # on the baseline's latents, wherever stage 1 wrote them

Reads out/<preset>/ae.pt and latents.npy; writes out/<preset>/dit.pt (self-describing) and
preview.png (the same noise and classes each time, so that one sees it learn).
"""
import json, math, time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from plumbing import config
from ae import load_ae, save_grid, to_uint8
from plumbing.config import Stop, UserError, check_shared, field, require
from data import load_images, to_float
from dino import attention
from flow import auto_shift, draw, euler, flow_loss, guided

# Letters: B batch, C latent channels, h w latent grid, N = h w tokens, D width, A heads.

# ---------------------------------------------------------------- config and presets


@dataclass
class Config:
    """Stage 2."""
    preset: str = field("shapes", "a named set of the options below")
    out: str = field("", "the folder that stage 1 wrote; out/<preset> if empty")
    size: str = field("tiny", "tiny, S, B, L or XL; --dim, --depth and --heads override it",
                      ("tiny", "S", "B", "L", "XL"))
    dim: int = field(0, "width; 0: what --size says")
    depth: int = field(0, "number of blocks; 0: what --size says")
    heads: int = field(0, "attention heads; 0: what --size says")
    # ---- EDIT HERE for ablations: the flow ----
    shift: str = field("2.5", "time shift in training, above 1: more time near noise; auto: RAE's "
                       "rule by the latent's size (code: 2.5)")
    sample_shift: str = field("4", "time shift of sampling, the same convention (code: 6.67)")
    drop: float = field(0.1, "share of labels replaced by 'no class', for guidance (paper: 0.1)")
    # -------------------------------------------
    steps: int = field(3500, "optimiser steps")
    batch: int = field(64, "latents a step, over all ranks together (paper: 256)")
    micro_batch: int = field(0, "latents at a time, for a small card; 0: all. Same gradient")
    lr: float = field(2e-3, "learning rate (paper: 1e-4)")
    warmup: int = field(200, "steps of linear warm-up (paper: 0)")
    decay: bool = field(True, "cosine decay of the learning rate to zero (paper: no)")
    weight_decay: float = field(0.0, "AdamW's weight decay (paper: 0)")
    beta2: float = field(0.99, "AdamW's beta 2 (paper: 0.999)")
    clip: float = field(1.0, "greatest norm of the gradient; 0: no clipping (paper: 0)")
    ema: float = field(0.999, "decay of the averaged weights once warm (paper: 0.9999)")
    preview_every: int = field(1000, "steps between preview pictures")
    preview_scale: float = field(2.0, "guidance of the preview pictures")
    seed: int = field(0, "all randomness is a function of (seed, step)")
    device: str = field("auto", "cuda, cpu, ...; auto takes a GPU when there is one")
    save_every: int = field(500, "steps between checkpoints")
    keep: str = field("", "steps, with commas between, after which the averaged weights are kept "
                      "for good, as dit_<step>.pt")
    overwrite: bool = field(False, "start afresh over what is in --out")

    def check(self):
        """Fill the sizes in; impossible combinations end here, before anything is read."""
        dim, depth, heads = SIZES[self.size]
        self.dim, self.depth = self.dim or dim, self.depth or depth
        self.heads = self.heads or heads
        check_shared(self)
        require(self.dim > 0 and self.depth > 0 and self.heads > 0,
                "--dim, --depth and --heads must be positive")
        require(self.dim % self.heads == 0, f"--dim {self.dim} must be a multiple of --heads "
                f"{self.heads}")
        require(self.dim % 4 == 0, "--dim must be a multiple of 4")
        check_shift("--shift", self.shift)
        check_shift("--sample_shift", self.sample_shift)
        require(self.micro_batch >= 0 and self.clip >= 0,
                "--micro_batch and --clip must not be negative")
        require(0 <= self.drop < 1, "--drop must be in [0, 1)")
        require(0 <= self.ema < 1, "--ema must be in [0, 1)")
        require(self.preview_every >= 1, "--preview_every must be at least 1")
        require(all(k.strip().isdigit() for k in self.keep.split(",") if self.keep),
                "--keep must be whole numbers with commas between, such as 500,1000")


SIZES = {                      # width, depth, heads; parameters at 392 channels
    "tiny": (192, 6, 6),
    "S": (384, 12, 6),         # 33.2 M
    "B": (768, 12, 12),        # 131.1 M
    "L": (1024, 24, 16),       # 458.9 M
    "XL": (1152, 28, 16),      # 676.0 M
}

PRESETS = {
    # 2 CPU cores (AMD EPYC), seed 0, 4.2 min: 10 steps, guidance 2: .941 recognised, Frechet 0.90.
    "shapes": dict(),
    # 2 CPU cores, 3 s: noise, but every file.
    "debug": dict(dim=128, depth=1, heads=4, steps=20, batch=32, warmup=5, save_every=10,
                  preview_every=20),
    # The paper's optimiser and shifts, its size B. Not trained here: no weights, no photographs.
    "imagenette": dict(size="B", shift="2.5", sample_shift="6.67", steps=40000, batch=256,
                       lr=1e-4, warmup=0, decay=False, beta2=0.999, clip=0.0, ema=0.9999,
                       preview_every=2000, save_every=2000),
}


def check_shift(flag, text):
    """ValueError unless a shift is `auto` or a positive number."""
    try:
        good = text == "auto" or 0 < float(text) < math.inf
    except ValueError:
        good = False
    require(good, f"{flag} must be a positive number or auto, not {text!r}")


def resolve_shift(text, ae):
    """A shift flag -> the number, for the latents of an autoencoder."""
    if text != "auto":
        return float(text)
    return auto_shift((ae.image_size // ae.patch) ** 2, ae.latent_dim)

# ---------------------------------------------------------------- the model


def sincos(positions, dim):
    """positions (M,) -> (M, dim): cosines and sines of dim/2 frequencies from 1 to 1/10,000."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=positions.device)
                          / (dim // 2))
    angle = positions.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


def modulate(x, shift, scale):
    """adaLN: x (B, N, D), shift and scale (B, D)"""
    return x * (1 + scale[:, None]) + shift[:, None]


class TimeEmbedding(nn.Module):
    """t in [0, 1] -> (B, D).  Times 1000, because the sinusoid was made for 0..1000: without it 12
    of its first 128 channels move at all."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(sincos(1000 * t, 256))


class Block(nn.Module):
    """Attention and MLP, each behind a modulated norm and a gate that begins at zero."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        # QK-norm: keeps the logits from growing until bfloat16 breaks; weights shared by the heads
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        B, N, D = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c).chunk(6, 1)
        qkv = self.qkv(modulate(self.norm1(x), shift1, scale1))
        q, k, v = qkv.view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)     # each (B, A, N, D/A)
        # ---- EXERCISE 9: rotate q and k ----
        y = attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        x = x + gate1[:, None] * self.proj(y.transpose(1, 2).reshape(B, N, D))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """The velocity network.  Label `classes` means no class.  Untrained it predicts zero."""

    def __init__(self, channels, classes, dim=192, depth=6, heads=6):
        super().__init__()
        self.channels, self.classes, self.dim = channels, classes, dim
        self.inp = nn.Linear(channels, dim)
        self.time = TimeEmbedding(dim)
        self.label = nn.Embedding(classes + 1, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.out = nn.Linear(dim, channels)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for weight in (self.label.weight, self.time.mlp[0].weight, self.time.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        for m in [*(b.ada[1] for b in self.blocks), self.ada[1], self.out]:
            nn.init.zeros_(m.weight)                    # adaLN-zero: every block begins as identity
            nn.init.zeros_(m.bias)

    def positions(self, h, w, device):
        """The fixed 2-D embedding (h*w, D) of any grid: half for the row, half for the column."""
        rows = sincos(torch.arange(h, device=device), self.dim // 2)
        columns = sincos(torch.arange(w, device=device), self.dim // 2)
        return torch.cat([columns.repeat(h, 1), rows.repeat_interleave(w, 0)], 1)

    def forward(self, x, t, y):
        """x (B, C, h, w), t (B,) in [0, 1], y (B,) in 0..classes -> velocity (B, C, h, w)"""
        B, C, h, w = x.shape
        # ---- EXERCISE 9: no positions here ----
        z = self.inp(x.flatten(2).transpose(1, 2)) + self.positions(h, w, x.device)    # (B, N, D)
        c = self.time(t) + self.label(y)                                       # (B, D)
        for block in self.blocks:
            z = block(z, c)
        shift, scale = self.ada(c).chunk(2, 1)
        v = self.out(modulate(self.norm(z), shift, scale)).float()             # (B, N, C)
        return v.transpose(1, 2).reshape(B, C, h, w)

# ---------------------------------------------------------------- load


def load_dit(path, device="cpu"):
    """dit.pt -> DiT holding the EMA weights, in eval mode; `sample_shift` and `ae` (the fingerprint
    of the autoencoder whose latents it learned) as attributes.  Raises UserError."""
    checkpoint = config.load_kind(path, "dit", "python dit.py")
    model = build(checkpoint)
    model.load_state_dict(checkpoint["ema"])                       # strict
    model.sample_shift, model.ae = checkpoint["sample_shift"], checkpoint["ae"]
    model.step = checkpoint["step"]
    return model.to(device).eval().requires_grad_(False)


def build(checkpoint):
    """A fresh DiT of a checkpoint's shape."""
    c = checkpoint["config"]
    return DiT(checkpoint["channels"], checkpoint["classes"], c["dim"], c["depth"], c["heads"])


def load_latents(out, ae):
    """-> latents float16 (2, M, C, h, w) memory-mapped, labels int64 (M,); refuses a cache that
    another autoencoder wrote.  Where stage 1 wrote none, None and the labels of the pictures."""
    note, out = Path(out) / "latents.json", Path(out)
    try:
        said = json.loads(note.read_text()) if note.is_file() else {}
    except ValueError:
        said = {}
    if said.get("cached") is False and said["ae"] == ae.fingerprint:
        return None, load_pictures(ae)[1]
    if not (said and (out / "latents.npy").is_file()):
        raise UserError(f"{out / 'latents.npy'}: no such file; `python ae.py --out {out}` makes it")
    if said["ae"] != ae.fingerprint:
        raise UserError(f"{out / 'latents.npy'} was written by another autoencoder than "
                        f"{out / 'ae.pt'}; run its `python ae.py` command again")
    try:
        latents = np.load(out / "latents.npy", mmap_mode="r")
        return latents, torch.from_numpy(np.load(out / "labels.npy"))
    except (ValueError, EOFError) as error:
        raise UserError(f"{out / 'latents.npy'}: truncated or corrupt ({error}); delete "
                        f"{note} and run the `python ae.py` command again") from None



def load_pictures(ae):
    """The pictures that stage 1 learned from -> images uint8 (M, 3, S, S), labels int64 (M,)"""
    images, labels, _ = load_images(ae.dataset, ae.image_size, "train", classes=ae.subset)
    return images[:ae.images or None], labels[:ae.images or None]


# ---------------------------------------------------------------- train


def train(c):
    """Run or continue stage 2 as its Config says; -> the DiT holding the EMA weights."""
    device, autocast = config.setup(c.device)
    out = Path(c.out)
    path = out / "dit.pt"
    ae = load_ae(out / "ae.pt", device)
    latents, labels = load_latents(out, ae)
    pictures = load_pictures(ae)[0] if latents is None else None
    shift, sample_shift = resolve_shift(c.shift, ae), resolve_shift(c.sample_shift, ae)
    checkpoint = config.resume(path, "dit", c, "python dit.py")
    if checkpoint and checkpoint["ae"] != ae.fingerprint:
        raise UserError(f"{path} learned the latents of another autoencoder than {out / 'ae.pt'}; "
                        "--overwrite starts afresh")
    if checkpoint and checkpoint["step"] >= c.steps:
        return load_dit(path, device)
    torch.manual_seed(c.seed)
    model = DiT(ae.latent_dim, len(ae.classes), c.dim, c.depth, c.heads).to(device)
    ema = DiT(ae.latent_dim, len(ae.classes), c.dim, c.depth, c.heads).to(device).eval()
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, (0.9, c.beta2),
                                  weight_decay=c.weight_decay, fused=True)
    start = 0
    if checkpoint:
        start = checkpoint["step"]
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    announce(c, device, model, ae, len(labels), shift)

    def save(path, step, **state):
        if config.rank() == 0:
            config.save(path, dict(
                kind="dit", version=config.VERSION, config=config.plain(c), step=step,
                channels=model.channels, classes=model.classes, ae=ae.fingerprint,
                sample_shift=sample_shift, ema=ema.state_dict(), **state))

    def batch(step):
        """This step's latents and labels, drawn by its own generator -> x1 (B, C, h, w), y (B,)"""
        g = config.generator(c.seed, step)
        index = torch.randint(len(labels), (c.batch,), generator=g)
        flip = (torch.rand(c.batch, generator=g) < 0.5).long()
        dropped = torch.rand(c.batch, generator=g) < c.drop
        y = torch.where(dropped, model.classes, labels[index])
        mine = slice(config.rank(), None, config.world())
        if latents is None:                                        # encoded as we go
            x = to_float(pictures, index[mine], flip[mine] == 1, device)
            with autocast():
                x1 = ae.encode(x)
        else:
            x1 = torch.from_numpy(latents[flip[mine].numpy(), index[mine].numpy()])
        noise = config.generator(c.seed + 1_000_000, step * config.world() + config.rank(), device)
        return x1.to(device, non_blocking=True).float(), y[mine].to(device), noise

    began, kept = time.time(), {int(k) for k in c.keep.split(",") if k}
    bins = torch.zeros(2, 4, device=device)                        # loss and count by quarter of t
    with Stop() as stop:
        bar = config.progress(start, c.steps, "dit")
        following = batch(start)
        for step in bar:
            x1, y, noise = following
            for group in optimizer.param_groups:
                group["lr"] = config.rate(c, step)
            optimizer.zero_grad(set_to_none=True)
            losses, t = gradients(model, x1, y, draw(x1, shift, noise), c.micro_batch, autocast)
            config.average([p.grad for p in model.parameters()])
            norm = nn.utils.clip_grad_norm_(model.parameters(), c.clip or float("inf"))
            optimizer.step()
            with torch.no_grad():
                # the average's memory grows with the run: at first it forgets the random start
                weight = 1 - min(c.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)
                quarter = (t * 4).long().clamp(max=3)
                bins[0].index_add_(0, quarter, losses)
                bins[1].index_add_(0, quarter, torch.ones_like(losses))
            if step + 1 < c.steps:
                following = batch(step + 1)                        # while the device still works
            last, saving = step + 1 == c.steps, (step + 1) % c.save_every == 0 or stop.asked
            if (step + 1) % 100 == 0 or saving or last:      # waits for the device only here
                if not (torch.isfinite(bins).all() and torch.isfinite(norm)):
                    raise UserError(f"the loss is not finite at step {step}; {path}, if there, is "
                                    "the last good state; try a smaller --lr")
                mean = bins[0].sum() / bins[1].sum()
                shown = " ".join(f"{v:.3f}" for v in (bins[0] / bins[1].clamp(min=1)).tolist())
                bar.set_postfix_str(f"loss {mean:.4f}, by quarter of t: {shown}")
                result = mean.item(), shown
                bins.zero_()
            if step + 1 in kept:
                save(out / f"dit_{step + 1}.pt", step + 1)
            if saving or last:
                save(path, step + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
                if stop.asked and not last:
                    config.stopped(path, step + 1)
            if ((step + 1) % c.preview_every == 0 or last) and config.rank() == 0:
                preview(c, ema, ae, device, autocast)
    seconds = time.time() - began
    print(f"seconds: {seconds:.0f}\nloss: {result[0]:.4f}\nloss_by_quarter_of_t: {result[1]}")
    print(f"latents_per_second: {c.batch * (c.steps - start) / seconds:.0f}")
    ema.sample_shift, ema.ae, ema.step = sample_shift, ae.fingerprint, c.steps
    return ema.requires_grad_(False)


def gradients(model, x1, y, pair, micro_batch, autocast):
    """Add the gradient of the mean loss of x1 (B, ...) to the parameters -> losses (B,), t (B,).

    `micro_batch` samples at a time, 0 for all at once: each part counts by its share, so that the
    sum is the whole batch's gradient."""
    B, losses = len(x1), []
    for start in range(0, B, micro_batch or B):
        part = slice(start, start + (micro_batch or B))
        with autocast():
            loss, _ = flow_loss(model, x1[part], y[part], pair=(pair[0][part], pair[1][part]))
        (loss.sum() / B).backward()
        losses.append(loss.detach())
    return torch.cat(losses), pair[1]


def announce(c, device, model, ae, pictures, shift):
    """Five lines on what is about to run, and the one warning that a first experiment needs."""
    print(f"stage 2 on {config.describe(device)}; {pictures:,} pictures' latents of "
          f"{ae.latent_dim} channels ({ae.latent}), {len(ae.classes)} classes")
    print(f"DiT {c.size}: width {c.dim}, depth {c.depth}, {c.heads} heads, shift {shift:.3g}, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M; {c.steps} steps of "
          f"{c.batch}; flags: "
          + (" ".join(f"--{k} {getattr(c, k)}" for k in c.said) or "the preset's"))
    if c.dim <= ae.latent_dim:
        # RAE (arXiv 2510.11690, section 4.1): below that width even one picture is not learned
        print(f"warning: width {c.dim} is not above the latent's {ae.latent_dim} channels; "
              "it will learn badly, give a larger --dim")


@torch.no_grad()
def preview(c, model, ae, device, autocast):
    """preview.png: a row a class (ten at most) from noise that is always the same."""
    columns = 10 if ae.image_size <= 64 else 2
    y = torch.arange(min(10, model.classes), device=device).repeat_interleave(columns)
    noise = torch.randn(100, model.channels, *[ae.image_size // ae.patch] * 2,
                        generator=config.generator(123))
    noise = noise[:len(y)].to(device)
    with autocast():
        z = euler(guided(model, y, model.classes, c.preview_scale), noise, 10,
                  resolve_shift(c.sample_shift, ae))
        images = ae.decode(z)
    save_grid(Path(c.out) / "preview.png", to_uint8(images), columns)


def main(argv=None):
    """The command line."""
    train(config.parse(Config, PRESETS, argv))


if __name__ == "__main__":
    with config.one_line_errors():
        main()
