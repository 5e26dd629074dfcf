"""The figures of RESULTS.md that show images and latents; `python -m lab.report --pictures` draws
them from the trained models of lab.evidence."""
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch

import sample
from ae import load_ae
from data import load_images, shapes, to_float, to_uint8
from dit import load_dit
from flow import ab2, euler, guided
from lab import evidence
from plumbing import config
from plumbing.config import require
from plumbing.draw import PAPER, Canvas, save_grid

COLORS = ("#2f6fb7", "#e07b28", "#2c9a62", "#a8438f", "#d0342c", "#8c6d31", "#e377c2", "#17a2b8",
          "#7f7f7f", "#bcbd22")                                   # one for each class
NAMES = {"svg": "SVG", "dino": "DINO only", "unaligned": "DINO + residual, unaligned",
         evidence.PAIR[1]: "VAE"}
DEFAULT, PHOTOS = ("svg", evidence.TUNED), evidence.DUO

# ---------------------------------------------------------------- from features to the plane


def pca(x, dims=2):
    """Features (n, d) -> their coordinates (n, dims) along the directions of largest variance."""
    x = torch.as_tensor(x).double()
    x = x - x.mean(0)
    return x @ torch.linalg.eigh(x.T @ x)[1][:, -dims:].flip(1)


def tsne(x, perplexity=30.0, steps=500):
    """Features (n, d) -> a map (n, 2) that keeps neighbors together (van der Maaten and Hinton
    2008).  Exact: every pair counts, so 1,000 points take seconds and 10,000 a quarter of an hour.

    Groups in the map are meaningful; distances between them mostly not.  ValueError: perplexity.
    """
    x = torch.as_tensor(x).double()
    n, distance = len(x), torch.cdist(x, x).square()
    require(1 < perplexity < n, f"perplexity must lie between 1 and {n} points")
    # each point's Gaussian is as wide as it takes to have `perplexity` neighbors: bisection
    low, high, goal = x.new_full((n, 1), -30.0), x.new_full((n, 1), 30.0), math.log(perplexity)
    distance = distance / distance.mean()
    for _ in range(50):
        middle = (low + high) / 2                                              # log of 1 / width
        log_p = (-distance * middle.exp()).fill_diagonal_(-torch.inf).log_softmax(1)
        p = log_p.exp()
        entropy = -(p * log_p.nan_to_num(neginf=0.0)).sum(1, keepdim=True)
        low = torch.where(entropy > goal, middle, low)
        high = torch.where(entropy > goal, high, middle)
    p = ((p + p.T) / (2 * n)).clamp(min=1e-12).float()
    y = pca(x)
    y = (y / y[:, :1].std() * 1e-4).float()
    velocity = torch.zeros_like(y)
    for step in range(steps):
        early = step < steps // 4
        near = 1 / (1 + torch.cdist(y, y).square()).fill_diagonal_(torch.inf)  # Student's t
        # at first the attraction is exaggerated, so that groups form
        pull = (p * (12 if early else 1) - near / near.sum()) * near
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        velocity = (0.5 if early else 0.8) * velocity - n / 12 * gradient
        y = y + velocity
    return y


def token_colors(z, patch):
    """Tokens (n, C, h, w) -> their first three principal components over all n h w tokens as red,
    green and blue, uint8 (n, 3, h patch, w patch)."""
    n, _, h, w = z.shape
    rgb = pca(z.permute(0, 2, 3, 1).flatten(0, 2), 3)                            # (n h w, 3)
    low, high = rgb.quantile(0.02, 0), rgb.quantile(0.98, 0)
    rgb = (((rgb - low) / (high - low)).clamp(0, 1) * 255).to(torch.uint8)
    rgb = rgb.view(n, h, w, 3).permute(0, 3, 1, 2)
    return rgb.repeat_interleave(patch, 2).repeat_interleave(patch, 3)

# ---------------------------------------------------------------- the figures


def draw(models, assets):
    """All figures whose models are there: lab.evidence's in the folder `models`, and those of
    `--preset photos` in out/photos; assets: output folder."""
    full, long, photos = (models.parent / f for f in ("full", "photos-long", "photos-full"))
    for name, folder, figure in (
            ("maps", models, draw_maps), ("residual", models, draw_residual),
            ("steps", full, partial(draw_strip, latents=DEFAULT)),
            ("steps-photos", photos, partial(draw_strip, latents=PHOTOS, scale=1.0, sampler=euler)),
            ("few-photos", long, draw_few), ("vae-photos", photos, draw_pair),
            ("parts", Path("out/photos"), draw_parts)):
        if folder.is_dir():
            figure(folder, assets / f"{name}.png")
            print(f"wrote {assets / name}.png")


def draw_maps(models, path, n=1000, side=300):
    """PCA above, t-SNE below, of the mean token of the same n images, colored by class."""
    x, y, classes = shapes(n, 32, seed=5)
    sheet = Canvas(len(NAMES) * (side + 12) + 110, 2 * side + 52)
    for i, (latent, name) in enumerate(NAMES.items()):
        model = load_ae(models / f"{latent}-0" / "ae.pt")
        z = evidence.encode_all(model, x.numpy()).mean((2, 3))
        sheet.text(i * (side + 12), 6, name, 17)
        for j, flat in enumerate((pca(z), tsne(z))):
            panel = Canvas(side, side, PAPER)
            flat = np.asarray(flat - flat.mean(0))
            place = flat / (2.2 * np.abs(flat).max()) * side + side / 2
            for k, color in enumerate(COLORS):
                panel.dots(place[(y == k).numpy()], color + "b0", 2.6)
            sheet.paste(panel, i * (side + 12), 34 + j * (side + 12))
    for k, (name, color) in enumerate(zip(classes, COLORS)):
        sheet.text(len(NAMES) * (side + 12) + 6, 40 + 24 * k, name, 16, color)
    config.atomic(path, sheet.done().save)


def draw_residual(models, path, n=16):
    """Held-out images, then decoded from DINO only, unaligned, SVG, VAE: a row each."""
    held, _, _ = load_images("shapes", 32, "test")
    x = to_float(held, slice(0, n))
    rows = [to_uint8(x)]
    for latent in ("dino", "unaligned", "svg", evidence.PAIR[1]):
        model = load_ae(models / f"{latent}-0" / "ae.pt")
        rows.append(to_uint8(model.decode(model.encode(x))))
    save_grid(path, torch.cat(rows), n)


def side_by_side(path, halves):
    """A grid of grids: each of `halves` is a list of rows, uint8 (columns, 3, S, S)."""
    rows = [torch.cat(row) for row in zip(*halves)]
    save_grid(path, torch.cat(rows), len(rows[0]))


def draw_strip(models, path, counts=(1, 2, 3, 5, 10, 25), latents=evidence.PAIR, scale=2.0,
               sampler=ab2):
    """A row for each number of steps from the same noise: SVG on the left, the VAE on the right; of
    the VAE's first seed."""
    halves = []
    trained = [p.parent.name for p in models.glob(f"{latents[-1]}-*/dit.pt")]
    seed = min(int(name.rpartition("-")[2]) for name in trained)
    for latent in latents:
        model, decoder = sample.load(models / f"{latent}-{seed}", "cpu")
        y = torch.arange(10)
        halves.append([sample.generate(model, decoder, y, k, scale, None, seed, sampler)
                       for k in counts])
    side_by_side(path, halves)


def draw_pair(models, path, columns=5, latents=PHOTOS):
    """A row for each class, as `sample.py --preset photos` draws them: SVG on the left, the VAE on
    the right."""
    c, halves = config.parse(sample.Config, sample.PRESETS, ["--preset", "photos"]), []
    for latent in latents:
        folder = models / f"{latent}-0"
        model, decoder = sample.load(folder, "cpu")
        y = torch.arange(10).repeat_interleave(columns)
        halves.append(sample.generate(model, decoder, y, c.steps, c.scale,
                                      weak=load_dit(folder / c.weak)).split(columns))
    side_by_side(path, halves)


def draw_few(models, path, seed=1, latents=(*evidence.DUO, *evidence.CONTROLS, "dino")):
    """Two rows for each latent that was trained with that seed: three Euler steps without guidance,
    and 25 from the same noise."""
    y = torch.arange(10)
    folders = [models / f"{latent}-{seed}" for latent in latents]
    save_grid(path, torch.cat([
        sample.generate(*sample.load(folder, "cpu"), y, steps, 1.0, None, 0, euler)
        for folder in folders if (folder / "dit.pt").is_file() for steps in (3, 25)]), len(y))


def draw_parts(run, path):
    """What DINO's tokens and the residual carry, of one generated picture per class: the picture,
    the tokens' and the residual's principal components, and the picture decoded from either of the
    two, the other at its mean.  run: a folder with ae.pt, dit.pt and perhaps dit_1000.pt."""
    model, decoder = sample.load(run, "cpu")
    weak = load_dit(early) if (early := run / "dit_1000.pt").is_file() else None
    y, (_, autocast) = torch.arange(10), config.setup("cpu")
    noise, R = sample.draw_noise(model, decoder, len(y), 0), decoder.config.residual_dim
    with autocast():
        z = ab2(guided(model, y, model.classes, 2.0, weak=weak), noise, 10, model.sample_shift)
        tokens, residual = z.clone(), z.clone()                             # means are zero
        tokens[:, -R:], residual[:, :-R] = 0, 0
        seen, alone, rest = (to_uint8(decoder.decode(x)) for x in (z, tokens, residual))
    save_grid(path, torch.cat([seen, token_colors(z[:, :-R], decoder.patch),
                               token_colors(z[:, -R:], decoder.patch), alone, rest]), len(y))
