# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The language model of the study: on text alone it has learned to read a caption and to answer what is asked about it.

Real multimodal models begin from language models that can do so. One that cannot would have to learn from a few hundred
labelled images how a question is compared with what is seen, and does not: it answers yes/no at chance, whatever the image
tokens hold. What it reads are the dialogues of `dialogues.py` with a caption in the place of the image.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, PreTrainedTokenizerFast

from processing.processing_deem import CHAT_TEMPLATE
from recipes.study.dialogues import as_caption, messages_of, questions
from recipes.synthetic.parts.language_model import WIDTH, untrained
from recipes.synthetic.parts.optimization import train
from recipes.synthetic.parts.texts import train_tokenizer, world_texts
from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import DETAILS, HELD_OUT, pick

BATCH = 16
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


def encode(tokenizer: PreTrainedTokenizerFast, text: list[dict[str, Any]] | str) -> dict[str, list[int]]:
    """Return `input_ids` and `labels`: of a dialogue the answers are learned, of a caption all."""
    if isinstance(text, str):
        ids = tokenizer(text + tokenizer.eos_token).input_ids
        return {"input_ids": ids, "labels": ids}
    options = {"chat_template": CHAT_TEMPLATE, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = tokenizer.apply_chat_template(text, **options)
    ids, answers = encoded["input_ids"], encoded["assistant_masks"]
    return {"input_ids": ids, "labels": [one if said else -100 for one, said in zip(ids, answers, strict=True)]}


@torch.no_grad()
def share_answered(model: LlamaForCausalLM, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Return the share of answers of dialogues of which every token is the likeliest."""
    right: list[bool] = []
    for inputs in batches:
        said, labels = model(**inputs).logits[:, :-1].argmax(-1), inputs["labels"][:, 1:]
        wanted = labels != -100
        ends = wanted & ~F.pad(wanted[:, 1:], (0, 1))  # the last token of each answer
        wrong = ((said != labels) & wanted).cumsum(1)
        for row, end in zip(wrong, ends, strict=True):
            right += (row[end].diff(prepend=row.new_zeros(1)) == 0).tolist()
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
    model = untrained(tokenizer, WIDTH**-0.5)  # as 0.02 is for widths of thousands
    rows = [encode(tokenizer, read_text(world.scene(index))) for index in range(min(TEXTS, steps * BATCH))]
    collate = DataCollatorForSeq2Seq(tokenizer)

    def loss_of() -> Tensor:
        return model(**collate([rows[index] for index in torch.randint(len(rows), (BATCH,)).tolist()])).loss

    loss = train("reading", [model], loss_of, steps, learning_rate=2e-3)
    texts = [read_text(world.scene(HELD_OUT + index)) for index in range(num_held_out)]
    dialogues = [encode(tokenizer, text) for text in texts if not isinstance(text, str)]
    right = share_answered(model, (collate(dialogues[start : start + 50]) for start in range(0, len(dialogues), 50)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"loss {loss:.3f}; held-out answers right to the last word {right:.1%} ({len(tokenizer)} tokens)"
