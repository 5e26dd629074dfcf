"""LPIPS: how different two images look, measured in the features of a frozen VGG16.

L1 rates a texture shifted by one pixel as all wrong and blur as nearly right; humans do not.
LPIPS (Zhang et al., arXiv 1801.03924) compares the feature maps of a classifier after each of its
five levels, each channel weighted to agree with human judgments.  Stage 1 at full size minimizes it
together with L1.

It reads two files, downloaded once: VGG16 (553 MB, of which only the convolutions, 59 MB, are used)
and the heads, five rows of channel weights (7 KB, version 0.1).
"""
import torch
import torch.nn as nn

from plumbing.config import UserError, load
from plumbing.fetch import cache_dir, fetch

# Letters: B batch, H W image, C h w the channels and sides of one level's map.

LEVELS = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]     # channels, convolutions of each

VGG = dict(
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0")
HEADS = dict(
    url="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
        "lpips/weights/v0.1/vgg.pth", size=7_289,
    sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")


class LPIPS(nn.Module):
    """The metric, version 0.1 with VGG16.  Random until `load_lpips` sets its weights; frozen."""

    def __init__(self):
        super().__init__()
        layers, self.ends, width = [], [], 3       # numbered as torchvision does: 0 ... 28
        for channels, convolutions in LEVELS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU(inplace=True)]
                width = channels
            self.ends.append(len(layers) - 1)      # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(torch.rand(1, C, 1, 1) for C, _ in LEVELS)
        # ImageNet's mean and standard deviation, rescaled to [-1, 1] and rounded as by the authors
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        """Stays in eval mode when a parent's `train()` is called."""
        return super().train(False)

    def maps(self, images):
        """[-1, 1] (B, 3, H, W) -> five maps float32 (B, C, h, w), of length 1 at each position."""
        x, found = (images.float() - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)                           # in the caller's autocast; the rest is float32
            if i in self.ends:
                f = x.float()                      # eps outside the root, as published
                found.append(f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10))
        return found

    def forward(self, x, y):
        """Images x, y [-1, 1] (B, 3, H, W), H and W >= 16 -> distances float32 (B,), >= 0.

        The gradient goes to x only: y is the target.  ValueError: shapes that differ (they would
        broadcast silently) or sides too small for four halvings.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 16:
            raise ValueError(f"LPIPS needs two (B, 3, H, W) of one shape, H and W >= 16, not "
                             f"{tuple(x.shape)} and {tuple(y.shape)}")
        with torch.no_grad():
            target = self.maps(y)
        distance = 0.0
        for a, b, head in zip(self.maps(x), target, self.heads):
            # eq. 1, but the head multiplies the square, as when the released weights were trained.
            # Elementwise instead of a 1x1 convolution, which autocast would run in bf16.
            distance = distance + (head * (a - b).square()).sum(1).mean((1, 2))         # (B,)
        return distance


def load_lpips(device="cpu", vgg=None, heads=None):
    """-> LPIPS with the published weights, frozen, on `device`.

    vgg: a file in torchvision's layout (vgg16-397923af.pth); heads: one in the lpips package's
    (weights/v0.1/vgg.pth).  If omitted, each is downloaded once, into $NOVAE_CACHE or
    ~/.cache/novae.  Strict: UserError names the file and what does not fit.
    """
    model = LPIPS()
    vgg = vgg or fetch(path=cache_dir() / "vgg16-397923af.pth", **VGG)
    heads = heads or fetch(path=cache_dir() / "lpips-v0.1-vgg.pth", **HEADS)
    fill(model.features, vgg, "torchvision's VGG16", "features.")
    fill(model.heads, heads, "the LPIPS heads for VGG16", "lin", ".model.1.weight")
    return model.to(device)


def fill(module, path, what, prefix, suffix=""):
    """Copy a file's tensors into a module; their names in the file have this prefix and suffix."""
    saved = load(path)
    try:
        module.load_state_dict({k.removeprefix(prefix).removesuffix(suffix): v
                                for k, v in saved.items() if not k.startswith("classifier.")})
    except (AttributeError, RuntimeError) as error:           # not a dict of names; names, shapes
        raise UserError(f"{path}: not {what}: {' '.join(str(error).split())[:300]}") from None
