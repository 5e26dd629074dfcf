"""The frozen encoder: a DINOv3 ViT, every published checkpoint layout, and the tiny one that ships.

DINOv3 (arXiv 2508.10104) is a plain pre-norm ViT with rotary positions, four register tokens and
LayerScale.  SVG takes its patch tokens after the final norm as they are: they say *what* is where,
so that a diffusion model finds the classes lying apart before it has learned anything.
"""
import json, math, os, re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import config
from config import UserError, require

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

    With few tokens the plain products win on a CPU (backward above all); elsewhere the fused call.
    """
    if q.device.type == "cpu" and q.shape[-2] <= 128:
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).float().softmax(-1)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
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
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.dim, c.hidden), nn.Linear(c.hidden, c.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.w1, self.w2 = nn.Linear(c.dim, c.hidden), nn.Linear(c.dim, c.hidden)
        self.w3 = nn.Linear(c.hidden, c.dim)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
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


class DINOv3(nn.Module):
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
        self.frozen = False
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02 if c.dim > 192 else 0.05)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

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


# ---------------------------------------------------------------- loading

TINY = Path(__file__).with_name("weights") / "dino_tiny.pt"       # this project's own, embedded
TIMM = dict(vits16="small", vits16plus="small_plus", vitb16="base", vitl16="large",
            vith16plus="huge_plus", vit7b16="7b")                 # the ungated copies on the hub
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

    source: "tiny" (embedded), a name of SIZES (looked for in $NOVAE_CACHE or ~/.cache/novae), or a
    .pth, .pt, .bin or .safetensors file in Meta's, transformers', timm's or this project's layout.
    Strict: UserError names every tensor that is missing, left over, misshapen or not finite.
    """
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
    if str(source) in SIZES:
        want = SIZES[str(source)]
        if (c.dim, c.depth, c.swiglu) != (want.dim, want.depth, want.swiglu):
            raise UserError(f"{path}: is no {source}: width {c.dim}, {c.depth} blocks")

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


def find_weights(source):
    """"tiny", a name of SIZES or a path -> an existing file; UserError says where to get it."""
    source = str(source)
    if source in SIZES:
        folder = Path(os.environ.get("NOVAE_CACHE") or "~/.cache/novae").expanduser()
        pattern = rf"(dinov3_)?{source}([-_.].*)?\.(pth|pt|bin|safetensors)"
        for path in sorted(folder.glob("*")):
            if re.fullmatch(pattern, path.name):
                return path
        where = (f"https://huggingface.co/timm/vit_{TIMM[source]}_patch16_dinov3.lvd1689m, no login"
                 if source in TIMM else "Meta, ai.meta.com/resources/models-and-libraries/dinov3-"
                 "downloads, on request")
        raise UserError(f"{source}: no weights in {folder}; get them from {where}, and give the "
                        f"file's path, or put it there as {source}.safetensors (or .pth); the "
                        "embedded encoder 'tiny' needs no download")
    path = TINY if source == "tiny" else Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file" + (
            "; `python dino.py` makes it" if path == TINY else
            f", and no model name either (tiny, {', '.join(SIZES)})"))
    return path


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


# ---- pretraining
