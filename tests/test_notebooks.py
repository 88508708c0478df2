"""The notebooks run from top to bottom, offline, and lie in the repository without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT = 1800  # seconds for one cell: it ends a hang, and judges no speed


def test_all_are_here():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    notebook = nbformat.read(path, as_version=4)
    named = {
        part.split(")")[0]
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for part in cell.source.split("](")[1:]
    }
    assert all((FOLDER / name).exists() for name in named if not name.startswith("http"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# The client tells that it talks to its own kernel over a local socket in the clear.
@pytest.mark.filterwarnings("ignore:.*without encryption.*")
def test_runs_and_draws(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel draws into the notebook
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources=where).execute()
    drawn = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert drawn
    said = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in said if o.output_type == "error"]
    stderr = "".join(o.text for o in said if o.output_type == "stream" and o.name == "stderr")
    # One shows what a store warns of that is not complete. Bars are drawn there, too.
    assert "Warning" not in stderr.replace("IncompleteStoreWarning", "")
