# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Samples -> batch: which tokens are trained, where each image's document starts, padding.

Shape letters: B sequences, N images of the batch, T text length.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_deem import check_text, encode_marked
from .processing_deem import DeemProcessor
from .regions_deem import merge_regions
from .samples_deem import check_kinds

IGNORED = -100
MODES = ("interleaved", "image_to_text", "text_to_image")


def make_labels(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    bos_token_id: int,
    image_token_id: int,
    start_of_image_token_id: int,
    pad_token_id: int | None = None,
    prompt_lengths: torch.Tensor | int = 0,
    ignore_text_without_image: bool = False,
) -> torch.Tensor:
    """
    Labels of the text loss, in the transformers convention: unshifted, -100 where nothing is trained.

    Ignored are padding (attention 0, or `pad_token_id`), the first `prompt_lengths` tokens of each sample, every image
    slot, every bos, and a start-of-image token directly after bos. Trained are all others, so every eos and the
    start-of-image tokens in running text: the model learns when to draw.

    Args:
        input_ids: (B, T) int64, padded on either side.
        attention_mask: (B, T), 1 for tokens and 0 for padding.
        pad_token_id: leave out where the padding token is also a real one (eos).
        prompt_lengths: tokens of each sample, counted from its first, that are given rather than trained; int or (B,).
        ignore_text_without_image: also ignore tokens with no start-of-image since the latest bos (their own included).

    Returns: (B, T) int64.
    """
    is_bos = input_ids == bos_token_id
    is_start = input_ids == start_of_image_token_id
    prompt_lengths = torch.as_tensor(prompt_lengths, device=input_ids.device).reshape(-1, 1)
    ignored = (attention_mask == 0) | (attention_mask.cumsum(dim=1) <= prompt_lengths)
    ignored |= is_bos | (input_ids == image_token_id)
    ignored[:, 1:] |= is_start[:, 1:] & is_bos[:, :-1]
    if pad_token_id is not None:
        ignored |= input_ids == pad_token_id
    if ignore_text_without_image:
        starts = is_start.cumsum(dim=1)
        starts_before_document = torch.where(is_bos, starts, 0).cummax(dim=1).values
        ignored |= starts == starts_before_document
    return input_ids.masked_fill(ignored, IGNORED)


def find_document_starts(input_ids: torch.Tensor, *, bos_token_id: int, start_of_image_token_id: int) -> torch.Tensor:
    """
    Column at which each image's document starts: the latest bos before its start-of-image token, 0 if there is none.

    Args:
        input_ids: (B, T) int64.

    Returns: (N,) int64, in the order of the start-of-image tokens, row by row.
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    latest_bos = torch.where(input_ids == bos_token_id, columns, 0).cummax(dim=1).values
    return latest_bos[input_ids == start_of_image_token_id]


@contextmanager
def _named(sample: Mapping[str, Any]) -> Iterator[None]:
    """Give errors the name of the sample."""
    try:
        yield
    except TemplateError as error:
        raise ValueError(f"Sample {sample['id']}: the chat template refuses the chat: {error}") from error
    except ValueError as error:
        raise ValueError(f"Sample {sample['id']}: {error}") from error


class DeemDataCollator:
    r"""
    Turns a list of samples into one batch, ready for the model. Samples are dicts of one of four forms and are not
    changed:

    - `{"text": str, "images": [PIL, ...]}` with `<image>` in the text for each image; optionally `"prompt"`, the
      beginning of the text that is given rather than trained, or `"trained_spans"`, `[(start, end), ...]` in characters
      of the text, outside of which nothing is trained. bos is put in front and eos behind.
    - `{"messages": [...]}`, a chat as transformers takes it; images stand in the image items or, in order, in
      `"images"`. Only what the assistant says is trained.
    - `{"input_ids": [int, ...], "images": [PIL, ...]}`, tokenized and packed, image slots included; optionally
      `"document_starts"`, one column per image.
    - `{"samples": [...]}`, samples of one mode in the forms above that share a row, one behind the other, each a document
      of its own.

    Each may also have `"region_masks"` (one `(H, W)` mask or None per image) or `"boxes"`, `"points"` (as the image
    processor takes them), `"image_loss_mask"` (one bool per image: is its drawing supervised?), `"mode"`
    (`"interleaved"`, the default, `"image_to_text"` or `"text_to_image"`; one mode per batch) and `"id"` (for messages).

    Args:
        processor: a `DeemProcessor` with bos, eos and pad tokens.
        return_targets (`bool`, defaults to `True`): whether to return the images to draw.
        max_length (`int`, *optional*): most tokens a sample may have. Samples are never cut.
        max_images (`int`, *optional*): most images a sample may have; a model has room for
            `config.image_attention_max_images - 1` in a sequence.
        ignore_text_without_image (`bool`, defaults to `False`): see `make_labels`.

    The batch, all tensors unless said otherwise. N counts the images of the whole batch in the order of their
    start-of-image tokens, row by row; without any image its keys are absent.

    | key | shape | |
    |---|---|---|
    | `input_ids` | (B, T) int64 | padded on the right |
    | `attention_mask` | (B, T) int64 | 1 for tokens, 0 for padding |
    | `labels` | (B, T) int64 | not shifted, -100 where nothing is trained |
    | `pixel_values` | (N, 3, h, w) float32 | normalized with the encoder's mean and std |
    | `target_pixel_values` | (N, 3, H, W) float32 | in [-1, 1]; with `return_targets` |
    | `region_masks` | (N, 1, h, w) float32 | in {0, 1}; only if an image has a region, ones for whole images |
    | `document_starts` | (N,) int64 | column of the last bos before the image's start-of-image token, else 0 |
    | `image_loss_mask` | (N,) bool | only if a sample gives it, True for the others |
    | `text_loss_weight` | float | 0.0 for `text_to_image`, else absent: the model's config decides |
    | `image_loss_weight` | float | 0.0 for `image_to_text`, else absent |

    Example, printed, with 4 image tokens (260) per image behind its start-of-image token (259), images of 64
    pixels, a tokenizer of one token per byte, bos 1, eos 2 and pad 0:

    ```python
    >>> collator = DeemDataCollator(processor)
    >>> batch = collator([
    ...     {"text": "A <image>red", "images": [red]},
    ...     {"text": "<image>?no", "prompt": "<image>?", "images": [blue]},
    ... ])
    >>> print(batch["input_ids"])
    tensor([[  1,  35, 223, 259, 260, 260, 260, 260,  84,  71,  70,   2],
            [  1, 259, 260, 260, 260, 260,  33,  80,  81,   2,   0,   0]])
    >>> print(batch["labels"])
    tensor([[-100,   35,  223,  259, -100, -100, -100, -100,   84,   71,   70,    2],
            [-100, -100, -100, -100, -100, -100, -100,   80,   81,    2, -100, -100]])
    >>> for name, value in batch.items(): print(name, tuple(value.shape), value.dtype)
    input_ids (2, 12) torch.int64
    attention_mask (2, 12) torch.int64
    labels (2, 12) torch.int64
    pixel_values (2, 3, 64, 64) torch.float32
    target_pixel_values (2, 3, 64, 64) torch.float32
    document_starts (2,) torch.int64
    ```

    Raises `ValueError`, naming the sample: unknown form or mode, samples of several modes, a prompt that does not
    begin the text, images and placeholders that differ in number, a chat without an answer or that the template refuses,
    a sample longer than `max_length` or of more than `max_images`, and all that the processor refuses. `check` raises the
    same for one sample, before it is in a batch.
    """

    def __init__(
        self,
        processor: DeemProcessor,
        return_targets: bool = True,
        max_length: int | None = None,
        ignore_text_without_image: bool = False,
        max_images: int | None = None,
    ):
        tokenizer = processor.tokenizer
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        if None in ids.values() or ids["bos"] == ids["eos"]:
            raise ValueError(
                f"The tokenizer needs a bos, an eos and a pad token, bos and eos different; got the ids {ids}. "
                "`DeemProcessor.from_parts` adds what is missing."
            )
        self.processor = processor
        self.return_targets = return_targets
        self.max_length, self.max_images = max_length, max_images
        self.ignore_text_without_image = ignore_text_without_image
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids["bos"], ids["eos"], ids["pad"]

    def __call__(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Samples -> batch; see the class."""
        samples = [check_kinds(sample, f"number {index}") for index, sample in enumerate(samples)]
        mode = self._common_mode(samples)
        encoded = [self.encode(sample) for sample in samples]

        def padded(name: str, value: int) -> torch.Tensor:
            rows = [torch.tensor(row[name], dtype=torch.int64) for row in encoded]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)  # (B, T)

        input_ids = padded("input_ids", self.pad_token_id)
        attention_mask = padded("attention_mask", 0)
        special = {
            "bos_token_id": self.bos_token_id,
            "start_of_image_token_id": self.processor.start_of_image_token_id,
        }
        labels = make_labels(
            input_ids,
            attention_mask,
            image_token_id=self.processor.image_token_id,
            pad_token_id=None if self.pad_token_id == self.eos_token_id else self.pad_token_id,
            prompt_lengths=torch.tensor([row["prompt_length"] for row in encoded]),
            ignore_text_without_image=self.ignore_text_without_image,
            **special,
        )
        labels = labels.masked_fill(padded("said_by_assistant", 0) == 0, IGNORED)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

        images = [image for row in encoded for image in row["images"]]
        if images:
            batch |= self._image_inputs(images, [mask for row in encoded for mask in row["region_masks"]])
            starts = find_document_starts(input_ids, **special)
            given = [row["document_starts"] for row in encoded]
            if any(one is not None for one in given):
                found = starts.split([len(row["images"]) for row in encoded])
                pairs = zip(given, found, strict=True)
                starts = torch.cat([f if g is None else torch.tensor(g, dtype=torch.int64) for g, f in pairs])
            batch["document_starts"] = starts
            supervised = [row["image_loss_mask"] for row in encoded]
            if any(one is not None for one in supervised):
                filled = [
                    [True] * len(row["images"]) if m is None else m for m, row in zip(supervised, encoded, strict=True)
                ]
                batch["image_loss_mask"] = torch.tensor([flag for row in filled for flag in row], dtype=torch.bool)
        if mode == "image_to_text":
            batch["image_loss_weight"] = 0.0
        elif mode == "text_to_image":
            batch["text_loss_weight"] = 0.0
        return batch

    def check(self, sample: Mapping[str, Any]) -> None:
        """Refuse, where it can still be left out, a sample that would end the run in a batch.

        Raises:
            ValueError: all that a call refuses of this sample alone, which is named.
        """
        sample = check_kinds(sample, "number 0")
        self._common_mode([sample])
        row = self.encode(sample)
        with _named(sample):
            if row["images"]:
                self.processor.image_processor.check_images(row["images"], row["region_masks"])

    def _image_inputs(self, images: list[Any], region_masks: list[Any]) -> dict[str, torch.Tensor]:
        """What the batch holds of its images."""
        return self.processor.image_processor(
            images, region_masks=region_masks, return_targets=self.return_targets, return_tensors="pt"
        )

    def _common_mode(self, samples: list[dict[str, Any]]) -> str:
        samples = [{"id": sample["id"], **one} for sample in samples for one in sample.get("samples") or [sample]]
        modes = {sample.get("mode") or "interleaved": sample["id"] for sample in samples}
        for mode, name in modes.items():
            if mode not in MODES:
                raise ValueError(f"Sample {name} has mode {mode!r}; expected one of {', '.join(MODES)}.")
        if len(modes) != 1:
            counts = {mode: sum((s.get("mode") or "interleaved") == mode for s in samples) for mode in modes}
            raise ValueError(
                f"A batch has one mode, since the loss weights are the batch's; got {counts}. Group the samples by "
                "mode before batching."
            )
        return next(iter(modes))

    def encode(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """One sample of any form -> its token row (T,) as lists, its images and what belongs to each image."""
        sample = check_kinds(sample, "number 0")
        if sample.get("samples") is not None:
            return self._encode_several(sample)
        forms = [form for form in ("text", "messages", "input_ids") if sample.get(form) is not None]
        if len(forms) != 1:
            raise ValueError(
                f"Sample {sample['id']} has {forms or 'none'} of the keys text, messages, input_ids and samples (its keys: "
                f"{sorted(sample)}). Give exactly one."
            )
        if forms == ["text"]:
            row = self._encode_text(sample)
        elif forms == ["messages"]:
            row = self._encode_messages(sample)
        else:
            ids = sample["input_ids"]
            ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
            size = len(self.processor.tokenizer)
            if not ids or not all(0 <= one < size for one in ids):
                raise ValueError(
                    f"Sample {sample['id']} has input_ids {str(ids)[:80]}; expected whole numbers, at least one, from 0 to "
                    f"{size - 1}, the ids of the processor's tokenizer. Tokenize it with that tokenizer."
                )
            row = {"input_ids": ids, "images": list(sample.get("images") or [])}
        images = row["images"]
        row["attention_mask"] = [1] * len(row["input_ids"])
        row.setdefault("prompt_length", 0)
        row.setdefault("said_by_assistant", row["attention_mask"])
        self._check_row(sample, row)
        for name in ("region_masks", "boxes", "points", "image_loss_mask", "document_starts"):
            value = sample.get(name)
            if name != "region_masks" and hasattr(value, "tolist"):
                value = value.tolist()
            row[name] = list(value) if value is not None else None
            if row[name] is not None and len(row[name]) != len(images):
                raise ValueError(
                    f"Sample {sample['id']} has {len(row[name])} entries in {name} for {len(images)} images. Give one "
                    "per image."
                )
        if any(not 0 <= start < len(row["input_ids"]) for start in row["document_starts"] or ()):
            raise ValueError(
                f"Sample {sample['id']} has document_starts {row['document_starts']} in {len(row['input_ids'])} tokens. "
                "Give columns of the sample."
            )
        with _named(sample):
            regions = merge_regions(row["region_masks"], row.pop("boxes"), row.pop("points"))
        row["region_masks"] = regions or [None] * len(images)
        return row

    def _encode_several(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The rows of several samples as one; bos and eos of each stay."""
        rows = [self.encode({"id": sample["id"], **one}) for one in sample["samples"]]
        if not rows:
            raise ValueError(f"Sample {sample['id']} has no samples. Leave it out.")
        joined: dict[str, Any] = {"prompt_length": 0, "document_starts": None}
        for row in rows:
            row["said_by_assistant"] = [
                int(said and place >= row["prompt_length"]) for place, said in enumerate(row["said_by_assistant"])
            ]
        for name in ("input_ids", "attention_mask", "said_by_assistant", "images", "region_masks"):
            joined[name] = [entry for row in rows for entry in row[name]]
        masks = [row["image_loss_mask"] for row in rows]
        joined["image_loss_mask"] = None
        if any(mask is not None for mask in masks):
            pairs = zip(masks, rows, strict=True)
            joined["image_loss_mask"] = [flag for mask, row in pairs for flag in mask or [True] * len(row["images"])]
        self._check_row(sample, joined)
        return joined

    def _check_row(self, sample: Mapping[str, Any], row: dict[str, Any]) -> None:
        ids, given = row["input_ids"], len(row["images"])
        units = ids.count(self.processor.start_of_image_token_id)
        slots, per_image = ids.count(self.processor.image_token_id), self.processor.num_image_tokens
        whole = [self.processor.image_token_id] * per_image
        begins = (place + 1 for place, one in enumerate(ids) if one == self.processor.start_of_image_token_id)
        if units != given or slots != given * per_image or any(ids[at : at + per_image] != whole for at in begins):
            raise ValueError(
                f"Image features and image tokens do not match: sample {sample['id']} has {given} images, but {units} "
                f"start-of-image tokens and {slots} image tokens ({per_image} belong to an image, right behind its start). Write "
                f"{self.processor.image_token} once for every image, at its place in the text."
            )
        if self.max_images is not None and given > self.max_images:
            raise ValueError(
                f"Sample {sample['id']} has {given} images, max_images is {self.max_images}. Leave images out, split the "
                "sample, or take a model with room for more (image_attention_max_images)."
            )
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"Sample {sample['id']} has {len(ids)} tokens ({slots} of them image tokens), max_length is "
                f"{self.max_length}. Shorten or split the sample, or raise max_length."
            )

    def _encode_text(self, sample: dict[str, Any]) -> dict[str, Any]:
        text, prompt = sample["text"], sample.get("prompt") or ""
        with _named(sample):
            check_text(text)
        if not text.startswith(prompt):
            raise ValueError(
                f"Sample {sample['id']}: the prompt {prompt[:80]!r} does not begin the text {text[:80]!r}. The prompt is "
                "the part of the text that is given; make the text prompt + answer."
            )
        if sample.get("trained_spans") is not None:
            if prompt:
                raise ValueError(f"Sample {sample['id']} has a prompt and trained_spans: give one of them.")
            text = (
                text
                if text.endswith(self.processor.tokenizer.eos_token)
                else text + self.processor.tokenizer.eos_token
            )
            input_ids, said = self._with_spans(*self._expanded(text, sample["trained_spans"]))
            return {"input_ids": input_ids, "images": list(sample.get("images") or []), "said_by_assistant": said}
        input_ids = self._tokenized(text)
        if input_ids[-1] != self.eos_token_id:
            input_ids = [*input_ids, self.eos_token_id]
        # Tokenized alone, as at inference, where there is nothing behind the prompt that its last token could merge with.
        prompt_length = len(self._tokenized(prompt)) if prompt else 0
        return {"input_ids": input_ids, "images": list(sample.get("images") or []), "prompt_length": prompt_length}

    def _tokenized(self, text: str) -> list[int]:
        """Token ids of text with its images expanded, bos in front."""
        text = self.processor.expand_image_tokens(text)
        ids = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]

    def _encode_messages(self, sample: dict[str, Any]) -> dict[str, Any]:
        messages, images, unplaced = [], [], iter(sample.get("images") or [])
        with _named(sample):
            chat = self.processor.prepare_chat(sample["messages"], images_beside=bool(sample.get("images")))
        for message in chat:
            content = message.get("content")
            if isinstance(content, (list, tuple)):
                parts = [{"type": "image"} if part["type"] == "image" else part for part in content]
                for part in content:
                    if part["type"] == "image":
                        inside = [part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None]
                        images.append(inside[0] if inside else next(unplaced, None))
                message = {**message, "content": parts}
            messages.append(message)
        leftover, missing = len(list(unplaced)), sum(image is None for image in images)
        if leftover or missing:
            raise ValueError(
                f"Image features and image tokens do not match: sample {sample['id']} has {len(images)} image parts in "
                f"its messages and {len(images) - missing + leftover} images. Give each image part its image, or list "
                "in `images` one for each part that has none."
            )
        with _named(sample):
            text, spans = self._rendered(messages)
            check_text(text)
            input_ids, said = self._with_spans(text, spans)
        if not any(said):
            raise ValueError(
                f"Sample {sample['id']} has nothing to train: its roles are "
                f"{[message['role'] for message in messages]} and the chat template marks {len(spans)} answers. End "
                "the chat with an assistant message; a template of your own needs {% generation %} around answers."
            )
        return {"input_ids": input_ids, "images": images, "said_by_assistant": said}

    def _with_spans(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Token ids of text, bos in front, and for each whether it touches one of the spans of characters."""
        ids, places = encode_marked(self.processor.tokenizer, text)
        said = [
            int(any(start < span_end and end > span_start for span_start, span_end in spans)) for start, end in places
        ]
        return (ids, said) if ids[:1] == [self.bos_token_id] else ([self.bos_token_id, *ids], [0, *said])

    def _expanded(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """Text with its images expanded, and its spans with them."""
        expand = self.processor.expand_image_tokens
        return expand(text), [tuple(len(expand(text[:place])) for place in span) for span in spans]

    def _rendered(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """Chat -> its text with images expanded, and the character spans of what the assistant says."""
        # Not `apply_chat_template`: the images are prepared later, in one call for the whole batch.
        template = self.processor.chat_template
        (text,), (spans,) = render_jinja_template(
            conversations=[messages],
            chat_template=template["default"] if isinstance(template, dict) else template,
            return_assistant_tokens_mask=True,
            **self.processor.tokenizer.special_tokens_map,
        )
        return self._expanded(text, spans)
