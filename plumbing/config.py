"""The plumbing that every stage shares: flags, device, randomness, whole files.

Nothing here knows about images, latents or models. Each training stage is one dataclass whose
fields are its flags; `field(default, "help")` gives a field its sentence for `--help`.
"""
import argparse, contextlib, dataclasses, hashlib, math, os, signal, sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

VERSION = 1                                           # of the checkpoint layout


class UserError(Exception):
    """Something the person at the keyboard can mend: printed as one line, without a traceback."""


# ---------------------------------------------------------------- flags from a dataclass


def field(default, help, choices=None):
    """A dataclass field that carries its own sentence for `--help` and, if any, its choices."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices))


def parse(cls, presets, argv=None):
    """Command line -> an instance of the dataclass `cls`; flag > preset > default.

    presets maps a name to a dict of fields. If `cls` has a field `preset`, `--preset NAME` picks
    one (the field's default otherwise); a field `out` left empty becomes `out/<preset>`.
    A typo, an abbreviation, a wrong type or an impossible choice exits with status 2.
    """
    main = sys.modules["__main__"]
    description = (getattr(main, "__doc__", None) or cls.__doc__ or "").strip()
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(cls):
        options = dict(help=f"{f.metadata.get('help', '')} (default: {f.default!r})",
                       default=argparse.SUPPRESS)          # absent = the user did not say
        kind = f.type if isinstance(f.type, type) else type(f.default)
        if kind is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, **options)
            continue
        choices = f.metadata.get("choices") or (sorted(presets) if f.name == "preset" else None)
        parser.add_argument(f"--{f.name}", type=_finite(kind), choices=choices,
                            metavar=None if choices else kind.__name__.upper(),
                            **options)
    said = vars(parser.parse_args(argv))
    names = {f.name: f.default for f in dataclasses.fields(cls)}
    preset = said.get("preset", names.get("preset"))
    values = {**(presets.get(preset) or {}), **said}
    config = cls(**values)
    config.said = sorted(k for k in said if k != "preset")   # the flags that differ from the preset
    if "out" in names and not config.out:
        config.out = f"out/{preset}"
    try:
        if hasattr(config, "check"):
            config.check()
    except ValueError as error:
        parser.error(str(error))
    return config


def _finite(kind):
    """The type itself, but a float must be a number: `--lr nan` is a typo, not a learning rate."""
    def convert(text):
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    convert.__name__ = kind.__name__
    return convert


def require(condition, message):
    """In a config's `check`: an impossible flag ends with status 2 and this message."""
    if not condition:
        raise ValueError(message)


def check_shared(config):
    """The checks on the flags that every training stage shares."""
    for name in ("steps", "batch", "save_every"):
        require(getattr(config, name) >= 1, f"--{name} must be at least 1")
    require(config.lr > 0, "--lr must be positive")
    require(config.seed >= 0, "--seed must not be negative")


@contextlib.contextmanager
def one_line_errors():
    """Wraps a script's main: what a user can cause ends in one line and a non-zero exit."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the device is out of memory; give a smaller --batch")
    except BrokenPipeError:                               # `... | head`
        sys.exit(1)
    except OSError as error:
        sys.exit(f"error: {error.filename or 'file system'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint")


# ---------------------------------------------------------------- device, precision, randomness


def setup(name="auto", threads=0):
    """-> (device, context factory for the network's forward pass), best available unless named.

    The network runs in bfloat16 where the device multiplies it fast; the parameters, the loss and
    everything that accumulates stay float32. Denormal floats are flushed: on a CPU they cost a
    hundredfold and carry nothing.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():       # started by torchrun
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
        if name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()               # `meta` exists, and holds nothing
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: this machine has no such device; "
                        "try --device cpu, or leave the flag away") from None
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = cpu_has_bf16()
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=fast)


def cpu_has_bf16():
    """Whether this CPU multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    if sys.platform == "linux" and os.path.exists("/proc/cpuinfo"):
        return any(flag in Path("/proc/cpuinfo").read_text()
                   for flag in ("avx512_bf16", "amx_bf16"))
    return False


def describe(device):
    """'cpu x 2, bfloat16' and the like, for a run's first line."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    precision = "bfloat16" if cpu_has_bf16() else "float32"
    return f"{device.type} x {torch.get_num_threads()} threads, {precision}"


def generator(seed, step=0, device="cpu"):
    """A generator that is a function of (seed, step) alone: what makes resuming exact."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))


# ---------------------------------------------------------------- files


def atomic(path, write):
    """Call write(temporary path), then rename to `path`: it appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # always the same name, so that what a killed run leaves is overwritten by the next
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write(str(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # a full disk can be either
        raise UserError(f"{path}: could not be written ({error}); "
                        "the file that was there is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


def save(path, obj):
    """Write a checkpoint (a dict of tensors and plain values) atomically."""
    atomic(path, lambda temporary: torch.save(obj, temporary))


def load(path):
    """Read a checkpoint onto the CPU, never running code from it. UserError says what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(512)
    what = wrong_kind(head)
    if what:
        raise UserError(f"{path}: {what}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                        # zip and pickle errors of all kinds
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}): truncated, "
                        "corrupt, or no checkpoint at all; delete it and make or fetch it again") \
            from None


def wrong_kind(head):
    """What the first bytes of a would-be weights file betray, or None."""
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer, not the file itself; run `git lfs pull` or download it"
    if head.lstrip()[:1] == b"<":
        return "an HTML page, not the file itself (a login page?)"
    return None


def load_kind(path, kind, maker):
    """`load` a checkpoint of this project and insist on its kind and version."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; `{maker}` makes it")
    checkpoint = load(path)
    found = checkpoint.get("kind") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if found != kind:
        raise UserError(f"{path}: holds {found or 'something else'}, not {kind}; "
                        f"`{maker}` makes one")
    if checkpoint.get("version") != VERSION:
        raise UserError(f"{path}: written by version {checkpoint.get('version')} of this code, "
                        f"this is version {VERSION}; `{maker} --overwrite` makes it anew")
    return checkpoint


def fingerprint(state):
    """Eight hex digits of a state dict's values: which weights something was made with."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:8]


# ---------------------------------------------------------------- a run that can be killed

# what may differ on resuming
FREE = {"steps", "save_every", "keep", "device", "overwrite", "out", "preset"}


def resume(path, kind, config, maker):
    """The checkpoint that an earlier run left at `path`, or None to start afresh.

    Refuses one that was made with other flags: two experiments must not mix in one folder.
    """
    if not Path(path).is_file() or config.overwrite:
        return None
    checkpoint = load_kind(path, kind, maker)
    mine, theirs = vars(config), checkpoint["config"]
    other = [f"--{k} {theirs[k]} (now {mine[k]})" for k in theirs
             if k in mine and k not in FREE and theirs[k] != mine[k]]
    if other:
        raise UserError(f"{path} was made with {', '.join(other)}; "
                        "give another --out, or --overwrite to start afresh")
    if checkpoint["step"] >= config.steps:
        print(f"{path}: finished at step {checkpoint['step']}; "
              "--steps N asks for more, --overwrite starts afresh")
    elif checkpoint["step"]:
        print(f"{path}: going on from step {checkpoint['step']}")
    return checkpoint


def plain(config):
    """A config's fields as plain values, for a checkpoint."""
    return {k: v for k, v in vars(config).items() if k != "said"}


class Stop:
    """`with Stop() as stop:` turns Ctrl-C and SIGTERM into `stop.asked`, to be looked at between
    two steps, where the state is whole; a second Ctrl-C ends at once."""

    def __enter__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def stopped(path, step):
    """The end of a run that was asked to stop, once its state is saved."""
    print(f"\nstopped at step {step}, saved in {path}; the same command goes on from there")
    sys.exit(130)


def progress(start, steps, what):
    """A progress bar with an ETA over the steps still to do; in a log file now and then."""
    return tqdm(range(start, steps), desc=what, initial=start, total=steps, dynamic_ncols=True,
                disable=rank() > 0,
                mininterval=0.5 if sys.stderr.isatty() else 15)


def rate(config, step):
    """The learning rate at a step: linear warm-up, then constant or a cosine down to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    decay = 0.5 * (1 + math.cos(math.pi * step / config.steps)) if config.decay else 1.0
    return config.lr * warm * decay


# ---------------------------------------------------------------- several GPUs: `torchrun ...`


def rank():
    """This process's number among those that train together; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average(tensors):
    """Replace each tensor by its mean over the ranks, in place; nothing to do when alone."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= world()
