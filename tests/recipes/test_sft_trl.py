# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Text alone by trl's SFTTrainer: its batches, losses and gradients are ours, and nothing is drawn."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from deem_fixtures import tiny_model
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from modeling_deem import DeemForConditionalGeneration, adapter_targets
from modeling_deem.adapters_deem import LANGUAGE_MODEL
from processing import DeemDataCollator, DeemProcessor
from recipes import sft_trl
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_formats
from recipes.training.text_rows import load_rows
from recipes.training.text_trainer import ChatCollator, TextTrainer, TextTrainingArguments, make_trainer

OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "activation_checkpointing": False,
}
INPUTS = ("input_ids", "attention_mask", "labels", "pixel_values")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_formats(folder, World(size=64), 8, formats=["chats", "vqa"])
    return folder


@pytest.fixture(scope="module")
def rows(world) -> Dataset:
    return load_rows([str(world / "chats")])


def trainer_of(
    rows: Dataset, processor: DeemProcessor, folder: Path, **options: Any
) -> tuple[TextTrainer, DeemForConditionalGeneration]:
    model = tiny_model()
    args = TextTrainingArguments(output_dir=str(folder), **{"max_steps": 2, "warmup_steps": 0, **OPTIONS, **options})
    return make_trainer(model, processor, args, rows), model


def count_calls(module: torch.nn.Module) -> list[str]:
    """A list that grows whenever the module or one within it is called."""
    calls: list[str] = []
    for name, inner in module.named_modules():
        inner.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    return calls


# ---- batches ----


def test_batches_are_those_of_our_collator_and_of_trls_own(rows, tiny_processor, tmp_path):
    few = [rows[index] for index in range(4)]
    ours = ChatCollator(tiny_processor)(few)
    own = DeemDataCollator(tiny_processor, return_targets=False)(few)
    assert set(ours) == set(INPUTS)
    plain = SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(str(tmp_path), assistant_only_loss=True, max_length=None, **OPTIONS),
        train_dataset=rows,
        processing_class=tiny_processor,
    )
    theirs = plain.data_collator(few)
    for name in INPUTS:
        assert torch.equal(ours[name], own[name]) and torch.equal(ours[name], theirs[name]), name


def test_rows_as_trl_allows_them(rows, tiny_processor):
    """Plain strings: the images stand before what the user says first. One image may be called `image`."""
    image = rows[0]["images"][0]
    items = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    answer = {"role": "assistant", "content": "A star"}
    same = [
        {"messages": [{"role": "user", "content": "What is it?"}, answer], "images": [image]},
        {"messages": [{"role": "user", "content": items}, answer], "image": image},
    ]
    batches = [ChatCollator(tiny_processor)([row]) for row in same]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in INPUTS)
    without = ChatCollator(tiny_processor)([{"messages": [{"role": "user", "content": "Hello."}, answer]}])
    assert "pixel_values" not in without
    with pytest.raises(ValueError, match=r"has \d+ tokens .*max_length is 20"):
        ChatCollator(tiny_processor, max_length=20)(same)


def test_rows_without_images_and_images_as_bytes_or_paths(tiny_processor, run, tmp_path):
    """Each file alone, and all together as the sources of one run."""
    data, image = io.BytesIO(), Image.new("RGB", (64, 64), "red")
    image.save(data, "PNG")
    image.save(tmp_path / "a.png")
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A card"}]
    struct = {"bytes": data.getvalue(), "path": None}
    columns = {
        "bytes": {"images": [[data.getvalue()], []]},
        "struct": {"images": [[struct], [struct]]},
        "one": {"image": [data.getvalue()] * 2},
        "paths": {"images": [["a.png"], ["a.png"]]},
        "words": {},
    }
    files = [tmp_path / f"{name}.parquet" for name in columns]
    for file in files:
        pq.write_table(pa.table({"messages": [chat, chat], **columns[file.stem]}), file)
        batch = ChatCollator(tiny_processor)(list(load_rows([str(file)])))
        assert len(batch.get("pixel_values", [])) == {"bytes": 1, "words": 0}.get(file.stem, 2), file.stem
    for source in (files[-1:], files):
        _, logs = run(data=source, eval_strategy="no", max_steps=2, save_strategy="no")
        assert [0 < log["loss"] < 20 for log in logs if "loss" in log] == [True, True]


@pytest.mark.parametrize("form", ["names", "one", "struct", "part"])
def test_rows_name_images_inside_the_datas_folder_only(tiny_processor, tmp_path, monkeypatch, capsys, form):
    """Above, absolute, by an address, not there: left out and counted; `--image_folders` allows other folders."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    colors = {"data/in.png": "red", "data/images/b.png": "blue", "secret.png": "green"}
    for name, color in colors.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), color).save(tmp_path / name)
    inside = ["in.png", "b.png", "images/../in.png", str(tmp_path / "data" / "in.png")]
    outside = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        f"file://{tmp_path}/secret.png",
        "http://127.0.0.1/a.png",
    ]
    file = tmp_path / "data" / "rows.parquet"
    chats = []
    for name in [*inside, "none.png", *outside]:
        said = ["What?", "A card"]
        if form == "part":  # a column has one type
            said = [[{"type": "text", "text": text, "image": None}] for text in said]
            said[0].insert(0, {"type": "image", "text": None, "image": name})
        chats.append([{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}])
    names = [*inside, "none.png", *outside]
    columns = {
        "names": {"images": [[name] for name in names]},
        "one": {"image": names},
        "struct": {"images": [[{"bytes": None, "path": name}] for name in names]},
        "part": {},
    }
    pq.write_table(pa.table({"messages": chats, **columns[form]}), file)
    rows, said = load_rows([str(file)]), capsys.readouterr().out
    assert len(rows) == 4 and "1 x missing image" in said and "2 x image is not on disk" in said
    assert "2 x image outside of the data's folder and --image_folders" in said
    assert len(load_rows([str(file)], [str(tmp_path)])) == 6
    red, blue = (ChatCollator(tiny_processor)([rows[index]])["pixel_values"] for index in (0, 1))
    assert red.shape == blue.shape and not torch.equal(red, blue)
    with pytest.raises(ValueError, match="No row of .* can be used: 2 x image is.*or give --image_folders"):
        pq.write_table(pa.table({"messages": chats, **columns[form]}).slice(5), tmp_path / "data" / "none.parquet")
        load_rows([str(tmp_path / "data" / "none.parquet")])


# ---- losses and gradients ----


@pytest.mark.parametrize("freeze", [[], ["model.vision_tower.encoder", "model.language_model", "lm_head"]])
def test_loss_and_gradients_are_those_of_our_text_loss(rows, tiny_processor, tmp_path, freeze):
    trainer, model = trainer_of(rows, tiny_processor, tmp_path, freeze=freeze)
    batch = ChatCollator(tiny_processor, 1024)([rows[index] for index in range(4)])
    calls = count_calls(model.image_decoder)
    model.train()
    found = {}
    for who in ("ours", "trl"):
        model.zero_grad()
        if who == "trl":
            loss = trainer.compute_loss(model, dict(batch))
        else:
            loss = model(**batch, use_cache=False).text_loss
        loss.backward()
        found[who] = loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert not calls
    torch.testing.assert_close(found["trl"][0], found["ours"][0], rtol=0, atol=1e-5)
    expected, gradients = found["ours"][1], found["trl"][1]
    # the finest level of the pyramid is for drawing alone
    learning = {n for n, p in model.named_parameters() if p.requires_grad and "level_projections.0." not in n}
    assert set(gradients) == set(expected) == learning
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    for part in ("vision_tower.encoder", "language_model", "lm_head", "perceiver", "image_attention", "image_decoder"):
        reached = [n for n, g in gradients.items() if part in n and g.abs().max() > 0]
        assert bool(reached) == (part != "image_decoder" and not any(part in name for name in freeze)), part
    # what a step of several micro-batches divides by
    half = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(100))
    ours = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(100)).text_loss
    torch.testing.assert_close(half, ours, rtol=0, atol=1e-5)
    # the target images that our own forward would use are passed over
    drawn = DeemDataCollator(tiny_processor)([rows[0]])
    trainer.compute_loss(model, dict(drawn))
    assert not calls
    assert model(**drawn, use_cache=False).consistency_loss > 0 and calls


# ---- the recipe ----


@pytest.fixture
def run(world, tiny_processor, tmp_path, monkeypatch):
    """Runs recipes/sft_trl.py on a tiny checkpoint; gives the output folder and the log."""
    tiny_model().save_pretrained(tmp_path / "deem")
    tiny_processor.save_pretrained(tmp_path / "deem")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(**options: Any) -> tuple[Path, list[dict[str, Any]]]:
        flags = {
            **{"model": tmp_path / "deem", "data": world / "chats", "eval_data": world / "chats", "groups": "{}"},
            **{"output_dir": tmp_path / "run", "warmup_steps": 0, "logging_steps": 1, "report_to": "none"},
            **{"per_device_train_batch_size": 4, "learning_rate": 3e-3, "disable_tqdm": "true", **options},
        }
        argv = ["sft_trl.py"]
        for key, value in flags.items():
            argv += [f"--{key}", *(str(one) for one in (value if isinstance(value, list) else [value]))]
        monkeypatch.setattr(sys, "argv", argv)
        sft_trl.main()
        folder = tmp_path / "run"
        return folder, json.loads((folder / "trainer_state.json").read_text())["log_history"]

    return run


def test_the_recipe_learns_questions_and_leaves_a_checkpoint_like_any_other(run, tmp_path, world):
    folder, logs = run(max_steps=30, eval_strategy="steps", eval_steps=15, save_steps=15)
    losses = [log["loss"] for log in logs if "loss" in log]
    held_out = [log["eval_loss"] for log in logs if "eval_loss" in log]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.8 * sum(losses[:5]) and held_out[1] < held_out[0] < losses[0]
    parts = json.loads((folder / "parts.json").read_text())
    assert all((row["trainable"] == 0) == part.startswith("image_decoder") for part, row in parts.items())

    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model) is DeemForConditionalGeneration and type(processor) is DeemProcessor
    assert "use_cache" not in json.loads((folder / "config.json").read_text())  # False would make generation slow
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "deem")
    assert model.loss_weights() == before.loss_weights()
    old, new = before.image_decoder.state_dict(), model.image_decoder.state_dict()
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    batch = ChatCollator(processor)([load_rows([str(world / "chats")])[index] for index in range(4)])
    with torch.no_grad():
        assert model(**batch).text_loss < 0.8 * before(**batch).text_loss

    resumed, again = run(max_steps=31, eval_strategy="no", resume_from_checkpoint=folder / "checkpoint-30")
    assert [log["step"] for log in again if "loss" in log] == [*range(1, 32)] and resumed == folder


def test_adapters_in_half_precision_are_merged_at_the_end(run, tmp_path):
    folder, logs = run(
        max_steps=2,
        freeze=["model.vision_tower.encoder", "lm_head"],
        lora='{"r": 2, "lora_alpha": 4}',
        frozen_dtype="bfloat16",
        bf16="true",
        activation_checkpointing="true",
        save_steps=2,
        eval_strategy="no",
    )
    assert [0 < log["loss"] < 20 for log in logs if "loss" in log] == [True, True]
    assert (folder / "checkpoint-2" / "adapter_config.json").is_file()
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "deem").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert set(after) == set(before)
    for name, expected in (("model.language_model.layers.0.mlp.up_proj.weight", 1e-3), ("lm_head.weight", 0)):
        low = before[name].to(torch.bfloat16).float()  # as the frozen part was held
        assert ((after[name].float() - low).abs().max() > expected) == bool(expected), name
    assert not torch.equal(after["model.perceiver.queries"].float(), before["model.perceiver.queries"])


def test_a_plain_trl_script_with_its_peft_config(rows, tiny_processor, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            str(tmp_path / "run"),
            max_steps=4,
            learning_rate=1e-2,
            assistant_only_loss=True,
            max_length=None,
            **OPTIONS,
        ),
        train_dataset=rows,
        processing_class=tiny_processor,
        peft_config=LoraConfig(r=4, target_modules=adapter_targets(model, [LANGUAGE_MODEL])),
    )
    calls = count_calls(model.image_decoder)
    trainer.train()
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable and all("language_model" in name and "lora_" in name for name in trainable) and not calls
    trainer.save_model(tmp_path / "adapter")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    batch = ChatCollator(tiny_processor)([rows[index] for index in range(4)])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch).text_loss
        torch.testing.assert_close(loaded(**batch).text_loss, expected, rtol=0, atol=1e-5)
        assert expected < base(**batch).text_loss - 1e-2


# ---- what is refused ----


@pytest.mark.parametrize("freeze", [["lm_head.old_rows"], ["model.language_model"]])
def test_a_head_of_which_only_new_rows_train_is_refused(rows, tiny_processor, tmp_path, freeze):
    with pytest.raises(ValueError, match="old rows cannot be held: add lm_head to freeze"):
        trainer_of(rows, tiny_processor, tmp_path, freeze=freeze)


def test_other_data_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder and no .parquet"):
        load_rows(["nowhere"])
    (tmp_path / "questions.jsonl").write_text('{"question": "?", "answer": "!"}\n')
    with pytest.raises(ValueError, match=r"has the columns \['question', 'answer'\]; expected messages"):
        load_rows([str(tmp_path / "questions.jsonl")])
    assert load_rows([]) is None
