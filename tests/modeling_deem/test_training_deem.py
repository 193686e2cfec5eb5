# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""`DeemTrainer` with transformers' own TrainingArguments; more of its losses in tests/recipes/training."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deem_fixtures import tiny_model
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

import modeling_deem
from modeling_deem import DeemTrainer
from modeling_deem.training_deem import LOSSES
from processing import DeemDataCollator, DeemProcessor

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    {"text": f"A card: <image> It is {color}.", "images": [Image.new("RGB", (64, 64), color)]}
    for color in ("red", "green", "blue", "white")
] + [{"text": "No card.", "images": []}]


def trainer_of(processor: DeemProcessor, folder: Path, **options: Any) -> DeemTrainer:
    args = TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, logging_steps=1, per_device_train_batch_size=2, **options
    )
    model = tiny_model()
    model.model.language_model.requires_grad_(False)
    collator = DeemDataCollator(processor)
    return DeemTrainer(model, args, collator, train_dataset=ROWS, eval_dataset=ROWS[:3], processing_class=processor)


def test_plain_arguments_train_all_three_losses(tiny_processor, tmp_path):
    trainer = trainer_of(tiny_processor, tmp_path, max_steps=3, gradient_accumulation_steps=2, save_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3]
    weights = trainer.model.loss_weights()
    for log in logs:
        assert log["loss"] == pytest.approx(sum(weights[name] * log[name] for name in LOSSES), rel=1e-5)
    assert "use_cache" not in json.loads((tmp_path / "checkpoint-3" / "config.json").read_text())

    again = trainer_of(tiny_processor, tmp_path, max_steps=3, gradient_accumulation_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [log["loss"] for log in again.state.log_history if "loss" in log] == [log["loss"] for log in logs]
    for (name, one), (_, other) in zip(trainer.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_an_evaluation_draws_the_same_noise_and_takes_none_from_training(tiny_processor, tmp_path):
    trainer = trainer_of(tiny_processor, tmp_path)
    state = torch.get_rng_state()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("eval_loss", *(f"eval_{name}" for name in LOSSES)):
        values = [log[name] for log in trainer.state.log_history]
        assert values[0] == values[1] > 0, name
    assert first["eval_loss"] == second["eval_loss"]


def test_arguments_without_effect_are_refused(tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor 0.1 would have no effect.*set it to 0"):
        trainer_of(tiny_processor, tmp_path, label_smoothing_factor=0.1)

    class Stream(IterableDataset):
        def __iter__(self):
            yield from ROWS

    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=1, train_sampling_strategy="group_by_length", report_to="none"
    )
    with pytest.raises(
        ValueError, match="train_sampling_strategy group_by_length would have no effect: the data is a"
    ):
        DeemTrainer(tiny_model(), args, DeemDataCollator(tiny_processor), train_dataset=Stream())


def test_a_batch_that_does_not_fit_is_made_smaller(tiny_processor, tmp_path):
    """`auto_find_batch_size` as transformers has it; what the failed step has counted is in no log."""
    trainer = trainer_of(tiny_processor, tmp_path, max_steps=3, auto_find_batch_size=True, report_to="none")
    sizes = []

    def limited(samples):
        sizes.append(len(samples))
        if len(sizes) == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 51.00 GiB.")
        return DeemDataCollator(tiny_processor)(samples)

    trainer.data_collator = limited
    trainer.train()
    assert sizes[:2] == [2, 2] and set(sizes[2:]) == {1}
    weights = trainer.model.loss_weights()
    for log in (log for log in trainer.state.log_history if "loss" in log):
        assert log["loss"] == pytest.approx(sum(weights[name] * log.get(name, 0) for name in LOSSES), rel=1e-5)


def test_the_loss_of_an_evaluation_counts_samples_not_batches(tiny_processor, tmp_path):
    trainer = trainer_of(tiny_processor, tmp_path, per_device_eval_batch_size=2, report_to="none")
    seen = []
    compute = trainer.compute_loss

    def noted(model, inputs, **kwargs):
        loss, outputs = compute(model, inputs, **kwargs)
        seen.append((float(loss), len(inputs["input_ids"])))
        return loss, outputs

    trainer.compute_loss = noted
    loss = trainer.evaluate()["eval_loss"]
    assert [rows for _, rows in seen] == [2, 1]
    assert loss == pytest.approx((2 * seen[0][0] + seen[1][0]) / 3, rel=1e-5)


def test_what_the_user_chose_stays(tiny_processor, tmp_path):
    left = trainer_of(tiny_processor, tmp_path).args
    assert left.remove_unused_columns is False and left.prediction_loss_only is True and left.label_names == ["labels"]
    assert left.accelerator_config.dispatch_batches is False and left.ddp_find_unused_parameters is True
    assert left.data_seed == left.seed
    chosen = trainer_of(
        tiny_processor,
        tmp_path,
        ddp_find_unused_parameters=False,
        data_seed=7,
        label_names=["target_pixel_values"],
        accelerator_config={"dispatch_batches": True},
    ).args
    assert chosen.ddp_find_unused_parameters is False and chosen.data_seed == 7
    assert chosen.label_names == ["target_pixel_values"] and chosen.accelerator_config.dispatch_batches is True


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process: start a process for each"):
        DeemTrainer(tiny_model(), args)


def test_the_trainer_is_imported_where_it_is_asked_for():
    """And importing either package registers model and processor."""
    code = (
        "import sys, processing\n"
        "from transformers import MODEL_MAPPING, PROCESSOR_MAPPING, AutoConfig\n"
        "kind = type(AutoConfig.for_model('deem'))\n"
        "assert MODEL_MAPPING[kind].__name__ == 'DeemForConditionalGeneration'\n"
        "assert PROCESSOR_MAPPING[kind].__name__ == 'DeemProcessor'\n"
        "assert 'transformers.trainer' not in sys.modules\n"
        "from modeling_deem import DeemTrainer\n"
        "assert 'transformers.trainer' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'DeemTrainr'"):
        modeling_deem.DeemTrainr  # noqa: B018
