# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The notebook, from its first cell to its last."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from pages import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
NOTEBOOK = ROOT / "docs" / "notebooks" / "first_steps.ipynb"


def code_cells() -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the cells leave, each run behind the other; they are plain Python, without commands of IPython."""
    found: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        for number, cell in enumerate(code_cells()):
            exec(compile(cell.source, f"{NOTEBOOK.name}, code cell {number}", "exec"), found)
    return found


def test_it_learns(names: dict[str, Any]) -> None:
    losses = {
        name: [log[name] for log in names["history"]] for name in ("text_loss", "image_loss", "consistency_loss")
    }
    assert [log["step"] for log in names["history"]] == [4, 8, 12, 16]
    assert losses["text_loss"][-1] < 0.6 * losses["text_loss"][0]
    assert losses["consistency_loss"][-1] < losses["consistency_loss"][0]


def test_it_shows_what_it_says(names: dict[str, Any]) -> None:
    assert isinstance(names["answer"], str) and names["written"].numel() > 0
    assert names["seen"].shape == (4, 3, 64, 64) and 0 <= names["seen"].min() < names["seen"].max() <= 1
    assert (names["found"].image_errors > 0).all() and names["found"].error_maps.shape == (4, 8, 8)
    assert names["sheet"].size == (256, 128) and names["gradient"] > 0
    assert Path(names["folder"], "diffusion", "unet").is_dir()


def test_it_is_stored_without_outputs() -> None:
    """So that a change of it is a change of its text."""
    assert len(code_cells()) > 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells())
