"""The frozen encoder: a DINOv3 ViT, every published checkpoint layout, and the tiny one that ships.

DINOv3 (arXiv 2508.10104) is a plain pre-norm ViT with rotary positions, four register tokens and
LayerScale.  SVG takes its patch tokens after the final norm as they are: they say *what* is where,
so that a diffusion model finds the classes lying apart before it has learned anything.

    python dino.py --overwrite            # pretrains the tiny encoder of weights/ anew
    python dino.py --check vits16plus 000000039769.jpg    # the real weights against known values

weights/dino_tiny.pt: 0.49 M parameters, seed 0, 2,400 steps of 256 unlabelled shapes, 13.1 minutes
on one to two cores of an AMD EPYC (bfloat16); held-out kNN .998, linear probe .998, pixels .272.
"""
import copy, importlib, json, math, os, re, sys, time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from plumbing import config
from plumbing.config import UserError, field, require
from data import shapes, to_float
from plumbing.fetch import HUB, cache, fetch
from metrics import knn, linear_probe

# Letters: B batch, H W image, h w its patches, N = h w, P = 1 + registers + N tokens,
#          D width, A heads, d = D / A head width.

# ---------------------------------------------------------------- the model


@dataclass
class ViTConfig:
    """Everything that the weights of one encoder imply."""
    dim: int = 384
    depth: int = 12
    heads: int = 6
    hidden: int = 1536
    swiglu: bool = False                  # gated feed-forward (the "+" models and 7B), else GELU
    qkv_bias: bool = True
    patch: int = 16
    registers: int = 4
    stem: int = 0                         # width of a convolutional stem; 0: one linear patch map
    mean: tuple = (0.485, 0.456, 0.406)   # of ImageNet, for the LVD-1689M weights
    std: tuple = (0.229, 0.224, 0.225)


SIZES = {                                 # as published; parameters in millions
    "vits16": ViTConfig(),                                                          # 21.6
    "vits16plus": ViTConfig(swiglu=True),                                           # 28.7
    "vitb16": ViTConfig(dim=768, heads=12, hidden=3072),                            # 85.7
    "vitl16": ViTConfig(dim=1024, depth=24, heads=16, hidden=4096),                 # 303
    "vitl16plus": ViTConfig(dim=1024, depth=24, heads=16, hidden=4096, swiglu=True),  # 404
    "vith16plus": ViTConfig(dim=1280, depth=32, heads=20, hidden=5120, swiglu=True),  # 841
    "vit7b16": ViTConfig(dim=4096, depth=40, heads=32, hidden=8192, swiglu=True, qkv_bias=False),
}


def rope_periods(head_dim):
    """Wave lengths 100^(2i / (d/2)), i < d/4, rounded to bfloat16 as the published weights were
    trained (timm and transformers compute them exactly and so differ from Meta by up to 2e-2)."""
    i = torch.arange(head_dim // 4, dtype=torch.float32)
    return (100 ** (2 * i / (head_dim // 2))).bfloat16().float()


def rope(h, w, periods):
    """Sines and cosines of a grid's positions: two tensors (h*w, d), always float32.

    Patch centres in [-1, 1], each axis by its own length; y before x; the d/4 angles of each
    axis stand twice, for the two halves that `rotate` pairs.
    """
    y = 2 * (torch.arange(h, dtype=torch.float32) + 0.5) / h - 1
    x = 2 * (torch.arange(w, dtype=torch.float32) + 0.5) / w - 1
    place = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)              # (h, w, 2)
    angle = 2 * math.pi * place[..., None] / periods                          # (h, w, 2, d/4)
    angle = angle.flatten(2).flatten(0, 1).tile(2)                            # (h*w, d)
    return angle.sin(), angle.cos()


def rotate(q, sin, cos):
    """Rotary position on the last N tokens of q (B, A, P, d); cls and registers stay as is."""
    first, rest = q[..., :-len(sin), :], q[..., -len(sin):, :].float()
    a, b = rest.chunk(2, -1)
    rest = rest * cos + torch.cat([-b, a], -1) * sin
    return torch.cat([first, rest.to(q.dtype)], -2)


def attention(q, k, v):
    """softmax(q k' / sqrt(d)) v on (B, A, P, d).

    With few tokens the plain products win on a CPU: forward and backward in bfloat16 on two cores
    14 times as fast as the fused call at 16 tokens, 2.8 at 64, 1.8 at 128.  Elsewhere the latter.
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
        # the published models learn no bias for k; under rotation it would not cancel: masked out
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(c.dim),
                             persistent=False)

    def forward(self, x, sin, cos):
        B, P, D = x.shape
        bias = None if self.qkv.bias is None else self.qkv.bias * self.mask
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.view(B, P, 3, self.heads, -1).permute(2, 0, 3, 1, 4)    # each (B, A, P, d)
        x = attention(rotate(q, sin, cos), rotate(k, sin, cos), v)
        return self.proj(x.transpose(1, 2).reshape(B, P, D))


class MLP(nn.Module):
    """The plain feed-forward: Linear, GELU (erf), Linear."""

    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.dim, c.hidden), nn.Linear(c.hidden, c.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """The gated feed-forward of the "+" models: w3(silu(w1 x) * w2 x)."""

    def __init__(self, c):
        super().__init__()
        self.w1, self.w2 = nn.Linear(c.dim, c.hidden), nn.Linear(c.dim, c.hidden)
        self.w3 = nn.Linear(c.hidden, c.dim)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    """A learned gain a channel on each branch, 0.1 at first."""

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
    """One convolution as wide as a patch, or, for a small model that learns from few pictures,
    a stem of stride-2 convolutions that ends on the same grid."""

    def __init__(self, c):
        super().__init__()
        stride, width, layers = c.patch, 3, []
        while c.stem and stride > 2:
            wider = c.stem if width == 3 else 2 * width
            layers += [nn.Conv2d(width, wider, 3, 2, 1), nn.GELU()]
            width, stride = wider, stride // 2
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(width, c.dim, stride, stride)

    def forward(self, x):
        return self.proj(self.stem(x)).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """What a frozen encoder offers besides forward and features: `patch` and `dim`, and these."""

    frozen = False

    def freeze(self):
        """For good: no gradient reaches a parameter, and a parent's `train()` does not wake it.
        A gradient with respect to the pixels still flows; a perceptual loss lives on it."""
        self.frozen = True
        return self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    def normalize(self, images):
        """[-1, 1] -> the mean and std that the weights were trained with."""
        mean = torch.tensor(self.config.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.config.std, device=images.device).view(3, 1, 1)
        return ((images + 1) / 2 - mean) / std


class DINOv3(Encoder):
    """The ViT. Parameter names are Meta's, so that their file loads without a translation."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.patch, self.dim, self.depth = c.patch, c.dim, c.depth
        self.patch_embed = PatchEmbed(c)
        self.cls_token = nn.Parameter(torch.randn(1, 1, c.dim) * 0.02)
        self.storage_tokens = nn.Parameter(torch.randn(1, c.registers, c.dim) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, c.dim))     # for pretraining; not used here
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=1e-5)
        self.periods = rope_periods(c.dim // c.heads)     # no buffer: `.to()` must not cast it
        self._rope = {}
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02 if c.dim > 192 else 0.05)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, pixels):
        """Normalised pixels (B, 3, H, W), H and W any multiples of the patch
        -> patches (B, h*w, D), cls (B, D), both after the final norm."""
        x = self.norm(self.features(pixels)[-1])
        return x[:, 1 + self.config.registers:], x[:, 0]

    def features(self, pixels):
        """Normalised pixels (B, 3, H, W) -> one (B, P, D) a block: all tokens, before the final
        norm, in the order cls, registers, patches."""
        B, _, H, W = pixels.shape
        if H % self.patch or W % self.patch:
            raise ValueError(f"{H} x {W} pixels are no multiple of the patch size {self.patch}")
        key = H // self.patch, W // self.patch, pixels.device
        if key not in self._rope:
            with torch.inference_mode(False):                 # kept, and used with gradients later
                self._rope[key] = [t.to(pixels.device) for t in rope(*key[:2], self.periods)]
        x = self.patch_embed(pixels)                                          # (B, N, D)
        first = torch.cat([self.cls_token, self.storage_tokens], 1).expand(B, -1, -1)
        x = torch.cat([first.to(x.dtype), x], 1)                              # (B, P, D)
        out = []
        for block in self.blocks:
            x = block(x, *self._rope[key])
            out.append(x)
        return out


@dataclass
class TimmConfig:
    """What a checkpoint keeps of an encoder from timm, besides its weights."""
    timm: str                             # the model's name there
    mean: tuple
    std: tuple


class TimmViT(Encoder):
    """A ViT of the timm package with DINOv3's methods: MAE, SigLIP2, DINOv2 ... (Table 3).

    name: as `timm.create_model` takes it; pretrained: fetch its weights (timm has a cache of its
    own).  UserError when timm is missing, or the model, or its patch tokens.
    """

    def __init__(self, name, pretrained=True):
        super().__init__()
        try:
            timm = importlib.import_module("timm")       # nothing else here needs it
            self.net = timm.create_model(name, pretrained, num_classes=0, dynamic_img_size=True)
        except ImportError:
            raise UserError(f"timm:{name} needs the package timm: pip install timm") from None
        except TypeError:                         # not a ViT, or one of a single picture size
            self.net = None
        except Exception as error:                # unknown, no network, gated ...
            raise UserError(f"timm:{name}: {str(error).partition(chr(10))[0]}") from None
        if not hasattr(self.net, "num_prefix_tokens") or not hasattr(self.net, "patch_embed"):
            raise UserError(f"timm:{name} has no patch tokens at every size; a plain ViT is wanted")
        known = self.net.pretrained_cfg
        self.config = TimmConfig(name, tuple(known["mean"]), tuple(known["std"]))
        self.dim, self.own_patch = self.net.num_features, self.net.patch_embed.patch_size[0]
        # DINOv2's patch of 14 pixels counts as 16, what the decoder's levels can make: it sees
        # a picture of 256 pixels at 224
        self.patch = 1 << (self.own_patch - 1).bit_length()

    def shrink(self, pixels):
        if self.patch == self.own_patch:
            return pixels
        H, W = (side // self.patch * self.own_patch for side in pixels.shape[-2:])
        return F.interpolate(pixels, (H, W), mode="bicubic", antialias=True)

    def forward(self, pixels):
        """Normalised pixels (B, 3, H, W) -> patches (B, h*w, D), cls (B, D); the mean of the
        patches stands for a class token where there is none (SigLIP)."""
        x, first = self.net.forward_features(self.shrink(pixels)), self.net.num_prefix_tokens
        return x[:, first:], x[:, 0] if first else x.mean(1)

    def features(self, pixels):
        """Normalised pixels (B, 3, H, W) -> one (B, h*w, D) a block, before the final norm."""
        return self.net.forward_intermediates(
            self.shrink(pixels), norm=False, output_fmt="NLC", intermediates_only=True)


# ---------------------------------------------------------------- loading

TINY = Path(__file__).with_name("weights") / "dino_tiny.pt"       # this project's own, embedded
TIMM = dict(vits16="small", vits16plus="small_plus", vitb16="base", vitl16="large",
            vith16plus="huge_plus", vit7b16="7b")                 # the ungated copies on the hub
SUMS = {                                  # model.safetensors, where known: bytes, sha256
    "vits16": (86_362_376, "2a1ec16ae28ffa07bc0ead0241ee7df9fc26451fe6f9f839b7b3afa0a906b040"),
    "vits16plus": (114_750_056, "423e7b4b1103de4100a5c19a436cc00f1a994d82835ed51623b209ccfd1e9615"),
    "hf:vits16": (86_406_384, "4610ad75edef83e75afdebf162d148dc628045ea6cbb83d67d4708c709c4f91d"),
    "hf:vits16plus": (114_794_096,
                      "208146e499dace99e4c9376ddb8a26f77d64c31c46c4dc4b86ff8bc63b0235e2"),
}
LICENSE = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
SAT = dict(mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143))   # of SAT-493M, satellite images

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
              I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8,
              BOOL=torch.bool)


def read_safetensors(path):
    """A .safetensors file -> dict name -> tensor, on the CPU, in the file's own dtypes.

    The format is a header length (8 bytes), a JSON header, and the raw tensors end to end. Each
    number in the header is checked before it is used; UserError tells what is wrong in one line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    name = None
    try:
        with open(path, "rb") as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(512)
            # the brace first: a header of 15392 bytes begins like an HTML page, with " <"
            require(head[8:9] == b"{",
                    config.wrong_kind(head) or "no safetensors file, or a truncated one")
            start = 8 + int.from_bytes(head[:8], "little")
            require(start <= size, "truncated in the header; download it again")
            file.seek(8)
            header, at, tensors = json.loads(file.read(start - 8)), 0, {}
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                shape, (begin, end) = entry["shape"], entry["data_offsets"]
                dtype = DTYPES.get(entry["dtype"])
                require(dtype is not None, f"of dtype {entry['dtype']}, which is not read here")
                require(begin == at, "overlaps another tensor, or leaves a hole before it")
                require(end <= size - start, "truncated; download it again")
                require(all(type(n) is int and n >= 0 for n in shape), f"of shape {shape}")
                require(math.prod(shape) * dtype.itemsize == end - begin,
                        f"shape {shape} does not take {end - begin} bytes")
                data, at = bytearray(end - begin), end        # its own memory: always aligned
                require(file.readinto(data) == len(data), "truncated while it was read")
                tensors[name] = (torch.frombuffer(data, dtype=dtype) if data else
                                 torch.empty(0, dtype=dtype)).view(shape)
            require(at == size - start, "bytes after the last tensor that belong to none")
            return tensors
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError,
            RuntimeError, OverflowError) as error:
        problem = f"the header is malformed ({type(error).__name__}: {error})"
    except ValueError as error:
        problem = str(error)
    raise UserError(f"{path}: {f'tensor {name}: ' if name else ''}{problem}")


# What Meta's names, which are ours, are called in the two other layouts. `{}` stands for q, k, v,
# three tensors there and one here. transformers says up_proj for two different things (fc1, w2):
# hence the translation runs from our names to theirs, and complaints use theirs.
LAYOUTS = {
    "Meta": {},
    "transformers": {
        "cls_token": "embeddings.cls_token", "storage_tokens": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token", "patch_embed.proj": "embeddings.patch_embeddings",
        "blocks.": "layer.", "attn.qkv": "attention.{}_proj", "attn.proj": "attention.o_proj",
        "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
        "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj",
        "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"},
    "timm": {
        "storage_tokens": "reg_token", "attn.qkv.bias": "attn.{}_bias",
        "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2",
        "mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.w3": "mlp.fc2"},
}


def theirs(layout, name):
    """Our name, or a piece of it, in another layout."""
    for our, their in LAYOUTS[layout].items():
        name = name.replace(our, their)
    return name


def load_dino(source, device="cpu"):
    """-> frozen DINOv3 in float32.

    source: "tiny" (embedded); a name of SIZES, from $NOVAE_CACHE or ~/.cache/novae or fetched there
    (timm's copy, which needs no login; "hf:NAME" is Meta's own, which needs HF_TOKEN); a .pth, .pt,
    .bin or .safetensors file in Meta's, transformers', timm's or this project's layout; or
    "timm:NAME", another encoder, a TimmViT.
    Strict: UserError names every tensor that is missing, left over, misshapen or not finite.
    """
    if str(source).startswith("timm:"):
        return TimmViT(str(source).removeprefix("timm:")).freeze().to(device)
    path = find_weights(source)
    read = read_safetensors if path.suffix == ".safetensors" else config.load
    checkpoint = read(path)
    tensors = unwrap(checkpoint)
    if isinstance(checkpoint, dict) and "kind" in checkpoint:
        saved = config.load_kind(path, "dino", "python dino.py").get("config")
        try:
            layout, c = "Meta", ViTConfig(**saved)
        except TypeError as error:
            raise UserError(f"{path}: no configuration of this encoder ({error})") from None
    else:
        # The tokens have another name in each layout, and so has LayerScale: most hits win,
        # so that one missing tensor is still called by its name below.
        marks = "cls_token", "storage_tokens", "blocks.0.ls1.gamma", "blocks.0.ls2.gamma"
        hits = {l: sum(theirs(l, name) in tensors for name in marks) for l in LAYOUTS}
        layout = max(hits, key=hits.get)
        if hits[layout] < 2:
            raise UserError(f"{path}: no DINOv3 encoder in Meta's, transformers' or timm's layout; "
                            f"it has {len(tensors)} tensors: {', '.join([*tensors][:3])} ...")
        c = infer_config(tensors, layout, path)
    name = str(source).removeprefix("hf:")
    if name in SIZES:                             # a file in the cache may bear the wrong name
        want = SIZES[name]
        if (c.dim, c.depth, c.swiglu) != (want.dim, want.depth, want.swiglu):
            raise UserError(f"{path}: is no {name}: width {c.dim}, {c.depth} blocks")

    # The file's tensors become the parameters themselves, so the model needs no memory of its own.
    with torch.device("meta"):                    # shapes only: no memory, no random numbers
        model = DINOv3(c)
    state = translate(tensors, layout, model, path)
    model.load_state_dict(state, strict=True, assign=True)
    for block in model.blocks:                    # the mask is in the bias already
        block.attn.mask = torch.ones(3 * c.dim)
    model.periods = rope_periods(c.dim // c.heads)
    if "rope_embed.periods" in tensors:           # Meta's file has them, rounded to bfloat16
        model.periods = tensors["rope_embed.periods"].float()
    return model.freeze().to(device)


def rebuild(saved):
    """An encoder of a checkpoint, without its weights; saved: `vars(encoder.config)`."""
    if "timm" in saved:
        return TimmViT(saved["timm"], pretrained=False)
    return DINOv3(ViTConfig(**saved))


def find_weights(source):
    """"tiny", a name of SIZES, "hf:" and such a name, or a path -> an existing file, fetched when
    there is none; UserError says what to do instead."""
    source = str(source)
    name = source.removeprefix("hf:")
    if name in SIZES:
        if name == source:
            pattern = rf"(dinov3_)?{name}([-_.].*)?\.(pth|pt|bin|safetensors)"
            # as Meta calls it, or just the name: `vits16` must not find `vits16plus`; lvd comes
            # before sat
            for path in sorted(cache().glob("*")):
                if re.fullmatch(pattern, path.name):
                    return path
        return fetch_weights(source)
    path = TINY if source == "tiny" else Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file" + (
            "; `python dino.py` makes it" if path == TINY else
            f", and no model name either (tiny, {', '.join(SIZES)})"))
    return path


def fetch_weights(source):
    """A name of SIZES, or "hf:" and such a name -> its file in the cache, from the hub."""
    name = source.removeprefix("hf:")
    if name not in TIMM:
        raise UserError(f"{source}: no weights in {cache()}; Meta gives them on request "
                        "(ai.meta.com/resources/models-and-libraries/dinov3-downloads); put the "
                        f"file there as {name}.pth, or give its path")
    repository, path = f"timm/vit_{TIMM[name]}_patch16_dinov3.lvd1689m", f"{name}.safetensors"
    if source != name:
        repository, path = f"facebook/dinov3-{name}-pretrain-lvd1689m", f"{name}-hf.safetensors"
    if not (cache() / path).exists():
        print(f"{name}: these weights are under the DINOv3 License, {LICENSE}")
    size, sha256 = SUMS.get(source, (None, None))
    try:
        return fetch(f"{HUB}/{repository}/resolve/main/model.safetensors", cache() / path,
                     sha256=sha256, size=size, token=os.environ.get("HF_TOKEN"))
    except UserError as error:
        raise UserError(f"{error}; the embedded encoder 'tiny' needs no download") from None


def unwrap(checkpoint):
    """The tensors of a checkpoint, out of the dicts and without the prefixes that trainers add."""
    for _ in range(3):
        if isinstance(checkpoint, dict):
            inner = [checkpoint[k] for k in ("model", "state_dict", "teacher")
                     if isinstance(checkpoint.get(k), dict)]
            checkpoint = inner[0] if inner else checkpoint
    items = checkpoint.items() if isinstance(checkpoint, dict) else ()
    return {re.sub(r"^((module|backbone|model)\.)+", "", str(key)): value
            for key, value in items if isinstance(value, torch.Tensor)}


def infer_config(tensors, layout, path):
    """The configuration that names and shapes imply; what is missing, `translate` will tell."""
    def size(piece, axis):
        """What most tensors agree on, so that a misshapen one is told apart from the rest."""
        sizes = [t.shape[axis] for key, t in tensors.items()
                 if theirs(layout, piece) in key and t.ndim > axis]
        return max(sizes, key=sizes.count, default=0)

    def anywhere(piece):
        return any(theirs(layout, piece).format("q") in key for key in tensors)

    dim = size("norm", 0)
    gate = "w1" if anywhere("mlp.w1.") else "fc1"
    number = re.escape(theirs(layout, "blocks.")) + r"(\d+)\."
    # The width of a head is in the file only with the periods, d/4 of them; else as published.
    heads = 32 if dim == 4096 else max(dim // 64, 1)
    if "rope_embed.periods" in tensors:
        periods = tensors["rope_embed.periods"].float()
        if periods.ndim != 1 or not (periods.isfinite() & (periods > 0)).all():
            raise UserError(f"{path}: rope_embed.periods are not all finite and positive")
        heads = dim // max(4 * len(periods), 1)
        if heads * 4 * len(periods) != dim:
            raise UserError(f"{path}: {len(periods)} rope_embed.periods do not fit width {dim}")
    c = ViTConfig(
        dim=dim, heads=heads, swiglu=gate == "w1",
        depth=len({m[1] for m in (re.match(number, key) for key in tensors) if m}),
        hidden=size(f"mlp.{gate}.", 0) or 4 * dim,
        patch=size("patch_embed.proj.weight", 3) or 16,
        registers=size("storage_tokens", 1) or 4,
        # timm's usual files leave out a bias that is zero; the 7B model alone never had one
        qkv_bias=anywhere("attn.qkv.bias") or layout == "timm" and dim != 4096)
    if c.depth < 1 or c.heads < 1 or c.dim % (4 * c.heads):
        raise UserError(f"{path}: no encoder has width {dim}, {heads} heads, {c.depth} blocks")
    # a hub file is only ever called model.safetensors: its folder counts; then Meta's two hashes
    if re.search("sat493m|-eadcf0ff|-a6675841", str(path), re.IGNORECASE):
        c.mean, c.std = SAT["mean"], SAT["std"]
    return c


def translate(tensors, layout, model, path):
    """The file's tensors -> state dict of the model, float32; UserError with all that is amiss."""
    left, state, wrong = dict(tensors), {}, []
    for dropped in ("rope_embed.periods", "local_cls_norm.weight", "local_cls_norm.bias"):
        left.pop(dropped, None)                   # read elsewhere; used on training's small crops
    token = theirs(layout, "mask_token")
    if token in left and left[token].ndim == 3:   # transformers has it as (1, 1, D)
        left[token] = left[token][0]

    def take(key, shape):
        """One tensor of the file, as float32; or None, and one complaint more."""
        value = left.pop(key, None)
        if value is None:
            wrong.append(f"{key} is missing")
        elif value.shape != shape:
            wrong.append(f"{key} has shape {tuple(value.shape)} and not {tuple(shape)}")
        elif not value.is_floating_point() or not value.float().isfinite().all():
            wrong.append(f"{key} holds NaN, infinity or whole numbers")
        else:
            return value.float().contiguous()

    biased, masked = (any(key.endswith(ends) for key in left) for ends in
                      (theirs(layout, "attn.qkv.bias").format("q"), "attn.qkv.bias_mask"))
    for name, want in model.state_dict().items():
        key, is_bias, parts = theirs(layout, name), name.endswith("qkv.bias"), []
        letters = "qkv" if "{}" in key else "-"
        shape = torch.Size([len(want) // len(letters), *want.shape[1:]])
        # Only these may be absent: the mask token, k's bias, and in timm's layout every bias.
        for letter in letters:
            part = key.format(letter)
            spare = name == "mask_token" or is_bias and (
                letter == "k" or layout == "timm" and not biased)
            parts.append(torch.zeros(shape) if spare and part not in left else take(part, shape))
        # Released files say "no bias" by a mask of zeros; a mask of NaN was never initialised.
        mask = take(name + "_mask", want.shape) if is_bias and masked else 1
        if not wrong:
            state[name] = torch.cat(parts) * mask if is_bias else torch.cat(parts)
            if is_bias and state[name].chunk(3)[1].any():
                wrong.append(f"{key.format('k')} has a bias for k, of which DINOv3 has none")
    wrong += [f"{key} is unexpected" for key in left]
    if wrong:
        raise UserError(f"{path}: does not fit a ViT in {layout}'s layout: {', '.join(wrong)}")
    return state


# ---------------------------------------------------------------- pretraining the tiny encoder


@dataclass
class Config:
    """Self-supervised pretraining of the tiny encoder; labels only measure it."""
    preset: str = field("tiny", "a named set of the options below")
    out: str = field("", "folder of dino_tiny.pt; weights/ for the preset tiny if empty")
    size: int = field(32, "side of a picture in pixels; a multiple of the patch")
    patch: int = field(8, "side of a patch in pixels")
    dim: int = field(96, "width; heads are 32 wide")
    depth: int = field(4, "blocks")
    stem: int = field(32, "width of the convolutional stem; 0: a linear patch map")
    # ---- EDIT HERE for ablations: what makes two views the same ----
    images: int = field(100_000, "pictures of `shapes` to learn from, not the other stages'")
    temperature: float = field(0.2, "of the contrastive loss")
    turn: float = field(0.3, "greatest rotation of a view, in radians")
    zoom: float = field(0.2, "greatest change of scale of a view")
    # ----------------------------------------------------------------
    steps: int = field(2400, "optimiser steps")
    batch: int = field(256, "pictures a step, two views each")
    lr: float = field(2e-3, "learning rate")
    warmup: int = field(200, "steps of linear warm-up")
    decay: bool = field(True, "cosine decay of the learning rate to zero")
    ema: float = field(0.995, "decay of the averaged weights, which are the ones that ship")
    seed: int = field(0, "all randomness is a function of (seed, step)")
    device: str = field("auto", "cuda, cpu, ...; auto takes a GPU when there is one")
    save_every: int = field(200, "steps between checkpoints")
    keep: str = field("", "steps, with commas between, before which the encoder is kept for good, "
                      "as dino_tiny_<step>.pt; 0 is the random one")
    overwrite: bool = field(False, "train anew over a finished file")

    def check(self):
        """Impossible values end here."""
        config.check_shared(self)
        self.out = str(TINY.parent) if self.out == "out/tiny" else self.out
        for name, least in (("batch", 2), ("dim", 32), ("depth", 1), ("images", 2)):
            require(getattr(self, name) >= least, f"--{name} must be at least {least}")
        require(self.dim % 32 == 0, "--dim must be a multiple of 32")
        require(self.patch in (4, 8, 16), "--patch must be 4, 8 or 16")
        require(self.size % self.patch == 0 and self.size > 0,
                       "--size must be a multiple of --patch")
        require(self.temperature > 0, "--temperature must be positive")
        require(all(k.strip().isdigit() for k in self.keep.split(",") if self.keep),
                "--keep must be whole numbers with commas between, such as 0,200,800")


PRESETS = {
    "tiny": dict(),
    "debug": dict(images=1000, dim=32, depth=1, stem=8, steps=20, batch=32, warmup=5,
                  save_every=10),
}


def views(x, c, g):
    """One random view of each picture: x (B, 3, S, S) in [-1, 1] -> the same shape, roughly so.

    Moved, turned, zoomed, mirrored; its colours rotated in RGB space (which can invert and, one
    time in five, grey them), a gradient, a faint grating and noise laid over.  What survives all
    that is the shape: it is what the encoder comes to know.
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
    # ---- EXERCISE 12: keep the colours ----
    rotation = torch.linalg.qr(torch.randn(B, 3, 3, generator=g))[0].to(x.device)
    mixed = torch.einsum("bij,bjhw->bihw", rotation, x - mean)
    mixed = mixed * uniform(1, 1, 1, low=-0.4, high=0.5).exp()
    grey = 1.5 * mixed.mean(1, keepdim=True).expand_as(mixed)
    x = torch.where(uniform(1, 1, 1) < 0.2, grey, mixed) + uniform(3, 1, 1, low=-0.5, high=0.5)

    axis = torch.linspace(-1, 1, S, device=x.device)

    def along(direction):                                     # a ramp across the picture, (B, S, S)
        return (direction.cos()[:, None, None] * axis
                + direction.sin()[:, None, None] * axis[:, None])
    pitch, phase = uniform(1, 1, low=3, high=14), uniform(1, 1, high=2 * math.pi)
    grating = (along(uniform(high=math.pi)) * pitch + phase).sin()
    x = x + uniform(1, 1, 1, high=0.08) * uniform(3, 1, 1) * grating[:, None]
    ramp = along(uniform(high=2 * math.pi))
    x = x + uniform(3, 1, 1, low=-0.15, high=0.15) * ramp[:, None]
    return x + uniform(1, 1, 1, high=0.04) * torch.randn(x.shape, generator=g).to(x.device)


class Student(nn.Module):
    """The encoder with two projection heads that are thrown away afterwards: one reads the class
    token, one the mean patch token, so that both come to hold the picture's meaning."""

    def __init__(self, c, width=512, out=128):
        super().__init__()
        self.net = DINOv3(ViTConfig(
            dim=c.dim, depth=c.depth, heads=c.dim // 32, hidden=4 * c.dim, patch=c.patch,
            registers=2, stem=c.stem, mean=(0.5,) * 3, std=(0.5,) * 3))
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Linear(c.dim, width), nn.BatchNorm1d(width), nn.GELU(),
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.GELU(),
            nn.Linear(width, out)) for _ in range(2))

    def forward(self, x):
        """[-1, 1] (B, 3, S, S) -> two embeddings (B, out) of unit length"""
        patches, cls = self.net(self.net.normalize(x))
        return [F.normalize(head(z).float(), dim=1)
                for head, z in zip(self.heads, (cls, patches.mean(1)))]


def contrastive_loss(z, temperature):
    """NT-Xent (SimCLR, arXiv 2002.05709, eq. 1): z (2B, d), rows i and i + B are two views of one
    picture; each must find the other among all 2B - 1."""
    similar = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    return F.cross_entropy(similar, torch.arange(len(z), device=z.device).roll(len(z) // 2))


@torch.no_grad()
def measure(net, size, references=5000, held_out=2000):
    """kNN and linear probe (labels used only here) -> dict of accuracies on held-out shapes."""
    def embed(images):
        device = net.norm.weight.device
        parts = [net(net.normalize(to_float(images, slice(i, i + 500), None, device)))
                 for i in range(0, len(images), 500)]
        return torch.cat([p.mean(1) for p, _ in parts]), torch.cat([c for _, c in parts])
    x, y, _ = shapes(references, size, seed=4)
    xt, yt, _ = shapes(held_out, size, seed=5)
    (patch, cls), (patch_t, cls_t) = embed(x.numpy()), embed(xt.numpy())
    flat, flat_t = x.flatten(1).float(), xt.flatten(1).float()
    return dict(knn=knn(patch, y, patch_t, yt), knn_cls=knn(cls, y, cls_t, yt),
                linear=linear_probe(patch, y, patch_t, yt), knn_pixels=knn(flat, y, flat_t, yt))


def train(c):
    """Run or continue the pretraining; writes dino_tiny.pt, half precision."""
    device, autocast = config.setup(c.device)
    path = Path(c.out) / "dino_tiny.pt"
    state_path = Path(c.out) / "dino_tiny.train.pt"             # removed at the end
    checkpoint = config.resume(state_path, "dino_train", c, "python dino.py")
    if checkpoint is None and path.is_file() and not c.overwrite:
        print(f"{path}: finished; --overwrite trains it anew")
        return
    torch.manual_seed(c.seed)
    student = Student(c).to(device).train()
    ema = copy.deepcopy(student.net).requires_grad_(False).eval()
    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=0.04),
                                   dict(params=others, weight_decay=0.0)],
                                  c.lr, (0.9, 0.95), fused=True)
    start, minutes = 0, 0.0
    if checkpoint:
        start, minutes = checkpoint["step"], checkpoint["minutes"]
        student.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    images = shapes(c.images, c.size, seed=3)[0].numpy()
    print(f"pretraining on {config.describe(device)}: {c.images:,} unlabelled pictures; encoder "
          f"{sum(p.numel() for p in ema.parameters()) / 1e6:.2f} M; {c.steps} steps of {c.batch}")
    began, kept = time.time(), {int(k) for k in c.keep.split(",") if k}

    def write(path):
        config.save(path, dict(
            kind="dino", version=config.VERSION, config=vars(ema.config),
            pretraining=config.plain(c), minutes=minutes,
            model={k: v.half() for k, v in ema.state_dict().items()}))

    with config.Stop() as stop:
        bar = config.progress(start, c.steps, "dino")
        for step in bar:
            if step in kept:
                write(path.with_name(f"dino_tiny_{step}.pt"))
            g = config.generator(c.seed, step)
            index = torch.randint(len(images), (c.batch,), generator=g)
            x = to_float(images, index, None, device)
            pair = torch.cat([views(x, c, g), views(x, c, g)])
            for group in optimizer.param_groups:
                group["lr"] = config.rate(c, step)
            with autocast():
                embeddings = student(pair)
            loss = sum(contrastive_loss(z, c.temperature) for z in embeddings)
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {loss.item()} at step {step}; try a smaller --lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 3.0)
            optimizer.step()
            with torch.no_grad():
                weight = max(1 - c.ema, 1 / (step + 10))
                torch._foreach_lerp_(list(ema.parameters()), list(student.net.parameters()), weight)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if stop.asked or (step + 1) % c.save_every == 0 or step + 1 == c.steps:
                config.save(state_path, dict(
                    kind="dino_train", version=config.VERSION, config=config.plain(c),
                    step=step + 1, minutes=minutes + (time.time() - began) / 60,
                    model=student.state_dict(), ema=ema.state_dict(),
                    optimizer=optimizer.state_dict()))
                if stop.asked and step + 1 < c.steps:
                    config.stopped(state_path, step + 1)
    minutes += (time.time() - began) / 60
    write(path)
    state_path.unlink(missing_ok=True)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.2f} MB\nminutes: {minutes:.1f}")
    for name, value in measure(load_dino(path, device), c.size).items():
        print(f"{name}: {value:.4f}")


# The first five values of the real weights on COCO val2017 000000039769.jpg, 224 x 224 bilinear, as
# transformers' conversion script records them: class token, first patch; they agree to 1e-3.
KNOWN = {
    "vits16plus": ((-0.471349, -1.365778, -0.317983, 0.377219, -0.769085),
                   (0.144551, -0.388117, -0.393433, -0.157695, -0.600380)),
    "vits16": ((0.463561, -0.415609, 0.408236, -0.126613, -0.286636),
               (-0.038754, -0.250895, -0.016392, -0.455473, 0.571582)),
}


@torch.no_grad()
def check(name, image):
    """Print the first values of a published encoder on a picture file, beside the known ones."""
    try:
        with Image.open(image) as picture:
            picture = picture.convert("RGB").resize((224, 224), Image.BILINEAR)
    except OSError as error:
        raise UserError(f"{image}: cannot be read as a picture ({error})") from None
    model = load_dino(name)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    patches, cls = model(model.normalize(pixels))
    for what, mine, known in zip(("cls", "first_patch"), (cls[0], patches[0, 0]), KNOWN[name]):
        mine = mine[:5].tolist()
        print(f"{what}: " + " ".join(f"{v:.6f}" for v in mine))
        print(f"{what}_known: " + " ".join(f"{v:.6f}" for v in known))
        print(f"{what}_max_difference: {max(abs(a - b) for a, b in zip(mine, known)):.6f}")


def main(argv=None):
    """The command line; `--check NAME IMAGE` instead compares with the known values."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--check"]:
        if len(argv) != 3 or argv[1] not in KNOWN:
            print(f"dino.py: --check wants {' or '.join(KNOWN)}, and a picture", file=sys.stderr)
            sys.exit(2)
        return check(*argv[1:])
    train(config.parse(Config, PRESETS, argv))


if __name__ == "__main__":
    with config.one_line_errors():
        main()
