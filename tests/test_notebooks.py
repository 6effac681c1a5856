"""The notebooks run from the first to the last, and carry the outputs of such a run."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
import ray
from nbclient import NotebookClient

from capray.datasets.settings import ShapesConfig
from capray.datasets.shapes import prepare_shapes

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def outputs(cell) -> set[str]:
    """What kinds of output a cell has, standard error apart: how long a job takes decides what it says of its progress."""
    kinds = {output.output_type for output in cell.outputs if output.get("name") != "stderr"}
    return {"shown" if kind in ("display_data", "execute_result") else kind for kind in kinds}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_they_run(ray_cluster, tmp_path, monkeypatch):
    """On fewer drawings than the first draws by itself, within this Ray."""
    prepare_shapes(ShapesConfig(output=str(tmp_path / "work" / "samples"), num_images=100))
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOKS[0].parents[1]), os.environ["PYTHONPATH"]]))
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        stored = [outputs(cell) for cell in notebook.cells if cell.cell_type == "code"]
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
        assert stored == [outputs(cell) for cell in notebook.cells if cell.cell_type == "code"], path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_carry_the_outputs_of_one_run_from_top_to_bottom(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any("error" in outputs(cell) for cell in cells)
    assert max(len(cell.source.splitlines()) for cell in cells) <= 20, "few lines a cell"
