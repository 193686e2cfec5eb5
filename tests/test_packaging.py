# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The built wheel: which names it puts at the top level, and that they import where only the wheel is installed."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A copy of the project without what a working tree gathers, so that a stale build/ cannot enter the wheel.
NOT_COPIED = shutil.ignore_patterns(
    ".*", "runs", "outputs", "out", "data", "build", "dist", "*.egg-info", "__pycache__"
)


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command and return its output; on failure the assertion shows everything the command printed."""
    result = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this working tree, built without network and without touching the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_COPIED)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--wheel-dir", str(folder), ".", cwd=folder / "source")
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_only_the_public_top_level_names(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    expected = {"modeling_deem", "processing"}
    if (ROOT / "hub_upload.py").exists():
        expected.add("hub_upload.py")
    assert top_level == expected

    for package in ("modeling_deem", "processing"):
        sources = {f"{package}/{path.name}" for path in (ROOT / package).glob("*.py")}
        assert sources <= set(names), f"missing from the wheel: {sorted(sources - set(names))}"


def test_wheel_imports_from_a_clean_folder(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target))
    run(*pip, str(wheel), cwd=elsewhere)
    code = (
        "import modeling_deem, processing\n"
        "from modeling_deem import DeemConfig, DeemForConditionalGeneration\n"
        "from processing import DeemProcessor\n"
        "print(modeling_deem.__file__, processing.__file__, sep='\\n')"
    )
    places = run(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(target)).split()
    assert [Path(place).parent.parent for place in places] == [target, target]


def test_wheel_does_not_pin_torch(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    required = [line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    (torch,) = [requirement for requirement in required if re.match(r"torch\b", requirement)]
    assert ">=" in torch and "==" not in torch and "<" not in torch
