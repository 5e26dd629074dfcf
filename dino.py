"""The frozen encoder: a DINOv3 ViT in every published size, or the tiny one in weights/.

DINOv3 (arXiv 2508.10104) is a plain pre-norm ViT with rotary position embeddings, four register
tokens and LayerScale.  SVG uses its patch tokens after the final norm unchanged: they encode what
is where in the image, so the diffusion model gets latents in which classes are already apart.

    from dino import load_dino
    encoder = load_dino("tiny")                     # in weights/; "vits16plus" is downloaded
    patches, cls = encoder(encoder.normalize(images))             # images (B, 3, H, W) in [-1, 1]

`python -m lab.pretrain` trains the tiny encoder; plumbing/weights.py reads the files.
"""
import math, textwrap
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.config import UserError
from plumbing.weights import TimmViT, find_weights, read_encoder, theirs

# Letters: B batch, H W image, h w the patch grid, N = h w, P = 1 + registers + N tokens,
#          D width, A heads, d = D / A width of a head.

# ---------------------------------------------------------------- configuration


@dataclass
class ViTConfig:
    """The architecture, and how the encoder's pixels are normalized."""
    dim: int = 384
    depth: int = 12
    heads: int = 6
    hidden: int = 1536
    swiglu: bool = False                  # gated feed-forward (the "+" models and 7B), else GELU
    qkv_bias: bool = True
    patch: int = 16
    registers: int = 4
    stem: int = 0                         # width of a convolutional stem; 0: one linear patch map
    stem_norm: bool = False               # group norms in the stem, and two more convolutions
    mean: tuple = (0.485, 0.456, 0.406)   # of ImageNet, for the LVD-1689M weights
    std: tuple = (0.229, 0.224, 0.225)


SIZES = {                                 # as published; parameters in millions
    "vits16": ViTConfig(),                                                          # 21.6
    "vits16plus": ViTConfig(swiglu=True),                                           # 28.7
    "vitb16": ViTConfig(dim=768, heads=12, hidden=3072),                            # 85.7
    "vitl16": ViTConfig(dim=1024, depth=24, heads=16, hidden=4096),                 # 303
    "vitl16plus": ViTConfig(dim=1024, depth=24, heads=16, hidden=4096, swiglu=True),  # 404
    "vith16plus": ViTConfig(dim=1280, depth=32, heads=20, hidden=5120, swiglu=True),  # 841
    "vit7b16": ViTConfig(dim=4096, depth=40, heads=32, hidden=8192, swiglu=True,
                         qkv_bias=False),                                           # 6716
}

# ---------------------------------------------------------------- rotary positions and attention


def rope_periods(head_dim):
    """Periods 100^(2i / (d/2)), i < d/4, rounded to bfloat16: the published weights were trained
    that way.  timm and transformers do not round, so their tokens differ by up to 2e-2."""
    i = torch.arange(head_dim // 4, dtype=torch.float32, device="cpu")
    return (100 ** (2 * i / (head_dim // 2))).bfloat16().float()


def rope(h, w, periods):
    """Sines and cosines for a grid of patches: two float32 tensors (h*w, d).

    Patch centers lie in [-1, 1], each axis scaled by its own length; y comes before x.  The d/4
    angles of each axis appear twice, for the two halves that `rotate` pairs.
    """
    y = 2 * (torch.arange(h, dtype=torch.float32) + 0.5) / h - 1
    x = 2 * (torch.arange(w, dtype=torch.float32) + 0.5) / w - 1
    center = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)             # (h, w, 2)
    angle = 2 * math.pi * center[..., None] / periods                         # (h, w, 2, d/4)
    angle = angle.flatten(2).flatten(0, 1).tile(2)                            # (h*w, d)
    return angle.sin(), angle.cos()


def rotate(q, sin, cos):
    """Rotates the last N tokens of q (B, A, P, d), the patches; cls and registers are unchanged."""
    first, rest = q[..., :-len(sin), :], q[..., -len(sin):, :].float()
    a, b = rest.chunk(2, -1)
    rest = rest * cos + torch.cat([-b, a], -1) * sin
    return torch.cat([first, rest.to(q.dtype)], -2)


def attention(q, k, v):
    """softmax(q k' / sqrt(d)) v on (B, A, P, d).

    On a CPU with few tokens, plain matrix products beat the fused call: forward and backward in
    bfloat16 on two cores are 14 times as fast at 16 tokens, 2.8 at 64, 1.8 at 128.
    """
    if q.device.type == "cpu" and q.shape[-2] <= 128:
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).float().softmax(-1)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions: x (B, P, D) -> (B, P, D)."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.dim, 3 * c.dim, bias=c.qkv_bias)
        self.proj = nn.Linear(c.dim, c.dim)

    def forward(self, x, sin, cos):
        B, P, D = x.shape
        bias = self.qkv.bias
        if bias is not None:              # the published models have a bias for q and v, not for k
            bias = torch.cat([bias[:D], torch.zeros_like(bias[:D]), bias[2 * D:]])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.view(B, P, 3, self.heads, -1).permute(2, 0, 3, 1, 4)    # each (B, A, P, d)
        x = attention(rotate(q, sin, cos), rotate(k, sin, cos), v)
        return self.proj(x.transpose(1, 2).reshape(B, P, D))

# ---------------------------------------------------------------- the ViT


class MLP(nn.Module):
    """The plain feed-forward network: Linear, GELU (exact), Linear."""

    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.dim, c.hidden), nn.Linear(c.hidden, c.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """The gated feed-forward network of the "+" models: w3(silu(w1 x) * w2 x)."""

    def __init__(self, c):
        super().__init__()
        self.w1, self.w2 = nn.Linear(c.dim, c.hidden), nn.Linear(c.dim, c.hidden)
        self.w3 = nn.Linear(c.hidden, c.dim)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual branch, initially 0.1."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm: x + ls1(attn(norm1 x)), then x + ls2(mlp(norm2 x))."""

    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, eps=1e-5), nn.LayerNorm(c.dim, eps=1e-5)
        self.attn, self.mlp = Attention(c), SwiGLU(c) if c.swiglu else MLP(c)
        self.ls1, self.ls2 = LayerScale(c.dim), LayerScale(c.dim)

    def forward(self, x, sin, cos):
        x = x + self.ls1(self.attn(self.norm1(x), sin, cos))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Pixels (B, 3, H, W) -> tokens (B, N, D): one convolution, patch by patch.

    With `stem`, stride-2 convolutions that end on the same grid, which suit a small model trained
    on few images better; on few photographs, group norms between them (`stem_norm`) help most.
    """

    def __init__(self, c):
        super().__init__()
        strides = [2] * (c.patch.bit_length() - 2) + [1, 1] * c.stem_norm if c.stem else []
        width, layers = 3, []
        for stride in strides:
            wider = c.stem if width == 3 else stride * width
            norm = [nn.GroupNorm(8, wider)] if c.stem_norm else []
            layers += [nn.Conv2d(width, wider, 3, stride, 1), *norm, nn.GELU()]
            width = wider
        self.stem, side = nn.Sequential(*layers), c.patch // math.prod(strides)
        self.proj = nn.Conv2d(width, c.dim, side, side)

    def forward(self, x):
        return self.proj(self.stem(x)).flatten(2).transpose(1, 2)


class DINOv3(nn.Module):
    """The encoder.  Parameters have Meta's names, so that Meta's files load without translation.

    Attributes: patch (pixels), dim (D), config (a ViTConfig).
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.patch, self.dim, self.frozen = c.patch, c.dim, False
        self.patch_embed = PatchEmbed(c)
        self.cls_token = nn.Parameter(torch.randn(1, 1, c.dim) * 0.02)
        self.storage_tokens = nn.Parameter(torch.randn(1, c.registers, c.dim) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, c.dim))     # for pretraining; not used here
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=1e-5)
        self.periods = rope_periods(c.dim // c.heads)     # not a buffer: `.to()` must not cast it
        self._rope, self._moments = {}, {}                        # caches, by device
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02 if c.dim > 192 else 0.05)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def freeze(self):
        """Freezes all parameters, and keeps eval mode when a parent's `train()` is called.
        Gradients with respect to the pixels still flow: the perceptual loss needs them."""
        self.frozen = True
        return self.eval().requires_grad_(False)

    def train(self, mode=True):
        """As for every module, but a frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)

    def normalize(self, images):
        """[-1, 1] -> the mean and std that the weights were trained with."""
        if images.device not in self._moments:                # cached: copies to a GPU block
            with torch.inference_mode(False):
                self._moments[images.device] = [
                    torch.tensor(v, device=images.device).view(3, 1, 1)
                    for v in (self.config.mean, self.config.std)]
        mean, std = self._moments[images.device]
        return ((images + 1) / 2 - mean) / std

    def forward(self, pixels):
        """Normalized pixels (B, 3, H, W), H and W any multiples of the patch size
        -> patches (B, h*w, D), cls (B, D), both after the final norm."""
        x = self.norm(self.features(pixels)[-1])
        return x[:, 1 + self.config.registers:], x[:, 0]

    def features(self, pixels):
        """Normalized pixels (B, 3, H, W) -> a list of (B, P, D): all tokens after each block,
        before the final norm, in the order cls, registers, patches."""
        B, _, H, W = pixels.shape
        if H % self.patch or W % self.patch:
            raise ValueError(f"{H} x {W} pixels is not a multiple of the patch size {self.patch}")
        key = H // self.patch, W // self.patch, pixels.device
        if key not in self._rope:
            with torch.inference_mode(False):     # cached, for calls with gradients too
                self._rope[key] = [t.to(pixels.device) for t in rope(*key[:2], self.periods)]
        x = self.patch_embed(pixels)                                          # (B, N, D)
        first = torch.cat([self.cls_token, self.storage_tokens], 1).expand(B, -1, -1)
        x = torch.cat([first.to(x.dtype), x], 1)                              # (B, P, D)
        out = []
        for block in self.blocks:
            x = block(x, *self._rope[key])
            out.append(x)
        return out

# ---------------------------------------------------------------- loading


def load_dino(source, device="cpu"):
    """-> a frozen DINOv3 in float32, or a TimmViT with the same methods.

    source: "tiny", "photos" (embedded); a name of SIZES, found in $NOVAE_CACHE or ~/.cache/novae or
    downloaded there (timm's copy, which needs no login; "hf:NAME" is Meta's own, which needs
    HF_TOKEN); a .pth, .pt, .bin or .safetensors file in the layout of Meta, transformers, timm or
    this project; or "timm:NAME", another encoder.
    UserError: no such file, or one that does not fit, with every tensor that is missing, unexpected
    or of the wrong shape.
    """
    source = str(source)
    if source.startswith("timm:"):
        return TimmViT(source.removeprefix("timm:")).to(device)
    path = find_weights(source, SIZES)
    saved, state, layout = read_encoder(path)
    periods = state.pop("rope_embed.periods", None)           # Meta's files have them
    try:
        c = ViTConfig(**saved)
        with torch.device("meta"):                # shapes only: no memory, no random numbers
            model = DINOv3(c)
        model.load_state_dict(state, strict=True, assign=True)
    except (TypeError, RuntimeError) as error:    # fields or tensors that do not fit
        problem = theirs(layout, textwrap.shorten(str(error), 1000))
        raise UserError(f"{path}: not a DINOv3 ViT in the layout of {layout}: {problem}") from None
    known = SIZES.get(source.removeprefix("hf:"), c)          # a file may have the wrong name
    if (c.dim, c.depth, c.swiglu) != (known.dim, known.depth, known.swiglu):
        raise UserError(f"{path}: not {source}: width {c.dim}, {c.depth} blocks")
    if periods is not None:
        model.periods = periods
    return model.freeze().to(device)


def rebuild(saved):
    """An encoder with a checkpoint's configuration and without its weights; saved:
    `vars(encoder.config)`."""
    if "timm" in saved:
        return TimmViT(saved["timm"], pretrained=False)
    return DINOv3(ViTConfig(**saved))
