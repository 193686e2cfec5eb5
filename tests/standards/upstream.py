# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""transformers' own test mixins, imported from a folder that holds its `tests` (see `make standards`).

The source distribution of transformers carries the mixins but not all that they import. What is missing is stood in for
by empty classes, so that the rest can run; `MISSING` says what. A clone of the repository has everything.
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL.Image

# `make standards` names the folder; `make test` leaves the mixins out, wherever they are.
FOLDER = Path(os.environ.get("TRANSFORMERS_TESTS", "transformers-tests")).resolve()


def local_picture(url: str) -> str:
    """A picture of noise in place of one on the net; other media stay where they are."""
    if not url.endswith((".png", ".jpg")):
        return url
    path = Path(tempfile.gettempdir(), f"deem_standards_{os.getuid()}_{url.rsplit('/', 1)[1]}")
    if not path.is_file():
        pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(path)
    return str(path)


# Modules that the mixins import and the source distribution leaves out: their files beside the folder's parent, and the
# names that are needed of them.
STAND_INS = {
    "tests.exporters.test_export": {
        "ExportTesterMixin": type("ExportTesterMixin", (), {}),
        "ExportGenerateTesterMixin": type("ExportGenerateTesterMixin", (), {}),
    },
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
    "utils.fetch_hub_objects_for_ci": {"url_to_local_path": local_picture},
}
MISSING = [name for name in STAND_INS if not Path(FOLDER, "..", *name.split(".")).with_suffix(".py").is_file()]


def why_absent() -> str | None:
    """What keeps the mixins from being imported, or None."""
    if not (FOLDER / "test_modeling_common.py").is_file():
        return f"transformers' tests are not in {FOLDER}: `make standards` downloads them and names their folder"
    if not (FOLDER / "__init__.py").is_file():
        return f"{FOLDER} has no __init__.py, which transformers' ConfigTester looks for: add an empty one"
    try:
        importlib.import_module("parameterized")
    except ImportError:
        return "transformers' tests need the package parameterized: run `make standards`"
    return None


def load(name: str) -> ModuleType:
    """A module of transformers' `tests`, by the name it has there."""
    if "tests" not in sys.modules or list(getattr(sys.modules["tests"], "__path__", [])) != [str(FOLDER)]:
        package = ModuleType("tests")
        package.__path__, package.__file__ = [str(FOLDER)], str(FOLDER / "__init__.py")
        sys.modules["tests"] = package
        for name_there in MISSING:
            # transformers puts its `utils` on the path; the tests are a package.
            parent, _, child = name_there.rpartition(".")
            full_name = name_there if parent.startswith("tests") else child
            if parent.startswith("tests.") and parent not in sys.modules:
                sys.modules[parent] = ModuleType(parent)
                sys.modules[parent].__path__ = [str(FOLDER / parent.split(".")[1])]
            sys.modules[full_name] = ModuleType(full_name)
            vars(sys.modules[full_name]).update(STAND_INS[name_there])
    return importlib.import_module(f"tests.{name}")
