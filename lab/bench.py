"""How fast each stage is on this machine: image feed, encoder, training steps, sampling.

    python -m lab.bench    # the shapes preset on whatever device there is, 1 minute
    python -m lab.bench --repeats 20 --threads 1

Floating-point operations are counted from the model as it runs (multiply and add are two), the
share is of the matrix-product rate measured here, in the precision that the network runs in.
Every figure is a median after a warm-up; compare figures of one run, machines are noisy.
"""
import resource, statistics, time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

import ae
from plumbing import config
import dit
from plumbing.config import field, require
from data import shapes, to_float
from dino import load_dino
from flow import euler, flow_loss, guided


@dataclass
class Config:
    """The benchmark."""
    preset: str = field("shapes", "which preset of ae.py and dit.py to time")
    repeats: int = field(8, "timed repetitions, of which the median is shown")
    threads: int = field(0, "CPU threads; 0: as many as torch likes")
    device: str = field("auto", "cuda, cpu, ...; auto takes a GPU when there is one")

    def check(self):
        """Impossible values end here."""
        require(self.repeats >= 1, "--repeats must be at least 1")
        require(self.threads >= 0, "--threads must not be negative")


PRESETS = {name: (dict(repeats=2) if name == "debug" else {}) for name in ae.PRESETS}


def seconds(work, repeats, device):
    """Median seconds of one call of `work`, after two calls that do not count."""
    times = []
    for i in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def matmul_rate(device, autocast, repeats):
    """FLOP/s of a large matrix product in the precision that autocast chooses."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    with autocast():
        dtype = (a[:8, :8] @ b[:8, :8]).dtype
    a, b = a.to(dtype), b.to(dtype)
    return 2 * n ** 3 / seconds(lambda: a @ b, repeats, device), dtype


def operations(work):
    """Floating-point operations of one call of `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def stages(c, device, autocast):
    """-> (name, pictures a call, the call) of each stage, on fresh random weights but the tiny
    encoder's own."""
    a, d = ae.Config(**ae.PRESETS[c.preset]), dit.Config(**dit.PRESETS[c.preset])
    d.check()
    images = shapes(1000, a.size, 0)[0].numpy()
    encoder = load_dino(a.encoder, device)
    auto = ae.AutoEncoder(a, encoder).to(device).train()
    trained = [p for p in auto.parameters() if p.requires_grad]
    auto_optimizer = torch.optim.AdamW(trained, fused=True)
    model = dit.DiT(auto.latent_dim, 10, d.dim, d.depth, d.heads).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = to_float(images, slice(0, a.batch), None, device)
    side = a.size // encoder.patch
    z = torch.randn(d.batch, auto.latent_dim, side, side, device=device)
    y = torch.randint(10, (d.batch,), device=device)

    def encode():
        with torch.no_grad(), autocast():
            encoder(encoder.normalize(x))

    def ae_step():
        with autocast():
            r, _ = auto(x)
            loss = (r - x).abs().mean() + a.perceptual * ae.perceptual_loss(encoder, r, x)
        auto_optimizer.zero_grad()
        loss.backward()
        auto_optimizer.step()

    def dit_step():
        with autocast():
            loss = flow_loss(model, z, y)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def draw():
        with torch.no_grad(), autocast():
            auto.decode(euler(guided(model, y, 10, 2.0), z, 10))
    return [("shapes drawn", 1000, lambda: shapes(1000, a.size, 1)),
            ("image feed", a.batch, lambda: to_float(images, slice(0, a.batch), None, device)),
            ("encoder", a.batch, encode), ("AE training step", a.batch, ae_step),
            ("DiT training step", d.batch, dit_step),
            ("sampling, 10 steps, guided", d.batch, draw)]


def main(argv=None):
    """The command line."""
    c = config.parse(Config, PRESETS, argv)
    device, autocast = config.setup(c.device, c.threads)
    peak, dtype = matmul_rate(device, autocast, c.repeats)
    print(f"{config.describe(device)}; torch {torch.__version__}; matrix products "
          f"{peak / 1e12:.2f} TFLOP/s in {str(dtype)[6:]}; median of {c.repeats}")
    print(f"{'stage':28s} {'img/s':>9s} {'TFLOP/s':>8s} {'of peak':>8s} {'memory':>9s}")
    for name, pictures, work in stages(c, device, autocast):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took, flops = seconds(work, c.repeats, device), operations(work)
        memory = (torch.cuda.max_memory_allocated() if device.type == "cuda"
                  else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        share = f"{flops / took / peak:8.1%}" if flops else f"{'-':>8s}"
        rate = f"{flops / took / 1e12:8.3f}" if flops else f"{'-':>8s}"
        print(f"{name:28s} {pictures / took:9,.0f} {rate} {share} {memory / 1e9:6.2f} GB")


if __name__ == "__main__":
    with config.one_line_errors():
        main()
