"""The paper's sizes on a stand-in: the first steps of `--preset imagenette` on photographs.

Its weights and images cannot be had without a download.  So ViT-S/16+ and LPIPS get random weights
in their published layouts, and ten classes of Tiny ImageNet are enlarged to 256 px.  This shows
that both stages run at these sizes, that their losses fall, and what they cost; nothing about
quality.

    python -m lab.standin --stage ae --steps 12 --batch 2      # a shared CPU core: 12-18 min
    python -m lab.standin --stage dit --steps 20 --batch 4     # 4 min; after the first
    python -m lab.standin --stage ae --steps 300 --batch 32    # on a GPU; not run

Adds a row to results/standin.tsv.
"""
import sys, time
from dataclasses import dataclass
from pathlib import Path

import torch

import ae, dit
from dino import SIZES, DINOv3
from lab.evidence import Table
from plumbing import config
from plumbing.config import field
from plumbing.lpips import LPIPS


@dataclass
class Config:
    """One stage of the stand-in."""
    stage: str = field("ae", "ae or dit", ("ae", "dit"))
    data: str = field("tiny-imagenet", "photographs: a folder or the name of a data set")
    classes: str = field("easy-ten", "only these classes")
    images: int = field(200, "training images")
    steps: int = field(12, "optimizer steps; the GAN joins halfway")
    batch: int = field(2, "images per step")
    size: int = field(256, "side of an image in pixels")
    out: str = field("out/standin", "folder of the weights and models")
    results: str = field("results", "folder of the table")

    def check(self):
        """ValueError for impossible values."""
        config.at_least(self, steps=2, batch=1, images=2)


def table(folder):
    """results/standin.tsv; before, after: L1 of stage 1, the loss of stage 2, first and last."""
    return Table(folder, "standin", "stage device taken batch", "before after seconds gigabytes")


def random_encoder(path):
    """A file of random weights in Meta's layout of ViT-S/16+, seed 0, unless it is there -> path"""
    if not path.is_file():
        torch.manual_seed(0)
        state = DINOv3(SIZES["vits16plus"]).state_dict()
        config.atomic(path, lambda part: torch.save(state, part))
    return path


def gigabytes(device):
    """The most memory that was used at once: of the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource                                                  # Windows has no such module
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def run(c):
    """Train one stage from scratch -> its row, a dict."""
    stage, out = dict(ae=ae, dit=dit)[c.stage], Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    flags = ["--preset", "imagenette", "--overwrite", "--out", out, "--steps", c.steps, "--batch",
             c.batch, "--save_every", c.steps]
    if c.stage == "ae":
        flags += ["--data", c.data, "--classes", c.classes, "--images", c.images, "--size", c.size,
                  "--encoder", random_encoder(out / "vits16plus.pth"), "--gan_start", c.steps // 2]
        ae.load_lpips = lambda device: LPIPS().to(device)                # random, as the encoder
    else:
        flags += ["--no-cache", "--preview_every", c.steps]
    device, took, log = config.setup("auto")[0], [], config.Loop.log

    def timed(loop, *finite, **shown):
        took.append(time.time())
        log(loop, *finite, **shown)
    config.Loop.log = timed
    try:
        stage.main([*map(str, flags)])
    finally:
        config.Loop.log = log
    lines = [line.split("\t") for line in (out / f"{c.stage}.tsv").read_text().splitlines()[1:]]
    first, last = (float(line[1].split()[0]) for line in (lines[0], lines[-1]))
    return dict(stage=c.stage, device=config.describe(device), taken=c.steps, batch=c.batch,
                before=first, after=last, gigabytes=gigabytes(device),
                seconds=(took[-1] - took[0]) / (c.steps - 1))


def main(argv=None):
    """The command line."""
    c = config.parse(Config, {}, argv)
    table(c.results).add(**run(c))


if __name__ == "__main__":
    with config.one_line_errors():
        main()
