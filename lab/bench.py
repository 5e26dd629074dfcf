"""How fast each stage is on this machine, how far from its goal, and how its cost grows.

    python -m lab.bench                        # the shapes preset; 1 to 2 minutes on a CPU
    python -m lab.bench --preset imagenette    # the paper's sizes, random weights: for a GPU
    python -m lab.bench --growth               # results/growth.tsv and assets/growth.png

Nothing is downloaded: images are noise, and all weights but the tiny encoder's are random.  Rows
call the functions of the stages.  Timings are noisy: compare only numbers from one run.

    TFLOP/s    multiplications and additions of the model as written; recomputation does not count
    of rate    fraction of the rate of a large matrix product, measured here in the same precision
    memory     peak while the row ran: of the process on a CPU, of the allocator on a GPU
    largest    largest batch that fits, found by doubling (GPU only)
    float32    img/s without autocast (on a GPU with TF32 products): the mode of a CPU
               without bfloat16; ratio: how many times as fast the row is with autocast
"""
import contextlib, functools, gc, importlib, json, math, os, resource, statistics, sys, time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ae, dit, sample
from data import to_float
from dino import SIZES, DINOv3, load_dino
from flow import draw, euler, guided
from plumbing import config, muon
from plumbing.config import field, require
from plumbing.gan import GAN
from plumbing.lpips import LPIPS

# Letters: B batch, S image side, C latent channels, N tokens, D width.


@dataclass
class Config:
    """The benchmark."""
    preset: str = field("shapes", "which preset of ae.py and dit.py to time")
    device: str = field("auto", "cuda, cpu, ...; auto takes a GPU if there is one")
    threads: int = field(0, "CPU threads; 0: as many as torch chooses")
    repeats: int = field(8, "timed repetitions, fewer if they take over 3 seconds")
    float32: bool = field(True, "time each row in float32 too")
    goals: bool = field(False, "print the goals for an H200; always done on a GPU")
    growth: bool = field(False, "only measure how a DiT step grows with batch, tokens and size")
    json: bool = field(False, "print one JSON document instead of the tables")

    def check(self):
        """ValueError for impossible values."""
        require(self.repeats >= 1, "--repeats must be at least 1")
        require(self.threads >= 0, "--threads must not be negative")


PRESETS = {name: (dict(repeats=2) if name == "debug" else {}) for name in ae.PRESETS}

# ---------------------------------------------------------------- measuring


def seconds(work, repeats, device):
    """Median seconds of a call of `work` after two warm-up calls; on a GPU by its own clock."""
    times = []
    while len(times) < 3 or len(times) < repeats + 2 and sum(times[2:]) < 3:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            work()
            if device.type == "mps":
                torch.mps.synchronize()
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def operations(step, autocast):
    """FLOP per image of step(batch, autocast): what a second image adds, so that those of
    the optimizer (Muon) do not count.  Attention counts as its plain products: fused kernels
    recompute some, and torch does not count the one for CPUs at all."""
    total = []
    for batch in (1, 2):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(batch, autocast)
        total.append(counter.get_total_flops())
    return total[1] - total[0]


def matrix_rate(device, autocast, repeats):
    """FLOP/s of a large matrix product in the precision that autocast chooses, and its dtype."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device)
    with autocast():
        dtype = (a[:8, :8] @ b[:8, :8]).dtype
    a, b = a.to(dtype), b.to(dtype)
    return 2 * n ** 3 / seconds(lambda: a @ b, repeats, device), dtype


def peak_memory(device, restart=False):
    """Bytes since the last `restart` (on a CPU, only Linux can restart the count)."""
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if restart:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def largest_batch(step, batch, most=1 << 16):
    """The largest of `batch` times or over 1, 2, 4, ... at which step(batch) fits into the GPU."""
    def fits(batch):
        torch.cuda.empty_cache()
        try:
            step(batch)
        except torch.OutOfMemoryError:
            return False
        return True
    while batch > 1 and not fits(batch):
        batch //= 2
    while batch < most and fits(2 * batch):
        batch *= 2
    return batch

# ---------------------------------------------------------------- the stages
#
# Each builder gives step(batch, autocast), which the rows time.


class Models:
    """What the rows share: configs `a` and `d`, the autoencoder, inputs of any batch size."""

    def __init__(self, c, device, autocast):
        self.c, self.device, self.autocast = c, device, autocast
        self.a, self.d = ae.Config(**ae.PRESETS[c.preset]), dit.Config(**dit.PRESETS[c.preset])
        self.d.check()
        torch.manual_seed(0)
        self.a.encoder, size = ae.choose_encoder(self.a), self.a.size
        name = self.a.encoder
        encoder = DINOv3(SIZES[name]) if name in SIZES else load_dino(name)
        self.ae = ae.AutoEncoder(self.a, encoder).to(device).train()
        self.side = size // self.ae.patch
        larger = size * 9 // 8 if self.a.crop == "random" else size            # as ae.feed has it
        self.uint8 = np.random.default_rng(0).integers(0, 256, (256, 3, larger, larger), np.uint8)
        # the latest inputs are kept, so that making them is not part of a row's time
        self.images, self.latents = map(functools.lru_cache(1), (self.feed, self.draw))

    def feed(self, batch):
        """Rows of a uint8 array -> images (B, 3, S, S) on the device, every other one mirrored."""
        index, images = torch.arange(batch) % len(self.uint8), self.uint8
        flip = index % 2 == 0
        if self.a.crop == "random":
            images = ae.random_crops(images, index, self.a.size, config.generator(0))
            index = slice(None)
        return to_float(images, index, flip, self.device)

    def draw(self, batch, side):
        """-> latents (B, C, side, side), labels (B,)"""
        return (torch.randn(batch, self.ae.latent_dim, side, side, device=self.device),
                torch.arange(batch, device=self.device) % 10)

    def dit(self, shape):
        """A DiT of (width, depth, heads).  OutOfMemoryError: training it would take half of the
        computer's memory (weights, average, gradient, two moments), which may end any process.
        """
        need = 20 * 18 * shape[0] ** 2 * shape[1]
        if self.device.type == "cpu" and need > os.sysconf("SC_PAGE_SIZE") * os.sysconf(
                "SC_PHYS_PAGES") / 2:
            raise torch.OutOfMemoryError
        return dit.DiT(self.ae.latent_dim, 10, *shape).to(self.device)


def ae_step(m):
    """A training step of stage 1 with its preset's losses, as in ae.train."""
    a, model, g = m.a, m.ae, config.generator(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = muon.optimizer(trained, model.matrices(), a.lr, a.muon, (a.beta1, a.beta2))
    gan = GAN(a, m.device, m.autocast) if a.gan else None
    lpips = LPIPS().to(m.device) if a.perceptual_net == "lpips" else None

    def step(batch, autocast):
        x = m.images(batch)
        with autocast():
            y, _ = model(x, g)
            perceptual = lpips(y, x).mean() if lpips else ae.perceptual_loss(model.dino, y, x)
        loss = reconstruction = (y - x).abs().mean() + a.perceptual * perceptual
        if gan:
            gan.autocast = autocast
            loss = loss + gan.generator_loss(y, reconstruction, model.decoder.conv_out.weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, a.clip or math.inf)
        optimizer.step()
        if gan:
            gan.step(x, y)
    return step


def dit_step(m, shape, side):
    """A training step of stage 2 for a DiT of (width, depth, heads), as in dit.train."""
    model, ema = m.dit(shape), m.dit(shape).eval()
    optimizer = muon.optimizer([*model.parameters()], model.matrices(), m.d.lr, m.d.muon,
                               (0.9, m.d.beta2))

    def step(batch, autocast):
        z, y = m.latents(batch, side)
        optimizer.zero_grad(set_to_none=True)
        dit.gradients(model, z, y, draw(z, 2.5), m.d.micro_batch, autocast)
        torch.nn.utils.clip_grad_norm_(model.parameters(), m.d.clip or math.inf)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.001)
    return step


def without_gradients(call):
    """A step that is call(batch)."""
    @torch.no_grad()
    def step(batch, autocast):
        with autocast():
            call(batch)
    return step


def sampling(m, shape, steps):
    """Noise -> latents, with guidance."""
    model = m.dit(shape).eval()

    def call(batch):
        z, y = m.latents(batch, m.side)
        euler(guided(model, y, 10, 2.0), z, steps, 4.0)
    return without_gradients(call)


def stages(m):
    """-> (name, batch, builder, FLOP per image if known without a run)"""
    a, d, dino, steps = m.a, m.d, m.ae.dino, sample.Config(**sample.PRESETS[m.c.preset]).steps
    shapes = {**dit.SIZES, d.model: (d.dim, d.depth, d.heads)}
    flops = {k: dit_flops(*s[:2], m.side ** 2, m.ae.latent_dim) for k, s in shapes.items()}
    yield "feed", a.batch, lambda: lambda batch, autocast: m.feed(batch), 0
    yield (f"features, {a.encoder}", a.batch,
           lambda: without_gradients(lambda batch: dino(dino.normalize(m.images(batch)))), 0)
    yield "AE step", a.batch, lambda: ae_step(m), 0
    yield ("decoding", a.batch,
           lambda: without_gradients(lambda batch: m.ae.decode(m.latents(batch, m.side)[0])), 0)
    for k in dict.fromkeys([d.model, "XL" if m.c.preset == "imagenette" else d.model]):
        yield (f"{steps} guided steps, {k}", d.batch, lambda k=k: sampling(m, shapes[k], steps),
               flops[k] / 3 * 2 * steps)               # forward only, with the class and without
    # the largest last: on a CPU the allocator does not return its memory
    for k in shapes if m.c.preset != "debug" else [d.model]:
        yield f"DiT step, {k}", d.batch, lambda k=k: dit_step(m, shapes[k], m.side), flops[k]


def dit_flops(dim, depth, tokens, channels):
    """FLOP of a DiT's training step, per image, by hand.

    6 * parameters * tokens: each parameter costs 2 forward and 4 backward.  A block applies 12 D^2
    of them to every token (4 attention, 8 MLP) and 6 D^2 once per image (adaLN).  Attention itself
    is two products of 2 N^2 D, and twice that backward: 12 N^2 D.
    """
    every_token, every_image = 12 * dim ** 2 * depth + 2 * channels * dim, 6 * dim ** 2 * depth
    return 6 * (every_token * tokens + every_image) + 12 * tokens ** 2 * dim * depth

# ---------------------------------------------------------------- the table

COLUMNS = dict(batch=("batch", "{:,}"), images_per_second=("img/s", "{:,.0f}"),
               tflops=("TFLOP/s", "{:.3f}"), share=("of rate", "{:.1%}"),
               memory_gb=("memory", "{:.2f} GB"), largest_batch=("largest", "{:,}"),
               float32_images_per_second=("float32", "{:,.0f}"), ratio=("ratio", "{:.2f}"))


def measure(m, name, batch, build, flops, rate, dtype):
    """-> one row, a dict.  `not_run` gives the reason where there is too little memory, or where a
    call would take over 10 seconds (not on a GPU)."""
    row, gpu = dict(stage=name, batch=batch), m.device.type == "cuda"
    estimate = lambda: 0 if gpu else 3 * batch * flops / rate       # at a third of the matrix rate
    gc.collect()                                          # frees the previous row
    try:
        if estimate() <= 10:
            step = build()
            flops = operations(step, m.autocast)
        if estimate() > 10:
            return dict(row, not_run=f"about {estimate():,.0f} s per call on this device")
        if gpu:
            row["largest_batch"] = largest_batch(lambda batch: step(batch, m.autocast), batch)
            batch = row["batch"] = min(batch, row["largest_batch"])
            step(batch, m.autocast)                       # frees the inputs of the largest batch
        peak_memory(m.device, restart=True)
        took = seconds(lambda: step(batch, m.autocast), m.c.repeats, m.device)
        row.update(images_per_second=batch / took, memory_gb=peak_memory(m.device) / 1e9)
        if flops:
            row.update(tflops=batch * flops / took / 1e12, share=batch * flops / took / rate)
            if m.c.float32 and dtype != torch.float32:
                slow = seconds(lambda: step(batch, contextlib.nullcontext), m.c.repeats, m.device)
                row.update(float32_images_per_second=batch / slow, ratio=slow / took)
    except torch.OutOfMemoryError:
        return dict(row, not_run="not enough memory")
    return row


def text(row):
    """A row of the table; "-" where nothing was measured."""
    if "not_run" in row:
        return f"{row['stage']:24s}{row['batch']:>10,}   not run: {row['not_run']}"
    cells = [form.format(row[key]) if key in row else "-" for key, (_, form) in COLUMNS.items()]
    return f"{row['stage']:24s}" + "".join(f"{cell:>10s}" for cell in cells)

# ---------------------------------------------------------------- the command


def main(argv=None):
    """The command line."""
    c = config.parse(Config, PRESETS, argv)
    device, autocast = config.setup(c.device, c.threads)
    say = (lambda *words: None) if c.json else functools.partial(print, flush=True)
    m, where = Models(c, device, autocast), config.describe(device)
    if c.growth:
        found = importlib.import_module("lab.growth").run(m, say)      # both import this file
    else:
        rate, dtype = matrix_rate(device, autocast, c.repeats)
        say(f"preset {c.preset} on {where}; torch {torch.__version__}; matrix products "
            f"{rate / 1e12:.3f} TFLOP/s in {str(dtype)[6:]}; medians of at most {c.repeats}")
        say(f"{'stage':24s}" + "".join(f"{title:>10s}" for title, _ in COLUMNS.values()))
        found = dict(preset=c.preset, device=where, torch=torch.__version__,
                     matrix_tflops=rate / 1e12, rows=[])
        for stage in stages(m):
            found["rows"].append(measure(m, *stage, rate, dtype))
            say(text(found["rows"][-1]))
        if c.goals or device.type == "cuda":
            found["goals"] = importlib.import_module("lab.goals").goals(m, found["rows"])
            say("\ngoals on one H200" + "".join(f"\n{k}: {v}" for k, v in found["goals"].items()))
    if c.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    with config.one_line_errors():
        main()
