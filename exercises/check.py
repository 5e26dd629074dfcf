"""Checks the exercises of exercises/README.md by what the code does, not by how it is written.

    python exercises/check.py             # the numbers and titles
    python exercises/check.py 2 10        # solved, or the first thing that is missing

Exit status: 0 all solved, 1 one is not solved yet, 2 there is no such exercise.
"""
import contextlib, io, math, sys, tempfile, traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))             # to run from any working directory

import torch
import torch.nn as nn
import torch.nn.functional as F

import ae, data, dino, dit, flow, metrics, sample, toy_flow
from lab import pretrain
from plumbing.config import generator

# Letters: B batch, C latent channels, h w latent grid, n rows of features.

OUT = ROOT / "out"                        # where exercise 7 looks for its two runs


# A check's docstring is the title of the exercise.  It returns a sentence with what it measured, or
# raises AssertionError with what is missing.


def verdict(check):
    """Run a check -> solved, one line.  Any other error of a half-written solution is `not yet` as
    well, with the last line of this project that it came through."""
    try:
        return True, check()
    except AssertionError as missing:
        return False, str(missing)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        at = [f for f in frames if Path(f.filename).is_relative_to(ROOT)][-1]
        message = " ".join(str(error).split())
        return False, f"{Path(at.filename).name}:{at.lineno}: {type(error).__name__}: {message}"


# ---------------------------------------------------------------- what several checks use


def close(found, expected, tolerance=1e-4):
    """Whether two tensors or lists have one shape and differ by at most the tolerance."""
    found, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (found, expected))
    return found.shape == expected.shape and (found - expected).abs().max().item() <= tolerance


def number(t):
    """A time as a sampler may pass it, a float or a tensor () or (B,) -> float."""
    return torch.as_tensor(t).flatten()[0].item()


def two_bumps(x, t, mean=1.0, std=0.6):
    """The exact velocity E[x1 - x0 | xt] if each coordinate is N(mean, std^2) or N(-mean, std^2),
    equally often.  (For one Gaussian the midpoint method has order three.)"""
    t = number(t)
    variance = (1 - t) ** 2 + (t * std) ** 2
    here = mean * torch.tanh(t * mean * x / variance)       # the expected mean, given x
    return here + (t * std ** 2 - (1 - t)) / variance * (x - t * here)


class Stub(nn.Module):
    """A DiT with velocity answer(y) that records the times and classes it was called with."""
    channels, classes, sample_shift, step, ae_fingerprint = 3, 10, 1.0, 0, None

    def __init__(self, answer):
        super().__init__()
        self.answer, self.times, self.asked = answer, [], []
        self.device_of = nn.Parameter(torch.zeros(()))

    def forward(self, x, t, y):
        self.times.append(number(t))
        self.asked += y.tolist()
        return x * 0 + self.answer(y.view(-1, 1, 1, 1))


STUB_AE = SimpleNamespace(image_size=2, patch=1, latent_dim=3, fingerprint=None, decode=torch.tanh,
                          class_names=list(data.SHAPE_NAMES), config=SimpleNamespace(data="shapes"))
STUB_SCORES = dict.fromkeys(sample.SCORES, 0.5) | dict(n=1, coverage=0.753)


def sample_command(model, *flags):
    """Run `python sample.py` with these flags on stubs -> what it prints."""
    scorer = mock.Mock(return_value=STUB_SCORES, floors=lambda n: (STUB_SCORES, STUB_SCORES))
    with (tempfile.TemporaryDirectory() as out, io.StringIO() as text,
          contextlib.redirect_stdout(text), contextlib.redirect_stderr(text),
          mock.patch.object(sample, "load", lambda *_: (model, STUB_AE)),
          mock.patch.object(sample, "Scorer", lambda *_: scorer)):
        try:
            sample.main(["--out", out, "--classes", "0", "--columns", "1", *flags])
        except SystemExit as stop:
            assert stop.code != 2, f"sample.py does not know {' '.join(flags[:2])}"
            raise
        return text.getvalue()


def velocities(model, labels, **options):
    """The velocities at t = 1/4 that sample.generate would integrate, in batches of three."""
    seen = []

    def probe(velocity, x, steps, shift, callback=None):
        seen.append(velocity(x, 0.25).float())
        return x * 0
    sample.generate(model, STUB_AE, labels, steps=4, sampler=probe, batch=3, **options)
    return torch.cat(seen)


# ---------------------------------------------------------------- the twelve checks


def exercise_1():
    """When to train"""
    x1 = torch.randn(20_000, 1, generator=generator(1))
    for shift, logit_normal in ((1.0, False), (1.0, True), (2.5, True)):
        x0, t = flow.draw(x1, shift, generator(0), logit_normal)
        again = flow.draw(x1, shift, generator(0), logit_normal)
        assert t.shape == x1.shape[:1], f"the times must be (B,), not {tuple(t.shape)}"
        assert close(x0, again[0], 0) and close(t, again[1], 0), "the generator must decide all"
        assert abs(x0.mean()) < 0.03 and abs(x0.std() - 1) < 0.03, "the noise must stay N(0, 1)"
        u = flow.shift_time(t.double(), 1 / shift).clamp(1e-9, 1 - 1e-9)
        u = torch.special.ndtr(torch.logit(u)) if logit_normal else u    # uniform, if t is right
        # of independent times, 37 % of the intervals have none; float32 puts some next door
        missed = 1 - len((u * len(u)).long().clamp(0, len(u) - 1).unique()) / len(u)
        # Kolmogorov and Smirnov's distance from the uniform distribution
        gap = (u.sort().values - torch.linspace(0, 1, len(u))).abs().max().item()
        kind = "logit-normal" if logit_normal else "uniform"
        measured = (f"shift {shift:g}, {kind}: {missed:.1%} of {len(u):,} equally probable "
                    f"intervals have no time, and the distribution is off by {gap:.4f}")
        assert gap < 0.001 and missed < 0.02, measured
        z = torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9))
        # an independent time could as well be that of another pair; by chance below .001
        own, other = (torch.cat([x0, x1, a[:, None]], 1)[::5] for a in (z, z.roll(1)))
        tie = metrics.energy_distance(own[::2], other[1::2])
        # correlations of z and its square with the pairs and theirs; by chance below .03
        powers = torch.cat([z[None], z[None] ** 2, x0.T, x1.T, x0.T ** 2, x1.T ** 2])
        weak_tie = powers.corrcoef()[:2, 2:].abs().max()
        assert tie < 0.004 and weak_tie < 0.05, "the times must not depend on the noise or the data"
        order = torch.stack([z, torch.arange(len(z)).double()]).corrcoef()[0, 1].abs()
        assert order < 0.05, "shuffle the times: which row gets which interval must be random"
    return measured


def exercise_2():
    """A better step"""
    assert hasattr(flow, "midpoint"), "flow.midpoint does not exist"
    x0 = torch.randn(50, 3, dtype=torch.float64, generator=generator(0))
    exact, calls, states = flow.heun(two_bumps, x0, 2000), [], []

    def error(solver, steps, shift=1.0):
        return (solver(two_bumps, x0, steps, shift) - exact).abs().max().item()
    flow.midpoint(lambda x, t: calls.append(number(t)) or torch.ones_like(x), x0, 4, 4.0,
                  lambda i, t, x: states.append(number(t)))
    times = flow.shift_time(torch.linspace(0, 1, 5, dtype=torch.float64), 4.0)
    assert len(calls) == 8, f"four steps must take 8 evaluations, not {len(calls)}"
    middles = (times[1:] + times[:-1]) / 2
    assert close(calls[1::2], middles), "the second evaluation must be in the middle of the step"
    assert close(states, times), "the callback must see every state, the first and last included"
    low = flow.midpoint(lambda x, t: torch.ones_like(x), torch.ones(1).bfloat16(), 1000)
    assert close(low, [2.0], 1e-3), "the state must be float32 when the noise is bfloat16"
    for shift in (1.0, 4.0):
        order = math.log2(error(flow.midpoint, 40, shift) / error(flow.midpoint, 80, shift))
        assert 1.8 < order < 2.2, f"at shift {shift:g} the order is {order:.2f}, not 2"
    model = Stub(lambda y: 0)
    sample_command(model, "--sampler", "midpoint", "--steps", "2", "--scale", "1", "--n", "0")
    assert close(model.times, [0, 0.25, 0.5, 0.75]), "sample.py --sampler midpoint does not call it"
    return (f"order {order:.2f}; after 20 evaluations the error is {error(flow.midpoint, 10):.4f}, "
            f"Euler's {error(flow.euler, 20):.4f}")


def exercise_3():
    """Guidance that changes"""
    model, x, y = Stub(lambda y: y), torch.zeros(4, 3, 2, 2), torch.full((4,), 3)

    def guide(scale, t, *t_range):        # v_y = 3, v_null = 10 -> velocity, evaluations per sample
        model.asked = []
        v = flow.guided(model, y, 10, scale, *t_range)(x, t)
        return v.mean().item(), len(model.asked) / len(y)
    growing, expected = lambda t: 1 + 2 * t, [(3, 1), (-0.5, 2), (-7.5, 2)]
    try:
        found = [guide(growing, t) for t in (0.0, 0.25, torch.tensor(0.75))]
    except TypeError:
        raise AssertionError("flow.guided does not take a function as its scale") from None
    measured = (f"at t = 0, 1/4, 3/4 the scale 1 + 2 t gives (velocity, evaluations) {found} "
                f"where v_y = 3, v_null = 10 (expected: {expected})")
    assert close(found, expected), measured
    assert close([guide(1.0, 0.5), guide(2.0, 0.5), guide(growing, 0.25, (0.5, 1.0))],
                 [(3, 1), (-4, 2), (3, 1)]), "numbers and t_range must work as before"
    assert close(velocities(model, y, scale=growing), x - 0.5), "sample.generate must take it, too"
    sample_command(model, "--steps", "2", "--n", "0")
    return measured


def exercise_4():
    """Half entangled"""
    assert sorted(toy_flow.SEPARABLE.tolist()) == sorted([0, 1, 2, 3] * 4), (
        "SEPARABLE must hold sixteen labels, each class four times")
    found, _, _ = toy_flow.measure(toy_flow.Exact(0.0), 0.0, 0, 800, 1.0)
    measured = (f"consistency {found['consistency']:.2f} (expected: .4 to .6), straightness "
                f"{found['straightness']:.2f}, error of 5 steps {found['rmse@5']:.2f}")
    assert 0.4 < found["consistency"] < 0.6, measured
    return measured


def exercise_5():
    """An eleventh shape"""
    names, count, step = list(data.SHAPES), 240, 2.4 / 240
    assert len(names) == len(data.SHAPE_NAMES) == 11, f"there are {len(names)} shapes, not 11"
    axis = (torch.arange(count) + 0.5) * step - 1.2         # a fine grid over [-1.2, 1.2]^2
    grid = torch.stack([axis.repeat(count), axis.repeat_interleave(count)], -1)[None]
    *others, new = [data.SHAPES[name](grid)[0].view(count, count) for name in names]
    inside, area = new < 0, (new < 0).double().mean().item() * 1.44          # 1: [-1, 1]^2
    assert close(new, new.flip(1)), "the left half must mirror the right half"
    assert 0.15 < area < 0.85, f"it covers {area:.2f} of its square, not .15 to .85"
    assert not inside[:, :10].any() and not inside[:10].any() and not inside[-10:].any(), (
        "it must stay within [-1.1, 1.1]^2")
    slope = torch.hypot(*torch.gradient(new, spacing=step))[new.abs() < 0.06]
    assert 0.9 < slope.quantile(0.1) and slope.quantile(0.9) < 1.1, (
        f"the slope at the edge is {slope.quantile(0.1):.2f} to {slope.quantile(0.9):.2f}, not 1")
    alike = max(((inside & (p < 0)).sum() / (inside | (p < 0)).sum()).item() for p in others)
    assert alike < 0.8, f"its intersection with another shape is {alike:.2f} of their union"
    _, labels, _, cover = data.shapes(1000, 32, 0, masks=True)
    drawn = cover[labels == 10].double().mean((1, 2)) / 255
    assert len(drawn) in (90, 91) and (drawn > 0.02).all(), "data.shapes does not draw it"
    assert data.VERSION > 1, "data.VERSION must rise, or the ten in the cache are used"
    return f"{names[-1]} covers {area:.2f} of its square and is drawn {len(drawn)} times in 1,000"


def exercise_6():
    """What is missing"""
    assert hasattr(metrics, "coverage"), "metrics.coverage does not exist"

    def slow(real, fake, k):
        radii = [sorted((a - b).norm().item() for j, b in enumerate(real) if j != i)[k - 1]
                 for i, a in enumerate(real)]
        return sum(any((x - a).norm() <= r for x in fake) for a, r in zip(real, radii)) / len(real)
    rng = generator(0)
    real, fake = torch.randn(50, 3, generator=rng), 0.6 * torch.randn(30, 3, generator=rng)
    for a, b, k in ((real, fake, 1), (real, fake, 3), (fake, real, 3), (fake, real, 5)):
        found, expected = metrics.coverage(a, b, k), slow(a.double(), b.double(), k)
        assert close(found, expected), f"k = {k}: {found:.3f}, a slow loop finds {expected:.3f}"
    # fake rows that vary too little, then the same ones with four outliers among them
    real, fake = torch.randn(300, 2, generator=rng), 0.2 * torch.randn(300, 2, generator=rng)
    wild = torch.cat([fake[4:], 20 * torch.randn(4, 2, generator=rng)])
    recall = [metrics.precision_recall(real, f)[1] for f in (fake, wild)]
    cover = [metrics.coverage(real, f) for f in (fake, wild)]
    assert cover[1] - cover[0] < 0.05, f"outliers raise it from {cover[0]:.2f} to {cover[1]:.2f}"
    images, labels, _ = data.shapes(200, 32, 0)
    scores = metrics.Rulers(images)(images, labels)
    assert 0 <= scores.get("coverage", -1) <= 1, "metrics.Rulers must return it as `coverage`"
    printed = sample_command(Stub(lambda y: 0), "--n", "10")
    assert ".75" in printed, "sample.py must print it"
    return (f"four outliers take recall from {recall[0]:.2f} to {recall[1]:.2f}, coverage from "
            f"{cover[0]:.2f} to {cover[1]:.2f}")


@torch.no_grad()
def exercise_7():
    """Choosing a loss"""
    x, found = data.to_float(data.shapes(500, 32, 1)[0].numpy(), slice(None)), []
    for name in ("l1", "l2"):
        assert (OUT / name / "ae.pt").is_file(), f"out/{name}/ae.pt does not exist"
        model = ae.load_ae(OUT / name / "ae.pt")
        y = torch.cat([model.decode(model.encode(part)) for part in x.split(250)])
        rms, mean = (y - x).square().mean().sqrt().item(), (y - x).abs().mean().item()
        found.append((rms / mean, model.config.steps, f"{name}: rms error {rms:.4f}, mean error "
                      f"{mean:.4f}, ratio {rms / mean:.3f}, {metrics.psnr(x, y).mean():.2f} dB"))
    (a, steps_a, line_a), (b, steps_b, line_b) = found
    assert steps_a == steps_b, f"one run has {steps_a} steps, the other {steps_b}"
    assert b < a, f"{line_a}; {line_b} (expected: a smaller ratio)"
    return f"{line_a}; {line_b}"


def exercise_8():
    """Match every channel"""
    torch.manual_seed(0)
    match, fresh = (ae.AutoEncoder(ae.Config(**ae.PRESETS["debug"]), dino.load_dino("tiny")).match
                    for _ in range(2))
    h = 2 * torch.randn(32, 16, 96) * torch.linspace(0.5, 1.5, 96) + 0.3
    r = torch.randn(32, 16, 16) * torch.logspace(-1, 1, 16) + torch.linspace(-5, 5, 16)
    out = match.train()(r.requires_grad_(), h)
    mean, std = h.mean((0, 1)).mean(), h.std((0, 1)).mean()
    stds = out.detach().std((0, 1)) / std
    off = ((out.detach().mean((0, 1)) - mean) / std).abs().max().item()
    measured = (f"the channels' standard deviations are {stds.min():.2f} to {stds.max():.2f} times "
                f"DINO's (expected: 1), their means are off by up to {off:.2f} of them")
    assert 0.95 < stds.min() and stds.max() < 1.05 and off < 0.05, measured
    out.sum().backward()                  # through detached statistics it is one number per channel
    same = torch.allclose(r.grad, r.grad[:1, :1].expand_as(r.grad), rtol=1e-3)
    assert same, "no gradient may flow through the statistics"
    with torch.no_grad():
        for _ in range(100):
            match(r, h)
        together = match.eval()(r, h)
        alone = torch.cat([match(r[i:i + 1], h[i:i + 1]) for i in range(32)])
        fresh.load_state_dict(match.state_dict())
        assert close(alone, together), "at evaluation a latent must not depend on its batch"
        assert close(together, out, 0.05), "evaluation must use the running averages"
        assert close(fresh.eval()(r, h), together), "the statistics must be in the state dict"
    return measured


@torch.no_grad()
def exercise_9():
    """Positions that rotate"""
    torch.manual_seed(0)
    model = dit.DiT(12, 10, 64, 2, 2).eval()
    for p in model.parameters():
        if not p.any():                                     # an untrained DiT predicts zero
            p.normal_(std=0.1)
    t, y, rng = torch.full((2,), 0.4), torch.tensor([3, 10]), generator(0)
    even = torch.randn(2, 12, 1, 1, generator=rng).expand(2, 12, 3, 5)
    v, x = model(even, t, y), torch.randn(2, 12, 3, 5, generator=rng)
    assert v.shape == even.shape and v.std() > 0.01, "the DiT must give (B, C, h, w), not zeros"
    uneven = ((v - v[..., :1, :1]).abs().amax() / v.abs().amax()).item()
    seen = min(((model(x.roll(1, axis), t, y) - model(x, t, y).roll(1, axis)).abs().amax()
                / v.abs().amax()).item() for axis in (2, 3))           # rows and columns
    measured = (f"the velocity of a constant latent varies by {uneven:.0e} (expected: below 1e-4), "
                f"rolling a latent by one position matters by {seen:.0e} (expected: above 1e-3)")
    assert uneven < 1e-4 and seen > 1e-3, measured
    return measured


def exercise_10():
    """Rescaling the unconditional velocity"""
    assert hasattr(flow, "guided_star"), "flow.guided_star does not exist"
    rng, rows, factors = generator(0), [], torch.tensor([1.0, 3.0, 0.2, 0.0])
    v_y = torch.randn(4, 6, 3, 3, generator=rng)
    v_null = torch.randn(4, 6, 3, 3, generator=rng) + 0.5 * v_y

    def guide(factor, scale, *t_range):
        def model(x, t, y):               # v_y and v_null asked for in one call or in two
            rows.append(len(x))
            both = (v_y, v_null * factor.view(-1, 1, 1, 1))
            of_class, of_none = (v.repeat(2, 1, 1, 1)[:len(x)] for v in both)
            return torch.where((y == 10).view(-1, 1, 1, 1), of_none, of_class)
        rows.clear()
        v = flow.guided_star(model, torch.full((4,), 3), 10, scale, *t_range)(v_y * 0, 0.5)
        return v, sum(rows) / len(v)      # velocity, evaluations per sample
    found, evaluations = guide(factors, 2.5)
    assert evaluations == 2, f"a guided step must take 2 evaluations, not {evaluations:g}"
    s = (v_y * v_null).sum((1, 2, 3)) / v_null.square().sum((1, 2, 3))     # undoes any factor but 0
    nothing = (s * factors.sign()).view(-1, 1, 1, 1) * v_null
    off = (found - nothing - 2.5 * (v_y - nothing)).abs().amax((1, 2, 3))
    assert off[0] < 1e-3, f"the velocity is off by {off[0]:.2f}"
    assert off[3] < 1e-3, "where v_null is 0, the velocity must be scale * v_y"
    assert off.max() < 1e-3, "a multiple of v_null must make no difference"
    for options in ((1.0,), (2.5, (0.6, 1.0))):
        v, evaluations = guide(factors, *options)
        assert close(v, v_y), "at scale 1 and outside of t_range the velocity must be v_y"
        assert evaluations == 1, "at scale 1 and outside of t_range one evaluation is enough"
    drawn = [velocities(Stub(lambda y: torch.where(y == 10, factor, torch.tensor(2.0))),
                        torch.full((3,), 3), scale=2.5) for factor in torch.tensor([1.0, 7.0])]
    assert close(*drawn, 1e-3), "sample.generate does not call it"
    return f"off by {off.max():.0e} from the formula"


def exercise_11():
    """Guidance by a weaker model"""
    strong, weak, labels = Stub(lambda y: 3), Stub(lambda y: 10), torch.tensor([1, 2, 3, 4, 5])
    found = velocities(strong, labels, scale=2.0, weak=weak)
    measured = f"at scale 2, v = 3 and v_weak = 10 make {found.mean():g} (expected: -4)"
    assert close(found, torch.full_like(found, -4)), measured
    asked = strong.asked == weak.asked == labels.tolist()
    assert asked, "both models must be asked for the class, once per step"
    strong.asked = []
    velocities(strong, labels, scale=2.0)
    assert 10 in strong.asked, "without weak, guidance must lead away from no class, as before"
    return measured


def exercise_12():
    """What two views share"""
    image = torch.rand(200, 1, 32, 32, generator=generator(0)) - 0.5
    axis = F.normalize(torch.randn(200, 3, generator=generator(1)), dim=1)
    view = pretrain.views(image * axis[:, :, None, None], pretrain.Config(), generator(2))
    centered = view.flatten(2) - view.flatten(2).mean(2, keepdim=True)         # (200, 3, pixels)
    # the axis in RGB along which a view's colors vary most, and the one along which they did
    found = torch.linalg.eigh(centered @ centered.mT)[1][:, :, -1]
    kept = (found * axis).sum(1).abs().mean().item()
    measured = f"the cosine of a view's color axis with its image's is {kept:.2f} (by chance: .5)"
    assert kept > 0.8, f"{measured}, expected: above .8"
    return measured


# ---------------------------------------------------------------- the command

EXERCISES = {name.removeprefix("exercise_"): check for name, check in list(globals().items())
             if name.startswith("exercise_")}


def main(argv=None):
    """The command line; exits with the status above."""
    names, solved = sys.argv[1:] if argv is None else argv, True
    for name in names:
        if name.removeprefix("exercise_") not in EXERCISES:
            print(f"{name}: no such exercise; there are 1 to {len(EXERCISES)}", file=sys.stderr)
            sys.exit(2)
    if not names:
        for n, check in EXERCISES.items():
            print(f"{n:>2}  {check.__doc__}")
        print("texts: exercises/README.md; to check one: python exercises/check.py 2")
    for n in (name.removeprefix("exercise_") for name in names):
        good, line = verdict(EXERCISES[n])
        print(f"exercise {n}: {'solved' if good else 'not yet'}: {line}", flush=True)
        solved = solved and good
    sys.exit(0 if solved else 1)


if __name__ == "__main__":
    main()
