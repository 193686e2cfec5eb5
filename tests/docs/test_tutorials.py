# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every tutorial from top to bottom on tiny parts, and what it promises."""

import os
from pathlib import Path

import pytest
from pages import ROOT, run_page
from reader_material import save_material

pytestmark = pytest.mark.usefixtures("one_thread")
TUTORIALS = ROOT / "docs" / "tutorials"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    save_material(folder)
    return folder


@pytest.fixture
def home(material: Path, tmp_path: Path) -> Path:
    """A reader's folder: the material by its names, and nothing else."""
    for part in material.iterdir():
        os.symlink(part, tmp_path / part.name)
    return tmp_path


def test_own_images(home):
    run_page(TUTORIALS / "own_images.md", home)
