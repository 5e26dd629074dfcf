"""Stage 2: a diffusion transformer learns the latents of stage 1 by flow matching.

The DiT (arXiv 2212.09748) with QK-norm, as SVG trains it (arXiv 2510.15301, section 3.3): one token
per latent position, adaLN-zero, label dropout for guidance, fixed sine-cosine positions.  It trains
on cached latents, so no encoder runs in the loop, except with --repa.

    python dit.py                                     # shapes; 2.6 minutes on two CPU cores
    python dit.py --out out/vae                       # on the latents of another autoencoder
    python dit.py --ae out/shapes --out out/mine --shift 1    # a second DiT on the same latents

Reads ae.pt; writes out/<preset>/dit.pt (self-describing), dit.tsv (the loss and its parts by
quarter of t, every 50 steps) and preview.png (always the same noise and classes, so that you can
watch it learn).
"""
import math, time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from ae import load_ae, load_latents, load_pictures
from data import to_float, to_uint8
from dino import attention
from flow import ab2, auto_shift, draw, flow_loss, guided
from plumbing import config, muon
from plumbing.align import Repa
from plumbing.config import UserError, at_least, check_training, field, require
from plumbing.draw import save_grid

# Letters: B batch, C latent channels, h w latent grid, N = h w tokens, D width, A heads.

# ---------------------------------------------------------------- config and presets


@dataclass
class Config:
    """Stage 2."""
    preset: str = field("shapes", "a named set of the options below")
    out: str = field("", "folder for the results; out/<preset> if empty")
    ae: str = field("", "folder of stage 1's ae.pt; the same as --out if empty")
    model: str = field("tiny", "width, depth and heads; --dim, --depth and --heads override it",
                       ("tiny", "S", "B", "L", "XL"), also=["size"])
    dim: int = field(0, "width; 0: from --model")
    depth: int = field(0, "number of blocks; 0: from --model")
    heads: int = field(0, "attention heads; 0: from --model")
    # ---- EDIT HERE for ablations: the flow ----
    shift: str = field("2.5", "time shift in training, above 1: more time near noise; auto: RAE's "
                       "rule, by the size of the latent (code: 2.5)")
    logit_normal: bool = field(True, "in training, times near 0 and 1 are rare; otherwise uniform "
                               "before the shift (code: uniform)")
    sample_shift: str = field("3", "time shift in sampling, same convention (code: 6.67)")
    drop: float = field(0.1, "fraction of labels replaced by 'no class', for guidance (paper: 0.1)")
    # -------------------------------------------
    repa: float = field(0.0, "weight of REPA: an early block's tokens are aligned to the frozen "
                        "encoder's (REPA: 0.5)")
    steps: int = field(1600, "optimizer steps", also=["epochs", "iterations"])
    batch: int = field(64, "latents per step, over all ranks together (paper: 256)")
    micro_batch: int = field(0, "latents at a time, for a small GPU; 0: all. Same gradient")
    lr: float = field(4e-3, "learning rate (paper: 1e-4)", also=["learning_rate"])
    muon: float = field(0.03, "learning rate of Muon, on the blocks' matrices; 0: AdamW (paper: 0)")
    warmup: int = field(50, "steps of linear warm-up (paper: 0)")
    decay: bool = field(True, "cosine decay of the learning rate to zero (paper: no)")
    beta2: float = field(0.99, "AdamW's beta 2 (paper: 0.999)")
    clip: float = field(1.0, "largest gradient norm; 0: no clipping (paper: 0)")
    ema: float = field(0.999, "decay of the averaged weights after warm-up (paper: 0.9999)")
    cache: bool = field(True, "encode all training images once, to disk; otherwise each batch anew")
    preview_every: int = field(1000, "steps between preview images")
    seed: int = field(0, "all randomness is a function of (seed, step)")
    device: str = field("auto", "cuda, cpu, ...; auto takes a GPU if there is one")
    precision: str = field("auto", "of the network; auto: bf16 where it is fast, fp16 on a GPU "
                           "without it, else float32", ("auto", *config.PRECISIONS))
    compile: str = field("auto", "torch.compile the network; auto: on CUDA", ("auto", "yes", "no"))
    save_every: int = field(500, "steps between checkpoints")
    keep: tuple = field((), "steps whose averaged weights are kept as dit_<step>.pt")
    overwrite: bool = field(False, "start from scratch, replacing what is in --out")

    def check(self):
        """Fill in the sizes; ValueError for impossible values, before anything is read."""
        dim, depth, heads = SIZES[self.model]
        self.dim, self.depth = self.dim or dim, self.depth or depth
        self.heads = self.heads or heads
        check_training(self)
        at_least(self, dim=1, depth=1, heads=1, micro_batch=0, clip=0, muon=0, repa=0,
                 preview_every=1)
        require(self.dim % self.heads == 0, f"--dim {self.dim} must be a multiple of --heads "
                f"{self.heads}")
        require(self.dim % 4 == 0, "--dim must be a multiple of 4")
        check_shift("--shift", self.shift)
        check_shift("--sample_shift", self.sample_shift)
        require(0 <= self.drop < 1 and 0 <= self.ema < 1, "--drop and --ema must be in [0, 1)")


SIZES = {                      # width, depth, heads; parameters at 392 channels
    "tiny": (192, 6, 6),
    "S": (384, 12, 6),         # 33.2 M
    "B": (768, 12, 12),        # 131.1 M
    "L": (1024, 24, 16),       # 458.9 M
    "XL": (1152, 28, 16),      # 676.0 M
}

PRESETS = {
    # 2 CPU cores (AMD EPYC), 2.6 min; 3 seeds, 10 steps, guidance 3: accuracy .965 +- .002.
    "shapes": dict(),
    # 2 CPU cores, 3 s: barely trained, but writes every file.
    "debug": dict(dim=128, depth=1, heads=4, steps=20, batch=32, warmup=5, save_every=10,
                  preview_every=20),
    # 64 tokens. 2 shared CPU cores, seed 0, 52 min; 10 steps, guidance 2: accuracy .950, Frechet
    # 1.69, random conv 15.7; 2.5 away from step 1,000: .946, 2.38, 41.8; decode(encode(x)): .846,
    # 0.94, 9.0.
    "photos": dict(dim=256, depth=6, heads=4, steps=5000, logit_normal=False, keep=(1000,)),
    # The paper's optimizer and shifts, its size B. Not trained here: no weights.
    "imagenette": dict(model="B", shift="2.5", sample_shift="6.67", logit_normal=False, steps=40000,
                       batch=256, lr=1e-4, muon=0.0, warmup=0, decay=False, beta2=0.999, clip=0.0,
                       ema=0.9999, preview_every=2000, save_every=2000),
}


def check_shift(flag, text):
    """ValueError unless a shift is `auto` or a positive number."""
    try:
        good = text == "auto" or 0 < float(text) < math.inf
    except ValueError:
        good = False
    require(good, f"{flag} must be a positive number or auto, not {text!r}")


def resolve_shift(text, ae):
    """A shift flag -> its value, for the latents of an autoencoder."""
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


def modulate(x, offset, gain):
    """adaLN: x (B, N, D), offset and gain (B, D), which DiT's code calls shift and scale"""
    return x * (1 + gain[:, None]) + offset[:, None]


class TimeEmbedding(nn.Module):
    """t in [0, 1] -> (B, D).  Times 1000, because the sinusoid was designed for 0..1000: on [0, 1]
    only 12 of its first 128 channels would vary."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(sincos(1000 * t, 256))


class Block(nn.Module):
    """Attention and MLP, each after a modulated norm and before a gate that starts at zero."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        # QK-norm keeps the logits from growing until bfloat16 breaks; the heads share its weights
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)
        # DiT's GELU is the tanh approximation, which takes 3 times as long on a CPU
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        B, N, D = x.shape
        offset1, gain1, gate1, offset2, gain2, gate2 = self.ada(c).chunk(6, 1)
        qkv = self.qkv(modulate(self.norm1(x), offset1, gain1))
        q, k, v = qkv.view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)     # each (B, A, N, D/A)
        # ---- EXERCISE 9: rotate q and k ----
        y = attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        x = x + gate1[:, None] * self.proj(y.transpose(1, 2).reshape(B, N, D))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), offset2, gain2))


class DiT(nn.Module):
    """The velocity network.  Label `classes` means no class.  Before training it predicts zero."""

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
            nn.init.zeros_(m.weight)                    # adaLN-zero: each block starts as identity
            nn.init.zeros_(m.bias)

    def matrices(self):
        """The weights of attention and MLP, which Muon trains."""
        return [p for block in self.blocks for part in (block.qkv, block.proj, block.mlp)
                for p in part.parameters() if p.ndim > 1]

    def positions(self, h, w, device):
        """The fixed 2-D embedding (h*w, D) of any grid: half for the row, half for the column."""
        rows = sincos(torch.arange(h, device=device), self.dim // 2)
        columns = sincos(torch.arange(w, device=device), self.dim // 2)
        return torch.cat([columns.repeat(h, 1), rows.repeat_interleave(w, 0)], 1)

    def forward(self, x, t, y, hidden=None):
        """x (B, C, h, w), t (B,) in [0, 1], y (B,) in 0..classes -> velocity (B, C, h, w).
        hidden: a list, to which the tokens (B, N, D) after each block are added."""
        B, C, h, w = x.shape
        # ---- EXERCISE 9: no positions here ----
        z = self.inp(x.flatten(2).transpose(1, 2)) + self.positions(h, w, x.device)    # (B, N, D)
        c = self.time(t) + self.label(y)                                       # (B, D)
        for block in self.blocks:
            z = block(z, c)
            if hidden is not None:
                hidden.append(z)
        offset, gain = self.ada(c).chunk(2, 1)
        v = self.out(modulate(self.norm(z), offset, gain)).float()             # (B, N, C)
        return v.transpose(1, 2).reshape(B, C, h, w)

# ---------------------------------------------------------------- load


def load_dit(path, device="cpu"):
    """dit.pt -> DiT with the EMA weights, in eval mode, with `sample_shift`, `step`, and the
    `ae_fingerprint` and `ae_folder` of the autoencoder whose latents it learned.  UserError."""
    checkpoint = config.load_kind(path, "dit", f"python dit.py --out {Path(path).parent}")
    c = checkpoint["config"]
    model = DiT(checkpoint["channels"], checkpoint["classes"], c["dim"], c["depth"], c["heads"])
    model.load_state_dict(checkpoint["ema"])                       # strict
    for name in ("sample_shift", "step", "ae_fingerprint", "ae_folder"):
        setattr(model, name, checkpoint[name])
    return model.to(device).eval().requires_grad_(False)


def check_pair(model, ae):
    """UserError unless the DiT learned the latents of this autoencoder."""
    if getattr(model, "ae_fingerprint", None) not in (None, getattr(ae, "fingerprint", None)):
        raise UserError("the DiT learned the latents of another autoencoder, not of this ae.pt; "
                        "`python dit.py --overwrite` trains it on these")

# ---------------------------------------------------------------- train


def train(c):
    """Run or resume stage 2 with a Config -> the DiT with the EMA weights."""
    device, autocast = config.setup(c.device, precision=c.precision)
    out, folder = Path(c.out), Path(c.ae or c.out)
    path = out / "dit.pt"
    ae = load_ae(folder / "ae.pt", device)
    checkpoint = config.resume(path, "dit", c, "python dit.py")
    if checkpoint:
        finished = load_dit(path, device)
        check_pair(finished, ae)
        if finished.step >= c.steps:
            return finished
    shift, sample_shift = resolve_shift(c.shift, ae), resolve_shift(c.sample_shift, ae)
    batch, count = feed(c, ae, folder, device, autocast)
    torch.manual_seed(c.seed)
    model = DiT(ae.latent_dim, len(ae.class_names), c.dim, c.depth, c.heads).to(device)
    ema = DiT(ae.latent_dim, len(ae.class_names), c.dim, c.depth, c.heads).to(device).eval()
    ema.load_state_dict(model.state_dict())
    extra = dict(repa=Repa(c, ae.dino.dim).to(device)) if c.repa else {}
    trained = [p for part in (model, *extra.values()) for p in part.parameters()]
    optimizer = muon.optimizer(trained, model.matrices(), c.lr, c.muon, (0.9, c.beta2))
    scaler = config.scaler(device, c.precision)
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler, **extra)
    config.restore(checkpoint, parts)

    def save(step, path=path, names=tuple(parts)):
        if config.rank() == 0:
            config.save(path, dict(
                kind="dit", version=config.VERSION, config=config.plain(c), step=step,
                channels=model.channels, classes=model.classes, sample_shift=sample_shift,
                ae_fingerprint=ae.fingerprint, ae_folder=str(folder.resolve()),
                **{k: parts[k].state_dict() for k in names}))

    announce(c, device, model, ae, count, shift)
    config.compile_parts(model, Block, c.compile, device)
    network = config.parallel(model)
    start, began = checkpoint["step"] if checkpoint else 0, time.time()
    by_time = config.LossByTime(device)
    loop = config.Loop("dit", c, optimizer, path, save, start, losses=path.with_suffix(".tsv"))
    following = batch(start)
    for step in loop:
        x1, y, noise, h = following                                # (B, C, h, w), (B,)
        optimizer.zero_grad(set_to_none=True)
        pair = draw(x1.new_empty(c.batch, *x1.shape[1:]), shift, noise, c.logit_normal)
        pair = [part[config.my_rows()] for part in pair]           # it is drawn for all ranks
        losses, t = gradients(network, x1, y, pair, c.micro_batch, autocast, scaler, h, **extra)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, c.clip or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            # EMA warm-up: the decay starts low, so that the random initial weights are forgotten
            weight = 1 - min(c.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)
        by_time.add(losses, t)
        loop.log(losses, loss=by_time)
        if step + 1 < c.steps:
            following = batch(step + 1)                            # while the device is still busy
        if step + 1 in c.keep:
            save(step + 1, out / f"dit_{step + 1}.pt", ["ema"])
        if (step + 1) % c.preview_every == 0:
            preview(out / "preview.png", ema, ae, sample_shift, device, autocast)
    save(c.steps)
    config.wait_for_ranks()                                        # every rank reads it below
    preview(out / "preview.png", ema, ae, sample_shift, device, autocast)
    seconds = time.time() - began
    print(f"seconds: {seconds:.0f}\nloss: {by_time}\n"
          f"latents_per_second: {c.batch * (c.steps - start) / seconds:.0f}",
          *(f"\nrepa_cosine: {repa.cosine:.3f}" for repa in extra.values()), sep="")
    return load_dit(path, device)


def feed(c, ae, folder, device, autocast):
    """-> function step -> (x1 (B, C, h, w), y (B,), generator of the noise, with --repa the
    encoder's tokens (B, N, D), else None); number of images."""
    if c.cache:
        latents, labels = load_latents(ae, folder, device, autocast)
    if c.repa or not c.cache:
        images, labels, _ = load_pictures(ae.config)

    def batch(step):
        g = config.generator(c.seed, step)
        index = torch.randint(len(labels), (c.batch,), generator=g)
        flip = (torch.rand(c.batch, generator=g) < 0.5).long()
        dropped = torch.rand(c.batch, generator=g) < c.drop
        y = torch.where(dropped, len(ae.class_names), labels[index])
        mine, h = config.my_rows(), None
        if c.repa or not c.cache:
            x = to_float(images, index[mine], flip[mine] == 1, device)
        if c.repa:
            with autocast(), torch.no_grad():
                h = ae.semantics(ae.dino.normalize(x)).float()
        if c.cache:
            x1 = torch.from_numpy(latents[flip[mine].numpy(), index[mine].numpy()])
            x1 = config.send(x1, device)
        else:
            with autocast():
                x1 = ae.encode(x)
        noise = config.generator(c.seed + 1_000_000, step, device)
        return x1.float(), config.send(y[mine], device), noise, h
    return batch, len(labels)


def gradients(model, x1, y, pair, micro_batch, autocast, scaler=config.UNSCALED, h=None, repa=None):
    """Add the gradient of the mean loss of x1 (B, ...) to the parameters -> losses (B,), t (B,).

    `micro_batch` samples at a time, 0 for all at once: each part is weighted by its size, so that
    the sum is the gradient of the whole batch.  With a `Repa` and the encoder's tokens h (B, N, D)
    the gradient includes its loss; the result does not."""
    B, losses = len(x1), []
    for start in range(0, B, micro_batch or B):
        part = slice(start, start + (micro_batch or B))
        # the ranks exchange gradients once per step (what DistributedDataParallel.no_sync sets)
        model.require_backward_grad_sync = part.stop >= B
        hidden = [] if repa else None
        with autocast():
            loss, _ = flow_loss(model, x1[part], y[part], hidden, pair=[p[part] for p in pair])
            total = loss + repa(hidden, h[part]) if repa else loss
        scaler.scale(total.sum() / B).backward()
        losses.append(loss.detach())
    if repa:
        config.all_reduce_mean([p.grad for p in repa.parameters()])
    return torch.cat(losses), pair[1]


def announce(c, device, model, ae, count, shift):
    """Print what is about to run, in three lines, and a warning if the DiT is too narrow."""
    print(f"stage 2 on {config.describe(device, c.precision)}; latents of {count:,} images, "
          f"{ae.latent_dim} channels ({ae.config.latent}), {len(ae.class_names)} classes\n"
          f"DiT {c.model}: width {c.dim}, depth {c.depth}, {c.heads} heads, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M; shift {shift:.3g}\n"
          f"{c.steps} steps of {c.batch}; {config.flags(c)}")
    if c.dim <= ae.latent_dim:
        # RAE (arXiv 2510.11690, section 4.1): such a DiT cannot even learn a single image
        print(f"warning: width {c.dim} is not above the latent's {ae.latent_dim} channels, so it "
              "will learn poorly; use a larger --dim")


@torch.no_grad()
def preview(path, model, ae, shift, device, autocast):
    """A grid with one row per class (at most ten), always from the same noise, guidance 3."""
    if config.rank():
        return
    columns = 10 if ae.image_size <= 64 else 2
    y = torch.arange(min(10, model.classes), device=device).repeat_interleave(columns)
    noise = torch.randn(100, model.channels, *[ae.image_size // ae.patch] * 2,
                        generator=config.generator(123))
    noise = noise[:len(y)].to(device)
    with autocast():
        z = ab2(guided(model, y, model.classes, 3.0), noise, 10, shift)
        images = ae.decode(z)
    save_grid(path, to_uint8(images), columns)


def main(argv=None):
    """The command line."""
    c = config.parse(Config, PRESETS, argv)
    train(c)
    config.follow(c, "sample.py", look=f"look at {c.out}/preview.png; ")


if __name__ == "__main__":
    with config.one_line_errors():
        main()
