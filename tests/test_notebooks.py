"""The notebooks run from the first to the last, and carry the outputs of such a run."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from IPython.terminal.interactiveshell import TerminalInteractiveShell
from IPython.utils.capture import capture_output

from capray import demo
from capray.datasets.settings import ShapesConfig
from capray.datasets.shapes import prepare_shapes
from tests.conftest import in_process
from tests.local_executor import captioning_in_process

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def stored_outputs(cell) -> set[str]:
    """What kinds of output a cell has, standard error apart. What rich prints is "printed": progress or a table."""
    kinds = set()
    for output in cell.outputs:
        if output.get("data", {}).get("text/html", "").startswith('<pre style="white-space:pre;'):
            kinds.add("printed")
        elif output.get("name") != "stderr":
            kinds.add("shown" if output.output_type in ("display_data", "execute_result") else output.output_type)
    return kinds


@pytest.fixture
def shell():
    """A fresh IPython in this process: a kernel for each notebook would start, import and join Ray each time."""
    TerminalInteractiveShell.clear_instance()
    shell = TerminalInteractiveShell.instance()
    shell.run_line_magic("matplotlib", "inline")
    yield shell
    TerminalInteractiveShell.clear_instance()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_they_run(ray_cluster, shell, tmp_path, monkeypatch):
    """On fewer drawings than the first draws by itself, for fewer epochs, within this Ray."""
    monkeypatch.setattr(demo, "RECIPE", {**demo.RECIPE, "epochs": 2})
    prepare_shapes(ShapesConfig(output=str(tmp_path / "work" / "samples"), num_images=100))
    monkeypatch.chdir(tmp_path)
    for path in NOTEBOOKS:
        shell.reset()
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        for cell in cells:
            with shell.display_trap, in_process(), captioning_in_process(), capture_output() as captured:
                result = shell.run_cell(cell.source, store_history=True)
            result.raise_error()
            kinds = {"stream"} if captured.stdout else set()
            kinds |= {"shown"} if captured.outputs else set()
            stored = stored_outputs(cell)
            expected = stored - {"printed"}
            optional = {"stream"} if "printed" in stored else set()  # To a terminal's standard output or error.
            assert expected <= kinds <= expected | optional, f"{path.name}: {cell.source}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_carry_the_outputs_of_one_run_from_top_to_bottom(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any("error" in stored_outputs(cell) for cell in cells)
    assert max(len(cell.source.splitlines()) for cell in cells) <= 20, "few lines a cell"
