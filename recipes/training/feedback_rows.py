# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Any `--data` as rows of messages and images for trl's SFTTrainer, whose model need not be a DEEM (recipes/add_feedback.py)."""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets import Image as ImageFeature
from transformers import ProcessorMixin

from recipes.data.faults import DataReport
from recipes.data.sources import make_reader
from recipes.data.stream.shuffle import ReaderPass
from recipes.training.text_rows import load_rows

CONTENT = {"type": Value("string"), "text": Value("string")}
ROW = {"messages": List({"role": Value("string"), "content": List(CONTENT)}), "images": List(ImageFeature())}


def chat_rows(
    sources: Sequence[str], processor: ProcessorMixin, image_folders: Sequence[str] = (), max_rows: int | None = None
) -> Dataset:
    """Return the rows of all sources: those of messages and images as they are, other formats as dialogues about images.

    What cannot be read is left out and counted; captions become answers to "Describe ...".

    Args:
        max_rows: of each source in another format, which is read whole before training.

    Raises:
        ValueError: a source does not exist, or has nothing that can be used.
    """
    tables, report = [], DataReport()
    for source in sources:
        try:
            tables.append(load_rows([source], image_folders))
            continue
        except (ValueError, FileNotFoundError):  # no rows of messages
            _, reader = make_reader(source, processor, "describe", image_folders)
        samples = ReaderPass(reader, report, seed=0, max_skipped=0.25)

        def rows(samples: ReaderPass = samples) -> Iterator[dict[str, Any]]:
            for number, (_, sample) in enumerate(samples):
                if max_rows is not None and number >= max_rows:
                    return
                if "messages" in sample and "region_masks" not in sample:
                    yield {"messages": [as_items(turn) for turn in sample["messages"]], "images": sample["images"]}

        tables.append(Dataset.from_list(list(rows()), features=Features(ROW)))
        if not len(tables[-1]):
            raise ValueError(
                f"{source} has no dialogue about whole images. Give chats, questions or captioned images."
            )
    if any(report.to_dict().values()):
        print(report)
    return concatenate_datasets(tables)


def as_items(turn: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of items."""
    content = turn["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"role": turn["role"], "content": [{"type": item["type"], "text": item.get("text")} for item in content]}


def with_answers_marked(rows: Dataset, processor: ProcessorMixin) -> tuple[Dataset, bool]:
    """Return rows of which trl trains on answers only, and whether `assistant_only_loss` sees to it.

    A chat template without `generation` marks does not say where answers are: the last answer becomes the completion.
    """
    template = processor.chat_template or processor.tokenizer.chat_template or ""
    if "generation %}" in template or "generation -%}" in template:
        return rows, True

    def split(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}

    return rows.map(split, remove_columns="messages"), False
