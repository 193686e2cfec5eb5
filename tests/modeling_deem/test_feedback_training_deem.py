# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The feedback in transformers' Trainer and trl's SFTTrainer."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer
from datasets import Dataset
from PIL import Image
from scripts import run_ranks
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from vlm_fixtures import CONFIGS, FAMILIES, TinyVlm, count_calls, tiny_vlm, vision_tower

from modeling_deem import ConsistencyLossMixin, DeemFeedback

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"num_queries": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
SCRATCH = {"image_size": 32, "width": 32, "num_layers": 1, "perceiver_config": SMALL, "connector_std": 0.2}
COMMON = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2}
COMMON |= {
    "save_strategy": "no",
    "remove_unused_columns": False,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
}


class FeedbackTrainer(ConsistencyLossMixin, Trainer):
    pass


class FeedbackSFTTrainer(ConsistencyLossMixin, SFTTrainer):
    pass


def feedback_of(vlm: TinyVlm, **options: Any) -> DeemFeedback:
    torch.manual_seed(1)
    return DeemFeedback.from_scratch(vlm.model, **{**SCRATCH, **options})


def rows_of(vlm: TinyVlm) -> list[dict[str, Any]]:
    """Four rows of which the second is text alone; images with a target each.

    Both halves have as many text targets: Trainer gives Qwen no num_items_in_batch and averages over micro-batches.
    """
    rows = [vlm.row(seed, with_image=seed != 1) for seed in (0, 1, 4, 3)]
    for seed, row in enumerate(rows):
        row["target"] = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return rows


def trainer_of(
    vlm: TinyVlm,
    feedback: DeemFeedback,
    folder: Path,
    sft: bool = False,
    rows: list[dict[str, Any]] | None = None,
    mixin: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """A trainer on copies of model and feedback, in the order of the rows."""
    rows = rows_of(vlm) if rows is None else rows
    model, feedback = copy.deepcopy(vlm.model), copy.deepcopy(feedback)
    options = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        **COMMON,
        "train_sampling_strategy": "sequential",
        **options,
    }
    given: dict[str, Any] = {"feedback": feedback, **(mixin or {})}
    data = Dataset.from_list(
        [{"input_ids": r["input_ids"], "labels": r["labels"], "row": i} for i, r in enumerate(rows)]
    )
    given |= {"train_dataset": data, "data_collator": lambda few: vlm.collate([rows[one["row"]] for one in few])}
    if sft:
        args = SFTConfig(str(folder), bf16=False, activation_checkpointing=False, max_length=None, **options)
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        return FeedbackSFTTrainer(model, args, processing_class=build_tokenizer(), **given)
    return FeedbackTrainer(model, TrainingArguments(str(folder), **options), **given)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    named = {f"model.{name}": value.detach() for name, value in trainer.model.named_parameters()}
    return named | {f"feedback.{name}": value.detach() for name, value in trainer.feedback.named_parameters()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("family", FAMILIES)
def test_trainers_and_divisions_agree(family: str, tmp_path: Path) -> None:
    vlm = tiny_vlm(family)
    feedback, rows, losses, states = feedback_of(vlm), rows_of(vlm), [], []
    for sft in (False, True):
        for size, accumulation in ((4, 1), (2, 2)):
            sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
            trainer = trainer_of(vlm, feedback, tmp_path, sft, rows, **sizes)
            calls = count_calls(vision_tower(trainer.model))
            drawn = count_calls(trainer.feedback.denoiser)
            trainer.train()
            assert len(calls) == len(drawn) == 3 * accumulation  # once per micro-batch
            losses.append([logged(trainer, name) for name in ("loss", "task_loss", "consistency_loss")])
            states.append(state_of(trainer))
    assert len(losses[0][2]) == 3 and all(len(found) == 3 for found in losses[0])
    for other in losses[1:]:
        assert torch.allclose(torch.tensor(other), torch.tensor(losses[0]), atol=1e-5, rtol=1e-5)
    total, task, consistency = torch.tensor(losses[0])
    assert torch.allclose(total, task + 5 * consistency, atol=1e-4)
    for other in states[1:]:
        assert difference(states[0], other) < 1e-5


@pytest.fixture(scope="module")
def llava() -> TinyVlm:
    return tiny_vlm("llava")


def test_training_goes_on_from_a_checkpoint_of_both(llava: TinyVlm, tmp_path: Path) -> None:
    feedback = feedback_of(llava)
    options = {"optim": "adamw_torch", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 1.0}
    mixin = {"feedback_learning_rate": 3e-3}
    whole = trainer_of(llava, feedback, tmp_path / "whole", mixin=mixin, **options)
    whole.train()
    rates = [group["lr"] for group in whole.optimizer.param_groups]
    assert rates == [1e-2, 1e-2, 3e-3, 3e-3]
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again = trainer_of(llava, feedback_of(llava), tmp_path / "again", mixin=mixin, **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert difference(state_of(whole), state_of(again)) == 0.0
    assert logged(again, "consistency_loss") == logged(whole, "consistency_loss")

    # an ordinary checkpoint of its own class, and the feedback beside it
    last = tmp_path / "whole" / "checkpoint-4"
    model = AutoModelForImageTextToText.from_pretrained(last)
    assert type(model) is type(llava.model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.model.parameters(), strict=True))
    beside = DeemFeedback.from_pretrained(last / "feedback")
    assert all(torch.equal(a, b) for a, b in zip(beside.parameters(), whole.feedback.parameters(), strict=True))

    plain = TrainingArguments(
        str(tmp_path / "plain"), **{**COMMON, "max_steps": 1, "save_strategy": "steps"}, save_steps=1
    )
    rows = rows_of(llava)
    data = Dataset.from_list([{"row": index} for index in range(4)])

    def collate(few: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            name: value
            for name, value in llava.collate([rows[one["row"]] for one in few]).items()
            if name != "target_pixel_values"
        }

    Trainer(copy.deepcopy(llava.model), plain, train_dataset=data, data_collator=collate).train()
    with pytest.raises(FileNotFoundError, match="no folder feedback"):
        trainer_of(llava, feedback, tmp_path / "new").train(
            resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1")
        )


def test_a_weight_of_0_costs_nothing(llava: TinyVlm, tmp_path: Path) -> None:
    trainer = trainer_of(llava, feedback_of(llava, loss_weight=0.0), tmp_path, max_steps=1)
    drawn, seen = count_calls(trainer.feedback), count_calls(vision_tower(trainer.model))
    trainer.train()
    assert (len(drawn), len(seen)) == (0, 1)
    assert len(trainer.optimizer.param_groups) == 2 and logged(trainer, "consistency_loss") == []


def test_the_connector_alone_at_first(llava: TinyVlm, tmp_path: Path) -> None:
    """Without a text loss the model stands still for two steps and moves in the third."""
    rows, moved = rows_of(llava), []
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    for steps in (2, 3):
        trainer = trainer_of(llava, feedback_of(llava), tmp_path, True, rows, {"connector_steps": 2}, max_steps=steps)
        trainer.train()
        before = {f"model.{name}": value.detach() for name, value in llava.model.named_parameters()}
        moved.append(difference(before, state_of(trainer)))
    assert moved[0] == 0.0 and moved[1] > 0.0


def test_a_share_of_the_images(llava: TinyVlm, tmp_path: Path) -> None:
    rows, counts = [llava.row(seed) for seed in range(4)], []
    for row in rows:
        row["target"] = torch.zeros(3, 32, 32)
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        trainer = trainer_of(llava, feedback_of(llava, feedback_share=0.5), tmp_path, rows=rows, **sizes)
        redrawn: list[int] = []
        trainer.feedback.denoiser.register_forward_pre_hook(
            lambda module, args, redrawn=redrawn: redrawn.append(len(args[0]))
        )
        trainer.train()
        counts.append((sum(redrawn), logged(trainer, "consistency_loss")))
    assert all(count == 4 for count, _ in counts)  # 2 of 4 images, in 2 steps
    assert all(torch.allclose(torch.tensor(counts[0][1]), torch.tensor(other), atol=1e-5) for _, other in counts)


@pytest.mark.parametrize("sft", [False, True])
def test_the_language_models_states_and_contrast(sft: bool, llava: TinyVlm, tmp_path: Path) -> None:
    feedback = feedback_of(llava, source="language", objective="contrastive")
    rows = rows_of(llava)
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    trainer = trainer_of(llava, feedback, tmp_path, sft, rows, optim="adamw_torch")
    trainer.train()
    assert len(logged(trainer, "consistency_loss")) == 3
    before = dict(llava.model.named_parameters())
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert any("vision_tower" in name for name in moved) and any("language_model.layers.1" in name for name in moved)
    alone = trainer_of(llava, feedback, tmp_path, sft, rows, per_device_train_batch_size=1, max_steps=1)
    alone.train()  # no other image in a batch: nothing to contrast with, and nothing else to learn
    assert logged(alone, "consistency_loss") == []


def test_evaluation_has_the_same_noise_each_time(llava: TinyVlm, tmp_path: Path) -> None:
    for sft in (False, True):
        trainer = trainer_of(llava, feedback_of(llava), tmp_path, sft, prediction_loss_only=True)
        data = trainer.train_dataset
        first, second = (trainer.evaluate(data) for _ in range(2))
        assert first["eval_consistency_loss"] == second["eval_consistency_loss"] > 0
        assert first["eval_loss"] == second["eval_loss"] > 5 * first["eval_consistency_loss"]


CHAT = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
)


def test_rows_of_images_with_trl(tmp_path: Path) -> None:
    """Rows of messages and images, the model's own processor: the targets are made of the same images."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    square = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size=square, crop_size=square)
    shape = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(images, tokenizer, **shape, image_token="<image>", chat_template=CHAT)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text = {**CONFIGS["llava"]["text_config"], "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llava", **{**CONFIGS["llava"], "text_config": text}, image_token_id=image_id)
    model = AutoModelForImageTextToText.from_config(config)

    def turns(color: str) -> list[dict[str, Any]]:
        question = [{"type": "image", "text": None}, {"type": "text", "text": "Which?"}]
        answer = [{"type": "text", "text": color}]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    colors = ("red", "green", "blue", "white")
    rows = [{"messages": turns(color), "images": [Image.new("RGB", (40, 30), color)]} for color in colors]
    args = SFTConfig(str(tmp_path), bf16=False, activation_checkpointing=False, max_length=None, max_steps=2, **COMMON)
    feedback = DeemFeedback.from_scratch(model, **SCRATCH)
    trainer = FeedbackSFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=processor, feedback=feedback, augment=True
    )
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    seen = batch["target_pixel_values"][:, :, 3, 5].round()
    assert torch.equal(seen, torch.tensor([[1.0, -1, -1], [-1, 0, -1]]))
    calls = count_calls(vision_tower(trainer.model))
    trainer.train()
    assert len(calls) == 2 and len(logged(trainer, "consistency_loss")) == 2


def test_two_processes_are_two_micro_batches(llava: TinyVlm, tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom test_feedback_training_deem import *\n"
        "torch.set_num_threads(1)\nvlm = tiny_vlm('llava')\n"
        "trainer = trainer_of(vlm, feedback_of(vlm), Path(sys.argv[1]), per_device_train_batch_size=2, "
        "ddp_find_unused_parameters=True, ddp_backend='gloo')\ntrainer.train()\n"
        "if trainer.is_world_process_zero():\n"
        "    torch.save((state_of(trainer), logged(trainer, 'consistency_loss')), sys.argv[1] + '/state.pt')\n"
    )
    script = tmp_path / "two.py"
    script.write_text(code)
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join(str(root / part) for part in ("", "tests", "tests/modeling_deem"))
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = run_ranks(script, tmp_path, logs=tmp_path / "logs", **environment)
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(rank.stderr[-3000:] for rank in ranks)
    states, losses = torch.load(tmp_path / "state.pt")
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_of(llava, feedback_of(llava), tmp_path / "one", **sizes)
    trainer.train()
    assert torch.allclose(torch.tensor(losses), torch.tensor(logged(trainer, "consistency_loss")), atol=1e-5)
    assert difference(states, state_of(trainer)) < 1e-5
