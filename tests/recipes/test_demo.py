# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/demo.py: its commands are ones that the recipes understand, and what is done is not done again."""

import os
from pathlib import Path

import pytest
from trl import TrlParser

from recipes import demo, evaluate, generate, inspect_image, parts, pretrain, report, sft
from recipes.training.defaults import parse_recipe


@pytest.fixture
def stages(tmp_path: Path) -> list[demo.Stage]:
    arguments = demo.DemoArguments(out=str(tmp_path / "demo"), parts=str(tmp_path / "parts"))
    return demo.make_stages(arguments)


def test_recipes_understand_the_commands(stages: list[demo.Stage]) -> None:
    """Each command's flags go through the parser of its recipe, and each stage starts from what the last one wrote."""
    parsed = {}
    for stage in stages:
        for recipe, *flags in stage.commands:
            if recipe in ("pretrain.py", "sft.py"):
                module = {"pretrain.py": pretrain, "sft.py": sft}[recipe]
                parsed[recipe] = parse_recipe(module.ARGUMENTS, module.CONFIG, flags)
            else:
                group = {
                    "parts.py": parts.PartsArguments,
                    "generate.py": generate.GenerateArguments,
                    "evaluate.py": evaluate.EvaluateArguments,
                    "inspect_image.py": inspect_image.InspectArguments,
                    "report.py": report.ReportArguments,
                }[recipe]
                parsed[recipe] = TrlParser(group).parse_args_and_config(flags)
    order = ["parts.py", "pretrain.py", "sft.py", "generate.py", "evaluate.py", "inspect_image.py", "report.py"]
    assert list(parsed) == order
    assert parsed["sft.py"][0].model == parsed["pretrain.py"][-1].output_dir
    (evaluated,) = parsed["evaluate.py"]
    assert evaluated.model == parsed["generate.py"][0].model == parsed["sft.py"][-1].output_dir
    assert evaluated.reference == f"{parsed['pretrain.py'][-1].output_dir}/initial"
    assert Path(parsed["pretrain.py"][0].diffusion).parent == Path(parsed["parts.py"][0].out)


def test_stage_is_done_if_newer_than_the_one_before(stages: list[demo.Stage]) -> None:
    first, second = stages[:2]
    assert not demo.is_done(first, None)
    for age, stage in ((20, first), (10, second)):
        stage.result.parent.mkdir(parents=True, exist_ok=True)
        stage.result.touch()
        os.utime(stage.result, (1000 - age, 1000 - age))
    assert demo.is_done(first, None) and demo.is_done(second, first.result)
    os.utime(first.result, (2000, 2000))
    assert not demo.is_done(second, first.result)


def test_training_from_an_older_stage_is_outdated(stages: list[demo.Stage]) -> None:
    before, training = stages[0].result, stages[1].resumes_in
    before.parent.mkdir(parents=True)
    before.touch()
    os.utime(before, (1000, 1000))
    assert not demo.is_outdated(training, before)  # nothing there yet
    checkpoint = training / "checkpoint-5" / "complete"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert not demo.is_outdated(training, before)  # interrupted: it goes on
    os.utime(checkpoint, (900, 900))
    assert demo.is_outdated(training, before)
