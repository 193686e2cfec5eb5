# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a user gives, put into the form of a prompt."""

from transformers import ProcessorMixin

from recipes.prompts import PROMPTS


def make_prompt(processor: ProcessorMixin, template: str, text: str = "", num_images: int = 0) -> str:
    """Return the prompt up to the beginning of the answer.

    Args:
        template: a key of `recipes.prompts.PROMPTS`.
        text: what the user says. Where it holds the placeholder `<image>`, it places its images itself.
        num_images: images that come with it; without placeholders in the text, they come first.
    """
    user, answer_begin = PROMPTS[template]
    image = "" if processor.image_token in text else processor.image_token * num_images
    said = user.format(image=image, text=text)
    if answer_begin is None:
        return said
    messages = [{"role": "user", "content": [{"type": "text", "text": said}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True) + answer_begin
