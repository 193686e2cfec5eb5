# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The language model of the study: on text alone it has learned to read a caption and to answer what is asked about it.

Real multimodal models begin from language models that can do so. One that cannot would have to learn from a few hundred
labelled images how a question is compared with what is seen, and does not: it answers yes/no at chance, whatever the image
tokens hold. What it reads are the dialogues of `dialogues.py` with a caption in the place of the image.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from processing.processing_deem import CHAT_TEMPLATE
from recipes.study.dialogues import as_caption, messages_of, questions
from recipes.synthetic.parts.optimization import train
from recipes.synthetic.parts.texts import train_tokenizer, world_texts
from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import DETAILS, HELD_OUT, pick

WIDTH, LAYERS, BATCH = 128, 4, 16
TEXTS = 6000  # different ones
SHARES = {"dialogue": 0.7, "repeat": 0.15, "caption": 0.15}  # of the texts
SHORT_SHARE = 0.5  # of the captions that are asked about tell kinds and colors alone: these are understood first


def read_text(scene: Scene) -> list[dict[str, Any]] | str:
    """Return what is read about a scene: a dialogue about a caption, a request to repeat it, or a bare caption."""
    draws = scene.world.rng(scene.index, "reading")
    sort = draws.choice(list(SHARES), p=list(SHARES.values()))
    if sort == "caption":
        return scene.caption(pick(draws, DETAILS))
    detail = "medium" if draws.random() < SHORT_SHARE else "full"
    shown = {"type": "text", "text": f"{scene.caption(detail)} "}
    asked = [as_caption(scene, detail)] if sort == "repeat" else questions(scene, draws, detail)
    return messages_of(shown, asked)


def encode(tokenizer: PreTrainedTokenizerFast, text: list[dict[str, Any]] | str) -> tuple[Tensor, Tensor]:
    """Return token ids and labels, (T,) each: of a dialogue the answers are learned, of a caption all."""
    if isinstance(text, str):
        ids = torch.tensor(tokenizer(text + tokenizer.eos_token).input_ids)
        return ids, ids
    options = {"chat_template": CHAT_TEMPLATE, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = tokenizer.apply_chat_template(text, **options)
    ids, answers = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"]).bool()
    return ids, ids.where(answers, -100)


@torch.no_grad()
def answered(model: LlamaForCausalLM, rows: list[tuple[Tensor, Tensor]], inputs_of: Any) -> float:
    """Return the share of answers of dialogues of which every token is the likeliest."""
    right = []
    for start in range(0, len(rows), 50):
        inputs = inputs_of(rows[start : start + 50])
        said, labels = model(**inputs).logits[:, :-1].argmax(-1), inputs["labels"][:, 1:]
        wanted = labels != -100
        ends = wanted & ~F.pad(wanted[:, 1:], (0, 1))  # the last token of each answer
        wrong = ((said != labels) & wanted).cumsum(1)
        for row in range(len(labels)):
            totals = wrong[row][ends[row]]  # wrong tokens up to the end of each answer
            right += (totals == F.pad(totals[:-1], (1, 0))).tolist()
    return sum(right) / max(1, len(right))


def reading_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Return a tokenizer that has every word of the world, and of what is asked, as one token."""
    spoken = [read_text(world.scene(index)) for index in range(1000)]
    asked = [part["text"] for text in spoken if not isinstance(text, str) for one in text for part in one["content"]]
    return train_tokenizer([*world_texts(world, range(1000)), *asked], vocab_size=1024)


def train_reader(
    folder: Path, tokenizer: PreTrainedTokenizerFast, world: World, steps: int, num_held_out: int = 200
) -> str:
    """Train a language model of a million parameters on texts about the world.

    Args:
        folder: gets model and tokenizer.
        tokenizer: of `reading_tokenizer`.
        num_held_out: texts that the figures are measured on.

    Returns:
        The figures, in words.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=WIDTH**-0.5,  # as 0.02 is for widths of thousands
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.get_input_embeddings().weight)  # as `train_text` does
    rows = [encode(tokenizer, read_text(world.scene(index))) for index in range(min(TEXTS, steps * BATCH))]

    def inputs_of(chosen: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        ids, labels = zip(*chosen, strict=True)
        ids = pad_sequence(ids, batch_first=True, padding_value=-1)
        return {
            "input_ids": ids.where(ids >= 0, tokenizer.pad_token_id),
            "attention_mask": (ids >= 0).long(),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    def loss_of() -> Tensor:
        return model(**inputs_of([rows[index] for index in torch.randint(len(rows), (BATCH,)).tolist()])).loss

    loss = train("reading", [model], loss_of, steps, learning_rate=2e-3)
    texts = [read_text(world.scene(HELD_OUT + index)) for index in range(num_held_out)]
    right = answered(model, [encode(tokenizer, text) for text in texts if not isinstance(text, str)], inputs_of)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"loss {loss:.3f}; held-out answers right to the last word {right:.1%} ({len(tokenizer)} tokens)"
