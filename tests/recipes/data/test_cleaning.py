# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Texts of data never become control tokens, whatever their case and however they are nested."""

import json
import random
import time
from pathlib import Path

import pytest
from data_fixtures import SPOILT, fault, read_source, spoil_format, texts, write_tar
from PIL import Image

from processing import DeemDataCollator
from recipes.data.readers.reader import clean_text
from recipes.data.sources import special_tokens

HOSTILE = "a <S></S> <IMAGE> <|StartOfImage|> <im</box>age> <s<ref>> <<s>s> <PA<pad>D> <im\ud83dage> b"


def control_ids(processor) -> set[int]:
    return set(processor.tokenizer.convert_tokens_to_ids(list(special_tokens(processor))))


def test_no_token_is_left_whatever_is_nested_in_what(tiny_processor):
    tokens, rng = special_tokens(tiny_processor), random.Random(0)
    for _ in range(300):
        text = "ab"
        for _ in range(rng.randint(1, 12)):
            token, at = rng.choice(tokens), rng.randint(0, len(text))
            token = rng.choice([token, token.upper(), token.title()])
            text = text[:at] + token + text[at:]
        for lower in (False, True):
            cleaned = clean_text(text, tokens, lower)
            assert not any(token in cleaned for token in tokens) and cleaned.startswith(("a", "<", "A"))
            ids = tiny_processor.tokenizer(cleaned, add_special_tokens=False)["input_ids"]
            assert not control_ids(tiny_processor) & set(ids)


def test_what_is_no_token_stays(tiny_processor):
    tokens = special_tokens(tiny_processor)
    for text in ("1 < 2 > 0", "<b>bold</b> <images>", "a|b|>", "", "<im age>", "</ s>", "<S>", "Straße İ"):
        assert clean_text(text, tokens) == text
    assert clean_text("A <S> b", tokens, lower=True) == "a  b"


@pytest.mark.parametrize(
    "text", ["<s" * 60_000 + ">" * 60_000, "<s>" * 60_000, "<" * 200_000, "<image" * 30_000 + ">"]
)
def test_cleaning_takes_no_time(tiny_processor, text):
    begin = time.perf_counter()
    cleaned = clean_text(text, special_tokens(tiny_processor), lower=True)
    assert time.perf_counter() - begin < 5 and "<s>" not in cleaned


@pytest.mark.parametrize("name", SPOILT)
def test_hostile_texts_of_every_format_become_words(tmp_path, tiny_processor, name):
    data = spoil_format(tmp_path, name, HOSTILE)
    for form in ("plain", "draw"):
        samples, skipped = read_source(data, tiny_processor, form)
        assert samples and not skipped
        for sample in samples:
            ids = DeemDataCollator(tiny_processor)([sample])["input_ids"][0].tolist()
            assert ids.count(tiny_processor.start_of_image_token_id) == len(sample["images"])
            turns = sum(message["role"] == "assistant" for message in sample.get("messages", ())) or 1
            assert ids.count(tiny_processor.tokenizer.eos_token_id) == turns
            assert ids.count(tiny_processor.tokenizer.bos_token_id) == 1


def test_texts_that_a_template_joins_are_cleaned_as_one(tmp_path, tiny_processor):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    pieces = [{"type": "text", "text": "<im"}, {"type": "text", "text": "age>What"}, {"type": "image"}]
    pieces += [{"type": "text", "text": "</"}, {"type": "text", "text": "s>?"}]
    messages = [{"role": "user", "content": pieces}, {"role": "assistant", "content": "<s<s>>Yes<im<image>age>"}]
    rows = [{"messages": messages, "images": ["a.png", "a.png"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (sample,), skipped = read_source(tmp_path / "a.jsonl", tiny_processor)
    assert texts(sample) == ["What<image>?", "Yes<im<image>age>"] and not skipped
    ids = DeemDataCollator(tiny_processor)([sample])["input_ids"][0].tolist()
    assert ids.count(tiny_processor.start_of_image_token_id) == 2
    assert ids.count(tiny_processor.tokenizer.eos_token_id) == 1


def test_captions_that_are_nothing_but_tokens(tmp_path, tiny_processor):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    image = (tmp_path / "a.png").read_bytes()
    captions = ["<IMAGE>", "</S>", "<s<S>>", "\n<Pad> ", "a <IMAGE>"]
    members = {}
    for number, caption in enumerate(captions):
        members |= {f"{number}.png": image, f"{number}.txt": caption.encode()}
    (sample,), skipped = read_source(write_tar(tmp_path / "0.tar", members), tiny_processor)
    assert sample["text"].replace("<image>", "").strip() == "a" and skipped == {"image without caption": 4}


@pytest.mark.parametrize("name", ["tars/caption/upper_token.tar", "rows/pq_caption_upper_token"])
def test_the_given_captions(tiny_processor, name):
    for form in ("plain", "describe", "draw"):
        samples, skipped = read_source(fault(name), tiny_processor, form)
        assert len(samples) == 6 and not skipped
        for sample in samples:
            said = sample["text"] if form == "plain" else "".join(texts(sample))
            assert said.count("<image>") == 1 and "here" in said
            ids = DeemDataCollator(tiny_processor)([sample])["input_ids"][0].tolist()
            assert ids.count(tiny_processor.start_of_image_token_id) == 1


def test_the_tokens_of_a_real_tokenizer_are_known(tiny_processor, tmp_path):
    tiny_processor.tokenizer.add_tokens(["<mine>"], special_tokens=True)
    assert "<mine>" in special_tokens(tiny_processor)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    members = {"0.png": Path(tmp_path / "a.png").read_bytes(), "0.txt": b"a <MINE>b"}
    (sample,), _ = read_source(write_tar(tmp_path / "0.tar", members), tiny_processor)
    assert sample["text"].replace("<image>", "") == "a b"
