# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""LoRA by one entry: what trains, what stays, and that saving, loading and merging change nothing."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deem_fixtures import tiny_batch, tiny_draws, tiny_model
from peft import PeftModel
from transformers import AutoModelForImageTextToText, TrainerCallback, set_seed

from modeling_deem import DeemForConditionalGeneration, adapter_targets, modules_to_save
from recipes.training.adapters import add_adapters, merge_adapters
from recipes.training.parameter_groups import format_parts, parameter_groups, parts_table
from recipes.training.trainer import DeemTrainingArguments, RecipeTrainer, prepare_parts

LORA = {"r": 4, "lora_alpha": 16}
FROZEN = ["image_decoder.denoiser"]
BATCH = tiny_batch("btittti", "btitt")


def arguments(folder: Path, lora: dict[str, Any] | str, **options: Any) -> DeemTrainingArguments:
    options = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "freeze": FROZEN} | options
    return DeemTrainingArguments(
        output_dir=str(folder), lora=lora, use_cpu=True, report_to="none", disable_tqdm=True, warmup_steps=1, **options
    )


@pytest.fixture(params=["own head", "tied head", "encoder too"])
def adapted(request, tmp_path) -> tuple[PeftModel, DeemForConditionalGeneration]:
    """A model with adapters on a saved base, and that base."""
    tied = request.param == "tied head"
    tiny_model(text_config={"tie_word_embeddings": tied}).save_pretrained(tmp_path / "base")
    base, model = (DeemForConditionalGeneration.from_pretrained(tmp_path / "base") for _ in range(2))
    set_seed(0)
    lora = {**LORA, "vision": request.param == "encoder too"}
    return prepare_parts(model, arguments(tmp_path / "run", lora)), base


def losses(model: torch.nn.Module) -> list[torch.Tensor]:
    draws = {"consistency_draws": tiny_draws(3), "image_draws": tiny_draws(3, seed=1, image=True)}
    outputs = model(**BATCH, **draws)
    return [outputs.text_loss, outputs.image_loss, outputs.consistency_loss]


def train(model: PeftModel, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(losses(model)).backward()
        optimizer.step()


def test_copies_and_adapters_learn_and_nothing_else(adapted) -> None:
    model, base = adapted
    with torch.no_grad():
        # Adapters start at zero; sums may be rounded otherwise, by where tensors lie in memory.
        torch.testing.assert_close(losses(model), losses(base), rtol=1e-6, atol=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    named = model.named_parameters(remove_duplicate=False)
    trainable = {name for name, parameter in named if parameter.requires_grad}
    train(model, steps=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trainable), name
    own = ("lora_", "modules_to_save", "trainable_tokens_delta")
    assert all(any(word in name for word in own) for name in trainable)
    for word in ("perceiver", "image_attention.0", "gate", "feature_fusion", "token_projector", "lm_head"):
        assert any(word in name and "modules_to_save" in name for name in trainable), word
    assert any("level_projections.0" in name for name in trainable)
    assert not any("denoiser" in name or ".vae." in name for name in trainable)
    # The head's old rows are the language model's own.
    first = base.config.start_of_image_token_id
    head = model.get_output_embeddings().weight
    assert torch.equal(head[:first], base.lm_head.weight[:first])
    assert not torch.equal(head[first:], base.lm_head.weight[first:])
    # The token that begins an image is read anew, all others as before.
    ids = torch.arange(first + 1)
    changed = (model.get_input_embeddings()(ids) != base.get_input_embeddings()(ids)).any(1)
    assert changed.tolist() == [False] * first + [True]


def test_saving_loading_and_merging_change_nothing(adapted, tmp_path) -> None:
    model, base = adapted
    train(model, steps=2)
    model.eval()
    with torch.no_grad():
        expected = losses(model)
        assert losses(base) != expected
    model.save_pretrained(tmp_path / "adapter")
    saved = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert saved < 0.5 * (tmp_path / "base" / "model.safetensors").stat().st_size

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        DeemForConditionalGeneration.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    trained = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    with torch.no_grad():
        for one in (loaded, again.eval()):  # kernels differ by where in memory a file is mapped to
            torch.testing.assert_close(losses(one), expected, rtol=1e-5, atol=1e-6)
    prompt = tiny_batch("btittti", "btitt", padding_side="left", targets=False)
    ids = model.generate(**prompt, max_new_tokens=5)
    assert torch.equal(loaded.generate(**prompt, max_new_tokens=5), ids)

    merged = merge_adapters(again)
    assert set(merged.state_dict()) == set(base.state_dict())
    merged.save_pretrained(tmp_path / "merged")
    whole = DeemForConditionalGeneration.from_pretrained(tmp_path / "merged")
    tied = base.config.tie_word_embeddings
    assert (whole.lm_head.weight is whole.get_input_embeddings().weight) == tied
    with torch.no_grad():
        for one in (merged, whole):
            torch.testing.assert_close(losses(one), expected, rtol=1e-4, atol=1e-5)


def test_groups_and_parts_bear_the_names_they_have_without_adapters(tmp_path) -> None:
    groups = {"model.image_attention.*.gate": {"lr": 1e-3}, "model.vision_tower.encoder": {"lr": 1e-4}}
    model = prepare_parts(tiny_model(), arguments(tmp_path, LORA))
    chosen = parameter_groups(model, groups, lr=1e-2, weight_decay=0.1)
    rates = {name: group["lr"] for group in chosen for name in group["names"]}
    assert {name: rate for name, rate in rates.items() if rate == 1e-3} == {
        f"model.image_attention.{idx}.gate": 1e-3 for idx in (0, 2)
    }
    assert any(rate == 1e-4 for rate in rates.values())
    decays = {name: group["weight_decay"] for group in chosen for name in group["names"]}
    assert decays["lm_head.weight"] == 0.0 and decays["model.perceiver.queries"] == 0.1
    assert len(rates) == sum(parameter.requires_grad for parameter in model.parameters())
    table = parts_table(model, chosen)
    assert 0 < table["language_model"]["trainable"] < 0.5 * table["language_model"]["frozen"]
    assert table["perceiver"]["frozen"] == 0 and "base_model" not in format_parts(table)


def test_targets_are_the_linear_layers_of_the_parts_and_of_nothing_else() -> None:
    model = tiny_model()
    pattern = adapter_targets(model, ["model.language_model", "model.vision_tower.encoder"])
    hit = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    assert len(hit) == 4 * 7 + 4 * 2  # four layers of Llama, one block in each of ConvNeXt's stages
    assert all(name.startswith(("model.language_model.layers.", "model.vision_tower.encoder.")) for name in hit)
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in hit)


def test_only_what_trains_is_copied() -> None:
    model = tiny_model()
    model.requires_grad_(False)
    for part in (model.model.perceiver, model.model.vision_tower.level_projections[1], model.image_decoder.perceiver):
        part.requires_grad_(True)
    names = ["model.vision_tower.level_projections.1", "model.perceiver", "image_decoder.perceiver"]
    assert modules_to_save(model, frozen=()) == names
    model.model.perceiver.queries.requires_grad_(False)
    assert "model.perceiver" not in modules_to_save(model, frozen=())
    assert "model.perceiver.layers.0" in modules_to_save(model, frozen=())


def test_fields_that_lora_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['rank'\].*LoraConfig"):
        add_adapters(tiny_model(), {"rank": 3})


class Batches(torch.utils.data.Dataset):
    """The same batch for ever, as samples that the collator hands on."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        return BATCH


def test_the_trainer_resumes_adapters_and_leaves_a_whole_model(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")

    class StopAfter(TrainerCallback):
        def __init__(self, step: int):
            self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == self.step

    def run(folder: Path, steps: int) -> RecipeTrainer:
        set_seed(0)
        trainer = RecipeTrainer(
            model=DeemForConditionalGeneration.from_pretrained(tmp_path / "base"),
            args=arguments(folder, '{"r": 4, "lora_alpha": 16}', max_steps=4, per_device_train_batch_size=1),
            train_dataset=Batches(),
            data_collator=lambda samples: samples[0],
        )
        trainer.add_callback(StopAfter(steps))
        trainer.train()
        return trainer

    run(tmp_path / "whole", 4).save_model()
    run(tmp_path / "halves", 2)
    assert (tmp_path / "halves" / "checkpoint-2" / "adapter_config.json").is_file()
    assert not (tmp_path / "halves" / "checkpoint-2" / "model.safetensors").exists()
    run(tmp_path / "halves", 4).save_model()

    base, once, twice = (
        DeemForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in ("base", "whole", "halves")
    )
    assert set(once) == set(base)
    for name, tensor in once.items():
        torch.testing.assert_close(twice[name], tensor, rtol=0, atol=1e-6, msg=name)
    moved = {name for name, tensor in once.items() if not torch.equal(tensor, base[name])}
    assert any("q_proj" in name for name in moved) and "model.perceiver.queries" in moved
    assert not any("denoiser" in name or ".vae." in name for name in moved)
