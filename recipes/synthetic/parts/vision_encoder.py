# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The vision encoder of the parts, trained contrastively against captions."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel, PreTrainedTokenizerFast, ViTImageProcessorPil

from recipes.synthetic.parts.diffusion_modules import SIZE
from recipes.synthetic.parts.images import render, to_unit
from recipes.synthetic.parts.optimization import train
from recipes.synthetic.parts.texts import encode_captions, text_encoder
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT, first_color, first_kind


def encoder_config() -> ConvNextConfig:
    """Return the config of a ConvNeXt of 0.8 million parameters for images of 64 pixels."""
    return ConvNextConfig(
        image_size=SIZE,
        patch_size=4,
        hidden_sizes=[32, 64, 128, 192],
        depths=[1, 1, 2, 1],
        layer_norm_eps=1e-6,
        layer_scale_init_value=1.0,  # the usual 1e-6, and weights of 0.02, are for training over many epochs
        initializer_range=0.08,
    )


class ContrastivePair(nn.Module):
    """An untrained vision encoder beside the text encoder that it is trained against.

    Args:
        tokenizer: of the captions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        config, width = encoder_config(), 64
        self.pad_token_id = tokenizer.pad_token_id
        self.encoder, self.reader = ConvNextModel(config), text_encoder(tokenizer, width, layers=1)
        # Without batch norm all images, and without the mean over tokens all captions, look alike for most of the steps.
        self.projection = nn.Sequential(
            nn.BatchNorm1d(config.hidden_sizes[-1]), nn.Linear(config.hidden_sizes[-1], width, bias=False)
        )

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return the cosine of every image with every caption at temperature 0.07, (N, M).

        Args:
            images: (N, 3, 64, 64) uint8.
            ids: tokens of the captions, (M, 32).
        """
        seen = F.normalize(self.projection(self.encoder(to_unit(images)).pooler_output), dim=-1)  # [N, 64]
        is_token = (ids != self.pad_token_id)[..., None]
        read = (self.reader(ids).last_hidden_state * is_token).sum(1) / is_token.sum(1)
        return seen @ F.normalize(read, dim=-1).T / 0.07


def train_vision(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    num_images: int,
    num_held_out: int,
    steps: int,
    details: Sequence[str] = ("coarse", "medium"),
) -> str:
    """Train a ConvNeXt whose pooled output says which kinds of objects are there, how many, and in which colors.

    Args:
        folder: gets the encoder and its image processor.
        tokenizer: of the captions.
        num_held_out: images that the figures are measured on.
        details: of the captions, see `Scene.caption`, equally often; "coarse" alone says nothing of colors.

    Returns:
        The figures, in words.
    """
    scenes = [world.scene(index) for index in range(num_images)]
    images = render(scenes, "vision images")
    captions = [scene.caption(detail) for scene in scenes for detail in details]
    pair = ContrastivePair(tokenizer)
    different = sorted(set(captions))
    ids, classes = encode_captions(tokenizer, different), {caption: i for i, caption in enumerate(different)}
    labels = torch.tensor([classes[caption] for caption in captions]).view(-1, len(details))

    def loss_of() -> Tensor:
        chosen = torch.randint(len(images), (64,))
        # kinds alone in half of the steps where captions are of two details: they are learned slower
        told = labels[chosen, int(torch.randint(len(details), ()))]
        logits = pair(images[chosen], ids[told])
        same = (told[:, None] == told).float()  # images with equal captions are no negatives
        target = same / same.sum(1)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    loss = train("vision", [pair.encoder, pair.reader, pair.projection], loss_of, steps, learning_rate=2e-3)
    unseen = [world.scene(HELD_OUT + i) for i in range(num_held_out)]
    with torch.no_grad():
        best = pair(render(unseen, "vision held-out images"), ids).argmax(1).tolist()
    pairs = [(different[i], scene.main) for i, scene in zip(best, unseen, strict=True)]
    kind = sum(first_kind(text) == main.kind for text, main in pairs) / len(pairs)
    color = sum(first_color(text) == main.color for text, main in pairs) / len(pairs)
    pair.encoder.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half).save_pretrained(folder)
    return (
        f"loss {loss:.3f}; held-out images whose best of {len(different)} captions names the right kind first "
        f"{kind:.1%}, the right color {color:.1%}"
    )
