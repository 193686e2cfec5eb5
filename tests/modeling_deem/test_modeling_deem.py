# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Invariants of the whole model: what it must equal, what may not leak, what learns from which loss."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deem_fixtures import (
    BOS,
    IMAGE,
    PAD,
    SIDE,
    START,
    STRUCTURE,
    Q,
    positions_of,
    rows_of,
    tensors_of,
    tiny_batch,
    tiny_config,
    tiny_draws,
    tiny_model,
    wake,
)
from diffusers import DDIMScheduler
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_deem import DeemForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
RAGGED = ("bttitit", "btttt", "bitbtit", "bti")  # two images, none, two documents, one
SIDES = ("left", "right")
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    """Shared by the tests that leave it as it is."""
    return tiny_model(seed=5)


def plain_language_model(model: DeemForConditionalGeneration) -> torch.nn.Module:
    """The library's own causal LM with the weights of `model`; its head has no bias."""
    plain = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    body = {f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()}
    report = plain.load_state_dict({**body, "lm_head.weight": model.lm_head.weight}, strict=True)
    assert not report.missing_keys and not report.unexpected_keys
    return plain


# ---- gates at zero ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", SIDES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_gates_at_zero_give_exactly_the_plain_language_model(family: str, padding_side: str) -> None:
    # The head's bias is DEEM's own (new tokens start at -5), so logits are compared without it; see the next test.
    model = tiny_model(open_gates=False, text_config={"model_type": family}, lm_head_bias=False)
    plain = plain_language_model(model)
    batch = tiny_batch("bttitit", "btttttte", "bti", padding_side=padding_side, targets=False)
    pixel_values = batch.pop("pixel_values")
    batch["position_ids"] = positions_of(batch["attention_mask"])
    with torch.no_grad():
        # Without images: ids in, logits out.
        text_only = {**batch, "input_ids": batch["input_ids"].where(batch["input_ids"] < START, 5)}
        assert torch.equal(model(**text_only).logits, plain(**text_only).logits)

        # With images: the plain model is given the same embeddings.
        embeddings = plain.get_input_embeddings()(batch["input_ids"])
        tokens = model.get_image_features(pixel_values).pooler_output.flatten(0, 1)
        embeddings[batch["input_ids"] == IMAGE] = tokens
        ours = model(**batch, pixel_values=pixel_values).logits
        ids = batch.pop("input_ids")
        assert torch.equal(ours, plain(**batch, inputs_embeds=embeddings).logits)

        # And the comparison can fail: an open gate changes real tokens.
        wake(model)
        assert not torch.allclose(model(ids, pixel_values, **batch).logits, ours, atol=1e-3)


def test_head_bias_is_all_that_separates_a_new_model_from_the_plain_language_model() -> None:
    model = tiny_model(open_gates=False)
    torch.nn.init.normal_(model.lm_head.bias)
    plain = plain_language_model(model)
    batch = tiny_batch("bttttt", "btt", targets=False)
    with torch.no_grad():
        ours, theirs = model(**batch, output_hidden_states=True), plain(**batch, output_hidden_states=True)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(mine, other)
    torch.testing.assert_close(ours.logits, theirs.logits + model.lm_head.bias, rtol=0, atol=1e-6)


def test_other_language_model_families_are_refused() -> None:
    with pytest.raises(ValueError, match="gpt2.*llama"):
        DeemForConditionalGeneration(tiny_config(text_config={"model_type": "gpt2", "n_embd": 32, "n_head": 4}))


# ---- cached decoding -------------------------------------------------------------------------------------------------


def full_forward(
    model: DeemForConditionalGeneration, batch: dict[str, torch.Tensor], sequences: torch.Tensor
) -> torch.Tensor:
    """Logits of one uncached forward over whole sequences, each begun by a row of the batch.

    Positions are those of `generate`: 0 at padding, and new tokens count on from the last column, padded or not.
    """
    new = sequences.shape[1] - batch["input_ids"].shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, new), value=1)
    positions = positions_of(batch["attention_mask"]) * batch["attention_mask"]
    positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, new + 1)], dim=1)
    with torch.no_grad():
        return model(
            input_ids=sequences,
            attention_mask=mask,
            position_ids=positions,
            pixel_values=batch["pixel_values"],
            use_cache=False,
        ).logits


def repeated(batch: dict[str, torch.Tensor], times: int) -> dict[str, torch.Tensor]:
    """Every row `times` times in a row, with its pictures."""
    counts = ((batch["input_ids"] == IMAGE).sum(1) // Q).tolist()
    groups = [group.repeat(times, 1, 1, 1) for group in batch["pixel_values"].split(counts)]
    rows = {name: batch[name].repeat_interleave(times, 0) for name in ("input_ids", "attention_mask")}
    return {**rows, "pixel_values": torch.cat(groups)}


@pytest.mark.parametrize("padding_side", SIDES)
def test_cached_steps_equal_a_full_forward(model, padding_side: str) -> None:
    batch = tiny_batch(*RAGGED, padding_side=padding_side, targets=False)
    new = torch.randint(3, 259, (len(RAGGED), NEW_TOKENS), generator=torch.Generator().manual_seed(1))
    sequences = torch.cat([batch["input_ids"], new], dim=1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW_TOKENS), value=1)
    with torch.no_grad():
        expected = model(
            input_ids=sequences,
            attention_mask=mask,
            position_ids=positions_of(mask),  # real tokens count on over padding
            pixel_values=batch["pixel_values"],
            use_cache=False,
        ).logits
        mask = batch["attention_mask"]
        cache = DynamicCache(config=model.config.text_config)
        outputs = model(**batch, position_ids=positions_of(mask), use_cache=True, past_key_values=cache)
        logits = [outputs.logits]
        for step in (slice(0, 1), slice(1, 2), slice(2, NEW_TOKENS)):  # one, one, and four at once
            mask = torch.nn.functional.pad(mask, (0, new[:, step].shape[1]), value=1)
            outputs = model(
                input_ids=new[:, step],
                attention_mask=mask,
                position_ids=positions_of(mask)[:, -new[:, step].shape[1] :],
                past_key_values=outputs.past_key_values,
                image_states=outputs.image_states,
            )
            logits.append(outputs.logits)
    real = torch.nn.functional.pad(batch["attention_mask"], (0, NEW_TOKENS), value=1).bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], expected[real], rtol=0, atol=1e-5)


def test_greedy_generation_equals_a_full_forward(model) -> None:
    batch = tiny_batch(*RAGGED, padding_side="left", targets=False)
    outputs = model.generate(
        **batch,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        suppress_tokens=STRUCTURE,
        return_dict_in_generate=True,
        output_logits=True,
    )
    cached = torch.stack(outputs.logits, dim=1)  # [B, new, V]
    full = full_forward(model, batch, outputs.sequences)[:, -NEW_TOKENS - 1 : -1]
    torch.testing.assert_close(cached, full, rtol=0, atol=1e-5)
    uncached = model.generate(
        **batch,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        suppress_tokens=STRUCTURE,
        use_cache=False,
    )
    assert torch.equal(outputs.sequences, uncached)
    assert len({tuple(row.tolist()) for row in outputs.sequences[:, -NEW_TOKENS:]}) == len(RAGGED)  # no dead model


def test_beam_scores_equal_a_full_forward(model) -> None:
    beams = 3
    batch = tiny_batch(*RAGGED, padding_side="left", targets=False)
    outputs = model.generate(
        **batch,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        suppress_tokens=STRUCTURE,
        return_dict_in_generate=True,
        output_scores=True,
    )
    full = full_forward(model, repeated(batch, beams), outputs.sequences)[:, -NEW_TOKENS - 1 : -1]
    chosen = outputs.sequences[:, -NEW_TOKENS:]
    steps = full.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]  # [B * beams, new]
    got = model.compute_transition_scores(outputs.sequences, outputs.scores, outputs.beam_indices)
    torch.testing.assert_close(got, steps, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.sequences_scores, steps.mean(1), rtol=0, atol=1e-5)
    assert len({tuple(row.tolist()) for row in chosen[:beams]}) == beams


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["greedy", "beam", "uncached"],
)
def test_generating_a_batch_equals_generating_its_rows(model, options: dict) -> None:
    batch = tiny_batch(*RAGGED, padding_side="left", targets=False)
    options = {**options, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "suppress_tokens": STRUCTURE}
    together = model.generate(**batch, **options)[:, -NEW_TOKENS:]
    alone = torch.cat([model.generate(**row, **options)[:, -NEW_TOKENS:] for row in rows_of(batch)])
    assert torch.equal(together, alone)


def test_generation_sees_region_masks(model) -> None:
    batch = tiny_batch("btit", "bti", padding_side="left", targets=False)
    masks = torch.zeros(2, 1, SIDE, SIDE)
    masks[:, :, :16, :16] = 1
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    first = model.generate(**batch, region_masks=masks, **options).logits[0]
    with torch.no_grad():
        expected = model(**batch, region_masks=masks, position_ids=positions_of(batch["attention_mask"])).logits[:, -1]
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(first, model.generate(**batch, **options).logits[0], atol=1e-4)


# ---- what may not leak -----------------------------------------------------------------------------------------------


def test_a_later_image_cannot_change_an_earlier_token(model) -> None:
    batch = tiny_batch("bttittitt", targets=False)
    changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][1] += 1.0
    second = (batch["input_ids"][0] == START).nonzero()[1].item() + 1  # column of its first image token
    with torch.no_grad():
        before, after = model(**batch).logits[0], model(**changed).logits[0]
    assert torch.equal(before[:second], after[:second])
    assert (before[second:] - after[second:]).abs().amax(-1).min() > 1e-4  # every token from there on sees it


def test_images_of_another_document_are_not_seen() -> None:
    model = tiny_model()
    for layer in model.model.language_model.layers:  # packed documents share the self-attention; close that way
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    batch = tiny_batch("btittbtitt", "btit", targets=False)
    second_document = (batch["input_ids"][0] == BOS).nonzero()[1].item()
    with torch.no_grad():
        before = model(**batch).logits
        for image, changes in ((0, slice(3, second_document)), (1, slice(second_document + 3, None))):
            pixel_values = batch["pixel_values"].clone()
            pixel_values[image] += 1.0
            moved = (model(**{**batch, "pixel_values": pixel_values}).logits - before).abs().amax(-1) > 1e-5
            inside = torch.zeros_like(moved)
            inside[0, changes] = True
            assert not moved[~inside].any()
            assert moved[inside].any()


def test_visible_images_of_each_token(model) -> None:
    word = "titbiti"
    batch = tiny_batch(word, "bt", targets=False)
    with torch.no_grad():
        states = model.model(**batch).image_states
    # t | s,iiii | t | b | s,iiii | t | s,iiii: an image is seen from its first image token to the next document's bos.
    seen = [[]] * 2 + [[0]] * 5 + [[]] * 2 + [[1]] * 6 + [[1, 2]] * 4
    got = [[k for k in range(3) if row[k]] for row in states.visible[0].tolist()]
    assert got[: len(seen)] == [list(entry) for entry in seen]
    assert not states.visible[1].any()
    assert states.index[0].tolist() == [0, 1, 2]


# ---- a batch equals its rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", SIDES)
def test_logits_of_a_batch_equal_those_of_its_rows(model, padding_side: str) -> None:
    batch = tiny_batch(*RAGGED, padding_side=padding_side, targets=False)
    with torch.no_grad():
        together = model(**batch, position_ids=positions_of(batch["attention_mask"])).logits
        for logits, mask, row in zip(together, batch["attention_mask"].bool(), rows_of(batch), strict=True):
            torch.testing.assert_close(logits[mask], model(**row).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding_side", SIDES)
def test_losses_of_a_batch_are_the_means_of_its_rows(model, padding_side: str) -> None:
    words = ("btitti", "bttt", "bttibtit", "btti")
    batch = tiny_batch(*words, padding_side=padding_side)
    draws = {"consistency_draws": tiny_draws(5), "image_draws": tiny_draws(5, seed=1, image=True)}
    with torch.no_grad():
        together = model(**batch, **draws, position_ids=positions_of(batch["attention_mask"]))
        rows, first, sums = rows_of(batch), 0, dict.fromkeys(("text", "image", "consistency"), 0.0)
        for row in rows:
            count = len(row.get("pixel_values", ()))
            own = {
                name: {key: value[first : first + count] for key, value in drawn.items()}
                for name, drawn in draws.items()
                if count
            }
            alone = model(**row, **own)
            sums["text"] += alone.text_loss * (row["labels"][:, 1:] != -100).sum()
            sums["image"] += (alone.image_loss or 0.0) * count
            sums["consistency"] += (alone.consistency_loss or 0.0) * count
            first += count
    targets = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(together.text_loss, sums["text"] / targets, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.image_loss, sums["image"] / 5, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.consistency_loss, sums["consistency"] / 5, rtol=0, atol=1e-5)


# ---- learning --------------------------------------------------------------------------------------------------------

# Which parts each loss reaches, by prefix. What stands under no prefix of a loss must not move under it.
VISION = ("model.vision_tower.", "model.perceiver.")
LANGUAGE = ("model.projector.", "model.language_model.", "model.image_attention.", "model.start_of_image")
DIFFUSION = ("image_decoder.denoiser.", "image_decoder.feature_fusion.")
BELONGS = {
    "text": (*VISION, *LANGUAGE, "lm_head."),
    "consistency": (*VISION, *DIFFUSION, "image_decoder.token_projector."),
    "image": (
        *VISION,
        *LANGUAGE,
        *DIFFUSION,
        "image_decoder.context_projector.",
        "image_decoder.perceiver.",
        "image_decoder.null_condition",
    ),
}
# The finest level of the pyramid is read by the image decoder alone (image_attention_levels are 1, 2 and 3).
EXCEPT = {"text": ("model.vision_tower.level_projections.0.",), "consistency": (), "image": ()}
# A shift common to all keys leaves a softmax as it is: these gradients are zero but for rounding.
SHIFTS = ("key_norm.bias", "image_decoder.perceiver.layers.0.self_attention.key.bias")
SHIFTS = (*SHIFTS, "image_decoder.perceiver.layers.0.cross_attention.key.bias")


@pytest.mark.parametrize("loss", ["text", "image", "consistency"])
def test_every_trainable_parameter_moves_and_no_other(loss: str) -> None:
    model = tiny_model(open_gates=False).train()
    batch = tiny_batch("btittite", "btitti")
    draws = {"drop_condition": torch.tensor([False, True, False, False])}  # the null condition needs its turn
    weights = {f"{name}_loss_weight": float(name == loss) for name in BELONGS}
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        model(**batch, **weights, image_draws=draws, generator=generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = tensors_of(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in trainable if name.startswith(BELONGS[loss]) and not name.startswith(EXCEPT[loss])}
    assert moved - expected == set()
    assert {name for name in expected - moved if not name.endswith(SHIFTS)} == set()


def test_what_is_frozen(model) -> None:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name in frozen:
        assert name.startswith("image_decoder.vae.") or (
            name.startswith("image_decoder.feature_fusion.") and name.endswith("null_value")
        )
    assert sum(name.endswith("null_value") for name in frozen) == 7  # six skips and the middle
    assert all(name in frozen for name, _ in model.named_parameters() if name.startswith("image_decoder.vae."))
    assert model.model.image_attention["0"].synchronizer.null_value.requires_grad


def test_consistency_gradient_reaches_the_encoder_through_the_tokens_alone() -> None:
    model = tiny_model(image_decoder_config={"consistency_condition": "tokens"})
    batch = tiny_batch("bti")
    model.consistency_loss(batch["pixel_values"], batch["target_pixel_values"]).backward()
    assert model.model.vision_tower.encoder.embeddings.patch_embeddings.weight.grad.abs().max() > 0
    assert model.image_decoder.token_projector.weight.grad.abs().max() > 0


@pytest.mark.parametrize("training", [True, False])
def test_callers_tensors_are_unchanged_after_a_step(training: bool) -> None:
    model = tiny_model().train(training)
    batch = tiny_batch("btittit", "bti", padding_side="left")
    batch |= {
        "region_masks": torch.ones(3, 1, SIDE, SIDE),
        "document_starts": torch.tensor([0, 0, 9]),
        "image_loss_mask": torch.tensor([True, False, True]),
    }
    batch["region_masks"][:, :, :, :24] = 0
    draws = {"consistency_draws": tiny_draws(3), "image_draws": tiny_draws(3, image=True)}
    given = {**batch, **{f"{a}.{b}": value for a, drawn in draws.items() for b, value in drawn.items()}}
    copies = {name: value.clone() for name, value in given.items()}
    keys = set(batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(**batch, **draws).loss.backward()
    optimizer.step()
    assert set(batch) == keys
    for name, value in given.items():
        assert torch.equal(value, copies[name]), name
        assert not value.requires_grad and value.grad is None, name


# ---- losses ----------------------------------------------------------------------------------------------------------


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


# ---- region masks ----------------------------------------------------------------------------------------------------


def test_whole_image_masks_equal_no_masks() -> None:
    for use_region_tokens in (False, True):
        model = tiny_model(use_region_tokens=use_region_tokens)
        batch = tiny_batch("btitti")
        draws = {"consistency_draws": tiny_draws(2), "image_draws": tiny_draws(2, image=True)}
        with torch.no_grad():
            without = model(**batch, **draws)
            whole = model(**batch, **draws, region_masks=torch.ones(2, 1, SIDE, SIDE))
        assert torch.equal(without.logits, whole.logits)
        assert without.consistency_loss == whole.consistency_loss and without.image_loss == whole.image_loss


def test_error_outside_the_region_counts_nothing(model) -> None:
    decoder = model.image_decoder
    batch = tiny_batch("bti")
    masks = torch.zeros(1, 1, SIDE, SIDE)
    masks[..., 16:48, 8:40] = 1  # latent rows 2-5 and columns 1-4
    outside = torch.ones(1, 1, 8, 8)
    outside[..., 2:6, 1:5] = 0
    draws = tiny_draws(1)
    # Other noise and other latents outside, such that the noisy latents, hence the prediction, stay as they are.
    share = decoder.scheduler.alphas_cumprod[draws["timesteps"]].view(-1, 1, 1, 1)
    change = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9)) * outside
    shifted = {
        **draws,
        "noise": draws["noise"] + change,
        "latents": draws["latents"] - change * ((1 - share) / share).sqrt(),
    }
    with torch.no_grad():
        images = model.get_image_features(batch["pixel_values"], masks)

        def loss(drawn: dict, region_masks: torch.Tensor | None) -> torch.Tensor:
            return decoder.consistency_loss(
                image_tokens=images.image_tokens,
                image_features=images.image_features,
                region_masks=region_masks,
                **drawn,
            )

        torch.testing.assert_close(loss(draws, masks), loss(shifted, masks), rtol=0, atol=1e-4)
        assert (loss(draws, None) - loss(shifted, None)).abs() > 0.1


def test_regions_reach_the_tokens_but_not_the_pyramid(model) -> None:
    batch = tiny_batch("bti")
    masks = torch.zeros(1, 1, SIDE, SIDE)
    masks[..., :32, :32] = 1
    with torch.no_grad():
        whole, region = (
            model.get_image_features(batch["pixel_values"]),
            model.get_image_features(batch["pixel_values"], masks),
        )
        grid = model.model.vision_tower(batch["pixel_values"], masks).grid_tokens
    assert not torch.allclose(whole.image_tokens, region.image_tokens, atol=1e-4)
    for one, other in zip(whole.image_features, region.image_features, strict=True):
        assert torch.equal(one, other)
    empty = torch.ones(4, 4, dtype=torch.bool)
    empty[:2, :2] = False
    bias = model.model.vision_tower.output_norm.bias  # what a layer norm gives for zeros
    torch.testing.assert_close(grid[0, 1:][empty.flatten()], bias.expand(12, -1))


@pytest.mark.parametrize(("resize", "survives"), [("bilinear", False), ("antialias", True)])
def test_a_region_of_one_pixel(resize: str, survives: bool) -> None:
    model = tiny_model(region_mask_resize=resize, image_decoder_config={"region_mask_resize": resize})
    batch = tiny_batch("btti")
    batch["region_masks"] = torch.zeros(1, 1, SIDE, SIDE)
    batch["region_masks"][..., 0, 0] = 1  # between the sampling points of every coarser map
    with torch.no_grad():
        loss = model(**batch, consistency_draws=tiny_draws(1)).consistency_loss
        grid = model.model.vision_tower(batch["pixel_values"], batch["region_masks"]).grid_tokens[0, 1:]
    assert (loss > 0) == survives and loss.isfinite()
    bias = model.model.vision_tower.output_norm.bias
    kept = ((grid - bias).abs().amax(-1) > 1e-6).sum()
    assert kept == (1 if survives else 0)


# ---- what an image is drawn from -------------------------------------------------------------------------------------


def image_context(model, batch: dict[str, torch.Tensor], **extra):
    with torch.no_grad():
        outputs = model.model(**batch)
        return model.get_image_context(
            outputs.last_hidden_state, batch["input_ids"], batch["attention_mask"], outputs.image_output, **extra
        )


def seen_images(states) -> list[list[int]]:
    """Which images each drawn image sees, oldest first."""
    pairs = zip(states.index.tolist(), states.visible.tolist(), strict=True)
    return [[image for image, visible in zip(*pair, strict=True) if visible] for pair in pairs]


@pytest.mark.parametrize("padding_side", SIDES)
@pytest.mark.parametrize(
    ("previous", "expected"),
    [
        (1, [[], [0], [1], [], [3], [], [], [6]]),
        (2, [[], [0], [0, 1], [], [3], [], [], [6]]),
        (3, [[], [0], [0, 1], [], [3], [], [], [6]]),
    ],
)
def test_previous_images_end_at_row_and_document(padding_side: str, previous: int, expected: list) -> None:
    model = tiny_model(image_decoder_config={"num_previous_images": previous})
    batch = tiny_batch("btititibtiti", "bi", "btbitit", padding_side=padding_side, targets=False)
    _, _, states = image_context(model, batch)
    assert seen_images(states) == expected


def test_two_previous_images_change_the_loss() -> None:
    batch = tiny_batch("btititi")
    losses = []
    for previous in (1, 2):
        model = tiny_model(image_decoder_config={"num_previous_images": previous})
        with torch.no_grad():
            losses.append(model(**batch, image_draws=tiny_draws(3, image=True)).image_loss)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("padding_side", SIDES)
def test_context_runs_from_start_of_image_back_to_the_document(model, padding_side: str) -> None:
    batch = tiny_batch("btbtti", "bttttttit", "ti", padding_side=padding_side, targets=False)
    batch["position_ids"] = positions_of(batch["attention_mask"])
    contexts, mask, _ = image_context(model, batch)
    with torch.no_grad():
        hidden_states = model.model(**batch).last_hidden_state
    for row, (drawn_from, start) in enumerate(((4, 2), (8, 0), (2, 0))):  # bos t t s | bos 6t s | t s
        assert mask[row].tolist() == [k < drawn_from for k in range(mask.shape[1])]
        tokens = hidden_states[row][batch["attention_mask"][row].bool()]
        assert torch.equal(contexts[row, :drawn_from], tokens[start : start + drawn_from].flip(0))
        assert not contexts[row, drawn_from:].any()


def test_given_document_starts_are_used(model) -> None:
    batch = tiny_batch("btitbtti", "btti")
    draws = {"image_draws": tiny_draws(3, image=True), "consistency_loss_weight": 0.0}
    found = torch.tensor([0, 8, 0])
    with torch.no_grad():
        without = model(**batch, **draws).image_loss
        assert model(**batch, **draws, document_starts=found).image_loss == without
        assert model(**batch, **draws, document_starts=torch.zeros_like(found)).image_loss != without
    _, mask, states = image_context(model, {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")},
                                    document_starts=torch.zeros_like(found))  # fmt: skip
    assert seen_images(states) == [[], [0], []]
    assert mask.sum(1).tolist() == [3, 12, 4]


@pytest.mark.parametrize("words", [("btitti", "bti", "bttt"), ("tti", "i")], ids=["with bos", "without bos"])
def test_padding_side_does_not_change_the_losses(model, words: tuple[str, ...]) -> None:
    losses = []
    for side in SIDES:
        batch = tiny_batch(*words, padding_side=side)
        count = len(batch["pixel_values"])
        with torch.no_grad():
            if BOS not in batch["input_ids"]:  # a first token that is trained follows padding, or nothing
                batch["labels"][batch["attention_mask"].cumsum(1) == 1] = -100
            losses.append(
                model(
                    **batch,
                    position_ids=positions_of(batch["attention_mask"]),
                    consistency_draws=tiny_draws(count),
                    image_draws=tiny_draws(count, image=True),
                )
            )
    for name in ("text_loss", "image_loss", "consistency_loss"):
        torch.testing.assert_close(losses[0][name], losses[1][name], rtol=0, atol=1e-5)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + k) for k in range(count)]


@pytest.mark.parametrize(
    "words",
    [("bttitit", "btt", "bitbti"), ("bttts", "btitis", "bs"), ("btts", "btit", "bitbtis"), ("btt", "bttttt")],
    ids=["appended", "given", "mixed", "text only"],
)
def test_generated_pictures_do_not_depend_on_padding_or_neighbors(model, words: tuple[str, ...]) -> None:
    left, right = (
        model.generate_images(**tiny_batch(*words, padding_side=side, targets=False), generator=generators(len(words)))
        for side in SIDES
    )
    assert left.shape == (len(words), 3, SIDE, SIDE) and left.min() >= 0 and left.max() <= 1
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)
    batch = tiny_batch(*words, targets=False)
    for index, row in enumerate(rows_of(batch)):
        alone = model.generate_images(**row, generator=generators(1, index))
        torch.testing.assert_close(left[index : index + 1], alone, rtol=0, atol=1e-5)


def test_generated_pictures_depend_on_text_images_and_guidance(model) -> None:
    batch = tiny_batch("bttit", targets=False)

    def draw(**changes) -> torch.Tensor:
        return model.generate_images(**{**batch, **changes}, generator=generators(1))

    first = draw()
    assert torch.equal(first, draw())
    other_text = batch["input_ids"].clone()
    other_text[0, 1] = 77
    for changes in (
        {"input_ids": other_text},
        {"pixel_values": batch["pixel_values"] + 1},
        {"guidance_scale": 1.0},
        {"num_inference_steps": 2},
        {"scheduler": DDIMScheduler.from_config(model.config.image_decoder_config.scheduler)},
        {"latents": torch.ones(1, 4, 8, 8)},
        {"region_masks": torch.nn.functional.pad(torch.ones(1, 1, 16, 16), (0, 48, 0, 48))},
    ):
        assert not torch.allclose(first, draw(**changes), atol=1e-5), changes.keys()
    assert torch.equal(first, draw())  # nothing of that stayed behind


def test_schedulers_are_left_as_they_were(model) -> None:
    own = model.image_decoder.scheduler
    given = DDIMScheduler.from_config(model.config.image_decoder_config.scheduler)
    for scheduler in (None, given):
        model.generate_images(**tiny_batch("btt", targets=False), scheduler=scheduler)
    for scheduler in (own, given):
        assert scheduler.num_inference_steps is None and len(scheduler.timesteps) == 1000
    assert model.image_decoder.scheduler is own


def test_guidance_is_the_published_mixture(model) -> None:
    decoder = model.image_decoder
    contexts, mask, states = image_context(model, tiny_batch("bttit", "bti", targets=False))
    with torch.no_grad():
        condition = decoder.condition_from_context(contexts, mask)
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        scheduler = DDIMScheduler.from_config(model.config.image_decoder_config.scheduler)
        got = decoder.sample(condition, states, 1, 2.5, latents=latents, scheduler=scheduler)
        scheduler.set_timesteps(1)
        step = scheduler.timesteps[0]
        times = step.expand(2)
        without = decoder.denoise(latents, times, decoder.null_condition.expand_as(condition), states)
        within = decoder.denoise(latents, times, condition, states)
        prediction = without + 2.5 * (within - without)
        expected = decoder.decode(scheduler.step(prediction, step, latents).prev_sample)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_reconstructions_are_reproducible_and_independent(model) -> None:
    pixel_values = tiny_batch("btititi", targets=False)["pixel_values"]
    together = model.reconstruct(pixel_values, generator=generators(3))
    assert together.shape == (3, 3, SIDE, SIDE) and together.min() >= 0 and together.max() <= 1
    assert torch.equal(together, model.reconstruct(pixel_values, generator=generators(3)))
    assert not torch.allclose(together, model.reconstruct(pixel_values, generator=generators(3, 9)), atol=1e-4)
    for index in range(3):
        alone = model.reconstruct(pixel_values[index : index + 1], generator=generators(1, index))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-5)
    one = [model.reconstruct(pixel_values, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*one)
    masks = torch.zeros(3, 1, SIDE, SIDE)
    masks[..., :32, :32] = 1
    assert not torch.allclose(together, model.reconstruct(pixel_values, masks, generator=generators(3)), atol=1e-5)


def test_drawing_leaves_the_global_random_state_alone(model) -> None:
    batch = tiny_batch("bti", targets=False)
    state = torch.get_rng_state()
    model.generate_images(**batch, generator=torch.Generator().manual_seed(0))
    model.reconstruct(batch["pixel_values"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(**tiny_batch("bti"), generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())


# ---- a model without image decoder -----------------------------------------------------------------------------------


def test_a_model_that_only_writes() -> None:
    model = tiny_model(image_decoder_config=None)
    batch = tiny_batch("btitti", "bt")
    targets = batch.pop("target_pixel_values")
    outputs = model(**batch)
    assert torch.equal(outputs.loss, outputs.text_loss)
    inputs = tiny_batch("btitti", "bt", padding_side="left", targets=False)
    assert model.generate(**inputs, max_new_tokens=2, suppress_tokens=STRUCTURE).shape[0] == 2
    for call in (
        lambda: model.generate_images(**inputs),
        lambda: model.reconstruct(inputs["pixel_values"]),
        lambda: model.consistency_loss(inputs["pixel_values"], targets),
        lambda: model(**batch, target_pixel_values=targets),
    ):
        with pytest.raises(ValueError, match="no image decoder"):
            call()


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_the_numbers(model) -> None:
    batch = tiny_batch("btitti", "bti")
    with pytest.raises(ValueError, match="^Image features and image tokens do not match.*12.*8"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]})
    with pytest.raises(ValueError, match="^Image features and image tokens do not match"):
        fewer = {
            **tiny_batch("btitti", "bti", padding_side="left", targets=False),
            "pixel_values": batch["pixel_values"][:2],
        }
        model.generate(**fewer, max_new_tokens=1)
    with pytest.raises(ValueError, match="2 target pictures for 3 images"):
        model(**{**batch, "target_pixel_values": batch["target_pixel_values"][:2]})
    with pytest.raises(ValueError, match="32, 32.*64, 64"):
        model(**batch, region_masks=torch.ones(3, 1, 32, 32))
    with pytest.raises(ValueError, match="[12] .*3 "):
        model(**batch, region_masks=torch.ones(1, 1, SIDE, SIDE))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**batch, inputs_embeds=model.get_input_embeddings()(batch["input_ids"]))
    with pytest.raises(ValueError, match="not both"):
        model(**batch, mm_encoder_outputs={"image": model.get_image_features(batch["pixel_values"])})
    with pytest.raises(ValueError, match="8 images in one sequence.*holds 7"):
        model(**tiny_batch("b" + "ti" * 8, targets=False))


def test_images_without_their_start_of_image_token_cannot_be_drawn(model) -> None:
    batch = tiny_batch("btitti")
    batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] != START, 7)
    with pytest.raises(ValueError, match="2 images, but 0 start-of-image tokens"):
        model(**batch)


def test_image_tokens_without_pictures(model) -> None:
    """Nothing is generated from them, and no forward reads them as nothing."""
    batch = tiny_batch("btit", targets=False)
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="^Image features and image tokens do not match, tokens: 4, features: 0"):
        model.generate(**batch, max_new_tokens=2)
    with pytest.raises(ValueError, match="^Image features and image tokens do not match, tokens: 4, features: 0"):
        model(**batch)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="^Image features and image tokens do not match, tokens: 4, features: 0"):
        model(inputs_embeds=embeds)


# ---- saving and loading ----------------------------------------------------------------------------------------------

LOADING = """
import sys, torch
import modeling_deem
from transformers import AutoModel, AutoModelForImageTextToText

expected, expected_frozen = torch.load(sys.argv[2])
for auto in (AutoModel, AutoModelForImageTextToText):
    model = auto.from_pretrained(sys.argv[1])
    assert type(model) is modeling_deem.DeemForConditionalGeneration, type(model)
    assert not model.training
    got = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert set(got) == set(expected), set(got) ^ set(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == got[name].dtype and torch.equal(tensor, got[name]), name
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == set(expected_frozen), (len(frozen), len(expected_frozen))
print("all equal")
"""


def test_every_tensor_and_buffer_survives_in_a_fresh_process(tmp_path) -> None:
    model = tiny_model(use_region_tokens=True)
    model.save_pretrained(tmp_path / "model")
    expected = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
    for buffer in ("positions", "inv_freq"):  # not in the file: rebuilt
        assert any(name.endswith(f".{buffer}") for name in expected)
        assert not any(name.endswith(f".{buffer}") for name in model.state_dict())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    torch.save((expected, frozen), tmp_path / "expected.pt")
    result = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path / "model"), str(tmp_path / "expected.pt")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "all equal" in result.stdout, result.stderr[-3000:]


def test_a_second_save_equals_the_first(tmp_path) -> None:
    model = tiny_model(tie_word_embeddings=True, text_config={"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "first")
    loaded = DeemForConditionalGeneration.from_pretrained(tmp_path / "first")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    loaded.save_pretrained(tmp_path / "second")
    for name in ("generation_config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name

    def config(folder: str) -> list[str]:
        lines = (tmp_path / folder / "config.json").read_text().splitlines()
        return [line for line in lines if '"dtype"' not in line]  # transformers notes it on loading

    assert config("first") == config("second")


def test_pad_token_of_the_fixtures_is_the_models(model) -> None:
    config = model.config
    assert (config.pad_token_id, config.bos_token_id) == (PAD, BOS)
    assert (config.start_of_image_token_id, config.image_token_id, config.num_image_tokens) == (START, IMAGE, Q)
