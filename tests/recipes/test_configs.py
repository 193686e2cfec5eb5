# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every shipped YAML parses with the parser of its recipe and has a plan; what is not known is refused by name."""

import sys
from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file
from deem_fixtures import tiny_config, tiny_model
from transformers.training_args import OptimizerNames

from recipes import pretrain, sft, sft_trl
from recipes.training.defaults import parse_recipe
from recipes.training.plan import STRATEGIES, memory, unit_bytes
from recipes.training.run import planned_config
from recipes.training.trainer import prepare_parts

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "configs").glob("*.yaml"))


def parse(recipe, *args):
    return parse_recipe(recipe.ARGUMENTS, recipe.CONFIG, args)


def recipe_of(config: Path):
    if config.name.startswith("sft_trl"):
        return sft_trl
    return sft if config.name.startswith("sft") else pretrain


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_parses_and_says_how_to_launch_it(config):
    recipe = recipe_of(config)
    # --use_cpu: bf16 is refused on a machine without a GPU otherwise
    *parsed, training = parse(recipe, "--config", str(config), "--use_cpu", "true")
    assert training.max_steps > 0 and training.freeze and isinstance(training.groups, dict)
    assert all(isinstance(value, float) for group in training.groups.values() for value in group.values())
    assert training.accelerator_config.dispatch_batches is False and training.remove_unused_columns is False
    text = config.read_text()
    script = f"recipes/{recipe.__name__.split('.')[-1]}.py --config"
    assert text.startswith("#") and script in text and ("accelerate launch" in text or "torchrun" in text)
    if recipe is not sft_trl:  # which reads rows of its own, never packed
        packed = recipe is pretrain or config.stem in ("sft_grounding", "sft_grounding_single_gpu")
        assert (parsed[2].pack_length > 0) == packed


ACCELERATE = sorted((CONFIGS[0].parent / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("config", ACCELERATE, ids=lambda path: path.name)
def test_every_accelerate_config_is_read_by_accelerate(config):
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(config.stem, "DEEPSPEED")
    read = load_config_from_file(str(config))
    assert read.distributed_type.value == kind and read.num_processes == 8 and read.mixed_precision == "bf16"
    if kind == "DEEPSPEED":
        assert f"zero{read.deepspeed_config['zero_stage']}" == config.stem
    text = config.read_text()
    assert text.startswith("#") and f"--config_file recipes/configs/accelerate/{config.name}" in text


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_has_a_plan(config, tmp_path, monkeypatch, capsys):
    recipe = recipe_of(config)
    flags = ["--config", str(config), "--max_steps", "0", "--dry_run"]
    flags += ["--output_dir", str(tmp_path / "run")]
    if config.name.endswith("_cpu.yaml"):  # what its parts or checkpoint will be is not known before they are trained
        tiny_config().save_pretrained(tmp_path / "deem")
        flags += ["--model", str(tmp_path / "deem")]
    monkeypatch.setattr(sys, "argv", ["recipe", *flags])
    recipe.main()
    plan = capsys.readouterr().out
    official = not config.name.endswith("_cpu.yaml")
    assert ("6,607,368,192" in plan) == official  # the language model's parameters
    assert "GB, estimated " in plan and "without activations" in plan
    assert "steps       0" in plan and all(f"{strategy} " in plan for strategy in STRATEGIES)
    assert not (tmp_path / "run").exists()
    if (
        config.name.endswith("_single_gpu.yaml") or config.name == "sft_trl.yaml"
    ):  # 24 GB, of which activations need some
        assert float(plan.split("DDP")[1].split()[3]) < 22


def test_a_plan_without_sizes_says_what_to_give():
    with pytest.raises(ValueError, match="A plan needs sizes.*--sizes, one of official-7b"):
        planned_config("runs/nowhere", None, None)


def test_memory_of_each_rank():
    model = tiny_model()
    args = parse(pretrain, "--freeze", "model.language_model", "image_decoder", "--bf16", "true")[3]
    prepare_parts(model, args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert memory(model, args, "DDP", 2) == {
        "parameters": 4 * total,
        "gradients": 8 * trained,
        "optimizer": 8 * trained,
    }
    assert memory(model, args, "ZeRO-1", 4) == {
        "parameters": 2 * total + trained,
        "gradients": 2 * trained,
        "optimizer": 2 * trained,
    }
    sharded = memory(model, args, "FSDP2", 4)
    assert sharded["gradients"] == trained and sharded["optimizer"] == 2 * trained
    units = unit_bytes(model)
    assert sum(units) == 4 * total and sharded["parameters"] == total + 2 * max(units)
    args.frozen_dtype = "bfloat16"
    prepare_parts(model, args)
    vae = sum(p.numel() for p in model.image_decoder.vae.parameters())
    assert memory(model, args, "DDP", 1)["parameters"] == 4 * (trained + vae) + 2 * (total - trained - vae)
    with pytest.raises(ValueError, match="'adagrad' is not known"):
        args.optim = OptimizerNames.ADAGRAD
        memory(model, args, "DDP", 1)


def test_without_config_the_default_holds_and_flags_override_it():
    model, _, data, training = parse(
        pretrain, "--data", "a", "b/*.tar", "--max_steps", "20", "--freeze", "model.lm_head"
    )
    assert data.data == ["a", "b/*.tar"] and training.max_steps == 20 and training.freeze == ["model.lm_head"]
    assert model.num_image_tokens == 8 and training.output_dir == "runs/pretrain"
    assert parse(pretrain, "--groups", '{"gate": {"lr": 0.5}}')[3].groups == {"gate": {"lr": 0.5}}


def test_fields_of_the_model_are_merged_into_the_file_and_checked(tmp_path):
    default = parse(pretrain)[0].model_config
    for flags in (["--model_config", '{"perceiver_config": {"num_hidden_layers": 1}, "text_loss_weight": 2}'],
                  ['--model_config={"perceiver_config": {"num_hidden_layers": 1}, "text_loss_weight": 2}']):  # fmt: skip
        merged = parse(pretrain, *flags)[0].model_config
        expected = {**default, "text_loss_weight": 2}
        assert merged == {**expected, "perceiver_config": {**default["perceiver_config"], "num_hidden_layers": 1}}
    assert parse(pretrain, "--model", "deem")[0].model_config == {}  # which has sizes of its own
    given = parse(pretrain, "--model", "deem", "--model_config", '{"text_loss_weight": 2}')[0].model_config
    assert given == {"text_loss_weight": 2}
    refused = {
        '{"image_size": 128}': "no field image_size. The size of images is the processor's: give --image_size",
        '{"image_los_weight": 1}': "no field image_los_weight. Did you mean image_loss_weight",
        '{"perceiver_config": {"num_querys": 1}}': "no field perceiver_config.num_querys. Did you mean num_queries",
        "3": "--model_config 3 is no mapping: give JSON",
    }
    for recipe in (pretrain, sft, sft_trl):
        for value, message in refused.items():
            with pytest.raises(ValueError, match=message):
                parse(recipe, "--model_config", value)


def test_own_parts_are_frozen_as_in_the_paper_the_small_ones_train(tmp_path):
    parts = [f"--{name}={tmp_path / name}" for name in ("vision", "text", "diffusion")]
    own = pretrain.default_config(parts)
    *_, training = parse_recipe(pretrain.ARGUMENTS, own, parts)
    paper = parse(pretrain, "--config", str(CONFIGS[0].parent / "pretrain.yaml"), "--use_cpu", "true")[3]
    assert training.freeze == paper.freeze and "model.language_model" in training.freeze
    assert all(training.groups[name] == paper.groups[name] for name in training.groups)
    assert parse_recipe(pretrain.ARGUMENTS, own, parts)[0].model_config is None
    for name in ("vision", "text", "diffusion"):  # as recipes/parts.py leaves them
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").touch()
    assert pretrain.default_config(parts) == pretrain.default_config([]) == pretrain.CONFIG


def test_a_warm_up_is_not_longer_than_the_run(capsys):
    flags = ["--max_steps", "10"]
    assert parse(pretrain, *flags)[3].get_warmup_steps(10) == 2 and parse(pretrain)[3].get_warmup_steps(240) == 30
    assert parse(pretrain, *flags, "--warmup_steps", "500")[3].get_warmup_steps(10) == 1
    assert "warmup_steps 500 would be all of the 10 steps: 1 are taken" in capsys.readouterr().out
    assert parse(pretrain, *flags, "--warmup_steps", "5")[3].get_warmup_steps(10) == 5


def test_flags_with_an_equals_sign_and_words_for_true_and_false():
    model, run, _, training = parse(pretrain, "--dry_run=true", "--resume_from_checkpoint", "false")
    assert run.dry_run and training.use_cpu and training.resume_from_checkpoint is False


def test_probabilities_of_the_world_are_not_those_of_other_data(tmp_path, monkeypatch):
    model, _, data, _ = parse(sft, "--data", "vqa", "--data_weights", "size")
    assert data.data_probs is None and model.world_probs == [1, 2]


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
