# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The denoisers of diffusers, called in one way; into the UNet image features are fused (spec section 6).

Letters: G images to denoise, c channels of a latent.
"""

from typing import Any

import torch
from diffusers import (
    ModelMixin,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from .fusion_deem import DeemFeatureFusion
from .image_states_deem import DeemImageStates


class DeemUNet2DConditionModel(UNet2DConditionModel):
    """diffusers' UNet with one station more: between mid block and up path the skips pass through `fusion`."""

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        fusion: DeemFeatureFusion | None = None,
        image_states: DeemImageStates | None = None,
        condition_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """sample (G, C, s, s), timestep (G,), encoder_hidden_states (G, Q, width) -> prediction (G, C, s, s).

        Args:
            condition_mask: bool (G, Q), which of the encoder's hidden states count; None for all.
        """
        bias = None if condition_mask is None else (~condition_mask[:, None]).to(sample) * -10000.0  # as diffusers'

        def run(block: nn.Module, *args, **kwargs):
            if getattr(block, "has_cross_attention", False):
                kwargs["encoder_hidden_states"] = encoder_hidden_states
                kwargs["encoder_attention_mask"] = bias
            return block(*args, **kwargs)

        # 1. time
        temb = self.time_embedding(self.get_time_embed(sample, timestep))
        if self.time_embed_act is not None:
            temb = self.time_embed_act(temb)

        # 2. down
        sample = self.conv_in(sample)
        skips = (sample,)
        for block in self.down_blocks:
            sample, new_skips = run(block, hidden_states=sample, temb=temb)
            skips += new_skips

        # 3. mid
        sample = run(self.mid_block, sample, temb)

        # 4. fusion of image features
        if fusion is not None:
            sample, skips = fusion(sample, skips, image_states)

        # 5. up
        for block in self.up_blocks:
            count = len(block.resnets)
            skips, own = skips[:-count], skips[-count:]
            size = skips[-1].shape[2:] if skips else None
            sample = run(block, hidden_states=sample, temb=temb, res_hidden_states_tuple=own, upsample_size=size)

        # 6. post-process
        if self.conv_norm_out:
            sample = self.conv_act(self.conv_norm_out(sample))
        return self.conv_out(sample)


class DeemSD3Transformer2DModel(SD3Transformer2DModel):
    """Stable Diffusion 3: also wants one pooled vector (G, pooled_projection_dim)."""

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        return super().forward(sample, encoder_hidden_states, pooled, timestep).sample

    def unused_parts(self) -> list[nn.Module]:
        """What asks for the context that the last block does not give."""
        attention = self.transformer_blocks[-1].attn
        return [part for part in (attention.add_q_proj, attention.norm_added_q) if part is not None]


class DeemSanaTransformer2DModel(SanaTransformer2DModel):
    """Sana: counts time in its own unit."""

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        condition_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        time, mask = timestep * self.config.timestep_scale, {"encoder_attention_mask": condition_mask}
        return super().forward(sample, encoder_hidden_states, time, **mask).sample


class DeemPixArtTransformer2DModel(PixArtTransformer2DModel):
    """PixArt: large ones are told the image's size, and most predict a variance too, which DEEM leaves aside."""

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        condition_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        size, mask = {"resolution": None, "aspect_ratio": None}, {"encoder_attention_mask": condition_mask}
        if self.use_additional_conditions:  # pixels of the image; its VAE shrinks it eightfold
            height, width = (8 * side for side in sample.shape[-2:])
            size["resolution"] = sample.new_tensor([height, width]).repeat(len(sample), 1)
            size["aspect_ratio"] = sample.new_tensor([height / width]).repeat(len(sample), 1)
        prediction = super().forward(sample, encoder_hidden_states, timestep, added_cond_kwargs=size, **mask).sample
        return prediction[:, : sample.shape[1]]


CLASSES = {
    "PixArtTransformer2DModel": DeemPixArtTransformer2DModel,
    "SD3Transformer2DModel": DeemSD3Transformer2DModel,
    "SanaTransformer2DModel": DeemSanaTransformer2DModel,
    "UNet2DConditionModel": DeemUNet2DConditionModel,
}


def build_denoiser(config: dict[str, Any]) -> ModelMixin:
    """The denoiser of a diffusers config; its forward takes (sample, timestep, encoder_hidden_states, ...) and returns
    the prediction (G, C, s, s).

    Raises:
        ValueError: another class, or one that wants inputs which DEEM does not have.
    """
    name = config["_class_name"]
    if name not in CLASSES:
        raise ValueError(f"Denoisers of class {name!r} are not supported. Supported: {', '.join(CLASSES)}.")
    denoiser = CLASSES[name].from_config(config)
    wants = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type", "guidance_embeds")
    unsupported = {key: denoiser.config[key] for key in wants if denoiser.config.get(key)}
    if name == "UNet2DConditionModel" and (denoiser.config.center_input_sample or denoiser.mid_block is None):
        unsupported["centered samples, or no mid block"] = True
    if unsupported:
        raise ValueError(
            f"This {name} needs what DEEM does not give: {unsupported}. Use a denoiser conditioned on text tokens only, "
            "such as those of Stable Diffusion 1, 2 and 3, PixArt and Sana."
        )
    return denoiser
