"""LPIPS: how different two pictures look, by the features of a frozen VGG16.

L1 sees a texture moved by one pixel as all wrong, and blur as nearly right; an eye does not.  LPIPS
(Zhang et al., arXiv 1801.03924) compares a classifier's maps after each of its five levels, each
channel weighted as human judgements taught it.  Stage 1 at full size minimises it beside L1.

Reads two files, fetched once or given by hand: VGG16 (553 MB, of which the convolutions, 59 MB,
are used) and the heads, five rows of channel weights (7 KB, version 0.1).
"""
import torch
import torch.nn as nn

from plumbing import config
from plumbing.config import UserError
from plumbing.fetch import cache, fetch

# Letters: B batch, H W picture, C h w the channels and sides of one level's map.

LEVELS = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]     # channels, convolutions of each

VGG = dict(
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0")
HEADS = dict(
    url="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
        "lpips/weights/v0.1/vgg.pth", size=7_289,
    sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")


class LPIPS(nn.Module):
    """The metric, version 0.1 with VGG16.  Random until `load_lpips` fills it; frozen for good."""

    def __init__(self):
        super().__init__()
        layers, self.ends, width = [], [], 3       # numbered as torchvision does: features.0 ... 28
        for channels, convolutions in LEVELS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU(inplace=True)]
                width = channels
            self.ends.append(len(layers) - 1)      # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(torch.rand(1, C, 1, 1) for C, _ in LEVELS)
        # ImageNet's mean and standard deviation, moved to [-1, 1] and rounded as the authors did
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        """Stays in eval mode, whatever a parent's `train()` says."""
        return super().train(False)

    def maps(self, images):
        """[-1, 1] (B, 3, H, W) -> five maps float32 (B, C, h, w), each place of length 1."""
        x, found = (images.float() - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)                           # in the caller's autocast; the rest is float32
            if i in self.ends:
                f = x.float()                      # eps outside the root, as published
                found.append(f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10))
        return found

    def forward(self, x, y):
        """Pictures x, y [-1, 1] (B, 3, H, W), H and W >= 16 -> distances float32 (B,), >= 0.

        The gradient goes to x only: y is the wanted picture.  ValueError: shapes that differ (they
        would broadcast in silence) or sides too small for four halvings.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 16:
            raise ValueError(f"LPIPS takes two (B, 3, H, W) of one shape, H and W >= 16, not "
                             f"{tuple(x.shape)} and {tuple(y.shape)}")
        with torch.no_grad():
            wanted = self.maps(y)
        distance = 0.0
        for a, b, head in zip(self.maps(x), wanted, self.heads):
            # eq. 1, but the head multiplies the square, as the released weights were trained.
            # Elementwise and not a 1x1 convolution, which autocast would do in bf16.
            distance = distance + (head * (a - b).square()).sum(1).mean((1, 2))         # (B,)
        return distance

# ---------------------------------------------------------------- load


def load_lpips(device="cpu", vgg=None, heads=None):
    """-> LPIPS with the published weights, frozen, on `device`.

    vgg: a file in torchvision's layout (vgg16-397923af.pth); heads: one in the lpips package's
    (weights/v0.1/vgg.pth).  Left out, each is fetched into $NOVAE_CACHE or ~/.cache/novae, once.
    Strict: UserError names the file and what is missing, unexpected, misshapen or impossible.
    """
    model = LPIPS()
    convolutions = {f"features.{k}": v for k, v in model.features.state_dict().items()}
    rows = {f"lin{i}.model.1.weight": v for i, v in enumerate(model.heads)}
    fill(vgg or fetch(path=cache() / "vgg16-397923af.pth", **VGG), convolutions,
         "the VGG16 of torchvision", unused="classifier.")
    fill(heads or fetch(path=cache() / "lpips-v0.1-vgg.pth", **HEADS), rows,
         "the LPIPS heads for VGG16", positive=True)     # a negative one would reward a difference
    return model.to(device)


def fill(path, wanted, what, unused=None, positive=False):
    """Copy a file's tensors into those of `wanted`, a dict by name; nothing unless all of it fits.

    Names that start with `unused` are passed over; `positive` refuses values below zero.
    """
    state = config.load(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: not {what}: holds a {type(state).__name__}")
    wrong = [f"{k} is unexpected" for k in state
             if k not in wanted and not (unused and str(k).startswith(unused))]
    for k, mine in wanted.items():
        v, shape = state.get(k), tuple(mine.shape)
        if not isinstance(v, torch.Tensor):
            wrong.append(f"{k} is missing")
        elif tuple(v.shape) != shape:
            wrong.append(f"{k} is {tuple(v.shape)}, not {shape}")
        elif not v.isfinite().all() or positive and v.min() < 0:
            wrong.append(f"{k} has values that are not finite{' or negative' * positive}")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"{path}: not {what}: {'; '.join(wrong[:3])}{more}")
    with torch.no_grad():
        for k, mine in wanted.items():
            mine.copy_(state[k])
