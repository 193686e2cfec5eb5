# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The built wheel: which names it puts at the top level, and that they import where only the wheel is installed."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import transformers
from deem_fixtures import tiny_model

from processing import DeemProcessor

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


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel is installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder))
    run(*pip, str(wheel), cwd=folder.parent)
    return folder


def test_the_training_script_of_the_readme_needs_the_wheel_alone(
    site: Path, tiny_processor: DeemProcessor, tmp_path: Path
) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Train on your own rows\n")[1]
    snippet = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len(snippet.splitlines()) <= 15
    tiny_model().save_pretrained(tmp_path / "deem")
    tiny_processor.save_pretrained(tmp_path / "deem")
    without_clone = f"import sys\nsys.path = [place for place in sys.path if place != {str(ROOT)!r}]\n"
    imported = "print('FROM', *(sys.modules[name].__file__ for name in ('modeling_deem', 'processing')), sep='\\n')\n"
    environment = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = run(sys.executable, "-c", without_clone + snippet + imported, cwd=tmp_path, **environment)
    said, _, places = output.partition("FROM\n")
    assert [Path(place).parent.parent for place in places.split()] == [site, site]
    assert "A card:" in said.splitlines()[-1]
    logs = json.loads((tmp_path / "mine" / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]
    losses = [[log[name] for name in ("text_loss", "image_loss", "consistency_loss")] for log in logs if "loss" in log]
    assert len(losses) == 10 and all(value > 0 for row in losses for value in row) and losses[-1][0] < losses[0][0]
    assert "use_cache" not in json.loads((tmp_path / "mine" / "config.json").read_text())


def test_wheel_does_not_pin_torch(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    required = [line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    (torch,) = [requirement for requirement in required if re.match(r"torch\b", requirement)]
    assert ">=" in torch and "==" not in torch and "<" not in torch


def test_wheel_bounds_transformers_from_above(wheel: Path) -> None:
    """Private methods of transformers are overridden: docs/upgrading.md lists what to check with a new version."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    (bounds,) = re.findall(r"^Requires-Dist: transformers(.*)$", metadata, re.MULTILINE)
    assert "<" in bounds


@pytest.mark.parametrize("name", ["Trainer", "PreTrainedModel", "GenerationMixin", "ProcessorMixin"])
def test_what_the_package_overrides_is_still_there(name: str) -> None:
    """Every name in the tables of docs/upgrading.md belongs to the class that the table is about."""
    section = (ROOT / "docs" / "upgrading.md").read_text(encoding="utf-8").split(f"## `transformers.{name}`\n")[1]
    table = re.findall(r"^\| (`.*?) \|", section.split("\n## ")[0], re.MULTILINE)
    names = re.findall(r"`(\w+)`", " ".join(table))
    owner = getattr(transformers, name)
    source = Path(inspect.getfile(owner)).read_text(encoding="utf-8")
    assert names and not [one for one in names if not hasattr(owner, one) and f"self.{one} =" not in source]
