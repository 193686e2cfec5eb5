# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Drawing: what `DeemForConditionalGeneration` does besides writing text (spec section 10).

Letters: B sequences, T tokens, N images given, D language width, H image side.
"""

import torch
from diffusers import SchedulerMixin

from .image_decoder_deem import DeemImageDecoder, StepCallback
from .image_states_deem import first_image_tokens
from .interleaving_deem import InterleavingMixin


class DeemGenerationMixin(InterleavingMixin):
    """`generate_images`, `reconstruct`, and the image states on their way through `generate`."""

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """As in transformers. Behind a cache of an earlier call (`past_key_values`) give the whole sequence and all its
        images again, or the `image_states` of the output that came with the cache.

        Raises:
            ValueError: image tokens in the prompt, but no images; padding on the right.
        """
        if (tokenizer := kwargs.get("tokenizer")) is not None:  # `transformers serve` gives the processor
            kwargs["tokenizer"] = getattr(tokenizer, "tokenizer", tokenizer)
        return super().generate(inputs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ) -> tuple[torch.LongTensor, dict]:
        # As in transformers, and from here on `image_states` says which token of the prompt sees which image. The
        # images are encoded already, and nothing has been written or proposed yet.
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        if mask is not None and mask.dim() == 2 and not mask[:, -1].all():
            raise ValueError(
                "Some rows are padded on the right: pad on the left, so that every row is continued at its end "
                '(processor.tokenizer.padding_side = "left", the default of a DeemProcessor).'
            )
        states = model_kwargs.get("image_states")
        if states is None:
            images = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
            is_image, is_bos = self._find_in_prompt(input_ids, embeds)
            self.model.get_placeholder_mask(is_image, None if images is None else images.pooler_output)
            states = self.model.get_image_states(images, is_image, is_bos)
        model_kwargs["image_states"] = states if expand_size == 1 else states.repeat(expand_size)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _find_in_prompt(self, input_ids: torch.Tensor | None, embeds: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Where image tokens and bos stand, bool (B, T) each, in the ids or else in the embeddings of a prompt."""
        ids = None if input_ids is None or not input_ids.numel() else input_ids
        kinds = (self.config.image_token_id, self.config.bos_token_id)
        return tuple(self.model.find_token(kind, ids, ids if embeds is None else embeds) for kind in kinds)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, *args, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> dict:
        """As in transformers; behind a cache with the images of the new tokens only."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        images, cache = (kwargs.get("mm_encoder_outputs") or {}).get("image"), inputs.get("past_key_values")
        read = 0 if cache is None else cache.get_seq_length()
        if images is None or (read and "mm_encoder_outputs" not in inputs):
            return inputs
        # transformers takes the first step of an assistant model for a later one and leaves its images out.
        inputs["mm_encoder_outputs"] = {"image": images}
        if read:
            is_image, _ = self._find_in_prompt(input_ids, inputs_embeds)
            is_new = first_image_tokens(is_image, self.config.num_image_tokens)[1] >= read
            images = type(images)(pooler_output=images.pooler_output[is_new]) if is_new.any() else None
            inputs["mm_encoder_outputs"] = {"image": images}
        return inputs

    def require_image_decoder(self) -> DeemImageDecoder:
        if self.image_decoder is None:
            raise ValueError(
                "This model has no image decoder (image_decoder_config is None) and cannot draw. Compose one with "
                "DeemForConditionalGeneration.from_vision_text_diffusion_pretrained(vision, text, diffusion)."
            )
        return self.image_decoder

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
        target_images: torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> torch.Tensor:
        """Draws one image per row, from what the row has said and shown so far.

        A start-of-image token is appended to rows that do not end in one; padding may be on either side. With
        `target_images` the images to draw stand in the text already (as any image of that size) and are drawn anew
        from what comes before each of them.

        Args:
            input_ids: (B, T), images as the processor writes them.
            pixel_values: (N, 3, h, w), images in the text.
            num_inference_steps, guidance_scale: the config's by default (250, 3.5).
            generator: one, or a list of one per row.
            latents: initial noise (B, 4, s, s), or one per target image.
            scheduler: any diffusers scheduler built from the model's scheduler config.
            target_images: int64 (G,), numbers of the images in the text to draw instead, in the order of the batch.
            document_starts: int64, the column from which each image's context counts; the latest bos otherwise.
            callback_on_step_end: as in `DeemImageDecoder.sample`.

        Returns:
            (B, 3, H, H) in [0, 1], or (G, 3, H, H).
        """
        decoder = self.require_image_decoder()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if target_images is None:
            input_ids, attention_mask = self.append_start_of_image(input_ids, attention_mask)
        images = self.get_image_features(pixel_values, region_masks, return_dict=True)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            mm_encoder_outputs={"image": images},
            use_cache=False,
            return_dict=True,
        )
        text, last_only = (outputs.last_hidden_state, input_ids, attention_mask), target_images is None
        contexts, mask, states = self.get_image_context(*text, images, document_starts, last_only, target_images)
        condition = decoder.condition_from_context(contexts, mask)
        sampling = (num_inference_steps, guidance_scale, generator, latents, scheduler, callback_on_step_end)
        return decoder.sample(condition, states, *sampling)

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
        callback_on_step_end: StepCallback | None = None,
    ) -> torch.Tensor:
        """What the encoder sees: redraws each image (N, 3, h, w) from its own tokens -> (N, 3, H, H) in [0, 1]."""
        decoder = self.require_image_decoder()
        images = self.get_image_features(pixel_values, region_masks, return_dict=True)
        states = decoder.consistency_states(images.image_tokens, images.image_features, region_masks)
        condition = decoder.condition_from_tokens(images.image_tokens)
        sampling = (num_inference_steps, guidance_scale, generator, latents, scheduler, callback_on_step_end)
        return decoder.sample(condition, states, *sampling)
