# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Texts about the world, a tokenizer of their words, and a text encoder that reads captions."""

from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from recipes.prompts import ANSWER_BEGIN, CAPTION_BEGIN, PARTS_DESCRIBE_REQUESTS, PARTS_DIALOGUE, QUESTION_REQUEST
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import DETAILS

CAPTION_LENGTH = 32  # tokens the text encoders read


def world_texts(world: World, indices: range) -> Iterator[str]:
    """Yield per index a document, a caption (bare or as the answer of a dialogue) and a question with its answer."""
    for index in indices:
        scene = world.scene(index)
        caption = scene.caption(DETAILS[index % 3])
        yield " ".join(world.document(index).text_list)
        request = PARTS_DESCRIBE_REQUESTS[index // 3 % 2]
        dialogue = PARTS_DIALOGUE.format(user=request, assistant=f"{CAPTION_BEGIN} {caption}")
        yield dialogue if index % 2 else caption
        questions = scene.questions()
        asked = questions[index * 7 % len(questions)]
        user = QUESTION_REQUEST + asked["question"]
        yield PARTS_DIALOGUE.format(user=user, assistant=f"{ANSWER_BEGIN} {asked['answer']}")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE that reads any text, puts bos in front, and has every word of the world as one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # eos must not be 2: CLIPTextModel takes a config with that value for an old one and pools elsewhere
    special = ["<pad>", "</s>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return wrap_tokenizer(backend, template="<s> $A")


def wrap_tokenizer(backend: Tokenizer, template: str, **kwargs: Any) -> PreTrainedTokenizerFast:
    """Return a copy of the tokenizer that puts the special tokens of `template` around a text `$A`."""
    backend = Tokenizer.from_str(backend.to_str())
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>") if token in template]
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=template, special_tokens=ids)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **names,
        **kwargs,
    )


def caption_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the language model's tokenizer as text encoders use it: bos in front, eos behind, at most 32 tokens."""
    return wrap_tokenizer(tokenizer.backend_tokenizer, template="<s> $A </s>", model_max_length=CAPTION_LENGTH)


def encode_captions(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Return token ids, (N, 32), padded at the right."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def text_encoder(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> CLIPTextModel:
    """Return an untrained text encoder that reads captions of at most `CAPTION_LENGTH` tokens."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CAPTION_LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)
