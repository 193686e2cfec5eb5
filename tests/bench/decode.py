# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Cached decoding of DEEM against LLaVA with the same encoder and language model sizes, in tokens per second.

    python tests/bench/decode.py [--batch 1] [--new 48] [--threads 1]

Both read the same prompt: one image of as many tokens, and as much text. Counted are the tokens after the prompt has
been read: (new - 1) / (time of `new` tokens - time of one). DEEM's gates are open, one layer in four attends to the
image. The third line is DEEM without keeping the image attention's values between steps. Medians of 5 alternating runs
in one process. Run it on an idle machine.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from modeling_deem import DeemConfig, DeemForConditionalGeneration
from modeling_deem.image_states_deem import DeemImageStates

SIDE, PATCH, START, IMAGE, VOCABULARY = 128, 16, 4000, 4001, 4096
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENS = (SIDE // PATCH) ** 2  # of one image, in both models


def build() -> tuple[DeemForConditionalGeneration, LlavaForConditionalGeneration]:
    """Both models with random weights; DEEM without an image decoder, which takes no part in writing."""
    torch.manual_seed(0)
    grid = SIDE // PATCH
    deem = DeemForConditionalGeneration(
        DeemConfig(
            vision_config=VISION,
            text_config=TEXT,
            perceiver_config={
                "num_queries": TOKENS,
                "hidden_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
            },
            image_decoder_config=None,
            start_of_image_token_id=START,
            image_token_id=IMAGE,
            pad_token_id=0,
            feature_size=256,
            position_grid_side=grid,
            image_attention_sides=[2 * grid, grid, grid // 2],
            image_attention_base_side=grid,
        )
    ).eval()
    with torch.no_grad():
        for block in deem.model.image_attention.values():
            block.gate.fill_(0.5)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=VISION, text_config=TEXT, image_token_index=IMAGE, image_seq_length=TOKENS)
    ).eval()
    return deem, llava


def prompt(batch: int, text: int = 32) -> dict[str, torch.Tensor]:
    """bos, start-of-image, the image's tokens, text."""
    input_ids = torch.randint(3, START, (batch, 2 + TOKENS + text))
    input_ids[:, 0], input_ids[:, 1], input_ids[:, 2 : 2 + TOKENS] = 1, START, IMAGE
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(batch, 3, SIDE, SIDE),
    }


@contextlib.contextmanager
def projecting_at_every_step() -> Iterator[None]:
    """DEEM as it would be if each step projected the image features anew."""
    keep = DeemImageStates.get_values

    def forgetting(states: DeemImageStates, key: str, project: Callable) -> torch.Tensor:
        states.kept_values.clear()
        states.kept_tables.clear()
        return keep(states, key, project)

    DeemImageStates.get_values = forgetting
    try:
        yield
    finally:
        DeemImageStates.get_values = keep


def tokens_per_second(model: torch.nn.Module, inputs: dict[str, torch.Tensor], new: int) -> float:
    """Tokens of all rows per second of cached decoding, without reading the prompt."""

    def seconds(count: int) -> float:
        began = time.perf_counter()
        model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - began

    return len(inputs["input_ids"]) * (new - 1) / (seconds(new) - seconds(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=48, help="tokens to write")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    deem, llava = build()
    inputs = prompt(args.batch)

    def without_keeping() -> float:
        with projecting_at_every_step():
            return tokens_per_second(deem, inputs, args.new)

    measured = {
        "LLaVA": lambda: tokens_per_second(llava, inputs, args.new),
        "DEEM": lambda: tokens_per_second(deem, inputs, args.new),
        "DEEM, values not kept": without_keeping,
    }
    runs: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(6):  # the first one warms up
        for name, measure in measured.items():
            value = measure()
            if turn:
                runs[name].append(value)
    medians = {name: statistics.median(values) for name, values in runs.items()}
    for name, value in medians.items():
        print(f"{name:<24} {value:8.1f} tokens/s   {value / medians['LLaVA']:.2f} of LLaVA")


if __name__ == "__main__":
    main()
