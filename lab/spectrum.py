"""What few sampler steps cost, predicted from the covariance of the latents: no DiT is needed.

    python -m lab.spectrum out/shapes out/vae      # folders that ae.py wrote

If the latents were Gaussian, with variance L in a principal direction and mean m, the exact
velocity along that direction would be linear,

    v(x, t) = m + (t L - (1 - t)) / ((1 - t)^2 + t^2 L) (x - t m),

and the exact flow would multiply the noise by sqrt(L).  A sampler multiplies it by a gain of its
own; its error is sum (gain - sqrt L)^2, a function of the eigenvalues L alone (the mean is always
reached exactly).  N Euler steps multiply by the product of 1 + dt v / x, at m = 0: too little for
every L, so that samples vary too little.  gain / sqrt L is largest, .88 for 10 steps, at L =
shift^2, and falls to both sides, symmetrically in log L.  So the decades that the spectrum
spans decide the error, and where they lie the best shift: a common factor c of the latents moves it
from s to c s and changes nothing else (with Euler, for any distribution).  Given the class, only
the variance within the classes counts.  Real latents have modes, too.  On the
previous default's pairs (3 seeds, shift 4, against 50 steps from the same noise, with the class)
the error is .80 to .85 of the prediction for 3 to 10 Euler steps; of ab2, .84 to 1.2 for 5 and 10,
but 1.3 (VAE) and 1.4 (SVG) for 3, 2.4 and 5.9 for 2.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ae import load_ae, load_latents
from data import evenly
from flow import ab2, euler
from plumbing import config
from plumbing.config import UserError, field, require

# Letters: n latents, d = C h w their dimensions.

SAMPLERS, STEPS = dict(euler=euler, ab2=ab2), (3, 5, 10)
SHIFTS = np.geomspace(0.5, 16, 101)       # where `best_shift` looks
MOST = 8192                               # dimensions: a covariance of 0.5 GB


@dataclass
class Config:
    """The flags of `python -m lab.spectrum FOLDER...`."""
    shift: float = field(3.0, "time shift of the sampler's steps")
    images: int = field(10000, "latents to use")
    device: str = field("auto", "cuda, cpu, ...; auto uses a GPU when there is one")

    def check(self):
        """ValueError for impossible values."""
        require(self.shift > 0, "--shift must be positive")
        require(self.images >= 100, "--images must be at least 100")


PRESETS = {}

# ---------------------------------------------------------------- the Gaussian prediction


def spectrum(latents, labels=None):
    """The eigenvalues of the covariance of latents (n, ...) -> (d,), float64, descending.

    labels (n,): the covariance within the classes instead, pooled; the sum of its eigenvalues is
    smaller than without labels by the variance of the class means.
    """
    x, means, _ = centered(latents, labels)
    # x x^T has the same eigenvalues except zeros, and is smaller if there are fewer latents
    products = (x @ x.T if len(x) < x.shape[1] else x.T @ x) / (len(x) - len(means))
    found = torch.linalg.eigvalsh(products).flip(0).clamp(min=0)
    return F.pad(found, (0, x.shape[1] - len(found)))


def centered(latents, labels=None):
    """Latents (n, ...) -> float64: deviations from the class means (n, d), the K means (K, d); and
    each one's class, an int64 (n,).  Without labels there is one class."""
    x = torch.as_tensor(latents).flatten(1).double()
    labels = torch.zeros(len(x)) if labels is None else torch.as_tensor(labels)
    _, k = labels.unique(return_inverse=True)
    groups = F.one_hot(k).double()                                             # (n, K)
    means = groups.T @ x / groups.sum(0)[:, None]
    return x - means[k], means, k


def shrink(latents, labels, rows, factors):
    """What a sampler would leave of latents (n, d): in each principal direction within the classes,
    the deviation from the class mean is multiplied by factors(L), of the eigenvalues (r,).

    -> float32 (len(rows), d), of these rows, for each function in the list `factors`.
    """
    x, means, k = centered(latents, labels)
    _, scale, directions = torch.linalg.svd(x, full_matrices=False)            # (r,), (r, d)
    lam, along = scale.square() / (len(x) - len(means)), x[rows] @ directions.T    # (rows, r)
    return [(means[k[rows]] + along * factor(lam) @ directions).float() for factor in factors]


def effective_dimension(eigenvalues):
    """The participation ratio (sum L)^2 / sum L^2: d if all are equal, 1 if only one is not 0."""
    return (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item()


def gain(eigenvalues, steps, shift=1.0, sampler=euler):
    """The factor by which a sampler of flow.py multiplies the noise in each principal direction of
    a Gaussian with these eigenvalues -> (d,), float64.  The exact flow's is their square root."""
    lam = eigenvalues.double().clamp(min=1e-12)           # 0 would be 0 / 0 at t = 1
    velocity = lambda x, t: (t * lam - (1 - t)) / ((1 - t) ** 2 + t ** 2 * lam) * x
    return sampler(velocity, torch.ones(1, len(lam), dtype=torch.float64), steps, shift)[0]


def error(eigenvalues, steps, shift=1.0, sampler=euler):
    """sum (gain - sqrt L)^2 / sum L: the mean squared distance from the exact solution, as a
    fraction of the variance; 1 for a single step."""
    off = gain(eigenvalues, steps, shift, sampler) - eigenvalues.double().sqrt()
    return (off.square().sum() / eigenvalues.sum()).item()


def best_shift(eigenvalues, steps, sampler=euler):
    """-> the shift with the smallest error, to 4 %, and that error."""
    errors = [error(eigenvalues, steps, s, sampler) for s in SHIFTS]
    return float(SHIFTS[np.argmin(errors)]), min(errors)

# ---------------------------------------------------------------- direction consistency


def resultant(units):
    """Unit vectors (n, d) -> the mean cosine between two of them.

    |sum|^2 counts each vector's product with itself, 1, too; without those it is unbiased: the
    squared norm of the mean of 50 random directions is 1/50 (norm .141), and this is 0.
    """
    n = len(units)
    return ((units.sum(0).square().sum() - n) / (n * (n - 1))).item()


def consistency(latents, labels, seed=0):
    """Do paths agree?  The mean cosine between (x1 - x0) / |x1 - x0| of two latents x1 (n, ...),
    each with noise x0 of its own: from data, so that no DiT takes part.  At most about 1/2 at unit
    variance, because half of a path's squared length is then noise.

    -> within: two of one class, averaged over the classes; all: any two, which agree by the common
    mean (after normalization per channel it is a pattern of positions); class: the difference.
    """
    x1 = torch.as_tensor(latents).flatten(1).float()
    x0 = torch.randn(x1.shape, generator=config.generator(seed))
    units, labels = F.normalize((x1 - x0).double(), dim=1), torch.as_tensor(labels)
    within = float(np.mean([resultant(units[labels == k]) for k in labels.unique()]))
    return dict(within=within, all=resultant(units), **{"class": within - resultant(units)})

# ---------------------------------------------------------------- the command


def read(folder, images, device):
    """`images` latents of an autoencoder's folder -> float32 (n, d), labels (n,)"""
    ae = load_ae(Path(folder) / "ae.pt", device)
    d = ae.latent_dim * (ae.image_size // ae.patch) ** 2
    if min(d, images) > MOST:
        raise UserError(f"{folder}: latents of {d:,} dimensions, more than {MOST:,}: their "
                        "covariance does not fit into memory; use fewer --images, or a smaller "
                        "--size in ae.py")
    latents, labels = load_latents(ae, folder, *config.setup(device))
    part = evenly(len(labels), images)
    return torch.from_numpy(latents[0, part.numpy()].astype(np.float32)).flatten(1), labels[part]


def show(folder, c, device):
    """Print what `spectrum`, `best_shift` and `consistency` find in a folder."""
    x, labels = read(folder, c.images, device)
    both = {"any class": spectrum(x), "class given": spectrum(x, labels)}
    print(f"\n{folder}: {len(x):,} latents of {x.shape[1]:,} dimensions")
    for name, lam in both.items():
        print(f"{name:>12}: variance per dimension {lam.mean():.3f}, effective dimension "
              f"{effective_dimension(lam):.1f}, largest " + " ".join(f"{v:.3g}" for v in lam[:5]))
    found = consistency(x, labels)
    print("cosine of two paths: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
    print("steps sampler" + "".join(f" | {f'{name}: at {c.shift:g}':>19} best shift  error"
                                    for name in both))
    for steps in STEPS:
        for name, sampler in SAMPLERS.items():
            cells = [f" | {error(lam, steps, c.shift, sampler):19.4f} {s:10.2f} {e:6.4f}"
                     for lam in both.values() for s, e in [best_shift(lam, steps, sampler)]]
            print(f"{steps:5} {name:7}" + "".join(cells), flush=True)


def main(argv=None):
    """The command line: folders, then flags."""
    argv = sys.argv[1:] if argv is None else list(argv)
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    folders, c = argv[:count], config.parse(Config, PRESETS, argv[count:])
    if not folders:
        raise UserError("give at least one folder that ae.py wrote, such as out/shapes")
    device, _ = config.setup(c.device)
    for folder in folders:
        show(folder, c, device)


if __name__ == "__main__":
    with config.one_line_errors():
        main()
