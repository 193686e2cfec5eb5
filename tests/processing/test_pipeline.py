# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A saved checkpoint through the Auto classes and `pipeline("image-text-to-text")`, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import build_tokenizer
from deem_fixtures import STRUCTURE, Q, tiny_model
from scripts import run_script
from transformers import AutoProcessor, ConvNextImageProcessorPil, ImageTextToTextPipeline, pipeline

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor

ROOT = Path(__file__).resolve().parents[2]
NEW = 6


def make_image(seed: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40 + seed, 60, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


CHAT = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": make_image(0)},
            {"type": "text", "text": " and "},
            {"type": "image", "image": make_image(1)},
            {"type": "text", "text": "Which is larger?"},
        ],
    }
]
TEXT_CHAT = [{"role": "user", "content": [{"type": "text", "text": "How are you?"}]}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A folder with a tiny model and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(seed=5)
    model.generation_config.suppress_tokens = STRUCTURE
    model.generation_config.pad_token_id = model.config.pad_token_id
    model.save_pretrained(folder)
    encoder_side = ConvNextImageProcessorPil(size={"shortest_edge": 64})
    processor = DeemProcessor.from_parts(
        encoder_side, build_tokenizer(), num_image_tokens=Q, target_size=64, grounding_tokens=True
    )
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipe(checkpoint) -> ImageTextToTextPipeline:
    return pipeline("image-text-to-text", model=checkpoint)


def continuation(pipe: ImageTextToTextPipeline, **inputs) -> str:
    """What the model itself writes, without the pipeline."""
    batch = pipe.processor(**inputs, return_tensors="pt")
    sequence = pipe.model.generate(**batch, max_new_tokens=NEW)[0, batch["input_ids"].shape[1] :]
    return pipe.processor.decode(sequence, skip_special_tokens=True)


def next_logits(pipe: ImageTextToTextPipeline, chat: list[dict]) -> torch.Tensor:
    """Of the first token of an answer."""
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = pipe.processor.apply_chat_template(chat, **options)
    with torch.no_grad():
        return pipe.model(**batch).logits[:, -1]


def test_pipeline_has_our_classes(pipe) -> None:
    assert type(pipe.model) is DeemForConditionalGeneration
    assert type(pipe.processor) is DeemProcessor


def test_chat_with_two_images(pipe) -> None:
    (answer,) = pipe(text=[CHAT], max_new_tokens=NEW)
    said = answer[0]["generated_text"][-1]
    assert said["role"] == "assistant" and said["content"]
    text = pipe.processor.apply_chat_template(CHAT, add_generation_prompt=True)
    assert text.count("<image>") == 2
    assert said["content"] == continuation(pipe, text=text, images=[make_image(0), make_image(1)])
    other = [{**CHAT[0], "content": [{"type": "image", "image": make_image(5)}, *CHAT[0]["content"][1:]]}]
    assert (next_logits(pipe, CHAT) - next_logits(pipe, other)).abs().max() > 1e-3  # the first image is seen too


def test_control_tokens_in_a_question_hide_no_image(pipe) -> None:
    def chat(image: PIL.Image.Image) -> list[dict]:
        items = [{"type": "image", "image": image}, {"type": "text", "text": "Is <s> or <image> in it?</s>"}]
        return [{"role": "user", "content": items}]

    different = next_logits(pipe, chat(make_image(0))) - next_logits(pipe, chat(make_image(5)))
    assert different.abs().max() > 1e-3
    items = [{"type": "image", "image": make_image(0)}, {"type": "text", "text": "<s><image>"}]
    (answer,) = pipe(text=[[{"role": "user", "content": items}]], max_new_tokens=NEW)
    assert isinstance(answer[0]["generated_text"][-1]["content"], str)


def test_plain_prompt_with_an_image(pipe) -> None:
    prompt = "<image> is a picture of"
    (answer,) = pipe(images=make_image(2), text=prompt, max_new_tokens=NEW, return_full_text=False)
    assert answer["generated_text"] == continuation(pipe, text=prompt, images=make_image(2))


def test_batch_equals_its_prompts(pipe) -> None:
    prompts = ["<image> is a picture of", "Here, <image> beside <image>, we see"]
    all_images = [[make_image(2)], [make_image(3), make_image(4)]]
    options = {"max_new_tokens": NEW, "return_full_text": False}
    together = pipe(images=all_images, text=prompts, batch_size=2, **options)
    for images, text, answer in zip(all_images, prompts, together, strict=True):
        answer = answer[0] if isinstance(answer, list) else answer
        assert answer["generated_text"] == continuation(pipe, text=text, images=images)
    assert len(together) == 2


def test_batch_of_chats(pipe) -> None:
    together = pipe(text=[CHAT, TEXT_CHAT, CHAT], batch_size=1, max_new_tokens=NEW)
    said = [answer[0]["generated_text"][-1]["content"] for answer in together]
    assert said[0] == said[2] != said[1]
    assert said[1] == pipe(text=TEXT_CHAT, max_new_tokens=NEW)[0]["generated_text"][-1]["content"]


def test_text_only_prompt(pipe) -> None:
    (answer,) = pipe(text="Once upon a time", max_new_tokens=NEW, return_full_text=False)
    assert answer["generated_text"] == continuation(pipe, text="Once upon a time")


def test_processor_batch_with_text_only_rows_generates_as_its_rows(pipe) -> None:
    texts = ["<image>a", "only text here", "<image><image>"]
    all_images = [[make_image(0)], [], [make_image(1), make_image(2)]]
    batch = pipe.processor(text=texts, images=all_images, padding=True, return_tensors="pt")
    together = pipe.model.generate(**batch, max_new_tokens=NEW)[:, batch["input_ids"].shape[1] :]
    for text, images, new in zip(texts, all_images, together, strict=True):
        row = pipe.processor(text=text, images=images or None, return_tensors="pt")
        alone = pipe.model.generate(**row, max_new_tokens=NEW)[0, row["input_ids"].shape[1] :]
        assert new[: len(alone)].tolist() == alone.tolist()


def test_images_are_drawn_from_processor_output(pipe) -> None:
    batch = pipe.processor(text=["<image>a", "b"], images=[[make_image(0)], []], padding=True, return_tensors="pt")
    drawn = pipe.model.generate_images(**batch, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 3, 64, 64) and 0 <= drawn.min() <= drawn.max() <= 1


IN_A_FRESH_PROCESS = """
import json, sys
import modeling_deem
from transformers import AutoModel, AutoProcessor, pipeline
import numpy as np, PIL.Image

checkpoint = sys.argv[1]
model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
assert type(model) is modeling_deem.DeemForConditionalGeneration
assert type(processor) is modeling_deem.DeemProcessor
all_images = [PIL.Image.fromarray(np.full((30, 50, 3), shade, dtype=np.uint8)) for shade in (10, 200)]
pipe = pipeline("image-text-to-text", model=checkpoint)
chat = [{"role": "user", "content": [{"type": "image", "image": p} for p in all_images] + [{"type": "text", "text": "?"}]}]
options = {"max_new_tokens": 3, "return_full_text": False}
answers = [
    pipe(text=chat, **options),
    pipe(images=all_images[0], text="<image> shows", **options),
    pipe(images=[[all_images[0]], [all_images[1]]], text=["<image> shows", "<image> is"], batch_size=2, **options),
    pipe(text="words only", **options),
]
print("ANSWERS " + json.dumps(answers, default=str))
"""


def test_in_a_fresh_process(checkpoint, pipe, tmp_path) -> None:
    place = {"logs": tmp_path / "logs", "cwd": tmp_path, "PYTHONPATH": str(ROOT)}
    result = run_script("-c", IN_A_FRESH_PROCESS, checkpoint, **place)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("ANSWERS ")]
    chat, plain, batch, text_only = json.loads(line.removeprefix("ANSWERS "))
    assert len(chat) == len(plain) == len(text_only) == 1 and len(batch) == 2
    expected = pipe(text="words only", max_new_tokens=3, return_full_text=False)
    assert text_only == expected


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_images_and_placeholders_that_differ_are_refused(pipe) -> None:
    processor = pipe.processor
    for text, images in (
        ("no placeholder", make_image(0)),
        ("<image>", None),
        ("<image> <image>", [make_image(0)]),
        (["<image>", "text"], [[make_image(0)], [make_image(1)]]),
        (["<image>", "<image>"], [[make_image(0), make_image(1)], []]),
    ):
        with pytest.raises(ValueError, match="^Image features and image tokens do not match"):
            processor(text=text, images=images, return_tensors="pt")
    with pytest.raises(ValueError, match="^Image features and image tokens do not match: got 1 images and 2 <image>"):
        pipe(images=make_image(0), text="<image> <image>", max_new_tokens=1)


def test_truncation_through_an_image_is_refused(pipe) -> None:
    with pytest.raises(ValueError, match="truncation cut through an image"):
        pipe.processor(text="text <image>", images=make_image(0), truncation=True, max_length=7, return_tensors="pt")


def test_mask_of_another_size_is_refused(pipe) -> None:
    with pytest.raises(ValueError, match="10 x 12.*40 x 60"):
        pipe.processor(text="<image>", images=make_image(0), region_masks=[np.ones((10, 12))], return_tensors="pt")


def test_unreadable_file_is_named(pipe, tmp_path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.jpg"):
        pipe.processor(text="<image>", images=str(broken), return_tensors="pt")


def test_batch_cut_between_processor_and_model_is_refused(pipe) -> None:
    batch = pipe.processor(text="<image> and <image>", images=[make_image(0), make_image(1)], return_tensors="pt")
    with pytest.raises(ValueError, match="^Image features and image tokens do not match, tokens: 8, features: 4"):
        pipe.model.generate(**{**batch, "pixel_values": batch["pixel_values"][:1]}, max_new_tokens=1)


def test_processor_and_model_of_different_numbers_of_image_tokens_are_refused(pipe) -> None:
    processor = DeemProcessor(pipe.processor.image_processor, pipe.processor.tokenizer, num_image_tokens=Q + 1)
    batch = processor(text="<image>", images=make_image(0), return_tensors="pt")
    with pytest.raises(ValueError, match="tokens: 5, features: 4"):
        pipe.model.generate(**batch, max_new_tokens=1)


def test_number_of_image_tokens_can_be_given_on_loading(checkpoint) -> None:
    assert AutoProcessor.from_pretrained(checkpoint, num_image_tokens=Q + 1).num_image_tokens == Q + 1
