# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""`--data` -> one endless stream of samples: finds out what a folder or glob holds, reads, packs and mixes it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import ProcessorMixin

from recipes.data.faults import BadSample, DataError, DataReport
from recipes.data.formats import READERS, WHAT, find_files
from recipes.data.readers.captions import form_suffix
from recipes.data.readers.reader import Reader
from recipes.data.readers.rows import DatasetReader
from recipes.data.stream.concatenation import Concatenation
from recipes.data.stream.dataset import MixedDataset
from recipes.data.stream.packing import Packing
from recipes.data.stream.source_stream import Source

LONGEST = 4096  # tokens of a sample for itself, the context of the published model
REGION_FAMILIES = ("regions", "vcr", "osprey")  # what region_template applies to
# How often a family is drawn when no probabilities are given: the paper's 2:1 of documents to captions.
DEFAULT_WEIGHTS = {"interleaved": 2.0}  # 1 for the others


@dataclass
class DataArguments:
    """What to train on."""

    data: list[str] = field(
        default_factory=list, metadata={"help": f"Folders, files or globs, each one source of one format: {WHAT}."}
    )
    image_folders: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders that rows of chats, questions and captions may name images in, besides those of --data itself; "
            "names that lead elsewhere are not opened."
        },
    )
    data_probs: list[float] | None = field(
        default=None, metadata={"help": "How often each source is drawn; default 2 for documents, 1 for the others."}
    )
    data_weights: str = field(
        default="equal",
        metadata={
            "help": "Without data_probs: draw sources equally often (documents twice as often), by size, or by the square "
            "root of it. Sizes are counted at the start, which reads all sources once.",
            "choices": ["equal", "size", "sqrt"],
        },
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
    caption_group_prob: float = field(
        default=0.0,
        metadata={"help": "Share of packed caption sequences in which 2 to 8 captions form one document."},
    )
    max_skipped: float = field(
        default=0.25,
        metadata={"help": "Share of unusable entries (0 ... 1) of a source above which the run stops, 1 = never."},
    )
    random_flip: bool = field(
        default=False,
        metadata={"help": "Mirror images of documents and captions with probability 0.5, both sizes alike."},
    )
    shuffle_buffer: int = field(default=5000, metadata={"help": "Raw entries held for shuffling, per source."})
    pack_length: int = field(
        default=2048,
        metadata={
            "help": "Most tokens of a sequence: documents and captions are cut to fill it, dialogues stand in it whole; 0 = "
            "every sample for itself."
        },
    )
    max_length: int = field(
        default=0,
        metadata={
            "help": "Most tokens of a dialogue; its last rounds are left out. 0 = pack_length; without that samples of more "
            f"than {LONGEST} tokens (or what the tokenizer names) are skipped."
        },
    )
    region_template: str = field(
        default="chat",
        metadata={
            "help": "How region dialogues are written: as the processor's chat template has it, or as released.",
            "choices": ["chat", "released"],
        },
    )
    max_images: int = field(default=15, metadata={"help": "Most images per packed sequence; -1 = no cap."})


def make_reader(
    data: str, processor: ProcessorMixin, caption_form: str = "plain", image_folders: Sequence[str] = ()
) -> tuple[str, Reader]:
    """Make the reader for a folder, file or glob, and return it behind its family.

    Rows may name images in the folder of their file, in `data` where that is a folder, and in `image_folders`.

    The reader's name is `data`, so that two sources in one folder are told apart, with the form of its captions unless
    plain.

    Raises:
        ValueError: see `find_files`.
    """
    family, files = find_files(data)
    tokens = {
        "image_token": processor.image_token,
        "reserved": special_tokens(processor),
    }
    own = [data] if os.path.isdir(os.path.expanduser(data)) else []
    reader = READERS[family](files, **tokens)
    if caption_form != "plain" and reader.captioned:
        reader = READERS[family](files, **tokens, form=caption_form)
        data += form_suffix(caption_form)
    if isinstance(reader, DatasetReader):
        reader.image_folders = tuple(Path(folder).expanduser() for folder in (*own, *image_folders))
    reader.name = data
    return family, reader


def special_tokens(processor: ProcessorMixin) -> tuple[str, ...]:
    """Return all texts that the processor's tokenizer takes for special tokens."""
    tokenizer = processor.tokenizer
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    own = [processor.start_of_image_token] if hasattr(processor, "start_of_image_token") else []
    return tuple(dict.fromkeys((*own, *tokenizer.all_special_tokens, *added)))


def build_dataset(
    arguments: DataArguments,
    processor: ProcessorMixin,
    batch_size: int,
    seed: int,
    caption_forms: tuple[str, ...] = ("plain",),
    most_images: int = 0,
    most_tokens: int = 0,
) -> tuple[MixedDataset, DataReport]:
    """Build the training stream and the report that fills while it is read.

    Args:
        arguments: what to read and how.
        processor: DEEM processor, for tokens and tokenizer.
        batch_size: samples per micro-batch.
        seed: seed of order, choices and draws.
        caption_forms: forms in which a caption source is used; each is a source, and they share its probability.
        most_images, most_tokens: what the model has room for in a sequence, 0 = no limit; samples of more are skipped.

    Raises:
        ValueError: if `data` is empty or cannot be read (see `find_files`), the probabilities do not fit it, or they
            are given together with `data_weights`.
    """
    _check_sources(arguments)
    sources, weights = [], []
    for number, data in enumerate(arguments.data):
        family, reader = make_reader(data, processor, caption_forms[0], arguments.image_folders)
        if arguments.data_probs is not None:
            weight = arguments.data_probs[number]
        elif arguments.data_weights == "equal":
            weight = DEFAULT_WEIGHTS.get(family, 1.0)
        else:
            weight = count_entries(reader) ** (0.5 if arguments.data_weights == "sqrt" else 1.0)
        readers = [reader]
        if reader.captioned:
            readers += [make_reader(data, processor, form, arguments.image_folders)[1] for form in caption_forms[1:]]
        for one in readers:
            one.name = _distinct(one.name, {source.reader.name for source in sources})
            packing = _packing(arguments, one, processor)
            sources.append(
                Source(
                    reader=one,
                    processor=processor,
                    seed=seed,
                    shuffle_buffer=arguments.shuffle_buffer,
                    packing=packing,
                    max_skipped=arguments.max_skipped,
                    flip=arguments.random_flip and (one.captioned or one.kind == "document"),
                    max_length=_max_length(arguments, packing),
                    longest=0 if packing or arguments.max_length else _longest(processor, most_tokens),
                    most_images=most_images,
                    group_prob=arguments.caption_group_prob if one.kind == "caption" else 0.0,
                    released_template=arguments.region_template == "released" and family in REGION_FAMILIES,
                )
            )
            weights.append(weight / len(readers))
    dataset = MixedDataset(
        sources, weights, batch_size, seed, arguments.data_stopping, per_sample=arguments.data_mixing == "sample"
    )
    return dataset, dataset.report


def count_entries(reader: Reader) -> int:
    """Count the raw entries of a source, usable or not; files that cannot be read count as far as they can."""
    number = 0
    for shard in reader.shards:
        try:
            for _ in reader.entries(shard):
                number += 1
        except DataError:
            raise
        except Exception as error:  # as in `ReaderPass`, where the rest of the file will be counted as unusable
            fault = error if isinstance(error, BadSample) else f"{shard.name}: {type(error).__name__}: {error}"
            print(f"Not counted to its end: {fault}")
    return number


def _check_sources(arguments: DataArguments) -> None:
    """Raise ValueError as `build_dataset` says, before anything is read."""
    if not arguments.data:
        raise ValueError(f"No --data given. Expected folders, files or globs of {WHAT}.")
    if arguments.data_probs is not None and len(arguments.data_probs) != len(arguments.data):
        raise ValueError(
            f"{len(arguments.data)} --data sources but {len(arguments.data_probs)} --data_probs: give one per source."
        )
    if arguments.data_probs is not None and arguments.data_weights != "equal":
        probabilities = " ".join(f"{value:g}" for value in arguments.data_probs)
        raise ValueError(
            f"--data_probs {probabilities} and --data_weights {arguments.data_weights} (perhaps of the configuration "
            "file) both say how often a source is drawn: leave one out, or give --data_weights equal."
        )


def _max_length(arguments: DataArguments, packing: Packing | Concatenation | None) -> int:
    """Return the most tokens of a sample, 0 = no limit: documents are cut in packing, a dialogue must fit into its row."""
    if isinstance(packing, Concatenation):
        return min(arguments.max_length or packing.length, packing.length) - 1  # bos
    return arguments.max_length if packing is None else 0


def _longest(processor: ProcessorMixin, most_tokens: int) -> int:
    """Return the most tokens of a sample where no option says it: some tokenizers name a length without meaning."""
    return min(processor.tokenizer.model_max_length, LONGEST, most_tokens or LONGEST)


def _distinct(name: str, taken: set[str]) -> str:
    """Number the name if the same data was given before: each has an order, counts and a position of its own."""
    numbered, number = name, 1
    while numbered in taken:
        number += 1
        numbered = f"{name} (number {number})"
    return numbered


def _packing(arguments: DataArguments, reader: Reader, processor: ProcessorMixin) -> Packing | Concatenation | None:
    if arguments.pack_length == 0:
        return None
    if reader.kind == "dialogue":
        if isinstance(reader, DatasetReader):
            raise ValueError(
                f"Chats in rows draw or not by turns and cannot share a sequence, but --pack_length is "
                f"{arguments.pack_length} and {reader.name} holds such. Set --pack_length 0."
            )
        return Concatenation(arguments.pack_length, arguments.max_images)
    return Packing(
        length=arguments.pack_length,
        num_image_tokens=processor.num_image_tokens,
        bos_token_id=processor.tokenizer.bos_token_id,
        start_of_image_token_id=processor.start_of_image_token_id,
        image_token_id=processor.image_token_id,
        max_images=arguments.max_images,
        level="sample" if reader.kind == "caption" else "image",
    )
