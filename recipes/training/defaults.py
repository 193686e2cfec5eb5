# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Defaults of a training recipe without options: its configuration file, small parts, data of the synthetic world."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers import PreTrainedConfig
from trl import TrlParser

from modeling_deem import DeemConfig, DeemImageDecoderConfig, DeemPerceiverConfig
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers import write_formats

WORLD = Path("runs/world")
PARTS = Path("runs/parts")
NUM_IMAGES = 2500  # per format
SIZE = 64
# Where write_formats puts a format.
FOLDERS = {"mmc4": "mmc4_annts"} | {
    name: name for name in ("captions", "vqa", "karpathy", "refcoco", "vg", "coco", "osprey", "refcoco_masks", "chats")
}
WITH_MAPPING = ("--config=", "--model_config=")
NUM_HELD_OUT = 200  # images, per format


def parse_recipe(dataclasses: Sequence[type], config: Path, args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse flags over a YAML file: the one that `--config` names, else `config`. Returns one object per dataclass.

    Args:
        dataclasses: one per group of options.
        config: the recipe's built-in default.
        args: command line without the program's name; that of the process by default.

    Raises:
        ValueError: a flag or key is unknown (the message offers near names), or the configuration file does not exist.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not any(arg == "--config" or arg.startswith("--config=") for arg in args):
        args = ["--config", str(config), *args]
    args = [piece for arg in args for piece in (arg.split("=", 1) if arg.startswith(WITH_MAPPING) else [arg])]
    named = {arg.split("=", 1)[0] for arg in args}
    if "--dry_run" in named and "--use_cpu" not in named:
        args += ["--use_cpu", "true"]  # a plan touches no device, and a machine without a GPU refuses bf16 otherwise
    file = Path(args[args.index("--config") + 1]) if args[-1] != "--config" else None
    if file is None or not file.is_file():
        raise ValueError(f"--config names {str(file) if file else 'nothing'}: expected a YAML file that exists.")
    args = _merge_model_config(args, file)
    # allow_abbrev: a flag that is not known must not be taken for another that begins like it
    parser = TrlParser(dataclasses, allow_abbrev=False)
    *parsed, unknown = parser.parse_args_and_config(args, return_remaining_strings=True)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        names = [word for word in unknown if word.startswith("--")] or unknown
        near = {name: get_close_matches(name.split("=")[0], known, n=3) for name in names}
        hints = "; ".join(
            f"{name} (did you mean {' or '.join(close)}?)" if close else name for name, close in near.items()
        )
        raise ValueError(f"Unknown flags, or keys of {file}: {hints}. See --help for all options.")
    return tuple(parsed)


def _merge_model_config(args: list[str], file: Path) -> list[str]:
    """Return the flags with `--model_config` merged into that of the configuration file.

    With `--model`, the fields of a file that names no checkpoint, which are those of a composition, are left out.
    """
    at = args.index("--model_config") + 1 if "--model_config" in args[:-1] else 0
    loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    base = (loaded.get("model_config") if isinstance(loaded, dict) else None) or {}
    if any(arg == "--model" or arg.startswith("--model=") for arg in args) and "model" not in loaded:
        base = {}
        if not at:
            return [*args, "--model_config", "{}"] if "model_config" in loaded else args
    return [*args[:at], json.dumps(merge(base, model_fields(args[at]))), *args[at + 1 :]] if at else args


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`, mappings within them merged alike."""
    both = {key: merge(base[key], changes[key]) for key in base.keys() & changes.keys() if isinstance(base[key], dict)}
    return {**base, **changes, **both}


def model_fields(given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """Return `--model_config` as a mapping.

    Raises:
        ValueError: it is no mapping, or names a field that DeemConfig or a configuration within it lacks; the message
            offers near ones.
    """
    if given is None:
        return None
    try:
        fields = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        fields = given
    if not isinstance(fields, dict):
        raise ValueError(f"--model_config {given} is no mapping: give JSON such as '{{\"image_loss_weight\": 0}}'.")
    _check_fields(fields, DeemConfig, "")
    return fields


def _check_fields(fields: dict[str, Any], config: type[PreTrainedConfig], within: str) -> None:
    known = [name for name in config.__dataclass_fields__ if not hasattr(PreTrainedConfig, name)]
    nested = {"perceiver_config": DeemPerceiverConfig, "image_decoder_config": DeemImageDecoderConfig}
    for name, value in fields.items():
        if name not in config.__dataclass_fields__:
            near = get_close_matches(name, known, n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(sorted(known))}."
            if name == "image_size":
                hint = "The size of images is the processor's: give --image_size."
            raise ValueError(f"--model_config has no field {within}{name}. {hint}")
        if name in nested and isinstance(value, dict):
            _check_fields(value, nested[name], f"{within}{name}.")


def default_data(*formats: str, held_out: bool = False) -> list[str]:
    """Return the folders of world data in the named formats below runs/world, made where missing.

    Args:
        formats: of `FOLDERS`.
        held_out: images that are never trained on, in a folder of their own.
    """
    world = WORLD / "held_out" if held_out else WORLD
    number = NUM_HELD_OUT if held_out else NUM_IMAGES
    with PartialState().main_process_first():  # of several processes one makes it, and the others find it
        for name in formats:
            # scenes of its own for each format, all below HELD_OUT unless asked for
            start = number * list(FOLDERS).index(name) + held_out * HELD_OUT
            if not (world / FOLDERS[name]).exists():
                print(f"Making {number} images of the synthetic world as {world / FOLDERS[name]}")
                _make_format(name, world, number, start)
    return [str(world / FOLDERS[name]) for name in formats]


def _make_format(name: str, world: Path, number: int, start: int) -> None:
    """Write one format of the world; it appears below `world` once it is whole."""
    unfinished = WORLD.with_name(f"{WORLD.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_formats(unfinished, World(size=SIZE), number, start, "medium", [name])
    world.mkdir(parents=True, exist_ok=True)
    # The folder that `default_data` looks for comes last: if it exists, the format is whole.
    for made in sorted(unfinished.iterdir(), key=lambda path: path.name == FOLDERS[name]):
        target = world / made.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(made, target)
    unfinished.rmdir()


def default_parts() -> tuple[str, str, str]:
    """Return the folders of vision encoder, language model and diffusion pipeline below runs/parts, trained where missing.

    Raises:
        subprocess.CalledProcessError: their training fails.
    """
    folders = [PARTS / name for name in ("vision", "text", "diffusion")]
    with PartialState().main_process_first():
        if not all(folder.is_dir() for folder in folders):
            # In a process of its own, so that its seed, threads and memory do not matter to the training that follows.
            command = [sys.executable, str(Path(__file__).parents[1] / "parts.py"), "--out", str(PARTS)]
            subprocess.run(command, check=True)
    vision, text, diffusion = map(str, folders)
    return vision, text, diffusion
