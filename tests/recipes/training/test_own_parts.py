# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/pretrain.py with parts of one's own: sizes, image size, and what trains without `--config`."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoProcessor

from recipes import pretrain
from recipes.parts import PartsArguments, make_parts
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_formats

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"num_pictures": 16, "num_texts": 40, "num_held_out": 8, "steps_scale": 0.004}


def test_image_size_sizes_and_what_trains(tmp_path, monkeypatch):
    folders = dict(zip(("vision", "text", "diffusion"), make_parts(PartsArguments(out=str(tmp_path), **TINY)), strict=True))  # fmt: skip
    write_formats(tmp_path / "world", World(size=64), 8, formats=["captions"])

    def run(name: str, **options) -> Path:
        flags = {**folders, "data": tmp_path / "world" / "captions", "output_dir": tmp_path / name, "max_steps": 1}
        flags |= {"num_image_tokens": 8, "report_to": "none", "use_cpu": "true", "save_strategy": "no", **options}
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *(f"--{key}={value}" for key, value in flags.items())])
        pretrain.main()
        return tmp_path / name

    small = run("small", image_size=128, model_config='{"perceiver_config": {"num_hidden_layers": 1}}')
    config, processor = AutoConfig.from_pretrained(small), AutoProcessor.from_pretrained(small)
    assert (config.perceiver_config.num_hidden_layers, config.perceiver_config.hidden_size) == (1, 128)
    assert processor(text="<image>", images=World().scene(0).image, return_tensors="pt").pixel_values.shape[-1] == 128
    assert json.loads((small / "parts.json").read_text())["language_model"]["frozen"] == 0

    for folder in folders.values():  # as if another had made them
        Path(folder, "training.json").unlink()
    own = run("own")
    assert config.position_grid_side == 2 * AutoConfig.from_pretrained(own).position_grid_side
    parts = json.loads((own / "parts.json").read_text())
    assert parts["language_model"]["trainable"] == parts["image_decoder.denoiser"]["trainable"] == 0
    assert parts["perceiver"]["trainable"] > 0
