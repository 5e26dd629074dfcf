"""The evidence: every claim of the paper as one command, on the embedded data, without a download.

    python -m lab.evidence                    # lists the experiments
    python -m lab.evidence residual           # Figure 5, Table 4: what the residual and matching do
    python -m lab.evidence all                # everything; start it twice to use two cores
    python -m lab.evidence all --preset debug # the same path in minutes: noise, but every file

Each experiment trains what it needs into out/evidence/<preset>/, by the very commands that it
prints, measures, and adds rows to results/*.tsv.  What is there already is not done again: a
killed run goes on with the same command.  `python -m lab.report` turns the rows into the README's
tables and figures.  Samples are judged by the CNN of metrics.py, which shares nothing with the
encoder.
"""
import functools, shutil, sys, time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

import ae
from plumbing import config
import dino
import dit
import sample
from plumbing.config import UserError, field, require
from data import load_images, shapes, to_float
from plumbing.fetch import alone
from flow import euler, flow_loss, guided
from metrics import knn, linear_classes, linear_probe, mean_iou, psnr, ssim

# Letters: n pictures, C latent channels, h w latent grid, N = h w tokens, P patch side.


@dataclass
class Config:
    """What all experiments share."""
    preset: str = field("small", "a named set of the options below; its name is in every row")
    out: str = field("out/evidence", "folder of the trained models")
    results: str = field("results", "folder of the tables")
    seeds: str = field("0,1,2", "seeds with commas between: of both stages, and of the noise")
    n: int = field(1000, "samples that are scored")
    ae: str = field("", "flags of ae.py, in one string")
    dit: str = field("", "flags of dit.py, in one string")
    dino: str = field("", "flags of dino.py, in one string")
    kept: str = field("", "steps of the DiT whose weights are scored, with commas between")
    encoders: str = field("", "steps of the encoder's pretraining that are carried to samples")

    def check(self):
        """Impossible values end here."""
        for name in ("seeds", "kept", "encoders"):
            require(all(part.isdigit() for part in getattr(self, name).split(",")),
                    f"--{name} must be whole numbers with commas between, such as 0,1,2")
        require(self.n >= 20, "--n must be at least 20")


PRETRAINING = "--steps 800 --keep 0,100,200,300,400,600"
PRESETS = {
    # One core of an AMD EPYC: stage 1 2.5 min, stage 2 1.4 min. 10 steps, three seeds: .567 of the
    # samples recognised, Frechet 4.62 (SVG); .220, 7.71 (VAE).
    "small": dict(ae="--ch 16 --steps 900", dino=PRETRAINING,
                  dit="--dim 144 --depth 4 --heads 4 --steps 1000", kept="125,250,500,1000",
                  encoders="0,300,600"),
    # The default of ae.py and dit.py. Not run by this file.
    "full": dict(kept="250,500,1000,2000,3500", dino=PRETRAINING, encoders="0,300,600"),
    "debug": dict(ae="--preset debug", dit="--preset debug", seeds="0", n=40, kept="10,20",
                  dino="--preset debug --keep 0,10", encoders="0,10"),
}

# ---- EDIT HERE: what is compared ----
LATENTS = {                               # flags of ae.py
    "svg": "", "vae": "--latent vae", "dino": "--latent dino", "unaligned": "--latent unaligned",
    "noise": "--noise 0.4", "layer1": "--layer 1", "layer2": "--layer 2", "layer3": "--layer 3",
}                            # and "encoder<step>", "<any>_scalar", "<any>_loud": see `restate`
LOUD = 4
DITS = {                                  # flags of dit.py
    "base": "", "narrow": "--dim 96 --heads 4", "wide": "--dim 192 --heads 4",
    "shift1": "--shift 1", "shiftauto": "--shift auto", "shift6.67": "--shift 6.67",
}
QUALITY = ((3, 1.0), (10, 1.0), (10, 2.0))                           # Euler steps, guidance
SWEEP = tuple((n, w) for n in (1, 2, 3, 5, 10, 25, 50) for w in (1.0, 2.0))
GUIDANCE = tuple((10, w) for w in (1.0, 1.5, 2.0, 3.0, 4.0))
SHIFTS = ("1", "2.5", "4", "6.67", "auto")                           # of sampling
WIDTHS = (48, 96, 128, 192)                                          # around SVG's 112 channels
# -------------------------------------

# ---------------------------------------------------------------- tables


class Table:
    """results/<name>.tsv: rows of `columns`, the first `keys` of which say what a row is about."""

    def __init__(self, folder, name, keys, values):
        self.path, self.keys = Path(folder) / f"{name}.tsv", keys.split()
        self.columns = self.keys + values.split()

    def rows(self):
        """-> a list of dicts of strings; UserError when the file holds other columns."""
        if not self.path.is_file():
            return []
        first, *lines = self.path.read_text().splitlines()
        if first.split("\t") != self.columns:
            raise UserError(f"{self.path}: its columns are not {' '.join(self.columns)}; "
                            "move it away, or give another --results")
        return [dict(zip(self.columns, line.split("\t"))) for line in lines]

    def has(self, **key):
        """Whether the row is there."""
        wanted = [self.show(key[k]) for k in self.keys]
        return any([row[k] for k in self.keys] == wanted for row in self.rows())

    def add(self, **row):
        """Append a row, and print it as `key: value` lines."""
        if set(row) != set(self.columns):
            raise ValueError(f"{self.path}: {set(row) ^ set(self.columns)}")
        with alone(self.path):                                       # two runs may share a table
            if self.has(**row):
                return
            with open(self.path, "a") as file:
                if file.tell() == 0:
                    file.write("\t".join(self.columns) + "\n")
                file.write("\t".join(self.show(row[k]) for k in self.columns) + "\n")
        name = " ".join(self.show(row[k]) for k in self.keys)
        print("\n".join([f"[{self.path.stem}: {name}]"] + [
            f"{k}: {self.show(row[k])}" for k in self.columns if k not in self.keys]), flush=True)

    @staticmethod
    def show(value):
        """A cell: five digits are more than any of these numbers deserves."""
        return f"{value:.5g}" if isinstance(value, float) else str(value)


def tables(folder):
    """All of them, by name."""
    layout = dict(
        latents=("preset latent seed", "channels psnr ssim decoded_recognised decoded_frechet "
                 "knn linear knn_flat linear_flat"),
        dense=("preset latent seed", "tokens miou accuracy"),
        generation=("preset latent dit seed trained steps scale shift", "n recognised frechet"),
        paths=("preset latent dit seed", "n consistency straightness error1 error2 error5"),
        encoders=("preset step", "knn linear"),
        width=("latent channels width seed", "parameters loss"),
        editing=("preset latent seed", "n new_class old_class floor psnr_outside "
                 "psnr_outside_plain psnr_outside_to_plain"),
        cost=("preset stage latent dit seed", "seconds"))
    return {name: Table(folder, name, *columns) for name, columns in layout.items()}

# ---------------------------------------------------------------- training what is asked for


class Busy(Exception):
    """Another process is making it."""


@contextmanager
def claim(path):
    """As `alone`, but raises Busy instead of waiting: there is other work to do."""
    with alone(path, wait=False) as mine:
        if not mine:
            raise Busy(path)
        yield


def command(module, flags, seed, out):
    """The Config of a stage, from its flags; prints the command line that would do the same."""
    argv = [*flags.split(), "--seed", str(seed), "--out", str(out)]
    print(f"\n$ python {module.__name__}.py {' '.join(argv)}", flush=True)
    return config.parse(module.Config, module.PRESETS, argv)


def encoder_file(c, step):
    """The tiny encoder as it was after `step` steps of pretraining -> Path."""
    folder = Path(c.out) / c.preset / "encoder"
    if not (folder / "dino_tiny.pt").is_file():
        with claim(folder):
            dino.train(command(dino, c.dino, 0, folder))
    return folder / f"dino_tiny_{step}.pt"


def stage1(c, latent, seed):
    """Train the autoencoder of that name, unless it is there -> its folder."""
    folder = Path(c.out) / c.preset / f"{latent}-{seed}"
    if (folder / "latents.json").is_file():
        return folder
    name, _, other = latent.partition("_")
    flags = c.ae + " " + (f"--encoder {encoder_file(c, name.removeprefix('encoder'))}"
                          if name.startswith("encoder") else LATENTS[name])
    if other:                       # the same weights under other statistics: nothing to train
        source = stage1(c, name if other == "scalar" else name + "_scalar", seed)
        flags += " --normalise scalar"
    with claim(folder):
        began, fresh = time.time(), not (folder / "ae.pt").is_file()
        if other and fresh:
            restate(source / "ae.pt", folder / "ae.pt", other)
        ae.train(command(ae, flags, seed, folder))
        if fresh and not other:
            tables(c.results)["cost"].add(preset=c.preset, stage="ae", latent=latent, dit="-",
                                          seed=seed, seconds=round(time.time() - began))
    return folder


def restate(source, target, other):
    """The same autoencoder under other statistics.  scalar: `ae.py` will measure them; loud: from
    those of scalar, but the residual's channels are made LOUD times larger, as they might come out
    of a training that matches nothing; the decoder undoes it, so that nothing else changes."""
    checkpoint = config.load_kind(source, "ae", "python -m lab.evidence")
    checkpoint["config"]["normalise"], checkpoint["fingerprint"] = "scalar", None
    if other == "loud":
        checkpoint["model"]["std"][-checkpoint["config"]["residual_dim"]:] /= LOUD
        checkpoint["fingerprint"] = config.fingerprint(checkpoint["model"])
    config.save(target, checkpoint)


def stage2(c, latent, kind, seed):
    """Train the DiT of that kind on that latent, unless it is there -> its folder."""
    source = stage1(c, latent, seed)
    folder = source if kind == "base" else source.with_name(f"{latent}-{kind}-{seed}")
    flags = f"{c.dit} {DITS[kind]} --keep {c.kept}"
    with claim(folder.with_name(folder.name + "-dit")):
        folder.mkdir(exist_ok=True)
        for name in ("ae.pt", "latents.npy", "labels.npy", "latents.json"):
            if not (folder / name).is_file():
                share(source / name, folder / name)
        steps = config.parse(dit.Config, dit.PRESETS, flags.split()).steps
        fresh = not (folder / "dit.pt").is_file()
        if fresh or dit.load_dit(folder / "dit.pt").step < steps:
            began = time.time()
            dit.train(command(dit, flags, seed, folder))
            if fresh:
                tables(c.results)["cost"].add(preset=c.preset, stage="dit", latent=latent,
                                              dit=kind, seed=seed,
                                              seconds=round(time.time() - began))
    return folder


def share(source, target):
    """The same file in two folders: a second name where the file system can, else a copy."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy(source, target)

# ---------------------------------------------------------------- measuring


@functools.lru_cache(1)
def scorer(size):
    """The judge and its view of the real pictures, once a process."""
    return sample.Scorer(SimpleNamespace(dataset="shapes", image_size=size, subset=""), "cpu")


def encode_all(model, images):
    """uint8 (n, 3, S, S) -> latents (n, C, h, w)"""
    _, autocast = config.setup("cpu")
    with autocast():
        return torch.cat([model.encode(to_float(images, slice(i, i + 250), None))
                          for i in range(0, len(images), 250)])


def patches_of(images, P=8):
    """uint8 (n, 3, S, S) -> pixels as if they were a latent (n, 3 P P, S / P, S / P): the floor."""
    n, S = len(images), images.shape[-1]
    x = torch.as_tensor(images).float().view(n, 3, S // P, P, S // P, P)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(n, 3 * P * P, S // P, S // P)


def measure_latents(c, latent, seed):
    """Reconstruction, and how far apart the classes lie: a row of latents.tsv."""
    x, y, _ = shapes(2000 if c.preset == "debug" else 5000, 32, seed=4)
    held, labels, _ = load_images("shapes", 32, "test")
    held, labels = held[:2000], labels[:2000]
    if latent == "pixels":
        a, b, row = patches_of(x), patches_of(held.copy()), {}
        row = dict(psnr="-", ssim="-", decoded_recognised="-", decoded_frechet="-")
    else:
        model = ae.load_ae(stage1(c, latent, seed) / "ae.pt")
        a, b = encode_all(model, x.numpy()), encode_all(model, held)
        real = to_float(held, slice(0, 1000), None)
        _, autocast = config.setup("cpu")
        with autocast():
            back = torch.cat([model.decode(z) for z in b[:1000].split(250)])
        found = scorer(32)(ae.to_uint8(back), labels[:1000])
        row = dict(psnr=psnr(real, back).mean().item(), ssim=ssim(real, back).mean().item(),
                   decoded_recognised=found["accuracy"], decoded_frechet=found["frechet"])
    flat, pooled = (a.flatten(1), b.flatten(1)), (a.mean((2, 3)), b.mean((2, 3)))
    for name, (train, test) in (("", pooled), ("_flat", flat)):
        row["knn" + name] = knn(train, y, test, labels)
        row["linear" + name] = linear_probe(train, y, test, labels)
    return dict(channels=a.shape[1], **row)


def measure_dense(c, latent, seed):
    """A linear classifier a token: background, or the class of the object that covers at least
    half of the patch; the generator's own masks are the truth.  A row of dense.tsv."""
    parts = []
    for count, stream in ((1000, 4), (1000, 5)):
        images, y, _, mask = shapes(count, 32, seed=stream, masks=True)
        if latent == "pixels":
            z = patches_of(images)
        else:
            z = encode_all(ae.load_ae(stage1(c, latent, seed) / "ae.pt"), images.numpy())
        cover = torch.nn.functional.adaptive_avg_pool2d(mask[:, None].float() / 255, z.shape[-1])
        truth = torch.where(cover[:, 0] >= 0.5, y[:, None, None] + 1, 0)              # (n, h, w)
        parts += [z.permute(0, 2, 3, 1).flatten(0, 2), truth.flatten()]               # (n N, C)
    x, y, xt, yt = parts
    found = linear_classes(x, y, xt)
    return dict(tokens=len(yt), miou=mean_iou(found, yt, 11),
                accuracy=(found == yt).double().mean().item())


def measure_generation(c, latent, kind, seed, settings):
    """Samples of a trained pair, judged; settings: (trained, steps, scale, shift) each; adds
    those rows of generation.tsv that are missing."""
    table = tables(c.results)["generation"]
    key = dict(preset=c.preset, latent=latent, dit=kind, seed=seed)
    missing = [s for s in settings if not table.has(
        **key, **dict(zip(("trained", "steps", "scale", "shift"), s)))]
    if not missing:
        return
    folder = stage2(c, latent, kind, seed)
    model, decoder = sample.load(folder, "cpu")
    labels = sample.even(list(range(model.classes)), c.n)
    for trained, steps, scale, shift in missing:
        if trained != model.step:
            model = dit.load_dit(folder / f"dit_{trained}.pt")
        used = dit.resolve_shift(shift, decoder) if shift != "-" else None
        images = sample.generate(model, decoder, labels, steps, scale, used, seed)
        found = scorer(32)(images, labels)
        table.add(**key, trained=trained, steps=steps, scale=scale, shift=shift, n=c.n,
                  recognised=found["accuracy"], frechet=found["frechet"])


def measure_paths(c, latent, kind, seed, fine=50):
    """Figure 3 on the real latents, as toy_flow.py measures it in 2-D: a row of paths.tsv.

    consistency: the norm of the mean unit vector from noise to latent, within a class; noise in so
    many dimensions is at right angles to everything, so that it is at most 1 / sqrt(2) here;
    straightness: distance over way; error: root mean square distance, a dimension, of few Euler
    steps to `fine` steps from the same noise.
    """
    model, decoder = sample.load(stage2(c, latent, kind, seed), "cpu")
    each = max(2, c.n // 20)
    y = torch.arange(model.classes).repeat_interleave(each)
    side = decoder.image_size // decoder.patch
    x0 = torch.randn(len(y), model.channels, side, side, generator=config.generator(seed))
    velocity = guided(model, y, model.classes, 1)
    _, autocast = config.setup("cpu")
    way, before = torch.zeros(len(y)), [x0]

    def see(i, t, x):
        way.add_((x - before[0]).flatten(1).norm(dim=1))
        before[0] = x
    with autocast():
        x1 = euler(velocity, x0, fine, model.sample_shift, see)
        rough = {k: euler(velocity, x0, k, model.sample_shift) for k in (1, 2, 5)}
    moved = (x1 - x0).flatten(1)
    unit = torch.nn.functional.normalize(moved, dim=1).view(model.classes, each, -1)
    return dict(n=len(y), consistency=unit.mean(1).norm(dim=1).mean().item(),
                straightness=(moved.norm(dim=1) / way).mean().item(),
                **{f"error{k}": (x - x1).square().mean().sqrt().item() for k, x in rough.items()})


def measure_width(c, latent, width, seed, steps=300):
    """RAE's test (arXiv 2510.11690, section 4.1): can a DiT of that width learn one picture's
    latent?  The loss over the last tenth of the steps; 0 would be perfect."""
    folder = stage1(c, latent, 0)
    decoder = ae.load_ae(folder / "ae.pt")
    cache, _ = dit.load_latents(folder, decoder)
    x1 = torch.from_numpy(cache[0, seed:seed + 1].astype("float32")).expand(64, -1, -1, -1)
    torch.manual_seed(seed)
    model = dit.DiT(decoder.latent_dim, 1, width, 4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.99), weight_decay=0, fused=True)
    y, last = torch.zeros(64, dtype=torch.long), []
    _, autocast = config.setup("cpu")
    steps = 20 if c.preset == "debug" else steps
    for step in range(steps):
        with autocast():
            loss = flow_loss(model, x1, y, generator=config.generator(seed, step))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last.append(loss.item())
    tail = last[-max(1, steps // 10):]
    return dict(parameters=sum(p.numel() for p in model.parameters()), loss=sum(tail) / len(tail))

# ---------------------------------------------------------------- the experiments


def jobs(c, name):
    """An experiment -> its jobs (description, function); each adds its own missing rows."""
    found, table = [], tables(c.results)
    end = int(c.kept.split(",")[-1])                     # the trained DiT; earlier ones were kept

    def row(kind, function, *about, **key):
        """One row of a table, function(c, *about), unless it is there."""
        def work():
            if not table[kind].has(**key):
                table[kind].add(**key, **function(c, *about))
        found.append((f"{name}: {kind} {' '.join(map(str, key.values()))}", work))

    def scores(latent, dit_kind, seed, settings, trained=(end,), shifts=("-",)):
        wanted = [(k, n, w, s) for k in trained for s in shifts for n, w in settings]
        found.append((f"{name}: generation {latent} {dit_kind} {seed}",
                      lambda: measure_generation(c, latent, dit_kind, seed, wanted)))

    def latents(latent, seed):
        row("latents", measure_latents, latent, seed, preset=c.preset, latent=latent, seed=seed)

    def dense(latent, seed):
        row("dense", measure_dense, latent, seed, preset=c.preset, latent=latent, seed=seed)

    def paths(latent, seed):
        row("paths", measure_paths, latent, "base", seed,
            preset=c.preset, latent=latent, dit="base", seed=seed)

    for seed in map(int, c.seeds.split(",")):
        if name == "maps":
            for latent in ("svg", "dino", "unaligned", "vae"):
                latents(latent, seed)
            if seed == int(c.seeds.split(",")[0]):
                latents("pixels", seed)
        elif name == "fields":
            for latent in ("svg", "vae"):
                paths(latent, seed)
        elif name == "residual":
            for latent in ("svg", "unaligned", "dino"):
                latents(latent, seed)
                for kind in (latent, latent + "_scalar"):
                    scores(kind, "base", seed, QUALITY)
            scores("unaligned_loud", "base", seed, QUALITY)
        elif name == "steps":
            for latent in ("svg", "vae"):
                scores(latent, "base", seed, SWEEP)
        elif name == "training":
            for latent in ("svg", "vae"):
                scores(latent, "base", seed, ((10, 1.0), (10, 2.0)),
                       trained=[int(k) for k in c.kept.split(",")])
        elif name == "scaling":
            for latent in ("svg", "vae"):
                for kind in ("narrow", "base", "wide"):
                    scores(latent, kind, seed, QUALITY[1:])
        elif name == "encoder":
            for latent in (*(f"encoder{k}" for k in c.encoders.split(",")), "svg"):
                latents(latent, seed)
                scores(latent, "base", seed, QUALITY)
                paths(latent, seed)
        elif name == "dense":
            for latent in ("svg", "dino", "unaligned", "vae"):
                dense(latent, seed)
            if seed == int(c.seeds.split(",")[0]):
                dense("pixels", seed)
        elif name == "layer":
            for latent in ("layer2", "svg"):
                latents(latent, seed)
                scores(latent, "base", seed, QUALITY)
        elif name == "editing":
            row("editing", measure_editing, "svg", seed, preset=c.preset, latent="svg", seed=seed)
        elif name == "guidance":
            for latent in ("svg", "vae"):
                scores(latent, "base", seed, GUIDANCE)
        elif name == "shift":
            scores("svg", "base", seed, ((3, 1.0), (10, 1.0)), shifts=SHIFTS)
        elif name == "trainshift":
            for kind in ("base", "shiftauto", "shift6.67", "shift1"):
                scores("svg", kind, seed, QUALITY)
        elif name == "noise":
            for latent in ("noise", "svg"):
                latents(latent, seed)
                scores(latent, "base", seed, QUALITY)
        elif name == "width":
            for latent, channels in (("svg", 112), ("vae", 16)):
                for width in WIDTHS:
                    row("width", measure_width, latent, width, seed,
                        latent=latent, channels=channels, width=width, seed=seed)
    if name == "encoder":
        for step in c.encoders.split(","):
            row("encoders", measure_encoder, step, preset=c.preset, step=step)
        row("encoders", measure_encoder, "shipped", preset=c.preset, step="shipped")
    return found


def measure_encoder(c, step):
    """The bare encoder on held-out pictures: a row of encoders.tsv."""
    source = "tiny" if step == "shipped" else encoder_file(c, step)
    found = dino.measure(dino.load_dino(source), 32)
    return dict(knn=found["knn"], linear=found["linear"])


def measure_editing(c, latent, seed):
    """Figure 10 on held-out pictures: a row of editing.tsv.  floor: how often the judge takes the
    plain reconstruction for the new class; psnr_*: outside of the mask."""
    model, decoder = sample.load(stage2(c, latent, "base", seed), "cpu")
    n = min(200, c.n)
    found = sample.measure_edit(model, decoder, n, seed)
    return dict(n=n, new_class=found["edit_judge_new_class"],
                old_class=found["edit_judge_old_class"],
                floor=found["reconstruction_judge_new_class"],
                psnr_outside=found["edit_psnr_outside_db"],
                psnr_outside_plain=found["reconstruction_psnr_outside_db"],
                psnr_outside_to_plain=found["edit_vs_reconstruction_psnr_outside_db"])


EXPERIMENTS = {
    "steps": "Figure 8a, Table 2a: few Euler steps, with and without guidance, SVG against VAE",
    "training": "Figure 1: the same along training",
    "fields": "Figure 3 on the real latents: direction consistency, straightness",
    "residual": "Figure 5, Table 4: no residual, unaligned, matched; two normalisations",
    "maps": "Figure 2: how separable the latents are (report.py draws the maps)",
    "dense": "Table 4: still a representation? a linear segmentation from single tokens",
    "encoder": "new: how semantic must the encoder be? checkpoints along its pretraining",
    "layer": "Table 6: tokens of an earlier layer",
    "scaling": "Figure 8b: three sizes of DiT",
    "guidance": "guidance from 1 to 4",
    "shift": "the time shift of the sampler's steps, RAE's `auto` among them",
    "trainshift": "the time shift in training",
    "noise": "RAE: a decoder trained on noisy latents",
    "width": "RAE: a DiT narrower than the latent",
    "editing": "Figure 10: change the class inside a mask",
}


def main(argv=None):
    """The command line: names of experiments, then flags."""
    argv = sys.argv[1:] if argv is None else list(argv)
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    names, flags = argv[:count], argv[count:]
    c = config.parse(Config, PRESETS, flags)
    if not names:
        print(__doc__.strip() + "\n\nexperiments:")
        for name, what in EXPERIMENTS.items():
            print(f"    {name:10} {what}")
        return
    for name in names:
        if name != "all" and name not in EXPERIMENTS:
            print(f"evidence.py: {name}: no such experiment; there are all, "
                  + ", ".join(EXPERIMENTS), file=sys.stderr)
            sys.exit(2)
    waiting = [job for name in (EXPERIMENTS if "all" in names else names) for job in jobs(c, name)]
    began, total = time.time(), len(waiting)
    while waiting:
        left = []
        for what, work in waiting:
            try:
                work()
            except Busy:                     # another process trains what this needs: come back
                left.append((what, work))
        waiting = left
        if left:
            time.sleep(5)
    print(f"{total} measurements are in {c.results}/, {time.time() - began:.0f} s; "
          "`python -m lab.report` makes tables and figures of them")


if __name__ == "__main__":
    with config.one_line_errors():
        main()
