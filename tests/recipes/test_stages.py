# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What trains in each stage, and at which rate, is what the original's configurations trained."""

from pathlib import Path

import pytest
import torch

from modeling_deem import DeemForConditionalGeneration
from recipes import pretrain, sft
from recipes.original.names import OFFICIAL, rename
from recipes.original.sizes import deem_config
from recipes.training.defaults import parse_recipe
from recipes.training.parameter_groups import parameter_groups
from recipes.training.trainer import prepare_parts

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"
# Stage of the original -> our configuration.
STAGES = {
    "pretrain": "pretrain.yaml",
    "sft_caption": "sft_caption.yaml",
    "sft_grounding": "sft_grounding.yaml",
    "sft_vqa": "sft_vqa.yaml",
    "sft_referring": "sft_region.yaml",
}


def ours(config_file: str, source: dict) -> tuple[DeemForConditionalGeneration, dict[str, tuple[float, float]]]:
    """The tiny model as a stage's configuration prepares it; learning rate and decay of what trains."""
    recipe = pretrain if config_file.startswith("pretrain") else sft
    flags = ["--config", str(CONFIGS / config_file), "--use_cpu", "true"]
    _, _, _, args = parse_recipe(recipe.ARGUMENTS, recipe.CONFIG, flags)
    with torch.device("meta"):
        model = DeemForConditionalGeneration(deem_config(source, use_region_tokens=config_file == "sft_region.yaml"))
    prepare_parts(model, args)
    groups = parameter_groups(model, args.groups, args.learning_rate, args.weight_decay)
    return model, {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


@pytest.mark.parametrize("stage", STAGES)
def test_groups_are_those_of_the_original(stage, shared_file):
    source = {k: v for k, v in shared_file("golden/config.json").items() if k not in ("requires_grad", "frozen")}
    model, setting = ours(STAGES[stage], source)
    theirs = {
        rename(name, OFFICIAL): (group["lr"], group["weight_decay"])
        for group in shared_file("golden/param_groups.json")[stage]
        for name in group["names"]
    }
    names = {name for name, _ in model.named_parameters()}
    theirs = {name: value for name, value in theirs.items() if name in names}
    if stage == "sft_referring":  # with the text loss alone nothing of the image decoder has a gradient
        theirs = {name: value for name, value in theirs.items() if not name.startswith("image_decoder.")}
    assert set(theirs) == set(setting) and len(setting) > 150
    # The original decays its own RMSNorm's weights and the head's new rows; here norms and a head with fixed rows do not.
    norms = {name for name, module in model.named_modules() if "RMSNorm" in type(module).__name__}
    spared = {f"{name}.weight" for name in norms} | {"lm_head.weight"}
    for name, (rate, decay) in setting.items():
        assert rate == theirs[name][0], name
        assert decay == (0.0 if name in spared else theirs[name][1]), name
    assert {theirs[name][1] for name in spared & set(theirs)} == {0.05}


def test_in_the_later_stages_only_new_rows_of_the_head_train(shared_file):
    source = {k: v for k, v in shared_file("golden/config.json").items() if k not in ("requires_grad", "frozen")}
    for config_file in ("sft_vqa.yaml", "sft_region.yaml"):
        model, setting = ours(config_file, source)
        assert model.lm_head.first_new_row == source["special_token_dict"]["soi_token_id"]
        assert setting["lm_head.weight"] == (1e-5, 0.0)
        assert all(parameter.requires_grad for parameter in model.model.language_model.parameters())
