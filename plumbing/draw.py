"""Drawing with Pillow alone: grids of images, an antialiased canvas, and line charts."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from plumbing.config import atomic

# ---------------------------------------------------------------- sheets and animations


def grid_image(images, columns, zoom=None):
    """Images uint8 (B, 3, S, S) -> one Pillow image with `columns` of them in each row.

    White where the last row is not full.  Enlarged `zoom` times without smoothing; by default just
    enough that small images can be recognized.
    """
    images = np.asarray(images)
    B, _, S, _ = images.shape
    rows, zoom = -(-B // columns), zoom or max(1, 64 // S)
    sheet = np.full((rows * columns, 3, S, S), 255, np.uint8)
    sheet[:B] = images
    sheet = sheet.reshape(rows, columns, 3, S, S).transpose(0, 3, 1, 4, 2)        # (r, S, c, S, 3)
    image = Image.fromarray(sheet.reshape(rows * S, columns * S, 3))
    return image.resize((image.width * zoom, image.height * zoom), Image.NEAREST)


def save_grid(path, images, columns, zoom=None):
    """Write `grid_image` as a PNG."""
    image = grid_image(images, columns, zoom)
    atomic(path, lambda temporary: image.save(temporary, "PNG"))


def save_gif(path, frames, milliseconds):
    """Write Pillow images as an endless animation; milliseconds: how long each is shown."""
    first, *rest = frames
    atomic(path, lambda temporary: first.save(temporary, "GIF", save_all=True, append_images=rest,
                                              duration=milliseconds, loop=0))


# ---------------------------------------------------------------- the canvas

K = 2                                                             # supersampling
INK, GRAY, RULE, PAPER, SHADE = "#222222", "#777777", "#d9d9d4", "#f8f8f5", "#e6e6e0"


class Canvas:
    """An image drawn K times too large and downscaled at the end, which smooths its edges.

    Coordinates and widths are pixels of the finished image; y points down.
    """

    def __init__(self, width, height, color="white"):
        self.image = Image.new("RGB", (width * K, height * K), color)
        self.draw = ImageDraw.Draw(self.image, "RGBA")    # this mode blends translucent colors

    def pixels(self, xy):
        """Coordinates (n, 2) -> pixels (n, 2) of the finished image."""
        return np.asarray(xy)

    def line(self, xy, color, width):
        """A line through xy (n, 2)."""
        flat = (self.pixels(xy) * K).ravel().tolist()
        self.draw.line(flat, color, round(width * K), joint="curve")

    def dots(self, xy, color, radius):
        """A disc at each of xy (n, 2)."""
        r = radius * K
        for x, y in self.pixels(xy) * K:
            self.draw.ellipse((x - r, y - r, x + r, y + r), color)

    def arrow(self, tail, tip, color, width):
        """An arrow; its head scales with it, so that short ones still look like arrows."""
        tail, tip = np.asarray(tail), np.asarray(tip)
        back = (tail - tip) * 0.35
        barb = back[::-1] * (-0.57, 0.57)
        self.line([tail, tip], color, width)
        self.line([tip + back + barb, tip, tip + back - barb], color, width)

    def box(self, x0, y0, x1, y1, fill=None, rule=None):
        """A rectangle in pixels, filled, outlined or both."""
        self.draw.rectangle((x0 * K, y0 * K, x1 * K - 1, y1 * K - 1), fill, rule, K)

    def text(self, x, y, words, size, color=INK, anchor="la", halo=None):
        """Text at pixel (x, y); the anchor is Pillow's; halo: a color drawn around the letters."""
        self.draw.text((x * K, y * K), words, color, ImageFont.load_default(size * K), anchor,
                       stroke_width=2 * K if halo else 0, stroke_fill=halo)

    def paste(self, other, x, y):
        """Another canvas with its top left corner at pixel (x, y)."""
        self.image.paste(other.image, (x * K, y * K))

    def done(self):
        """-> the finished Pillow image."""
        return self.image.reduce(K)                       # the mean of K x K pixels


class Plane(Canvas):
    """A square panel of [-extent, extent]^2: lines, dots and arrows in these units, y up."""

    def __init__(self, side, extent):
        super().__init__(side, side, PAPER)
        self.side, self.extent = side, extent
        self.box(0, 0, side, side, rule=RULE)

    def pixels(self, xy):
        return (np.asarray(xy) / self.extent * (1, -1) + 1) / 2 * self.side

    def scatter(self, xy, labels, colors, radius):
        """A disc at each of xy (n, 2), in the color of its label (n,)."""
        for label, color in enumerate(colors):
            self.dots(xy[labels == label], color, radius)

    def paths(self, paths, labels, colors, dot, starts=True):
        """Lines along paths (steps + 1, n, 2) in the color of their labels (n,), and on top of
        all lines a disc at the end of each; starts: also a black one where it begins."""
        groups = [(paths[:, labels == label], color) for label, color in enumerate(colors)]
        for group, color in groups:
            for i in range(group.shape[1]):
                self.line(group[:, i], color + "c8", 1.7)
        for group, color in groups:
            if starts:
                self.dots(group[0], INK, dot - 0.9)
            self.dots(group[-1], "white", dot + 0.9)
            self.dots(group[-1], color, dot)

    def mean_arrows(self, xy, vectors, color, length, lattice=8, least=40):
        """The mean of the vectors (n, 2) found at xy (n, 2), as one arrow in each square of a
        lattice; none where there are fewer than `least` vectors.  length: of an arrow, per unit."""
        xy, vectors = np.asarray(xy), np.asarray(vectors)
        squares = np.floor((xy / self.extent + 1) / 2 * lattice)
        for square in np.ndindex(lattice, lattice):
            here = (squares == square).all(1)
            if here.sum() >= least:
                middle = ((np.array(square) + 0.5) / lattice * 2 - 1) * self.extent
                half = vectors[here].mean(0) * length / 2
                self.arrow(middle - half, middle + half, color, 1.3)


# ---------------------------------------------------------------- charts


def chart(title, series, xs, xlabel, width=520, height=360, logx=True, logy=True, ticks=None,
          limits=None, floor=None):
    """Curves in one panel -> Canvas.

    series: tuples (name, color, thin, values); values[i] are the measurements at xs[i], one per
    seed.  A curve runs through their means, and bars show one standard deviation; an x without
    values is skipped.  ticks: the x values that are marked, all xs by default.  limits: (low, high)
    of the y axis, fitted to the values by default.  floor: (y, words) shades everything below y.
    """
    canvas = Canvas(width, height)
    left, top, right, bottom = 46, 36, width - 8, height - 48
    fx, fy = (np.log if log else np.asarray for log in (logx, logy))
    shown = [v for *_, values in series for at_x in values for v in at_x]
    low, high = fy(limits or (min(shown), max(shown)))
    margin = 0 if limits else 0.08 * (high - low)
    low, high = low - margin, high + margin
    least = np.exp(low) if logy else low                  # a bar may reach below 0: it ends here

    def px(x):
        return left + 14 + (right - left - 36) * (fx(x) - fx(xs[0])) / (fx(xs[-1]) - fx(xs[0]))

    def py(y):
        return bottom - (bottom - top) * min(1, (fy(max(y, least)) - low) / (high - low))

    canvas.box(left, top, right, bottom, PAPER, RULE)
    if floor and floor[0] > least:
        canvas.box(left + 1, py(floor[0]), right - 1, bottom - 1, SHADE)
        canvas.text(left + 10, py(floor[0]) + 5, floor[1], 14, GRAY)
    for y in y_ticks(low, high, logy):
        canvas.line([(left, py(y)), (right, py(y))], RULE, 1)
        canvas.text(left - 6, py(y), f"{y:g}", 14, GRAY, "rm")
    for x in ticks or xs:
        canvas.text(px(x), bottom + 6, f"{x:.3g}" if x < 1 else f"{x:g}", 14, GRAY, "ma")
    names = []
    for name, color, thin, values in series:
        points = [(px(x), py(np.mean(v))) for x, v in zip(xs, values) if len(v)]
        for x, v in zip(xs, values):
            if len(v) > 1:
                mean, std = np.mean(v), np.std(v, ddof=1)
                canvas.line([(px(x), py(mean + std)), (px(x), py(mean - std))], color, 1)
        canvas.line(points, color, 1.2 if thin else 2.6)
        canvas.dots(points, color, 2.4 if thin else 3.6)
        if name:
            names.append((*points[-2 if thin else -1][::-1], name, color))
    above = -np.inf
    for y, x, name, color in sorted(names):               # above every curve, and apart
        above = max(y, above + 15)
        canvas.text(x - 6, above - 10, name, 14, color, "rs", halo=PAPER)
    canvas.text(left, 8, title, 18)
    canvas.text(right - 2, bottom + 26, xlabel, 14, GRAY, "ra")
    return canvas


def y_ticks(low, high, log):
    """Round numbers within an axis; low and high are logarithms if it is logarithmic."""
    if log:
        decades = 10.0 ** np.arange(-9, 10)
        ticks = [d * digit for d in decades for digit in (1, 2, 5)]
        ticks = [y for y in ticks if low <= np.log(y) <= high]
        return ticks if len(ticks) <= 6 else [y for y in ticks if y in decades]
    steps = [10.0 ** power * digit for power in range(-9, 10) for digit in (1, 2, 5)]
    step = next(s for s in steps if high - low <= 6 * s)
    return [step * i for i in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]
