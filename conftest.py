"""Fixtures of the three test files."""
import os, re

import pytest
import torch

from plumbing.testing import ROOT, picture, run, serve  # noqa: F401 (a fixture)

os.environ["OMP_NUM_THREADS"] = "1"      # small tensors: a second thread only waits
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder where the README's first command has run, on `--preset debug`."""
    folder = tmp_path_factory.mktemp("work")
    first = next(line for line in (ROOT / "README.md").read_text().splitlines()
                 if line.startswith("pip install"))
    scripts = re.findall(r"python (\w+\.py)", first)
    assert scripts == ["ae.py", "dit.py", "sample.py"]
    for command in scripts:
        result = run(command, "--preset", "debug", cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def folder(tmp_path):
    """Two classes of pictures of several kinds."""
    for name in ("cats", "d\u00f6gs"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            suffix = ("jpg", "png", "webp")[i % 3]
            picture(tmp_path / "pictures" / name / f"{i:02d}.{suffix}")
    return tmp_path / "pictures"
