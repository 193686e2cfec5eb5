# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""DEEM: a language model that reads and draws images, and whose image encoder is corrected by its own drawings.

Letters: B sequences, T tokens, N images of the batch, n images per sequence at most, Q image tokens per image, P
perceiver width, E feature width, D language width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from .adapting_deem import AdaptMixin
from .attention_deem import DeemImageAttention, norm_eps
from .base_deem import DeemPreTrainedModel
from .checks_deem import MADE_BY_PROCESSOR, check_inputs, check_targets
from .composing_deem import ComposeMixin
from .configuration_deem import DeemConfig
from .generation_deem import DeemGenerationMixin
from .image_decoder_deem import DeemImageDecoder
from .image_error_deem import ImageErrorMixin
from .image_states_deem import (
    DeemImageStates,
    ImagePlaces,
    check_images_are_given,
    flatten_features,
    gather_contexts,
    locate_images,
    no_features,
    normalize_features,
    previous_features,
)
from .losses_deem import text_loss, weighted_sum
from .perceiver_deem import DeemPerceiver
from .text_deem import build_language_model, embedding_name
from .vision_deem import DeemVisionTower


@dataclass
class DeemImageOutput(ModelOutput):
    """
    Attributes:
        pooler_output: (N, Q, D), image tokens at language width; what fills the placeholders.
        image_features: the pyramid, maps (N, E, side, side) with positions, fine to coarse.
        image_tokens: (N, Q, P), image tokens as the perceiver gave them; what the consistency loss conditions on.
        last_hidden_state, hidden_states, attentions: the vision encoder's own.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    image_features: tuple[torch.Tensor, ...] | None = None
    image_tokens: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DeemModelOutput(BaseModelOutputWithPast):
    """
    Attributes:
        image_output: what `get_image_features` gave, if there were images.
        image_states: with `use_cache=True` or behind a cache, which tokens see which images; whoever goes on behind the
            cache gives it again.
    """

    image_hidden_states: torch.Tensor | None = None
    image_output: DeemImageOutput | None = None
    image_states: DeemImageStates | None = None


@dataclass
class DeemOutput(CausalLMOutputWithPast):
    """
    Attributes:
        loss: the weighted sum of the three losses that were computed, see `weighted_sum`.
        text_loss, image_loss, consistency_loss: scalars; None where not asked for or of weight 0.
        logits: (B, T, V).
        image_hidden_states: (N, Q, D).
        image_states: see `DeemModelOutput`.
    """

    text_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None
    consistency_loss: torch.Tensor | None = None
    image_hidden_states: torch.Tensor | None = None
    image_states: DeemImageStates | None = None


class DeemModel(DeemPreTrainedModel):
    """Images and text -> hidden states: vision tower, perceiver, and language model with image attention."""

    def __init__(self, config: DeemConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.vision_tower = DeemVisionTower(config)
        self.perceiver = DeemPerceiver(config.perceiver_config)
        self.projector = nn.Linear(config.perceiver_config.hidden_size, hidden_size)
        self.projector._init_std = 1e-3
        layers = range(0, config.text_config.num_hidden_layers, config.image_attention_interval)
        image_attention = nn.ModuleDict({str(idx): DeemImageAttention(config, idx) for idx in layers})
        self.language_model = build_language_model(config.text_config, image_attention)
        self.image_attention = image_attention
        self.start_of_image = nn.Parameter(torch.zeros(1, hidden_size))
        self.post_init()
        self.freeze_fixed_parts()

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor | None, region_masks: torch.Tensor | None = None, **kwargs
    ) -> DeemImageOutput | None:
        """The only door from pixels: (N, 3, h, w) [and masks (N, 1, h, w)] -> image tokens and feature pyramid.

        Without pixels (None) there is nothing to return: None.
        """
        if pixel_values is None:
            return None
        if region_masks is not None and region_masks.shape[-2:] != pixel_values.shape[-2:]:
            raise ValueError(
                f"region_masks are {tuple(region_masks.shape[-2:])}, pixel_values {tuple(pixel_values.shape[-2:])}. "
                "Give both to the processor, which brings them to one size."
            )
        if region_masks is not None and len(region_masks) != len(pixel_values):
            raise ValueError(
                f"{len(region_masks)} region masks for {len(pixel_values)} images. Give one per image, ones for a whole "
                "image."
            )
        vision = self.vision_tower(pixel_values.to(self.dtype), region_masks, **kwargs)
        image_tokens = self.perceiver(vision.grid_tokens)  # [N, Q, P]
        return DeemImageOutput(
            last_hidden_state=vision.last_hidden_state,
            pooler_output=self.projector(image_tokens),  # [N, Q, D]
            image_features=vision.image_features,
            image_tokens=image_tokens,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )

    def find_token(
        self, token_id: int | None, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """bool (B, T), where a special token stands; in embeddings it is recognized by its row of the table."""
        if token_id is None:
            return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        if input_ids is not None:
            return input_ids == token_id
        row = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
        return (inputs_embeds == row).all(-1)

    def get_placeholder_mask(self, is_image: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """bool (B, T, 1) over the image tokens, after checking that there are as many as features (N, Q, D)."""
        per_image = self.config.num_image_tokens
        count, size = (0, per_image) if image_features is None else image_features.shape[:2]
        if size != per_image:
            raise ValueError(
                f"The image features have {size} tokens per image instead of {per_image}. Give whole images (a prompt "
                "with images is not read in pieces: leave out prefill_chunk_size)."
            )
        if (tokens := int(is_image.sum())) != count * size:
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {tokens}, features: {count * size} ({count} "
                f"images of {per_image} tokens). Write one image placeholder per image and let the processor expand it; "
                "do not truncate through an image."
            )
        return is_image[..., None]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        region_masks: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, DeemImageOutput] | None = None,
        image_states: DeemImageStates | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> DeemModelOutput:
        r"""
        Args:
            pixel_values: (N, 3, h, w), in the order of their tokens in the batch.
            region_masks: (N, 1, h, w) in {0, 1}; None for whole images.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, instead of pixel_values.
            image_states: behind a cache, those of the forward that filled it; with images among the new tokens, those
                of the whole sequence (`get_image_states` of all its images and tokens).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        text = dict(inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=past_key_values)
        check_inputs(input_ids=input_ids, pixel_values=pixel_values, region_masks=region_masks, **text)
        if pixel_values is not None and mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            raise ValueError("Give pixel_values or mm_encoder_outputs['image'], not both.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # [B, T, D]
        is_image = self.find_token(self.config.image_token_id, input_ids, inputs_embeds)
        is_start = self.find_token(self.config.start_of_image_token_id, input_ids, inputs_embeds)

        # Pixels -> image tokens -> their places in the text.
        images = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            images = self.get_image_features(pixel_values, region_masks, return_dict=True)
        read = 0 if past_key_values is None else past_key_values.get_seq_length()
        if not torch.compiler.is_compiling():
            check_images_are_given(images, image_states, is_image, read)
        if images is not None:
            tokens = images.pooler_output.to(inputs_embeds)  # [N, Q, D]
            inputs_embeds = inputs_embeds.masked_scatter(self.get_placeholder_mask(is_image, tokens), tokens)
        inputs_embeds = torch.where(is_start[..., None], inputs_embeds + self.start_of_image, inputs_embeds)

        # Text: every k-th layer also looks into the pyramids of the images seen so far.
        start = 0 if image_states is None else read
        if image_states is None:
            is_bos = self.find_token(self.config.bos_token_id, input_ids, inputs_embeds)
            image_states = self.get_image_states(images, is_image, is_bos)
        keep = past_key_values is not None and not self.training
        text = dict(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids)
        cached = dict(past_key_values=past_key_values, use_cache=use_cache)
        states = image_states.of_tokens(start, inputs_embeds.shape[1], keep)
        outputs = self.language_model(**text, **cached, image_states=states, return_dict=True, **kwargs)
        seen = dict(image_output=images, image_hidden_states=None if images is None else images.pooler_output)
        gone_on = use_cache or past_key_values is not None
        return DeemModelOutput(**outputs, **seen, image_states=image_states if gone_on else None)

    def get_image_states(
        self, images: DeemImageOutput | None, is_image: torch.Tensor, is_bos: torch.Tensor
    ) -> DeemImageStates:
        """Return the attended pyramid levels of all images of a sequence, and which of its tokens sees which image.

        Args:
            is_image, is_bos: bool (B, T), where image tokens and document starts stand, see `find_token`.
        """
        if images is None:
            like = torch.zeros(self.config.feature_size, dtype=self.dtype, device=is_image.device)
            states = no_features(*is_image.shape, like=like)
        else:
            levels = [images.image_features[level] for level in self.config.image_attention_levels]
            index, visible = locate_images(is_image, is_bos, self.config.num_image_tokens)
            sides = [tuple(level.shape[-2:]) for level in levels]
            features = normalize_features(flatten_features(levels), norm_eps(self.config.text_config))
            states = DeemImageStates(features=features, sides=sides, visible=visible, index=index)
        states.kept_values, states.kept_tables = {}, {}
        return states


class DeemForConditionalGeneration(
    AdaptMixin, ImageErrorMixin, ComposeMixin, DeemGenerationMixin, DeemPreTrainedModel, GenerationMixin
):
    """The whole model: hidden states -> text through `lm_head`, -> images through `image_decoder`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _keep_in_fp32_modules_strict = ["vae"]
    output_modalities = ("text", "image")
    accepts_loss_kwargs = True

    def __init__(self, config: DeemConfig):
        super().__init__(config)
        self.model = DeemModel(config)
        text_config = config.text_config
        embedding = f"model.language_model.{embedding_name(self.model.language_model)}.weight"
        self._tied_weights_keys = {"lm_head.weight": embedding}
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        self.image_decoder = None
        if config.image_decoder_config is not None:
            self.image_decoder = DeemImageDecoder._from_config(config.image_decoder_config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, region_masks: torch.Tensor | None = None, **kwargs):
        return self.model.get_image_features(pixel_values, region_masks, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        target_pixel_values: torch.Tensor | None = None,
        target_latents: torch.Tensor | None = None,
        region_masks: torch.Tensor | None = None,
        document_starts: torch.LongTensor | None = None,
        image_loss_mask: torch.Tensor | None = None,
        text_loss_weight: float | None = None,
        image_loss_weight: float | None = None,
        consistency_loss_weight: float | None = None,
        consistency_draws: dict[str, torch.Tensor] | None = None,
        image_draws: dict[str, torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        mm_encoder_outputs: dict[str, DeemImageOutput] | None = None,
        image_states: DeemImageStates | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> DeemOutput:
        r"""
        Args:
            labels: (B, T), unshifted, -100 where nothing is to be learned; without it no text loss.
            target_pixel_values: (N, 3, H, H) in [-1, 1], the images to redraw and to draw; without it no diffusion
                loss.
            target_latents: the same images already encoded, (N, 4, s, s), or what they are sampled from, (N, 8, s, s)
                of `DeemImageDecoder.encode_posterior`.
            document_starts: int64 (N,), column where each image's document starts; found from bos tokens otherwise.
            image_loss_mask: bool (N,), images whose drawing is supervised.
            text_loss_weight, image_loss_weight, consistency_loss_weight: override the config's; a loss of weight 0 is
                not computed.
            consistency_draws, image_draws: random draws of the two diffusion losses (`latents`, `noise`, `timesteps`,
                for the image loss also `drop_condition`), to repeat a computation.
            num_items_in_batch: text targets of the whole optimizer step.
            shift_labels (in kwargs): (B, T), targets already aligned with the logits, instead of `labels`' own shift.
        """
        # 1. Pixels -> image tokens -> their places in the text -> hidden states.
        shift_labels = kwargs.pop("shift_labels", None)  # in the signature, Trainer would take it for a label
        text = dict(attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds)
        seen = dict(pixel_values=pixel_values, region_masks=region_masks, mm_encoder_outputs=mm_encoder_outputs)
        cached = dict(past_key_values=past_key_values, image_states=image_states)
        targets = dict(labels=labels, target_pixel_values=target_pixel_values, target_latents=target_latents)
        check_inputs(input_ids=input_ids, inputs_embeds=inputs_embeds, **targets)
        outputs = self.model(input_ids, **text, **seen, **cached, return_dict=True, **kwargs)
        hidden_states, images = outputs.last_hidden_state, outputs.image_output  # [B, T, D]
        weights = self.loss_weights(text_loss_weight, image_loss_weight, consistency_loss_weight)
        losses = dict.fromkeys(weights)

        # 2. Hidden states -> text.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept, :])  # [B, T, V]
        if labels is not None and weights["text_loss"]:
            losses["text_loss"] = text_loss(logits, labels, num_items_in_batch, shift_labels)

        # 3. Target images -> latents, once for both diffusion losses.
        latents = self.get_target_latents(target_pixel_values, target_latents, images, weights, generator)

        # 4. Consistency: redraw each image from its own tokens; the gradient corrects the encoder.
        if latents is not None and weights["consistency_loss"]:
            given = {"latents": latents, "generator": generator, **(consistency_draws or {})}
            tokens, features = images.image_tokens, images.image_features
            losses["consistency_loss"] = self.image_decoder.consistency_loss(
                image_tokens=tokens, image_features=features, region_masks=region_masks, **given
            )

        # 5. Hidden states before each image -> that image.
        if latents is not None and weights["image_loss"]:
            given = {"latents": latents, "generator": generator, **(image_draws or {})}
            context = self.get_image_context(hidden_states, input_ids, attention_mask, images, document_starts)
            losses["image_loss"] = self.image_decoder.image_loss(*context, image_loss_mask=image_loss_mask, **given)

        # 6. The weighted sum of what was computed.
        return DeemOutput(
            loss=weighted_sum(losses, weights, labels, num_items_in_batch, shift_labels),
            **losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_states=outputs.image_states,
        )

    def loss_weights(
        self, text: float | None = None, image: float | None = None, consistency: float | None = None
    ) -> dict[str, float]:
        """Weight of each loss by name: the config's unless overridden. A loss of weight 0 is not computed."""
        given = {"text_loss": text, "image_loss": image, "consistency_loss": consistency}
        return {
            name: getattr(self.config, f"{name}_weight") if weight is None else float(weight)
            for name, weight in given.items()
        }

    def get_target_latents(
        self,
        target_pixel_values: torch.Tensor | None,
        target_latents: torch.Tensor | None,
        images: DeemImageOutput | None,
        weights: dict[str, float],
        generator: torch.Generator | None = None,
    ) -> torch.Tensor | None:
        """Latents (N, 4, s, s) of the images to redraw; None where no diffusion loss is asked for."""
        targets = target_latents if target_latents is not None else target_pixel_values
        if targets is None or not (weights["consistency_loss"] or weights["image_loss"]):
            return None
        if self.image_decoder is None:
            raise ValueError(
                "Target images were given, but this model has no image decoder (image_decoder_config is None). "
                "Leave out target_pixel_values, or use a model composed with a diffusion part."
            )
        count = 0 if images is None else len(images.image_tokens)
        if len(targets) != count:
            raise ValueError(
                f"{len(targets)} target images for {count} images: there must be one target per image, in the "
                "same order. Let the collator make both."
            )
        make = self.image_decoder.encode if target_latents is None else self.image_decoder.sample_latents
        return make(targets, generator)

    def get_image_context(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        images: DeemImageOutput | None,
        document_starts: torch.Tensor | None = None,
        last_only: bool = False,
        target_images: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, DeemImageStates]:
        """Return what each image is drawn from: its context in the text, and the images before it.

        Args:
            hidden_states: (B, T, D), after the language model's last norm.
            document_starts: int64, one column per drawn image; the latest bos before it otherwise.
            last_only: draw at the last start-of-image token of each row (generation) instead of at every image.
            target_images: int64 (G,), draw these of the given images only, numbered in the order of the batch.

        Returns:
            contexts (G, L, D), their bool mask (G, L), and the previous images' features.

        Raises:
            ValueError: no input_ids, or another number of images than the text holds.
        """
        config = self.config
        if input_ids is None:
            raise ValueError("Drawing needs input_ids: images are found by their start-of-image tokens.")
        given = ImagePlaces.of_images(input_ids, config)
        count = 0 if images is None else len(images.image_tokens)
        if len(given.rows) != count:
            raise ValueError(
                f"{count} images, but {len(given.rows)} start-of-image tokens followed by image tokens. Each image is "
                f"written as one start-of-image token (id {config.start_of_image_token_id}) and "
                f"{config.num_image_tokens} image tokens (id {config.image_token_id}); the processor does so."
            )
        rows, columns = given.rows, given.columns
        if last_only:
            is_start = input_ids == config.start_of_image_token_id
            rows = torch.arange(len(input_ids), device=input_ids.device)
            columns = (is_start * torch.arange(is_start.shape[1], device=rows.device)).max(1).values
        elif target_images is not None:
            rows, columns = rows[target_images], columns[target_images]
        drawn = ImagePlaces.of(input_ids, rows, columns, document_starts, config)
        contexts, mask = gather_contexts(hidden_states, attention_mask, drawn)
        if count == 0:
            return contexts, mask, self.image_decoder.no_features(len(drawn.rows))
        previous = config.image_decoder_config.num_previous_images
        return contexts, mask, previous_features(images.image_features, given, drawn, previous)

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
            pixel_values: (N, 3, h, w), encoder input; target_pixel_values: (N, 3, H, H) in [-1, 1], the same images. A
                processor makes both: `processor.image_processor(images, return_targets=True)`.
            draws: `noise` and `timesteps`, to repeat a computation.

        Raises:
            ValueError: targets that are the encoder's input, or outside [-1, 1], or of another number than images.
        """
        decoder = self.require_image_decoder()
        check_targets(target_pixel_values, MADE_BY_PROCESSOR, pixel_values)
        images = self.get_image_features(pixel_values, region_masks, return_dict=True)
        latents = decoder.encode(target_pixel_values, generator)
        return decoder.consistency_loss(
            latents, images.image_tokens, images.image_features, region_masks, generator=generator, **draws
        )


__all__ = ["DeemForConditionalGeneration", "DeemImageOutput", "DeemModel", "DeemModelOutput", "DeemOutput"]
