# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Placeholder expansion, bos, chat template, errors, saving."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, PreTrainedTokenizerFast, pipeline

from modeling_deem import DeemConfig, DeemForConditionalGeneration
from processing import DeemProcessor

SYSTEM = "You are a helpful assistant.\n\n"


def make_image(color: str = "red", size: tuple[int, int] = (80, 70)) -> Image.Image:
    return Image.new("RGB", size, color)


def chat(*parts, answer: str | None = None) -> list[dict]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    messages = [{"role": "user", "content": content}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def test_one_placeholder_becomes_start_of_image_and_slots(tiny_processor) -> None:
    inputs = tiny_processor(text="a<image>b", images=make_image(), return_tensors="pt")
    start, slot = tiny_processor.start_of_image_token_id, tiny_processor.image_token_id
    a, b = tiny_processor.tokenizer.convert_tokens_to_ids(["a", "b"])
    assert inputs["input_ids"].tolist() == [[1, a, start, slot, slot, slot, slot, b]]
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"} == set(tiny_processor.model_input_names)
    assert tiny_processor.expand_image_tokens("<image>") == "<|startofimage|>" + 4 * "<image>"


def test_batches_nested_lists_and_text_only(tiny_processor) -> None:
    one, two, three = make_image("red"), make_image("green"), make_image("blue")
    text = ["<image>", "no image", "<image> and <image>"]
    nested = tiny_processor(text=text, images=[[one], [], [two, three]], padding=True, return_tensors="pt")
    flat = tiny_processor(text=text, images=[one, two, three], padding=True, return_tensors="pt")
    assert nested["pixel_values"].shape == (3, 3, 64, 64)
    for name in nested:
        torch.testing.assert_close(nested[name], flat[name])
    assert nested["attention_mask"][0, 0] == 0, "generation needs padding on the left"
    for images in (None, [], [[], []]):
        assert set(tiny_processor(text=["a", "b"], images=images)) == {"input_ids", "attention_mask"}
    assert set(tiny_processor(images=[one, two])) == {"pixel_values"}


def test_targets_and_masks_pass_through(tiny_processor) -> None:
    mask = np.zeros((70, 80))
    inputs = tiny_processor(
        text=["<image><image>"],
        images=[[make_image(), make_image()]],
        region_masks=[[None, mask]],
        return_targets=True,
        return_tensors="pt",
    )
    assert inputs["target_pixel_values"].shape == (2, 3, 64, 64)
    assert inputs["region_masks"].mean(dim=(1, 2, 3)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "text, images, numbers",
    [
        ("<image><image>", [make_image()], "got 1 images and 2 <image> placeholders"),
        ("none", [make_image()], "got 1 images and 0 <image>"),
        ("<image>", None, "got 0 images and 1 <image>"),
        (
            ["<image>", "<image><image>"],
            [[make_image(), make_image()], [make_image()]],
            r"per row of the batch: \[2, 1\] and",
        ),
    ],
)
def test_count_mismatch_is_refused(tiny_processor, text, images, numbers) -> None:
    with pytest.raises(ValueError, match=f"^Image features and image tokens do not match.*{numbers}.*Write <image>"):
        tiny_processor(text=text, images=images)


def test_truncation_through_an_image_is_refused(tiny_processor) -> None:
    arguments = {"images": make_image(), "truncation": True, "return_tensors": "pt"}
    assert tiny_processor(text="<image>abc", max_length=7, **arguments)["input_ids"].shape == (1, 7)
    with pytest.raises(ValueError, match="that is 4 image tokens, but only 3 are left .* to 5 tokens.*max_length"):
        tiny_processor(text="<image>abc", max_length=5, **arguments)


def test_bos_stands_exactly_once(tiny_processor) -> None:
    messages = chat(make_image(), "What?")
    rendered = tiny_processor.apply_chat_template(messages, add_generation_prompt=True)
    direct = tiny_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    in_two_steps = tiny_processor(text=rendered, images=make_image(), return_tensors="pt")
    assert rendered.startswith("<s>")
    for inputs in (direct, in_two_steps, tiny_processor(text="plain", return_tensors="pt")):
        assert (inputs["input_ids"] == 1).sum() == 1 and inputs["input_ids"][0, 0] == 1
    torch.testing.assert_close(direct["input_ids"], in_two_steps["input_ids"])
    mixed = tiny_processor(text=["<s>a", "b"])["input_ids"]
    assert [row[0] for row in mixed] == [1, 1] and [len(row) for row in mixed] == [2, 2]
    assert tiny_processor(text="a", add_special_tokens=False)["input_ids"][0][0] != 1


def test_chat_template_is_the_released_dialogue(tiny_processor) -> None:
    def render(messages, **arguments):
        return tiny_processor.apply_chat_template(messages, **arguments)

    # The VQA form: "{system} {user} {assistant}" joined by single spaces, then " " + answer + </s>.
    user = "## USER: Based on the image, please answer the question. <image>How many?\n"
    expected = f"<s>{SYSTEM} {user} ## ASSISTANT: The answer is two</s>"
    messages = chat(
        "Based on the image, please answer the question. ", make_image(), "How many?", answer="The answer is two"
    )
    assert render(messages) == expected
    assert render(messages[:1], add_generation_prompt=True) == f"<s>{SYSTEM} {user} ## ASSISTANT:"
    assert render(messages, continue_final_message=True) == expected.removesuffix("</s>")
    spaced = [messages[0], {"role": "assistant", "content": [{"type": "text", "text": " The answer is two "}]}]
    assert render(spaced) == expected, "a generated answer put back must render as trained"
    more = [*messages, {"role": "user", "content": "Sure?"}]
    assert render(more, add_generation_prompt=True) == f"{expected} ## USER: Sure?\n ## ASSISTANT:"
    assert render(more, add_generation_prompt=True).startswith(render(more))
    system = {"role": "system", "content": "Be brief."}
    assert render([system, *messages[:1]]) == f"<s>Be brief.\n\n {user}"
    assert render([{"role": "system", "content": ""}, *messages[:1]]) == f"<s>{user}"
    drawn = [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": [{"type": "image"}]}]
    assert render(drawn) == f"<s>{SYSTEM} ## USER: Draw.\n ## ASSISTANT: <image></s>"


def test_chat_template_refuses_what_it_cannot_render(tiny_processor) -> None:
    with pytest.raises(Exception, match="got type video"):
        tiny_processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(Exception, match="got tool"):
        tiny_processor.apply_chat_template([{"role": "tool", "content": "x"}])


def test_generation_markers_cover_the_answers_only(tiny_processor) -> None:
    messages = chat(make_image(), "What?", answer="A fox.") + chat(make_image("blue"), "And this?", answer="A hen.")
    encoded = tiny_processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    said = encoded["input_ids"][encoded["assistant_masks"].bool()]
    assert tiny_processor.decode(said) == " A fox.</s> A hen.</s>"


def test_from_parts_copies_and_completes(tiny_tokenizer) -> None:
    encoder_side = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    before = len(tiny_tokenizer)
    processor = DeemProcessor.from_parts(encoder_side, tiny_tokenizer, num_image_tokens=3, target_size=48)
    assert len(tiny_tokenizer) == before and len(processor.tokenizer) == before + 2
    assert (processor.start_of_image_token_id, processor.image_token_id) == (before, before + 1)
    assert processor.image_processor.size["height"] == 32 and processor.image_processor.target_size["width"] == 48
    assert list(processor.image_processor.image_mean) == list(encoder_side.image_mean)
    grounded = DeemProcessor.from_parts(encoder_side, tiny_tokenizer, 3, 48, grounding_tokens=True).tokenizer
    tokens = ["<|startofimage|>", "<image>", "<ref>", "</ref>", "<box>", "</box>"]
    assert grounded.convert_tokens_to_ids(tokens) == list(range(before, before + 6))
    assert grounded.tokenize("<box>a</box>") == ["<box>", "a", "</box>"]


def test_from_parts_where_bos_and_eos_are_one(tiny_tokenizer) -> None:
    shared = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="</s>", eos_token="</s>"
    )
    processor = DeemProcessor.from_parts(CLIPImageProcessorPil(size=32, crop_size=32), shared, 3, 48)
    tokenizer = processor.tokenizer
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("arguments", [{}, {"add_bos_token": False}, {"add_bos_token": False, "add_eos_token": True}])
def test_save_and_load(tiny_tokenizer, tmp_path, arguments) -> None:
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", **arguments
    )
    first = DeemProcessor.from_parts(CLIPImageProcessorPil(size=32, crop_size=32), plain, 3, 48)
    first.save_pretrained(tmp_path)
    for cls in (DeemProcessor, AutoProcessor):
        second = cls.from_pretrained(tmp_path)
        assert type(second) is DeemProcessor
        assert second.to_dict() == first.to_dict()
        assert second.chat_template == first.chat_template
        assert second.image_token_id == first.image_token_id
        assert second.tokenizer.padding_side == "left"
        text = ["a <image>", "longer <image>"]
        for one, other in zip(
            first(text=text, images=[make_image()] * 2, padding=True, return_tensors="pt").values(),
            second(text=text, images=[make_image()] * 2, padding=True, return_tensors="pt").values(),
            strict=True,
        ):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)  # torchvision's rounding where it is installed


def test_number_of_tokens_for_servers(tiny_processor) -> None:
    counted = tiny_processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (300, 400)])
    assert counted["num_image_tokens"] == [4, 4] and counted["num_image_patches"] == [1, 1]
    types = tiny_processor(text="<image>ab", images=make_image(), return_mm_token_type_ids=True)["mm_token_type_ids"]
    assert sum(types[0]) == 4


def test_decoding_leaves_out_special_tokens(tiny_processor) -> None:
    inputs = tiny_processor(text=["<image>one", "two"], images=make_image(), padding=True, return_tensors="pt")
    assert tiny_processor.post_process_image_text_to_text(inputs["input_ids"]) == ["one", "two"]


def test_other_modalities_are_refused(tiny_processor) -> None:
    with pytest.raises(ValueError, match="text and images"):
        tiny_processor(text="a", videos=[np.zeros((2, 8, 8, 3))])


@pytest.fixture
def tiny_checkpoint(tiny_processor, tmp_path) -> str:
    """A folder with a real, untrained DEEM that only writes text, and its processor."""
    vision = {
        "model_type": "convnext",
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "image_size": 64,
        "patch_size": 4,
    }
    text = {
        "model_type": "llama",
        "vocab_size": len(tiny_processor.tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    perceiver = {
        "num_queries": 4,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "cross_attention_frequency": 1,
    }
    tokenizer = tiny_processor.tokenizer
    torch.manual_seed(0)
    model = DeemForConditionalGeneration(
        DeemConfig(
            vision_config=vision,
            text_config=text,
            perceiver_config=perceiver,
            image_decoder_config=None,
            feature_size=16,
            position_grid_side=2,
            image_attention_interval=1,
            image_attention_sides=[8, 4, 2],
            image_attention_base_side=2,
            image_attention_heads=2,
            image_attention_points=2,
            image_token_id=tiny_processor.image_token_id,
            start_of_image_token_id=tiny_processor.start_of_image_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    return str(tmp_path)


def test_pipeline_answers_chats_prompts_batches_and_text(tiny_checkpoint) -> None:
    pipe = pipeline("image-text-to-text", model=tiny_checkpoint)
    arguments = {"max_new_tokens": 3, "return_full_text": False}
    messages = chat(make_image("red"), make_image("blue"), "Which is red?")
    (answer,) = pipe(text=messages, **arguments)
    assert isinstance(answer["generated_text"], str) and "USER" not in answer["generated_text"]
    two_chats = pipe(text=[messages, chat("No image.")], **arguments)
    assert [one[0]["generated_text"] for one in two_chats][0] == answer["generated_text"]
    (full,) = pipe(text=messages, max_new_tokens=3)
    assert full["generated_text"][:-1] == messages
    assert full["generated_text"][-1] == {"role": "assistant", "content": answer["generated_text"]}
    (plain,) = pipe(images=make_image(), text="<image> is", **arguments)
    assert "is" not in plain["generated_text"]
    batch = pipe(images=[make_image("red"), make_image("blue")], text=["<image> is", "a longer <image>"], **arguments)
    assert batch[0]["generated_text"] == plain["generated_text"]
    (text_only,) = pipe(text="no image", **arguments)
    assert isinstance(text_only["generated_text"], str)
