"""Images in: the procedural `shapes` set, Imagenette, any folder of pictures, as uint8 arrays.

`shapes` is ten classes of small pictures drawn from signed distance functions. The class is the
shape; colours, gradients, textures, place, size, rotation, stray lines and noise are nuisances, and
they dominate the pixels: a nearest neighbour on raw pixels is right about one time in four.
It needs no download, is a function of its seed, and renders at any size.

    python data.py                        # draws a page of examples to out/data/page.png
    python data.py --data ~/pictures      # the same for a folder with one sub-folder a class

Public: `shapes(n, size, seed)` and `load_images(name, size, split)`, both returning
(images uint8 (M, 3, S, S), labels int64 (M,), class names).
"""
import hashlib, math, os, unicodedata, warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from plumbing import config
from plumbing.config import UserError
from plumbing.fetch import alone, cache as home, fetch, unpack

# ---------------------------------------------------------------- shapes: geometry
#
# A signed distance function (SDF) says how far a point is from the shape's edge, negative inside.
# All are in the shape's own coordinates, where it fills about [-1, 1] x [-1, 1].  p is (B, P, 2).


def _circle(p, r, cx=0.0, cy=0.0):
    return torch.hypot(p[..., 0] - cx, p[..., 1] - cy) - r


def _box(p, w, h, cx=0.0, cy=0.0):
    x, y = (p[..., 0] - cx).abs() - w, (p[..., 1] - cy).abs() - h
    return torch.hypot(x.clamp(min=0), y.clamp(min=0)) + torch.maximum(x, y).clamp(max=0)


def _polygon(p, corners):
    """Convex polygon, corners counter-clockwise on paper: the farthest of its half-planes."""
    edges = []
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        length = math.hypot(bx - ax, by - ay)
        edges.append(((p[..., 1] - ay) * (bx - ax) - (p[..., 0] - ax) * (by - ay)) / length)
    return torch.stack(edges).amax(0)


def _star(p):
    """Four points, drawn in one eighth of the plane and mirrored into the others."""
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

# ---------------------------------------------------------------- shapes: rendering
# ---- EDIT HERE for ablations: harder or easier nuisances ----
SCALE = (0.52, 0.77)           # the shape's half-width, the picture's being 1
TURN = 0.5                     # rotation, at most, either way, in radians
CONTRAST = 0.42                # least RGB distance of object and background colours
TEXTURE = 0.07                 # greatest amplitude of stripes and checks
LINES = 2                      # most stray lines behind the object
NOISE = 0.02                   # greatest standard deviation of pixel noise
# -------------------------------------------------------------
CHUNK = 1000                   # pictures drawn from one random stream; the unit of reproducibility


def shapes(n, size=32, seed=0, masks=False):
    """The first `n` pictures of the stream that `seed` names; a longer set begins with a shorter.

    n: how many; size: side in pixels; the same seed is the same pictures at every size (up to the
    pixel noise). -> images uint8 (n, 3, size, size) RGB, labels int64 (n,), class names; with
    `masks`, also the object's coverage, uint8 (n, size, size), 255 inside.
    """
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    labels = torch.empty(n, dtype=torch.int64)
    cover = torch.empty(n, size, size, dtype=torch.uint8)
    for start in range(0, n, CHUNK):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start // CHUNK)
        part = slice(start, min(n, start + CHUNK))
        count = part.stop - part.start
        image, label, mask = _render_chunk(size, generator, count)
        images[part], labels[part], cover[part] = image, label, mask
    result = images, labels, SHAPE_NAMES
    return (*result, cover) if masks else result


def _render_chunk(size, g, count):
    """CHUNK draws from generator g, of which the first `count` are rendered."""
    def uniform(*shape, low=0.0, high=1.0):
        return (torch.rand(CHUNK, *shape, generator=g) * (high - low) + low)[:count]

    labels = (torch.randperm(CHUNK, generator=g) % len(SHAPES))[:count]
    step = 2 / size
    axis = torch.arange(size) * step + step / 2 - 1
    grid = torch.stack([axis.repeat(size), axis.repeat_interleave(size)], -1)   # (P, 2): x, y

    # the object's place: picture -> shape coordinates
    scale = uniform(low=SCALE[0], high=SCALE[1])
    angle = uniform(low=-TURN, high=TURN)
    centre = uniform(2, low=-1, high=1) * (1.02 - scale)[:, None]
    p = (grid - centre[:, None]) / scale[:, None, None]                         # (B, P, 2)
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    mirror = (uniform() < 0.5)[:, None] * 2 - 1       # arrows point either way: flips fit in
    p = torch.stack([mirror * (c * p[..., 0] + s * p[..., 1]), c * p[..., 1] - s * p[..., 0]], -1)
    distance = torch.empty(count, size * size)
    for k, name in enumerate(SHAPES):
        mine = labels == k
        distance[mine] = SHAPES[name](p[mine])
    # a pixel's coverage falls from 1 to 0 over one pixel around the edge: anti-aliasing
    mask = (0.5 - distance * scale[:, None] / step).clamp(0, 1)                 # (B, P)

    back, front = _two_colours(uniform)
    background = _surface(back, grid, uniform)                                  # (B, 3, P)
    for _ in range(LINES):
        shown = uniform() < 0.5
        turn = uniform(high=math.pi)
        normal = torch.stack([turn.cos(), turn.sin()], -1)
        off = (normal @ grid.T - uniform(low=-0.9, high=0.9)[:, None]).abs()
        width = uniform(low=0.6, high=1.4)[:, None] * 2 / 32                    # of a 32 px picture
        line = ((width / 2 - off) / step + 0.5).clamp(0, 1) * (0.75 * shown)[:, None]
        colour = (back + uniform(3, low=-0.4, high=0.4)).clamp(0, 1)
        background = background.lerp(colour[:, :, None], line[:, None])
    picture = background.lerp(_surface(front, grid, uniform), mask[:, None])
    # noise comes last: it alone depends on the size
    deviation = uniform(high=NOISE)[:, None, None]
    picture = picture + deviation * torch.randn(count, 3, size * size, generator=g)
    picture = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    return (picture.view(count, 3, size, size), labels,
            (mask * 255).round().to(torch.uint8).view(count, size, size))


def _two_colours(uniform):
    """Two RGB colours (B, 3) a picture, at least CONTRAST apart, the one not tied to the other."""
    back = uniform(3, low=0.06, high=0.94)
    front = uniform(3, low=0.06, high=0.94)
    away = front - back
    length = away.norm(dim=1, keepdim=True)
    near = (length < CONTRAST).squeeze(1)
    # too alike: flip the object's colour to the far side of the cube
    opposite = torch.where(back > 0.5, back - 0.45, back + 0.45)
    return back, torch.where(near[:, None], opposite, front)


def _surface(colour, grid, uniform):
    """A colour (B, 3) with a gradient and, for half of the pictures, faint stripes or checks."""
    turn = uniform(high=2 * math.pi)
    along = torch.stack([turn.cos(), turn.sin()], -1) @ grid.T               # (B, P) in +-1.4
    shift = uniform(3, low=-0.22, high=0.22)
    surface = colour[:, :, None] + shift[:, :, None] * along[:, None]
    turn, phase = uniform(high=math.pi), uniform(2, high=2 * math.pi)
    pitch = uniform(low=5.0, high=11.0)[:, None]                             # radians
    u = torch.stack([turn.cos(), turn.sin()], -1) @ grid.T * pitch + phase[:, :1]
    v = torch.stack([-turn.sin(), turn.cos()], -1) @ grid.T * pitch + phase[:, 1:]
    kind = uniform()[:, None]
    wave = torch.where(kind < 0.25, u.sin(), u.sin() * v.sin()) * (kind < 0.5)
    return surface + (uniform(high=TEXTURE)[:, None] * wave)[:, None]


# ---------------------------------------------------------------- data sets to fetch

FASTAI = "https://s3.amazonaws.com/fast-ai-imageclas/"
ARCHIVES = {                   # ten classes of ImageNet each, easy ones and breeds of dogs
    "imagenette": (FASTAI + "imagenette2-320.tgz",           # 340 MB; the shorter side is 320 px
                   dict(md5="3df6f0d01a2c9592104656642f5e78a3")),
    "imagenette-full": (FASTAI + "imagenette2.tgz",          # 1.6 GB; as in ImageNet
                        dict(md5="fe2fc210e6bb7c5664d602c3cd71e612")),
    "imagewoof": (FASTAI + "imagewoof2-320.tgz",             # the sum as third parties record it
                  dict(sha256="4e4905ed7643120daaf9bf3b2ef7f3a7e8396d9bdaf254a38c6f01f618b4973d")),
}
WORDS = {                      # ImageNet's names of these classes -> words
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
    "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn",
    "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball",
    "n03888257": "parachute",
    "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback", "n02088364": "beagle",
    "n02089973": "English foxhound", "n02093754": "Border terrier",
    "n02096294": "Australian terrier", "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog", "n02111889": "Samoyed", "n02115641": "dingo",
}


def find_folder(name):
    """A name of ARCHIVES -> its folder in the cache, fetched and unpacked when it is not there;
    anything else is a folder's path already."""
    if name not in ARCHIVES:
        return Path(name).expanduser()
    url, sums = ARCHIVES[name]
    archive = home() / url.rpartition("/")[2]
    folder = archive.with_suffix("")
    return folder if folder.is_dir() else unpack(fetch(url, archive, **sums), folder)

# ---------------------------------------------------------------- folders of pictures

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# what the bytes may be, whatever the suffix says; not EPS, which would be run as a program
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
MOST_PIXELS = 90_000_000       # of a picture in memory; more is a mistake, or a decompression bomb
SPLITS = {"train": ("train", "training"), "test": ("val", "valid", "validation", "test")}
HELD_OUT = 10                  # every tenth picture of a class, without a folder of its own


def list_folder(root, split, classes=""):
    """-> (paths, labels, class names) of one split of a folder, in an order that does not change.

    root/train/CLASS/* with root/val/CLASS/* (or valid, validation, test), or root/CLASS/*.
    classes: only these, names with commas between or a text file with one a line; labels count
    them in the folder's order, not in this one's.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder (and not the name of a data set: shapes, "
                        f"{', '.join(ARCHIVES)})")
    own = {kind: next((root / n for n in names if (root / n).is_dir()), None)
           for kind, names in SPLITS.items()}
    top = own["train"] or root
    folders = sorted(d.name for d in top.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not folders:
        raise UserError(f"--data {root}: holds no sub-folders; one a class is wanted")
    same = [_same(name) for name in folders]
    twins = [name for name in folders if same.count(_same(name)) > 1]
    if twins:
        raise UserError(f"--data {root}: classes differ only in case: {', '.join(twins)}")
    if classes:
        folders = _chosen(folders, classes, root)
    separate = own["train"] is not None and own["test"] is not None
    paths, labels = [], []
    for label, name in enumerate(folders):
        folder = (own["test"] if separate and split == "test" else top) / name
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file()
                       and not f.name.startswith("."))       # macOS leaves ._NAME beside NAME
        if not files:
            raise UserError(f"{folder}: no pictures in this class ({', '.join(sorted(SUFFIXES))})")
        if not separate:
            if len(files) < 2:
                raise UserError(f"{folder}: one picture is too few, the test needs one of its own")
            held = files[HELD_OUT - 1::HELD_OUT] or files[-1:]
            files = held if split == "test" else [f for f in files if f not in set(held)]
        paths += files
        labels += [label] * len(files)
    return paths, labels, [_printable(WORDS.get(name, name)) for name in folders]


def _same(name):
    """What two names have in common that a person would take for one: case, composed accents."""
    return unicodedata.normalize("NFC", name).casefold()


def _printable(name):
    """A name that is not in the file system's encoding can be opened, but not printed as it is."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def _chosen(folders, classes, root):
    """Those of the folders that --classes asks for, by their own name or the one in WORDS."""
    path = Path(classes).expanduser()
    listed = (path.read_text("utf-8-sig", "replace").splitlines()
              if "," not in classes and path.is_file() else classes.split(","))
    wanted = {_same(name.strip()): name.strip() for name in listed if name.strip()}
    known = {_same(word): name for name in folders for word in (WORDS.get(name, name), name)}
    for key, name in wanted.items():
        if key not in known:
            more = f" and {len(folders) - 5} more" if len(folders) > 5 else ""
            raise UserError(f"--classes: {root} has no class {name!r}, only "
                            f"{', '.join(folders[:5])}{more}")
    if not wanted:
        raise UserError(f"--classes {classes}: names no class")
    chosen = {known[key] for key in wanted}
    return [name for name in folders if name in chosen]


def decode(path, size):
    """A picture file -> uint8 (3, size, size) RGB; OSError or ValueError if it cannot be read.

    ADM's centre crop: halved with a box filter while twice too large, then bicubic, then cropped.
    Turned as its EXIF says; transparency over white; of an animation the first frame; 16-bit grey
    and floats are brought to 8 bits.
    """
    with Image.open(path, formats=FORMATS) as image:
        image.draft("RGB", (2 * size, 2 * size))             # a JPEG can decode straight to a part
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:                                    # damaged EXIF beside a good picture
            pass
        if image.mode[0] in "IF":                            # 16 bits and more
            values = np.nan_to_num(np.asarray(image, np.float32))
            white = 65535 if image.mode[0] == "I" else 1 if values.max() <= 1 else 255
            values = (values * (255 / white)).round().clip(0, 255)
            image = Image.fromarray(values.astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    most = 16 * min(image.size)
    if max(image.size) > most:                               # a thin one would grow beyond measure
        image = _centre(image, min(image.width, most), min(image.height, most))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)),
                          max(size, round(image.height * scale))), Image.BICUBIC)
    return np.asarray(_centre(image, size, size)).transpose(2, 0, 1)


def _centre(image, width, height):
    x, y = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((x, y, x + width, y + height))


def _decode_folder(root, size, split, classes, folder):
    """Decode one split into `folder`; files that cannot be read are named and skipped."""
    paths, labels, names = list_folder(root, split, classes)
    kept, bad = [], []

    def one(path):
        try:
            return decode(path, size)
        except Exception as error:                          # Pillow raises many kinds
            return _printable(f"{path}: {type(error).__name__}: {error}")

    def results(pool):
        # a thousand at a time: a slow disk must not let decoded pictures pile up in memory
        for start in range(0, len(paths), 1000):
            yield from pool.map(one, paths[start:start + 1000])

    def write(temporary):
        with open(temporary, "wb") as file, ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
            def header(count):                              # numpy leaves room for any count
                file.seek(0)
                np.lib.format.write_array_header_1_0(file, dict(
                    descr="|u1", fortran_order=False, shape=(count, 3, size, size)))
            header(len(paths))
            jobs = tqdm(zip(labels, results(pool)), f"decoding {split}", len(paths))
            for label, result in jobs:
                if isinstance(result, str):
                    bad.append(result)
                    tqdm.write(f"skipped {result}")
                    if len(bad) > 0.01 * len(paths):
                        raise UserError(f"--data {root}: more than 1 % of the {len(paths)} "
                                        f"pictures cannot be read, the first: {bad[0]}")
                else:
                    file.write(result.tobytes())
                    kept.append(label)
            header(len(kept))
        empty = sorted(set(labels) - set(kept))
        if empty:
            raise UserError(f"--data {root}: no picture of {names[empty[0]]} ({split}) can be read")
    with warnings.catch_warnings():                         # here: in the threads it is not safe
        warnings.simplefilter("ignore")                     # of odd EXIF, of many pixels ...
        config.atomic(folder / "images.npy", write)
    if bad:
        print(f"skipped {len(bad)} of {len(paths)} pictures that cannot be read")
    config.atomic(folder / "labels.npy", lambda t: np.save(t, np.array(kept, np.int64)))


# ---------------------------------------------------------------- the feed

SHAPES_SPLITS = {"train": (20_000, 0), "test": (2_000, 1)}         # pictures, seed


def load_images(name, size, split="train", cache="out/data", classes=""):
    """The pictures of a data set -> images uint8 (M, 3, size, size) memory-mapped, labels int64
    (M,), class names.

    name: `shapes`, a name of ARCHIVES (fetched at first), or a folder; size: side in pixels,
    pictures are centre-cropped to a square; split: train or test; classes: only these, as in
    `list_folder`.  Decoded once into `cache`; another size or a changed folder is decoded anew, an
    interrupted decoding is never taken for whole.  Raises UserError.
    """
    if split not in SPLITS:
        raise ValueError(f"split is train or test, not {split!r}")
    if name == "shapes":
        if classes:
            raise UserError("--classes takes a part of a folder's classes; shapes is none")
        names, identity = list(SHAPE_NAMES), f"shapes {SHAPES_SPLITS[split]}"
        stem = "shapes"
    else:
        root = find_folder(str(name))
        paths, _, names = list_folder(root, split, classes)
        stats = ((p, p.stat()) for p in paths)
        identity = "\n".join(f"{p} {s.st_size} {s.st_mtime_ns}" for p, s in stats)
        stem = _printable(root.resolve().name)
    key = f"{VERSION} {identity} {size}".encode("utf-8", "surrogateescape")
    folder = Path(cache) / f"{stem}-{size}-{split}-{hashlib.sha256(key).hexdigest()[:10]}"
    whole = folder / "labels.npy"                           # written last
    if not whole.is_file():
        with alone(folder):                                 # one rank makes it, the others wait
            if whole.is_file():
                pass
            elif name == "shapes":
                images, labels, _ = shapes(SHAPES_SPLITS[split][0], size, SHAPES_SPLITS[split][1])
                config.atomic(folder / "images.npy", lambda t: np.save(t, images.numpy()))
                config.atomic(whole, lambda t: np.save(t, labels.numpy()))
            else:
                _decode_folder(root, size, split, classes, folder)
    images = np.load(folder / "images.npy", mmap_mode="r")
    labels = torch.from_numpy(np.load(whole))
    return images, labels, names


VERSION = 1                    # of the pictures: change it when `shapes` or the decoding changes


def to_float(images, index, flip=None, device="cpu"):
    """Rows `index` of uint8 images -> float32 [-1, 1] (B, 3, S, S) on the device.

    flip: booleans (B,), or one for all, say which are mirrored left to right.
    """
    index = index.numpy() if isinstance(index, torch.Tensor) else index
    x = torch.from_numpy(np.array(images[index])).to(device, non_blocking=True)
    x = x.float() / 127.5 - 1
    if flip is not None:
        x = torch.where(flip.to(device).view(-1, 1, 1, 1), x.flip(-1), x)
    return x


@dataclass
class Config:
    """A page of examples."""
    data: str = config.field("shapes", "shapes, imagenette, imagewoof, or a folder")
    size: int = config.field(32, "side of a picture in pixels")
    columns: int = config.field(16, "pictures a class; ten classes at most")
    out: str = config.field("out/data/page.png", "the file to write")

    def check(self):
        """Impossible values end here."""
        config.require(self.size >= 4 and self.columns >= 1, "--size or --columns is too small")


PRESETS = {}


def main(argv=None):
    """The command line: draw a page, a row a class."""
    c = config.parse(Config, PRESETS, argv)
    images, labels, names = load_images(c.data, c.size, "train")
    rows = [images[np.flatnonzero(labels == k)[:c.columns]] for k in range(min(10, len(names)))]
    sheet = np.full((len(rows) * c.size, c.columns * c.size, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet[y * c.size:][:c.size, x * c.size:][:, :c.size] = picture.transpose(1, 2, 0)
    page = Image.fromarray(sheet)
    zoom = max(1, 64 // c.size)
    page = page.resize((page.width * zoom, page.height * zoom), Image.NEAREST)
    config.atomic(c.out, lambda t: page.save(t, "PNG"))
    print(f"wrote {c.out}: a row each of {', '.join(names[:10])}; {len(images):,} pictures")


if __name__ == "__main__":
    with config.one_line_errors():
        main()
