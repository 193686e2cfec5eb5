# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The form in which a saved model is asked: the same prompt and answer by the recipe, the pipeline and in evaluation."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from deem_fixtures import STRUCTURE, tiny_model
from PIL import Image
from transformers import AutoProcessor, pipeline

from processing import DeemProcessor
from recipes import generate, sft
from recipes.data.sources import DataArguments, build_dataset
from recipes.evaluation.answers import share_answered
from recipes.generation.checkpoint import load_for_inference
from recipes.generation.prompt import make_prompt
from recipes.generation.prompt_form import base_template, set_prompt_form, use_chat_form, use_question_form
from recipes.prompts import CAPTION_BEGIN, DESCRIBE_REQUESTS, ONE_WORD_REQUEST, QUESTION_REQUEST
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_formats

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE = {"type": "image"}
OTHER_TEMPLATE = """{% for message in messages %}<|{{ message.role }}|>
{% for item in message.content %}{{ '<image>' if item.type == 'image' else item.text }}{% endfor %}{{ eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def asked(processor: DeemProcessor, *items: dict[str, str], **options: Any) -> str:
    return processor.apply_chat_template([{"role": "user", "content": items}], add_generation_prompt=True, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_formats(folder, World(size=64), 8, formats=["vqa", "captions", "chats"])
    return folder


def test_questions_have_the_released_form_however_they_are_asked(tiny_processor: DeemProcessor) -> None:
    released = make_prompt(tiny_processor, "question", "What color?", 1)
    caption = make_prompt(tiny_processor, "caption", num_images=1)
    use_question_form(tiny_processor)
    for items in (
        [IMAGE, text("What color?")],
        [IMAGE, text(" What color?" + ONE_WORD_REQUEST)],
        [text(QUESTION_REQUEST), IMAGE, text("What color?")],
        [text(QUESTION_REQUEST), IMAGE, text("What color?" + ONE_WORD_REQUEST)],
    ):
        assert asked(tiny_processor, *items) == released
    assert make_prompt(tiny_processor, "auto", "What color?", 1) == released
    assert make_prompt(tiny_processor, "question", "What color?", 1) == released
    assert make_prompt(tiny_processor, "auto", num_images=1) == caption
    assert make_prompt(tiny_processor, "auto", "which?", 2) == make_prompt(tiny_processor, "question", "which?", 2)
    for request in DESCRIBE_REQUESTS:
        assert asked(tiny_processor, IMAGE, text(request)).endswith(f"{request} \n ## ASSISTANT: {CAPTION_BEGIN}")


def test_all_else_is_rendered_as_without_the_form(tiny_processor: DeemProcessor) -> None:
    base = tiny_processor.chat_template
    answer = {"role": "assistant", "content": [text("red")]}
    question = {"role": "user", "content": [IMAGE, text("What color?")]}
    chats = [
        [{"role": "user", "content": items}] for items in ([text("hi")], [IMAGE], [IMAGE, text("a"), IMAGE], "hi")
    ]
    chats += [[question, answer], [question, answer, question]]
    plain = [tiny_processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    trained = [tiny_processor.apply_chat_template(chat) for chat in [*chats, [question]]]
    use_question_form(tiny_processor)
    assert [tiny_processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats] == plain
    assert [tiny_processor.apply_chat_template(chat) for chat in [*chats, [question]]] == trained
    use_question_form(tiny_processor)  # twice is once
    assert base_template(tiny_processor) == base
    use_chat_form(tiny_processor)
    assert tiny_processor.chat_template == base


def test_other_chat_templates_take_the_form(tiny_processor: DeemProcessor) -> None:
    tiny_processor.chat_template = OTHER_TEMPLATE
    use_question_form(tiny_processor)
    assert asked(tiny_processor, IMAGE, text("What?")).endswith(
        f"What?{ONE_WORD_REQUEST}</s>\n<|assistant|>\nThe answer is"
    )
    tiny_processor.chat_template = OTHER_TEMPLATE.replace("{{ '<|assistant|>\\n' }}{% endif %}", "{% endif %} ")
    with pytest.raises(ValueError, match="white space"):
        use_question_form(tiny_processor)


@pytest.mark.parametrize(
    "formats, questions",
    [(["vqa"], True), (["vqa", "captions"], True), (["vqa", "chats"], False), (["captions"], None)],
)
def test_the_form_follows_the_dialogues_of_the_data(
    formats: list[str], questions: bool | None, world: Path, tiny_processor: DeemProcessor
) -> None:
    arguments = DataArguments(data=[str(world / name) for name in formats], pack_length=0)
    dataset, _ = build_dataset(arguments, tiny_processor, 1, 0, ("plain", "describe"))
    for before in (use_chat_form, use_question_form):
        before(tiny_processor)
        given = tiny_processor.chat_template
        set_prompt_form(tiny_processor, [source.reader for source in dataset.sources])
        has_form = tiny_processor.chat_template != base_template(tiny_processor)
        assert has_form == questions if questions is not None else tiny_processor.chat_template == given


@pytest.mark.parametrize("form", [use_chat_form, use_question_form])
def test_the_recipe_the_pipeline_and_evaluation_give_the_same_answer(
    form: Any, tiny_processor: DeemProcessor, tmp_path: Path
) -> None:
    model = tiny_model(seed=5)
    model.generation_config.suppress_tokens = STRUCTURE
    model.save_pretrained(tmp_path / "deem")
    form(tiny_processor)
    tiny_processor.save_pretrained(tmp_path / "deem")
    World().scene(0).image.save(tmp_path / "a.png")
    image, question = Image.open(tmp_path / "a.png"), "What color is it?"

    arguments = {"model": str(tmp_path / "deem"), "out": str(tmp_path / "out"), "max_new_tokens": 6}
    generate.main(generate.GenerateArguments(images=[str(tmp_path / "a.png")], text=[question], **arguments))
    (row,) = map(json.loads, (tmp_path / "out" / "answers.jsonl").read_text().splitlines())

    pipe = pipeline("image-text-to-text", model=str(tmp_path / "deem"))
    chat = [{"role": "user", "content": [{**IMAGE, "image": image}, text(question)]}]
    (piped,) = pipe(text=chat, max_new_tokens=6, return_full_text=False)
    assert row["answer"] and piped["generated_text"].strip() == row["answer"]

    model, processor = load_for_inference(tmp_path / "deem")
    user = {"role": "user", "content": [IMAGE, text(question)]}
    for answer, share in ((row["answer"], 1.0), (f"no {row['answer']}", 0.0)):
        sample = {"messages": [user, {"role": "assistant", "content": [text(answer)]}], "images": [image]}
        assert share_answered(model, processor, [sample], max_new_tokens=6) == share


def test_training_on_questions_saves_their_form(
    world: Path, tiny_processor: DeemProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path / "deem")
    tiny_processor.save_pretrained(tmp_path / "deem")
    flags = {"model": tmp_path / "deem", "output_dir": tmp_path / "sft", "max_steps": 1, "save_strategy": "no"}
    flags |= {"per_device_train_batch_size": 2, "groups": "{}", "report_to": "none", "disable_tqdm": "true"}
    argv = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["sft.py", *argv, "--data", str(world / "vqa"), str(world / "captions")])
    sft.main()
    processor = AutoProcessor.from_pretrained(tmp_path / "sft")
    assert asked(processor, IMAGE, text("What color?")) == make_prompt(tiny_processor, "question", "What color?", 1)
