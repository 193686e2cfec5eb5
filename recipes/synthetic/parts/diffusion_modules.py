# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The untrained pieces of the world's small latent diffusion model: a VAE with a linear start, a UNet, a schedule."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

SIZE = 64  # side of the images in pixels


@torch.no_grad()
def start_linear(vae: AutoencoderKL) -> None:
    """Set a fresh VAE to average its input over 8 x 8 pixels and to spread that out again, as a start.

    The first eight channels of every layer carry +x and -x of red, green, blue and a constant. SiLU(x) - SiLU(-x) = x, so
    these channels pass unchanged, and the residual branches begin at zero. With the constant in the same group, group norm
    keeps the image's contrast. From random weights the colors alone would take many times the steps of the default.
    """

    def carry(conv: nn.Conv2d) -> None:
        conv.weight[:8], conv.bias[:8] = 0, 0
        for channel in range(8):
            if conv.stride[0] == 2:
                conv.weight[channel, channel, :2, :2] = 0.25
            else:
                conv.weight[channel, channel, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1

    encoder, decoder = vae.encoder, vae.decoder
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                carry(module.conv_shortcut)
        elif isinstance(module, Downsample2D | Upsample2D):
            carry(module.conv)
    for conv in (encoder.conv_in, decoder.conv_in):
        conv.weight[:8], conv.bias[:8] = 0, 0
    for conv in (encoder.conv_out, decoder.conv_out):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    encoder.conv_in.bias[6], encoder.conv_in.bias[7] = 1, -1
    encoder.conv_out.bias[4:] = -6  # log variance of the latents
    for sign, first in ((1, 0), (-1, 1)):
        for channel in range(4):
            encoder.conv_out.weight[channel, 2 * channel + first, 1, 1] = sign
            decoder.conv_in.weight[2 * channel + first, channel, 1, 1] = sign
        for channel in range(3):
            encoder.conv_in.weight[2 * channel + first, channel, 1, 1] = sign
            decoder.conv_out.weight[channel, 2 * channel + first, 1, 1] = 0.6 * sign
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.out_channels)[:, :, None, None])
        nn.init.zeros_(conv.bias)


def new_vae() -> AutoencoderKL:
    """Return a VAE at its linear start: images (N, 3, 64, 64) to latents (N, 4, 8, 8) and back."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 16, 32, 64],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=SIZE,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)
    start_linear(vae)
    return vae


def new_unet() -> UNet2DConditionModel:
    """Return a UNet of 4.8 million parameters for latents (N, 4, 8, 8), conditioned on tokens of width 128."""
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        block_out_channels=[64, 96, 128],
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=8,
        use_linear_projection=True,
    ).to(memory_format=torch.channels_last)


def new_scheduler() -> DDPMScheduler:
    """Return the noise schedule of Stable Diffusion 2.1."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="leading",
        variance_type="fixed_small",
    )
