# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Text and images -> model inputs: expansion of the image placeholder and the chat template."""

import copy
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ImageInput
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack

from .chat_deem import check_chat, check_text, encode_marked, is_marked, mark_user_text, place_images, unmarked
from .image_processing_pil_deem import DeemImageProcessorPil

GROUNDING_TOKENS = ("<ref>", "</ref>", "<box>", "</box>")

# The released dialogue form: `{system} {user} {assistant}` joined by single spaces, where system is
# "You are a helpful assistant.\n\n", user "## USER: {content}\n" and assistant "## ASSISTANT: {answer}</s>".
# Choices where the release is silent:
# - a system message replaces the default one (stripped, then two newlines); an empty one leaves it out;
# - user content is rendered as written, so that the white space of any published prompt can be reproduced; answers are
#   stripped, so that a generated " red" put back into the conversation renders as it was trained;
# - further rounds follow the </s> in the same way. Without generation prompt the text keeps its last newline, so that a
#   conversation is always a prefix of its continuation;
# - the space before the answer is the model's to write: generation starts right after "## ASSISTANT:".
CHAT_TEMPLATE = """
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'image' -%}
                {{- '<image>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('DEEM takes text and image parts in a message, got type ' ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages[0].role == 'system' -%}
    {%- set system = render(messages[0].content) | trim -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = 'You are a helpful assistant.' -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- if system -%}
    {{- system ~ '\\n\\n ' -}}
{%- endif -%}
{%- for message in turns -%}
    {{- '' if loop.first else ' ' -}}
    {%- if message.role == 'user' -%}
        {{- '## USER: ' ~ render(message.content) ~ '\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '## ASSISTANT:' -}}
        {%- generation -%}
            {{- ' ' ~ (render(message.content) | trim) ~ eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('DEEM knows the roles user, assistant and, as the first message only, system; got ' ~ message.role ~ ' behind it. Put what it says into the first message.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ' ## ASSISTANT:' if turns else '## ASSISTANT:' -}}
{%- endif -%}
"""


class DeemProcessor(ProcessorMixin):
    """
    Tokenizer and image processor in one. The user writes `<image>` once per image; the processor expands it to
    `<|startofimage|>` + `num_image_tokens` x `<image>`, the positions that the model fills with the image's tokens.

    Args:
        image_processor: a `DeemImageProcessorPil` or `DeemImageProcessor`.
        tokenizer: any tokenizer. Image tokens that it lacks are added to it, start-of-image first; `from_parts` also
            sees to bos, eos and padding.
        chat_template (`str`, *optional*): Jinja template; default is the released dialogue form.
        num_image_tokens (`int`, defaults to 77): Q, image tokens per image. As in the model's config.
        image_token (`str`, defaults to `"<image>"`): placeholder in the text and token of every image slot.
        start_of_image_token (`str`, defaults to `"<|startofimage|>"`): token before the slots of every image.

    Attributes: `image_token_id`, `start_of_image_token_id`.

    `processor(text=, images=, region_masks=None, return_targets=False, ...)` returns `input_ids` (B, T) and
    `attention_mask` (B, T) and, with images, what the image processor returns, in the order of the placeholders in the
    batch, row by row. bos stands once at the start, whether the text brings it (a rendered chat) or the tokenizer.

    Raises `ValueError` if the numbers of images and placeholders differ, if truncation cuts through an image, and for
    all that the image processor refuses.

    Example:

    ```python
    processor = DeemProcessor.from_parts(image_processor, tokenizer, num_image_tokens=77, target_size=512)
    inputs = processor(text="<image> is a picture of", images=image, return_tensors="pt")
    ```
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | dict[str, str] | None = None,
        num_image_tokens: int = 77,
        image_token: str = "<image>",
        start_of_image_token: str = "<|startofimage|>",
        **kwargs,
    ):
        if num_image_tokens < 1:
            raise ValueError(f"`num_image_tokens` must be at least 1, got {num_image_tokens}. Take it from the model.")
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.start_of_image_token = start_of_image_token
        tokens = [start_of_image_token, image_token]
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in tokens if token not in vocabulary]:
            _add_special_tokens(tokenizer, missing)
        self.start_of_image_token_id, self.image_token_id = tokenizer.convert_tokens_to_ids(tokens)
        if chat_template is None:
            chat_template = CHAT_TEMPLATE.replace("<image>", image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @classmethod
    def from_parts(
        cls,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int,
        target_size: int | dict[str, int],
        do_center_crop: bool = False,
        grounding_tokens: bool = False,
        chat_template: str | None = None,
    ) -> "DeemProcessor":
        """
        A processor from what an encoder and a language model bring. Neither part is changed; both are copied.

        Args:
            image_processor: the encoder's own; its size, mean, std and rescaling are taken over.
            tokenizer: the language model's own. Added, where missing, in this order: start of image, image,
                the grounding tokens, then bos `<s>` (also where bos and eos are one token, since bos is never trained
                and eos always), eos `</s>`, pad `<pad>`. It is set to put bos in front and to pad on the left, as
                generation needs. Resize the language model's embeddings to `len(processor.tokenizer)`.
            num_image_tokens (`int`): Q.
            target_size (`int` or `dict`): size of the images the image decoder draws.
            do_center_crop (`bool`): see the image processor.
            grounding_tokens (`bool`): whether to add `<ref> </ref> <box> </box>`.
            chat_template (`str`, *optional*): default is the released dialogue form.

        Raises `ValueError` if the encoder's size cannot be read, or the tokenizer cannot be made to put bos in front.
        """
        tokenizer = copy.deepcopy(tokenizer)
        _add_special_tokens(
            tokenizer, ["<|startofimage|>", "<image>", *(GROUNDING_TOKENS if grounding_tokens else ())]
        )
        if tokenizer.bos_token is None or tokenizer.bos_token == tokenizer.eos_token:
            tokenizer.add_special_tokens({"bos_token": "<s>"})
        if tokenizer.eos_token is None:
            tokenizer.add_special_tokens({"eos_token": "</s>"})
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        _put_bos_in_front(tokenizer)
        return cls(
            DeemImageProcessorPil(
                size=_encoder_size(image_processor),
                target_size=target_size,
                do_center_crop=do_center_crop,
                do_rescale=image_processor.do_rescale,
                rescale_factor=image_processor.rescale_factor,
                do_normalize=image_processor.do_normalize,
                image_mean=image_processor.image_mean,
                image_std=image_processor.image_std,
            ),
            tokenizer,
            chat_template=chat_template,
            num_image_tokens=num_image_tokens,
        )

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ):
        """See the class."""
        given = [name for name in ("videos", "audio", "audios") if _number_of_images(kwargs.pop(name, None))]
        if given:
            raise ValueError(f"DEEM takes text and images; got {' and '.join(given)}. Pass frames as images.")
        rows = self._rows(images, text)
        bos = self.tokenizer.bos_token
        chosen = {**kwargs, **kwargs.get("text_kwargs", {})}
        marked = any(map(is_marked, rows))
        if bos and chosen.get("add_special_tokens") is None and (marked or any(row.startswith(bos) for row in rows)):
            # A rendered chat brings its bos. Rows without one get it in the same way, so that all have exactly one.
            text = rows = [row if row.startswith(bos) else bos + row for row in rows]
            kwargs["add_special_tokens"] = False
        if not marked:
            return super().__call__(images=images, text=text, **kwargs)
        inputs = super().__call__(images=images, text=text, **{**kwargs, "sanitize_control_tokens": True})
        if chosen.get("return_offsets_mapping"):
            inputs["offset_mapping"] = self._places_of_marked(rows, inputs["input_ids"], chosen)
        return inputs

    def _rows(self, images: Any, text: Any) -> list[str]:
        """The texts of a batch; refuses what is none, and text in the place of images."""
        said = [images] if isinstance(images, str) else images
        if isinstance(said, (list, tuple)) and any(isinstance(one, str) and self.image_token in one for one in said):
            raise ValueError(
                f"Got text with {self.image_token} as the first argument, which is `images`. Write "
                "`processor(text=..., images=...)`."
            )
        if text is None:
            return []
        rows = [text] if isinstance(text, str) else text
        if not (isinstance(rows, (list, tuple)) and rows and all(isinstance(row, str) for row in rows)):
            kind = f"{type(text).__name__} {text!r}"[:200] if isinstance(text, (list, tuple)) else type(text).__name__
            raise ValueError(
                f"`text` is one text or a list of texts, at least one; got {kind}. Leave it out for images alone."
            )
        for row in rows:
            check_text(row)
        return list(rows)

    def _places_of_marked(
        self, rows: list[str], input_ids: Any, options: dict[str, Any]
    ) -> list[list[tuple[int, int]]]:
        """(start, end) of each token in characters of its expanded row; (0, 0) for padding. transformers leaves it out."""
        side = options.get("padding_side") or self.tokenizer.padding_side
        all_places = []
        for row, ids in zip(rows, input_ids, strict=True):
            places = encode_marked(self.tokenizer, self.expand_image_tokens(row))[1]
            kept = min(len(ids), len(places))
            places = places[:kept] if self.tokenizer.truncation_side == "right" else places[len(places) - kept :]
            padding = [(0, 0)] * (len(ids) - kept)
            all_places.append(padding + places if side == "left" else places + padding)
        return all_places

    def apply_chat_template(self, conversation: list, *arguments: Any, **options: Any) -> Any:
        """
        As in transformers, and what users write stays text: control tokens in it, placeholders among them, are tokenized as
        plain text. The rendered chat of such a text holds marks around them, which the processor takes out.

        Images stand in image items. Where none does, and images are given beside (or the chat is only rendered), a
        placeholder in content that is one string is the place of an image.

        Raises `ValueError` for what is no chat, and for what the template refuses.
        """
        several = (
            isinstance(conversation, (list, tuple)) and conversation and isinstance(conversation[0], (list, tuple))
        )
        for chat in conversation if several else [conversation]:
            check_chat(chat)
        chats, several = self._normalize_conversations(conversation)
        given = (options.get("processor_kwargs") or {}).get("images") is not None
        beside = given or options.get("images") is not None or not options.get("tokenize")
        chats = [self.prepare_chat(chat, images_beside=beside) for chat in chats]
        try:
            return super().apply_chat_template(chats if several else chats[0], *arguments, **options)
        except TemplateError as error:
            raise ValueError(f"The chat template refuses the chat: {error}") from error

    def prepare_chat(self, chat: list[dict[str, Any]], images_beside: bool) -> list[dict[str, Any]]:
        """A chat to be rendered: checked, its placeholders in strings made items, the control tokens in its texts marked.

        Args:
            images_beside: whether images may be given for placeholders in content that is one string.
        """
        check_chat(chat)
        chat = [{name: value for name, value in message.items() if value is not None} for message in chat]
        return mark_user_text(place_images(chat, self.image_token, images_beside), self.tokenizer)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> list[str]:
        """As in transformers, and `code_digests.json`: the SHA-256 of each code file beside this one."""
        files = super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "code_digests.json"
        digests = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for file in Path(__file__).parent.glob("*_deem.py"):
            digests[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        path.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return files

    def prepare_inputs_layout(self, images: ImageInput | None = None, **kwargs):
        """As the base class; a batch of rows without any image counts as no images."""
        if isinstance(images, (list, tuple)) and not _flat(images):
            images = None
        return super().prepare_inputs_layout(images=images, **kwargs)

    def validate_inputs(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Unpack[ProcessingKwargs]
    ) -> None:
        """Raise `ValueError` if text and images do not fit; row by row where images come as one list per row."""
        if text is not None:
            rows = [text] if isinstance(text, str) else text
            wanted = [row.count(self.image_token) for row in rows]
            if isinstance(images, (list, tuple)) and images and all(isinstance(row, (list, tuple)) for row in images):
                given = [len(row) for row in images]
            else:
                wanted, given = sum(wanted), _number_of_images(images)
            if wanted != given:
                where = f" (per row of the batch: {given} and {wanted})" if isinstance(given, list) else ""
                total = (sum(given), sum(wanted)) if isinstance(given, list) else (given, wanted)
                raise ValueError(
                    f"Image features and image tokens do not match: got {total[0]} images and {total[1]} "
                    f"{self.image_token} placeholders in the text{where}. The number of {self.image_token} tokens in "
                    f"the prompts should be the same as the number of images. Write {self.image_token} at the place of "
                    "every image, or pass messages to `apply_chat_template`, which writes it."
                )
        images = _flat(images) if isinstance(images, (list, tuple)) else images
        super().validate_inputs(images=images, text=text, **kwargs)

    def _process_images(self, images: ImageInput, **kwargs) -> tuple[Any, list[str]]:
        return super()._process_images(_flat(images) if isinstance(images, (list, tuple)) else images, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The expansion of one placeholder; the same for every image."""
        return self.start_of_image_token + self.image_token * self.num_image_tokens

    def expand_image_tokens(self, text: str) -> str:
        """`text` with every placeholder expanded that is not marked as text, as `__call__` does it before tokenizing."""
        return re.sub(unmarked(self.image_token), self.replace_image_token({}, 0), text)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        ids = text_inputs["input_ids"]
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        ids = [ids] if ids and isinstance(ids[0], int) else ids
        for index, (row, row_ids) in enumerate(zip(text, ids, strict=True)):
            wanted, found = len(re.findall(unmarked(self.image_token), row)), list(row_ids).count(self.image_token_id)
            if found != wanted:
                raise ValueError(
                    f"Row {index} holds {wanted // self.num_image_tokens} images, that is {wanted} image tokens, but "
                    f"only {found} are left after tokenizing to {len(row_ids)} tokens: truncation cut through an "
                    "image. Raise `max_length`, shorten the text or leave out images; do not truncate through one."
                )

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """Image slots per image of the given (height, width): always `num_image_tokens`, one patch grid each."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )


def _flat(images: list | tuple) -> list:
    """One level of rows taken out: [[a, b], [], [c]] -> [a, b, c]."""
    flat = []
    for entry in images:
        flat.extend(entry if isinstance(entry, (list, tuple)) else [entry])
    return flat


def _number_of_images(images: ImageInput | None) -> int:
    if images is None:
        return 0
    if isinstance(images, (list, tuple)):
        return sum(_number_of_images(image) for image in images)
    return len(images) if getattr(images, "ndim", 3) == 4 else 1


def _add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)


def _set_and_save(tokenizer: PreTrainedTokenizerBase, name: str, value: Any) -> None:
    setattr(tokenizer, name, value)
    tokenizer.init_kwargs[name] = value  # what `save_pretrained` writes


def _put_bos_in_front(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a tokenizer to pad on the left and to put bos in front and no eos behind; these settings are saved with it."""
    _set_and_save(tokenizer, "padding_side", "left")
    _set_and_save(tokenizer, "model_input_names", ["input_ids", "attention_mask"])
    if not _puts_bos_and_no_eos(tokenizer):
        _set_and_save(tokenizer, "add_bos_token", True)
        _set_and_save(tokenizer, "add_eos_token", False)
    if not _puts_bos_and_no_eos(tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} encodes 'a' as {tokenizer('a').input_ids}; expected bos "
            f"({tokenizer.bos_token_id}) in front and no eos ({tokenizer.eos_token_id}) behind. Configure it so, or "
            "use a fast tokenizer."
        )


def _puts_bos_and_no_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a").input_ids
    return ids[0] == tokenizer.bos_token_id and ids[-1] != tokenizer.eos_token_id


def _encoder_size(image_processor: BaseImageProcessor) -> dict[str, int]:
    """Height and width of an encoder's images: what its own image processor would return."""
    if hasattr(image_processor, "max_num_patches"):  # SigLIP 2 keeps proportions; of a square image it makes
        side = math.isqrt(image_processor.max_num_patches) * image_processor.patch_size
        return {"height": side, "width": side}
    size = dict(image_processor.size)
    if image_processor.do_center_crop and getattr(image_processor, "crop_size", None):
        size = dict(image_processor.crop_size)
    if "shortest_edge" in size and len(size) == 1:  # ConvNeXt: a square of that side
        size = {"height": size["shortest_edge"], "width": size["shortest_edge"]}
    if set(size) != {"height", "width"}:
        raise ValueError(
            f"Could not read one fixed size from {type(image_processor).__name__}: size={dict(image_processor.size)}. "
            "Give it a size with height and width."
        )
    return size


# `transformers serve` loads the processor first, and then looks for the model in this table of names, not among the Auto
# classes: without an entry it cannot serve code that came with a checkpoint.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault("deem", "DeemForConditionalGeneration")

__all__ = ["CHAT_TEMPLATE", "GROUNDING_TOKENS", "DeemProcessor"]
