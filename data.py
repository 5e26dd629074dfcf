"""Images as uint8 arrays: the procedural data set `shapes`, and `load_images` for any data set.

`shapes` is ten classes of small images drawn from signed distance functions.  The class is the
shape; color, gradient, texture, position, size, rotation, stray lines and noise are nuisances, and
they dominate the pixels: nearest neighbors on raw pixels are right about one time in four.
It needs no download, depends only on its seed, and renders at any size.

    python data.py                        # draws a page of examples to out/data/page.png
    python data.py --data ~/photos        # the same for a folder with one sub-folder per class

Between files, images are uint8 (M, 3, S, S) RGB on disk and float32 in [-1, 1] in memory.
Letters: B batch, P pixels of an image.
"""
import hashlib, math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from plumbing import config
from plumbing.config import UserError
from plumbing.draw import save_grid
from plumbing.fetch import file_lock
from plumbing.photos import decode_folder, find_folder, list_folder, printable

# ---------------------------------------------------------------- shapes: geometry
#
# A signed distance function (SDF) gives a point's distance to the shape's edge, negative inside.
# Its argument p (B, P, 2) is x and y in the shape's own coordinates, where the shape fills about
# [-1, 1] x [-1, 1] and y points down; its result is (B, P).


def _circle(p, r, cx=0.0, cy=0.0):
    return torch.hypot(p[..., 0] - cx, p[..., 1] - cy) - r


def _box(p, w, h, cx=0.0, cy=0.0):
    x, y = (p[..., 0] - cx).abs() - w, (p[..., 1] - cy).abs() - h
    return torch.hypot(x.clamp(min=0), y.clamp(min=0)) + torch.maximum(x, y).clamp(max=0)


def _polygon(p, corners):
    """A convex polygon, corners counterclockwise on screen: the maximum over its half-planes."""
    edges = []
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        length = math.hypot(bx - ax, by - ay)
        edges.append(((p[..., 1] - ay) * (bx - ax) - (p[..., 0] - ax) * (by - ay)) / length)
    return torch.stack(edges).amax(0)


def _star(p):
    """Four points, defined in one eighth of the plane and mirrored into the others."""
    q = p.abs()
    big, small = q.amax(-1), q.amin(-1)
    ax, bx = 1.08, 0.27                                   # tip (ax, 0), notch (bx, bx)
    return ((big - ax) * bx + small * (ax - bx)) / math.hypot(bx, ax - bx)


def _union(*parts):
    return torch.stack(parts).amin(0)


SHAPES = {
    "disc": lambda p: _circle(p, 0.86),
    "frame": lambda p: _box(p, 0.62, 0.62).abs() - 0.17,
    "triangle": lambda p: _polygon(p, [(0.0, -1.0), (-0.98, 0.72), (0.98, 0.72)]),
    "star": _star,
    "cross": lambda p: _union(_box(p, 0.92, 0.27), _box(p, 0.27, 0.92)),
    "ring": lambda p: _circle(p, 0.72).abs() - 0.18,
    "dots": lambda p: _union(*(_circle(p, 0.37, 0.6 * math.sin(a), -0.6 * math.cos(a))
                               for a in (0.0, 2.0944, 4.1888))),
    "crescent": lambda p: torch.maximum(_circle(p, 0.9), -_circle(p, 0.72, 0.42)),
    "arrow": lambda p: _union(_box(p, 0.5, 0.22, -0.42, 0.0),
                              _polygon(p, [(0.98, 0.0), (-0.02, -0.76), (-0.02, 0.76)])),
    "bars": lambda p: _union(*(_box(p, 0.85, 0.18, 0.0, c) for c in (-0.64, 0.0, 0.64))),
    # ---- EXERCISE 5: an eleventh shape, and another VERSION ----
}
SHAPE_NAMES = tuple(SHAPES)
DRAWN = ("shapes", "shapes-color")         # data sets of drawn images; all others are photographs

# ---------------------------------------------------------------- shapes: rendering
# ---- EDIT HERE for ablations: harder or easier nuisances ----
SCALE = (0.52, 0.77)           # the shape's half-width; the image's is 1
TURN = 0.5                     # largest rotation, either way, in radians
CONTRAST = 0.42                # smallest RGB distance between object and background
TEXTURE = 0.07                 # largest amplitude of stripes and checks
LINES = 2                      # largest number of stray lines behind the object
NOISE = 0.02                   # largest standard deviation of the pixel noise
# -------------------------------------------------------------
CHUNK = 1000                   # images per random stream
# what is drawn for an image besides its class, with the number of columns in `shapes`; gradient and
# texture have one for the background and one for the object
FACTORS = dict(back=3, front=3, center=2, scale=1, angle=1, gradient=2, texture=2, lines=1, noise=1)


def shapes(n, size=32, seed=0, masks=False, factors=False):
    """The first `n` images of stream number `seed`; a longer set starts with the shorter one.

    size: side in pixels; the same seed gives the same images at every size, up to the pixel noise.
    -> images uint8 (n, 3, size, size) RGB, labels int64 (n,), class names; with `masks`, also the
    object's coverage, uint8 (n, size, size), 255 inside; with `factors`, also what else was drawn,
    float32 (n, 16), the columns of FACTORS: colors as RGB in [0, 1], center and scale in units of
    half the image, angle in radians, and the strengths of the other factors in units of RGB.
    """
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    labels = torch.empty(n, dtype=torch.int64)
    cover = torch.empty(n, size, size, dtype=torch.uint8)
    values = torch.empty(n, sum(FACTORS.values()))
    for chunk, start in enumerate(range(0, n, CHUNK)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + chunk)
        part = slice(start, min(n, start + CHUNK))
        images[part], labels[part], cover[part], values[part] = _render_chunk(
            size, generator, part.stop - part.start)
    return images, labels, SHAPE_NAMES, *([cover] * masks), *([values] * factors)


def _render_chunk(size, g, count):
    """Draw the nuisances of CHUNK images from generator g; render the first `count` of them."""
    def uniform(*shape, low=0.0, high=1.0):
        return (torch.rand(CHUNK, *shape, generator=g) * (high - low) + low)[:count]

    labels = (torch.randperm(CHUNK, generator=g) % len(SHAPES))[:count]
    step = 2 / size
    axis = torch.arange(size) * step + step / 2 - 1
    grid = torch.stack([axis.repeat(size), axis.repeat_interleave(size)], -1)   # (P, 2): x, y

    # the object's position: image -> shape coordinates
    scale = uniform(low=SCALE[0], high=SCALE[1])
    angle = uniform(low=-TURN, high=TURN)
    center = uniform(2, low=-1, high=1) * (1.02 - scale)[:, None]
    p = (grid - center[:, None]) / scale[:, None, None]                         # (B, P, 2)
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    mirror = (uniform() < 0.5)[:, None] * 2 - 1           # so flipped images stay in distribution
    p = torch.stack([mirror * (c * p[..., 0] + s * p[..., 1]), c * p[..., 1] - s * p[..., 0]], -1)
    distance = torch.empty(count, size * size)
    for k, name in enumerate(SHAPES):
        mine = labels == k
        distance[mine] = SHAPES[name](p[mine])
    # anti-aliasing: coverage falls from 1 to 0 over one pixel around the edge
    mask = (0.5 - distance * scale[:, None] / step).clamp(0, 1)                 # (B, P)

    back, front = _two_colors(uniform)
    background, strengths = _surface(back, grid, uniform)                       # (B, 3, P), (B, 2)
    lines = torch.zeros(count)
    for _ in range(LINES):
        shown = uniform() < 0.5
        turn = uniform(high=math.pi)
        normal = torch.stack([turn.cos(), turn.sin()], -1)
        off = (normal @ grid.T - uniform(low=-0.9, high=0.9)[:, None]).abs()
        width = uniform(low=0.6, high=1.4)[:, None] * 2 / 32                    # of a 32 px image
        line = ((width / 2 - off) / step + 0.5).clamp(0, 1) * (0.75 * shown)[:, None]
        color = (back + uniform(3, low=-0.4, high=0.4)).clamp(0, 1)
        background = background.lerp(color[:, :, None], line[:, None])
        lines = lines + shown * (color - back).norm(dim=1)
    surface, more = _surface(front, grid, uniform)
    image = background.lerp(surface, mask[:, None])
    # the noise is drawn last because it alone depends on the size
    deviation = uniform(high=NOISE)[:, None, None]
    image = image + deviation * torch.randn(count, 3, size * size, generator=g)
    image, mask = ((x.clamp(0, 1) * 255).round().to(torch.uint8) for x in (image, mask))
    faint = torch.stack([strengths, more], -1).flatten(1)           # two gradients, two textures
    values = torch.cat([back, front, center, torch.stack([scale, angle], -1), faint,
                        torch.stack([lines, deviation.flatten()], -1)], 1)
    return image.view(count, 3, size, size), labels, mask.view(count, size, size), values


def _two_colors(uniform):
    """Two RGB colors (B, 3) per image, at least CONTRAST apart."""
    back = uniform(3, low=0.06, high=0.94)
    front = uniform(3, low=0.06, high=0.94)
    near = (front - back).norm(dim=1, keepdim=True) < CONTRAST
    # too similar: move the object's color to the far side of the RGB cube
    opposite = torch.where(back > 0.5, back - 0.45, back + 0.45)
    return back, torch.where(near, opposite, front)


def _surface(color, grid, uniform):
    """A color (B, 3) with a gradient and, in half of the images, faint stripes or checks -> (B, 3,
    P), and the strengths of gradient and texture (B, 2)."""
    turn = uniform(high=2 * math.pi)
    along = torch.stack([turn.cos(), turn.sin()], -1) @ grid.T               # (B, P) in +-1.4
    shift = uniform(3, low=-0.22, high=0.22)
    surface = color[:, :, None] + shift[:, :, None] * along[:, None]
    turn, phase = uniform(high=math.pi), uniform(2, high=2 * math.pi)
    pitch = uniform(low=5.0, high=11.0)[:, None]                             # radians
    u = torch.stack([turn.cos(), turn.sin()], -1) @ grid.T * pitch + phase[:, :1]
    v = torch.stack([-turn.sin(), turn.cos()], -1) @ grid.T * pitch + phase[:, 1:]
    kind = uniform()[:, None]
    wave = torch.where(kind < 0.25, u.sin(), u.sin() * v.sin()) * (kind < 0.5)
    amplitude = uniform(high=TEXTURE)
    return (surface + (amplitude[:, None] * wave)[:, None],
            torch.stack([shift.norm(dim=1), amplitude * (kind[:, 0] < 0.5)], -1))


# the class in `shapes-color` is the object's hue; ten equal sectors, and red is the middle of the
# first (between 9 and 11 % of the images each)
COLOR_NAMES = ("red", "orange", "yellow", "green", "emerald", "cyan", "azure", "blue", "purple",
               "pink")


def hue_classes(rgb):
    """Colors (n, 3), RGB in any one unit -> int64 (n,), indices of COLOR_NAMES: the angle around
    the axis of grays.  A color near gray has one too, but a small error changes it."""
    r, g, b = rgb.T
    angle = torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)
    return (angle * len(COLOR_NAMES) / (2 * math.pi)).round().long() % len(COLOR_NAMES)


# ---------------------------------------------------------------- loading

SHAPES_SPLITS = {"train": (20_000, 0), "test": (2_000, 1)}         # images, seed
VERSION = 2                    # of the cache: raise it when `shapes` or the decoding changes


def load_images(name, size, split="train", cache="out/data", classes=""):
    """A data set -> images uint8 (M, 3, size, size) memory-mapped, labels int64 (M,), class names.

    name: `shapes`, `shapes-color` (the same images, the class is the object's color), `imagenette`
    and the like (downloaded the first time), a folder, or a zip or tar archive of one; size: side
    in pixels, images are center-cropped; split: train or test; classes: use only these, as in
    `list_folder`.  Decoded once into `cache`, and again if the folder has changed.  UserError: a
    folder that `list_folder` or `decode_folder` rejects, or a download that fails.
    """
    if name == "shapes-color":
        images, _, _ = load_images("shapes", size, split, cache, classes)
        count, seed = SHAPES_SPLITS[split]
        *_, drawn = shapes(count, 1, seed, factors=True)    # the same at any size; 1 takes no time
        _, front, *_ = drawn.split(list(FACTORS.values()), 1)
        return images, hue_classes(front), list(COLOR_NAMES)
    if name == "shapes":
        if classes:
            raise UserError("--classes selects classes of a folder; it does not apply to shapes")
        stem, names, identity = name, list(SHAPE_NAMES), f"shapes {SHAPES_SPLITS[split]}"
    else:
        root = find_folder(str(name))
        paths, labels, names = list_folder(root, split, classes)
        stats = ((p, p.stat()) for p in paths)
        identity = "\n".join(f"{p} {s.st_size} {s.st_mtime_ns}" for p, s in stats)
        stem = printable(root.resolve().name)
    key = f"{VERSION} {identity} {size}".encode("utf-8", "surrogateescape")
    folder = Path(cache) / f"{stem}-{size}-{split}-{hashlib.sha256(key).hexdigest()[:10]}"
    images_path, labels_path = folder / "images.npy", folder / "labels.npy"
    if not labels_path.is_file():                           # written last, so both are complete
        with file_lock(folder):                             # one rank makes it, the others wait
            if not labels_path.is_file():
                if name == "shapes":
                    count, seed = SHAPES_SPLITS[split]
                    images, labels, _ = shapes(count, size, seed)
                    config.atomic(images_path, lambda t: np.save(t, images.numpy()))
                else:
                    labels = decode_folder(root, paths, labels, names, size, images_path)
                config.atomic(labels_path, lambda t: np.save(t, np.asarray(labels, np.int64)))
    return np.load(images_path, mmap_mode="r"), torch.from_numpy(np.load(labels_path)), names


def evenly(count, n):
    """n of the rows 0 to count - 1 (all if n is 0 or too large), evenly spaced: int64 (n,).  In a
    folder sorted by class, the first n rows would be the first classes."""
    n = min(n or count, count)
    return torch.arange(n) * count // n


def to_float(images, index, flip=None, device="cpu"):
    """Rows `index` of uint8 images -> float32 in [-1, 1] (B, 3, S, S) on the device.

    flip: booleans (B,), or one for all: which images are mirrored left to right.
    """
    index = index.numpy() if isinstance(index, torch.Tensor) else index
    x = config.send(torch.from_numpy(np.array(images[index])), device)
    x = x.float() / 127.5 - 1
    if flip is not None:
        x = torch.where(config.send(flip, device).view(-1, 1, 1, 1), x.flip(-1), x)
    return x


def to_uint8(images):
    """Float images, clamped to [-1, 1] -> uint8 on the CPU, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


# ---------------------------------------------------------------- a page of examples


@dataclass
class Config:
    """A page of examples."""
    data: str = config.field("shapes", "shapes, shapes-color, imagenette, imagewoof, "
                             "tiny-imagenet, a folder, or an archive")
    size: int = config.field(32, "side of an image in pixels")
    columns: int = config.field(16, "images per class; ten classes at most")
    out: str = config.field("out/data/page.png", "the file to write")

    def check(self):
        """ValueError for impossible values: exit status 2."""
        config.require(self.size >= 4 and self.columns >= 1, "--size or --columns is too small")


PRESETS = {}


def main(argv=None):
    """The command line: draw a page with one row per class."""
    c = config.parse(Config, PRESETS, argv)
    images, labels, names = load_images(c.data, c.size)
    page = np.full((min(10, len(names)), c.columns, 3, c.size, c.size), 255, np.uint8)
    for k, row in enumerate(page):
        examples = np.flatnonzero(labels == k)[:c.columns]
        row[:len(examples)] = images[examples]
    save_grid(c.out, page.reshape(-1, 3, c.size, c.size), c.columns)
    print(f"wrote {c.out}: one row per class: {', '.join(names[:10])}; {len(images):,} images")


if __name__ == "__main__":
    with config.one_line_errors():
        main()
