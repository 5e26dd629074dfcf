"""Copies a trained run to small files that the repository can hold; weights/shapes was made so.

    python -m lab.ship                               # out/shapes -> weights/shapes, 15 MB
    python -m lab.ship --run out/mine --to out/small

Half precision, no optimizer, and of the DiT only the averaged weights.  `load_ae` and `load_dit`
read such files like any other, but training cannot continue from them.  `made` in each file is the
command that trained it; `config` has all of its flags.
"""
from dataclasses import dataclass
from pathlib import Path

import ae, dit
from plumbing import config
from plumbing.config import field


@dataclass
class Config:
    """The flags of `python -m lab.ship`."""
    run: str = field("out/shapes", "folder of the ae.pt and dit.pt to copy")
    to: str = field("weights/shapes", "folder to write to")


PRESETS = {}
LOCAL = config.MAY_CHANGE - {"steps"}     # flags that say where and how to run, not what to train


def half(state):
    """A state dict with its floating-point tensors in float16."""
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def command(module, saved):
    """The command line that trains what a checkpoint's config, a dict, describes."""
    usual = config.parse(module.Config, module.PRESETS, ["--preset", saved["preset"]])
    if module is ae and saved["encoder"] != "auto":            # a run saves what auto has chosen
        usual.encoder = ae.choose_encoder(usual)
    usual = vars(usual)
    words = [f"python {module.__name__}.py --preset {saved['preset']}"]
    for name, value in saved.items():
        if name == "seed" or name in usual.keys() - LOCAL and value != usual[name]:
            words.append(f"--{name} {value}" if not isinstance(value, (bool, tuple)) else
                         f"--{name} {','.join(map(str, value))}" if isinstance(value, tuple) else
                         f"--{name}" if value else f"--no-{name}")
    return " ".join(words)


def ship(run, to):
    """Write to/ae.pt and to/dit.pt.  The rounded autoencoder gets a fingerprint of its own, and the
    DiT that of its new partner.  UserError: a file is missing, or the two are no pair."""
    encoder = ae.load_ae(run / "ae.pt")
    dit.check_pair(dit.load_dit(run / "dit.pt"), encoder)
    first, second = config.load(run / "ae.pt"), config.load(run / "dit.pt")
    first["model"], second["ema"] = half(first["model"]), half(second["ema"])
    encoder.load_state_dict(first["model"])
    first["fingerprint"] = second["ae_fingerprint"] = config.fingerprint(encoder.state_dict())
    second["ae_folder"] = str(to)
    left_out = {"optimizer", "scaler"}
    for name, module, saved, more in (("ae.pt", ae, first, {"gan"}),
                                      ("dit.pt", dit, second, {"model", "repa"})):
        made = command(module, saved["config"])
        saved["config"]["out"] = str(to)
        kept = {k: v for k, v in saved.items() if k not in left_out | more}
        config.save(to / name, dict(kept, made=made))
        print(f"wrote {to / name}: {(to / name).stat().st_size / 1e6:.1f} MB, made by `{made}`")


def main(argv=None):
    """The command line."""
    c = config.parse(Config, PRESETS, argv)
    ship(Path(c.run), Path(c.to))


if __name__ == "__main__":
    with config.one_line_errors():
        main()
