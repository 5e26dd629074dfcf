"""Folders of images: listed, split into train and test, decoded to uint8 arrays; archives to fetch.

A folder has one subfolder per class, directly or inside train/ and val/.
"""
import hashlib, os, tarfile, unicodedata, warnings, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from plumbing import config
from plumbing.config import UserError
from plumbing.fetch import cache_dir, fetch, unpack

# ---------------------------------------------------------------- data sets to download

FASTAI = "https://s3.amazonaws.com/fast-ai-imageclas/"
ARCHIVES = {                   # ten classes of ImageNet: easy ones, or breeds of dogs; 200 at 64 px
    "imagenette": (FASTAI + "imagenette2-320.tgz",           # 340 MB; the shorter side is 320 px
                   dict(md5="3df6f0d01a2c9592104656642f5e78a3")),
    "imagenette-full": (FASTAI + "imagenette2.tgz",          # 1.6 GB; as in ImageNet
                        dict(md5="fe2fc210e6bb7c5664d602c3cd71e612")),
    "imagewoof": (FASTAI + "imagewoof2-320.tgz",             # the sha256 is from third parties
                  dict(sha256="4e4905ed7643120daaf9bf3b2ef7f3a7e8396d9bdaf254a38c6f01f618b4973d")),
    "tiny-imagenet": ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                      dict(size=248_100_043, md5="90528d7ca1a48142e341f4ef8d21d0de")),
}
EASY_TEN = {                   # ten classes of Tiny ImageNet that are easy to tell apart
    "n01443537": "goldfish", "n02056570": "king penguin", "n02165456": "ladybug",
    "n02279972": "monarch", "n04146614": "school bus", "n04285008": "sports car",
    "n04366367": "suspension bridge", "n04399382": "teddy", "n07873807": "pizza",
    "n09193705": "alp",
}
CLASS_LISTS = {"easy-ten": EASY_TEN}                         # --classes NAME
WORDS = {                      # ImageNet's names of these classes -> words
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
    "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn",
    "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball",
    "n03888257": "parachute",
    "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback", "n02088364": "beagle",
    "n02089973": "English foxhound", "n02093754": "Border terrier",
    "n02096294": "Australian terrier", "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog", "n02111889": "Samoyed", "n02115641": "dingo", **EASY_TEN,
}


def find_folder(name):
    """The folder of a data set -> Path.  name: one of ARCHIVES, or the path of a tar or zip file,
    either unpacked into the cache (and first downloaded) if it is not there; or of a folder."""
    if name in ARCHIVES:
        url, checksum = ARCHIVES[name]
        archive = cache_dir() / url.rpartition("/")[2]
        folder = archive.with_suffix("")
        return folder if folder.is_dir() else unpack(fetch(url, archive, **checksum), folder)
    path = Path(name).expanduser()
    if not path.is_file():
        return path
    if not (tarfile.is_tarfile(path) or zipfile.is_zipfile(path)):
        raise UserError(f"--data {path}: not a folder, nor a zip or tar archive (or it is damaged)")
    # another archive of that name, or a changed one, gets its own folder
    mark = hashlib.sha256(f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode()).hexdigest()
    return unpack(path, cache_dir() / f"{path.stem}-{mark[:8]}")


# ---------------------------------------------------------------- listing

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
OTHERS = {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".nef", ".arw"}     # left out
SPLITS = {"train": ("train", "training"), "test": ("val", "valid", "validation", "test")}
HELD_OUT = 10                  # every tenth image of a class, if there is no test folder


def list_folder(root, split, classes=""):
    """-> (paths, labels, class names) of one split of a folder, always in the same order.

    root/train/CLASS/* with root/val/CLASS/* (or valid, validation, test), or root/CLASS/*.  As in
    Tiny ImageNet, the classes in val/ may be given by val/val_annotations.txt instead of folders,
    and words for them by root/words.txt.
    classes: all, or only these: a name of CLASS_LISTS, comma-separated, or a text file, one per
    line; they are numbered in the folder's order, not in this one.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder or archive (and not the name of a data "
                        f"set: shapes, {', '.join(ARCHIVES)})")
    own = {kind: next((root / n for n in names if (root / n).is_dir()), None)
           for kind, names in SPLITS.items()}
    top, of_split, separate = own["train"] or root, own[split], all(own.values())
    folders = sorted(d.name for d in top.iterdir() if d.is_dir() and not d.name.startswith("."))
    words = _words(root, folders)
    folders = _chosen(words, classes, root)
    annotated = _annotated(of_split) if separate else None
    paths, labels = [], []
    for label, name in enumerate(folders):
        folder = (of_split if separate else top) / name
        found = folder.rglob("*") if annotated is None else annotated.get(name, ())
        files = sorted(f for f in found if f.suffix.lower() in SUFFIXES and f.is_file()
                       and not f.name.startswith("."))       # macOS leaves ._NAME next to NAME
        if not files:
            raise UserError(f"{folder}: no images in this class ({', '.join(sorted(SUFFIXES))})")
        if not separate:
            if len(files) < 2:
                raise UserError(f"{folder}: has only one image; the test split needs another")
            held = files[HELD_OUT - 1::HELD_OUT] or files[-1:]
            files = held if split == "test" else [f for f in files if f not in set(held)]
        paths += files
        labels += [label] * len(files)
    return paths, labels, [printable(words[name]) for name in folders]


def _annotated(folder):
    """val_annotations.txt, a line of name, class, box for each file in images/ -> class: paths;
    None if there is no such file."""
    path, files = folder / "val_annotations.txt", {}
    if not path.is_file():
        return None
    for line in path.read_text("utf-8", "replace").splitlines():
        name, _, rest = line.partition("\t")
        files.setdefault(rest.partition("\t")[0], []).append(folder / "images" / name)
    return files


def _words(root, folders):
    """Folder names -> {name: the class in a word}, from WORDS or root/words.txt (lines of name,
    synonyms); the name itself if neither has it."""
    path, words = root / "words.txt", {}
    if path.is_file():
        for line in path.read_text("utf-8", "replace").splitlines():
            name, _, synonyms = line.partition("\t")
            words[name] = synonyms.partition(",")[0].strip()
    return {name: WORDS.get(name) or words.get(name) or name for name in folders}


def _chosen(words, classes, root):
    """The folders that --classes names, by their own names or in the words of `_words`."""
    folders = [*words]
    if not folders:
        raise UserError(f"--data {root}: has no subfolders; it needs one per class")
    same = [_same(name) for name in folders]
    twins = [name for name in folders if same.count(_same(name)) > 1]
    if twins:
        raise UserError(f"--data {root}: classes differ only in case: {', '.join(twins)}")
    if classes in ("", "all"):
        return folders
    path = Path(classes).expanduser()
    listed = CLASS_LISTS.get(classes) or (
        path.read_text("utf-8-sig", "replace").splitlines()
        if "," not in classes and path.is_file() else classes.split(","))
    known = {_same(word): name for name in folders for word in (words[name], name)}
    chosen = set()
    for name in filter(None, map(str.strip, listed)):
        if _same(name) not in known:
            more = f" and {len(folders) - 5} more" if len(folders) > 5 else ""
            raise UserError(f"--classes: {root} has no class {name!r}, only "
                            f"{', '.join([*words.values()][:5])}{more}; --classes all takes all")
        chosen.add(known[_same(name)])
    if not chosen:
        raise UserError(f"--classes {classes}: names no class")
    return [name for name in folders if name in chosen]


def _same(name):
    """Equal for names that differ only in case or in how accents are encoded."""
    return unicodedata.normalize("NFC", name).casefold()


def printable(name):
    """A file name that is not in the file system's encoding can be opened, but not printed."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def warn_of_few(labels, names, batch):
    """Print one line if the images are fewer than a batch, or those of a class fewer than 20."""
    count = np.bincount(labels, minlength=len(names)).tolist()
    small = [f"{name} ({n})" for name, n in zip(names, count) if n < 20]
    found = [f"{len(labels)} images are fewer than --batch {batch}"] * (len(labels) < batch)
    if small:
        found.append(f"{len(small)} of {len(names)} classes have fewer than 20 images: "
                     + ", ".join(small[:5]) + (" ..." if len(small) > 5 else ""))
    if found:
        print(f"warning: {'; '.join(found)}; the models will memorize them")


# ---------------------------------------------------------------- decoding

# what the bytes may be, whatever the suffix says; not EPS, which would be run as a program
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
MOST_PIXELS = 120_000_000      # per image; more is a mistake, or a decompression bomb


def decode(path, size):
    """An image file -> uint8 (3, size, size) RGB; OSError or ValueError if it cannot be read.

    ADM's center crop, to the last value: halve with a box filter while at least twice too large,
    resize bicubically, crop.  Rotated as its EXIF says; transparency over white; the first frame
    of an animation; 16-bit gray and floats are scaled to 8 bits.
    """
    with Image.open(path, formats=FORMATS) as image:
        # no image.draft(): up to 19 times as fast on a large JPEG, but other values
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:                                    # damaged EXIF in a good image
            pass
        if image.mode[0] in "IF":                            # 16 bits or more
            values = np.nan_to_num(np.asarray(image, np.float32))
            white = 65535 if image.mode[0] == "I" else 1 if values.max() <= 1 else 255
            values = (values * (255 / white)).round().clip(0, 255)
            image = Image.fromarray(values.astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    most = 16 * min(image.size)                              # a thin image would grow huge below
    image = _center_crop(image, min(image.width, most), min(image.height, most))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)),
                          max(size, round(image.height * scale))), Image.BICUBIC)
    return np.asarray(_center_crop(image, size, size)).transpose(2, 0, 1)


def _center_crop(image, width, height):
    x, y = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((x, y, x + width, y + height))


def decode_folder(root, paths, labels, names, size, out):
    """Decode what `list_folder` found in `root` into the file `out` (.npy): uint8 (M, 3, size,
    size), which appears complete or not at all; -> the labels of the M images.

    Files that cannot be read are named and skipped; UserError if they are more than one and 1 % of
    all, or all of a class.
    """
    kept, bad = [], []
    ends = (path.suffix.lower() for path in Path(root).expanduser().rglob("*"))
    if left := [end for end in ends if end in OTHERS]:
        print(f"{root}: {len(left)} files are left out ({', '.join(sorted(set(left)))}); convert "
              "them to JPEG")

    def header(file, count):                                 # numpy leaves room for any count
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, dict(
            descr="|u1", fortran_order=False, shape=(count, 3, size, size)))

    def write(temporary):
        with open(temporary, "wb") as file:
            header(file, len(paths))
            for label, result in zip(labels, tqdm(_decoded(paths, size), "decoding", len(paths))):
                if not isinstance(result, str):
                    file.write(result.tobytes())
                    kept.append(label)
                    continue
                bad.append(result)
                tqdm.write(f"skipped {result}")
                if len(bad) > max(1, 0.01 * len(paths)):
                    raise UserError(f"--data {root}: more than 1 % of the {len(paths)} images "
                                    f"cannot be read, the first: {bad[0]}")
            header(file, len(kept))
        if empty := set(labels) - set(kept):
            raise UserError(f"--data {root}: no image of {names[min(empty)]} can be read")

    with warnings.catch_warnings():                          # not thread-safe, so not in `decode`
        warnings.simplefilter("ignore")                      # about odd EXIF, many pixels ...
        config.atomic(out, write)
    if bad:
        print(f"skipped {len(bad)} of {len(paths)} images that cannot be read")
    return kept


def _decoded(paths, size):
    """Yields each path's array, or a line that explains why it cannot be read."""
    def one(path):
        try:
            return decode(path, size)
        except Exception as error:                           # Pillow raises many kinds
            return printable(f"{path}: {type(error).__name__}: {error}")

    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        # a thousand at a time: on a slow disk, decoded images must not pile up in memory
        for start in range(0, len(paths), 1000):
            yield from pool.map(one, paths[start:start + 1000])
