# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/add_feedback.py: the feedback for a model of another class, from data to an ordinary checkpoint."""

from pathlib import Path

import pytest
import torch
from family_fixtures import save_text
from scripts import run_script
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_deem import DeemFeedback
from recipes import add_feedback
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_formats
from recipes.training.feedback_rows import chat_rows, with_answers_marked
from recipes.training.small_vlm import compose_small_vlm

pytestmark = pytest.mark.usefixtures("one_thread")
FEEDBACK = '{"image_size": 32, "width": 32, "num_layers": 1, "perceiver_config": {"num_queries": 4}}'
OPTIONS = ["--use_cpu", "true", "--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none"]
OPTIONS += [
    "--disable_tqdm",
    "true",
    "--logging_steps",
    "1",
    "--activation_checkpointing",
    "false",
    "--feedback",
    FEEDBACK,
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_formats(folder, World(size=64), 8, formats=["chats", "vqa", "captions"])
    return folder


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> str:
    """A small LLaVA with its processor, as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("vlm")
    save_text(folder / "text")
    model, processor = compose_small_vlm(folder / "text", width=32, num_layers=1)
    model.save_pretrained(folder / "llava")
    processor.save_pretrained(folder / "llava")
    return str(folder / "llava")


def test_whole_and_with_adapters(world: Path, vlm: str, tmp_path: Path) -> None:
    start = AutoModelForImageTextToText.from_pretrained(vlm)
    before = dict(start.named_parameters())
    data = ["--model", vlm, "--data", str(world / "chats"), *OPTIONS]
    whole, adapted = str(tmp_path / "whole"), str(tmp_path / "lora")
    trainer = add_feedback.main([*data, "--freeze", "language_model", "--output_dir", whole])
    names = {name for entry in trainer.state.log_history for name in entry}
    assert {"task_loss", "consistency_loss", "loss"} <= names
    add_feedback.main([*data, "--lora", '{"r": 2}', "--learning_rate", "0.01", "--output_dir", adapted])

    # loads where this package is not
    code = f"""
import sys
sys.modules["modeling_deem"] = None
from transformers import AutoModelForImageTextToText
for folder in {[whole, adapted]}:
    print(type(AutoModelForImageTextToText.from_pretrained(folder)).__module__)
"""
    done = run_script("-c", code, logs=tmp_path / "logs")
    assert done.stdout.split() == ["transformers.models.llava.modeling_llava"] * 2, done.stderr
    for folder, language_model_moves in ((whole, False), (adapted, True)):
        after = dict(AutoModelForImageTextToText.from_pretrained(folder).named_parameters())
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert any("vision_tower" in name for name in moved) and any("projector" in name for name in moved)
        assert any("language_model" in name for name in moved) == language_model_moves
        assert type(AutoProcessor.from_pretrained(folder)).__name__ == "LlavaProcessor"
        DeemFeedback.from_pretrained(f"{folder}/feedback")


def test_other_formats_become_chats(world: Path, vlm: str, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(vlm)
    rows = chat_rows([str(world / "vqa"), str(world / "captions")], processor, max_rows=3)
    assert len(rows) == 6 and all(len(row["images"]) == 1 for row in rows)
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
    assert with_answers_marked(rows, processor) == (rows, True)
    processor.chat_template = processor.chat_template.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    split, marked = with_answers_marked(rows, processor)
    assert not marked and [turn["role"] for turn in split[0]["completion"]] == ["assistant"]
    with pytest.raises(ValueError, match="nowhere"):
        chat_rows([str(tmp_path / "nowhere")], processor)
    with pytest.raises(ValueError, match="--lora 3 is no mapping"):
        add_feedback.parse(["--lora", "3"])
