"""How the cost of a DiT step grows: with steps, batch, tokens, width and depth.

    python -m lab.bench --growth         # results/growth.tsv and assets/growth.png; 1 to 3 minutes

An exponent is the slope of a straight line fitted to the logarithms.  A step also has a cost that
does not depend on the batch (the optimizer, launching the operations), which pulls the exponents
of small sizes below the 1 of batch, tokens and depth and the 2 of the width.
"""
import math
from pathlib import Path

import numpy as np

import dit
from lab.bench import dit_step, seconds
from plumbing import config
from plumbing.draw import GRAY, INK, Canvas, chart


def exponent(xs, ys):
    """p of the least-squares fit log y = p log x + constant."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def growth(m):
    """The preset's DiT, one size varied at a time -> (axis, values, milliseconds of a step at each)

    m: lab.bench.Models.
    """
    dim, depth, heads = m.d.dim, m.d.depth, m.d.heads

    def cost(shape=(dim, depth, heads), side=m.side, batch=32, steps=1):
        step = dit_step(m, shape, side)
        return 1000 * seconds(lambda: [step(batch, m.autocast) for _ in range(steps)],
                              m.c.repeats, m.device)
    tokens, by_tokens = (16, 64, 256, 1024), lambda v: cost(side=math.isqrt(v), batch=8)
    for axis, values, at in (
            ("steps", (1, 2, 4, 8), lambda v: cost(steps=v)),
            ("batch", (8, 16, 32, 64, 128), lambda v: cost(batch=v)),
            ("tokens", tokens, by_tokens),
            ("width", [dim * k // 2 for k in (1, 2, 4, 8)], lambda v: cost((v, depth, heads))),
            ("depth", [depth * k for k in (1, 2, 4, 8)], lambda v: cost((dim, v, heads)))):
        yield axis, values, [at(v) for v in values]
    attention, dit.attention = dit.attention, lambda q, k, v: v
    try:
        yield "tokens, without attention", tokens, [by_tokens(v) for v in tokens]
    finally:
        dit.attention = attention


def plot(path, curves):
    """One panel per curve of `growth` except steps; with and without attention share a panel."""
    _, *panels, (_, _, without) = curves
    sheet = Canvas(530 * 2, 360 * 2)
    for i, (axis, values, times) in enumerate(panels):
        title, series = f"{axis}: exponent {exponent(values, times):.2f}", [(INK, False, times)]
        if axis == "tokens":
            title += f"; {exponent(values, without):.2f} without attention (thin)"
            series.append((GRAY, True, without))
        panel = chart(title, [("", color, thin, [[t] for t in times])
                              for color, thin, times in series], values, f"{axis}; y: ms per step")
        sheet.paste(panel, 530 * (i % 2), 360 * (i // 2))
    config.atomic(path, sheet.done().save)


def run(m, say):
    """Measure, write results/growth.tsv and assets/growth.png -> the rows, a list of dicts."""
    rows, curves = [], []
    for axis, values, times in growth(m):
        curves.append((axis, values, times))
        p = round(exponent(values, times), 3)
        rows += [dict(preset=m.c.preset, device=config.describe(m.device), axis=axis, value=v,
                      milliseconds=float(f"{t:.4g}"), exponent=p) for v, t in zip(values, times)]
        say(f"{axis:26s} exponent {p:.2f}; ms: " + " ".join(f"{t:.4g}" for t in times))
    lines = "".join("\t".join(map(str, line)) + "\n" for line in [rows[0], *map(dict.values, rows)])
    config.atomic("results/growth.tsv", lambda path: Path(path).write_text(lines))
    plot("assets/growth.png", curves)
    say("wrote results/growth.tsv and assets/growth.png")
    return rows
