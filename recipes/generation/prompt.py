# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a user gives, put into the form of a prompt."""

from transformers import ProcessorMixin

from recipes.data.samples import IMAGE, around_images, content
from recipes.generation.prompt_form import base_template
from recipes.prompts import DESCRIBE_REQUEST, PROMPTS


def make_prompt(processor: ProcessorMixin, template: str, text: str = "", num_images: int = 0) -> str:
    """Return the prompt up to the beginning of the answer.

    Args:
        template: "auto" for the form that was saved with the model, in its chat template, as pipelines and servers use
            it; images without text are asked for their description. Or a key of `recipes.prompts.PROMPTS`.
        text: what the user says. Where it holds the placeholder `<image>`, it places its images itself.
        num_images: images that come with it; without placeholders in the text, they come first.
    """
    token = processor.image_token
    if template == "auto":
        text = text or (f" {DESCRIBE_REQUEST} " if num_images else "")
        items = around_images(text, token) if token in text else content(*[IMAGE] * num_images, text)
        return processor.apply_chat_template([{"role": "user", "content": items}], add_generation_prompt=True)
    user, answer_begin = PROMPTS[template]
    said = user.format(image="" if token in text else token * num_images, text=text)
    if answer_begin is None:
        return said
    messages = [{"role": "user", "content": around_images(said, token)}]
    form = {"chat_template": base_template(processor)}
    return processor.apply_chat_template(messages, add_generation_prompt=True, **form) + answer_begin
