"""All of flow matching.  Nothing here knows about networks or images.

    t = 0 is noise, t = 1 is data             x_t = (1 - t) x0 + t x1,   x0 ~ N(0, I)
    the velocity to learn is                  v = x1 - x0                (constant along a path)
    the sampler starts at noise and adds      x <- x + (t' - t) v(x, t)
    shift s > 1 spends more time near noise   t -> t / (t + s (1 - t))

In the paper time runs the other way (its t = 0 is data); the authors' code does the same as here.
A `model` is any function (x (B, ...), t (B,), *cond) -> velocity (B, ...).
"""
import math

import torch


def shift_time(t, s):
    """t / (t + s (1 - t)) on [0, 1]: the identity at s = 1, closer to noise for s > 1.

    The authors' 0.4 (training) and 0.15 (sampling) are s = 2.5 and 6.67; SD3 and RAE call this s
    alpha, and in both time runs from data to noise.
    """
    return t / (t + s * (1 - t))


def auto_shift(tokens, channels):
    """RAE's rule (arXiv 2510.11690): sqrt(dimensions / 4096), more shift for larger latents."""
    return math.sqrt(tokens * channels / 4096)


def draw(x1, shift=1.0, generator=None, logit_normal=False):
    """Draw noise and times for data x1 (B, ...) -> noise x0 (B, ...), times t (B,) in [0, 1].

    The times are uniform or, as in SD3 (arXiv 2403.03206), the sigmoid of N(0, 1), which spends
    less of the training near both ends; then they are shifted.
    """
    B, options = len(x1), dict(generator=generator, device=x1.device)
    # ---- EXERCISE 1: one time from each of B equally probable intervals ----
    t = torch.randn(B, **options).sigmoid() if logit_normal else torch.rand(B, **options)
    return torch.randn(x1.shape, dtype=x1.dtype, **options), shift_time(t, shift)


def flow_loss(model, x1, *cond, shift=1.0, generator=None, pair=None):
    """The flow-matching loss of a batch of data x1 (B, ...) -> per-sample loss (B,), t (B,).

    The times are returned so that the loss can be reported by time: its mean over all times has a
    floor well above zero and changes little.  generator: makes noise and times reproducible; pair:
    the output of `draw`, if the caller has drawn already.
    """
    x0, t = pair or draw(x1, shift, generator)
    at = t.view(-1, *[1] * (x1.dim() - 1)).to(x1.dtype)
    xt = (1 - at) * x0 + at * x1
    v = model(xt, t, *cond)
    return (v.float() - (x1 - x0).float()).square().flatten(1).mean(1), t


def guided(model, y, null, scale, t_range=(0.0, 1.0), weak=None):
    """Classifier-free guidance v_null + scale (v_y - v_null), on all channels -> velocity(x, t).

    y (B,) classes; null: the index that means no class; t_range: outside lo <= t <= hi the plain
    conditional model is used.  At scale 1 or outside the range, velocity(x, t) evaluates the model
    once, otherwise twice, batched into one call of size 2B.  weak: a less trained model, which
    gives v_null instead: guidance then also leads away from what more training corrects, as in
    AutoGuidance (arXiv 2406.02507, which asks it for the class).
    """
    nothing = torch.full_like(y, null)

    def velocity(x, t):
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        # ---- EXERCISE 3: a scale that is a function of t ----
        if scale == 1 or not t_range[0] <= float(t[0]) <= t_range[1]:
            return model(x, t, y)
        if weak:
            # ---- EXERCISE 11: the class ----
            v_y, v_null = model(x, t, y).float(), weak(x, t, nothing).float()
        else:
            both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, nothing]))
            v_y, v_null = both.float().chunk(2)
        return v_null + scale * (v_y - v_null)
    return velocity


# ---- EXERCISE 10: guided_star ----


def times(steps, shift=1.0):
    """The steps + 1 times of a sampler, from exactly 0 (noise) to exactly 1 (data), shifted."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()


def _state(x):
    """The sampler's state is float32 or better: in bfloat16, small steps are lost to rounding."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def euler(velocity, x, steps, shift=1.0, callback=None):
    """Integrate from noise x (B, ...) at t = 0 to data at t = 1: `steps` model calls on steps + 1
    times.  callback(i, t, x), if given, sees every state, including the first and the last."""
    x, at = _state(x), times(steps, shift)
    for i in range(steps):
        if callback:
            callback(i, at[i], x)
        x = x + (at[i + 1] - at[i]) * velocity(x, at[i]).to(x.dtype)
    if callback:
        callback(steps, 1.0, x)
    return x


@torch.no_grad()
def heun(velocity, x, steps, shift=1.0, callback=None):
    """Like `euler`, but each step averages the velocities at its two ends: second order, 2 * steps
    model calls."""
    x, at = _state(x), times(steps, shift)
    for i in range(steps):
        if callback:
            callback(i, at[i], x)
        dt = at[i + 1] - at[i]
        here = velocity(x, at[i]).to(x.dtype)
        there = velocity(x + dt * here, at[i + 1]).to(x.dtype)
        x = x + dt / 2 * (here + there)
    if callback:
        callback(steps, 1.0, x)
    return x


@torch.no_grad()
def ab2(velocity, x, steps, shift=1.0, callback=None):
    """Like `euler` and as cheap, `steps` model calls, but second order from the second step on: the
    line through the last two velocities gives that in the middle of the step (Adams-Bashforth;
    PNDM, arXiv 2202.09778, is its fourth order for diffusion models)."""
    x, at, before = _state(x), times(steps, shift), None
    for i in range(steps):
        if callback:
            callback(i, at[i], x)
        v, dt = velocity(x, at[i]).to(x.dtype), at[i + 1] - at[i]
        slope = 0 if before is None else (v - before) / (at[i] - at[i - 1])
        x, before = x + dt * (v + dt / 2 * slope), v
    if callback:
        callback(steps, 1.0, x)
    return x


# ---- EXERCISE 2: midpoint, second order like heun ----
