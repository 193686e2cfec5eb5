# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Training of an arm, and of the language side behind it; what arms add to the text loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, TrainingArguments, set_seed

from modeling_deem import DeemForConditionalGeneration, DeemPerceiverConfig, DeemTrainer
from modeling_deem.feedback_losses_deem import choose_others, contrastive_losses
from modeling_deem.modeling_deem import DeemImageOutput
from modeling_deem.perceiver_deem import DeemPerceiver
from modeling_deem.scheduling_deem import add_noise
from processing import DeemDataCollator, DeemProcessor
from recipes.study.settings import Arm, EvidenceArguments

PATCH, OTHERS, ALIGNED_MAP = 8, 3, -2  # pixels; images contrasted with; of the other encoder's maps
NOISE = 0.01  # of the largest variance of image tokens
HEAD = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
HEAD |= {"cross_attention_frequency": 1, "qk_norm": False, "initializer_range": 0.06}


class ArmCollator(DeemDataCollator):
    """Adds to each batch what its images' latents are sampled from; samples have the number of their row as `id`.

    Args:
        latents: (N, 8, s, s).
        exchanged: give each image those of the image before it in the batch.
    """

    def __init__(self, processor: DeemProcessor, latents: Tensor, exchanged: bool) -> None:
        super().__init__(processor, return_targets=False)
        self.latents, self.exchanged = latents, exchanged

    def __call__(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Samples -> batch."""
        rows = self.latents[[int(sample["id"]) for sample in samples]]
        return super().__call__(samples) | {"target_latents": rows.roll(1, 0) if self.exchanged else rows}


class TokenHead(nn.Module):
    """Reads image tokens (N, Q, P) into a square of cells, (N, cells, width); 4.3 million parameters (the UNet has 4.8)."""

    def __init__(self, token_size: int, cells: int, width: int) -> None:
        super().__init__()
        config = DeemPerceiverConfig(num_queries=cells, encoder_hidden_size=token_size, **HEAD)
        self.reader, self.output = DeemPerceiver(config), nn.Linear(config.hidden_size, width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=HEAD["initializer_range"])
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.reader.queries, std=HEAD["initializer_range"])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.reader(tokens))


class ArmTrainer(DeemTrainer):
    """Adds an arm's own objective to the losses of the model.

    Args:
        arm: which objective.
        weight: of it.
        teacher: folder of the encoder that "align" aligns to.
    """

    def __init__(self, *args: Any, arm: Arm, weight: float, teacher: Path, **kwargs: Any) -> None:
        model: DeemForConditionalGeneration = kwargs["model"]
        self.arm, self.weight, self.teacher = arm, weight, None
        width = model.config.perceiver_config.hidden_size
        if arm.objective == "pixels":
            side = model.image_decoder.config.target_size // PATCH
            model.add_module("study_head", TokenHead(width, side**2, 3 * PATCH**2))
        elif arm.objective == "align":
            self.teacher = AutoModel.from_pretrained(teacher).eval().requires_grad_(False).to(model.device)
            side = model.image_decoder.config.target_size // 16
            model.add_module("study_head", TokenHead(width, side**2, self.teacher.config.hidden_sizes[ALIGNED_MAP]))
        encoder = model.model.vision_tower.encoder
        self.began = [value.detach().clone() for value in encoder.parameters()] if arm.anchored else []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The model's losses, and the arm's own times its weight."""
        plain: DeemForConditionalGeneration = self.accelerator.unwrap_model(model)
        if self.arm.objective in ("none", "denoise"):
            total = super().compute_loss(model, inputs, *args, **kwargs)
            return total + self.weight * self.distance(plain) if self.arm.anchored else total
        pixels = inputs["pixel_values"]
        images = plain.get_image_features(pixels, return_dict=True)
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        total = super().compute_loss(model, rest | {"mm_encoder_outputs": {"image": images}}, *args, **kwargs)
        return total + self.weight * self.own(plain, pixels, images, inputs["target_latents"])

    def own(self, model: Any, pixels: Tensor, images: DeemImageOutput, posterior: Tensor) -> Tensor:
        """The objective of an arm that is no loss of the model."""
        if self.arm.objective == "contrastive":
            return contrast(model, images.image_tokens, posterior)
        read = model.study_head(images.image_tokens)
        if self.arm.objective == "pixels":  # the encoder's pixels lie in [-1, 1], as what is drawn
            return F.mse_loss(read, F.pixel_unshuffle(pixels, PATCH).flatten(2).transpose(1, 2))
        maps = self.teacher(pixels, output_hidden_states=True).hidden_states[ALIGNED_MAP]
        return 1 - F.cosine_similarity(read, maps.flatten(2).transpose(1, 2), dim=-1).mean()

    def distance(self, model: Any) -> Tensor:
        """Squared distance of the encoder's weights from where they started, as a sum."""
        pairs = zip(model.model.vision_tower.encoder.parameters(), self.began, strict=True)
        return sum((now - before.to(now)).square().sum() for now, before in pairs)


def contrast(model: DeemForConditionalGeneration, tokens: Tensor, posterior: Tensor) -> Tensor:
    """DCR's objective for a DEEM's image tokens (N, Q, P): whose tokens is the image redrawn from?"""
    decoder, count = model.image_decoder, len(tokens)
    latents = decoder.sample_latents(posterior)
    noise = torch.randn_like(latents)
    window = decoder.config.consistency_timestep_range
    timesteps = decoder.draw_timesteps(count, *window, device=latents.device)
    noisy, target, timesteps = add_noise(decoder.scheduler, latents, noise, timesteps)
    condition, nothing = decoder.condition_from_tokens(tokens), decoder.no_features(count)
    others = choose_others(count, OTHERS, latents.device)  # [N, K]
    own = decoder.denoise(noisy, timesteps, condition, nothing)
    rest = [decoder.denoise(noisy, timesteps, condition[row], nothing) for row in others.T]
    return contrastive_losses(own, target, torch.stack(rest, dim=1)).mean()


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Train all but the named parts and what never trains."""
    model.requires_grad_(True)
    model.freeze_fixed_parts()
    for part in parts:
        model.get_submodule(part).requires_grad_(False)


def training_arguments(
    arguments: EvidenceArguments, folder: Path, seed: int, steps: int, batch_size: int, learning_rate: float
) -> TrainingArguments:
    """Options of a training of the study: AdamW with one rate, warm-up and cosine, nothing saved."""
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        adam_beta2=0.98,
        seed=seed,
        use_cpu=arguments.device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=max(1, steps // 20),
        dataloader_drop_last=True,
        disable_tqdm=True,
    )


def caption_rows(captions: Sequence[str], images: Sequence[Image.Image], draws: bool) -> list[dict[str, Any]]:
    """Return the training samples; with `draws` every second caption stands before its image, which it draws."""
    rows = []
    for number, (caption, image) in enumerate(zip(captions, images, strict=True)):
        before = draws and number % 2 == 1
        row = {"text": f"{caption}<image>" if before else f"<image>{caption}", "images": [image], "id": str(number)}
        rows.append(row | {"mode": "interleaved" if draws else "image_to_text"})
    return rows


def train_arm(
    model: DeemForConditionalGeneration,
    processor: DeemProcessor,
    arm: Arm,
    rows: list[dict[str, Any]],
    latents: Tensor,
    arguments: EvidenceArguments,
    folder: Path,
    seed: int,
) -> list[dict[str, float]]:
    """Train an arm; return its log. All arms of a seed see the same batches and, where they draw noise, the same."""
    weight = arguments.weight if arm.objective == "denoise" else 0.0
    model.config.consistency_loss_weight = weight
    model.config.image_loss_weight = arguments.weight if arm.draws else 0.0
    model.image_decoder.config.consistency_condition = arm.condition
    freeze(model, arm.freeze)
    set_seed(seed)
    trainer = ArmTrainer(
        model=model,
        args=training_arguments(
            arguments, folder, seed, arguments.steps, arguments.batch_size, arguments.learning_rate
        ),
        data_collator=ArmCollator(processor, latents, arm.exchanged),
        train_dataset=rows,
        processing_class=processor,
        arm=arm,
        weight=arguments.weight,
        teacher=Path(arguments.parts, "vision"),
    )
    trainer.train()
    model.eval()
    if hasattr(model, "study_head"):
        del model.study_head
    return trainer.state.log_history


@torch.no_grad()
def renew_projector(model: DeemForConditionalGeneration, tokens: Tensor, seed: int) -> None:
    """Start the map from image tokens to the language model anew, so that all that differs between images is heard.

    What it learned from captions passes on what captions say, beside a part that is the same for all images and much
    larger. Of the new one, what differs between images becomes a random vector as large as word embeddings, whitened over
    images; what is the same for all becomes another such vector, by which each of the Q tokens is known.

    Args:
        tokens: (N, Q, P), of training images.
    """
    projector, words = model.model.projector, model.get_input_embeddings().weight
    tokens, draws = tokens.to(words.device, torch.float64), torch.Generator().manual_seed(seed)
    constant = tokens.mean(0)  # [Q, P], the same for all images
    center, deviation = constant.mean(0), words.double().std()

    def random_map(axes: Tensor) -> Tensor:
        return torch.randn(len(projector.weight), axes.shape[1], generator=draws).to(axes) @ axes.T

    _, sizes, basis = torch.linalg.svd(constant - center, full_matrices=False)
    sizes, basis = sizes[: len(constant) - 1], basis[: len(constant) - 1]  # [Q - 1, P]
    own = (tokens - constant).flatten(0, 1)
    own -= own @ basis.T @ basis
    values, axes = torch.linalg.eigh(own.T @ own / len(own))  # ascending
    kept = values > 1e-4 * values[-1]
    shrunk = values[kept] + NOISE * values[-1]  # what hardly differs is not made as large as what differs
    weight = random_map(axes[:, kept] / shrunk.sqrt()) / (values[kept] / shrunk).sum().sqrt()
    weight = deviation * (weight + random_map(basis.T / sizes))
    projector.weight.copy_(weight)
    projector.bias.copy_(words.double().mean(0) - weight @ center)


def train_answers(
    model: DeemForConditionalGeneration,
    processor: DeemProcessor,
    rows: list[dict[str, Any]],
    options: TrainingArguments,
) -> list[dict[str, float]]:
    """Train the language side on dialogues, with vision tower, perceiver and image decoder frozen; return the log."""
    freeze(model, ("model.vision_tower", "model.perceiver", "image_decoder"))
    set_seed(options.seed)
    collator = DeemDataCollator(processor, return_targets=False)
    trainer = DeemTrainer(
        model=model, args=options, data_collator=collator, train_dataset=rows, processing_class=processor
    )
    trainer.train()
    model.eval()
    return trainer.state.log_history


def train_redrawing(
    model: DeemForConditionalGeneration, tokens: Tensor, latents: Tensor, steps: int, batch_size: int, seed: int
) -> float:
    """Train a new connector, of the same size for every arm, to redraw images from their frozen tokens.

    Args:
        tokens: (N, Q, P); latents: (N, 8, s, s), of the same images.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    decoder, draws = model.image_decoder, torch.Generator(model.device).manual_seed(seed)
    tokens, latents = tokens.to(model.device), latents.to(model.device)
    decoder.config.consistency_condition = "tokens"
    model.requires_grad_(False)
    decoder.token_projector.requires_grad_(True)
    torch.manual_seed(seed)
    nn.init.normal_(decoder.token_projector.weight, std=1e-3)
    nn.init.zeros_(decoder.token_projector.bias)
    optimizer = torch.optim.AdamW(decoder.token_projector.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(tokens), (batch_size,), generator=draws, device=model.device)
        sampled = decoder.sample_latents(latents[rows], draws)
        loss = decoder.consistency_loss(sampled, tokens[rows], generator=draws)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / max(1, len(last))
