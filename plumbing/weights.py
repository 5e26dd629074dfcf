"""Encoder weights: finding or fetching them, every published checkpoint layout, timm encoders.

Nothing here knows the model.  `read_encoder` turns any file into plain data: a dict of the
configuration and a dict of tensors under Meta's names, which `dino.load_dino` then loads strictly.
"""
import importlib, json, math, os, re, textwrap
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing import config
from plumbing.config import UserError, require
from plumbing.fetch import HUB, cache_dir, fetch

# ---------------------------------------------------------------- finding and fetching

TINY = Path(__file__).parents[1] / "weights" / "dino_tiny.pt"     # this project's own, embedded:
PHOTOS = TINY.with_name("dino_photos.pt")                         # of shapes, of photographs
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


def find_weights(source, names):
    """-> the Path of an existing file, downloaded if necessary.

    source: "tiny", "photos", one of the model `names`, "hf:" and a name, or a path.  UserError
    explains what to do when there is no such file.
    """
    name = source.removeprefix("hf:")
    if name in names:
        # a file as Meta names it, or just NAME.pth; `vits16` must not match `vits16plus`, and
        # sorting prefers the weights of photographs (lvd) to those of satellite images (sat)
        pattern = rf"(dinov3_)?{name}([-_.].*)?\.(pth|pt|bin|safetensors)"
        for path in sorted(cache_dir().glob("*")) if name == source else ():
            if re.fullmatch(pattern, path.name):
                return path
        return fetch_weights(source)
    path = dict(tiny=TINY, photos=PHOTOS).get(source) or Path(source).expanduser()
    if not path.is_file():
        preset = {TINY: "tiny", PHOTOS: "photos"}.get(path)
        raise UserError(f"{path}: no such file" + (
            f"; `python -m lab.pretrain --preset {preset}` makes it" if preset else
            f", and not a model name either (tiny, photos, {', '.join(names)})"))
    return path


def fetch_weights(source):
    """A model name, or "hf:" and a name -> the Path of its file in the cache, from the hub."""
    name = source.removeprefix("hf:")
    if name not in TIMM:
        raise UserError(f"{source}: no weights in {cache_dir()}; Meta provides them on request "
                        "(ai.meta.com/resources/models-and-libraries/dinov3-downloads); save the "
                        f"file there as {name}.pth, or give its path")
    repository, path = f"timm/vit_{TIMM[name]}_patch16_dinov3.lvd1689m", f"{name}.safetensors"
    if source != name:
        repository, path = f"facebook/dinov3-{name}-pretrain-lvd1689m", f"{name}-hf.safetensors"
    if not (cache_dir() / path).exists():
        print(f"{name}: these weights are under the DINOv3 License, {LICENSE}")
    size, sha256 = SUMS.get(source, (None, None))
    try:
        return fetch(f"{HUB}/{repository}/resolve/main/model.safetensors", cache_dir() / path,
                     sha256=sha256, size=size, token=os.environ.get("HF_TOKEN"))
    except UserError as error:
        raise UserError(f"{error}; the embedded encoder 'tiny' needs no download") from None


# ---------------------------------------------------------------- files

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
              I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8,
              BOOL=torch.bool)


def read_safetensors(path):
    """A .safetensors file -> dict of tensors: 8 bytes of length, a JSON header, then the data.

    It runs no code and allocates no more than the size of the file, whatever the header claims: the
    tensors must follow each other without a gap or overlap.  UserError explains what is wrong.
    """
    with open(path, "rb") as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(512)
        start = 8 + int.from_bytes(head[:8], "little")
        # the brace first: a header of 15392 bytes begins like an HTML page, with " <"
        if head[8:9] != b"{":
            raise UserError(f"{path}: "
                            f"{config.wrong_kind(head) or 'truncated, or not a safetensors file'}")
        try:
            require(start <= size, "truncated; download it again")
            file.seek(8)
            header, at, tensors = json.loads(file.read(start - 8)), 0, {}
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
                require(kind in DTYPES, f"{name} has the dtype {kind}, which is not supported")
                dtype = DTYPES[kind]
                require(end <= size - start, "truncated; download it again")
                require(begin == at and math.prod(shape) * dtype.itemsize == end - begin,
                        f"the header contradicts itself about {name}")
                data, at = bytearray(end - begin), end        # its own memory: always aligned
                file.readinto(data)
                tensors[name] = (torch.frombuffer(data, dtype=dtype) if data else
                                 torch.empty(0, dtype=dtype)).view(shape)
            require(at == size - start, "there are bytes after the last tensor")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError,
                OverflowError) as error:
            problem = textwrap.shorten(str(error), 200)
            if type(error) is not ValueError:             # not one of our own, above
                problem = f"malformed header ({type(error).__name__}: {problem})"
            raise UserError(f"{path}: {problem}") from None
    return tensors


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


# ---------------------------------------------------------------- layouts

# What Meta's names (ours) are called in the other two layouts.  q, k and v are one tensor in Meta's
# and three in transformers'; so are their biases in timm's.  transformers uses up_proj for two
# different things, fc1 and w2.
LAYOUTS = {
    "Meta": {},
    "transformers": {
        "cls_token": "embeddings.cls_token", "storage_tokens": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token", "patch_embed.proj": "embeddings.patch_embeddings",
        "blocks.": "layer.", "attn.q.": "attention.q_proj.", "attn.k.": "attention.k_proj.",
        "attn.v.": "attention.v_proj.", "attn.proj": "attention.o_proj",
        "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
        "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj",
        "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"},
    "timm": {
        "storage_tokens": "reg_token", "attn.q.bias": "attn.q_bias", "attn.v.bias": "attn.v_bias",
        "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2",
        "mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.w3": "mlp.fc2"},
}
SAT = dict(mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143))   # of SAT-493M, satellite images


def theirs(layout, text):
    """Our names in `text` (a name, a message) -> what `layout` calls them."""
    for our, their in LAYOUTS[layout].items():
        text = text.replace(our, their)
    return text


def read_encoder(path):
    """An encoder's file of any kind and layout -> (saved, state, layout).

    saved: fields of `dino.ViTConfig`; state: float32 tensors under Meta's names, and
    `rope_embed.periods` if the file has them; layout: a key of LAYOUTS.  UserError: not a DINOv3
    ViT.  Whether state fits saved is left to a strict `load_state_dict`.
    """
    checkpoint = read_safetensors(path) if path.suffix == ".safetensors" else config.load(path)
    own = isinstance(checkpoint, dict) and "kind" in checkpoint
    if own:
        config.load_kind(path, "dino", "python -m lab.pretrain")
    tensors = unwrap(checkpoint)
    marks = {layout: theirs(layout, "storage_tokens") for layout in LAYOUTS}
    layout = next((layout for layout, mark in marks.items() if mark in tensors), None)
    if layout is None:
        raise UserError(f"{path}: no DINOv3 ViT in the layout of Meta, transformers or timm; of "
                        f"its {len(tensors)} tensors none is called {', '.join(marks.values())}")
    try:
        state = translate(tensors, layout)
        return checkpoint.get("config") if own else infer_config(state, path), state, layout
    except KeyError as error:
        problem = f"{error.args[0]} is missing"
    except (ValueError, RuntimeError) as error:
        problem = textwrap.shorten(str(error), 200)
    raise UserError(f"{path}: not a DINOv3 ViT in the layout of {layout}: "
                    f"{theirs(layout, problem)}")


def translate(tensors, layout):
    """A file's tensors -> the same under Meta's names, float32.

    KeyError: a missing tensor; ValueError, RuntimeError: an impossible one.  Unknown tensors
    keep their names.
    """
    gated = any(theirs(layout, "mlp.w1.") in key for key in tensors)
    names = {their: our for our, their in LAYOUTS[layout].items()
             if not our.startswith("mlp.fc" if gated else "mlp.w")}
    state = {}
    for key, value in tensors.items():
        for their, our in names.items():
            key = key.replace(their, our)
        state[key] = value.float().contiguous()
        require(value.is_floating_point() and state[key].isfinite().all(),
                f"{key} contains NaN, infinity or whole numbers")
    for key in "local_cls_norm.weight", "local_cls_norm.bias":    # for training's small crops
        state.pop(key, None)
    # three tensors that are one here; no layout has a bias for k
    for key in [key for key in state if key.endswith(("attn.q.bias", "attn.v.bias"))]:
        state.setdefault(re.sub(r"[qv]\.bias$", "k.bias", key), torch.zeros_like(state[key]))
    for key in sorted({re.sub(r"\.attn\.[qkv]\.", ".attn.{}.", key) for key in state}):
        if "{}" in key:
            state[key.format("qkv")] = torch.cat([state.pop(key.format(x)) for x in "qkv"])
    for key in [key for key in state if key.endswith("attn.qkv.bias")]:
        # the released files express "no bias" by a mask of zeros
        state[key] = state[key] * state.pop(key + "_mask", torch.ones(()))
        require(not state[key].chunk(3)[1].any(), f"{key} has a bias for k; DINOv3 has none")
    # only pretraining needs it: timm drops it, transformers has it as (1, 1, D)
    empty = torch.zeros(state["cls_token"].shape[-1])
    state["mask_token"] = state.get("mask_token", empty).reshape(1, -1)
    return state


def infer_config(state, path):
    """The fields of `dino.ViTConfig` that tensors under Meta's names imply; mean and std follow
    from the file's name.  KeyError: a missing tensor; ValueError: impossible sizes."""
    gate = "w1" if "blocks.0.mlp.w1.weight" in state else "fc1"
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    # The width of a head is in the file only with the periods, d/4 of them; else as published.
    head = 128 if dim == 4096 else min(dim, 64)
    if "rope_embed.periods" in state:
        periods = state["rope_embed.periods"]
        require(periods.ndim == 1 and len(periods) > 0 and (periods > 0).all(),
                "rope_embed.periods are not all positive")
        head = 4 * len(periods)
    require(head and head % 4 == 0 == dim % head,
            f"the width {dim} is not a multiple of the heads' width {head}")
    saved = dict(
        dim=dim, heads=dim // head, patch=patch, swiglu=gate == "w1",
        depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        hidden=len(state[f"blocks.0.mlp.{gate}.weight"]),
        registers=state["storage_tokens"].shape[1],
        qkv_bias=any(key.endswith("attn.qkv.bias") for key in state))
    # a file of the hub is only ever called model.safetensors: its folder counts; then the hashes
    # at the end of Meta's two names
    if re.search("sat493m|-eadcf0ff|-a6675841", str(path), re.IGNORECASE):
        saved |= SAT
    return saved


# ---------------------------------------------------------------- other encoders


class TimmViT(nn.Module):
    """A ViT of the timm package with the methods of `dino.DINOv3`: MAE, SigLIP2, DINOv2 ... (the
    paper's Table 3).  Always frozen.

    name: as `timm.create_model` takes it; pretrained: fetch its weights (timm has its own cache).
    UserError: timm is not installed, it does not know the model, or the model is not a plain ViT.
    """

    def __init__(self, name, pretrained=True):
        super().__init__()
        try:
            timm = importlib.import_module("timm")       # nothing else here needs it
            self.net = timm.create_model(name, pretrained, num_classes=0, dynamic_img_size=True)
            self.prefix, self.own_patch = (self.net.num_prefix_tokens,
                                           self.net.patch_embed.patch_size[0])
        except ImportError:
            raise UserError(f"timm:{name} needs the package timm: pip install timm") from None
        except (TypeError, AttributeError):       # not a ViT, or one of a fixed image size
            raise UserError(f"timm:{name} has no patch tokens at every image size; "
                            "only a plain ViT does") from None
        except Exception as error:                # unknown, no network, gated ...
            raise UserError(f"timm:{name}: {str(error).partition(chr(10))[0]}") from None
        known = self.net.pretrained_cfg
        self.config = SimpleNamespace(timm=name, mean=tuple(known["mean"]), std=tuple(known["std"]))
        self.dim = self.net.num_features
        # DINOv2's patch of 14 pixels counts as 16, which the levels of the decoder can produce:
        # an image of 256 pixels is resized to 224
        self.patch = 1 << (self.own_patch - 1).bit_length()
        self.freeze()

    def freeze(self):
        """No parameter is ever trained; gradients with respect to the pixels still flow."""
        return self.eval().requires_grad_(False)

    def train(self, mode=True):
        """Stays in eval mode when a parent's `train()` is called."""
        return super().train(False)

    def normalize(self, images):
        """[-1, 1] -> the mean and std that the weights were trained with."""
        mean = torch.tensor(self.config.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.config.std, device=images.device).view(3, 1, 1)
        return ((images + 1) / 2 - mean) / std

    def resize(self, pixels):
        """(B, 3, H, W) -> the size at which the model's own patches make the same grid."""
        if self.patch == self.own_patch:
            return pixels
        H, W = (side // self.patch * self.own_patch for side in pixels.shape[-2:])
        return F.interpolate(pixels, (H, W), mode="bicubic", antialias=True)

    def forward(self, pixels):
        """Normalized pixels (B, 3, H, W) -> patches (B, h*w, D), cls (B, D); the mean of the
        patches stands in for a class token where there is none (SigLIP)."""
        x = self.net.forward_features(self.resize(pixels))
        return x[:, self.prefix:], x[:, 0] if self.prefix else x.mean(1)

    def features(self, pixels):
        """Normalized pixels (B, 3, H, W) -> a list of (B, h*w, D), the patches after each block,
        before the final norm."""
        return self.net.forward_intermediates(
            self.resize(pixels), norm=False, output_fmt="NLC", intermediates_only=True)
