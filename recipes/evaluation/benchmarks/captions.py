# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Captions: COCO (Karpathy's test split), NoCaps by domain, Flickr30k, TextCaps; paragraphs: Image2Paragraph.

Files, told by their content: BLIP's list of {image, caption: [...]}, COCO's {images, annotations}, Karpathy's {images:
[{split, sentences}]}, TextCaps' {data}; or rows of `datasets` with `image` and captions. All references count; figures
named `single_reference_` are of the released rule, one reference an image, drawn at random.

Words are those of the PTB-like tokenizer in `scoring`; CIDEr is CIDEr-D, with document frequencies of the captions
evaluated. METEOR needs Java and pycocoevalcap; a note says so where they are not there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.samples import IMAGE
from recipes.evaluation.benchmark import (
    Benchmark,
    Figure,
    Figures,
    ImageSource,
    Line,
    Loaded,
    Request,
    Sample,
    stable_number,
)
from recipes.evaluation.benchmarks.files import make_samples, read_json, text_of
from recipes.evaluation.benchmarks.shares import figure_of, share_figure
from recipes.evaluation.scoring.captions import bleu_counts, bleu_figure, cider_d, meteor, meteor_missing, rouge_l
from recipes.evaluation.scoring.coco_words import COCO_WORDS
from recipes.evaluation.scoring.hallucination import chair_counts, named_objects, read_synonyms
from recipes.evaluation.scoring.intervals import bootstrap_interval, mean_interval
from recipes.evaluation.sources import DataSource, ImageFolders
from recipes.prompts import CAPTION_BEGIN, DESCRIBE_REQUEST

STANDARD_REQUEST = "\nProvide a one-sentence caption for the provided image."  # as lmms-eval has it
MOST_CIDER = 10.0
CAPTION_COLUMNS = ("captions", "caption", "annotations_captions", "reference_strs", "answer", "caption_str")
DOMAINS = ("in-domain", "near-domain", "out-domain")


class Captions(Benchmark):
    """One set of captioned images.

    Args:
        patterns: of its annotation file.
        folders: that its images lie in.
    """

    headline = "cider"
    generation = {
        "deem": {
            "num_beams": 5,
            "max_new_tokens": 20,
            "min_new_tokens": 8,
            "length_penalty": 1.0,
            "do_sample": False,
        },
        "standard": {"num_beams": 1, "max_new_tokens": 64, "do_sample": False},
    }

    def __init__(self, name: str, patterns: tuple[str, ...], folders: tuple[str, ...]) -> None:
        self.name, self.patterns, self.folders = name, patterns, folders

    def load(self, source: DataSource) -> Loaded:
        """Read each image with all its captions."""
        if source.find(*self.patterns) is None and (found := source.rows()):
            return Loaded(make_samples(found[0], _of_row, ""), found[1])
        file = source.need(*self.patterns)
        folders = ImageFolders(file.parent, *self.folders, "", "images")
        rows = list(captioned_images(file))

        def sample(number: int, row: Any) -> Sample:
            image, captions, group = row
            captions = [text_of(caption) for caption in captions]
            if not captions:
                raise ValueError("an image without captions")
            where = ImageSource(image, folders.find(image, Path(image).name))
            return Sample(image, (where,), "", captions, image, group)

        return Loaded(make_samples(rows, sample, "row"), {file: len(rows)})

    def request(self, sample: Sample, protocol: str) -> Request:
        """The released request, or that of lmms-eval."""
        if protocol == "deem":
            return Request((IMAGE, f" {DESCRIBE_REQUEST} "), f" {CAPTION_BEGIN}")
        return Request((IMAGE, STANDARD_REQUEST))

    def parse(self, raw: str, line: Line) -> str:
        """The caption on one line."""
        return " ".join(raw.split())

    def score(self, parsed: str, line: Line) -> float:
        """ROUGE-L, which one image has of its own."""
        return rouge_l([parsed], [line["truth"]]).corpus if line["truth"] else 0.0

    def scores(self, lines: Sequence[Line]) -> list[float]:
        """CIDEr-D of each image."""
        return cider_d(*_texts(lines)).per_image.tolist()

    def figures(self, lines: Sequence[Line]) -> Figures:
        """All metrics over all images, CIDEr and BLEU-4 of each domain, and by one reference."""
        figures = _metrics("", lines)
        if meteor_missing() is None:
            figures["meteor"] = Figure(meteor(*_texts(lines)).corpus, count=len(lines))
        groups = [name for name in sorted({line["group"] for line in lines}) if name]
        for name in groups:
            figures |= _metrics(f"{name} ", [line for line in lines if line["group"] == name], ("cider", "bleu_4"))
        figures["empty"] = share_figure([not line["parsed"] for line in lines], [line["cluster"] for line in lines])
        return figures | _metrics("single_reference_", list(map(_one_reference, lines)), ("cider", "bleu_4"))

    def notes(self, loaded: Loaded) -> list[str]:
        """Say why METEOR is not among the figures."""
        return [f"meteor not computed: {reason}"] if (reason := meteor_missing()) else []


def _texts(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return captions and references; a failed image has an empty caption, one without references one of no word."""
    return [line["parsed"] or "" for line in lines], [line["truth"] or ["-"] for line in lines]


def _metrics(prefix: str, lines: Sequence[Line], only: Sequence[str] = ()) -> Figures:
    texts, clusters = _texts(lines), [line["cluster"] for line in lines]
    figures: Figures = {}
    make: dict[str, Callable[[], Figure]] = {
        "cider": lambda: figure_of(mean_interval(cider_d(*texts).per_image.tolist(), clusters, (0.0, MOST_CIDER))),
        "rouge_l": lambda: share_figure(rouge_l(*texts).per_image.tolist(), clusters),
    }
    counts = bleu_counts(*texts)
    for order in range(4, 0, -1):
        make[f"bleu_{order}"] = lambda order=order: figure_of(
            bootstrap_interval(counts, bleu_figure(order), clusters)  # type: ignore[misc]
        )
    for name, figure in make.items():
        if not only or name in only:
            figures[f"{prefix}{name}"] = figure()
    return figures


def _one_reference(line: Line) -> Line:
    truth = line["truth"] or ["-"]
    return line | {"truth": [truth[stable_number(0, f"reference {line['id']}") % len(truth)]]}


def captioned_images(file: Path) -> Iterator[tuple[str, list[Any], str]]:
    """Yield image, captions and domain from any of the layouts."""
    read = read_json(file)
    if isinstance(read, list):
        yield from ((row["image"], _listed(row["caption"]), "") for row in read)
    elif "data" in read:
        captions: dict[str, list[Any]] = {}
        for row in read["data"]:
            captions.setdefault(f"{row['image_id']}.jpg", []).append(row["caption_str"])
        yield from ((image, said, "") for image, said in captions.items())
    elif "annotations" in read:
        by_image: dict[Any, list[Any]] = {}
        for row in read["annotations"]:
            by_image.setdefault(row["image_id"], []).append(row["caption"])
        for row in read["images"]:
            yield row["file_name"], by_image.get(row["id"], []), row.get("domain") or ""
    else:
        for row in read["images"]:
            if row.get("split") == "test":
                image = "/".join(part for part in (row.get("filepath"), row["filename"]) if part)
                yield image, [sentence["raw"] for sentence in row["sentences"]], ""


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _of_row(number: int, row: Any) -> Sample:
    captions = next(row[name] for name in CAPTION_COLUMNS if row.get(name))
    names = ("file_name", "filename", "image_id", "img_id", "question_id")
    image = str(next((row[name] for name in names if row.get(name)), f"row {number}"))
    group = str(row.get("domain") or "")
    truth = [text_of(caption) for caption in _listed(captions)]
    return Sample(f"{number}/{image}", (ImageSource(image, row["image"]),), "", truth, image, group)


class Paragraphs(Captions):
    """Image2Paragraph: `paragraphs_coco.json` and `test_split.json` (or `val_split.json`, which the release takes); without
    either, the images that are not in `train_split.json`."""

    generation = {
        "deem": {
            "num_beams": 5,
            "max_new_tokens": 90,
            "min_new_tokens": 90,
            "length_penalty": 1.0,
            "repetition_penalty": 1.2,
            "do_sample": False,
        },
        "standard": {"num_beams": 1, "max_new_tokens": 128, "do_sample": False},
    }

    def __init__(self) -> None:
        super().__init__("image2paragraph", ("paragraphs_coco.json", "paragraphs*.json"), ())

    def load(self, source: DataSource) -> Loaded:
        """Read each image of the split with its paragraph."""
        file = source.need(*self.patterns)
        folders = ImageFolders(file.parent, "VG_100K", "VG_100K_2", "images", "")
        splits = {name: file.with_name(f"{name}_split.json") for name in ("test", "val", "train")}
        split = next((name for name in splits if splits[name].is_file()), None)
        chosen = set(read_json(splits[split])) if split else set()
        read = read_json(file)
        rows = [
            row
            for row in (read["annotations"] if isinstance(read, dict) else read)
            if split is None or (row["image_id"] in chosen) != (split == "train")
        ]

        def sample(number: int, row: Any) -> Sample:
            image = text_of(row["url"]).rsplit("/", 1)[-1]
            paragraph = text_of(row.get("caption") or row["paragraph"])
            return Sample(str(row["image_id"]), (ImageSource(image, folders.find(image)),), "", [paragraph], image)

        files: dict[Path | str, int] = {file: len(rows)}
        return Loaded(make_samples(rows, sample, "row"), files | ({splits[split]: len(chosen)} if split else {}))

    def request(self, sample: Sample, protocol: str) -> Request:
        """The released request and beginning, or a request alone."""
        if protocol == "deem":
            return Request((IMAGE, " Please describe the image in detail. "), " The image depicts ")
        return Request((IMAGE, "\nDescribe the image in a paragraph."))


class CocoCaptions(Captions):
    """COCO's captions, with CHAIR where the objects of the images are known.

    Beside the captions: `instances_val2014.json` (and `instances_train2014.json`), and optionally CHAIR's `synonyms.txt`;
    without the latter the words are those of `scoring/coco_words.py`. Objects that the reference captions name count as
    true, as in the official figures.
    """

    def load(self, source: DataSource) -> Loaded:
        """Read each image with its captions and the objects in it."""
        loaded = super().load(source)
        files = [file for name in INSTANCES if (file := source.find(name, f"annotations/{name}"))]
        if not files:
            return loaded
        objects, categories = _objects_of(files)
        given = source.find("synonyms.txt", "annotations/synonyms.txt")
        others = sorted(categories - set(read_synonyms(COCO_WORDS).values()))
        words = {"synonyms": str(given) if given else None, "other_categories": others}
        samples = [
            replace(sample, about=sample.about | words | {"objects": objects.get(Path(sample.images[0].name).name)})
            if sample.images
            else sample
            for sample in loaded.samples
        ]
        rows = {file: len(objects) for file in files} | ({given: 1} if given else {})
        return Loaded(samples, loaded.rows | rows)

    def figures(self, lines: Sequence[Line]) -> Figures:
        """All metrics of captions, and CHAIR over the images whose objects are known."""
        known = [line for line in lines if line["about"].get("objects") is not None]
        return super().figures(lines) | (chair_figures(known) if known else {})

    def notes(self, loaded: Loaded) -> list[str]:
        """Say what is not among the figures, and whose words CHAIR goes by."""
        found = super().notes(loaded)
        known = [sample.about for sample in loaded.samples if sample.about.get("objects") is not None]
        if not known:
            return [
                *found,
                f"chair not computed: no {' or '.join(INSTANCES)} that knows these images beside the captions",
            ]
        whose = "CHAIR's synonyms.txt" if known[0]["synonyms"] else "the package's own, without CHAIR's synonyms.txt"
        return [*found, f"chair: objects of {len(known)} of {len(loaded.samples)} images are known; words: {whose}"]


def chair_figures(lines: Sequence[Line]) -> Figures:
    """Return CHAIR of lines whose `about` holds the objects of their images.

    Raises:
        ValueError: the file of synonyms that was given is not there any more.
    """
    about = lines[0]["about"]
    given = Path(about["synonyms"]) if about["synonyms"] else None
    if given and not given.is_file():
        raise ValueError(f"CHAIR's words, {given}, are not there any more. Put the file back, and score again.")
    words = read_synonyms(given.read_text(encoding="utf-8") if given else COCO_WORDS)
    words |= {name: name for name in about["other_categories"] if name not in words}
    truths = []
    for line in lines:
        objects = [words.get(name, name) for name in line["about"]["objects"]]
        truths.append([*objects, *(name for text in line["truth"] for name in named_objects(text, words))])
    counts = chair_counts([line["parsed"] or "" for line in lines], truths, words)
    counts[[bool(line.get("error")) for line in lines], :4] = 1  # a failed image counts as a caption that invents
    clusters = [line["cluster"] for line in lines]

    def share(over: int, under: int) -> Figure:
        def figure(sums: Any) -> Any:
            return sums[:, over] / np.maximum(sums[:, under], 1)

        return figure_of(bootstrap_interval(counts, figure, clusters))

    return {
        "chair_s": share_figure(counts[:, 2].tolist(), clusters),
        "chair_i": share(0, 1),
        "chair_recall": share(4, 5),
    }


def _objects_of(files: Sequence[Path]) -> tuple[dict[str, list[str]], set[str]]:
    """Return the objects in each image by its file's name, and all categories, of files in COCO's form."""
    objects: dict[str, list[str]] = {}
    every: set[str] = set()
    for file in files:
        read = read_json(file)
        try:
            categories = {row["id"]: row["name"].lower() for row in read["categories"]}
            names = {row["id"]: Path(row["file_name"]).name for row in read["images"]}
            found: dict[str, set[str]] = {name: set() for name in names.values()}
            for row in read["annotations"]:
                found[names[row["image_id"]]].add(categories[row["category_id"]])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is no annotation in COCO's form (images, categories, annotations with image_id and category_id): "
                f"{type(error).__name__} {error}."
            ) from error
        objects |= {name: sorted(kinds) for name, kinds in found.items()}
        every |= set(categories.values())
    return objects, every


INSTANCES = ("instances_val2014.json", "instances_train2014.json")
COCO_NAMES = ("coco_karpathy_test.json", "annotations/coco_karpathy_test.json", "dataset_coco.json")
SETS = (
    CocoCaptions("coco", COCO_NAMES, ("val2014", "train2014")),
    Captions("nocaps", ("nocaps_val_4500_captions.json", "nocaps_val*.json"), ("validation", "val")),
    Captions(
        "flickr30k", ("flickr30k_test1k.json", "flickr30k_test*.json", "dataset_flickr30k.json"), ("flickr30k-images",)
    ),
    Captions("textcaps", ("TextCaps_0.1_val.json",), ("train_images",)),
    Paragraphs(),
)
