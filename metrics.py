"""Metrics, as pure functions of tensors, and the rulers that score samples.

Images against images: `psnr`, `ssim`.  Sets of features against each other: `frechet`, `kid`,
`energy_distance`, `precision_recall`.  Features against labels: `knn`, `linear_probe`.  They use no
randomness, compute in float64 even under autocast, and raise ValueError for wrong shapes or dtypes,
NaN, or fewer rows than the formula needs.

`Rulers` scores generated images by features that share nothing with the encoder, so the model
under test cannot influence its own score.  The paper's FID and rFID (Tables 1 and 3) are `frechet`
on Inception features; ours are on other features, so our numbers are comparable with each other but
not with the paper's.
"""
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import SHAPE_NAMES
from plumbing.config import load_kind, require            # require raises ValueError

# Letters: B images, C channels, H W pixels; n, m rows of features, d their width.


def _double(a, b):
    """Both as float64 on a's device, without gradient: immune to autocast and TF32."""
    device = "cpu" if a.device.type == "mps" else a.device          # Apple's GPUs have no float64
    a, b = (x.detach().to(device).double() for x in (a, b))
    require(a.isfinite().all() and b.isfinite().all(), "the input contains NaN or infinity")
    return a, b


def _images(a, b):
    """Two batches of images -> float64 (B, C, H, W) twice, and the result's dtype."""
    require(a.dim() == 4 and len(a) and a.shape == b.shape and a.is_floating_point()
            and b.is_floating_point(), "needs two float (B, 3, H, W) in [-1, 1] of one shape, not "
            f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}")
    return *_double(a, b), torch.promote_types(a.dtype, torch.float32)


def _features(a, b, least=(2, 2)):
    """Two sets of features, with at least `least` rows -> float64 (n, d), (m, d)."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    require(a.dim() == b.dim() == 2 and a.shape[1] == b.shape[1] > 0 and len(a) >= least[0]
            and len(b) >= least[1], f"needs features (n, d) and (m, d), n >= {least[0]} and "
            f"m >= {least[1]}, not {tuple(a.shape)} and {tuple(b.shape)}")
    return _double(a, b)


def _labels(y, x):
    """The labels of x's rows -> int64 (n,) on x's device."""
    y = torch.as_tensor(y)
    require(y.shape == x.shape[:1] and not y.is_floating_point() and y.min() >= 0,
            f"labels must be {len(x)} whole numbers from 0, not {y.dtype} {tuple(y.shape)}")
    return y.to(x.device, torch.int64)


# ---------------------------------------------------------------- images against images


def psnr(a, b):
    """Signal-to-noise of images (B, 3, H, W) in [-1, 1] -> decibels (B,); paper, Table 3.

    10 log10(range^2 / mean squared error) with range 2; infinite where a equals b.  Nothing is
    clamped: clamp a decoder's output first.
    """
    a, b, dtype = _images(a, b)
    return -10 * ((a - b).square().mean((1, 2, 3)) / 4).log10().to(dtype)


def ssim(a, b):
    """Structural similarity of images (B, 3, H, W) in [-1, 1] -> (B,), at most 1; paper, Table 3.

    Wang et al. 2004, eq. 13: Gaussian window of 11 x 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03,
    only where the window fits; the mean over positions and channels.
    """
    a, b, dtype = _images(a, b)
    require(min(a.shape[2:]) >= 11,
            f"{a.shape[2]} x {a.shape[3]} pixels are fewer than SSIM's 11 x 11 window")
    bell = (-(torch.arange(11.0, dtype=a.dtype) - 5) ** 2 / (2 * 1.5 ** 2)).exp()
    bell = bell / bell.sum()
    # The window at every position where it fits, as a matrix: two matrix products are a separable
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
    2017, eq. 6).  Biased upwards for few rows: compare only at equal n, and report real against
    real as well.
    """
    def root(A):
        w, v = torch.linalg.eigh(A)                       # eigenvalues below 0 are rounding
        return (v * w.clamp(min=0).sqrt()) @ v.T

    a, b = _features(a, b)
    A, B = (torch.cov(x.T).view(x.shape[1], -1) for x in (a, b))                  # (d, d)
    # The last trace is the sum of the singular values of A^(1/2) B^(1/2).  A general matrix root of
    # A B can be off by 10 where A is singular (n < d), and a root of eigenvalues turns rounding
    # errors of 1e-16 into 1e-8.
    cross = torch.linalg.svdvals(root(A) @ root(B)).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    return max(0.0, distance.item())


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
    instead of random subsets.  Unlike `frechet` it is not biased by n; it may be negative.
    """
    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    a, b = _features(a, b)
    return (_mean_pairs(kernel, a) + _mean_pairs(kernel, b)
            - 2 * _mean_pairs(kernel, a, b)).item()


def _distance(x, y):
    """Euclidean distances (n, m), from the differences: x^2 + y^2 - 2 x y would lose digits."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'| of points (n, d) and (m, d) -> float.

    Szekely and Rizzo 2013, unbiased, in the points' own units: around 0 for equal distributions.
    It sees any difference between two distributions, not just means and covariances.
    """
    a, b = _features(a, b)
    return (2 * _mean_pairs(_distance, a, b) - _mean_pairs(_distance, a)
            - _mean_pairs(_distance, b)).item()


def precision_recall(real, fake, k=3):
    """Fidelity and diversity apart: features (n, d), (m, d) -> (precision, recall), in [0, 1].

    Kynkaanniemi et al. 2019 (arXiv 1904.06991), eq. 1-2.  Each row of a set is the center of a ball
    that reaches to its k-th nearest other row.  Precision is the fraction of fake rows inside any
    ball of the real set, recall that of real rows inside any ball of the fake set.  Both depend on
    n and m: compare only at equal numbers.
    """
    def covered(x, y, chunk=1000):
        # The smallest distance within y is that of a row to itself, hence k + 1.
        radius = torch.cat([_distance(rows, y).kthvalue(k + 1).values for rows in y.split(chunk)])
        inside = [(_distance(rows, y) <= radius).any(1) for rows in x.split(chunk)]
        return torch.cat(inside).double().mean().item()

    require(k >= 1, f"k must be at least 1, not {k}")
    real, fake = _features(real, fake, least=(k + 1, k + 1))
    return covered(fake, real), covered(real, fake)


# ---- EXERCISE 6: coverage(real, fake, k), and a line for it in `Rulers` ----

# ---------------------------------------------------------------- features against labels


def knn(train_x, train_y, test_x, test_y, k=20):
    """Accuracy in [0, 1] of k nearest neighbors; features (n, d), (m, d), labels (n,), (m,).

    Cosine similarity s after subtracting the training mean, votes weighted by exp(s / 0.07), as in
    DINO (Caron et al. 2021).
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
    """Accuracy in [0, 1] of `linear_classes`; features (n, d), (m, d), labels (n,), (m,)."""
    predicted = linear_classes(train_x, train_y, test_x)
    return (predicted == _labels(test_y, predicted)).double().mean().item()


def linear_classes(train_x, train_y, test_x):
    """A linear classifier of features (n, d) with labels (n,) -> its classes (m,) for (m, d).

    Logistic regression on standardized features with penalty 1e-4 |W|^2, at most 200 steps of LBFGS
    from zero: convex, hence the same for every seed.
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


# ---------------------------------------------------------------- features of images

JUDGE = Path(__file__).resolve().parent / "weights" / "judge.pt"             # of `shapes`
PREDICTOR = JUDGE.with_name("factors.pt")


class Judge(nn.Module):
    """A plain CNN that classifies images: three stages of two convolutions, the second of stride 2;
    from 64 px on a fourth stage, and so on.

    width: channels of the first stage, twice as many in each further one, d in the last; size: side
    of the training images; outputs: the classes, and after them the factors that weights/factors.pt
    predicts.  Images (B, 3, H, W) in [-1, 1] -> logits (B, outputs).  Images of another size are
    resized to the training images': `shapes` looks the same at every size.

    Attribute: class_names.
    """

    def __init__(self, width=24, size=32, outputs=len(SHAPE_NAMES)):
        super().__init__()
        layers, last, self.class_names = [], 3, list(SHAPE_NAMES)
        for wide in (width << stage for stage in range(max(3, size.bit_length() - 3))):
            for stride in (1, 2):
                layers += [nn.Conv2d(last, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide),
                           nn.ReLU()]
                last = wide
        self.size, self.body, self.head = size, nn.Sequential(*layers), nn.Linear(last, outputs)

    def features(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> (B, d) >= 0: the last stage's spatial mean."""
        if images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.body(images).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def load_judge(path=JUDGE, device="cpu"):
    """A trained judge, in eval mode and frozen.  UserError: no such file, or not a judge."""
    checkpoint = load_kind(path, "judge", "python -m lab.judge")
    weights, c = checkpoint["model"], checkpoint["config"]      # in half precision on disk
    judge = Judge(c["width"], c["size"], len(weights["head.bias"]))
    judge.load_state_dict(weights)
    judge.class_names = checkpoint.get("class_names", judge.class_names)
    return judge.eval().requires_grad_(False).to(device)


def find_judge(class_names, *folders):
    """-> the Path of the first judge*.pt in the folders, then in weights/, that knows exactly these
    classes; None if there is none."""
    for folder in (*folders, JUDGE.parent):
        for path in sorted(Path(folder).glob("judge*.pt")):
            unfinished = path.stem.endswith("_train")
            if not unfinished and load_judge(path).class_names == list(class_names):
                return path
    return None


@torch.no_grad()
def extract(network, images, device="cpu", batch=100):
    """uint8 images (M, 3, H, W) -> network(the images in [-1, 1]) (M, d) in float32, on the CPU."""
    images = torch.as_tensor(images)
    require(images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] == 3
            and len(images), "images must be uint8 (M, 3, H, W), not "
            f"{images.dtype} {tuple(images.shape)}")
    with torch.autocast(torch.device(device).type, enabled=False):      # float32 for any caller
        return torch.cat([network(x.to(device).float() / 127.5 - 1).cpu()
                          for x in images.split(batch)])


def judge_images(judge, images, batch=100):
    """uint8 images (M, 3, H, W) -> features float32 (M, d), classes int64 (M,), both on the CPU."""
    require(not judge.training, "the judge is in training mode; call judge.eval()")
    both = lambda x: torch.cat([f := judge.features(x), judge.head(f)], 1)
    found = extract(both, images, judge.head.weight.device, batch)
    features, logits = found.tensor_split([judge.head.in_features], 1)
    return features, logits[:, :len(judge.class_names)].argmax(1)


def random_features(images):
    """Images (B, 3, H, W) in [-1, 1] -> (B, 384): each channel's mean and standard deviation after
    each of three stages of an untrained CNN.  They see colors, textures and edges."""
    g, x, last, found = torch.Generator().manual_seed(0), images, 3, []
    for wide in (32, 64, 96):
        weight = torch.randn(wide, last, 3, 3, generator=g) / math.sqrt(9 * last)
        x = F.leaky_relu(F.conv2d(x, weight.to(x), padding=1), 0.2)
        x, last = F.avg_pool2d(x, 2), wide
        found += [x.mean((2, 3)), x.std((2, 3))]
    return torch.cat(found, 1)


def color_grid(images):
    """Images (B, 3, H, W) -> (B, 48): the mean colors of 4 x 4 squares."""
    return F.adaptive_avg_pool2d(images, 4).flatten(1)


class Rulers:
    """Scores generated images against `real` ones, uint8 (m, 3, H, W), m >= n, in random order.

    (uint8 images (n, 3, H, W), the requested classes (n,)) -> dict of n and
    accuracy: the fraction that the judge recognizes as the requested class;
    frechet, factors, conv, color: Frechet distances of features, from the judge (which learned to
    ignore all but the shape), from the same CNN trained to predict every factor, `random_features`
    divided by their standard deviations on `real`, and `color_grid`;
    precision, recall, kid: in the same random features, against the first n of `real`.

    Compare each with its floor, the score of real images at equal n.  judge, predictor: files of
    the two trained networks, by default those of `shapes`; None: without their scores.
    """

    def __init__(self, real, device="cpu", judge=JUDGE, predictor=PREDICTOR):
        self.device = device
        self.judge, self.predictor = (path and load_judge(path, device)
                                      for path in (judge, predictor))
        self.mean, self.std = 0, 1
        self.real, _ = self.features(real)
        self.std, self.mean = torch.std_mean(self.real["conv"], 0)
        self.real["conv"] = (self.real["conv"] - self.mean) / self.std

    def features(self, images):
        """-> dict from the name of a distance to features (n, d), the judge's classes (n,)"""
        found, classes = {}, None
        if self.judge:
            found["frechet"], classes = judge_images(self.judge, images)
        if self.predictor:
            found["factors"] = extract(self.predictor.features, images, self.device)
        conv = extract(random_features, images, self.device)
        return dict(found, conv=(conv - self.mean) / self.std,
                    color=extract(color_grid, images, self.device)), classes

    def __call__(self, images, labels):
        features, classes = self.features(images)
        row = dict(n=len(images))
        if self.judge:
            right = classes == _labels(labels, classes)
            row["accuracy"] = right.double().mean().item()
        row.update({name: frechet(x, self.real[name]) for name, x in features.items()})
        real, fake = self.real["conv"][:len(images)], features["conv"]
        precision, recall = precision_recall(real, fake)
        return dict(row, precision=precision, recall=recall, kid=kid(real, fake))
