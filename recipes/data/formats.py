# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Which reader reads which files: told by a file's name and, where that is not enough, by what stands in its beginning."""

import glob
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.readers import (
    caption_files,
    conversations,
    grounding,
    image_folders,
    question_files,
    region_dialogues,
    regions,
    rows,
)
from recipes.data.readers.captions import CaptionReader
from recipes.data.readers.images import IMAGE_SUFFIXES
from recipes.data.readers.interleaved import InterleavedReader, find_image_folder
from recipes.data.readers.questions import QuestionReader
from recipes.data.readers.reader import Reader
from recipes.data.readers.row_layouts import layout_of
from recipes.data.readers.tars import TEXT_SUFFIXES

_SPLIT = re.compile(r"(?<![a-z])(train|val|test|dev)")  # validation, testdev, train2014, ...
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".tar", ".zip", ".xml", ".p", ".pkl")
HEAD = 65536  # bytes of a file that are looked at
LINES, MAX_LINE = 20, 2**26  # lines, bytes of each
# What `datasets` writes beside rows.
_NO_DATA = re.compile(r"dataset_info\.json|dataset_dict\.json|state\.json|cache-.*\.arrow")


@dataclass(frozen=True)
class Format:
    """One kind of files.

    Attributes:
        family: its name.
        what: how people know it.
        pattern: of the file's whole name, any case.
        reader: makes the reader from files and options.
        marker: text that must stand in the file's beginning.
        check: what else must hold of the file.
    """

    family: str
    what: str
    pattern: str
    reader: Callable[..., Reader]
    marker: bytes = b""
    check: Callable[[Path], bool] | None = None

    def fits(self, file: Path) -> bool:
        """Return whether a file is of this format."""
        if not re.fullmatch(self.pattern, file.name, re.IGNORECASE):
            return False
        if self.marker and self.marker not in _head(file, self.marker):
            return False
        return self.check is None or self.check(file)


def has_known_columns(file: Path) -> bool:
    """Return whether the header of a table, or one of the first lines of JSON, tells what the rows are. True for a file
    that cannot be read: its reader will report it."""
    try:
        if file.suffix.lower() in rows.TABLES:
            return layout_of(dict.fromkeys(rows.read_header(file)[0])) is not None
        with open(file, "rb") as lines:
            first = [line for _ in range(LINES) if (line := lines.readline(MAX_LINE)).strip()]
    except OSError:
        return True
    for line in first:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and layout_of(row) is not None:
            return True
    return False


def holds_lists(file: Path) -> bool:
    """Return whether a JSON file is a list of lists."""
    try:
        with open(file, "rb") as stream:
            return re.match(rb"\s*\[\s*\[", stream.read(HEAD)) is not None
    except OSError:
        return False


def _interleaved(files: list[Path], **options: Any) -> InterleavedReader:
    return InterleavedReader(files, find_image_folder(files[0]), **options)


_JSONL = r".*\.jsonl(\.zip)?"
_JSON = r".*\.json"
IMAGE_FOLDER = "imagefolder"
# The first that fits.
FORMATS = (
    Format("captions", "WebDataset caption tars (*.tar)", r".*\.tar", CaptionReader),
    Format("interleaved", "MMC4 (*.jsonl, *.jsonl.zip with text_list)", _JSONL, _interleaved, b'"text_list"'),
    Format("vcr", "VCR (*.jsonl with metadata_fn)", _JSONL, region_dialogues.VcrReader, b'"metadata_fn"'),
    Format(
        "narratives",
        "Localized Narratives (*.jsonl with annotator_id)",
        _JSONL,
        caption_files.NarrativeReader,
        b'"annotator_id"',
    ),
    Format(
        "rows",
        "rows of chats, questions or captions (*.jsonl, *.csv, *.tsv; imagefolder's metadata)",
        r".*\.(jsonl|csv|tsv)",
        rows.DatasetReader,
        check=has_known_columns,
    ),
    Format("rows", "rows of datasets (*.parquet, *.arrow)", r".*\.(parquet|arrow)", rows.DatasetReader),
    Format(
        "gqa", "GQA (train_balanced_questions.json)", r"\w+_(balanced|all)_questions.*\.json", question_files.GqaReader
    ),
    Format(
        "easy_vqa", "Easy-VQA (questions.json)", r"questions\.json", question_files.EasyVqaReader, check=holds_lists
    ),
    Format(
        "questions", "VQAv2, OK-VQA (*_questions.json with *_annotations.json)", r".*questions\.json", QuestionReader
    ),
    Format("textvqa", "TextVQA (TextVQA_*.json)", r"TextVQA_.*\.json", question_files.TextVqaReader),
    Format("aokvqa", "A-OKVQA (aokvqa_*.json)", r"aokvqa_.*\.json", question_files.AokVqaReader),
    Format("ocrvqa", "OCR-VQA (dataset.json)", r"dataset\.json", question_files.OcrVqaReader, b'"imageURL"'),
    Format(
        "karpathy", "COCO captions (coco_karpathy_*.json)", r"coco_karpathy_.*\.json", caption_files.KarpathyReader
    ),
    Format("flickr30k", "Flickr30k (groundedcaption.json)", r"groundedcaption\.json", caption_files.Flickr30kReader),
    Format("textcaps", "TextCaps (TextCaps_*.json)", r"TextCaps_.*\.json", caption_files.TextCapsReader),
    Format(
        "paragraphs", "Image2Paragraph (paragraphs_coco.json)", r"paragraphs_coco\.json", caption_files.ParagraphReader
    ),
    Format("refcoco", "RefCOCO/+/g (refs(*).p, instances.json beside)", r"refs.*\.(p|json)", grounding.RefCocoReader),
    Format(
        "vg", "Visual Genome (region_descriptions.json)", r"region_descriptions\.json", grounding.VisualGenomeReader
    ),
    Format(
        "regions",
        "region masks (instances_*.json, *_with_mask.json, partImagenet*.json, pascalpart*.json)",
        r"instances_.*\.json|.*_with_mask\.json|partimagenet.*\.json|pascal_?part.*\.json",
        regions.RegionReader,
    ),
    Format("osprey", "Osprey-724K (*.json with annotation)", _JSON, region_dialogues.OspreyReader, b'"annotation"'),
    Format("llava", "LLaVA (*.json with conversations)", _JSON, conversations.LlavaReader, b'"conversations"'),
    # Images lie beside the annotations of most formats, so this one counts where there is no other.
    Format(
        IMAGE_FOLDER,
        "folders of images (sub-folders named by what they show, or *.txt beside)",
        rf".*\.({'|'.join(IMAGE_SUFFIXES)})",
        image_folders.ImageFolderReader,
    ),
)
READERS = {format.family: format.reader for format in FORMATS}
WHAT = f"{', '.join(format.what for format in FORMATS)}, or a dataset of the Hub (hub:<owner>/<name>)"


def find_files(data: str) -> tuple[str, list[Path] | list[rows.HubShard]]:
    """Find what a folder, file or glob holds, or the files of a dataset on the Hub.

    Returns:
        The family (of `FORMATS`) and its files, sorted.

    Raises:
        ValueError: if nothing is there, nothing is of a known format, or several formats are mixed.
    """
    if data.startswith(rows.HUB):
        return "rows", rows.open_hub(data)
    path = Path(data).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    elif path.is_file():  # a name may hold what a glob takes for a pattern
        files = [path]
    else:
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
        if not files:
            raise ValueError(
                f"No data at {data!r} (no such folder, and no file matches it from {Path.cwd()}). Expected a folder, "
                f"file or glob of {WHAT}."
            )
    families: dict[str, list[Path]] = {}
    others = []
    for file in sorted(files):
        if _NO_DATA.fullmatch(file.name):
            continue
        if (format := next((format for format in FORMATS if format.fits(file)), None)) is not None:
            families.setdefault(format.family, []).append(file)
        elif file.suffix.lower() in DATA_SUFFIXES:
            others.append(file)
    if len(families) > 1:
        families.pop(IMAGE_FOLDER, None)
    if not families and len(files) == 1 and files[0].suffix.lower() in (".jsonl", *rows.TABLES):
        families["rows"] = files  # its reader will tell the columns
    if not families:
        raise ValueError(f"Nothing usable among the {len(files)} files of {data!r}. Expected {WHAT}.")
    if len(families) > 1:
        found = "; ".join(f"{family} in {found[0].parent}" for family, found in families.items())
        raise ValueError(f"{data!r} holds several formats ({found}). Give each as a source of its own.")
    ((family, files),) = families.items()
    if family == "refcoco":
        files = _one_split_by(files)
    root = path if path.is_dir() else None
    if family == IMAGE_FOLDER:
        _check_images(data, files, root, others)
        return family, files
    splits = {split: file for file in reversed(files) if (split := _split(file, root))}
    if len(splits) > 1:
        names = ", ".join(str(file.relative_to(root) if root else file.name) for file in splits.values())
        raise ValueError(f"{data!r} holds files of several splits ({names}). Name the file, or give a glob.")
    return family, files


def _split(file: Path, root: Path | None) -> str | None:
    """Return the split that a file's name tells, else that of the nearest folder below `root`."""
    names = reversed(file.relative_to(root).parts) if root else (file.name,)
    return next((match[1] for name in names if (match := _SPLIT.search(name.lower()))), None)


def _check_images(data: str, files: list[Path], root: Path | None, others: list[Path]) -> None:
    """Refuse several splits side by side (deeper folders, and names of files, say what an image shows), images of which
    nothing says what they show, and images beside data (`others`) that may say it, in a format that is not known.

    Raises:
        ValueError: as said.
    """
    below = {file.relative_to(root).parts[0] for file in files if file.parent != root} if root is not None else set()
    if len(splits := sorted(name for name in below if image_folders.is_split(name))) > 1:
        raise ValueError(f"{data!r} holds images of several splits ({', '.join(splits)}). Name the folder.")
    beside = {file.with_suffix("") for file in files}
    if unknown := [file for file in others if file.with_suffix("") not in beside]:
        raise ValueError(
            f"Nothing usable among the files of {data!r} but images, and {unknown[0].name} may say what they show. Expected "
            f"{WHAT}. Convert or remove it."
        )
    if len({file.parent for file in files}) == 1 and not any(
        file.with_suffix(f".{suffix}").is_file() for file in files for suffix in TEXT_SUFFIXES
    ):
        raise ValueError(
            f"Nothing usable among the images of {data!r}: nothing says what they show. Write a .txt beside each, a "
            "metadata.jsonl of file_name and text, or put them into sub-folders named by what they show."
        )


def _one_split_by(files: list[Path]) -> list[Path]:
    """Choose one file of each folder's refs: they hold the same expressions, split in different ways.

    Raises:
        ValueError: if neither `refs(unc)` nor `refs(umd)` is among several.
    """
    chosen = []
    for folder in dict.fromkeys(file.parent for file in files):
        by_stem = {file.stem: file for file in files if file.parent == folder}  # a pickle comes after its JSON
        stem = next((stem for stem in ("refs(unc)", "refs(umd)") if stem in by_stem), None)
        if stem is None and len(by_stem) > 1:
            raise ValueError(f"{folder} holds several refs ({', '.join(sorted(by_stem))}). Name the file.")
        chosen.append(by_stem[stem] if stem else next(iter(by_stem.values())))
    return chosen


def _head(file: Path, marker: bytes) -> bytes:
    """Return the beginning of a file, or `marker` if it cannot be read: its name fits, so its reader will report it."""
    try:
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive, archive.open(archive.namelist()[0]) as lines:
                return lines.read(HEAD)
        with open(file, "rb") as lines:
            return lines.read(HEAD)
    # RuntimeError and NotImplementedError: an encrypted zip, a compression that is not known
    except (OSError, IndexError, RuntimeError, EOFError, zipfile.BadZipFile, zipfile.zlib.error):
        return marker
