"""Zero-shot editing (the paper's Figure 10) and interpolation with a trained autoencoder and DiT.

    python -m lab.edit --edit cat.png --to star --mask 4,4,28,28   # another class inside a box
    python -m lab.edit --edit held-out       # measured on held-out shapes
    python -m lab.edit --edit candidates     # compares constants, on training images
    python -m lab.edit --interpolate         # between two noises, and between two classes

Reads what the stages wrote to out/<preset> (until you train the default: weights/shapes, which
ships); writes edit.png and interpolate.png to out/<preset>.
"""
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from data import SHAPES_SPLITS, shapes, to_float, to_uint8
from dit import check_pair
from flow import guided, times
from metrics import judge_images, load_judge
from plumbing import config
from plumbing.config import UserError, field, require
from plumbing.draw import save_grid
from plumbing.photos import decode
from sample import Scorer, balanced_labels, choose, draw_noise, find_run, generate, load

# Letters: B batch, C latent channels, h w latent grid, S image side.

# ---- EDIT HERE for ablations: what the paper leaves open about editing ----
EDIT = dict(scale=4.0, t_edit=0.1, blur=1.0, fade=1.0)
COVER = 1.5                    # a token is entirely free if the mask covers 1 / COVER of it
# What `candidates` tries on training images, one constant at a time.
GRID = dict(scale=(2.0, 3.0, 6.0), t_edit=(0.0, 0.2, 0.4), blur=(0.5, 2.0), fade=(0.0, 2.0),
            margin=(1, 4), steps=(25,))
# ---------------------------------------------------------------------------
MEASURED = ("held-out", "training", "candidates")            # values of --edit besides a file


@dataclass
class Config:
    """Editing and interpolation."""
    preset: str = field("shapes", "the preset whose folder is read if --out is empty")
    out: str = field("", "the folder that stage 2 wrote; out/<preset> if empty")
    edit: str = field("", "the image file to edit; held-out, training: measure on those "
                      "shapes; candidates: compare constants on training images")
    to: str = field("", "the class to change to; when measuring, empty: a random other one")
    mask: str = field("", "where to edit: x0,y0,x1,y1 in pixels of the image as cropped and "
                      "resized for the model, or an image file, white where to edit")
    source: str = field("", "the class that the image shows; empty: none")
    t_edit: float = field(EDIT["t_edit"], "how close to noise (0) the image is brought")
    blur: float = field(EDIT["blur"], "sigma of the mask's rim, in latent tokens")
    fade: float = field(EDIT["fade"], "the rim shrinks as (1 - t)^fade; 0: it stays")
    interpolate: bool = field(False, "draw and score paths between noises and between classes")
    classes: str = field("", "for --interpolate: comma-separated names or numbers, five at most")
    steps: int = field(10, "sampler steps")
    scale: float = field(0.0, "guidance scale; 0: 4 for --edit, 2 for --interpolate")
    n: int = field(0, "images to score; 0: 200 for --edit, 1000 for --interpolate")
    seed: int = field(0, "seed of the noise")
    batch: int = field(250, "samples at a time")
    device: str = field("auto", "cuda, cpu, ...; auto uses a GPU when there is one")

    def check(self):
        """ValueError for impossible values."""
        require(self.interpolate != bool(self.edit),
                "give one of --edit IMAGE, --edit held-out or --interpolate")
        if self.edit not in ("", *MEASURED):
            require(self.to and self.mask, f"--edit {self.edit} needs --to CLASS and --mask "
                    "x0,y0,x1,y1 or --mask FILE")
        else:
            require(not (self.mask or self.source), "--mask and --source need --edit IMAGE")
        require(self.edit or not self.to, "--to needs --edit")
        config.at_least(self, steps=1, batch=1, n=0, seed=0, scale=0, blur=0, fade=0)
        require(0 <= self.t_edit < 1, "--t_edit must be in [0, 1); 0 is noise")


PRESETS = {"shapes": dict(), "debug": dict(steps=2, n=20), "imagenette": dict(steps=25, batch=16)}

# ---------------------------------------------------------------- editing


@torch.no_grad()
def edit(model, ae, images, masks, labels, steps=10, scale=EDIT["scale"], shift=None, seed=0,
         source=None, t_edit=EDIT["t_edit"], blur=EDIT["blur"], fade=EDIT["fade"],
         t_range=(0.0, 1.0)):
    """Change the class inside a mask, zero-shot -> uint8 (B, 3, S, S) on the CPU.

    images: float [-1, 1] (B, 3, S, S); masks: float (B, S, S), 1 where to edit; labels: (B,), the
    new classes; source: (B,) or a single one, the classes that the images show, None: no class.

    The flow is integrated backwards from the image's latent, without guidance, to the last of the
    sampler's times up to t_edit, and every state is kept.  There all tokens are replaced by noise,
    (1 - t) eps, which is integrated forward to the new class; before every step, and after the
    last, everything outside the mask is replaced by the state that was kept at that time.
    The paper specifies neither t_edit nor the mask's blur and fading; see `latent_mask` for ours.
    On held-out shapes (n = 200), 50 steps gain 1 dB outside the mask over 10, and nothing inside;
    t_edit makes no difference up to 0.2.

    An empty mask returns decode(encode(images)), because the kept states end with the latent
    itself.  Outside any other mask the pixels are close to that but not equal: the decoder mixes
    tokens, and the encoder is a ViT whose tokens outside have attended to the old object (there are
    only 16 tokens on shapes).
    """
    check_pair(model, ae)
    labels, shift = torch.as_tensor(labels), shift or model.sample_shift
    device, autocast = config.setup(next(model.parameters()).device)
    y = labels.to(device)
    was = torch.as_tensor(model.classes if source is None else source, device=device).expand_as(y)
    at = times(steps, shift)
    first = max(i for i, t in enumerate(at[:-1]) if t <= t_edit)
    side = ae.image_size // ae.patch
    free = [latent_mask(masks.to(device), side, t, blur, fade) for t in at]    # (B, 1, h, w) each
    with autocast():
        kept = {steps: ae.encode(images.to(device))}                           # (B, C, h, w)
        velocity = guided(model, was, model.classes, 1.0)
        for i in range(steps, first, -1):
            kept[i - 1] = kept[i] - (at[i] - at[i - 1]) * velocity(kept[i], at[i])
        velocity = guided(model, y, model.classes, scale, t_range)
        x = (1 - at[first]) * draw_noise(model, ae, len(y), seed).to(device)
        for i in range(first, steps + 1):
            x = kept[i].lerp(x, free[i])                # exactly the kept state where it is 0
            if i < steps:
                x = x + (at[i + 1] - at[i]) * velocity(x, at[i])
        return to_uint8(ae.decode(x))


def latent_mask(masks, side, t, blur, fade):
    """Masks (B, S, S) -> how free each token is at time t, (B, 1, side, side) in [0, 1].

    A token is as free as the fraction of it that the mask covers, times COVER: tokens are coarse,
    and the new object's edge must fit into them.  Around it a rim, the Gaussian blur of sigma
    `blur` tokens, is free near noise only, by (1 - t)^fade of its value: the surroundings may adapt
    to the new object at first, but end as they were.
    """
    core = (COVER * F.adaptive_avg_pool2d(masks[:, None], side)).clamp(max=1)
    place = torch.arange(side, device=masks.device)
    weights = (-(place - place[:, None]).square() / (2 * max(blur, 1e-3) ** 2)).exp()
    weights = weights / weights.sum(1, keepdim=True)                           # rows sum to 1
    return torch.maximum(core, weights @ core @ weights.T * (1 - t) ** fade)


def measure_edit(model, ae, n=200, seed=0, to=None, batch=100, sheet=None, split="test",
                 margin=None, **options):
    """Change the class of the first n held-out `shapes`, each inside its object's box.

    to: the new class, None: for each image a random one that is not its own; sheet: a file for the
    first images; split: train, to choose constants on images that nothing is reported on; margin:
    pixels between the object and its box, None: 1/16 of the image; options: of `edit`.
    -> dict of the fractions that the judge of metrics.py assigns to the new and to the old class,
    and of PSNRs outside the mask, each also for decode(encode(x)): the floor of the former and the
    ceiling of the latter.
    """
    images, old, names, cover = shapes(n, ae.image_size, SHAPES_SPLITS[split][1], masks=True)
    r = max(1, ae.image_size // 16) if margin is None else margin
    masks = F.max_pool2d((cover > 0).float(), 2 * r + 1, 1, r)                 # a little larger
    masks = masks.amax(1, keepdim=True) * masks.amax(2, keepdim=True)          # its box
    turn = torch.randint(1, len(names), (n,), generator=config.generator(seed, 1))
    new = (old + turn) % len(names) if to is None else torch.full_like(old, to)
    device, autocast = config.setup(next(model.parameters()).device)
    plain, edited = [], []
    for start in range(0, n, batch):
        part = slice(start, start + batch)
        x = to_float(images.numpy(), part, None, device)
        with autocast():
            plain.append(to_uint8(ae.decode(ae.encode(x))))
        edited.append(edit(model, ae, x, masks[part], new[part], seed=seed + start, **options))
    plain, edited = torch.cat(plain), torch.cat(edited)
    if sheet:
        shown = (masks[:, None].expand_as(images) * 255).to(torch.uint8)
        save_grid(sheet, torch.stack([images, plain, shown, edited], 1)[:32].flatten(0, 1), 16)

    def outside(a, b):                                  # mean dB over the images
        error = (a.float() - b.float()).square().mean(1) * (1 - masks)         # (n, S, S)
        mean = error.sum((1, 2)) / (1 - masks).sum((1, 2)).clamp(min=1)
        return 10 * (255 ** 2 / mean.clamp(min=1e-2)).log10().mean().item()
    judge, result = load_judge(device=device), dict(edit_n=n)
    for name, shown in (("edit", edited), ("reconstruction", plain)):
        found = judge_images(judge, shown)[1]
        for which, truth in (("new", new), ("old", old)):
            fraction = (found == truth).double().mean().item()
            result[f"{name}_judge_{which}_class"] = fraction
    return dict(result, edit_psnr_outside_db=outside(edited, images),
                reconstruction_psnr_outside_db=outside(plain, images),
                edit_vs_reconstruction_psnr_outside_db=outside(edited, plain))


def read(flag, path, size):
    """The image file that a flag names -> uint8 (3, size, size), center-cropped."""
    if not Path(path).expanduser().is_file():
        raise UserError(f"{flag} {path}: no such file; give the path of an image")
    try:
        return torch.from_numpy(decode(Path(path).expanduser(), size).copy())
    except Exception as error:                          # Pillow raises many kinds
        raise UserError(f"{flag} {path}: not a readable image ({type(error).__name__}); "
                        "give a PNG or a JPEG") from None


def read_mask(text, size):
    """--mask -> float (size, size) in [0, 1]"""
    if re.fullmatch(r"[-\d\s,]+", text):
        box = [int(v) for v in re.findall(r"-?\d+", text)]
        if len(box) != 4 or not (0 <= box[0] < box[2] <= size and 0 <= box[1] < box[3] <= size):
            raise UserError(f"--mask {text}: not a box x0,y0,x1,y1 within the model's {size} x "
                            f"{size} pixels, such as {f'{size // 8},' * 2}{size * 7 // 8},"
                            f"{size * 7 // 8}")
        mask = torch.zeros(size, size)
        mask[box[1]:box[3], box[0]:box[2]] = 1
        return mask
    mask = read("--mask", text, size).float().mean(0) / 255
    if not mask.max():
        raise UserError(f"--mask {text}: is entirely black; paint white where to edit")
    return mask


def choose_one(text, names, flag):
    """The number of one class, None for an empty text."""
    found = choose(text, names, flag) if text else [None]
    if len(found) != 1:
        raise UserError(f"{flag} {text}: give one class, not {len(found)}")
    return found[0]


def edit_shapes(c, model, ae, path, to, options):
    """--edit held-out or training: print the results of `measure_edit`; candidates: see there."""
    if ae.config.data != "shapes":
        raise UserError(f"--edit {c.edit} needs shapes, which has masks and a judge; {c.out} was "
                        f"trained on {ae.config.data}; name an image with --edit FILE")
    split = "test" if c.edit == "held-out" else "train"
    n, batch = min(c.n or 200, SHAPES_SPLITS[split][0]), min(c.batch, 100)
    measure = partial(measure_edit, model, ae, n, c.seed, to, batch, split=split)
    if c.edit == "candidates":
        return candidates(measure, options)
    for name, value in measure(sheet=path, **options).items():
        print(f"{name}: {value:.2f}" if name.endswith("db") else f"{name}: {value:.4g}")
    print(f"wrote {path}: original, reconstruction, mask, edit, and so on")


def candidates(measure, options):
    """Print the scores of `options`, then with each constant in turn replaced by each of GRID.
    Choose the one that changes most classes without losing PSNR outside; set it in EDIT.

    measure(**options): `measure_edit` on training images.
    """
    keys = dict(edit_judge_new_class="new class", edit_judge_old_class="old class",
                edit_vs_reconstruction_psnr_outside_db="dB outside")
    print(f"{'changed':14}" + "".join(f"{name:>11}" for name in keys.values()))
    for name, value in [("", ""), *((k, v) for k, values in GRID.items() for v in values)]:
        found = measure(**{**options, **({name: value} if name else {})})
        print(f"{f'{name} {value}':14}" + "".join(f"{found[k]:11.3f}" for k in keys), flush=True)


def edit_file(c, model, ae, path, to, options, seeds=5):
    """--edit IMAGE: one row with several edits."""
    image, mask = read("--edit", c.edit, ae.image_size), read_mask(c.mask, ae.image_size)
    source = choose_one(c.source, ae.class_names, "--source")
    x, empty = to_float(image[None].numpy(), slice(None)), torch.zeros_like(mask)
    plain = edit(model, ae, x, empty[None], [to], **{**options, "steps": 1})   # decode(encode(x))
    edited = edit(model, ae, x.expand(seeds, -1, -1, -1), mask.expand(seeds, -1, -1), [to] * seeds,
                  seed=c.seed, source=source, **options)
    shown = (mask * 255).to(torch.uint8).expand(1, 3, -1, -1)
    save_grid(path, torch.cat([image[None], plain, shown, edited]), 3 + seeds)
    print(f"wrote {path}: original, reconstruction, mask, then {seeds} edits to "
          f"{ae.class_names[to]}")

# ---------------------------------------------------------------- interpolation


def slerp(a, b, w):
    """Spherical interpolation from noise a (B, ...) to b; w in [0, 1], one or (B,) -> (B, ...)

    Each sample is one long vector: its direction turns at a constant rate, its length changes
    linearly.  The straight line (lerp) passes through vectors shorter by up to sqrt(2), which are
    atypical of a Gaussian; on shapes scores do not suffer, see `interpolate`.  Where a and b are
    parallel or opposite the arc is undefined or not unique, and the straight line is used.
    """
    p, q = a.flatten(1).double(), b.flatten(1).double()
    w = torch.as_tensor(w, dtype=torch.float64, device=a.device).view(-1, 1)
    length = p.norm(dim=1, keepdim=True).lerp(q.norm(dim=1, keepdim=True), w)
    angle = (F.normalize(p, dim=1) * F.normalize(q, dim=1)).sum(1, True).clamp(-1, 1).acos()
    turned = (((1 - w) * angle).sin() * F.normalize(p, dim=1)
              + (w * angle).sin() * F.normalize(q, dim=1)) / angle.sin().clamp(min=1e-12)
    flat = torch.where(angle.sin() < 1e-6, p.lerp(q, w), length * turned)
    return flat.view_as(a).to(a.dtype)


class Between(torch.nn.Module):
    """The DiT with blended velocities, (1 - w) v(a) + w v(b); label i of 0..n-1 is the blend of
    a[i] and b[i] by w[i].  Class embeddings are not blended: the DiT has never seen a mixture of
    two, while a mixture of two velocities is guidance by two classes."""

    def __init__(self, model, a, b, w):
        super().__init__()
        self.model, self.classes, self.channels = model, len(a), model.channels
        self.ae_fingerprint, self.sample_shift = model.ae_fingerprint, model.sample_shift
        no_class = torch.tensor([model.classes])        # label n still means no class
        device = next(model.parameters()).device
        self.a, self.b = (torch.cat([k, no_class]).to(device) for k in (a, b))
        self.w = torch.cat([w, torch.zeros(1)]).to(device)

    def forward(self, x, t, y):
        """x (B, C, h, w), t (B,), y (B,) in 0..n -> velocity (B, C, h, w)"""
        a, b = self.model(x, t, self.a[y]), self.model(x, t, self.b[y])
        return a.lerp(b, self.w[y].view(-1, 1, 1, 1))


def interpolate(c, model, ae, classes, scorer, columns=10, **options):
    """interpolate.png: rows from noise to noise within a class, then rows from class to class with
    one noise.  Scores midpoints of the first kind, by slerp and by lerp; lerp's score is not worse
    (seed 0: .957 against .938), perhaps because shorter noise gives more typical images."""
    path, w = Path(c.out) / "interpolate.png", torch.linspace(0, 1, columns)
    rows = torch.tensor(classes[:5])
    noise = draw_noise(model, ae, 2 * len(rows), c.seed).repeat_interleave(columns, 0)
    a, b = noise.chunk(2)
    within = generate(model, ae, rows.repeat_interleave(columns),
                      noise=slerp(a, b, w.repeat(len(rows))), **options)
    blend = Between(model, rows.repeat_interleave(columns),
                    rows.roll(-1).repeat_interleave(columns), w.repeat(len(rows)))
    across = generate(blend, ae, torch.arange(len(a)), noise=a, **options)
    save_grid(path, torch.cat([within, across]), columns)
    names = ", ".join(ae.class_names[k] for k in rows)
    print(f"wrote {path}: between two noises, one row for each of {names}; "
          "then from each class to the next")
    if not scorer:
        return print(f"nothing is scored: the judge knows only shapes, not {ae.config.data}")
    n = c.n or 1000
    labels = balanced_labels(classes, n)
    a, b = draw_noise(model, ae, 2 * n, c.seed + 1).chunk(2)
    for name, start in (("ends", a), ("slerp", slerp(a, b, 0.5)), ("lerp", a.lerp(b, 0.5))):
        row = scorer(generate(model, ae, labels, noise=start, **options), labels)
        print(f"interpolate_{name}_accuracy: {row['accuracy']:.3f}\n"
              f"interpolate_{name}_frechet: {row['frechet']:.2f}")

# ---------------------------------------------------------------- the command


def main(argv=None):
    """The command line."""
    c = config.parse(Config, PRESETS, argv)
    device, _ = config.setup(c.device)
    model, ae = load(find_run(c), device)
    if c.interpolate:
        scorer = Scorer(ae, device) if ae.config.data == "shapes" else None
        return interpolate(c, model, ae, choose(c.classes, ae.class_names), scorer, steps=c.steps,
                           scale=c.scale or 2.0, batch=c.batch)
    path, to = Path(c.out) / "edit.png", choose_one(c.to, ae.class_names, "--to")
    options = dict(steps=c.steps, scale=c.scale or EDIT["scale"], t_edit=c.t_edit, blur=c.blur,
                   fade=c.fade)
    (edit_shapes if c.edit in MEASURED else edit_file)(c, model, ae, path, to, options)


if __name__ == "__main__":
    with config.one_line_errors():
        main()
