# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Writing and drawing in turns, for a batch of rows that are each at a point of their own (spec section 10).

Letters: B rows, T tokens, N images, H image side, h/w sides of the encoder's input.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from transformers import LogitsProcessor

from .image_decoder_deem import StepCallback
from .image_states_deem import last_document_start


@dataclasses.dataclass
class DeemInterleavedOutput:
    """
    Attributes:
        pieces: for each row what was generated, in order: token ids int64 (T,), a start-of-image token last where a
            image follows, or images (3, H, H) in [0, 1].
        input_ids, attention_mask: (B, T), prompts and all pieces, images as image tokens, padded on the left.
        pixel_values: (N, 3, h, w), the prompts' images and the drawn ones, row by row, as the model reads them.
        region_masks: (N, 1, h, w), if the prompts' images have regions; ones for drawn images.
    """

    pieces: list[list[torch.Tensor]]
    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    pixel_values: torch.Tensor | None
    region_masks: torch.Tensor | None = None


@dataclasses.dataclass
class _Row:
    """One row between two pieces: all its tokens, its images so far, and what comes next."""

    index: int
    ids: torch.Tensor  # [T]
    pixel_values: torch.Tensor | None  # [n, 3, h, w]
    region_masks: torch.Tensor | None  # [n, 1, h, w]
    document_start: int
    generator: torch.Generator | None
    latents: Sequence[torch.Tensor] | None  # initial noise, one per image to draw
    drawing: bool
    pieces: list[torch.Tensor] = dataclasses.field(default_factory=list)
    num_drawn: int = 0
    done: bool = False


class _RowSampler(LogitsProcessor):
    """Draws each row's next token with the row's own generator, and leaves only that one to be sampled.

    A row that has ended draws no more, so that its generator stands where it would stand without neighbors.
    """

    def __init__(self, generators: list[torch.Generator], prompt_length: int, stop_ids: list[int]):
        self.generators, self.prompt_length, self.stop_ids = generators, prompt_length, stop_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        stops = torch.tensor(self.stop_ids, device=input_ids.device)
        ended = torch.isin(input_ids[:, self.prompt_length :], stops).any(1).tolist()
        chosen = torch.full_like(scores, float("-inf"))
        for row, generator in enumerate(self.generators):
            token = 0
            if not ended[row]:
                probabilities = scores[row].float().softmax(-1).to(generator.device)
                token = int(torch.multinomial(probabilities, 1, generator=generator))
            chosen[row, token] = 0.0
        return chosen


class InterleavingMixin:
    """`generate_interleaved` and `stream_interleaved`."""

    def generate_interleaved(self, input_ids: torch.LongTensor, *args, **kwargs) -> DeemInterleavedOutput:
        """Writes and draws in turns, until each row has come to its end: see `stream_interleaved`."""
        stream = self.stream_interleaved(input_ids, *args, **kwargs)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                return end.value

    @torch.no_grad()
    def stream_interleaved(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        region_masks: torch.Tensor | None = None,
        *,
        image_processor: Callable[..., dict[str, torch.Tensor]],
        max_pieces: int = 8,
        draw_every_turn: bool = False,
        stop_at_eos: bool = True,
        max_new_tokens: int = 256,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        scheduler: SchedulerMixin | None = None,
        latents: Sequence[Sequence[torch.Tensor]] | None = None,
        callback_on_step_end: StepCallback | None = None,
        **text_options,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields `(row, piece)` as the pieces come: a text, the image it asked for, text again, until eos.

        In each round the rows that are about to draw do so in one batch, then the rows that are about to write.
        Each row gives what it would give alone. A drawn image goes back through the image processor and is an
        image of the text like any other. Each row is one document: a bos that the model writes does not cut off what
        comes before it from the next image.

        Args:
            input_ids: (B, T), images as the processor writes them, padding on either side. In a row that ends in a
                start-of-image token the first piece is an image.
            pixel_values: (N, 3, h, w), images in the text, row by row.
            attention_mask: (B, T), 0 at padding.
            region_masks: (N, 1, h, w) in {0, 1}, as in `forward`; drawn images are seen whole.
            image_processor: the processor's; called with `images` (uint8 arrays (3, H, H)) and `return_tensors="pt"`.
            max_pieces: most pieces, texts and images, of each row.
            draw_every_turn: draw an image after every text, whether the model asks for it or not.
            stop_at_eos: end a row when the model does; otherwise only after `max_pieces`.
            max_new_tokens: most tokens of each text.
            num_inference_steps, guidance_scale, scheduler, callback_on_step_end: as in `generate_images`.
            generator: a list of one per row makes each row repeatable, text sampling included, whatever its
                neighbors; one generator serves all rows in turn.
            latents: for each row, a list of initial noise, one per image, as in `generate_images`.
            text_options: of `generate`, for each text; one of `stopping_criteria` sees each token as it comes.

        Returns:
            As the generator's return value, and from `generate_interleaved`: `DeemInterleavedOutput`.
        """
        rows = self._split_rows(input_ids, attention_mask, pixel_values, region_masks, generator, latents)
        sampling = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        sampling |= {"scheduler": scheduler, "callback_on_step_end": callback_on_step_end}
        text_options = self._text_options(text_options, max_new_tokens)
        while active := [row for row in rows if not row.done and len(row.pieces) < max_pieces]:
            if drawing := [row for row in active if row.drawing]:
                self._draw(drawing, image_processor, sampling)
                yield from ((row.index, row.pieces[-1]) for row in drawing)
            if writing := [row for row in active if not row.drawing and len(row.pieces) < max_pieces]:
                self._write(writing, text_options, draw_every_turn, stop_at_eos)
                yield from ((row.index, row.pieces[-1]) for row in writing)
        return DeemInterleavedOutput([row.pieces for row in rows], **self._join_rows(rows))

    def _split_rows(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        region_masks: torch.Tensor | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Sequence[Sequence[torch.Tensor]] | None,
    ) -> list[_Row]:
        """The batch as rows of their own, without padding, each with its own images."""
        config, batch = self.config, len(input_ids)
        generators = list(generator) if isinstance(generator, Sequence) else [generator] * batch
        latents = list(latents) if latents else [None] * batch
        for name, given in (("generator", generators), ("latents", latents)):
            if len(given) != batch:
                raise ValueError(f"{name} has {len(given)} entries for {batch} rows. Give one per row.")
        counts = (input_ids == config.image_token_id).sum(1) // config.num_image_tokens
        images = 0 if pixel_values is None else len(pixel_values)
        if int(counts.sum()) != images:
            raise ValueError(
                f"{images} images in pixel_values, but the rows of input_ids hold {counts.tolist()}. Let the processor "
                "make both."
            )
        if region_masks is not None and len(region_masks) != images:
            raise ValueError(
                f"{len(region_masks)} region masks for {images} images. Give one per image, ones for a whole image."
            )
        own_images, own_masks = (
            [None] * batch if values is None else values.split(counts.tolist())
            for values in (pixel_values, region_masks)
        )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = []
        for index, (ids, keep) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            ids = ids[keep]
            start = last_document_start(ids[None] == config.bos_token_id)[0, -1].clamp(min=0)
            drawing = bool(ids[-1] == config.start_of_image_token_id)
            seen = (own_images[index], own_masks[index])
            rows.append(_Row(index, ids, *seen, int(start), generators[index], latents[index], drawing))
        return rows

    def _join_rows(self, rows: list[_Row]) -> dict[str, torch.Tensor | None]:
        """Rows as one batch padded on the left: the model's inputs, `region_masks` None where no image has a region."""
        longest = max(len(row.ids) for row in rows)
        pad = self.config.pad_token_id or 0
        ids = torch.stack([F.pad(row.ids, (longest - len(row.ids), 0), value=pad) for row in rows])
        mask = torch.stack([F.pad(torch.ones_like(row.ids), (longest - len(row.ids), 0)) for row in rows])
        joined = {"input_ids": ids, "attention_mask": mask}
        for name in ("pixel_values", "region_masks"):
            values = [value for row in rows if (value := getattr(row, name)) is not None]
            joined[name] = torch.cat(values) if values else None
        return joined

    def _text_options(self, options: dict, max_new_tokens: int) -> dict:
        """Options of `generate` for one text of every row."""
        for name, allowed in (("num_return_sequences", 1), ("max_length", None)):
            if options.get(name, allowed) not in (allowed, None):
                raise ValueError(
                    f"generate_interleaved takes no {name} (got {options[name]}): each row has one continuation, and "
                    "each of its texts at most max_new_tokens."
                )
        for name in ("eos_token_id", "return_dict_in_generate", "stop_strings", "streamer"):
            if options.get(name):
                raise ValueError(
                    f"generate_interleaved takes no {name}: a text ends at the model's eos or where an image begins."
                )
        # Image tokens written as text would have no image.
        defaults = {"pad_token_id": self.config.pad_token_id, "suppress_tokens": [self.config.image_token_id]}
        return {**defaults, **options, "max_new_tokens": max_new_tokens}

    def _write(self, rows: list[_Row], options: dict, draw_every_turn: bool, stop_at_eos: bool) -> None:
        """One text for each row, up to its eos or the start of its next image."""
        config = self.config
        eos = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or [])
        start = config.start_of_image_token_id
        inputs = {name: value for name, value in self._join_rows(rows).items() if value is not None}
        length = inputs["input_ids"].shape[1]
        samples = options.get("do_sample", self.generation_config.do_sample)
        if samples and rows[0].generator is not None:
            if options.get("num_beams", 1) != 1:
                raise ValueError("Beams are not sampled with a generator: leave out num_beams, or the generator.")
            sampler = _RowSampler([row.generator for row in rows], length, [*eos, start])
            options = {**options, "custom_generate": _sampling_with(sampler)}
        written = self.generate(**inputs, eos_token_id=[*eos, start], **options)[:, length:]
        stops = torch.isin(written, torch.tensor([*eos, start], device=written.device))
        for row, text, stop in zip(rows, written, stops, strict=True):
            text = text[: int(stop.int().argmax()) + 1] if stop.any() else text  # what follows is padding
            ended = len(text) > 0 and int(text[-1]) in eos
            text = text[:-1] if ended else text
            asked = len(text) > 0 and int(text[-1]) == start
            row.drawing = asked or draw_every_turn
            if row.drawing and not asked:
                text = F.pad(text, (0, 1), value=start)
            row.pieces.append(text)
            row.ids = torch.cat([row.ids, text])
            row.done = ended and stop_at_eos

    def _draw(self, rows: list[_Row], image_processor: Callable, options: dict) -> None:
        """One image for each row, read again as an image of its text."""
        inputs = self._join_rows(rows)
        device, length = inputs["input_ids"].device, inputs["input_ids"].shape[1]
        starts = torch.tensor([length - len(row.ids) + row.document_start for row in rows], device=device)
        generators = [row.generator for row in rows]
        given = rows[0].latents is not None
        latents = torch.cat([row.latents[row.num_drawn] for row in rows]) if given else None
        images = self.generate_images(
            **inputs,
            generator=None if generators[0] is None else generators,
            document_starts=starts,
            latents=latents,
            **options,
        )
        as_bytes = list((images * 255).round().to(torch.uint8).cpu().numpy())
        seen = image_processor(images=as_bytes, return_tensors="pt")["pixel_values"].to(device)
        for row, image, pixels in zip(rows, images, seen.split(1), strict=True):
            row.pieces.append(image)
            row.num_drawn += 1
            row.ids = F.pad(row.ids, (0, self.config.num_image_tokens), value=self.config.image_token_id)
            row.pixel_values = pixels if row.pixel_values is None else torch.cat([row.pixel_values, pixels])
            if row.region_masks is not None:
                row.region_masks = torch.cat([row.region_masks, torch.ones_like(pixels[:, :1])])
            row.drawing = False


def _sampling_with(sampler: _RowSampler) -> Callable:
    """transformers' own decoding loop, with `sampler` behind all other processors of the logits."""

    def decode(model, input_ids, logits_processor, **kwargs):
        logits_processor.append(sampler)
        return model._sample(input_ids, logits_processor=logits_processor, **kwargs)

    return decode
