"""Stage 1: the SVG autoencoder, from images to latents and back without a VAE.

A frozen DINOv3 gives each patch a token that encodes what is there but loses color and fine
detail.  A small trainable residual ViT adds a few channels that carry the rest; their scale is
matched to DINO's, so that neither part dominates the other.  A convolutional decoder turns both
back into pixels (SVG, arXiv 2510.15301, section 3.2 and Figure 5).

    python ae.py                              # shapes, 32 px; 2.0 minutes on two CPU cores
    python ae.py --latent vae --out out/vae   # the baseline: a KL-VAE built from the same networks
    python ae.py --data ~/photos --size 64 --out out/mine     # a folder, one sub-folder per class

Writes out/<preset>/ae.pt (self-describing), ae.tsv (the losses, every 50 steps) and, from the first
checkpoint on, reconstructions.png (each image next to its reconstruction).  Stage 2 caches the
latents in the same folder, see `load_latents`.
"""
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import DRAWN, evenly, load_images, to_float, to_uint8
from dino import Block, DINOv3, ViTConfig, load_dino, rebuild
from metrics import psnr, ssim
from plumbing import config, muon
from plumbing.align import alignment_loss
from plumbing.config import UserError, at_least, check_training, field, require
from plumbing.draw import save_grid
from plumbing.fetch import cached_array
from plumbing.gan import GAN, adaptive_weight
from plumbing.lpips import load_lpips
from plumbing.photos import warn_of_few
from plumbing.views import same_view
from plumbing.weights import PHOTOS

# Letters: B batch, S image side, h w the latent grid, N = h w tokens,
#          D channels of DINO, R of the residual, C of the latent (D + R).

# ---------------------------------------------------------------- config and presets


@dataclass
class Config:
    """Stage 1."""
    preset: str = field("shapes", "a named set of the options below")
    out: str = field("", "folder for the results; out/<preset> if empty")
    data: str = field("shapes", "shapes, shapes-color (its classes are colors), imagenette, "
                      "imagewoof, tiny-imagenet, a folder, or an archive")
    classes: str = field("", "only these classes: comma-separated names, a file of names, or "
                         "easy-ten (of tiny-imagenet); all of them if empty or all")
    images: int = field(0, "train only on N images, evenly spaced in the data set; 0: all")
    size: int = field(32, "image side in pixels; a multiple of the encoder's patch")
    crop: str = field("center", "which square of an image to train on (code: random)",
                      ("center", "random"))
    encoder: str = field("auto", "tiny (of shapes), photos, a DINOv3 name, timm:NAME, or a file; "
                         "auto: tiny on shapes, otherwise photos if its file is there")
    # ---- EDIT HERE for ablations: what the latent is made of ----
    latent: str = field("svg", "svg; dino: no residual; unaligned: residual not matched; vae: a "
                        "KL-VAE built from the same networks", ("svg", "dino", "unaligned", "vae"))
    residual_dim: int = field(16, "channels of the residual (paper: 8)")
    residual_gain: float = field(1.0, "factor on the residual at the decoder's input, where its "
                                 "channels are few beside the encoder's (paper: 1)")
    mask_prob: float = field(0.1, "probability that a sample trains without residual (code: .1)")
    layer: int = field(0, "the encoder's block whose tokens are used; 0: the last (paper: last)")
    normalize: str = field("channel", "divide the latents by each channel's standard deviation or "
                           "by one scalar", ("channel", "scalar"))
    noise: float = field(0.0, "noise on the decoder's input in training, in standard deviations "
                         "of the latent (RAE: 0.8)")
    # --------------------------------------------------------------
    enc_dim: int = field(96, "width of the residual ViT (paper: 384)")
    enc_depth: int = field(4, "depth of the residual ViT (paper: 6)")
    enc_stem: int = field(32, "width of its convolutional stem; 0: linear patches (paper: 0)")
    ch: int = field(32, "decoder width at full resolution (paper: 128)")
    mult: tuple = field((1, 2, 2, 4), "decoder width multipliers, full resolution first "
                        "(paper: 1,1,2,2,4)")
    res_blocks: int = field(1, "residual blocks per level, plus one (paper: 2)")
    vae_dim: int = field(16, "channels of the VAE's latent (--latent vae only)")
    kl: float = field(1e-4, "weight of the KL divergence per latent value (--latent vae only)")
    align: float = field(0.0, "weight of VA-VAE's alignment of the latent to the frozen encoder's "
                         "tokens (--latent vae only; VA-VAE: 0.1)")
    perceptual: float = field(0.5, "weight of the perceptual loss (paper: 1)")
    perceptual_net: str = field("encoder", "features it compares: those of the frozen encoder, of "
                                "tiny or photos whatever --encoder is, or LPIPS on VGG16 (paper: "
                                "lpips)", ("encoder", "tiny", "photos", "lpips"))
    perceptual_view: str = field("auto", "compare them after the same random rotation and zoom; "
                                 "auto: of photographs, except for lpips", ("auto", "yes", "no"))
    gan: float = field(0.0, "weight of the PatchGAN loss (paper: 0.5)")
    gan_start: int = field(2500, "steps before the discriminator joins (paper: 2,501)")
    steps: int = field(700, "optimizer steps", also=["epochs", "iterations"])
    batch: int = field(32, "images per step, over all ranks together (paper: 512)")
    lr: float = field(1.5e-3, "learning rate (paper: 1e-4)", also=["learning_rate"])
    muon: float = field(0.02, "learning rate of Muon on the decoder's matrices; 0: Adam (paper: 0)")
    warmup: int = field(100, "steps of linear warm-up (paper: 0)")
    decay: bool = field(True, "cosine decay of the learning rate to zero (paper: no)")
    beta1: float = field(0.9, "Adam's beta 1 (paper: 0.5)")
    beta2: float = field(0.99, "Adam's beta 2 (paper: 0.9)")
    clip: float = field(1.0, "largest gradient norm; 0: no clipping (paper: 0)")
    seed: int = field(0, "all randomness is a function of (seed, step)")
    device: str = field("auto", "cuda, cpu, ...; auto takes a GPU if there is one")
    precision: str = field("auto", "of the networks; auto: bf16 where it is fast, fp16 on a GPU "
                           "without it, else float32", ("auto", *config.PRECISIONS))
    compile: str = field("auto", "torch.compile the networks; auto: on CUDA", ("auto", "yes", "no"))
    save_every: int = field(300, "steps between checkpoints")
    overwrite: bool = field(False, "start from scratch, replacing what is in --out")

    def check(self):
        """ValueError for impossible values, before anything is read or written."""
        check_training(self)
        at_least(self, size=8, images=0, residual_dim=1, muon=0, vae_dim=1, layer=0, ch=8,
                 enc_dim=32, perceptual=0, gan=0, kl=0, align=0, clip=0, noise=0)
        require(0 <= self.mask_prob < 1, "--mask_prob must be in [0, 1)")
        require(self.residual_gain > 0, "--residual_gain must be positive")
        require(self.ch % 8 == 0, "--ch must be a multiple of 8")
        require(self.enc_dim % 32 == 0, "--enc_dim must be a multiple of 32")
        require(not self.align or self.latent == "vae", "--align needs --latent vae")
        require(self.perceptual_net not in ("tiny", "photos") or self.size % 8 == 0,
                f"--perceptual_net {self.perceptual_net} needs a --size that is a multiple of 8, "
                f"not {self.size}")
        require(self.mult and min(self.mult) > 0, "--mult must be positive numbers")


PRESETS = {
    # 2 CPU cores (AMD EPYC), seed 0, 2.0 min: 26.1 dB, SSIM .738; see RESULTS.md, The default.
    "shapes": dict(),
    # 2 CPU cores, 6 s: barely trained, but writes every file.
    "debug": dict(images=1000, steps=20, batch=16, ch=16, enc_dim=32, enc_depth=1, enc_stem=8,
                  warmup=5, save_every=10),
    # Ten classes of Tiny ImageNet. 2 shared CPU cores, seed 0, 43 min: 20.2 dB, SSIM .587; of the
    # reconstructions the judge recognizes .846, and Frechet is 0.94.
    "photos": dict(data="tiny-imagenet", classes="easy-ten", size=64, encoder="photos",
                   residual_gain=4.0, ch=24, steps=4800, batch=16, gan=0.5, gan_start=2400),
    # The paper's sizes and optimizer at 256 px, on 9,469 images. Not trained here: no weights.
    "imagenette": dict(data="imagenette", size=256, crop="random", encoder="vits16plus",
                       residual_dim=8, enc_dim=384, enc_depth=6, enc_stem=0, ch=128,
                       mult=(1, 1, 2, 2, 4), res_blocks=2, perceptual=1.0, perceptual_net="lpips",
                       gan=0.5, gan_start=2501, steps=20000, batch=32, lr=1e-4, warmup=0,
                       muon=0.0, decay=False, beta1=0.5, beta2=0.9, clip=0.0,
                       save_every=1000),
}

# ---------------------------------------------------------------- the residual and its matching


class ResidualEncoder(nn.Module):
    """A small ViT and a two-layer head: images -> `out` channels per token (paper: 11.2 M).

    It uses the blocks of the frozen encoder, so it takes any resolution, but is trained here.
    """

    def __init__(self, c, patch, out):
        super().__init__()
        self.vit = DINOv3(ViTConfig(dim=c.enc_dim, depth=c.enc_depth, heads=c.enc_dim // 32,
                                    hidden=4 * c.enc_dim, patch=patch, stem=c.enc_stem,
                                    registers=1))
        # not used here; DistributedDataParallel would wait for its gradient
        self.vit.mask_token.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(c.enc_dim, c.enc_dim), nn.GELU(),
                                  nn.Linear(c.enc_dim, out))

    def forward(self, images):
        """[-1, 1] (B, 3, H, W) -> (B, N, out)"""
        return self.head(self.vit(self.vit.normalize(images))[0])


# ---- EXERCISE 8: a mean and a standard deviation for each channel ----
class DistributionMatching(nn.Module):
    """r' = (r - mu_r) / sigma_r * sigma_h + mu_h: gives the residual DINO's mean and scale.

    Four scalars: per channel over batch and tokens, then averaged over the channels, as in the
    authors' code (the paper does not specify the axes).  They carry no gradient.  Training computes
    them from the batch, over all ranks; evaluation uses running averages, so that a latent does
    not depend on the rest of its batch (the authors' does).
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
            config.all_reduce_mean([first, second])
            moments += [first.mean(), (second - first.square()).clamp(min=0).sqrt().mean()]
        return torch.stack(moments)

    def forward(self, r, h):
        """residual (B, N, R) and DINO (B, N, D) -> matched residual (B, N, R); DINO is unchanged"""
        if self.training:
            now = self.measure(r, h)
            # a plain mean at first, an exponential moving average later
            self.seen += 1
            self.running.lerp_(now, (1 / self.seen).clamp(min=self.momentum))
        else:
            now = self.running
        mu_r, sigma_r, mu_h, sigma_h = now
        return (r - mu_r) / (sigma_r + 1e-6) * sigma_h + mu_h

# ---------------------------------------------------------------- the decoder


def norm(width):
    """Group normalization: at least four channels per group, at most 32 groups as in LDM."""
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
    """Single-head attention over all positions of the map."""

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

    ResBlock, attention, ResBlock at the latent's resolution, then levels of ResBlocks, each but the
    last followed by nearest-neighbor upsampling and a convolution.
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
    """Images <-> latents.  The normalization of the latents is part of `encode` and `decode`, so
    that it cannot be applied on one side only."""

    def __init__(self, c, encoder):
        """c: a Config; encoder: the frozen DINOv3."""
        super().__init__()
        if encoder.patch != 2 ** (len(c.mult) - 1):
            raise UserError(f"--mult {c.mult}: a patch of {encoder.patch} pixels needs "
                            f"{encoder.patch.bit_length()} levels, not {len(c.mult)}")
        if c.size % encoder.patch:
            raise UserError(f"--size {c.size} is not a multiple of the patch, {encoder.patch}")
        self.config, self.patch, self.image_size = c, encoder.patch, c.size
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
        self.decoder = Decoder(self.latent_dim, c.ch, c.mult, c.res_blocks)
        if c.align:                      # last, so that the other weights start as without it
            self.align = nn.Linear(c.vae_dim, encoder.dim, bias=False)
        gain = torch.ones(self.latent_dim, 1, 1)
        if c.latent in ("svg", "unaligned"):
            gain[encoder.dim:] = c.residual_gain
        self.register_buffer("gain", gain, persistent=False)
        self.register_buffer("mean", torch.zeros(self.latent_dim, 1, 1))
        self.register_buffer("std", torch.ones(self.latent_dim, 1, 1))

    def matrices(self):
        """The decoder's weights except its last layer's, which Muon trains.  On the residual
        encoder it makes the latents harder to generate (RESULTS.md, Speedrun)."""
        return [p for p in self.decoder.layers.parameters() if p.ndim > 1]

    def tokens(self, images, generator=None):
        """[-1, 1] (B, 3, H, W) -> latent tokens (B, N, C) before normalization, and the VAE's KL
        divergence per value (0 for the others).  generator: draws the masks and noise of training.
        """
        kl = images.new_zeros(())
        if self.config.latent == "vae":
            mean, logvar = self.residual(images).float().chunk(2, -1)          # (B, N, C) each
            logvar = logvar.clamp(-30, 20)
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            if self.training:
                noise = config.rank_rows(torch.randn, *mean.shape, generator=generator)
                mean = mean + (0.5 * logvar).exp() * config.send(noise, mean.device)
            return mean, kl
        with torch.no_grad():
            h = self.semantics(self.dino.normalize(images)).float()            # (B, N, D)
        if self.config.latent == "dino":
            return h, kl
        r = self.residual(images).float()                                      # (B, N, R)
        if self.training:
            # the residual of some samples is masked, before matching, so that the decoder learns to
            # extract what it can from DINO
            draw = config.rank_rows(torch.rand, len(r), 1, 1, generator=generator)
            r = torch.where(config.send(draw, r.device) < self.config.mask_prob, self.mask_token, r)
        if self.config.latent == "svg":
            r = self.match(r, h)
        return torch.cat([h, r], -1), kl                                       # (B, N, D + R)

    def semantics(self, pixels):
        """Normalized pixels (B, 3, H, W) -> the frozen encoder's tokens (B, N, D), of the last
        block or of an earlier one (Table 6)."""
        layer = self.config.layer
        if not layer:
            return self.dino(pixels)[0]
        blocks = self.dino.features(pixels)
        if layer > len(blocks):
            raise UserError(f"--layer {layer}: this encoder has {len(blocks)} blocks")
        N = pixels.shape[2] * pixels.shape[3] // self.patch ** 2
        # the final norm's gains belong to the last block, so tokens are normalized without them
        return F.layer_norm(blocks[layer - 1][:, -N:], (self.dino.dim,))

    def grid(self, tokens, images):
        """Tokens (B, N, C) of images -> map (B, C, h, w)"""
        h, w = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        return tokens.transpose(1, 2).reshape(len(tokens), -1, h, w)

    def forward(self, images, generator=None):
        """The training pass: [-1, 1] (B, 3, H, W) -> reconstruction (unbounded), KL; with --align
        also what `alignment_loss` takes."""
        tokens, kl = self.tokens(images, generator)
        aligned = ()
        if self.config.align:
            with torch.no_grad():
                h = self.semantics(self.dino.normalize(images)).float()        # (B, N, D)
            aligned = self.align(tokens).float(), h
        if self.training and self.config.noise:
            # sigma |N(0, tau^2)| per image (RAE, section 4.3): sampled latents are never exact
            draw = lambda *shape: config.send(
                config.rank_rows(torch.randn, *shape, generator=generator), tokens.device)
            sigma = self.config.noise * draw(len(tokens), 1, 1).abs()
            std = config.all_rows(tokens.detach()).std((0, 1))
            tokens = tokens + sigma * std * draw(*tokens.shape)
        return self.decoder(self.gain * self.grid(tokens, images)).float(), kl, *aligned

    @torch.no_grad()
    def encode(self, images):
        """[-1, 1] (B, 3, H, W) -> latents (B, C, h, w), zero mean and unit variance per channel"""
        return (self.grid(self.tokens(images)[0].float(), images) - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents):
        """latents (B, C, h, w) -> images (B, 3, H, W), clamped to [-1, 1]"""
        raw = latents.float() * self.std + self.mean
        return self.decoder(self.gain * raw).float().clamp(-1, 1)

# ---------------------------------------------------------------- losses


def perceptual_loss(dino, x, y):
    """Mean squared distance of x and y (B, 3, S, S) in the frozen encoder's normalized tokens, over
    all blocks: LPIPS (arXiv 1801.03924) with features of the encoder at hand instead of a VGG's.
    The gradient flows through the frozen network to x."""
    loss = 0.0
    with torch.no_grad():
        target = dino.features(dino.normalize(y))
    for a, b in zip(dino.features(dino.normalize(x)), target):
        loss = loss + (F.layer_norm(a.float(), a.shape[-1:])
                       - F.layer_norm(b.float(), b.shape[-1:])).square().mean()
    return loss / len(target)


def choose_perceptual(c, model, device):
    """-> function (decoded, images, generator) -> their distance, in the features of
    --perceptual_net and in the views of --perceptual_view."""
    if not c.perceptual:
        return lambda y, x, generator: y.new_zeros(())
    if lpips := c.perceptual_net == "lpips":
        network = load_lpips(device)
        distance = lambda y, x: network(y, x).mean()
    else:
        distance = partial(perceptual_loss, model.dino if c.perceptual_net == "encoder" else
                           load_dino(c.perceptual_net, device))
    usual = "no" if lpips or c.data in DRAWN else "yes"
    if (usual if c.perceptual_view == "auto" else c.perceptual_view) == "no":
        return lambda y, x, generator: distance(y, x)
    return lambda y, x, generator: distance(*same_view((y, x), generator))

# ---------------------------------------------------------------- load


def choose_encoder(c):
    """A Config's --encoder, with tiny or photos for `auto`; says which and why if it is not the one
    of shapes on shapes."""
    if c.encoder != "auto":
        return c.encoder
    if c.data in DRAWN:
        return "tiny"
    found, why = (("photos", f"--data {c.data} holds photographs") if PHOTOS.is_file() else
                  ("tiny", f"there is no {PHOTOS}"))
    print(f"--encoder {found}, because {why}")
    return found


def load_ae(path, device="cpu"):
    """ae.pt -> AutoEncoder in eval mode, with `config`, `class_names` and `fingerprint`.

    Raises UserError when the file is missing, corrupt, of another kind or version, or unfinished.
    """
    checkpoint = config.load_kind(path, "ae", f"python ae.py --out {Path(path).parent}")
    if checkpoint["fingerprint"] is None:
        raise UserError(f"{path}: stage 1 is unfinished (step {checkpoint['step']} of "
                        f"{checkpoint['config']['steps']}); run its `python ae.py` command again")
    model = AutoEncoder(Config(**checkpoint["config"]), rebuild(checkpoint["vit"]))
    model.load_state_dict(checkpoint["model"])                     # strict
    model.class_names, model.fingerprint = checkpoint["class_names"], checkpoint["fingerprint"]
    return model.to(device).eval().requires_grad_(False)


def load_pictures(c, split="train", size=0):
    """The data set of a Config, at another `size` if that is given -> as from `load_images`; of the
    training images only --images."""
    images, labels, class_names = load_images(c.data, size or c.size, split, classes=c.classes)
    if split == "train" and c.images:
        part = evenly(len(images), c.images)
        images, labels = images[part.numpy()], labels[part]
    return images, labels, class_names


@torch.no_grad()
def load_latents(ae, folder, device, autocast):
    """The latents of the training images -> float16 (2, M, C, h, w) memory-mapped, each image as it
    is and mirrored; labels int64 (M,).

    Encoded once, into folder/latents-<fingerprint>.npy: the name identifies the autoencoder, so
    latents of another one are never read.  Raises UserError.
    """
    images, labels, _ = load_pictures(ae.config)
    path, side = Path(folder) / f"latents-{ae.fingerprint}.npy", ae.image_size // ae.patch
    shape = (2, len(images), ae.latent_dim, side, side)

    def fill(cache):
        for mirrored in (0, 1):
            for start in range(500 * config.rank(), len(images), 500 * config.world()):
                part = slice(start, start + 500)
                x = to_float(images, part, torch.tensor(bool(mirrored)), device)
                with autocast():
                    cache[mirrored, part] = ae.encode(x).cpu().numpy().astype(np.float16)

    latents = cached_array(path, shape, np.float16, fill, f"encoding {len(images):,} images",
                           "use --no-cache, or another disk", stale="latents-*.npy")
    return latents, labels

# ---------------------------------------------------------------- train


def train(c):
    """Run or resume stage 1 with a Config -> the trained AutoEncoder."""
    device, autocast = config.setup(c.device, precision=c.precision)
    path = Path(c.out) / "ae.pt"
    c.encoder = choose_encoder(c)
    checkpoint = config.resume(path, "ae", c, "python ae.py")
    batch, images, class_names = feed(c, device)
    torch.manual_seed(c.seed)
    encoder = rebuild(checkpoint["vit"]) if checkpoint else load_dino(c.encoder)
    model = AutoEncoder(c, encoder).to(device).train()
    if device.type == "cuda":              # the layout of its bfloat16 convolutions; slow on a CPU
        model.decoder.to(memory_format=torch.channels_last)
    model.class_names = class_names
    trained = [p for name, p in model.named_parameters() if not name.startswith("dino.")]
    optimizer = muon.optimizer(trained, model.matrices(), c.lr, c.muon, (c.beta1, c.beta2))
    scaler = config.scaler(device, c.precision)
    gan = GAN(c, device, autocast, scaler) if c.gan else None
    perceptual_distance = choose_perceptual(c, model, device)

    def save(step, fingerprint=None):
        if config.rank() == 0:
            config.save(path, dict(
                kind="ae", version=config.VERSION, config=config.plain(c), step=step,
                vit=vars(model.dino.config), class_names=class_names, fingerprint=fingerprint,
                **{k: part.state_dict() for k, part in parts.items()}))
            fingerprint or reconstruct(c, model, autocast, device)           # a preview

    parts = dict(model=model, optimizer=optimizer, scaler=scaler, **(dict(gan=gan) if gan else {}))
    config.restore(checkpoint, parts)
    if checkpoint and checkpoint["step"] >= c.steps and checkpoint["fingerprint"]:
        model.fingerprint = checkpoint["fingerprint"]
        return evaluate(c, model, autocast, device)
    announce(c, device, model, len(images))
    config.compile_parts(model, (Block, Decoder), c.compile, device)
    network, began = config.parallel(model), time.time()
    start = checkpoint["step"] if checkpoint else 0
    loop = config.Loop("ae", c, optimizer, path, save, start, losses=path.with_suffix(".tsv"),
                       slower=c.gan_start if gan else 0)
    for step in loop:
        x, g = batch(step)                                             # (B, 3, S, S)
        with autocast():
            y, kl, *aligned = network(x, g)
            perceptual = perceptual_distance(y, x, g)
        # ---- EDIT HERE for ablations: the loss ----
        l1 = (y - x).abs().mean()
        # ---- EXERCISE 7: the squared error instead of l1 ----
        reconstruction = l1 + c.perceptual * perceptual
        loss, shown = reconstruction + c.kl * kl, dict(l1=l1, perceptual=perceptual)
        if c.align:
            shown["alignment"] = alignment = alignment_loss(*aligned)
            weight = adaptive_weight(reconstruction, alignment, model.residual.head[-1].weight, 1e8,
                                     scaler.scale(torch.ones((), device=device)))
            loss = loss + c.align * weight * alignment
        if gan and step >= c.gan_start:
            loss = loss + gan.generator_loss(y, reconstruction, model.decoder.conv_out.weight)
        # -------------------------------------------
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, c.clip or float("inf"))
        scaler.step(optimizer)
        if gan and step >= c.gan_start:
            gan.step(x, y)
        scaler.update()
        loop.log(loss, **shown)
    measure_statistics(model.eval(), images, autocast, device, c.normalize == "scalar")
    model.fingerprint = config.fingerprint(model.state_dict())
    save(c.steps, model.fingerprint)
    print(f"seconds: {time.time() - began:.0f}")
    return evaluate(c, model, autocast, device)


def feed(c, device):
    """-> function step -> (images (B, 3, S, S) in [-1, 1], the step's generator); all training
    images uint8; class names."""
    load_pictures(c, "test")                              # what cannot be read shows now, not later
    images, labels, class_names = load_pictures(c)
    warn_of_few(labels, class_names, c.batch)
    if c.crop == "random":                               # crops come from larger squares
        larger, _, _ = load_pictures(c, size=c.size * 9 // 8)

    def batch(step):
        g = config.generator(c.seed, step)               # all randomness of this step
        index = torch.randint(len(images), (c.batch,), generator=g)
        flip = torch.rand(c.batch, generator=g) < 0.5
        mine = config.my_rows()
        if c.crop == "random":
            crops = random_crops(larger, index[mine], c.size, g)
            return to_float(crops, slice(None), flip[mine], device), g
        return to_float(images, index[mine], flip[mine], device), g
    return batch, images, list(class_names)


def random_crops(images, index, size, generator):
    """uint8 images (M, 3, L, L), L > size: a random square (B, 3, size, size) of each row."""
    most = images.shape[-1] - size + 1
    draw = partial(torch.randint, most)
    corner = config.rank_rows(draw, len(index), 2, generator=generator).tolist()
    return np.stack([images[i, :, y:y + size, x:x + size]
                     for i, (y, x) in zip(index.tolist(), corner)])


def announce(c, device, model, count):
    """Print what is about to run, in three lines, and what does not fit photographs."""
    millions = lambda m: f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f} M"
    residual = "none" if c.latent == "dino" else millions(model.residual)
    print(f"stage 1 ({c.latent}) on {config.describe(device, c.precision)}; {count:,} images of "
          f"{len(model.class_names)} classes, {c.size} px\n"
          f"encoder {c.encoder} {millions(model.dino)} frozen, residual {residual}, decoder "
          f"{millions(model.decoder)}; latent of {model.latent_dim} channels\n"
          f"{c.steps} steps of {c.batch}; {config.flags(c)}")
    if c.encoder == "tiny" and c.latent != "vae" and c.data not in DRAWN:
        print("warning: the tiny encoder knows only shapes, and its tokens hardly separate classes "
              "of other images; use --encoder photos, or --preset imagenette with a DINOv3")
    if c.data not in DRAWN and not c.gan:
        print("without a GAN, photographs stay blurred and may show a grid of dots; --preset "
              "photos --classes all added to this command, and another --out, trains with one for "
              "longer")


@torch.no_grad()
def measure_statistics(model, images, autocast, device, scalar=False, most=5000):
    """Fill `mean` and `std`: per channel over `most` training images, in eval mode; with `scalar`
    one of each for all channels, which leaves their different scales for the DiT."""
    first, second = torch.zeros(2, model.latent_dim, dtype=torch.float64)      # mps has no float64
    count = torch.zeros(1, dtype=torch.float64)
    parts = evenly(len(images), most).split(500)
    for part in parts[config.my_rows()]:
        x = to_float(images, part, None, device)
        with autocast():
            z = model.tokens(x)[0].flatten(0, 1).cpu().double()                # (B N, C)
        first, second, count = first + z.sum(0), second + z.square().sum(0), count + len(z)
    config.all_reduce_mean([first, second, count])
    mean, square = first / count, second / count
    if scalar:
        mean, square = mean.mean().expand_as(mean), square.mean().expand_as(square)
    model.mean.copy_(mean.view(-1, 1, 1))
    model.std.copy_((square - mean.square()).clamp(min=1e-8).sqrt().view(-1, 1, 1))


def at_once(size):
    """How many images of that side to decode together: 250 up to 64 px, 15 at 256 px."""
    return max(1, 250 * 64 ** 2 // max(64, size) ** 2)


@torch.no_grad()
def reconstruct(c, model, autocast, device, most=64):
    """At most so many held-out images and their reconstructions, (n, 3, S, S) each; writes 64 of
    them to reconstructions.png."""
    held, training = load_pictures(c, "test")[0], model.training
    x = to_float(held, evenly(len(held), most), None, device)
    model.eval()
    with autocast():
        y = torch.cat([model.decode(model.encode(part)) for part in x.split(at_once(c.size))])
    model.train(training)
    few = evenly(len(x), 64)
    pairs = torch.stack([x[few], y[few]], 1).flatten(0, 1)         # image, reconstruction, ...
    save_grid(Path(c.out) / "reconstructions.png", to_uint8(pairs), 16)
    return x, y


def evaluate(c, model, autocast, device):
    """Print the reconstruction scores on held-out images, write reconstructions.png -> model."""
    model.eval()
    if config.rank() == 0:                               # one process writes
        x, y = reconstruct(c, model, autocast, device, 2000)
        pairs = [*zip(x.split(at_once(c.size)), y.split(at_once(c.size)))]
        mean = lambda score: torch.cat([score(*pair) for pair in pairs]).mean()
        print(f"wrote {Path(c.out) / 'reconstructions.png'}: each held-out image next to its "
              f"reconstruction\nreconstruction of {len(x)} held-out images, seed {c.seed}:\n"
              f"psnr_db: {mean(psnr):.2f}\nssim: {mean(ssim):.3f}")
    return model


def main(argv=None):
    """The command line."""
    c = config.parse(Config, PRESETS, argv)
    train(c)
    uniform = c.preset == "shapes" and c.data not in DRAWN      # RESULTS.md, When to train
    config.follow(c, "dit.py", *["--no-logit_normal"] * uniform)


if __name__ == "__main__":
    with config.one_line_errors():
        main()
