# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Small real parts for the tests: a byte-level tokenizer and a processor for 64-pixel pictures. No network."""

import gc
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a thread per tensor costs more than tiny tensors

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ConvNextImageProcessorPil, PreTrainedTokenizerFast

from processing import DeemProcessor

# transformers compiles a pattern per tensor that it loads or saves; a tiny model has over 700 tensors, and Python keeps 512.
re._MAXCACHE = 8192  # type: ignore[attr-defined]


def pytest_collection_finish() -> None:
    """Libraries stay: Trainer collects garbage in every run, and need not look through them each time."""
    gc.collect()
    gc.freeze()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: any text, one token per byte, exact round trips. Ids 0-2 are pad, bos, eos."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = special | {character: index + len(special) for index, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests that train: on tiny tensors several threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A plain tokenizer, as a language model brings it: no image tokens."""
    return build_tokenizer()


@pytest.fixture
def tiny_processor(tiny_tokenizer: PreTrainedTokenizerFast) -> DeemProcessor:
    """4 image tokens per picture, 64 pixels for encoder and decoder, grounding tokens included."""
    encoder_side = ConvNextImageProcessorPil(size={"shortest_edge": 64})
    return DeemProcessor.from_parts(
        encoder_side, tiny_tokenizer, num_image_tokens=4, target_size=64, grounding_tokens=True
    )


@pytest.fixture
def shared_file() -> Callable[[str], Any]:
    """Reads a JSON file of the given material beside the project; skips the test where it is absent."""

    def read(name: str) -> Any:
        path = Path(__file__).resolve().parents[1] / "../shared" / name
        if not path.exists():
            pytest.skip(f"the check vectors ../shared/{name} are not here")
        return json.loads(path.read_text())

    return read
