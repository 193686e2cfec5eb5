# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Any vision-language model of transformers, asked in batches: the same answers for any batch size.

Rows are padded on the left and masked; what is drawn at random is drawn per sample. Of DEEM, each image is encoded once
for all the questions about it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from modeling_deem import DeemForConditionalGeneration
from modeling_deem.modeling_deem import DeemImageOutput
from processing.chat_deem import encode_marked, is_marked
from recipes.data.samples import content
from recipes.evaluation.benchmark import Request, stable_number
from recipes.evaluation.ranking import goes_on_behind_cache, log_likelihoods, option_token_ids
from recipes.generation.prompt_form import base_template


@dataclass(frozen=True)
class Question:
    """One prompt with its images.

    Attributes:
        id: of the sample; with the seed it decides what is drawn at random.
        images: of the prompt's placeholders.
        image_names: by which an image is known again.
        masks: (H, W) or None, one per image; empty where no image has one.
        options: answers whose likelihoods are asked for; none where one is to be written.
        asked: the question as the data has it.
    """

    id: str
    prompt: str
    images: tuple[Image.Image, ...] = ()
    image_names: tuple[str, ...] = ()
    masks: tuple[np.ndarray | None, ...] = ()
    options: tuple[str, ...] = ()
    asked: str = ""


@dataclass(frozen=True)
class Answer:
    """What a model wrote: the text without special tokens, and the ids up to the end token.

    Attributes:
        more: what else goes into the line, as `option_scores`.
    """

    raw: str
    token_ids: list[int]
    more: dict[str, Any] = field(default_factory=dict)


def load_model(
    name: str | Path, dtype: str = "auto", device: str | torch.device | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model and its processor for inference.

    Args:
        name: folder or Hub id of any model that `AutoModelForImageTextToText` knows.
        dtype: "auto" for that of the weights, or a name of torch's.
        device: the GPU if there is one, by default.

    Raises:
        ValueError: there is nothing to load, or the model is of another kind.
    """
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No vision-language model to load at {str(name)!r}: expected a folder with config.json, weights and a "
            f"processor, or a Hub id, of a model that AutoModelForImageTextToText knows. It says: {error}"
        ) from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), processor


class Answerer:
    """Asks a model.

    Args:
        protocol: "deem" renders the released dialogue form, whatever form was saved with a DEEM; else the model's own.
        seed: of what is drawn at random, with the sample's id.
        encode_once: encode an image once for all questions about it, where the model gives that door (DEEM).
        kept_images: how many encoded images are kept for questions to come.
        options_at_once: options that are read at a time.

    Attributes:
        encoded: number of images that the encoder has read through the door.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        protocol: str = "standard",
        seed: int = 0,
        encode_once: bool = True,
        kept_images: int = 64,
        options_at_once: int = 50,
    ) -> None:
        self.model, self.processor, self.protocol, self.seed = model, processor, protocol, seed
        self.is_deem = isinstance(model, DeemForConditionalGeneration)
        self.read_once, self.encode_once = encode_once, encode_once and self.is_deem
        self.kept_images, self.options_at_once = kept_images, options_at_once
        self.encoded = 0
        self._goes_on: bool | None = None  # not yet known
        self._features: OrderedDict[str, DeemImageOutput] = OrderedDict()
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"The processor of {model.config._name_or_path or type(model).__name__!r} has no chat template, so that "
                "it is not known how the model is asked. Set processor.chat_template and save it beside the model."
            )

    def alone(self) -> "Answerer":
        """Return one that reads and encodes everything anew for each question."""
        return Answerer(self.model, self.processor, self.protocol, self.seed, encode_once=False)

    def prompt(self, request: Request) -> str:
        """Return the text that a request becomes, up to the beginning of the answer."""
        chat = [{"role": "user", "content": content(*request.pieces)}]
        released = self.protocol == "deem" and self.is_deem
        form = {"chat_template": base_template(self.processor)} if released else {}
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, **form) + request.answer_begin

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], **options: Any) -> list[Answer]:
        """Answer a batch of questions.

        Args:
            options: of `model.generate`. With `do_sample` each question is answered alone, by its own seed.
        """
        if any(question.options for question in questions):
            return [self._rank(question) for question in questions]
        if options.get("do_sample"):
            answers = []
            for question in questions:
                torch.manual_seed(stable_number(self.seed, question.id))
                answers += self._continue([question], options)
            return answers
        return self._continue(questions, options)

    def _rank(self, question: Question) -> Answer:
        """Return the likeliest option of a question, with the log-likelihood of each."""
        ids = option_token_ids(getattr(self.processor, "tokenizer", self.processor), question.options)
        if self.read_once and self._goes_on is None:
            self._goes_on = goes_on_behind_cache(self.model, self._inputs([question]), ids)
        once = bool(self.read_once and self._goes_on)
        encoded = once and self.encode_once and question.images and not question.masks
        inputs = self._inputs_encoded_once([question]) if encoded else self._inputs([question])
        scores = log_likelihoods(self.model, inputs, ids, self.options_at_once, once)
        best = max(range(len(scores)), key=scores.__getitem__)
        return Answer(question.options[best], ids[best], {"option_scores": scores})

    def _continue(self, questions: Sequence[Question], options: dict[str, Any]) -> list[Answer]:
        # images with masks and rows without images go the plain way
        once = self.encode_once and all(question.images and not question.masks for question in questions)
        inputs = self._inputs_encoded_once(questions) if once else self._inputs(questions)
        tokens = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        return [self._answer_of(row) for row in tokens.tolist()]

    def _answer_of(self, ids: list[int]) -> Answer:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        last = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
        ids = ids[: last + 1]
        if self.model.generation_config.pad_token_id not in ends:
            while ids and ids[-1] == self.model.generation_config.pad_token_id:
                ids.pop()
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), ids)

    def _inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """Return the inputs as the processor gives them, each image as often as it is asked about."""
        images = [list(question.images) for question in questions]
        options: dict[str, Any] = {}
        if any(question.masks for question in questions):
            options["region_masks"] = [mask for question in questions for mask in question.masks]
            images = [image for row in images for image in row]
        inputs = self.processor(
            text=[question.prompt for question in questions],
            images=images if any(images) else None,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            **options,
        )
        given = {name: value.to(self.model.device) for name, value in inputs.items() if torch.is_tensor(value)}
        return {name: self._cast(value) for name, value in given.items()}

    def _cast(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.model.dtype) if value.is_floating_point() else value

    # ---- DEEM: each image once ----

    def _inputs_encoded_once(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Return inputs of the same meaning, with the images' encoded form in place of pixels."""
        tokenizer = self.processor.tokenizer
        rows = [self._token_ids(question.prompt) for question in questions]
        padded = tokenizer.pad({"input_ids": rows}, padding=True, padding_side="left", return_tensors="pt")
        features = self._features_of(questions)
        return {**padded.to(self.model.device), "mm_encoder_outputs": {"image": features}}

    def _token_ids(self, prompt: str) -> list[int]:
        """Tokenize one prompt as the processor does."""
        text = self.processor.expand_image_tokens(prompt)
        if is_marked(text):
            bos = self.processor.tokenizer.bos_token or ""
            return encode_marked(self.processor.tokenizer, text if text.startswith(bos) else bos + text)[0]
        bos = self.processor.tokenizer.bos_token
        return self.processor.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids

    def _features_of(self, questions: Sequence[Question]) -> DeemImageOutput:
        """Return the encoded images of all questions in their order; those not yet known are encoded."""
        named = {
            name: image
            for question in questions
            for name, image in zip(question.image_names, question.images, strict=True)
        }
        new = {name: image for name, image in named.items() if name not in self._features}
        if new:
            read = self.processor.image_processor(list(new.values()), return_tensors="pt").to(self.model.device)
            found = self.model.get_image_features(read["pixel_values"], return_dict=True)
            for number, name in enumerate(new):
                self._features[name] = _rows_of(found, [number])
            self.encoded += len(new)
        order = [name for question in questions for name in question.image_names]
        joined = _joined([self._features[name] for name in order])
        for name in named:
            self._features.move_to_end(name)
        while len(self._features) > self.kept_images:
            self._features.popitem(last=False)
        return joined


def _rows_of(images: DeemImageOutput, rows: list[int]) -> DeemImageOutput:
    """Return what text needs of some of the images, as tensors of their own."""
    return DeemImageOutput(
        pooler_output=images.pooler_output[rows], image_features=tuple(level[rows] for level in images.image_features)
    )


def _joined(images: Sequence[DeemImageOutput]) -> DeemImageOutput:
    levels = zip(*(image.image_features for image in images), strict=True)
    return DeemImageOutput(
        pooler_output=torch.cat([image.pooler_output for image in images]),
        image_features=tuple(torch.cat(level) for level in levels),
    )
