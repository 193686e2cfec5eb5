# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The form in which a saved model is asked: as in a chat, or as the questions that it was trained on.

The form is part of the processor's chat template, so that pipelines, servers and recipes ask in the same way. The question
form acts on a single request about images alone; chats of several turns and training are rendered as without it.
"""

import json
from collections.abc import Iterable

from transformers import ProcessorMixin

from recipes.data.readers.question_files import QuestionFileReader
from recipes.data.readers.questions import QuestionReader
from recipes.data.readers.reader import Reader
from recipes.prompts import ANSWER_BEGIN, CAPTION_BEGIN, DESCRIBE_REQUESTS, ONE_WORD_REQUEST, QUESTION_REQUEST

# Around the template: the first half rewrites the request, the second begins the answer. Requests are images with a text
# behind them, or a question as the data has it: request, images, text.
FIRST_HALF = """{#- question form -#}
{%- set answer_begin = '' -%}
{%- set said = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- if add_generation_prompt and said | length == 1 and said[0].role == 'user' and said[0].content is not string -%}
    {%- set items = said[0].content -%}
    {%- set images = items | selectattr('type', 'equalto', 'image') | list -%}
    {%- set texts = items | selectattr('type', 'equalto', 'text') | map(attribute='text') | map('trim') | list -%}
    {%- set first = 1 if texts and texts[0] == QUESTION_REQUEST | trim else 0 -%}
    {%- set behind = items[first:first + images | length] | selectattr('type', 'equalto', 'image') | list -%}
    {%- set whole = items | length == images | length + texts | length and texts | length == first + 1 -%}
    {%- if images and whole and behind | length == images | length and texts[-1] -%}
        {%- if texts[-1] in DESCRIBE_REQUESTS -%}
            {%- set items = images + [{'type': 'text', 'text': ' ' ~ texts[-1] ~ ' '}] -%}
            {%- set answer_begin = CAPTION_BEGIN -%}
        {%- else -%}
            {%- set ending = '' if texts[-1].endswith(ONE_WORD_REQUEST) else ONE_WORD_REQUEST -%}
            {%- set items = [{'type': 'text', 'text': QUESTION_REQUEST}] + images
                            + [{'type': 'text', 'text': texts[-1] ~ ending}] -%}
            {%- set answer_begin = ANSWER_BEGIN -%}
        {%- endif -%}
        {%- set messages = messages[:-1] + [{'role': 'user', 'content': items}] -%}
    {%- endif -%}
{%- endif -%}
{#- template -#}
"""
SECOND_HALF = """{#- end of template -#}
{{- answer_begin -}}
"""


def set_prompt_form(processor: ProcessorMixin, readers: Iterable[Reader]) -> None:
    """Give the processor the form of the dialogues that a model is trained on.

    Args:
        readers: of the training data. If all dialogues among them are questions with short answers, the question form is
            used; if there are others, the chat template as it is; without any, the form stays. Captions do not count.
    """
    dialogues = [reader for reader in readers if reader.kind == "dialogue" and not reader.captioned]
    if all(isinstance(reader, (QuestionReader, QuestionFileReader)) for reader in dialogues):
        if dialogues:
            use_question_form(processor)
    else:
        use_chat_form(processor)


def use_question_form(processor: ProcessorMixin) -> None:
    """Ask single requests about images in the form of `recipes.prompts`, up to the beginning of the answer.

    Raises:
        ValueError: white space at the template's ends would be lost.
    """
    use_chat_form(processor)
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    plain, gap = processor.apply_chat_template(chat, add_generation_prompt=True), answer_gap(processor)
    texts = {
        "QUESTION_REQUEST": QUESTION_REQUEST,
        "ONE_WORD_REQUEST": ONE_WORD_REQUEST,
        "DESCRIBE_REQUESTS": list(DESCRIBE_REQUESTS),
        "ANSWER_BEGIN": gap + ANSWER_BEGIN,
        "CAPTION_BEGIN": gap + CAPTION_BEGIN,
    }
    first = FIRST_HALF
    for name, text in texts.items():
        first = first.replace(name, json.dumps(text))
    _replace_template(processor, first + base_template(processor) + SECOND_HALF)
    if processor.apply_chat_template(chat, add_generation_prompt=True) != plain:
        raise ValueError(
            "The processor's chat template begins or ends with white space outside of its tags, which the form of "
            "questions would take away. Write that white space as {{ '...' }}."
        )


def use_chat_form(processor: ProcessorMixin) -> None:
    """Ask as in a chat: the chat template as it is."""
    _replace_template(processor, base_template(processor))


def base_template(processor: ProcessorMixin) -> str:
    """Return the processor's chat template without the question form."""
    template = processor.chat_template
    template = template["default"] if isinstance(template, dict) else template
    mark = FIRST_HALF.splitlines()[-1] + "\n"
    if template.startswith(FIRST_HALF.splitlines()[0]) and template.endswith(SECOND_HALF):
        return template.split(mark, 1)[1].removesuffix(SECOND_HALF)
    return template


def answer_gap(processor: ProcessorMixin) -> str:
    """Return what the chat template writes between the end of a prompt and the answer: a space or nothing."""
    template = base_template(processor)
    chat = [{"role": role, "content": [{"type": "text", "text": "a"}]} for role in ("user", "assistant")]
    asked = processor.apply_chat_template(chat[:1], add_generation_prompt=True, chat_template=template)
    whole = processor.apply_chat_template(chat, chat_template=template)
    return " " if whole.startswith(f"{asked} ") else ""


def _replace_template(processor: ProcessorMixin, template: str) -> None:
    """Replace the chat template, or the default one of several."""
    several = isinstance(processor.chat_template, dict)
    processor.chat_template = processor.chat_template | {"default": template} if several else template
