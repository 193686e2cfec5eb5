# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The notebook, from its first cell to its last, in a kernel as Jupyter starts one."""

import ast

import nbformat
import pytest
from nbclient import NotebookClient
from pages import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "first_steps.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        folder = str(tmp_path_factory.mktemp("notebook"))
        return NotebookClient(notebook, timeout=240, resources={"metadata": {"path": folder}}).execute()


def printed(notebook: nbformat.NotebookNode, start: str) -> str:
    """What the cell that begins with `start` prints."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(start)]
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def test_it_runs_and_learns(executed: nbformat.NotebookNode) -> None:
    lines = printed(executed, "from transformers import TrainingArguments").splitlines()
    logged = [line.split(" ", 1) for line in lines if line[:1].isdigit()]
    losses = [ast.literal_eval(rest)["text_loss"] for _, rest in logged]
    assert [int(step) for step, _ in logged] == [4, 8, 12, 16] and losses[-1] < 0.6 * losses[0]
    assert "(4, 3, 64, 64)" in printed(executed, "images = [row")
    assert float(printed(executed, "loss = model").split()[-1]) > 0


def test_it_is_stored_without_outputs() -> None:
    """So that a change of it is a change of its text."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)
