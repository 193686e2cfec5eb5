# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Drawing: what `DeemForConditionalGeneration` does besides writing text (spec section 10).

Letters: B sequences, T tokens, N images given, D language width, H picture side.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from diffusers import SchedulerMixin

from .attention_deem import DeemImageStates
from .image_decoder_deem import DeemImageDecoder, gather_contexts, previous_features
from .text_deem import last_document_start


@dataclasses.dataclass
class DeemInterleavedOutput:
    """
    Attributes:
        pieces: what was generated, in order: token ids int64 (T,), a start-of-image token last where a picture
            follows, or pictures (3, H, H) in [0, 1].
        input_ids: (1, T), prompt and all pieces, pictures as image tokens.
        pixel_values: (N, 3, h, w), the prompt's images and the drawn ones, as the model reads them.
    """

    pieces: list[torch.Tensor]
    input_ids: torch.LongTensor
    pixel_values: torch.Tensor | None


class DeemGenerationMixin:
    """`generate_images`, `generate_interleaved`, `reconstruct`, `consistency_loss`, and the image states on their way
    through `generate`.
    """

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict, **kwargs) -> dict:
        # transformers drops images after the prompt; the image attention needs them at every step.
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        states = outputs.image_states
        if model_kwargs.get("use_cache") and states is not None:
            model_kwargs["image_states"] = dataclasses.replace(states, visible=states.visible[:, -1:])
        return model_kwargs

    def require_image_decoder(self) -> DeemImageDecoder:
        if self.image_decoder is None:
            raise ValueError(
                "This model has no image decoder (image_decoder_config is None) and cannot draw. Compose one with "
                "DeemForConditionalGeneration.from_vision_text_diffusion_pretrained(vision, text, diffusion)."
            )
        return self.image_decoder

    def get_image_context(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        images,
        document_starts: torch.Tensor | None = None,
        last_only: bool = False,
        target_images: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, DeemImageStates]:
        """What each image is drawn from: its context in the text, and the images before it.

        Args:
            hidden_states: (B, T, D), after the language model's last norm.
            images: output of `get_image_features`, or None.
            document_starts: int64, one column per drawn image; the latest bos before it otherwise.
            last_only: draw at the last start-of-image token of each row (generation) instead of at every image.
            target_images: int64 (G,), draw these of the given images only, numbered in the order of the batch.

        Returns:
            contexts (G, L, D), their bool mask (G, L), and the previous images' features.
        """
        if input_ids is None:
            raise ValueError("Drawing needs input_ids: images are found by their start-of-image tokens.")
        config = self.config
        is_start = input_ids == config.start_of_image_token_id
        begins_image = is_start & (input_ids.roll(-1, dims=1) == config.image_token_id)
        begins_image[:, -1] = False
        given = begins_image.nonzero(as_tuple=True)  # rows, columns
        count = 0 if images is None else len(images.image_tokens)
        if len(given[0]) != count:
            raise ValueError(
                f"{count} images, but {len(given[0])} start-of-image tokens followed by image tokens. Each image is "
                f"written as one start-of-image token (id {config.start_of_image_token_id}) and "
                f"{config.num_image_tokens} image tokens (id {config.image_token_id}); the processor does so."
            )
        if last_only:
            columns = torch.arange(is_start.shape[1], device=is_start.device)
            drawn = (torch.arange(len(is_start), device=is_start.device), (is_start * columns).max(1).values)
        elif target_images is not None:
            drawn = (given[0][target_images], given[1][target_images])
        else:
            drawn = given
        rows, columns = drawn
        if document_starts is None:
            starts = last_document_start(input_ids == config.bos_token_id)
            document_starts = starts[rows, (columns - 1).clamp(min=0)].clamp(min=0)
        contexts, mask = gather_contexts(hidden_states, attention_mask, rows, columns, document_starts)
        if count == 0:
            return contexts, mask, self.image_decoder.no_features(len(rows))
        previous = self.config.image_decoder_config.num_previous_images
        return contexts, mask, previous_features(images.deepstack_features, given, drawn, document_starts, previous)

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        region_masks: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        scheduler: SchedulerMixin | None = None,
        step_noise: torch.Tensor | None = None,
        target_images: torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draws one picture per row, from what the row has said and shown so far.

        A start-of-image token is appended to rows that do not end in one; padding may be on either side. With
        `target_images` the pictures to draw stand in the text already (as any picture of that size) and are drawn anew
        from what comes before each of them.

        Args:
            input_ids: (B, T), images as the processor writes them.
            pixel_values: (N, 3, h, w), images in the text.
            num_inference_steps, guidance_scale: the config's by default (250, 3.5).
            generator: one, or a list of one per row.
            latents: initial noise (B, 4, s, s), or one per target image.
            scheduler: any diffusers scheduler built from the model's scheduler config.
            step_noise: noise of every sampling step, (num_inference_steps, B, 4, s, s), to repeat a computation.
            target_images: int64 (G,), numbers of the images in the text to draw instead, in the order of the batch.
            document_starts: int64, the column from which each picture's context counts; the latest bos otherwise.

        Returns:
            (B, 3, H, H) in [0, 1], or (G, 3, H, H).
        """
        decoder = self.require_image_decoder()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if target_images is None:
            input_ids, attention_mask = self.append_start_of_image(input_ids, attention_mask)
        images = None if pixel_values is None else self.get_image_features(pixel_values, region_masks)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            mm_encoder_outputs={"image": images},
            use_cache=False,
        )
        contexts, mask, states = self.get_image_context(
            outputs.last_hidden_state,
            input_ids,
            attention_mask,
            images,
            document_starts,
            last_only=target_images is None,
            target_images=target_images,
        )
        return decoder.sample(
            decoder.condition_from_context(contexts, mask),
            states,
            num_inference_steps,
            guidance_scale,
            generator,
            latents,
            scheduler,
            step_noise,
        )

    @torch.no_grad()
    def generate_interleaved(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None = None,
        *,
        image_processor: Callable[..., dict[str, torch.Tensor]],
        max_pieces: int = 8,
        draw_every_turn: bool = False,
        stop_at_eos: bool = True,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        scheduler: SchedulerMixin | None = None,
        latents: Sequence[torch.Tensor] | None = None,
        step_noise: Sequence[torch.Tensor] | None = None,
        **text_options,
    ) -> DeemInterleavedOutput:
        """Writes and draws in turns: text until a start-of-image token, the picture, text again, until eos.

        A drawn picture goes back through the image processor and is an image of the text like any other. Everything
        is one document: a bos that the model writes does not cut off what comes before it from the next picture.

        Args:
            input_ids: (1, T), images as the processor writes them, no padding. Ends it in a start-of-image token, the
                first piece is a picture.
            pixel_values: (N, 3, h, w), images in the text.
            image_processor: the processor's; called with `images` (a list with one uint8 array (3, H, H)) and
                `return_tensors="pt"`.
            max_pieces: most pieces, texts and pictures, to generate.
            draw_every_turn: draw a picture after every text, whether the model asks for it or not.
            stop_at_eos: end when the model does; otherwise only after `max_pieces`.
            num_inference_steps, guidance_scale, generator, scheduler: as in `generate_images`.
            latents, step_noise: per picture, as in `generate_images`, to repeat a computation.
            text_options: of `generate`, for each text.
        """
        config = self.config
        if len(input_ids) != 1:
            raise ValueError(f"generate_interleaved takes one row at a time, got {len(input_ids)}. Call it for each.")
        eos = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or [])
        start, slot = config.start_of_image_token_id, config.image_token_id
        # Image tokens written as text would have no image.
        text_options = {"pad_token_id": config.pad_token_id, "suppress_tokens": [slot], **text_options}
        document_start = last_document_start(input_ids == config.bos_token_id)[:, -1].clamp(min=0)
        pieces: list[torch.Tensor] = []
        drawing, pictures = bool(input_ids[0, -1] == start), 0
        while len(pieces) < max_pieces:
            mask = torch.ones_like(input_ids)
            if drawing:
                picture = self.generate_images(
                    input_ids,
                    mask,
                    pixel_values,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    generator=generator,
                    scheduler=scheduler,
                    latents=None if latents is None else latents[pictures],
                    step_noise=None if step_noise is None else step_noise[pictures],
                    document_starts=document_start,
                )[0]
                pieces.append(picture)
                pictures += 1
                as_bytes = (picture * 255).round().to(torch.uint8).cpu().numpy()
                processed = image_processor(images=[as_bytes], return_tensors="pt")["pixel_values"]
                processed = processed.to(input_ids.device)
                pixel_values = processed if pixel_values is None else torch.cat([pixel_values, processed])
                input_ids = torch.nn.functional.pad(input_ids, (0, config.num_image_tokens), value=slot)
                drawing = False
                continue
            images = {} if pixel_values is None else {"pixel_values": pixel_values}
            written = self.generate(
                input_ids=input_ids, attention_mask=mask, eos_token_id=[*eos, start], **images, **text_options
            )[0, input_ids.shape[1] :]
            ended = written[-1].item() in eos
            if ended:
                written = written[:-1]
            drawing = draw_every_turn or bool((written[-1:] == start).any())
            if drawing and not (written[-1:] == start).any():
                written = torch.nn.functional.pad(written, (0, 1), value=start)
            pieces.append(written)
            input_ids = torch.cat([input_ids, written[None]], dim=1)
            if ended and stop_at_eos:
                break
        return DeemInterleavedOutput(pieces=pieces, input_ids=input_ids, pixel_values=pixel_values)

    def append_start_of_image(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (B, T) -> (B, T + 1), each with a start-of-image token behind its last token unless it ends in one."""
        columns = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        end = (attention_mask.bool() * columns).max(1).values  # column behind the last token
        rows = torch.arange(len(input_ids), device=input_ids.device)
        ends_in_start = input_ids[rows, (end - 1).clamp(min=0)] == self.config.start_of_image_token_id
        if ends_in_start.all():
            return input_ids, attention_mask
        pad = self.config.pad_token_id or 0
        input_ids = torch.nn.functional.pad(input_ids, (0, 1), value=pad)
        attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=0)
        rows, end = rows[~ends_in_start], end[~ends_in_start]
        input_ids[rows, end] = self.config.start_of_image_token_id
        attention_mask[rows, end] = 1
        return input_ids, attention_mask

    @torch.no_grad()
    def reconstruct(
        self,
        pixel_values: torch.Tensor,
        region_masks: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        scheduler: SchedulerMixin | None = None,
    ) -> torch.Tensor:
        """What the encoder sees: redraws each image (N, 3, h, w) from its own tokens -> (N, 3, H, H) in [0, 1]."""
        decoder = self.require_image_decoder()
        images = self.get_image_features(pixel_values, region_masks)
        states = decoder.consistency_states(images.image_tokens, images.deepstack_features, region_masks)
        condition = decoder.condition_from_tokens(images.image_tokens)
        return decoder.sample(condition, states, num_inference_steps, guidance_scale, generator, latents, scheduler)

    def consistency_loss(
        self,
        pixel_values: torch.Tensor,
        target_pixel_values: torch.Tensor,
        region_masks: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **draws,
    ) -> torch.Tensor:
        """DEEM's feedback alone, for any training loop: a scalar whose gradient reaches the vision encoder.

        Args:
            pixel_values: (N, 3, h, w), encoder input; target_pixel_values: (N, 3, H, H) in [-1, 1], same pictures.
            draws: `noise` and `timesteps`, to repeat a computation.
        """
        decoder = self.require_image_decoder()
        images = self.get_image_features(pixel_values, region_masks)
        latents = decoder.encode(target_pixel_values, generator)
        return decoder.consistency_loss(
            latents, images.image_tokens, images.deepstack_features, region_masks, generator=generator, **draws
        )


__all__ = ["DeemGenerationMixin", "DeemInterleavedOutput"]
