# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Rows of `datasets`, from local files or the Hub, streamed: interleaved documents, chats, questions, captions.

The columns tell what a row is:

| columns | as in | becomes |
|---|---|---|
| `images`, `texts` (lists of equal length, each place one or the other) | OBELICS | a document |
| `images`, `texts` (dicts of user and assistant) | The Cauldron | a dialogue |
| `messages`, `images` | TRL's vision datasets | a dialogue |
| `question`, `image`, an answer column | lmms-lab's VQA sets | a dialogue |
| `image`, `caption` | | a caption in one of `captions.FORMS` |

Images are bytes, paths (relative to the file), or what the Image feature stores; they are opened one by one, so that a
broken one is skipped and the stream goes on.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from recipes.data.faults import BadSample, DataError, LeftOut, Skip
from recipes.data.readers.captions import caption_sample, form_suffix
from recipes.data.readers.files import read_lines
from recipes.data.readers.images import open_image
from recipes.data.readers.interleaved import keep_some, spaces_removed
from recipes.data.readers.questions import check_round, question_messages, read_answers
from recipes.data.readers.reader import Entry, Reader, clean_text, is_missing, parse_json
from recipes.data.samples import IMAGE, Piece, around_images, content, dialogue

HUB = "hub:"  # prefix of a Hub id among the data: hub:<owner>/<name>[:<configuration>[:<split>]]
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json"}  # of `datasets`
ANSWERS = ("multiple_choice_answer", "answer", "answers", "direct_answers")


@dataclass(frozen=True, order=True)
class HubShard:
    """One of the files of a dataset on the Hub."""

    name: str
    index: int
    dataset: datasets.IterableDataset = field(compare=False, repr=False)


class DatasetReader(Reader):
    """Rows of a dataset.

    Args:
        shards: parquet, arrow or jsonl files, or those of `open_hub`.
        image_token, reserved: special tokens that are taken out of all text.
        form: one of `captions.FORMS`, for captions.
        max_images: most images of a document.

    Raises:
        DataError: if the first row has none of the known sets of columns.
    """

    def __init__(
        self,
        shards: list[Path] | list[HubShard],
        image_token: str = "<image>",
        reserved: tuple[str, ...] = (),
        form: str = "plain",
        max_images: int = 6,
    ) -> None:
        first = shards[0]
        self.name = (str(first.parent) if isinstance(first, Path) else first.name) + form_suffix(form)
        self.shards = shards
        self.image_token = image_token
        self.reserved = (image_token, *reserved)
        self.form, self.max_images = form, max_images
        self.kind = self._find_kind()
        self.captioned = self.kind == "caption"
        if self.captioned and form != "plain":
            self.kind = "dialogue"

    def _find_kind(self) -> str:
        """Return what the rows become, as the first one says that can be read and tells.

        Raises:
            DataError: if none can be read, or its columns are not known.
        """
        fault, row = None, {}
        for shard in self.shards:
            try:
                for entry in self.entries(shard):
                    try:
                        row = self._row(entry.payload[1], entry.key)
                    except BadSample as bad:  # a broken line, counted when the file is read
                        fault = bad
                        continue
                    if (kind := self._kind_of(row)) is not None:
                        return kind
            except BadSample as bad:
                fault = bad
        if not row and fault is not None:
            raise DataError(f"No row of {self.name} can be read: {fault}. Repair or leave out these files.")
        return self._kind_of(row) or "document"

    @staticmethod
    def _row(row: dict[str, Any] | bytes, key: str) -> dict[str, Any]:
        row = parse_json(row, key) if isinstance(row, bytes) else row
        if not isinstance(row, dict):
            raise BadSample("row of another layout", key)
        return row

    def _kind_of(self, row: dict[str, Any]) -> str | None:
        """Return what a row becomes; None if it has texts, but none that tells. Raises DataError for unknown columns."""
        if "texts" in row and "images" in row:
            said = [one for one in row["texts"] or () if one is not None]
            return None if not said else "dialogue" if isinstance(said[0], dict) else "document"
        if "messages" in row or ("question" in row and "image" in row):
            return "dialogue"
        if "image" in row and "caption" in row:
            return "caption"
        raise DataError(
            f"The columns of {self.name} are {sorted(row)}; expected images and texts, messages and images, question and "
            "image with an answer, or image and caption. Rename the columns."
        )

    def entries(self, shard: Path | HubShard, number: int = 0, offset: int = 0) -> Iterator[Entry]:
        """Read rows, keyed `<file>:<row number from 1>`, images undecoded; lines of `*.jsonl` unparsed."""
        folder = shard.parent if isinstance(shard, Path) else Path()
        if isinstance(shard, Path) and shard.suffix == ".jsonl":
            # Not through `datasets`: its JSON reader ends at a broken line, and turns columns of mixed types into text.
            for entry in read_lines(shard, number, offset):
                yield entry._replace(payload=(folder, entry.payload))
            return
        try:
            # By batches of one: row by row, `datasets` would leave out what it takes for other data workers' rows.
            batches = _opened(shard).skip(number).iter(batch_size=1)
            for index, batch in enumerate(batches, start=number):
                row = {column: values[0] for column, values in batch.items()}
                yield Entry(index, 0, f"{shard.name}:{index + 1}", (folder, row))
        except (OSError, ValueError, TypeError, datasets.exceptions.DatasetGenerationError) as error:
            raise BadSample("unreadable data file", shard.name) from error

    def make_sample(
        self, key: str, payload: tuple[Path, dict[str, Any]], rng: random.Random, skip: Skip
    ) -> dict[str, Any]:
        """Return one sample."""
        folder, row = payload
        row = self._row(row, key)
        try:
            if "messages" in row:
                return self._chat(key, row, folder)
            if self.kind == "document":
                return self._document(key, row, folder, rng, skip)
            if "texts" in row:
                return self._rounds(key, row, folder)
            if "question" in row:
                return self._question(key, row, folder, rng)
            caption = "" if is_missing(row["caption"]) else self._clean(row["caption"], lower=True)
            if not caption:
                raise BadSample("image without caption", key)
            return caption_sample(
                key, caption, self._image(row["image"], folder, key), self.form, rng, self.image_token
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise BadSample("row of another layout", key) from error

    def _document(self, key: str, row: dict[str, Any], folder: Path, rng: random.Random, skip: Skip) -> dict[str, Any]:
        if isinstance(row["texts"], str) or isinstance(row["images"], str):
            raise TypeError("a text in place of a list")
        pieces: list[Any] = []
        for index, (image, text) in enumerate(zip(row["images"], row["texts"], strict=True)):
            if image is not None:
                try:
                    pieces.append(self._image(image, folder, f"{key}/{index}"))
                except BadSample as bad:
                    skip(bad.reason, bad.name)
            if text is not None:
                pieces.append(self._clean(text))
        if any(image is not None for image in row["images"]) and not any(isinstance(p, Image.Image) for p in pieces):
            raise BadSample("document without a readable image", key)
        places = [index for index, piece in enumerate(pieces) if isinstance(piece, Image.Image)]
        kept = set(keep_some(places, self.max_images, rng))
        pieces = [piece for index, piece in enumerate(pieces) if index in kept or isinstance(piece, str)]
        images = [piece for piece in pieces if isinstance(piece, Image.Image)]
        if not images:
            raise LeftOut("document without an image")
        text = " ".join(piece if isinstance(piece, str) else self.image_token for piece in pieces)
        return {"text": spaces_removed(text, self.image_token), "images": images, "id": key}

    def _rounds(self, key: str, row: dict[str, Any], folder: Path) -> dict[str, Any]:
        rounds = [(self._clean(turn["user"]), self._clean(turn["assistant"])) for turn in row["texts"]]
        if not rounds:
            raise BadSample("dialogue without a round", key)
        if not all(answer for _, answer in rounds):
            raise BadSample("question without answer", key)
        images = [self._image(image, folder, f"{key}/{index}") for index, image in enumerate(row["images"])]
        marks = self.image_token * len(images)
        spoken = [
            (around_images((marks if number == 0 else "") + user + "\n", self.image_token), answer)
            for number, (user, answer) in enumerate(rounds)
        ]
        return {"messages": dialogue(*spoken), "images": images, "mode": "image_to_text", "id": key}

    def _chat(self, key: str, row: dict[str, Any], folder: Path) -> dict[str, Any]:
        given = next((row[name] for name in ("images", "image") if row.get(name) not in (None, [])), [])
        given = given if isinstance(given, list) else [given]
        images = [self._image(image, folder, f"{key}/{index}") for index, image in enumerate(given)]
        messages = [{"role": turn["role"], "content": self._items(turn["content"])} for turn in row["messages"]]
        check_turns(messages, key)
        marked = sum(item["type"] == "image" for message in messages for item in message["content"])
        if not marked and images:  # TRL's rule: they stand before what the user says first
            first = next(message for message in messages if message["role"] == "user")
            first["content"] = [{"type": "image"}] * len(images) + first["content"]
        elif marked != len(images):
            raise BadSample("images and their places differ in number", key)
        drawn = any(i["type"] == "image" for m in messages if m["role"] == "assistant" for i in m["content"])
        return {
            "messages": messages,
            "images": images,
            "mode": "interleaved" if drawn else "image_to_text",
            "id": key,
        }

    def _items(self, said: Any) -> list[dict[str, Any]]:
        if isinstance(said, str):
            # the placeholder is a special token too: cleaned first, the text would lose its places
            said = around_images(said, self.image_token)
        pieces: list[Piece] = []
        for item in said:  # rows of one schema carry every key in every item
            if item["type"] == "image":
                pieces.append(IMAGE)
            elif pieces and pieces[-1] is not IMAGE:  # the chat template joins them, so they are cleaned as one
                pieces[-1] += item["text"]
            else:
                pieces.append(item["text"])
        return content(*(piece if piece is IMAGE else clean_text(piece, self.reserved) for piece in pieces))

    def _question(self, key: str, row: dict[str, Any], folder: Path, rng: random.Random) -> dict[str, Any]:
        given = next((row[name] for name in ANSWERS if read_answers(row.get(name))), None)
        answers = [answer for said in read_answers(given) if (answer := self._clean(said))]
        question, answer = self._clean(row["question"]), rng.choice(answers) if answers else None
        check_round(question, answer, key)
        return {
            "messages": question_messages(question, answer),
            "images": [self._image(row["image"], folder, key)],
            "mode": "image_to_text",
            "id": key,
        }

    def _clean(self, text: str, lower: bool = False) -> str:
        return clean_text(text, self.reserved, lower).strip()

    def _image(self, value: Any, folder: Path, name: str) -> Image.Image:
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value["path"]
        if isinstance(value, str):
            if "://" in value:
                raise BadSample("image is not on disk", name)
            value = folder / value
        return open_image(value, name)


def check_turns(messages: list[dict[str, Any]], key: str) -> None:
    """Refuse what the chat template would not take, and answers that say nothing."""
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] != "assistant" or "user" not in roles or set(roles) - {"system", "user", "assistant"}:
        raise BadSample("chat without a user's turn, without an answer at its end, or of other roles", key)
    if "system" in roles[1:]:
        raise BadSample("chat with a system's turn that is not its first", key)
    for message in messages:
        says = any(item["type"] == "image" or item["text"].strip() for item in message["content"])
        if message["role"] == "assistant" and not says:
            raise BadSample("question without answer", key)


def open_hub(data: str) -> list[HubShard]:
    """Return the files of `hub:<owner>/<name>[:<configuration>[:<split>]]`, split train by default."""
    name, configuration, split, *_ = *data.removeprefix(HUB).split(":"), None, None
    dataset = datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)
    return [HubShard(f"{name}/{index:05d}", index, dataset) for index in range(dataset.num_shards)]


def _opened(shard: Path | HubShard) -> datasets.IterableDataset:
    if isinstance(shard, Path):
        builder = BUILDERS[shard.suffix]
        dataset = datasets.load_dataset(builder, data_files=str(shard), split="train", streaming=True)
    else:
        dataset = shard.dataset.shard(num_shards=shard.dataset.num_shards, index=shard.index)
    return dataset.cast(_undecoded(dataset.features)) if dataset.features else dataset


def _undecoded(feature: Any) -> Any:
    """Return features in which images stay as they are stored, to be opened one by one."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return type(feature)({name: _undecoded(one) for name, one in feature.items()})
    if (inner := getattr(feature, "feature", None)) is not None:  # lists
        return replace(feature, feature=_undecoded(inner))
    return feature
