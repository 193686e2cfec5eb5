# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Drawing: what `DeemForConditionalGeneration` does besides writing text (spec section 10).

Letters: B sequences, T tokens, N images given, D language width, H picture side.
"""

import torch
from diffusers import SchedulerMixin
from transformers import Cache

from .attention_deem import DeemImageStates, leave_with_cache
from .image_decoder_deem import DeemImageDecoder, gather_contexts, previous_features
from .interleaving_deem import InterleavingMixin
from .text_deem import last_document_start


def padding_first(mask: torch.Tensor, cache: Cache | None = None) -> torch.Tensor | None:
    """Order of the columns (B, T) that puts the padding of each row in front of its tokens; None where it is there.

    Behind a cache the tokens read already keep the order in which they were read (`column_order`, which `generate` leaves
    with a cache), and only the new ones are ordered.

    Args:
        mask: (B, T), 0 at padding.

    Raises:
        ValueError: the cache was cut through a padded prompt.
    """
    read = 0 if cache is None else min(int(cache.get_seq_length()), mask.shape[1])
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    order = columns[:, :read]
    if (before := getattr(cache, "column_order", None)) is not None and read:
        if len(mask) % len(before):
            raise ValueError(
                f"{len(mask)} sequences behind a cache of {len(before)}. Give one per sequence in the cache."
            )
        before = before.to(mask.device).repeat_interleave(len(mask) // len(before), dim=0)[:, :read]
        if bool((before >= read).any()):
            raise ValueError(
                f"The cache holds the first {read} tokens of a prompt that was padded on the right, its padding among them. "
                "Pad on the left to cut a cache within a prompt."
            )
        order = torch.cat([before, order[:, before.shape[1] :]], dim=1)
    new = mask[:, read:].long().argsort(dim=1, stable=True) + read
    order = torch.cat([order, new], dim=1)
    return None if torch.equal(order, columns) else order


class DeemGenerationMixin(InterleavingMixin):
    """`generate_images`, `reconstruct`, `consistency_loss`, and the image states on their way through `generate`."""

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """As in transformers, with padding on either side.

        Rows padded on the right are read as if padded on the left; in the sequences returned the prompt stands as given.
        Behind the cache of an earlier call or forward (`past_key_values`) the images read there need not be given again:
        give none, or only those of the new tokens.

        Raises:
            ValueError: image tokens in the prompt, but no images (checked where there is no cache); `prefill_chunk_size`
                with images; padding on the right behind a cache that cannot be followed.
        """
        if (tokenizer := kwargs.get("tokenizer")) is not None:  # `transformers serve` gives the processor
            kwargs["tokenizer"] = getattr(tokenizer, "tokenizer", tokenizer)
        mask, prompt = kwargs.get("attention_mask"), kwargs.get("input_ids") if inputs is None else inputs
        if kwargs.get("prefill_chunk_size") and kwargs.get("pixel_values") is not None:
            raise ValueError("A prompt with images is not read in pieces: leave out prefill_chunk_size.")
        sources = ("pixel_values", "mm_encoder_outputs", "image_states", "past_key_values", "inputs_embeds")
        if prompt is not None and all(kwargs.get(name) is None for name in sources):
            self.model.get_placeholder_mask(
                prompt == self.config.image_token_id, self.lm_head.weight.new_zeros(0, 1, 1)
            )
        cache = kwargs.get("past_key_values")
        if cache is not None and not int(cache.get_seq_length()):
            cache.column_order = None  # of what it held before it was emptied
        order = None if mask is None or mask.dim() != 2 else padding_first(mask, cache)
        if order is None:
            return super().generate(inputs, *args, **kwargs)
        rows = torch.arange(len(mask), device=mask.device)[:, None]
        if prompt is not None and prompt.shape != mask.shape:
            raise ValueError(
                f"The attention mask is {tuple(mask.shape)}, the ids {tuple(prompt.shape)}, and the padding is on the right: "
                "give all ids of the sequence, or pad on the left."
            )
        for name in ("input_ids", "inputs_embeds", "position_ids", "attention_mask"):
            if (given := kwargs.get(name)) is not None and given.shape[1] == mask.shape[1]:
                kwargs[name] = given[rows, order]
        outputs = super().generate(inputs if inputs is None else inputs[rows, order], *args, **kwargs)
        if prompt is not None:
            sequences = outputs if torch.is_tensor(outputs) else outputs.sequences
            sequences[:, : prompt.shape[1]] = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0)
        for filled in (cache, getattr(outputs, "past_key_values", None)):
            if filled is not None:
                filled.column_order = order
        return outputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict, **kwargs) -> dict:
        # transformers drops images after the prompt; the image attention needs them at every step.
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if model_kwargs.get("image_states") is None:
            model_kwargs["image_states"] = outputs.image_states
            leave_with_cache(outputs.past_key_values, outputs.image_states)
        return model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, *args, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> dict:
        """As in transformers, and what the tokens to read see of the images, where the forward cannot tell.

        A bos that the model writes begins no document: what it writes sees what the end of the prompt saw, with and
        without a cache (as released).
        """
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        cache, states = inputs.get("past_key_values"), inputs.get("image_states")
        cached = cache is not None and cache.get_seq_length() > 0
        if cache is not None and not cached and kwargs.get("mm_encoder_outputs"):
            # transformers takes the first step of an assistant model for a later one, without images.
            inputs["mm_encoder_outputs"] = kwargs["mm_encoder_outputs"]
        images = (inputs.get("mm_encoder_outputs") or {}).get("image")
        if images is None or inputs.get("input_ids") is None or (states is None and not cached):
            return inputs
        if states is None and getattr(cache, "image_states", None) is not None:
            given = len(images.pooler_output) * self.config.num_image_tokens
            new, every = ((ids == self.config.image_token_id).sum() for ids in (inputs["input_ids"], input_ids))
            if given == new < every:
                return inputs  # images of the new tokens only; those before are with the cache
        # All tokens anew (no cache), or the first ones behind a cache that an earlier call has left.
        prompt = input_ids.shape[1] if states is None else states.prompt_length
        new = inputs["input_ids"].shape[1]
        return {**inputs, **self._continue_with_images(input_ids, images, prompt, new)}

    def _continue_with_images(self, input_ids: torch.LongTensor, images, prompt_length: int, new: int) -> dict:
        """Images and their states for the last `new` of the tokens (B, T), of which the first are the prompt."""
        is_image, is_bos = input_ids == self.config.image_token_id, input_ids == self.config.bos_token_id
        is_bos[:, prompt_length:] = False
        states = self.model.get_image_states(images, is_image, is_bos)
        states.prompt_length = prompt_length
        first = is_image & (is_image.cumsum(1) % self.config.num_image_tokens == 1 % self.config.num_image_tokens)
        is_new = first.nonzero()[:, 1] >= input_ids.shape[1] - new
        if not is_new.any():
            states.visible = states.visible[:, :-new]
            return {"image_states": states, "mm_encoder_outputs": {}}
        states.visible = states.visible[:, -new:]
        images = images if is_new.all() else type(images)(pooler_output=images.pooler_output[is_new])
        return {"image_states": states, "mm_encoder_outputs": {"image": images}}

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
        images = self.get_image_features(pixel_values, region_masks, return_dict=True)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            mm_encoder_outputs={"image": images},
            use_cache=False,
            return_dict=True,
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
        images = self.get_image_features(pixel_values, region_masks, return_dict=True)
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
        images = self.get_image_features(pixel_values, region_masks, return_dict=True)
        latents = decoder.encode(target_pixel_values, generator)
        return decoder.consistency_loss(
            latents, images.image_tokens, images.deepstack_features, region_masks, generator=generator, **draws
        )


__all__ = ["DeemGenerationMixin"]
