# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The model card: data sets and their rows, settings, limits; nothing that nobody recorded."""

import json
from pathlib import Path

import pytest
from conftest import build_tokenizer
from deem_fixtures import Q, tiny_model
from transformers import ConvNextImageProcessorPil

from processing import DeemProcessor
from recipes.run_report.card import REQUIREMENTS, data_set, data_table, examples, limits, settings_table, write_card

SKIPPED = {"unreadable image": {"count": 2, "examples": ["a", "b"]}}
REPORT = {
    "photos/cats/*.tar": {
        "read": 90,
        "rows": 30,
        "dropped_by_rule": 1,
        "skipped": SKIPPED,
        "example": {"caption": "a"},
    },
    "photos/cats/*.tar (draw)": {"read": 60, "rows": 0, "dropped_by_rule": 0, "skipped": {}},
    "hub:owner/dogs:small": {"read": 7, "rows": 7, "dropped_by_rule": 0, "skipped": {}, "example": {"question": "b"}},
    "old.csv": {"read": 1234, "dropped_by_rule": 0, "skipped": {}},
}


@pytest.mark.parametrize(
    "source, name",
    [
        ("photos/*.tar", "photos"),
        ("photos/train-*.parquet", "photos"),
        ("/home/ann/cats.csv", "cats"),
        ("cats/metadata.jsonl", "cats"),
        ("runs/world/captions (describe)", "world"),
        ("llava_v1.5 (number 2)", "llava_v1.5"),
        ("hub:owner/name:config:test", "owner/name:config:test"),
        ("*.tar", "unnamed"),
        ("~/data/train.csv", "train"),
    ],
)
def test_a_data_set_has_a_name_and_no_path(source, name) -> None:
    assert data_set(source) == name


def test_rows_count_once_and_forms_are_one_data_set() -> None:
    lines = data_table(REPORT, {"old.csv": "Old ones"}).splitlines()[2:]
    assert lines == [
        "| cats | 30 | 150 | 1 | 2 |",
        "| [owner/dogs:small](https://huggingface.co/datasets/owner/dogs) | 7 | 7 | 0 | 0 |",
        "| Old ones | not recorded | 1,234 | 0 | 0 |",
    ]
    assert examples(REPORT) == {"caption": "a", "question": "b"}


def test_limits_are_those_that_were_measured() -> None:
    assert limits({}) == "No figure is recorded."
    figures = {
        "a": {"what": "colors named", "value": 0.9, "chance": 0.2, "count": 50},
        "b": {"value": 0.2, "chance": 0.2, "count": 10},
        "c": {"value": 0.7, "count": 10},  # no share of right answers
        "d": 3.0,
    }
    assert limits(figures).splitlines()[2:] == [
        "- colors named: not so in 5 of 50.",
        "- b: not so in 8 of 10, no better than chance.",
    ]


def test_settings_are_those_of_the_run() -> None:
    arguments = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "world_size": 3,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.995,
        "adam_epsilon": 1e-8,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.125,
        "seed": 32,
        "bf16": True,
        "fp16": False,
    }
    settings = settings_table({"global_step": 1000, "train_batch_size": 4}, {}, arguments).splitlines()[2:]
    assert settings == [
        "| optimizer steps | 1,000 |",
        "| sequences per step | 24 (4 per micro-batch x 2 micro-batches x 3 processes) |",
        "| optimizer | adamw_torch, betas 0.9, 0.995, epsilon 1e-08 |",
        "| schedule | cosine, warm-up 0.125 |",
        "| seed | 32 |",
        "| precision | bf16 |",
    ]
    assert settings_table({}, {}, {}) == "Not recorded."


def test_without_records_the_card_claims_nothing(tmp_path: Path) -> None:
    tiny_model(image_decoder_config=None).save_pretrained(tmp_path)
    processor = DeemProcessor.from_parts(
        ConvNextImageProcessorPil(size={"shortest_edge": 64}), build_tokenizer(), Q, 64, do_center_crop=True
    )
    processor.save_pretrained(tmp_path)
    write_card(tmp_path, tmp_path, "me/mine", {}, code="https://example.org/code", caption='a "cat"')
    card = (tmp_path / "README.md").read_text()
    assert (
        card.count("Not recorded.") == 2 and "No figures were recorded." in card and "No figure is recorded." in card
    )
    assert "cropped about the center to 64x64 pixels; this model does not draw" in card
    assert "generate_images" not in card and "it comes from https://example.org/code" in card
    config = json.loads((tmp_path / "config.json").read_text())
    config["image_decoder_config"] = {"denoiser": {"_class_name": "U"}, "vae": {"_class_name": "V"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_card(tmp_path, tmp_path, "me/mine", {}, caption='a "cat"')
    assert 'processor(text="a \\"cat\\"", return_tensors="pt")' in (tmp_path / "README.md").read_text()


def test_what_the_card_asks_for_is_what_the_package_asks_for() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert all(f'"{one}",' in project for one in REQUIREMENTS)
