"""Stage 1: the SVG autoencoder.  Pictures to latents and back, with no variational anything.

A frozen DINOv3 gives every patch a token that knows *what* is there but has dropped colour and
fine detail.  A small residual ViT adds a few channels that carry the rest; their scale is matched
to DINO's so that they do not drown the semantic ones or be drowned; a convolutional decoder turns
the concatenation back into pixels (SVG, arXiv 2510.15301, section 3.2 and Figure 5).

    python ae.py                          # shapes, 32 px; 3.9 minutes on two CPU cores
    python ae.py --latent vae --out out/vae   # the baseline: a KL-VAE of the same networks
    python ae.py --data ~/pictures --size 64  # a folder with one sub-folder a class

Writes out/<preset>/ae.pt (self-describing), latents.npy (every training picture's latent, plain
and flipped), labels.npy, and reconstructions.png (each picture beside its reconstruction).
"""
import json, math, shutil, time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from plumbing import config
from plumbing.config import Stop, UserError, check_shared, field, require
from data import load_images, to_float
from dino import DINOv3, ViTConfig, load_dino, rebuild
from metrics import psnr, ssim
from plumbing.lpips import load_lpips

# Letters: B batch, S picture side, h w the latent grid, N = h w tokens,
#          D channels of DINO, R of the residual, C of the latent (D + R).

# ---------------------------------------------------------------- config and presets


@dataclass
class Config:
    """Stage 1."""
    preset: str = field("shapes", "a named set of the options below")
    out: str = field("", "folder for everything that is written; out/<preset> if empty")
    data: str = field("shapes", "shapes, imagenette, imagewoof, or a folder")
    classes: str = field("", "only these classes: names with commas between, or a file of names")
    images: int = field(0, "learn from the first N pictures only; 0: all")
    size: int = field(32, "side of a picture in pixels; a multiple of the encoder's patch")
    crop: str = field("centre", "which square of a picture trains (code: random; measuring and "
                      "stage 2 see the centre)", ("centre", "random"))
    encoder: str = field("tiny", "tiny (embedded), a DINOv3 name, timm:NAME, or a file")
    # ---- EDIT HERE for ablations: what the latent is made of ----
    latent: str = field("svg", "svg; dino: no residual; unaligned: residual not matched; vae: a "
                        "KL-VAE of the same networks", ("svg", "dino", "unaligned", "vae"))
    residual_dim: int = field(16, "channels of the residual (paper: 8)")
    mask_prob: float = field(0.1, "share of samples that train without residual (code: .1)")
    layer: int = field(0, "the encoder's block whose tokens are taken; 0: the last (paper: last)")
    normalise: str = field("channel", "what the finished latents are divided by: each channel's "
                           "own standard deviation, or one scalar", ("channel", "scalar"))
    noise: float = field(0.0, "noise on the latents that the decoder learns from, in their own "
                         "standard deviations (RAE: 0.8)")
    # --------------------------------------------------------------
    enc_dim: int = field(96, "width of the residual ViT (paper: 384)")
    enc_depth: int = field(4, "depth of the residual ViT (paper: 6)")
    enc_stem: int = field(32, "width of its convolutional stem, 0: a linear patch map (paper: 0)")
    ch: int = field(32, "decoder width at full resolution (paper: 128)")
    mult: str = field("1,2,2,4", "decoder width multipliers, full resolution first (1,1,2,2,4)")
    res_blocks: int = field(1, "residual blocks a level, and one more (paper: 2)")
    vae_dim: int = field(16, "channels of the VAE's latent (--latent vae only)")
    kl: float = field(1e-4, "weight of the mean KL divergence a latent value (--latent vae only)")
    perceptual: float = field(0.5, "weight of the perceptual loss (paper: 1)")
    perceptual_net: str = field("encoder", "whose features it compares: the frozen encoder's own, "
                                "or LPIPS on VGG16 (paper: lpips)", ("encoder", "lpips"))
    gan: float = field(0.0, "weight of the PatchGAN loss (paper: 0.5)")
    gan_start: int = field(2500, "batches before the discriminator joins (paper: 2,501)")
    steps: int = field(1500, "optimiser steps")
    batch: int = field(32, "pictures a step, over all ranks together (paper: 512)")
    lr: float = field(1.5e-3, "learning rate (paper: 1e-4)")
    warmup: int = field(100, "steps of linear warm-up (paper: 0)")
    decay: bool = field(True, "cosine decay of the learning rate to zero (paper: no)")
    beta1: float = field(0.9, "Adam's beta 1 (paper: 0.5)")
    beta2: float = field(0.99, "Adam's beta 2 (paper: 0.9)")
    clip: float = field(1.0, "greatest norm of the gradient; 0: no clipping (paper: 0)")
    ema: float = field(0.0, "decay of averaged weights that replace the last; 0: none (paper: 0)")
    cache: str = field("auto", "write the latents to disk; auto: if they fill at most half of it; "
                       "no: stage 2 encodes as it goes", ("auto", "yes", "no"))
    seed: int = field(0, "all randomness is a function of (seed, step)")
    device: str = field("auto", "cuda, cpu, ...; auto takes a GPU when there is one")
    save_every: int = field(300, "steps between checkpoints")
    overwrite: bool = field(False, "start afresh over what is in --out")

    def check(self):
        """Impossible combinations end here, before anything is read or written."""
        check_shared(self)
        require(self.size >= 8, "--size must be at least 8")
        require(self.images >= 0, "--images must not be negative")
        require(self.residual_dim >= 1, "--residual_dim must be at least 1, or --latent dino")
        require(self.vae_dim >= 1, "--vae_dim must be at least 1")
        require(0 <= self.mask_prob < 1, "--mask_prob must be in [0, 1)")
        require(self.layer >= 0, "--layer counts from 1; 0 is the last")
        require(self.ch % 8 == 0 and self.ch > 0, "--ch must be a positive multiple of 8")
        require(all(m.strip().isdigit() and int(m) > 0 for m in self.mult.split(",")),
                "--mult must be whole numbers with commas between, such as 1,2,4,4")
        require(self.enc_dim % 32 == 0 and self.enc_dim > 0, "--enc_dim must be a multiple of 32")
        require(0 <= self.ema < 1, "--ema must be in [0, 1)")
        for name in ("perceptual", "gan", "kl", "clip", "noise"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative")


PRESETS = {
    # 2 CPU cores (AMD EPYC), seed 0, 3.9 min: 26.0 dB, SSIM .733; the judge knows .998 of 1,000.
    "shapes": dict(),
    # 2 CPU cores, 6 s: noise, but every file.
    "debug": dict(images=1000, steps=20, batch=16, ch=16, enc_dim=32, enc_depth=1, enc_stem=8,
                  warmup=5, save_every=10),
    # The paper's sizes and optimiser at 256 px, on 9,469 pictures. Not trained here: no weights.
    "imagenette": dict(data="imagenette", size=256, crop="random", encoder="vits16plus",
                       residual_dim=8, enc_dim=384, enc_depth=6, enc_stem=0, ch=128,
                       mult="1,1,2,2,4", res_blocks=2, perceptual=1.0, perceptual_net="lpips",
                       gan=0.5, gan_start=2501, steps=20000, batch=32, lr=1e-4, warmup=0,
                       decay=False, beta1=0.5, beta2=0.9, clip=0.0, save_every=1000),
}

# ---------------------------------------------------------------- the residual and its matching


class ResidualEncoder(nn.Module):
    """A small ViT and a two-layer head: pictures -> `out` channels a token (paper: 11.2 M).

    The same blocks as the frozen encoder, so it takes any resolution; nothing of it is frozen.
    """

    def __init__(self, c, patch, out):
        super().__init__()
        self.vit = DINOv3(ViTConfig(dim=c.enc_dim, depth=c.enc_depth, heads=c.enc_dim // 32,
                                    hidden=4 * c.enc_dim, patch=patch, stem=c.enc_stem,
                                    registers=1))
        self.head = nn.Sequential(nn.Linear(c.enc_dim, c.enc_dim), nn.GELU(),
                                  nn.Linear(c.enc_dim, out))

    def forward(self, images):
        """[-1, 1] (B, 3, H, W) -> (B, N, out)"""
        return self.head(self.vit(self.vit.normalize(images))[0])


# ---- EXERCISE 8: a mean and a spread for each channel ----
class DistributionMatching(nn.Module):
    """r' = (r - mu_r) / sigma_r * sigma_h + mu_h: the residual's scale becomes DINO's.

    Four scalars: per channel over batch and tokens, then averaged over the channels, as the
    authors' code does (the paper leaves the axes open).  They carry no gradient.  Training takes
    them from the batch, over all ranks; evaluation from running averages, so that a latent does
    not depend on what else is in its batch (the authors' does).
    """

    def __init__(self, momentum=0.02):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running", torch.tensor([0.0, 1.0, 0.0, 1.0]))
        self.register_buffer("seen", torch.tensor(0))

    @torch.no_grad()
    def measure(self, r, h):
        """-> mu_r, sigma_r, mu_h, sigma_h of this batch, a tensor (4,)"""
        moments = []
        for x in (r.float(), h.float()):
            first, second = x.mean((0, 1)), x.square().mean((0, 1))
            config.average([first, second])
            moments += [first.mean(), (second - first.square()).clamp(min=0).sqrt().mean()]
        return torch.stack(moments)

    def forward(self, r, h):
        """residual (B, N, R) and DINO (B, N, D) -> matched residual (B, N, R); DINO is untouched"""
        if self.training:
            now = self.measure(r, h)
            # an ordinary mean at first, an exponential one later
            self.seen += 1
            self.running.lerp_(now, max(self.momentum, 1 / self.seen.item()))
        else:
            now = self.running
        mu_r, sigma_r, mu_h, sigma_h = now
        return (r - mu_r) / (sigma_r + 1e-6) * sigma_h + mu_h

# ---------------------------------------------------------------- the decoder


def norm(width):
    """Group normalisation in groups of at least four channels, at most 32 groups as in LDM."""
    return nn.GroupNorm(min(32, width // 4), width, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x))))))"""

    def __init__(self, width, out):
        super().__init__()
        self.norm1, self.conv1 = norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class SelfAttention(nn.Module):
    """One head over all places of the map."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv = norm(width), nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)   # (B, N, width)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class Decoder(nn.Module):
    """The convolutional decoder of latent diffusion (LDM, arXiv 2112.10752); paper: 43.1 M.

    A middle of ResBlock, attention, ResBlock at the latent's resolution, then levels of ResBlocks,
    each but the last followed by nearest-neighbour doubling and a convolution.
    """

    def __init__(self, channels, ch, mult, res_blocks):
        super().__init__()
        width = ch * mult[-1]
        layers = [nn.Conv2d(channels, width, 3, padding=1),
                  ResBlock(width, width), SelfAttention(width), ResBlock(width, width)]
        for level in reversed(range(len(mult))):
            for _ in range(res_blocks + 1):
                layers.append(ResBlock(width, ch * mult[level]))
                width = ch * mult[level]
                if level == len(mult) - 1:
                    layers.append(SelfAttention(width))
            if level:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
        self.layers = nn.Sequential(*layers, norm(width), nn.SiLU())
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        """(B, C, h, w) -> (B, 3, S, S), unbounded"""
        return self.conv_out(self.layers(z.contiguous()))

# ---------------------------------------------------------------- the autoencoder


class AutoEncoder(nn.Module):
    """Pictures <-> latents.  `encode` and `decode` are the two conventions of the README; the
    normalisation per channel is inside them, so that nobody can forget it on one side."""

    def __init__(self, c, encoder):
        """c: a Config; encoder: the frozen DINOv3."""
        super().__init__()
        mult = [int(m) for m in c.mult.split(",")]
        if encoder.patch != 2 ** (len(mult) - 1):
            raise UserError(f"--mult {c.mult}: a patch of {encoder.patch} pixels needs "
                            f"{encoder.patch.bit_length()} levels, this has {len(mult)}")
        if c.size % encoder.patch:
            raise UserError(f"--size {c.size} is no multiple of the patch, {encoder.patch}")
        self.latent, self.patch, self.image_size = c.latent, encoder.patch, c.size
        self.mask_prob, self.layer, self.noise = c.mask_prob, c.layer, c.noise
        self.dino = encoder.freeze()
        if c.latent == "vae":
            self.latent_dim = c.vae_dim
            self.residual = ResidualEncoder(c, self.patch, 2 * c.vae_dim)      # mean, log variance
        elif c.latent == "dino":
            self.latent_dim = encoder.dim
        else:
            self.latent_dim = encoder.dim + c.residual_dim
            self.residual = ResidualEncoder(c, self.patch, c.residual_dim)
            self.match = DistributionMatching()
            self.mask_token = nn.Parameter(0.02 * torch.randn(c.residual_dim))
        self.decoder = Decoder(self.latent_dim, c.ch, mult, c.res_blocks)
        self.register_buffer("mean", torch.zeros(self.latent_dim, 1, 1))
        self.register_buffer("std", torch.ones(self.latent_dim, 1, 1))

    def tokens(self, images, generator=None):
        """[-1, 1] (B, 3, H, W) -> latent tokens (B, N, C) before normalisation, and for the VAE its
        KL divergence (a scalar, 0 otherwise).  In training masks and noise come from generator."""
        kl = images.new_zeros(())
        if self.latent == "vae":
            mean, logvar = self.residual(images).float().chunk(2, -1)          # (B, N, C) each
            logvar = logvar.clamp(-30, 20)
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            if self.training:
                noise = torch.randn(mean.shape, generator=generator).to(mean.device)
                mean = mean + (0.5 * logvar).exp() * noise
            return mean, kl
        with torch.no_grad():
            h = self.semantics(self.dino.normalize(images)).float()            # (B, N, D)
        if self.latent == "dino":
            return h, kl
        r = self.residual(images).float()                                      # (B, N, R)
        if self.training:
            # some samples lose their whole residual, before the matching: the decoder must get
            # what it can out of DINO
            masked = torch.rand(len(r), generator=generator).to(r.device) < self.mask_prob
            r = torch.where(masked[:, None, None], self.mask_token, r)
        if self.latent == "svg":
            r = self.match(r, h)
        return torch.cat([h, r], -1), kl                                       # (B, N, D + R)

    def semantics(self, pixels):
        """Normalised pixels (B, 3, H, W) -> the frozen encoder's tokens (B, N, D), of the last
        block or of an earlier one (Table 6)."""
        if not self.layer:
            return self.dino(pixels)[0]
        blocks = self.dino.features(pixels)
        if self.layer > len(blocks):
            raise UserError(f"--layer {self.layer}: this encoder has {len(blocks)} blocks")
        N = pixels.shape[2] * pixels.shape[3] // self.patch ** 2
        # the final norm's scales belong to the last block: here each token is normalised plainly
        return F.layer_norm(blocks[self.layer - 1][:, -N:], (self.dino.dim,))

    def grid(self, tokens, images):
        """Tokens (B, N, C) -> map (B, C, h, w)"""
        h, w = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        return tokens.transpose(1, 2).reshape(len(tokens), -1, h, w)

    def forward(self, images, generator=None):
        """The training pass: pictures -> reconstruction (unbounded), KL."""
        tokens, kl = self.tokens(images, generator)
        if self.training and self.noise:
            # sigma |N(0, tau^2)| a picture (RAE, section 4.3): a sampler's latents are never exact
            draw = lambda *shape: torch.randn(shape, generator=generator).to(tokens.device)
            sigma = self.noise * draw(len(tokens), 1, 1).abs()
            tokens = tokens + sigma * tokens.detach().std((0, 1)) * draw(*tokens.shape)
        return self.decoder(self.grid(tokens, images)).float(), kl

    @torch.no_grad()
    def encode(self, images):
        """[-1, 1] (B, 3, H, W) -> latents (B, C, h, w), of zero mean and unit variance a channel"""
        return (self.grid(self.tokens(images)[0].float(), images) - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents):
        """latents (B, C, h, w) -> pictures (B, 3, H, W), clamped to [-1, 1]"""
        return self.decoder(latents.float() * self.std + self.mean).float().clamp(-1, 1)

# ---------------------------------------------------------------- losses


def perceptual_loss(dino, x, y):
    """Mean squared distance of x and y (B, 3, S, S) in the frozen encoder's tokens after every
    block, each token normalised: what LPIPS does with a VGG (arXiv 1801.03924), in features that
    are at hand.  The gradient goes through the frozen network to x."""
    loss = 0.0
    with torch.no_grad():
        wanted = dino.features(dino.normalize(y))
    for a, b in zip(dino.features(dino.normalize(x)), wanted):
        loss = loss + (F.layer_norm(a.float(), a.shape[-1:])
                       - F.layer_norm(b.float(), b.shape[-1:])).square().mean()
    return loss / len(wanted)


class PatchGAN(nn.Sequential):
    """Discriminator of overlapping patches (pix2pix): (B, 3, S, S) -> logits (B, 1, s, s)."""

    def __init__(self, width=64, layers=3, size=256):
        layers = max(1, min(layers, size.bit_length() - 4))      # 32 px: two halvings
        parts = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(layers):
            a, b = width * min(2 ** i, 8), width * min(2 ** (i + 1), 8)
            parts += [nn.Conv2d(a, b, 4, 2 if i < layers - 1 else 1, 1, bias=False),
                      nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        super().__init__(*parts, nn.Conv2d(b, 1, 4, 1, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, 0.02)


def adaptive_weight(nll, g, last_layer, bound):
    """|d nll / dW| / |d g / dW| at the decoder's last layer, at most `bound` (VQGAN, eq. 7).

    The authors sum the reconstruction loss over 3 * S * S values and bound the ratio at 1e4; with
    mean-reduced losses the same thing has the bound 1e4 / (3 S S): 0.051 at 256 px.
    """
    a = torch.autograd.grad(nll, last_layer, retain_graph=True)[0].norm()
    b = torch.autograd.grad(g, last_layer, retain_graph=True)[0].norm()
    return (a / (b + 1e-4)).clamp(0, bound).detach()

# ---------------------------------------------------------------- load


def build(saved, vit):
    """A fresh AutoEncoder from a checkpoint's `config` and `vit` dicts."""
    return AutoEncoder(Config(**saved), rebuild(vit))


def load_ae(path, device="cpu", unfinished=False):
    """ae.pt -> AutoEncoder in eval mode; what it was trained on, and `fingerprint`, as attributes.

    Raises UserError when the file is missing, corrupt, of another kind or version, or unfinished.
    """
    checkpoint = config.load_kind(path, "ae", "python ae.py")
    if checkpoint["fingerprint"] is None and not unfinished:
        raise UserError(f"{path}: stage 1 is unfinished (step {checkpoint['step']} of "
                        f"{checkpoint['config']['steps']}); run its `python ae.py` command again")
    model = build(checkpoint["config"], checkpoint["vit"])
    model.load_state_dict(checkpoint["model"])                     # strict
    model.classes = checkpoint["classes"]
    model.fingerprint = checkpoint["fingerprint"]
    saved = checkpoint["config"]
    model.dataset, model.images = saved["data"], saved.get("images", 0)
    model.subset = saved.get("classes", "")
    return model.to(device).eval().requires_grad_(False)

# ---------------------------------------------------------------- train


def train(c):
    """Run or continue stage 1 as its Config says; -> the trained AutoEncoder."""
    device, autocast = config.setup(c.device)
    path = Path(c.out) / "ae.pt"
    checkpoint = config.resume(path, "ae", c, "python ae.py")
    done = checkpoint is not None and checkpoint["step"] >= c.steps
    images, labels, classes = load_images(c.data, c.size, "train", classes=c.classes)
    source = images                                      # random crops come from larger squares
    if c.crop == "random":
        source, _, _ = load_images(c.data, c.size * 9 // 8, "train", classes=c.classes)
    if c.images:
        images, labels, source = images[:c.images], labels[:c.images], source[:c.images]
    torch.manual_seed(c.seed)
    if checkpoint:
        model = build(checkpoint["config"], checkpoint["vit"])
    else:
        model = AutoEncoder(c, load_dino(c.encoder))
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, c.lr, (c.beta1, c.beta2), weight_decay=0.0, fused=True)
    critic = critic_optimizer = None
    if c.gan:
        critic = PatchGAN(size=c.size).to(device).train()
        critic_optimizer = torch.optim.Adam(critic.parameters(), c.lr, (0.5, 0.9))
    # built last, for it draws random numbers that it throws away
    lpips = load_lpips(device) if c.perceptual and c.perceptual_net == "lpips" else None
    average = [p.detach().clone() for p in trained] if c.ema else []
    start = 0
    if checkpoint:
        start = checkpoint["step"]
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for mine, saved in zip(average, checkpoint["ema"]):
            mine.copy_(saved)
        if c.gan:
            critic.load_state_dict(checkpoint["critic"])
            critic_optimizer.load_state_dict(checkpoint["critic_optimizer"])
    if done and checkpoint["fingerprint"]:
        model.fingerprint = checkpoint["fingerprint"]
        return finish(c, model, images, labels, autocast, device)

    def save(step, fingerprint=None):
        if config.rank() == 0:
            config.save(path, dict(
                kind="ae", version=config.VERSION, config=config.plain(c),
                vit=vars(model.dino.config), classes=list(classes), step=step,
                fingerprint=fingerprint,
                model=model.state_dict(), ema=average, optimizer=optimizer.state_dict(),
                critic=critic.state_dict() if c.gan else None,
                critic_optimizer=critic_optimizer.state_dict() if c.gan else None))

    announce(c, device, model, len(images), classes)
    began, finite = time.time(), torch.ones((), dtype=torch.bool, device=device)
    with Stop() as stop:
        bar = config.progress(start, c.steps, "ae")
        for step in bar:
            g = config.generator(c.seed, step)                   # this step's whole randomness
            index = torch.randint(len(images), (c.batch,), generator=g)
            flip = torch.rand(c.batch, generator=g) < 0.5
            mine = slice(config.rank(), None, config.world())
            part = index[mine] if c.crop == "centre" else slice(None)
            squares = images if c.crop == "centre" else random_crops(source, index[mine], c.size, g)
            x = to_float(squares, part, flip[mine], device)                    # (B, 3, S, S)
            for group in optimizer.param_groups:
                group["lr"] = config.rate(c, step)

            with autocast():
                y, kl = model(x, g)
                perceptual = y.new_zeros(())
                if c.perceptual:
                    perceptual = lpips(y, x).mean() if lpips else perceptual_loss(model.dino, y, x)
            # ---- EDIT HERE for ablations: the loss ----
            l1 = (y - x).abs().mean()
            # ---- EXERCISE 7: the squared error in the place of l1 ----
            nll = l1 + c.perceptual * perceptual
            loss = nll + c.kl * kl
            fool = c.gan > 0 and step >= c.gan_start
            if fool:
                with autocast():
                    generated = -critic(y).float().mean()
                bound = 1e4 / (3 * c.size ** 2)
                loss = loss + generated * c.gan * adaptive_weight(
                    nll, generated, model.decoder.conv_out.weight, bound)
            # -------------------------------------------
            finite &= torch.isfinite(loss.detach())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            config.average([p.grad for p in trained if p.grad is not None])
            nn.utils.clip_grad_norm_(trained, c.clip or float("inf"))
            optimizer.step()
            if average:
                with torch.no_grad():
                    weight = 1 - min(c.ema, (1 + step) / (10 + step))
                    torch._foreach_lerp_(average, trained, weight)
            if fool:
                with autocast():
                    real, fake = critic(x).float(), critic(y.detach()).float()
                hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
                critic_optimizer.zero_grad(set_to_none=True)
                hinge.backward()
                config.average([p.grad for p in critic.parameters()])
                critic_optimizer.step()

            last, saving = step + 1 == c.steps, (step + 1) % c.save_every == 0 or stop.asked
            if step % 50 == 0 or saving or last:                   # waits for the device only here
                if not finite:
                    raise UserError(f"the loss is not finite at step {step}; {path}, if there, is "
                                    "the last good state; try a smaller --lr")
                bar.set_postfix(l1=f"{l1.item():.4f}", perceptual=f"{perceptual.item():.4f}")
            if saving and not last:
                save(step + 1)
                if stop.asked:
                    config.stopped(path, step + 1)
    for p, mean in zip(trained, average):
        p.data.copy_(mean)
    measure_statistics(model.eval(), images, autocast, device, c.normalise == "scalar")
    model.fingerprint = config.fingerprint(model.state_dict())
    save(c.steps, model.fingerprint)
    print(f"seconds: {time.time() - began:.0f}")
    return finish(c, model, images, labels, autocast, device)


def random_crops(images, index, size, generator):
    """uint8 images (M, 3, L, L), L > size: a random square (B, 3, size, size) of each row."""
    most = images.shape[-1] - size + 1
    corner = torch.randint(most, (len(index), 2), generator=generator).tolist()
    return np.stack([images[i, :, y:y + size, x:x + size]
                     for i, (y, x) in zip(index.tolist(), corner)])


def announce(c, device, model, pictures, classes):
    """Five lines on what is about to run."""
    count = lambda m: sum(p.numel() for p in m.parameters()) / 1e6
    print(f"stage 1 ({c.latent}) on {config.describe(device)}; {pictures:,} pictures of "
          f"{len(classes)} classes, {c.size} px")
    residual = "none" if c.latent == "dino" else f"{count(model.residual):.2f} M"
    print(f"encoder {c.encoder} {count(model.dino):.2f} M frozen, residual {residual}, "
          f"decoder {count(model.decoder):.2f} M; latent of {model.latent_dim} channels")
    print(f"{c.steps} steps of {c.batch}; flags: "
          + (" ".join(f"--{k} {getattr(c, k)}" for k in c.said) or "the preset's"))


@torch.no_grad()
def measure_statistics(model, images, autocast, device, scalar=False, most=20000):
    """Fill `mean` and `std`, per channel over the training pictures, as at evaluation; or one of
    each for all channels, which leaves the channels' different scales to the DiT."""
    first = second = 0.0
    count = 0
    for start in range(0, min(most, len(images)), 500):
        x = to_float(images, slice(start, start + 500), None, device)
        with autocast():
            z = model.tokens(x)[0].double().flatten(0, 1)                      # (B N, C)
        first, second, count = first + z.sum(0), second + z.square().sum(0), count + len(z)
    mean, square = first / count, second / count
    if scalar:
        mean, square = mean.mean().expand_as(mean), square.mean().expand_as(square)
    model.mean.copy_(mean.view(-1, 1, 1))
    model.std.copy_((square - mean.square()).clamp(min=1e-8).sqrt().view(-1, 1, 1))


@torch.no_grad()
def finish(c, model, images, labels, autocast, device):
    """After training: the latent cache, the picture of pairs, the figures on held-out pictures."""
    model.eval()
    if config.rank():                                    # one process writes
        return model
    out = Path(c.out)
    note = out / "latents.json"
    if not (note.is_file() and json.loads(note.read_text())["ae"] == model.fingerprint):
        note.unlink(missing_ok=True)                     # from here on the cache counts as absent
        side = model.image_size // model.patch
        shape = (2, len(images), model.latent_dim, side, side)
        size, free = 2 * math.prod(shape), shutil.disk_usage(out).free
        print(f"latents: {size / 1e9:.2f} GB; free on the disk of {out}: {free / 1e9:.1f} GB")
        cached = c.cache == "yes" or c.cache == "auto" and 2 * size < free
        if cached:
            write_latents(model, shape, images, labels, autocast, device, out)
        else:
            print("not written: stage 2 will encode as it goes")
        text = json.dumps(dict(ae=model.fingerprint, cached=cached))
        config.atomic(note, lambda t: Path(t).write_text(text))
    held, _, _ = load_images(c.data, c.size, "test", classes=c.classes)
    x = to_float(held, slice(0, 2000), None, device)
    with autocast():
        y = torch.cat([model.decode(model.encode(part)) for part in x.split(250)])
    pairs = torch.stack([x[:64], y[:64]], 1).flatten(0, 1)                     # original, its copy
    save_grid(out / "reconstructions.png", to_uint8(pairs), 16)
    print(f"reconstruction of {len(x)} held-out pictures, seed {c.seed}:")
    print(f"psnr_db: {psnr(x, y).mean():.2f}")
    print(f"ssim: {ssim(x, y).mean():.3f}")
    return model


@torch.no_grad()
def write_latents(model, shape, images, labels, autocast, device, out):
    """latents.npy float16 (2, M, C, h, w): every picture as it is, and flipped; labels.npy."""
    def write(path):
        cache = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        for flipped in (0, 1):
            for start in range(0, len(images), 500):
                part = slice(start, start + 500)
                x = to_float(images, part, torch.tensor(bool(flipped)), device)
                with autocast():
                    cache[flipped, part] = model.encode(x).cpu().numpy().astype(np.float16)
        cache.flush()
    config.atomic(out / "latents.npy", write)
    config.atomic(out / "labels.npy", lambda t: np.save(t, np.asarray(labels)))


def to_uint8(images):
    """[-1, 1] float -> uint8, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def save_grid(path, images, columns, zoom=None):
    """uint8 (B, 3, S, S) -> a PNG with `columns` pictures a row; small ones are enlarged."""
    B, _, S, _ = images.shape
    rows = -(-B // columns)
    sheet = torch.full((rows * columns, 3, S, S), 255, dtype=torch.uint8)
    sheet[:B] = images
    sheet = sheet.view(rows, columns, 3, S, S).permute(0, 3, 1, 4, 2).reshape(rows * S, -1, 3)
    zoom = zoom or max(1, 64 // S)
    picture = Image.fromarray(sheet.numpy())
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST)
    config.atomic(path, lambda t: picture.save(t, "PNG"))


def main(argv=None):
    """The command line."""
    train(config.parse(Config, PRESETS, argv))


if __name__ == "__main__":
    with config.one_line_errors():
        main()
