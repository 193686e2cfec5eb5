# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every shipped YAML parses with the parser of its recipe; what is not known is refused by name."""

from pathlib import Path

import pytest

from recipes import pretrain, sft
from recipes.data.sources import DataArguments
from recipes.defaults import parse_recipe
from recipes.trainer import DeemTrainingArguments

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "recipes" / "configs").glob("*.yaml"))


def parse(recipe, *args):
    return parse_recipe((recipe.ModelArguments, DataArguments, DeemTrainingArguments), recipe.CONFIG, args)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_parses_and_says_how_to_launch_it(config):
    recipe = sft if config.name.startswith("sft") else pretrain
    # --use_cpu: bf16 is refused on a machine without a GPU otherwise
    _, data, training = parse(recipe, "--config", str(config), "--use_cpu", "true")
    assert training.max_steps > 0 and training.freeze and isinstance(training.groups, dict)
    assert all(isinstance(value, float) for group in training.groups.values() for value in group.values())
    assert training.accelerator_config.dispatch_batches is False and training.remove_unused_columns is False
    text = config.read_text()
    assert text.startswith("#") and f"recipes/{recipe.__name__.split('.')[-1]}.py --config" in text
    assert (data.pack_length == 0) == (recipe is sft)


def test_without_config_the_default_holds_and_flags_override_it():
    model, data, training = parse(pretrain, "--data", "a", "b/*.tar", "--max_steps", "20", "--freeze", "model.lm_head")
    assert data.data == ["a", "b/*.tar"] and training.max_steps == 20 and training.freeze == ["model.lm_head"]
    assert model.num_image_tokens == 8 and training.warmup_steps == 50
    assert parse(pretrain, "--groups", '{"gate": {"lr": 0.5}}')[2].groups == {"gate": {"lr": 0.5}}


def test_unknown_flag_names_near_ones():
    with pytest.raises(ValueError, match=r"--max_step \(did you mean --max_steps"):
        parse(pretrain, "--max_step", "3")


def test_unknown_key_in_a_file_names_near_ones(tmp_path):
    (tmp_path / "mine.yaml").write_text("pack_lenght: 12\n")
    with pytest.raises(ValueError, match=r"--pack_lenght \(did you mean --pack_length"):
        parse(sft, f"--config={tmp_path / 'mine.yaml'}")


@pytest.mark.parametrize("args", [["--config"], ["--config", "nowhere.yaml"]])
def test_missing_config_file(args):
    with pytest.raises(ValueError, match="expected a YAML file that exists"):
        parse(pretrain, *args)


@pytest.mark.parametrize(
    "args, message",
    [(["--vision", "v"], "--text and --diffusion missing"), (["--model", "m", "--text", "t"], "three parts")],
)
def test_what_to_start_from_must_be_whole(args, message):
    with pytest.raises(ValueError, match=message):
        parse(pretrain, *args)
