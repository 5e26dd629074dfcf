"""What all stages share: flags, devices, randomness, files, the frame of a training loop.

Nothing here knows about images, latents or models.  A stage declares its flags as the fields of one
dataclass; `field(default, "help")` gives a flag its text in `--help`.
"""
import argparse, contextlib, dataclasses, difflib, functools, hashlib, math, os, re, shlex, signal
import sys, time, warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

VERSION = 2                                           # of the checkpoint layout


class UserError(Exception):
    """Something the user can fix: printed as one line, without a traceback."""


# ---------------------------------------------------------------- flags from a dataclass


def field(default, help, choices=None, also=()):
    """A dataclass field with its text for `--help` and, optionally, its allowed values.  also: what
    else one may call the flag, to be told its name."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, also=also))


def parse(cls, presets, argv=None):
    """Command line -> an instance of the dataclass `cls`; flag > preset > default.

    presets maps a name to a dict of fields.  If `cls` has a field `preset`, `--preset NAME` picks
    one (the field's default otherwise); a field `out` left empty becomes `out/<preset>`.  A field
    whose default is a tuple takes comma-separated whole numbers.  The result's `explicit` lists
    the flags that were given.  A typo, an abbreviation, a wrong type or value exits with status 2;
    the message names the flag that was probably meant.
    """
    main = sys.modules["__main__"]
    parser = argparse.ArgumentParser(
        description=(getattr(main, "__doc__", None) or cls.__doc__ or "").strip(),
        usage="%(prog)s [--flag value ...]", allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=22, width=110))
    for f in dataclasses.fields(cls):
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        options = dict(help=f"{f.metadata['help']} (default: {default!r})".replace("%", "%%"),
                       default=argparse.SUPPRESS)          # absent: the flag was not given
        kind = type(f.default)
        choices = f.metadata["choices"] or (sorted(presets) if f.name == "preset" else None)
        if kind is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif choices:
            options.update(choices=choices)
        else:
            name, convert = {float: ("FLOAT", finite), tuple: ("N,N,...", whole_numbers)}.get(
                kind, (kind.__name__.upper(), kind))
            options.update(type=convert, metavar=name)
        parser.add_argument(f"--{f.name}", **options)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(did_you_mean(unknown[0], dataclasses.fields(cls)))
    given = vars(given)
    names = {f.name: f.default for f in dataclasses.fields(cls)}
    preset = given.get("preset", names.get("preset"))
    config = cls(**{**(presets.get(preset) or {}), **given})
    config.explicit = sorted(k for k in given if k != "preset")
    if "out" in names and not config.out:
        config.out = f"out/{preset}"
    try:
        if hasattr(config, "check"):
            config.check()
    except ValueError as error:
        parser.error(str(error))
    return config


def did_you_mean(unknown, fields):
    """The message for an argument that is none of the flags."""
    if not unknown.startswith("-"):
        return f"unexpected {unknown!r}; every option is --flag value"
    flag, names = unknown.split("=")[0], {}
    for f in fields:
        names |= dict.fromkeys((f.name, *f.metadata["also"]), f"--{f.name}")
        if isinstance(f.default, bool):
            names[f"no_{f.name}"] = f"--no-{f.name}"
    close = difflib.get_close_matches(flag.strip("-").lower().replace("-", "_"), names, 1)
    return f"unknown flag {flag}; " + (f"did you mean {names[close[0]]}?" if close
                                       else "--help lists the flags")


def finite(text):
    """An argparse type: `--lr nan` is a typo, not a learning rate."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def whole_numbers(text):
    """An argparse type: '5,10' -> (5, 10), '' -> ()."""
    parts = [part.strip() for part in text.split(",") if text]
    if not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of comma-separated whole "
                                         "numbers, such as 5,10")
    return tuple(map(int, parts))


def require(condition, message):
    """ValueError unless the condition holds; from a config's `check`, exit with status 2."""
    if not condition:
        raise ValueError(message)


def at_least(config, **least):
    """ValueError unless each of these flags has at least this value."""
    for name, value in least.items():
        require(getattr(config, name) >= value, f"--{name} must be at least {value}")


def check_training(config):
    """The checks on the flags that every training stage shares."""
    at_least(config, steps=1, batch=1, save_every=1, seed=0)
    require(config.lr > 0, "--lr must be positive")
    ranks = int(os.environ.get("WORLD_SIZE", 1))               # torchrun's
    require(config.batch % ranks == 0, f"--batch {config.batch} must be a multiple of the number "
            f"of processes, {ranks}")


def plain(config):
    """A config's fields as plain values, for a checkpoint."""
    return {k: v for k, v in vars(config).items() if k != "explicit"}


def given(config):
    """['--steps', '100', '--no-decay']: the explicit flags, as a command line takes them."""
    words = []
    for name in config.explicit:
        value = getattr(config, name)
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--no-{name}"]
        else:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple)
                      else str(value)]
    return words


def flags(config):
    """'flags: --steps 100': the explicit flags, for the first lines of a run's output."""
    return f"flags: {shlex.join(given(config)) or 'none besides the preset'}"


def follow(config, script, *more, look=""):
    """Print what to look at and the command of the next stage, with the same --preset and --out."""
    same = [*("--preset", config.preset) * (config.preset != "shapes"),
            *("--out", config.out) * ("out" in config.explicit)]
    if rank() == 0:
        print(f"{look}next: `{shlex.join(['python', script, *map(str, same), *more])}`")


@contextlib.contextmanager
def one_line_errors():
    """Wraps a script's main: an error that a user can cause becomes one line and a nonzero exit."""
    try:
        yield
        if dist.is_initialized():
            wait_for_ranks()                              # rank 0 may still be writing
            dist.destroy_process_group()
    except UserError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the device is out of memory; try a smaller --batch")
    except BrokenPipeError:                               # `... | head`
        sys.exit(1)
    except OSError as error:
        sys.exit(f"error: {error.filename or 'file system'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes from the last checkpoint")


# ---------------------------------------------------------------- device, precision, randomness


PRECISIONS = dict(bf16=torch.bfloat16, fp16=torch.float16, float32=torch.float32)
# for code that takes a gradient scaler but should run without one
UNSCALED = torch.amp.GradScaler(enabled=False)


def setup(name="auto", threads=0, precision="auto"):
    """-> (device, context factory for the network's forward pass), best available unless named.

    precision: of the network's matrix products, see `precision_of`; the parameters, the loss and
    everything that accumulates stay float32.  Denormal floats are flushed to zero: they can make a
    CPU a hundred times slower and carry no information.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():       # started by torchrun
        name = join_ranks(name)
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()               # `meta` exists but has no values
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: this machine has no such device; "
                        "try --device cpu, or omit the flag") from None
    torch.set_flush_denormal(True)
    if not threads and "OMP_NUM_THREADS" not in os.environ:
        threads = min(torch.get_num_threads(), free_cores())
    if threads:
        torch.set_num_threads(threads)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)                      # where NCCL looks
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dtype = precision_of(device, precision)
    return device, lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def precision_of(device, name="auto"):
    """bf16, fp16 or float32 -> dtype; auto: bfloat16 where the device is fast at it, float16 on
    a GPU that is not (a T4), else float32."""
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def scaler(device, precision="auto"):
    """A gradient scaler, which does nothing unless the precision is float16, where small
    gradients would be rounded to zero."""
    return torch.amp.GradScaler(device.type,
                                enabled=precision_of(device, precision) == torch.float16)


def compile_parts(model, kinds, choice, device):
    """torch.compile, in place, every part of the model that is an instance of `kinds`; choice: yes,
    no, or auto: on CUDA.  Equal blocks share their code, so this takes seconds; compiling
    the whole model takes minutes."""
    if choice == "yes" or choice == "auto" and device.type == "cuda":
        for part in model.modules():
            if isinstance(part, kinds):
                part.compile()


def send(x, device):
    """A tensor -> the device; to a GPU from pinned memory, so that the CPU does not wait."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@functools.cache
def free_cores(loadavg="/proc/loadavg"):
    """How many cores other programs leave free at this moment, at least 1; all of them if unknown.

    A training step has thousands of small parallel regions, and each waits until all its threads
    have run: on two cores with two other busy processes, a step of ae.py takes .4 s with one
    thread and 12 s with two.
    """
    running = []
    for _ in range(20):                                    # "0.1 0.1 0.1 running/all last-pid"
        try:
            running.append(int(Path(loadavg).read_text().split()[3].split("/")[0]) - 1)
        except (OSError, IndexError, ValueError):          # not Linux
            return os.cpu_count() or 1
        time.sleep(0.01)
    return max(1, (os.cpu_count() or 1) - int(np.median(running)))


def cpu_has_bf16():
    """Whether this CPU multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    if sys.platform == "linux" and os.path.exists("/proc/cpuinfo"):
        return any(flag in Path("/proc/cpuinfo").read_text()
                   for flag in ("avx512_bf16", "amx_bf16"))
    return False


def describe(device, precision="auto"):
    """'cpu x 2 threads, bfloat16' and the like, for a run's first line."""
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"{device.type} x {torch.get_num_threads()} threads")
    ranks = f"{world()} x " if world() > 1 else ""
    return f"{ranks}{name}, {str(precision_of(device, precision))[6:]}"


def generator(seed, step=0, device="cpu"):
    """A generator that depends only on (seed, step), which makes resuming exact."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))


# ---------------------------------------------------------------- files


def atomic(path, write):
    """Call write(temporary path), then rename to `path`: the file is never incomplete."""
    path, temporary = Path(path), temporary_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(str(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # a full disk can raise either
        raise UserError(f"{path}: could not be written ({error}); "
                        "the previous file is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path):
    """Always the same name, so that the next run overwrites what a killed one left behind."""
    path = Path(path)
    return path.with_name(f".{path.stem}.part{path.suffix}")


def atomic_array(path, shape, dtype, fill):
    """`atomic` for an .npy file that is too large for memory: fill(array) writes into it.  All
    ranks call this at once, and each fills its part of the same array."""
    def write(temporary):
        if rank() == 0:
            np.lib.format.open_memmap(temporary, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):   # make a full disk an error, not a later crash
                with open(temporary, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
        wait_for_ranks()
        array = np.lib.format.open_memmap(temporary, "r+")
        fill(array)
        array.flush()
        wait_for_ranks()
    atomic(path, write) if rank() == 0 else write(temporary_name(path))
    wait_for_ranks()                                       # now it has its final name


def save(path, obj):
    """Write a checkpoint (a dict of tensors and plain values) atomically."""
    atomic(path, lambda temporary: torch.save(obj, temporary))


def load(path):
    """Read a checkpoint onto the CPU, never running code from it.  UserError: what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        problem = wrong_kind(file.read(512))
    if problem:
        raise UserError(f"{path}: {problem}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                        # zip and pickle errors of all kinds
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}): truncated, "
                        "corrupt, or not a checkpoint; delete it and make or download it again") \
            from None


def wrong_kind(head):
    """What is wrong with a weights file, judging by its first bytes, or None."""
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer, not the file itself; run `git lfs pull` or download it"
    if head.lstrip()[:1] == b"<":
        return "an HTML page, not the file itself (a login page?)"
    return None


def load_kind(path, kind, command):
    """`load` a checkpoint of this project; UserError if its kind or version differs."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; `{command}` makes it")
    checkpoint = load(path)
    found = checkpoint.get("kind") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if found != kind:
        raise UserError(f"{path}: contains {found or 'something else'}, not {kind}; "
                        f"`{command}` makes one")
    if checkpoint.get("version") != VERSION:
        raise UserError(f"{path}: written by version {checkpoint.get('version')} of this code, "
                        f"this is version {VERSION}; `{command} --overwrite` makes a new one")
    return checkpoint


def fingerprint(state):
    """Eight hex digits that identify the values of a state dict: a hash of its tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:8]


# ---------------------------------------------------------------- a run that can be killed

# the flags that may differ when a run is resumed
MAY_CHANGE = {"steps", "save_every", "preview_every", "keep", "device", "precision", "compile",
              "overwrite", "out", "ae", "preset"}


def resume(path, kind, config, command):
    """The checkpoint that an earlier run left at `path`, or None to start from scratch.

    Refuses one that was made with other flags: two experiments must not mix in one folder.
    """
    if not Path(path).is_file() or config.overwrite:
        return None
    checkpoint = load_kind(path, kind, command)
    mine, theirs = vars(config), checkpoint["config"]
    other = [f"--{k} {theirs[k]} (now {mine[k]})" for k in theirs
             if k in mine and k not in MAY_CHANGE and theirs[k] != mine[k]]
    if other:
        raise UserError(f"{path} was made with {', '.join(other)}; "
                        "use another --out, or --overwrite to start from scratch")
    if checkpoint["step"] >= config.steps:
        print(f"{path}: finished at step {checkpoint['step']}; "
              "--steps N trains longer, --overwrite starts from scratch")
    elif "optimizer" not in checkpoint:
        raise UserError(f"{path}: only weights, without an optimizer, so training cannot continue; "
                        "--overwrite starts from scratch")
    elif checkpoint["step"]:
        print(f"{path}: resuming from step {checkpoint['step']}")
    return checkpoint


def restore(checkpoint, parts):
    """Load what `resume` found into the parts of a run, a dict of everything that has a state."""
    for name, part in parts.items():
        if checkpoint and checkpoint.get(name):            # a scaler's is empty except in float16
            part.load_state_dict(checkpoint[name])


class Stop:
    """`with Stop() as stop:` turns Ctrl-C and SIGTERM into `stop.asked`, to be read between two
    steps, when the state is consistent; a second Ctrl-C ends the run at once."""

    def __enter__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Loop:
    """`for step in Loop(...)`: everything in a training loop but the method itself.

    Before a step it sets the learning rate.  After a step it advances the bar and, now and then,
    shows what `log` was given and checks that it is finite; calls save(step + 1) every `save_every`
    steps; and after Ctrl-C or SIGTERM saves and exits with status 130.  After 21 steps it says how
    long the rest will take.  It does not save after the last step: that is up to the code below
    the loop.

    c: a Config with steps, save_every and what `rate` reads; path: the checkpoint, for messages;
    losses: a .tsv file for the numbers that are shown, one row each time.  A resumed run continues
    the rows of the steps before it.  slower: the step from which steps take longer, if any; the
    time is announced again there.
    """

    def __init__(self, name, c, optimizer, path, save, start=0, rate=None, losses=None, slower=0):
        self.name, self.c, self.optimizer, self.path = name, c, optimizer, path
        self.slower = slower
        self.save, self.start, self.rate = save, start, rate or learning_rate
        self.finite, self.shown, self.losses, self.rows = True, {}, losses, {}
        if losses and start and Path(losses).is_file():
            before = re.finditer(r"^(\d+)\t.*", Path(losses).read_text(), re.M)
            self.rows = {int(row[1]): row[0] for row in before if int(row[1]) <= start}
        if not rate and c.warmup >= c.steps:
            print(f"warning: the learning rate still warms up when the run ends: {c.warmup} steps "
                  f"of {c.steps}; use --warmup {c.steps // 10}")

    def log(self, *finite, **shown):
        """finite: tensors that end the run if they are not finite; shown: what the bar shows,
        numbers or anything with a `str`.  Nothing here waits for the device."""
        for value in finite:
            self.finite = torch.isfinite(value.detach()).all() & self.finite
        self.shown = shown

    def __iter__(self):
        c, terminal = self.c, sys.stderr.isatty()
        bar = tqdm(range(self.start, c.steps), self.name, initial=self.start, total=c.steps,
                   dynamic_ncols=True, disable=rank() > 0, mininterval=0.5 if terminal else 15)
        with Stop() as stop:
            for step in bar:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate(c, step) * group.get("lr_scale", 1.0)
                yield step
                # several processes agree every ten steps, so that all stop at the same one
                asked = (stop.asked if world() == 1 else
                         (step + 1) % 10 == 0 and any_rank(stop.asked))
                last, saving = step + 1 == c.steps, (step + 1) % c.save_every == 0 or asked
                # waits for the device only here
                if step == 0 or (step + 1) % 50 == 0 or saving or last:
                    self.show(bar, step, saving or last)
                if step in (self.start, self.slower):     # not counted: it compiles, fills caches
                    first, began = step, time.time()
                elif step == first + 20:
                    self.forecast((time.time() - began) / 20, step + 1)
                if saving and not last:
                    self.save(step + 1)
                    if asked:
                        wait_for_ranks()      # when one rank exits, torchrun kills the others
                        print(f"\nstopped at step {step + 1}, saved in {self.path}; "
                              "the same command resumes from there")
                        sys.exit(130)

    def show(self, bar, step, saving):
        """Set the text of the bar, add a row to the table.  UserError: a loss, or a weight to be
        saved, is not finite."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not self.finite or saving and not all(p.isfinite().all() for p in weights):
            raise UserError(f"the loss is not finite at step {step}; {self.path}, if it"
                            " exists, is the last good state; try a smaller --lr")
        shown = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v
                 for k, v in self.shown.items()}
        all_reduce_mean([v for v in shown.values() if isinstance(v, torch.Tensor)])
        shown = {k: f"{v:.4f}" if isinstance(v, torch.Tensor) else str(v) for k, v in shown.items()}
        bar.set_postfix(shown)
        if self.losses and rank() == 0:
            self.write_losses(step + 1, shown)

    def write_losses(self, steps, shown):
        """Add a row to the .tsv file: the steps done and the numbers shown, `loss_1` and so on for
        those after the first of one text."""
        cells = {k if i == 0 else f"{k}_{i}": number for k, text in shown.items()
                 for i, number in enumerate(re.findall(r"-?\d+\.\d+", text))}
        self.rows[steps] = "\t".join([str(steps), *cells.values()])
        text = "\n".join(["\t".join(["step", *cells]), *self.rows.values()]) + "\n"
        atomic(self.losses, lambda path: Path(path).write_text(text))

    def forecast(self, seconds, step):
        """Print how long the steps from this one on will take, of so many seconds each, unless it
        is short; only up to the step from which they take longer."""
        changes = step < self.slower < self.c.steps
        steps = (self.slower if changes else self.c.steps) - step
        if seconds * steps > 60:
            tqdm.write(f"{self.name}: about {seconds * steps / 60:.0f} min for {steps} more steps, "
                       f"{seconds:.3g} s each"
                       + f"; then {self.c.steps - self.slower} that take longer" * changes)


class LossByTime:
    """The mean loss since it was last shown, over all t and by quarter of t: the total has a high
    floor and changes little; the quarters show more.  Only `str` waits for the device and
    all ranks."""

    def __init__(self, device):
        self.bins, self.text = torch.zeros(2, 4, device=device), "-"          # sum and count

    def add(self, losses, t):
        """losses (B,), times t (B,)"""
        quarter = (t * 4).long().clamp(max=3)
        self.bins[0].index_add_(0, quarter, losses)
        self.bins[1].index_add_(0, quarter, torch.ones_like(losses))

    def __str__(self):
        if self.bins[1].any():
            all_reduce_mean([self.bins])
            by_quarter = (self.bins[0] / self.bins[1].clamp(min=1e-6)).tolist()
            self.text = (f"{self.bins[0].sum() / self.bins[1].sum():.4f} by quarter of t "
                         + " ".join(f"{v:.3f}" for v in by_quarter))
            self.bins.zero_()
        return self.text


def learning_rate(config, step):
    """The learning rate at a step: linear warm-up, then constant or a cosine down to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    decay = 0.5 * (1 + math.cos(math.pi * step / config.steps)) if config.decay else 1.0
    return config.lr * warm * decay


# ---------------------------------------------------------------- several processes: `torchrun ...`
#
# The processes, called ranks, take the same steps on their rows of the same batch.  All of
# them draw all random numbers of a batch, so that n processes train as one would.


def join_ranks(name):
    """Join the processes that torchrun started -> the name of this one's device; only rank 0
    prints."""
    gpu = str(name).startswith("cuda") and torch.cuda.is_available()
    # torchrun ends all ranks when one dies; the timeout, longer than anything that rank 0
    # does alone, is for a rank that hangs
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(minutes=30))
    if rank():
        sys.stdout = open(os.devnull, "w")
    return f"cuda:{os.environ['LOCAL_RANK']}" if gpu else name


def rank():
    """This process's number among those that train together; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def my_rows():
    """The slice of a batch that is this rank's."""
    return slice(rank(), None, world())


def rank_rows(draw, rows, *shape, generator=None):
    """This rank's `rows` of the random numbers of a whole batch: draw((world * rows, *shape))."""
    return draw((world() * rows, *shape), generator=generator)[my_rows()]


def parallel(model):
    """The model as training calls it: with several ranks, its backward pass also averages the
    gradients over them, and sends the first ones while it computes the rest."""
    if world() == 1:
        return model
    # of parameters such as a class token (1, 1, D): harmless
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def all_reduce_mean(tensors):
    """Replace each tensor by its mean over the ranks, in place, in one message; with one rank,
    nothing changes."""
    if world() > 1 and tensors:
        message = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(message)
        parts = (message / world()).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            tensor.copy_(part.view_as(tensor))


def all_rows(x):
    """x (B, ...) of this rank -> x (world * B, ...) of all ranks."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def any_rank(flag):
    """Whether the flag is set on at least one rank.  All ranks wait for each other, but not for
    their devices."""
    if world() == 1:
        return flag
    flag = torch.tensor(float(flag))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def wait_for_ranks():
    """Returns when all ranks have called it."""
    any_rank(False)
