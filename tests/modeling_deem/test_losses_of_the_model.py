# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Losses of the whole model: weights, draws, targets, and what counts for nothing."""

import pytest
import torch
from deem_fixtures import (
    rows_of,
    tiny_batch,
    tiny_config,
    tiny_draws,
    tiny_model,
)
from transformers import Trainer, TrainingArguments

from modeling_deem import DeemForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    """Shared by the tests that leave it as it is."""
    return tiny_model(seed=5)


def test_total_is_the_weighted_sum() -> None:
    model = tiny_model(text_loss_weight=0.5, image_loss_weight=3.0, consistency_loss_weight=7.0)
    batch = tiny_batch("btitti", "btit")
    with torch.no_grad():
        outputs = model(**batch)
        expected = 0.5 * outputs.text_loss + 3.0 * outputs.image_loss + 7.0 * outputs.consistency_loss
        torch.testing.assert_close(outputs.loss, expected)
        outputs = model(**batch, text_loss_weight=2.0, image_loss_weight=0.25)
        expected = 2.0 * outputs.text_loss + 0.25 * outputs.image_loss + 7.0 * outputs.consistency_loss
        torch.testing.assert_close(outputs.loss, expected)


def test_published_weights() -> None:
    config = tiny_config()
    weights = config.text_loss_weight, config.image_loss_weight, config.consistency_loss_weight
    assert weights == (1, 5, 5)


@pytest.mark.parametrize("left_out", ["text", "image", "consistency"])
@pytest.mark.parametrize("where", ["config", "batch"])
def test_a_loss_of_weight_zero_is_not_computed(left_out: str, where: str) -> None:
    name = f"{left_out}_loss_weight"
    model = tiny_model(**({name: 0.0} if where == "config" else {}))
    batch = {**tiny_batch("btitti"), **({name: 0.0} if where == "batch" else {})}
    # A target that would poison the sum: 0 * NaN is NaN.
    if left_out != "text":
        batch[f"{left_out}_draws"] = {"noise": torch.full((2, 4, 8, 8), float("nan"))}
    with torch.no_grad():
        outputs = model(**batch)
    for other in ("text", "image", "consistency"):
        assert (getattr(outputs, f"{other}_loss") is None) == (other == left_out)
    assert outputs.loss.isfinite()


def test_without_targets_or_labels_there_is_no_loss(model) -> None:
    batch = tiny_batch("btit", targets=False)
    with torch.no_grad():
        outputs = model(**batch)
        assert outputs.loss is outputs.text_loss is outputs.image_loss is outputs.consistency_loss is None
        only_text = model(**tiny_batch("bttt"))
    assert only_text.image_loss is only_text.consistency_loss is None
    torch.testing.assert_close(only_text.loss, only_text.text_loss)


def test_text_loss_counts_the_items_of_the_whole_step(model) -> None:
    batch = tiny_batch("btitti", "bttt", "bt")
    with torch.no_grad():
        mean = model(**batch).text_loss
        halves = [{**row, "image_loss_weight": 0.0, "consistency_loss_weight": 0.0} for row in rows_of(batch)]
        items = (batch["labels"][:, 1:] != -100).sum()
        parts = [model(**half, num_items_in_batch=items).text_loss for half in halves]
    torch.testing.assert_close(sum(parts), mean, rtol=0, atol=1e-5)


class Counted:
    """Counts the calls of a function that it hands on to."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, 1),
        ({"image_loss_weight": 0.0}, 1),
        ({"consistency_loss_weight": 0.0}, 1),
        ({"image_loss_weight": 0.0, "consistency_loss_weight": 0.0}, 0),
        ({"target_latents": torch.ones(2, 4, 8, 8)}, 0),
    ],
)
def test_the_target_is_encoded_once_per_step(monkeypatch, changes: dict, calls: int) -> None:
    model = tiny_model()
    encode = Counted(model.image_decoder.vae.encode)
    monkeypatch.setattr(model.image_decoder.vae, "encode", encode)
    model(**tiny_batch("btitti"), **changes).loss.backward()
    assert encode.calls == calls


def test_injected_draws_and_generators_reproduce_the_losses() -> None:
    model = tiny_model().train()
    batch = tiny_batch("btitti", "bti")
    draws = {"consistency_draws": tiny_draws(3), "image_draws": tiny_draws(3, seed=1, image=True)}

    def losses(**extra) -> list[float]:
        with torch.no_grad():
            outputs = model(**batch, **extra)
        return [outputs.image_loss.item(), outputs.consistency_loss.item()]

    assert losses(**draws) == losses(**draws)
    for name, index in (("image_draws", 0), ("consistency_draws", 1)):
        for key in draws[name]:
            other = torch.ones(3, dtype=torch.bool) if key == "drop_condition" else draws[name][key].flip(0)
            changed = losses(**{**draws, name: {**draws[name], key: other}})
            assert changed[index] != losses(**draws)[index], key
            assert changed[1 - index] == losses(**draws)[1 - index], key
    seeded = [losses(generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert seeded[0] == seeded[1] and seeded[0] != seeded[2]


def test_precomputed_latents_equal_encoding_in_the_step(model) -> None:
    batch = tiny_batch("btitti")
    latents = model.image_decoder.encode(batch["target_pixel_values"], torch.Generator().manual_seed(5))
    draws = {name: {**tiny_draws(2, image=name == "image_draws")} for name in ("image_draws", "consistency_draws")}
    for drawn in draws.values():
        del drawn["latents"]
    with torch.no_grad():
        here = model(**batch, **draws, generator=torch.Generator().manual_seed(5))
        del batch["target_pixel_values"]
        there = model(**batch, **draws, target_latents=latents)
    assert here.image_loss == there.image_loss and here.consistency_loss == there.consistency_loss


def test_consistency_loss_alone_equals_the_one_of_the_step(model) -> None:
    batch = tiny_batch("btitti")
    draws = tiny_draws(2)
    del draws["latents"]
    with torch.no_grad():
        step = model(**batch, consistency_draws=draws, generator=torch.Generator().manual_seed(1))
        alone = model.consistency_loss(
            batch["pixel_values"], batch["target_pixel_values"], generator=torch.Generator().manual_seed(1), **draws
        )
    torch.testing.assert_close(alone, step.consistency_loss, rtol=0, atol=1e-6)


def test_condition_dropout_is_for_training_only() -> None:
    model = tiny_model()
    batch = {**tiny_batch("btitti"), "text_loss_weight": 0.0, "consistency_loss_weight": 0.0}
    draws = tiny_draws(2)
    model.config.image_decoder_config.condition_dropout = 1.0

    def loss(**extra) -> float:
        with torch.no_grad():
            return model(**batch, image_draws={**draws, **extra}).image_loss.item()

    kept, dropped = loss(drop_condition=torch.zeros(2, dtype=torch.bool)), loss(drop_condition=torch.ones(2).bool())
    assert kept != dropped
    assert loss() == kept
    model.train()
    assert loss() == dropped


def test_images_without_context_and_masked_images_are_not_drawn(model) -> None:
    batch = tiny_batch("bi", "btti", "bitti")  # the first image of rows 0 and 2 has bos alone before it
    draws = tiny_draws(4, image=True)

    def loss(**extra) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch, image_draws=draws, consistency_loss_weight=0.0, **extra).image_loss

    second, fourth = (loss(image_loss_mask=torch.tensor([flag == k for flag in range(4)])) for k in (1, 3))
    assert second != fourth and second > 0
    torch.testing.assert_close(loss(), (second + fourth) / 2)
    torch.testing.assert_close(loss(image_loss_mask=torch.tensor([1, 1, 0, 0]).bool()), second)
    assert loss(image_loss_mask=torch.tensor([1, 0, 1, 0]).bool()) == 0
    model.config.image_decoder_config.image_loss_reduction = "all"
    try:
        torch.testing.assert_close(loss(), (second + fourth) / 4)
    finally:
        model.config.image_decoder_config.image_loss_reduction = "supervised"


class Rows(torch.utils.data.Dataset):
    """Rows of equally many targets and images, with the random draws of their losses."""

    def __init__(self, count: int, word: str = "btitt") -> None:
        batch = tiny_batch(*[word] * count)
        self.rows = rows_of(batch)
        for index, row in enumerate(self.rows):
            row["consistency_draws"] = tiny_draws(1, seed=index)
            row["image_draws"] = tiny_draws(1, seed=100 + index, image=True)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def join(rows: list[dict]) -> dict:
    """Batch of rows of one length."""
    joined = {key: torch.cat([row[key] for row in rows]) for key in rows[0] if not key.endswith("draws")}
    for key in ("consistency_draws", "image_draws"):
        joined[key] = {name: torch.cat([row[key][name] for row in rows]) for name in rows[0][key]}
    return joined


def plain_trainer(folder, model, rows: Rows, **options) -> Trainer:
    args = TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", remove_unused_columns=False, **options
    )
    return Trainer(model, args, join, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_of_a_plain_trainer_add_up_to_one_batch(micro_batches: int, tmp_path) -> None:
    """Images in proportion to targets: losses, gradient norms and weights of one batch."""
    found = {}
    for count in (1, micro_batches):
        model = tiny_model(seed=5, vision_config={"drop_path_rate": 0.0})
        sizes = {"per_device_train_batch_size": 8 // count, "gradient_accumulation_steps": count}
        trainer = plain_trainer(
            tmp_path / str(count),
            model,
            Rows(8),
            max_steps=3,
            logging_steps=1,
            optim="sgd",
            learning_rate=0.01,
            **sizes,
        )
        trainer.train()
        logs = [log for log in trainer.state.log_history if "grad_norm" in log]
        found[count] = [[log["loss"], log["grad_norm"]] for log in logs], list(model.parameters())
    assert len(found[1][0]) == 3
    torch.testing.assert_close(torch.tensor(found[micro_batches][0]), torch.tensor(found[1][0]), rtol=1e-4, atol=0)
    for one, other in zip(found[1][1], found[micro_batches][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_plain_trainer_evaluates_computes_metrics_and_keeps_the_best(tmp_path) -> None:
    rows, seen = Rows(4), []

    def count_logits(prediction) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"seen": float(len(seen))}

    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "metric_for_best_model": "eval_loss",
    }
    trainer = plain_trainer(tmp_path, tiny_model(), rows, max_steps=2, load_best_model_at_end=True, **options)
    trainer.compute_metrics = count_logits
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["eval_seen"] for log in logs] == [1.0, 2.0] and all(log["eval_loss"] > 0 for log in logs)
    assert seen[0] == (4, rows[0]["input_ids"].shape[1], trainer.model.config.text_config.vocab_size)
    assert trainer.state.best_metric == min(log["eval_loss"] for log in logs)


def test_a_step_without_text_targets_has_no_text_loss(model) -> None:
    batch = tiny_batch("btitti")
    batch["labels"][:] = -100
    with torch.no_grad():
        outputs = model(**batch, num_items_in_batch=0)
    assert outputs.text_loss == 0.0 and outputs.loss.isfinite()


def test_targets_of_the_feedback_that_are_no_targets_are_refused(model) -> None:
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    for targets in (images, images * 2.5, images * float("nan")):
        with pytest.raises(ValueError, match=r"target_pixel_values lie in .*return_targets=True"):
            model.consistency_loss(images, targets)
    with torch.no_grad():
        assert model.consistency_loss(images, images.clone()).isfinite()
