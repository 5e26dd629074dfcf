"""How good is it: the numbers, as pure functions of tensors, and the judge that reads `shapes`.

Pictures against pictures: `psnr`, `ssim`.  Sets of features against each other: `frechet`, `kid`,
`energy_distance`.  Features against labels: `knn`, `linear_probe`.  None depends on chance, on the
order of the rows, or on the precision of the network around it: all of it is float64.

The judge is a small CNN trained on the labels of `shapes`.  It shares nothing with the encoder, so
that the model that is measured cannot move the ruler.  It ships as weights/judge.pt; to make it:

    python metrics.py --out out/judge     # 2 CPU cores: 44 s
    python metrics.py --preset debug      # the same path in seconds, to out/debug

The paper's FID and rFID (Tables 1 and 3) are `frechet` on Inception features; here the features
are the judge's, so the numbers compare with one another and not with the paper's.
"""
import math, time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing import config
from plumbing.config import Stop, field, require                   # require raises ValueError
from data import SHAPE_NAMES, shapes

# Letters: B images, C channels, H W pixels; n, m rows of features, d their width.

# ---------------------------------------------------------------- what comes in


def _double(x):
    """float64, detached: immune to autocast and TF32.  Apple's GPUs have none: over to the CPU."""
    x = torch.as_tensor(x).detach()
    x = (x.cpu() if x.device.type == "mps" else x).double()
    require(x.isfinite().all(), "the input holds NaN or infinity")
    return x


def _images(a, b):
    """Two batches of images, checked -> float64 (B, C, H, W) twice, and the result's dtype."""
    for x in (a, b):
        require(x.dim() == 4 and len(x) and x.is_floating_point(), "images must be float "
                 f"(B, 3, H, W) in [-1, 1], not {x.dtype} {tuple(x.shape)}")
    require(a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    x = _double(a)
    return x, _double(b).to(x.device), torch.promote_types(a.dtype, torch.float32)


def _features(a, b, least=(2, 2)):
    """Two sets of features, checked -> float64 (n, d), (m, d) on the first one's device."""
    a, b = _double(a), _double(b)
    for x, rows in zip((a, b), least):
        require(x.dim() == 2 and x.shape[1], f"features must be (n, d), not {tuple(x.shape)}")
        require(len(x) >= rows, f"{len(x)} rows are too few: it takes at least {rows}")
    require(a.shape[1] == b.shape[1], f"widths differ: {a.shape[1]} and {b.shape[1]}")
    return a, b.to(a.device)


def _labels(y, x):
    """The labels of x's rows, checked -> int64 (n,) on x's device."""
    y = torch.as_tensor(y)
    require(y.shape == x.shape[:1] and not y.is_floating_point() and y.min() >= 0,
             f"labels must be {len(x)} whole numbers from 0, not {y.dtype} {tuple(y.shape)}")
    return y.to(x.device, torch.int64)


# ---------------------------------------------------------------- pictures against pictures


def psnr(a, b):
    """Signal-to-noise of images (B, 3, H, W) in [-1, 1] -> decibels (B,); paper, Table 3.

    10 log10(range^2 / mean squared error), the range being 2; infinite where a equals b.
    Nothing is clamped: clamp a decoder's output first.  ValueError: shapes, uint8, NaN.
    """
    a, b, dtype = _images(a, b)
    return -10 * ((a - b).square().mean((1, 2, 3)) / 4).log10().to(dtype)


def ssim(a, b):
    """Structural similarity of images (B, 3, H, W) in [-1, 1] -> (B,), at most 1; paper, Table 3.

    Wang et al. 2004, eq. 13: Gaussian window of 11 x 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03,
    only where the window fits; each colour by itself, then the mean.  ValueError: as `psnr`, and
    for images smaller than the window.
    """
    a, b, dtype = _images(a, b)
    require(min(a.shape[2:]) >= 11,
             f"{a.shape[2]} x {a.shape[3]} pixels are fewer than SSIM's 11 x 11 window")
    bell = (-(torch.arange(11.0, dtype=a.dtype) - 5) ** 2 / (2 * 1.5 ** 2)).exp()
    bell = bell / bell.sum()

    # The window at every place where it fits, as a matrix: two matrix products are a separable
    # filter, and float64 products are fast where float64 convolutions are not.
    down, across = (torch.stack([F.pad(bell, (i, side - 11 - i)) for i in range(side - 10)]).to(a)
                    for side in a.shape[2:])

    def mean(x):
        return down @ x @ across.T                        # (B, C, H, W) -> (B, C, H - 10, W - 10)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2             # (K * range)^2
    s = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return s.mean((1, 2, 3)).to(dtype)


# ---------------------------------------------------------------- sets against sets


def frechet(a, b):
    """Frechet distance (squared, as in FID) of features (n, d) and (m, d) -> float >= 0.

    |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2), with A, B the covariances (Heusel et al.
    2017, eq. 6).  Biased upwards for few rows: compare only equal n, and show real against real
    beside it.  ValueError: shapes, fewer than two rows, NaN.
    """
    a, b = _features(a, b)
    # The last trace is the sum of the singular values of A^(1/2) B^(1/2), with symmetric roots from
    # eigh.  A general matrix root of A B can be off by 10 where A is singular (n < d), and the root
    # of an eigenvalue that is rounding, 1e-16, would be 1e-8.
    A, B = (torch.cov(x.T).view(x.shape[1], -1) for x in (a, b))                  # (d, d)
    cross = torch.linalg.svdvals(_root(A) @ _root(B)).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    return max(0.0, distance.item())


def _root(A):
    """The symmetric square root of a covariance; eigenvalues below 0 are rounding."""
    w, v = torch.linalg.eigh(A)
    return (v * w.clamp(min=0).sqrt()) @ v.T


def _mean_pairs(measure, a, b=None, chunk=1000):
    """The mean of measure(a_i, b_j) over all pairs; without b, of measure(a_i, a_j) over i != j,
    which makes the estimates below unbiased."""
    if b is not None:
        return sum(measure(rows, b).sum() for rows in a.split(chunk)) / (len(a) * len(b))
    total = sum(measure(rows, a).sum() - measure(rows, rows).trace() for rows in a.split(chunk))
    return total / (len(a) * (len(a) - 1))


def kid(a, b):
    """Kernel distance of features (n, d) and (m, d) -> float, around 0 for equal distributions.

    The unbiased squared MMD with kernel (x.y / d + 1)^3 (Binkowski et al. 2018), over all pairs
    and not a mean over random subsets: no chance in it.  Unlike `frechet` it does not grow as n
    falls, and may be slightly negative.  ValueError: shapes, fewer than two rows, NaN.
    """
    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    a, b = _features(a, b)
    return (_mean_pairs(kernel, a) + _mean_pairs(kernel, b)
            - 2 * _mean_pairs(kernel, a, b)).item()


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'| of points (n, d) and (m, d) -> float, 0 or so when equal.

    Szekely and Rizzo 2013, unbiased, in the points' own units.  It sees any difference between two
    distributions, not just means and covariances.  ValueError: shapes, fewer than two rows, NaN.
    """
    def distance(x, y):                                   # exact differences, not x^2 + y^2 - 2 x y
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")

    a, b = _features(a, b)
    return (2 * _mean_pairs(distance, a, b) - _mean_pairs(distance, a)
            - _mean_pairs(distance, b)).item()


# ---- EXERCISE 6: recall(real, fake, k), and a line for it in `score` ----

# ---------------------------------------------------------------- features against labels


def knn(train_x, train_y, test_x, test_y, k=20):
    """Accuracy in [0, 1] of k nearest neighbours; features (n, d), (m, d), labels (n,), (m,).

    Cosine similarity s after taking off the training mean, votes weighted by exp(s / 0.07), as in
    DINO (Caron et al. 2021).  ValueError: shapes, fewer than k rows to learn from, NaN.
    """
    require(k >= 1, f"k must be at least 1, not {k}")
    train, test = _features(train_x, test_x, least=(k, 1))
    train_y, test_y = _labels(train_y, train), _labels(test_y, test)
    mean = train.mean(0)
    train, test = F.normalize(train - mean, dim=1), F.normalize(test - mean, dim=1)
    right = 0
    for rows, truth in zip(test.split(1000), test_y.split(1000)):
        s, nearest = (rows @ train.T).topk(k)                                     # (rows, k)
        votes = s.new_zeros(len(rows), int(train_y.max()) + 1)
        votes.scatter_add_(1, train_y[nearest], (s / 0.07).exp())
        right += (votes.argmax(1) == truth).sum().item()
    return right / len(test)


def linear_probe(train_x, train_y, test_x, test_y):
    """Accuracy in [0, 1] of a linear classifier; features (n, d), (m, d), labels (n,), (m,)."""
    found = linear_classes(train_x, train_y, test_x)
    return (found == _labels(test_y, found)).double().mean().item()


def linear_classes(train_x, train_y, test_x):
    """A linear classifier of features (n, d) with labels (n,) -> its classes (m,) for (m, d).

    Logistic regression on standardised features, 1e-4 |W|^2, at most 200 steps of LBFGS from zero:
    convex, hence the same for every seed.  ValueError: shapes, fewer than two rows, NaN.
    """
    with torch.inference_mode(False), torch.enable_grad():      # even where gradients are off
        train, test = (x.clone() for x in _features(train_x, test_x, least=(2, 1)))
        train_y = _labels(train_y, train).clone()
        mean, std = train.mean(0), train.std(0) + 1e-6
        train, test = (train - mean) / std, (test - mean) / std
        W = train.new_zeros(int(train_y.max()) + 1, train.shape[1]).requires_grad_()
        bias = train.new_zeros(len(W)).requires_grad_()
        solver = torch.optim.LBFGS([W, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            loss = F.cross_entropy(F.linear(train, W, bias), train_y) + 1e-4 * W.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        return F.linear(test, W, bias).argmax(1)


def mean_iou(found, truth, classes):
    """Segmentation: classes (n,) found and true -> the mean over classes of intersection over
    union, in [0, 1]; a class that neither has is left out.  ValueError: shapes, no class at all."""
    found = torch.as_tensor(found)
    truth = _labels(truth, found)
    pairs = torch.bincount(truth * classes + found, minlength=classes ** 2).view(classes, classes)
    both = pairs.diagonal().double()
    either = pairs.sum(0) + pairs.sum(1) - both
    require((either > 0).any(), "there is no class to compare")
    return (both / either)[either > 0].mean().item()


# ---------------------------------------------------------------- maps of features


def pca(x, dims=2):
    """Features (n, d) -> their coordinates (n, dims) along the directions of most variance."""
    x, _ = _features(x, x)
    x = x - x.mean(0)
    return x @ torch.linalg.eigh(x.T @ x)[1][:, -dims:].flip(1)


def tsne(x, perplexity=30.0, steps=500, seed=0):
    """Features (n, d) -> a map (n, 2) that keeps neighbours together (van der Maaten and Hinton
    2008), exact: every pair counts, so 1,000 points take seconds and 10,000 a quarter of an hour.

    Distances within the map mean little between groups; that a group is one does.
    """
    x, _ = _features(x, x, least=(4, 4))
    n, high = len(x), torch.cdist(x, x).square()
    require(1 < perplexity < n, f"perplexity must lie between 1 and {n} points")
    # each point's Gaussian is as wide as it takes to have `perplexity` neighbours: bisection
    low, up, wanted = x.new_full((n, 1), -30.0), x.new_full((n, 1), 30.0), math.log(perplexity)
    high = high / high.mean()
    for _ in range(50):
        middle = (low + up) / 2                                                   # log of 1 / width
        logits = (-high * middle.exp()).fill_diagonal_(-torch.inf)
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        entropy = -(p * log_p.nan_to_num(neginf=0.0)).sum(1, keepdim=True)
        low, up = torch.where(entropy > wanted, middle, low), torch.where(
            entropy > wanted, up, middle)
    p = ((p + p.T) / (2 * n)).clamp(min=1e-12)
    y = pca(x)
    y = (y / y[:, :1].std() * 1e-4).float()
    p, moved = p.float(), torch.zeros_like(y)
    for step in range(steps):
        near = 1 / (1 + torch.cdist(y, y).square()).fill_diagonal_(torch.inf)     # Student's t
        q = near / near.sum()
        # at first the pull is exaggerated, so that groups find together
        pull = (p * (12 if step < steps // 4 else 1) - q) * near
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        moved = (0.5 if step < steps // 4 else 0.8) * moved - n / 12 * gradient
        y = y + moved
    return y


# ---------------------------------------------------------------- the judge

JUDGE = Path(__file__).resolve().parent / "weights" / "judge.pt"


class Judge(nn.Module):
    """A plain CNN that names the shape: three stages of two convolutions, the second of stride 2.

    width: channels of the first stage, d = 4 * width features; size: side of the pictures that it
    is trained on.  Images (B, 3, size, size) in [-1, 1] -> logits (B, classes).
    """

    def __init__(self, width=24, size=32, classes=len(SHAPE_NAMES)):
        super().__init__()
        layers, last = [], 3
        for wide in (width, 2 * width, 4 * width):
            for stride in (1, 2):
                layers += [nn.Conv2d(last, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide),
                           nn.ReLU()]
                last = wide
        self.size, self.body, self.head = size, nn.Sequential(*layers), nn.Linear(last, classes)

    def features(self, images):
        """Images (B, 3, size, size) in [-1, 1] -> (B, d), non-negative: the last stage's mean."""
        return self.body(images).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def load_judge(path=JUDGE, device="cpu"):
    """The trained judge, in eval mode and frozen.  UserError: no file, or not a judge's."""
    checkpoint = config.load_kind(path, "judge", "python metrics.py")
    judge = Judge(checkpoint["config"]["width"], checkpoint["config"]["size"])
    judge.load_state_dict(checkpoint["model"])            # strict; half precision on disk
    return judge.eval().requires_grad_(False).to(device)


@torch.no_grad()
def judge_images(judge, images, batch=500):
    """uint8 images (M, 3, H, W) -> features float32 (M, d), classes int64 (M,), both on the CPU.

    Pictures of another size are resized to the judge's: `shapes` is the same at every size.
    ValueError: not uint8, not RGB, none; a judge in training mode (BatchNorm would mix the batch).
    """
    images = torch.as_tensor(images)
    require(images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] == 3
             and len(images), f"images must be uint8 (M, 3, H, W), not {images.dtype} "
             f"{tuple(images.shape)}")
    require(not judge.training, "the judge is in training mode; call judge.eval()")
    device, found = judge.head.weight.device, []
    with torch.autocast(device.type, enabled=False):      # float32, whoever calls
        for x in images.split(batch):
            x = x.to(device).float()
            if x.shape[2:] != (judge.size, judge.size):
                x = F.interpolate(x, (judge.size, judge.size), mode="bilinear", antialias=True)
            f = judge.features(x / 127.5 - 1)                                     # (B, d)
            found.append((f.cpu(), judge.head(f).argmax(1).cpu()))
    features, classes = map(torch.cat, zip(*found))
    return features, classes


def score(judge, images, labels, reference_features):
    """Judge generated uint8 images (n, 3, H, W) against the classes asked for, labels (n,), and
    against the features (m, d) of real pictures, as `judge_images` returns them.

    -> dict of n; accuracy in [0, 1], the share recognised as the class asked for; frechet; kid.
    The floor of the last two is the score of real pictures.  ValueError: as the parts.
    """
    features, classes = judge_images(judge, images)
    labels = _labels(labels, classes)
    return dict(n=len(labels), accuracy=(classes == labels.cpu()).double().mean().item(),
                frechet=frechet(features, reference_features),
                kid=kid(features, reference_features))


# ---------------------------------------------------------------- training the judge


@dataclass
class JudgeConfig:
    """The flags of `python metrics.py`."""
    preset: str = field("shapes", "shapes, or debug: the same path in seconds")
    out: str = field("", "folder to write to; empty: weights/ beside this file, or out/debug")
    size: int = field(32, "side of the pictures in pixels")
    count: int = field(20000, "pictures to learn from; a tenth as many fresh ones measure it")
    width: int = field(24, "channels of the first stage; the features are four times as wide")
    steps: int = field(1000, "optimiser steps")
    batch: int = field(128, "pictures a step")
    lr: float = field(4e-3, "peak learning rate")
    seed: int = field(0, "of the weights, batches and augmentation; the pictures stay the same")
    device: str = field("auto", "auto, cpu, cuda, mps")
    save_every: int = field(200, "steps between two checkpoints")
    overwrite: bool = field(False, "start afresh, whatever is there")

    def check(self):
        config.check_shared(self)
        for name, least in dict(size=8, count=10, width=1).items():
            require(getattr(self, name) >= least, f"--{name} must be at least {least}")


PRESETS = {
    "shapes": dict(out=str(JUDGE.parent)),      # 1 CPU core, 60 s: held-out accuracy 1.000
    "debug": dict(count=1000, width=8, steps=20, batch=32, save_every=5),  # 5 s
}
# ---- EDIT HERE for ablations: what the judge learns to look past ----
SHIFT, BLUR, GRAIN = 2, 0.6, 0.08     # pixels; share of a 3 x 3 mean; noise in units of [-1, 1]
# ---------------------------------------------------------------------


def augment(images, g):
    """uint8 (B, 3, S, S) -> float32 in about [-1, 1]: mirrored, moved, blurred, noisy, all drawn
    from generator g.  Generated pictures are a little soft and grainy; they keep their name."""
    B, S = len(images), images.shape[-1]

    def uniform(*shape):
        return torch.rand(B, *shape, generator=g)

    place = torch.arange(S) + torch.randint(-SHIFT, SHIFT + 1, (2, B, 1), generator=g)
    y, x = place.clamp(0, S - 1)                                         # (B, S): the edge repeats
    x = torch.where(uniform(1) < 0.5, x, S - 1 - x)
    images = images[torch.arange(B)[:, None, None, None], torch.arange(3)[:, None, None],
                    y[:, None, :, None], x[:, None, None, :]].float() / 127.5 - 1
    soft = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = images.lerp(soft, BLUR * uniform(1, 1, 1) * (uniform(1, 1, 1) < 0.5))
    return images + GRAIN * uniform(1, 1, 1) * torch.randn(images.shape, generator=g)


def main(argv=None):
    """Train the judge, or go on with an unfinished run; UserError for what the user can mend."""
    c = config.parse(JudgeConfig, PRESETS, argv)
    done, unfinished = Path(c.out) / "judge.pt", Path(c.out) / "judge_train.pt"
    if done.exists() and not unfinished.exists() and not c.overwrite:
        old = config.load_kind(done, "judge", "python metrics.py")
        print(f"{done}: finished, accuracy {old['accuracy']:.4f}; --overwrite trains it afresh")
        return
    if c.overwrite:
        unfinished.unlink(missing_ok=True)
    # where both are, somebody said --overwrite: the unfinished run is the newer one
    checkpoint = config.resume(unfinished, "judge_train", c, "python metrics.py")

    device, autocast = config.setup(c.device)
    torch.manual_seed(c.seed)
    model = Judge(c.width, c.size).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, weight_decay=0.05)
    start, seconds = 0, 0.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, seconds = checkpoint["step"], checkpoint["seconds"]
    begin, steps = time.time() - seconds, max(start, c.steps)
    # what the weights depend on, and not where they were made
    about = dict(version=config.VERSION,
                 config={k: v for k, v in config.plain(c).items() if k not in config.FREE})

    images, labels, _ = shapes(c.count, c.size, seed=0)   # as load_images("shapes", ..., "train")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"judge: {parameters:,} parameters; {config.describe(device)}\n"
          f"data: shapes, {c.count:,} pictures of {c.size} x {c.size}\n"
          f"flags: {', '.join(f'{k}={getattr(c, k)}' for k in c.said) or 'as the preset'}\n"
          f"checkpoint: {unfinished}, every {c.save_every} of {steps} steps", flush=True)

    with Stop() as stop:
        bar = config.progress(start, steps, "judge")
        for step in bar:
            # the batch is a function of (seed, step): a resumed run sees what an unbroken one sees
            g = config.generator(c.seed, step)
            chosen = torch.randint(c.count, (c.batch,), generator=g)
            x = augment(images[chosen], g).to(device, memory_format=torch.channels_last)
            rise, fall = (step + 1) / (0.15 * steps), (1 - step / steps) / 0.85
            optimizer.param_groups[0]["lr"] = c.lr * min(rise, fall)
            with autocast():
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[chosen].to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if stop.asked or (step + 1) % c.save_every == 0 and step + 1 < steps:
                config.save(unfinished, dict(
                    kind="judge_train", **about, step=step + 1, seconds=time.time() - begin,
                    model=model.state_dict(), optimizer=optimizer.state_dict()))
            if stop.asked:
                config.stopped(unfinished, step + 1)

    # measured as it ships: half precision on disk, float32 in use
    half = {k: v.cpu().half() if v.is_floating_point() else v.cpu()
            for k, v in model.state_dict().items()}
    model.load_state_dict(half)
    fresh, truth, _ = shapes(c.count // 10, c.size, seed=1)
    accuracy = (judge_images(model.eval(), fresh)[1] == truth).double().mean().item()
    config.save(done, dict(kind="judge", **about, step=steps, accuracy=accuracy, model=half))
    unfinished.unlink(missing_ok=True)
    print(f"accuracy: {accuracy:.4f}\nminutes: {(time.time() - begin) / 60:.2f}\n"
          f"parameters: {parameters}\nfile: {done}")


if __name__ == "__main__":
    with config.one_line_errors():
        main()
