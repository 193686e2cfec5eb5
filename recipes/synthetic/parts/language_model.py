# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The language model of the parts, with its tokenizer."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.synthetic.parts.optimization import train
from recipes.synthetic.parts.texts import train_tokenizer, world_texts
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import COLORS, HELD_OUT

WIDTH = 128


def rows_of_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> Tensor:
    """Return texts in random order, each between bos and eos, one after the other in rows, (N, length)."""
    order = torch.randperm(len(texts)).tolist()
    ids = tokenizer([texts[i] + tokenizer.eos_token for i in order]).input_ids
    stream = torch.tensor([token for row in ids for token in row])
    return stream[: len(stream) // length * length].view(-1, length)


def untrained(tokenizer: PreTrainedTokenizerFast, initializer_range: float = 0.02) -> LlamaForCausalLM:
    """Return a language model of about one million parameters.

    Args:
        initializer_range: standard deviation of all weights but the embeddings.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=initializer_range,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # Images are drawn from the last states of words. With embeddings of the usual 0.02, which is for widths of thousands,
    # these hold no more than what comes next, which is the same after "red" and after "blue"; these keep the words.
    nn.init.normal_(model.get_input_embeddings().weight)
    return model


def train_text(folder: Path, world: World, num_texts: int, num_held_out: int, steps: int) -> str:
    """Train a language model of about one million parameters on texts about the world.

    Args:
        folder: gets model and tokenizer.
        num_texts: of each of three sorts.
        num_held_out: of each sort, that the perplexity is measured on.

    Returns:
        The figures, in words.
    """
    texts = list(world_texts(world, range(num_texts)))
    tokenizer = train_tokenizer(texts)
    model = untrained(tokenizer)
    data = rows_of_tokens(tokenizer, texts, length=128)

    def loss_of() -> Tensor:
        batch = data[torch.randint(len(data), (16,))]
        return model(input_ids=batch, labels=batch).loss

    loss = train("text", [model], loss_of, steps, learning_rate=3e-3)
    unseen = list(world_texts(world, range(HELD_OUT, HELD_OUT + num_held_out)))
    held_out = rows_of_tokens(tokenizer, unseen, length=128)
    with torch.no_grad():
        surprise = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in held_out]).mean()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return (
        f"loss {loss:.3f}; held-out perplexity {surprise.exp():.2f} per token ({len(tokenizer)} tokens); last states of two "
        f"colors differ by {least_color_distance(model, tokenizer):.0%} of their length or more"
    )


@torch.no_grad()
def least_color_distance(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Return how far the last states of two color words lie apart, as a share of a state's length, for the nearest two.

    Drawings in these two colors are told apart by no more than that.
    """
    colors = list(COLORS)
    ids = tokenizer([f"a {color}" for color in colors], return_tensors="pt", padding=True).input_ids
    states = model.base_model(input_ids=ids).last_hidden_state[:, -1]  # [C, D]
    distances = torch.cdist(states, states) / states.norm(dim=-1).mean()
    return distances[~torch.eye(len(colors), dtype=torch.bool)].min().item()
