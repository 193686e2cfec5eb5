# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The tab for talking: images and words in, words and drawn images out, as they come."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import numpy as np
import torch
from gradio.processing_utils import save_pil_to_cache
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, StoppingCriteria

from processing.regions_deem import POINT_RADIUS
from recipes.demo_app.uploads import MARKS, marked_image, open_upload
from recipes.demo_app.work import Report, checked_seed, reports_of
from recipes.generation.checkpoint import DRAWING_STEPS, make_scheduler
from recipes.generation.tasks import make_generators, to_pil

logger = logging.getLogger(__name__)
DRAW_WHEN = ("when the model asks", "after every text", "never")


@dataclass
class Turn:
    """What a user said and what came back.

    Attributes:
        images, regions: of the user; one region or None per image.
        marked: digest of the image and region from the editor, if they came with this turn.
        answer: texts and drawn images, in order; what was written until it was stopped.
        refused: the turn is shown, and the model does not see it.
    """

    text: str
    images: list[Image.Image] = field(default_factory=list)
    regions: list[Any] = field(default_factory=list)
    marked: str | None = None
    answer: list[str | Image.Image] = field(default_factory=list)
    refused: bool = False


@dataclass(frozen=True)
class Settings:
    """Of text and drawing; see `stream_interleaved` of the model."""

    max_new_tokens: int = 30
    temperature: float = 0.0  # 0: the likeliest token
    draw_when: str = DRAW_WHEN[0]
    max_pieces: int = 4
    num_inference_steps: int = DRAWING_STEPS
    guidance_scale: float = 3.5
    seed: float | None = 0  # of a field of numbers


class _TokensAsTheyCome(StoppingCriteria):
    """Reports the text so far after each token; `start` is None before the first token of a text."""

    def __init__(self, processor: ProcessorMixin, report: Report):
        self.processor, self.report, self.start = processor, report, None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        self.start = input_ids.shape[1] - 1 if self.start is None else self.start
        self.report(("text", self.processor.decode(input_ids[0, self.start :], skip_special_tokens=True)))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def converse(
    model: PreTrainedModel, processor: ProcessorMixin, turns: Sequence[Turn], settings: Settings, report: Report
) -> None:
    """Answer the last of some turns; report `("text", so far)`, `("step", number)` of drawing, and whole `("piece", ...)`.

    Raises:
        ValueError: what the processor refuses.
    """
    seen = [turn for turn in turns if not turn.refused]
    messages = [message for turn in seen for message in _messages(turn)][:-1]
    images = [image for turn in seen for image in [*turn.images, *_drawn(turn)]]
    regions = [region for turn in seen for region in [*turn.regions, *([None] * len(_drawn(turn)))]]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    given = {"region_masks": regions} if any(region is not None for region in regions) else {}
    inputs = processor(text=prompt, images=images or None, return_tensors="pt", **given).to(model.device)
    tokens = _TokensAsTheyCome(processor, report)
    config = model.config
    options: dict[str, Any] = {"do_sample": settings.temperature > 0}
    if settings.temperature > 0:
        options["temperature"] = settings.temperature
    if settings.draw_when == DRAW_WHEN[2] or model.image_decoder is None:
        options["suppress_tokens"] = [config.image_token_id, config.start_of_image_token_id]
    else:
        options["scheduler"] = make_scheduler(model)
    stream = model.stream_interleaved(
        **inputs,
        image_processor=processor.image_processor,
        max_pieces=settings.max_pieces,
        draw_every_turn=settings.draw_when == DRAW_WHEN[1],
        max_new_tokens=settings.max_new_tokens,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=make_generators(model, checked_seed(settings.seed), 1),
        callback_on_step_end=lambda step, *_: report(("step", step + 1)),
        stopping_criteria=[tokens],
        **options,
    )
    for _, piece in stream:
        tokens.start = None
        is_text = piece.dim() == 1
        whole = processor.decode(piece, skip_special_tokens=True).strip() if is_text else to_pil(piece[None])[0]
        report(("piece", whole))


def _messages(turn: Turn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A turn as two messages of a chat; images are placeholders."""
    asked = [{"type": "image"}] * len(turn.images) + [{"type": "text", "text": turn.text}]
    said = [{"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image"} for piece in turn.answer]
    return {"role": "user", "content": asked}, {"role": "assistant", "content": said}


def _drawn(turn: Turn) -> list[Image.Image]:
    return [piece for piece in turn.answer if not isinstance(piece, str)]


def new_turn(message: dict[str, Any], before: Sequence[Turn], marked: tuple[Image.Image, Any] | None) -> Turn:
    """What a user says now, with the marked image unless it has been shown already.

    Raises:
        ValueError: a file that is no image, or nothing was said.
    """
    if not message["text"].strip() and not message["files"]:
        raise ValueError("Nothing was said: write something or add an image.")
    turn = Turn(message["text"])
    if marked is not None:
        image, region = marked
        painted = region.tobytes() if isinstance(region, np.ndarray) else repr(region).encode()
        digest = hashlib.sha256(image.tobytes() + painted).hexdigest()
        if not any(earlier.marked == digest for earlier in before):
            turn.images, turn.regions, turn.marked = [image], [region], digest
    for file in message["files"]:
        turn.images.append(open_upload(file))
        turn.regions.append(None)
    return turn


def turns_before(turns: Sequence[Turn], history: Sequence[dict[str, Any]]) -> list[Turn]:
    """The turns that are on the page: a retried one is gone, one that was stopped before it began has no turn."""
    asked = sum(said["role"] == "user" for said in history)
    return [*turns[:asked], *[Turn("", refused=True)] * (asked - len(turns))]


def chat_tab(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Build the tab into the `gradio.Blocks` around it."""

    def answer(
        message: dict[str, Any],
        history: list[dict],
        turns: list[Turn],
        editor: Any,
        mark: str,
        radius: float,
        *settings,
    ) -> Iterator[tuple[list, list[Turn]]]:
        before = turns_before(turns, history)
        try:
            turn = new_turn(message, before, marked_image(editor, mark, radius))
        except ValueError as error:
            said = message["text"] or message["files"]  # Gradio shows no message of nothing
            yield [str(error)], [*before, Turn(message["text"], refused=True)] if said else before
            return
        now, turns = Settings(*settings), [*before, turn]
        shown: list[Any] = []
        pieces: list[str | Image.Image] = []
        try:
            for report in reports_of(lambda tell: converse(model, processor, turns, now, tell)):
                kind, value = report or ("end", "")
                turn.answer = [*pieces, value] if kind == "text" else pieces
                coming = f"drawing, step {value} of {now.num_inference_steps}" if kind == "step" else value
                if kind == "piece":
                    pieces.append(value)
                    shown += [as_shown(value)] if value else []
                    coming = ""
                yield [*shown, coming] if coming else shown or ["..."], turns
            if not shown:
                yield ["(The model ended without a word.)"], turns
        except gr.Error as error:
            turn.refused = True
            yield [*shown, error.message], turns
        except Exception:  # Gradio would leave the page without an answer, its text box locked
            logger.exception("No answer")
            turn.refused = True
            yield [*shown, "Something went wrong while answering; the app's log says what."], turns

    def as_shown(piece: str | Image.Image) -> str | dict[str, Any]:
        """A piece on the page; an image is written once, since the page asks for it at any time."""
        if isinstance(piece, str):
            return piece
        return {"content": {"path": save_pil_to_cache(piece, conversation.GRADIO_CACHE, format="png")}}

    with gr.Row():
        with gr.Column(scale=3, min_width=420):
            place = gr.Column()
        with gr.Column(scale=2, min_width=320):
            editor = gr.ImageEditor(
                label="Ask about a part: upload and paint",
                type="pil",
                sources=("upload", "clipboard"),
                transforms=(),
                brush=gr.Brush(default_size=12, colors=["#e6007e"], color_mode="fixed"),
                layers=False,
                height=320,
                elem_id="marked",
            )
            mark = gr.Radio(MARKS, value=MARKS[0], label="What you paint is")
            radius = gr.Slider(0.01, 0.5, POINT_RADIUS, label="Radius of a point, of the image's shorter side")
            own = Settings()
            with gr.Accordion("Text and drawing", open=True):
                settings = [
                    gr.Slider(1, 512, own.max_new_tokens, step=1, label="Longest text, in tokens"),
                    gr.Slider(0, 2, own.temperature, label="Temperature; 0 takes the likeliest token"),
                    gr.Radio(DRAW_WHEN, value=own.draw_when, label="Draw", elem_id="draw-when"),
                    gr.Slider(1, 16, own.max_pieces, step=1, label="Most texts and images of an answer"),
                    gr.Slider(1, 250, own.num_inference_steps, step=1, label="Steps of drawing"),
                    gr.Slider(1, 10, own.guidance_scale, label="Guidance of drawing"),
                    gr.Number(own.seed, precision=0, label="Seed"),
                ]
    turns = gr.State([])
    with place:
        conversation = gr.Chatbot(height=520, show_label=False, buttons=["copy"], elem_id="conversation", render=False)
        gr.ChatInterface(
            answer,
            multimodal=True,
            chatbot=conversation,
            textbox=gr.MultimodalTextbox(
                placeholder="Ask about images: add them with the clip, or paste them",
                file_count="multiple",
                file_types=["image"],
                sources=["upload"],
                elem_id="question",
                show_label=False,
            ),
            additional_inputs=[turns, editor, mark, radius, *settings],
            additional_outputs=[turns],
            api_name="chat",
            analytics_enabled=False,
        )
