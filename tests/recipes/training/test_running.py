# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Evaluation within training: losses and answers on held-out data, the best checkpoint, stopping early."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from deem_fixtures import tiny_model
from transformers import AutoModel

from modeling_deem import DeemForConditionalGeneration
from recipes import sft
from recipes.data.sources import DataArguments, build_dataset
from recipes.evaluation.answers import answer_of, is_question, normalized, share_answered
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers import write_formats

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_formats(folder, World(size=64), 8, formats=["vqa", "captions"])
    write_formats(folder / "held_out", World(size=64), 4, HELD_OUT, formats=["vqa", "captions"])
    return folder


@pytest.fixture
def run(world, tiny_processor, tmp_path, monkeypatch):
    """Runs recipes/sft.py on a tiny checkpoint; gives the output folder and the log."""
    tiny_model().save_pretrained(tmp_path / "deem")
    tiny_processor.save_pretrained(tmp_path / "deem")

    def run(name: str, **options) -> tuple[Path, list[dict]]:
        flags = {
            "model": tmp_path / "deem",
            "data": [world / "vqa", world / "captions"],
            "output_dir": tmp_path / name,
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "warmup_steps": 0,
            "groups": "{}",
            "report_to": "none",
            "disable_tqdm": "true",
            **options,
        }
        argv = ["sft.py"]
        for key, value in flags.items():
            argv += [f"--{key}", *(str(one) for one in (value if isinstance(value, list) else [value]))]
        monkeypatch.setattr(sys, "argv", argv)
        sft.main()
        return tmp_path / name, json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]

    return run


def test_losses_and_answers_on_held_out_data_without_a_trace_in_training(run, world):
    held_out = [world / "held_out" / "vqa", world / "held_out" / "captions"]
    evaluation = {
        "eval_data": held_out,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_samples": 8,
        "eval_answers": 2,
    }
    _, plain = run("plain")
    folder, evaluated = run(
        "evaluated",
        **evaluation,
        metric_for_best_model="eval_answers",
        greater_is_better="true",
        load_best_model_at_end="true",
        save_total_limit=2,
    )
    losses = [[log["loss"] for log in logs if "loss" in log] for logs in (plain, evaluated)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    evaluations = [log for log in evaluated if "eval_loss" in log]
    assert [log["step"] for log in evaluations] == [2, 4]
    for log in evaluations:
        assert {"eval_text_loss", "eval_consistency_loss", "eval_answers"} <= set(log)
        assert 0 < log["eval_text_loss"] < 10 and log["eval_answers"] in (0, 0.5, 1)
    # no answer is right yet, so that the first is the best; the last is kept to go on from
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-2")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    best, saved = AutoModel.from_pretrained(folder / "checkpoint-2"), AutoModel.from_pretrained(folder)
    assert all(torch.equal(tensor, best.state_dict()[name]) for name, tensor in saved.state_dict().items())


def test_the_same_command_again_leaves_the_best_model(run, world):
    options = {
        "eval_data": world / "held_out" / "vqa",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_samples": 2,
        "eval_answers": 2,
        "metric_for_best_model": "eval_answers",  # none is right, so that the first is the best
        "greater_is_better": "true",
        "load_best_model_at_end": "true",
    }
    folder, _ = run("twice", **options)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-2")
    before = (folder / "model.safetensors").read_bytes()
    run("twice", **options)
    assert (folder / "model.safetensors").read_bytes() == before
    shutil.rmtree(folder / "checkpoint-2")
    with pytest.raises(ValueError, match="its best checkpoint, .*checkpoint-2, which is gone"):
        run("twice", **options)
    assert (folder / "model.safetensors").read_bytes() == before


def test_evaluations_have_a_batch_size_of_their_own(run, world, monkeypatch):
    sizes, forward = [], DeemForConditionalGeneration.forward

    def noted(self, input_ids=None, **kwargs):
        if not self.training:
            sizes.append(len(input_ids))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(DeemForConditionalGeneration, "forward", noted)
    held_out = {
        "eval_data": world / "held_out" / "captions",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 1,
    }
    run("own", **held_out, per_device_eval_batch_size=3, eval_samples=4, caption_forms="describe", save_strategy="no")
    assert sizes == [3, 1]
    sizes.clear()
    run("trained", **held_out, eval_samples=4, caption_forms="describe", save_strategy="no")
    assert sizes == [2, 2]  # as in training


@pytest.mark.parametrize("number", [1, 20])
def test_few_rows_can_be_trained_and_evaluated(run, tmp_path, capsys, number):
    """The batch size of the default, 24, is more than there are."""
    for index in range(number):
        World(size=64).scene(index).image.save(tmp_path / f"{index}.png")
    rows = [
        {"messages": [{"role": "user", "content": "<image> What?"}, {"role": "assistant", "content": "A thing"}],
         "images": [f"{index}.png"]}
        for index in range(number)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data": tmp_path / "rows.jsonl", "eval_data": tmp_path / "rows.jsonl", "per_device_train_batch_size": 24}
    _, logs = run("few", **data, eval_strategy="steps", eval_steps=2, max_steps=2, save_strategy="no")
    assert [log["step"] for log in logs if "loss" in log] == [1, 2]
    assert [log["step"] for log in logs if "eval_text_loss" in log] == [2]
    assert (
        f"--eval_data has {number} samples, fewer than the 64 of --eval_samples: all are used"
        in capsys.readouterr().out
    )


def test_the_first_and_the_last_step_are_logged(run):
    _, logs = run("short", max_steps=3, logging_steps=10, save_strategy="no")
    assert [log["step"] for log in logs if "loss" in log] == [1, 3]


def test_options_that_the_data_stream_cannot_follow_are_refused(run, world):
    with pytest.raises(ValueError, match="auto_find_batch_size cannot be used.*smaller --per_device_train_batch_size"):
        run("refused", auto_find_batch_size="true")
    with pytest.raises(ValueError, match="train_sampling_strategy group_by_length would have no effect"):
        run("refused", train_sampling_strategy="group_by_length")


def test_held_out_data_are_read_once_and_not_for_nothing(run, world, capsys):
    _, logs = run(
        "once", eval_data=world / "held_out" / "vqa", eval_strategy="steps", eval_steps=4, eval_samples=100_000
    )
    assert "fewer than the 100000 of --eval_samples" in capsys.readouterr().out and logs[-2]["eval_text_loss"] > 0
    with pytest.raises(ValueError, match="would never be evaluated: give --eval_strategy"):
        run("never", eval_data=world / "held_out" / "vqa")


def test_a_run_that_gets_no_better_stops_early(run, world):
    _, logs = run(
        "stopped",
        eval_data=[world / "held_out" / "vqa"],
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        eval_samples=2,
        max_steps=50,
        learning_rate=1e3,
        on_nan="skip",
        metric_for_best_model="eval_loss",
        load_best_model_at_end="true",
        early_stopping_patience=2,
    )
    steps = [log["step"] for log in logs if "eval_loss" in log]
    assert 3 <= len(steps) < 20


def test_what_makes_a_run_fit_on_one_gpu_works_together(run, world):
    """Adapters, frozen parts in bfloat16, mixed precision and activation checkpointing, as in *_single_gpu.yaml."""
    before = tiny_model().state_dict()
    folder, logs = run(
        "single",
        freeze=["model.vision_tower.encoder", "lm_head", "image_decoder.denoiser", "image_decoder.vae"],
        groups='{"lora_?": {"lr": 1e-2, "weight_decay": 0.0}}',
        lora='{"r": 2, "lora_alpha": 4}',
        frozen_dtype="bfloat16",
        bf16="true",
        use_cpu="true",
        activation_checkpointing="true",
        max_steps=2,
        save_strategy="no",
    )
    assert [log["loss"] for log in logs if "loss" in log] and all(
        0 < log["loss"] < 100 for log in logs if "loss" in log
    )
    after = AutoModel.from_pretrained(folder).state_dict()  # merged
    assert set(after) == set(before)
    for name in ("image_decoder.vae.quant_conv.weight", "model.language_model.layers.0.mlp.up_proj.weight"):
        moved = (after[name].float() - before[name]).abs().max()
        assert moved == 0 if "vae" in name else 0 < moved < 0.1, name


def test_answers_are_compared_without_case_and_full_stop(world, tiny_processor, monkeypatch):
    data = DataArguments(data=[str(world / "held_out" / "vqa")], pack_length=0, shuffle_buffer=0)
    stream, _ = build_dataset(data, tiny_processor, 1, 0)
    samples = [sample for _, sample in zip(range(4), stream, strict=False)]
    assert all(is_question(sample) for sample in samples)
    model = tiny_model()
    right = iter([True, False, True, False])

    def generate(input_ids, **inputs):
        assert inputs["pixel_values"].shape[0] == 1
        said = answer_of(samples[generate.calls]).upper() + "." if next(right) else "no"
        generate.calls += 1
        return torch.cat([input_ids, torch.tensor([tiny_processor.tokenizer(said)["input_ids"]])], dim=1)

    generate.calls = 0
    monkeypatch.setattr(model, "generate", generate)
    assert share_answered(model, tiny_processor, samples) == 0.5
    assert normalized(" The answer  is Red. ") == "the answer is red"
    assert not is_question({"text": "a"})


@pytest.mark.parametrize(
    "answer, mode, asked",
    [
        ("the small red star at left", "image_to_text", True),
        ("A photo of a star", "image_to_text", False),
        ("this picture shows a small red star at left", "image_to_text", False),
        ("a red star", "text_to_image", False),
        ("", "image_to_text", False),
    ],
)
def test_what_counts_as_a_question(answer, mode, asked):
    assert is_question({"messages": [{"role": "assistant", "content": answer}], "mode": mode}) == asked


def test_questions_about_regions_are_asked_with_their_masks(tiny_processor):
    image = World(size=64).scene(0).image
    whole, corner = torch.ones(64, 64), torch.zeros(64, 64)
    corner[:8, :8] = 1
    asked = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    said = {"role": "assistant", "content": [{"type": "text", "text": "The answer is it"}]}
    model, seen = tiny_model(), []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    for mask in (whole, corner):
        sample = {"messages": [{"role": "user", "content": asked}, said], "images": [image], "region_masks": [mask]}
        share_answered(model, tiny_processor, [sample], max_new_tokens=1)
    assert [int(mask.sum()) for mask in seen] == [64 * 64, 64]
