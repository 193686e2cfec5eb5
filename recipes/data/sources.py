# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""`--data` -> one endless stream of samples: finds out what a folder or glob holds, reads, packs and mixes it."""

import glob
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from transformers import ProcessorMixin

from recipes.data.captions import CaptionReader
from recipes.data.dataset import MixedDataset, Source
from recipes.data.interleaved import InterleavedReader, find_image_folder
from recipes.data.packing import Packing
from recipes.data.questions import QuestionReader
from recipes.data.reading import DataReport, Reader

FORMATS = (
    "MMC4 annotations (*.jsonl or *.jsonl.zip whose lines have text_list, image folder beside them), WebDataset caption "
    "tars (*.tar), or VQAv2 questions (*_questions.json with *_annotations.json)"
)
# How often a family is drawn when no probabilities are given: the paper's 2:1 of documents to captions.
FLIPPED = ("interleaved", "captions")  # what random_flip applies to
DEFAULT_WEIGHTS = {"interleaved": 2.0, "captions": 1.0, "questions": 1.0}


@dataclass
class DataArguments:
    """What to train on."""

    data: list[str] = field(
        default_factory=list, metadata={"help": f"Folders, files or globs, each one source of one format: {FORMATS}."}
    )
    data_probs: list[float] | None = field(
        default=None, metadata={"help": "How often each source is drawn; default 2 for documents, 1 for the others."}
    )
    data_stopping: str = field(
        default="longest",
        metadata={
            "help": "When a pass over the mixture ends: longest (every source was exhausted once), sum, shortest.",
            "choices": ["longest", "sum", "shortest"],
        },
    )
    data_mixing: str = field(
        default="micro_batch",
        metadata={"help": "Draw a source per micro_batch or per sample.", "choices": ["micro_batch", "sample"]},
    )
    max_skipped: float = field(
        default=0.25,
        metadata={"help": "Share of unusable entries (0 ... 1) of a source above which the run stops, 1 = never."},
    )
    random_flip: bool = field(
        default=False,
        metadata={"help": "Mirror pictures of documents and captions with probability 0.5, both sizes alike."},
    )
    shuffle_buffer: int = field(default=5000, metadata={"help": "Raw entries held for shuffling, per source."})
    pack_length: int = field(default=2048, metadata={"help": "Tokens per packed sequence; 0 = one record per sample."})
    max_images: int = field(default=15, metadata={"help": "Most images per packed sequence; -1 = no cap."})


def find_files(data: str) -> tuple[str, list[Path]]:
    """What a folder, file or glob holds.

    Returns:
        The family ("interleaved", "captions" or "questions") and its files, sorted.

    Raises:
        ValueError: if nothing is there, nothing is of a known format, or several formats are mixed.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    else:
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
        if not files:
            raise ValueError(
                f"No data at {data!r} (no such folder, and no file matches it from {Path.cwd()}). Expected a folder, "
                f"file or glob of {FORMATS}."
            )
    families: dict[str, list[Path]] = {}
    for file in sorted(files):
        if (family := _family(file)) is not None:
            families.setdefault(family, []).append(file)
    if not families:
        raise ValueError(f"Nothing usable among the {len(files)} files of {data!r}. Expected {FORMATS}.")
    if len(families) > 1:
        found = "; ".join(f"{family} in {found[0].parent}" for family, found in families.items())
        raise ValueError(f"{data!r} holds several formats ({found}). Give each as a source of its own.")
    return next(iter(families.items()))


def _family(file: Path) -> str | None:
    if file.suffix == ".tar":
        return "captions"
    if file.name.endswith("questions.json"):
        return "questions"
    if file.suffix == ".jsonl" or file.name.endswith(".jsonl.zip"):
        # other jsonl files may lie about; one broken line must not hide an annotation file
        return "interleaved" if any(b'"text_list"' in line for line in _first_lines(file)) else None
    return None


def _first_lines(file: Path, number: int = 3) -> list[bytes]:
    try:
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive, archive.open(archive.namelist()[0]) as lines:
                return [line for line, _ in zip(lines, range(number), strict=False)]
        with open(file, "rb") as lines:
            return [line for line, _ in zip(lines, range(number), strict=False)]
    except (OSError, IndexError, zipfile.BadZipFile, zipfile.zlib.error):
        # By its name an annotation file: let the reader report it.
        return [b'"text_list"']


def make_reader(data: str, processor: ProcessorMixin, caption_form: str = "plain") -> tuple[str, Reader]:
    """The reader for a folder, file or glob, and its family. Raises ValueError as `find_files` does."""
    family, files = find_files(data)
    tokens = {
        "image_token": processor.image_token,
        "reserved": (processor.start_of_image_token, *processor.tokenizer.all_special_tokens),
    }
    if family == "captions":
        return family, CaptionReader(files, **tokens, form=caption_form)
    if family == "questions":
        return family, QuestionReader(files, **tokens)
    return family, InterleavedReader(files, find_image_folder(files[0]), **tokens)


def build_dataset(
    arguments: DataArguments,
    processor: ProcessorMixin,
    batch_size: int,
    seed: int,
    caption_forms: tuple[str, ...] = ("plain",),
) -> tuple[MixedDataset, DataReport]:
    """The training stream and the report that fills while it is read.

    Args:
        arguments: what to read and how.
        processor: DEEM processor, for tokens and tokenizer.
        batch_size: samples per micro-batch.
        seed: seed of order, choices and draws.
        caption_forms: forms in which a caption source is used; each is a source, and they share its probability.

    Raises:
        ValueError: if `data` is empty or cannot be read (see `find_files`), or the probabilities do not fit it.
    """
    if not arguments.data:
        raise ValueError(f"No --data given. Expected folders, files or globs of {FORMATS}.")
    if arguments.data_probs is not None and len(arguments.data_probs) != len(arguments.data):
        raise ValueError(
            f"{len(arguments.data)} --data sources but {len(arguments.data_probs)} --data_probs: give one per source."
        )
    sources, weights = [], []
    for number, data in enumerate(arguments.data):
        family, reader = make_reader(data, processor, caption_forms[0])
        weight = arguments.data_probs[number] if arguments.data_probs is not None else DEFAULT_WEIGHTS[family]
        readers = [reader]
        if family == "captions":
            readers += [make_reader(data, processor, form)[1] for form in caption_forms[1:]]
        for one in readers:
            packing = _packing(arguments, family, processor)
            sources.append(
                Source(
                    reader=one,
                    processor=processor,
                    seed=seed,
                    shuffle_buffer=arguments.shuffle_buffer,
                    packing=packing,
                    max_skipped=arguments.max_skipped,
                    flip=arguments.random_flip and family in FLIPPED,
                )
            )
            weights.append(weight / len(readers))
    dataset = MixedDataset(
        sources, weights, batch_size, seed, arguments.data_stopping, per_sample=arguments.data_mixing == "sample"
    )
    return dataset, dataset.report


def _packing(arguments: DataArguments, family: str, processor: ProcessorMixin) -> Packing | None:
    if arguments.pack_length == 0:
        return None
    if family == "questions":
        raise ValueError(
            f"Dialogues cannot be packed, but --pack_length is {arguments.pack_length} and --data names question files. "
            "Set --pack_length 0, or train on them with recipes/sft.py."
        )
    return Packing(
        length=arguments.pack_length,
        num_image_tokens=processor.num_image_tokens,
        bos_token_id=processor.tokenizer.bos_token_id,
        start_of_image_token_id=processor.start_of_image_token_id,
        image_token_id=processor.image_token_id,
        max_images=arguments.max_images,
        level="sample" if family == "captions" else "image",
    )
