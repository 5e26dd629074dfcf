"""exercises/tour.ipynb: it runs, and it is committed with its images."""
import base64, io

import nbformat
from nbclient import NotebookClient
from PIL import Image

from plumbing.testing import ROOT

TOUR = ROOT / "exercises" / "tour.ipynb"


def cells(notebook):
    """The code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(cell):
    """The PNGs that a cell shows."""
    data = [output.get("data", {}).get("image/png") for output in cell.outputs]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in data if png]


def test_the_tour_is_committed_with_its_outputs_and_short():
    notebook, code = nbformat.read(TOUR, 4), cells(nbformat.read(TOUR, 4))
    assert TOUR.stat().st_size < 1.5e6 and len(code) == 15
    assert [cell.execution_count for cell in code] == list(range(1, 16))
    assert all(len(images(cell)) == 1 for cell in code[1:]) and code[0].outputs
    assert all(len(cell.source.splitlines()) <= 13 for cell in code)
    assert [c.cell_type for c in notebook.cells] == ["markdown", "code"] * 15
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert not any("image/jpeg" in o.get("data", {}) for cell in code for o in cell.outputs)


def test_the_tour_runs_from_top_to_bottom_in_its_own_folder_and_leaves_nothing_there():
    notebook, before = nbformat.read(TOUR, 4), sorted(TOUR.parent.iterdir())
    sizes = [[image.size for image in images(cell)] for cell in cells(notebook)]
    for cell in cells(notebook):
        cell.outputs = []
    where = {"metadata": {"path": str(TOUR.parent)}}
    NotebookClient(notebook, timeout=600, resources=where).execute()          # raises on an error
    assert [[image.size for image in images(cell)] for cell in cells(notebook)] == sizes
    assert {p for p in TOUR.parent.iterdir() if p.name != "__pycache__"} <= {*before}
