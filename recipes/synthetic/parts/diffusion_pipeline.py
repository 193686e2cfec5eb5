# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The diffusion pipeline of the parts: a VAE, then a UNet trained with its text encoder."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from recipes.synthetic.parts.diffusion_modules import new_scheduler, new_unet, new_vae
from recipes.synthetic.parts.images import render, share_of_colors, to_pil, to_unit
from recipes.synthetic.parts.optimization import train
from recipes.synthetic.parts.texts import encode_captions, text_encoder
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import COLORS, HELD_OUT, KINDS, UNSEEN


def train_vae(images: Tensor, steps: int) -> tuple[AutoencoderKL, float]:
    """Train the VAE on uint8 images (N, 3, 64, 64); return it and its loss."""
    vae = new_vae()

    def loss_of() -> Tensor:
        batch = to_unit(images[torch.randint(len(images), (8,))]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        drawn = vae.decode(posterior.sample()).sample
        return F.mse_loss(drawn, batch) + 1e-6 * posterior.kl().mean()

    loss = train("vae", [vae], loss_of, steps, learning_rate=2e-3)
    return vae, loss


def in_batches(function: Callable[[Tensor], Tensor], values: Tensor, size: int = 100) -> Tensor:
    """Return the function's values, without gradients, computed `size` rows at a time."""
    with torch.no_grad():
        return torch.cat([function(batch) for batch in values.split(size)])


def train_denoiser(
    latents: Tensor, captions: Tensor, nothing: Tensor, reader: CLIPTextModel, unet: UNet2DConditionModel, steps: int
) -> tuple[DDPMScheduler, float]:
    """Train a UNet with its text encoder to predict noise; both end as the moving averages of their weights.

    Args:
        latents: scaled, (N, 4, 8, 8).
        captions: tokens of two captions per latent, (2, N, 32).
        nothing: tokens of the empty caption, (1, 32), which replaces one in ten.

    Returns:
        The noise schedule and the loss.
    """
    scheduler = new_scheduler()
    averages = [EMAModel(module.parameters(), decay=0.99) for module in (unet, reader)]

    def loss_of() -> Tensor:
        chosen = torch.randint(len(latents), (32,))
        target = latents[chosen]  # [32, 4, 8, 8]
        ids = captions[torch.randint(2, (32,)), chosen]  # [32, CAPTION_LENGTH]
        ids = torch.where(torch.rand(32, 1) < 0.1, nothing, ids)  # for classifier-free guidance
        noise, timesteps = torch.randn_like(target), torch.randint(1000, (32,))
        noisy = scheduler.add_noise(target, noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, reader(ids).last_hidden_state).sample, noise)

    def after_step() -> None:
        for average, module in zip(averages, (unet, reader), strict=True):
            average.step(module.parameters())

    loss = train("unet", [unet, reader], loss_of, steps, learning_rate=2e-3, after_step=after_step)
    for average, module in zip(averages, (unet, reader), strict=True):
        average.copy_to(module.parameters())
    return scheduler, loss


def train_diffusion(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    num_images: int,
    num_held_out: int,
    vae_steps: int,
    unet_steps: int,
) -> str:
    """Train a latent diffusion model with the schedule of Stable Diffusion 2.1, on 64-pixel images of the world.

    Args:
        folder: gets the pipeline.
        tokenizer: of the captions.
        num_held_out: images that the VAE's figures are measured on; at most 100 captions are drawn.

    Returns:
        The figures, in words.
    """
    scenes = [world.scene(index) for index in range(num_images)]
    images = render(scenes, "diffusion images")
    vae, vae_loss = train_vae(images, vae_steps)

    unseen = [world.scene(HELD_OUT + i) for i in range(num_held_out)]
    truth = to_unit(render(unseen, "diffusion held-out images"))
    redrawn = in_batches(lambda x: vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1), truth)
    psnr = -10 * ((redrawn - truth) / 2).square().mean((1, 2, 3)).log10().mean()
    kept = share_of_colors(to_pil(redrawn), [scene.main.color for scene in unseen])

    latents = in_batches(lambda x: vae.encode(to_unit(x)).latent_dist.mode(), images)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents = latents * vae.config.scaling_factor
    captions = torch.stack(
        [encode_captions(tokenizer, [scene.caption(detail) for scene in scenes]) for detail in ("medium", "full")]
    )  # [2, N, CAPTION_LENGTH]
    nothing = encode_captions(tokenizer, [""])
    reader = text_encoder(tokenizer, width=128, layers=2)
    unet = new_unet()
    scheduler, loss = train_denoiser(latents, captions, nothing, reader, unet, unet_steps)
    pipeline = StableDiffusionPipeline(
        vae, reader, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    names = [(kind, color) for kind in KINDS for color in COLORS if (kind, color) not in UNSEEN]
    names = [names[i % len(names)] for i in range(min(100, num_held_out))]
    drawn = draw(pipeline, [f"a {color} {kind}" for kind, color in names], seed=world.seed)
    right = share_of_colors(drawn, [color for _, color in names])
    return (
        f"VAE loss {vae_loss:.4f}, held-out PSNR {psnr:.1f} dB, main color kept in {kept:.1%}; UNet loss {loss:.3f}, "
        f"{len(names)} images drawn from captions like 'a red circle' have the right color in {right:.1%}"
    )


def draw(pipeline: StableDiffusionPipeline, captions: list[str], seed: int) -> list[Image.Image]:
    """Draw one image per caption: DDIM, 25 steps, guidance 3."""
    scheduler, pipeline.scheduler = pipeline.scheduler, DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(desc="drawing", leave=False)
    generator = torch.Generator().manual_seed(seed)
    try:
        return pipeline(captions, num_inference_steps=25, guidance_scale=3.0, generator=generator).images
    finally:
        pipeline.scheduler = scheduler
