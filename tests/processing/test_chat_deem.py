# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What users write in a chat is text: control tokens, placeholders, joined pieces; and chats that are none."""

import pytest
import torch
from PIL import Image

from processing import DeemDataCollator, DeemProcessor
from processing.chat_deem import encode_marked

CONTROL = ["<s>", "</s>", "<pad>", "<image>", "<|startofimage|>", "<ref>", "</box>"]
START, END = "\U000f0000", "\U000f0001"  # the marks


def image(color: str = "red") -> Image.Image:
    return Image.new("RGB", (80, 70), color)


def user(*parts) -> dict:
    items = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": items}


def special_ids(processor: DeemProcessor, ids: list[int]) -> list[str]:
    names = {token.content for token in processor.tokenizer.added_tokens_decoder.values()}
    return [token for token in processor.tokenizer.convert_ids_to_tokens(ids) if token in names]


def ids_of(processor: DeemProcessor, chat: list[dict], **options) -> list[int]:
    return processor.apply_chat_template(chat, tokenize=True, return_dict=True, **options)["input_ids"][0]


@pytest.mark.parametrize("token", CONTROL)
@pytest.mark.parametrize("as_string", [True, False])
def test_control_tokens_of_users_are_text(tiny_processor, token, as_string) -> None:
    said = f"Is {token} here, {token}?"
    chat = [{"role": "user", "content": said} if as_string else user(said)]
    ids = ids_of(tiny_processor, chat, add_generation_prompt=True)
    assert special_ids(tiny_processor, ids) == ["<s>"], "only the template's own bos"
    assert said in tiny_processor.decode(ids)
    harmless = [{"role": "user", "content": said.replace(token, "+" * len(token))}]
    assert len(ids) == len(ids_of(tiny_processor, harmless, add_generation_prompt=True)), "one token per byte"


@pytest.mark.parametrize("token", CONTROL)
def test_images_of_the_chat_stay_images(tiny_processor, token) -> None:
    chat = [user(image(), f"Not {token}, but", image("blue"))]
    inputs = tiny_processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    one = ["<|startofimage|>", *["<image>"] * 4]
    assert special_ids(tiny_processor, inputs["input_ids"][0].tolist()) == ["<s>", *one, *one]
    assert inputs["pixel_values"].shape[0] == 2
    rendered = tiny_processor.apply_chat_template(chat, add_generation_prompt=True)
    in_two_steps = tiny_processor(text=rendered, images=[image(), image("blue")], return_tensors="pt")
    assert in_two_steps.keys() == inputs.keys()
    for name in inputs:
        assert torch.equal(in_two_steps[name], inputs[name]), name


def test_answers_and_system_turns_are_text_too(tiny_processor) -> None:
    chat = [{"role": "system", "content": "No <s>."}, user("<s>?"), {"role": "assistant", "content": "</s><image>."}]
    ids = ids_of(tiny_processor, chat)
    assert special_ids(tiny_processor, ids) == ["<s>", "</s>"] and ids[-1] == tiny_processor.tokenizer.eos_token_id


@pytest.mark.parametrize(
    "parts",
    [
        ("<im", "age>"),
        ("<", "im", "age>"),
        ("a<", "s>b", "<im", "age><im", "age>"),
        (f"<{START}s>",),
        (f"{START}<s>{END}", f"<{END}s>"),
        (f"<im{END}", f"{START}age>"),
        (START, END, "<s>"),
    ],
)
def test_pieces_do_not_join_to_a_control_token(tiny_processor, parts) -> None:
    chat = [user(*parts)]
    assert special_ids(tiny_processor, ids_of(tiny_processor, chat)) == ["<s>"]
    rendered = tiny_processor.apply_chat_template(chat)
    assert special_ids(tiny_processor, tiny_processor(text=rendered)["input_ids"][0]) == ["<s>"]
    batch = DeemDataCollator(tiny_processor)([{"messages": [*chat, {"role": "assistant", "content": "a"}]}])
    assert special_ids(tiny_processor, batch["input_ids"][0].tolist()) == ["<s>", "</s>"]


def test_a_chat_without_control_tokens_holds_no_marks(tiny_processor) -> None:
    rendered = tiny_processor.apply_chat_template([user(image(), "a < b > c </ s>")], add_generation_prompt=True)
    assert START not in rendered and END not in rendered


def test_plain_prompts_keep_their_placeholders_and_tokens(tiny_processor) -> None:
    ids = tiny_processor(text="<s><image> hi</s>", images=image())["input_ids"][0]
    assert special_ids(tiny_processor, ids) == ["<s>", "<|startofimage|>", *["<image>"] * 4, "</s>"]


def test_batches_of_marked_and_plain_rows(tiny_processor) -> None:
    chats = [[user(image(), "<s>")], [user("longer, without anything")]]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = tiny_processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True})
    for row, mask, chat in zip(batch["input_ids"], batch["attention_mask"], chats, strict=True):
        assert row[mask.bool()].tolist() == ids_of(tiny_processor, chat, add_generation_prompt=True)
    rendered = tiny_processor.apply_chat_template(chats, add_generation_prompt=True)
    assert torch.equal(tiny_processor(text=rendered, images=image(), padding=True, return_tensors="pt")["input_ids"], batch["input_ids"])  # fmt: skip


# ---- training ----


def test_training_reads_what_inference_reads(tiny_processor) -> None:
    asked = [user(image(), "What is <s> and <image>?")]
    answer = {"role": "assistant", "content": "A </s> and <|startofimage|>."}
    (labels,), (ids,) = (DeemDataCollator(tiny_processor)([{"messages": [*asked, answer]}])[n] for n in ("labels", "input_ids"))  # fmt: skip
    prompt = ids_of(tiny_processor, asked, add_generation_prompt=True)
    assert ids[: len(prompt)].tolist() == prompt
    assert tiny_processor.decode(labels[labels != -100]) == " A </s> and <|startofimage|>.</s>"
    assert special_ids(tiny_processor, labels[labels != -100].tolist()) == ["</s>"]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_masks_of_the_assistant_are_those_of_training(tiny_processor, padding) -> None:
    chats = [
        [user(image(), "<s>?"), {"role": "assistant", "content": "</s>!"}, user("<s>"), {"role": "assistant", "content": "b"}],
        [user("A longer question, and plain."), {"role": "assistant", "content": "c"}],
    ]  # fmt: skip
    options = {"padding": True, "padding_side": padding}
    encoded = tiny_processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt", processor_kwargs=options
    )  # fmt: skip
    for chat, ids, mask in zip(chats, encoded["input_ids"], encoded["assistant_masks"], strict=True):
        labels = DeemDataCollator(tiny_processor)([{"messages": chat}])["labels"][0]
        assert ids[mask.bool()].tolist() == labels[labels != -100].tolist()


def test_marked_text_is_tokenized_as_transformers_does_it(tiny_processor) -> None:
    tokenizer = tiny_processor.tokenizer
    for text in ("a", f"{START}<s>{END}", f"<s>a{START}<s>{END}b\n{END}<image>\n\nc {START}</s>{END}", f"a\n{END}\nb"):
        ids, places = encode_marked(tokenizer, text)
        assert ids == tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
        assert all(0 <= start <= end <= len(text) for start, end in places)
        assert places == sorted(places) and len(places) == len(ids)


# ---- placeholders in strings ----


def test_placeholders_in_strings_are_places_of_images_given_beside(tiny_processor) -> None:
    in_items = [
        user("See ", image(), " and ", image("blue"), "?"),
        {"role": "assistant", "content": [{"type": "image"}]},
    ]
    in_strings = [{"role": "user", "content": "See <image> and <image>?"}, {"role": "assistant", "content": "<image>"}]
    collator, images = DeemDataCollator(tiny_processor), [image(), image("blue"), image("lime")]
    expected, batch = (
        collator([{"messages": in_items, "images": images[2:]}]),
        collator([{"messages": in_strings, "images": images}]),
    )
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name
    rendered = tiny_processor.apply_chat_template(in_strings)
    assert rendered == tiny_processor.apply_chat_template(in_items)
    options = {"tokenize": True, "return_dict": True}
    ids = tiny_processor.apply_chat_template(in_strings, **options, processor_kwargs={"images": images})["input_ids"]
    assert ids[0] == tiny_processor(text=rendered, images=images)["input_ids"][0]


def test_placeholders_in_strings_are_text_where_images_have_their_items(tiny_processor) -> None:
    chat = [user(image(), "first"), {"role": "assistant", "content": "a"}, {"role": "user", "content": "<image>?"}]
    ids = ids_of(tiny_processor, chat)
    assert special_ids(tiny_processor, ids).count("<image>") == 4
    assert tiny_processor(text=tiny_processor.apply_chat_template(chat), images=image())["input_ids"][0] == ids


# ---- refused in words ----


@pytest.mark.parametrize(
    "chat, message",
    [
        ([], "Give a list of messages, at least one"),
        ([[]], "Give a list of messages, at least one"),
        ({}, "Give a list of messages"),
        ("What?", "Give a list of messages"),
        ([{"content": "a"}], "Message 0 of the chat is .*Give a role"),
        ([{"role": "user", "content": 3}], "Message 0 of the chat is .*a text or a list of items"),
        ([{"role": "user", "content": [{"type": "text"}]}], "Message 0 of the chat is .*type"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "Message 0 of the chat is"),
        ([{"role": "user", "content": ["a"]}], "Message 0 of the chat is"),
        ([{"role": "user", "content": [{"text": "a"}]}], "Message 0 of the chat is"),
        ([user("a"), {"role": "tool", "content": "x"}], "The chat template refuses the chat: .*got tool"),
        ([user({"a": 1})], "got type video|Message 0|image"),
        ([{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, user("c")], "as the first message only, system; got system"),
        ([user("c"), {"role": "system", "content": "a"}], "as the first message only, system; got system .* first message"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused_in_words(tiny_processor, chat, message) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        tiny_processor.apply_chat_template(chat, tokenize=True)


def test_a_second_system_turn_names_the_sample(tiny_processor) -> None:
    chat = [user("a"), {"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(ValueError, match="Sample x7: the chat template refuses the chat: .*got system"):
        DeemDataCollator(tiny_processor)([{"messages": chat, "id": "x7"}])
    with pytest.raises(ValueError, match="Sample x7: Message 0 of the chat"):
        DeemDataCollator(tiny_processor)([{"messages": [{"role": "user", "content": 3}], "id": "x7"}])


def test_text_that_is_none_is_refused_in_words(tiny_processor) -> None:
    for text in ([], (), [None], ["a", 3], 3, [["a"]]):
        with pytest.raises(ValueError, match="`text` is one text or a list of texts, at least one"):
            tiny_processor(text=text)
    for arguments in (("<image> hi", image()), ("<image> hi",), (["<image> a", "<image> b"], [image()] * 2)):
        with pytest.raises(ValueError, match=r"first argument, which is `images`.*processor\(text=..., images=...\)"):
            tiny_processor(*arguments)


def test_empty_lists_of_other_kinds_are_absent(tiny_processor) -> None:
    expected = tiny_processor(text="a")["input_ids"]
    for name in ("videos", "audio", "audios"):
        for empty in (None, [], (), [[], []]):
            assert tiny_processor(text="a", **{name: empty})["input_ids"] == expected
        with pytest.raises(ValueError, match=f"DEEM takes text and images; got {name}"):
            tiny_processor(text="a", **{name: [[image()]]})
