# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Generate: ask a model all samples of a benchmark that have no answer yet, alone or as one of several processes."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from tqdm import tqdm

from recipes.data.faults import BadSample, printable
from recipes.evaluation.answering import Answer, Answerer, Question
from recipes.evaluation.benchmark import Benchmark, Line, Loaded, Request, Sample, scored, stable_number
from recipes.evaluation.predictions import PredictionFile, check_manifest, digest, library_versions, read_lines

ReadImages = dict[str, tuple[Image.Image, str] | BadSample]


@dataclass(frozen=True)
class Job:
    """One benchmark to be asked.

    Attributes:
        samples: those that are asked, of `loaded`; fewer with a limit.
        folder: of its predictions and manifest.
        generation: options of `generate`.
    """

    benchmark: Benchmark
    loaded: Loaded
    samples: list[Sample]
    folder: Path
    protocol: str
    generation: dict[str, Any]
    limit: int = 0
    seed: int = 0
    without_images: bool = False

    def manifest(self, model: dict[str, Any]) -> dict[str, Any]:
        """Return all that decides the answers; `model` is what is known of the model."""
        files = {
            str(file.name if isinstance(file, Path) else file): {
                "sha256": digest(file) if isinstance(file, Path) else None,
                "rows": rows,
            }
            for file, rows in self.loaded.rows.items()
        }
        return {
            "benchmark": self.benchmark.name,
            "version": self.benchmark.version,
            "protocol": self.protocol,
            "without_images": self.without_images,
            "samples": len(self.samples),
            "samples_of_the_benchmark": len(self.loaded.samples),
            "limit": self.limit,
            "seed": self.seed,
            "generation": self.generation,
            "annotations": files,
            "notes": self.benchmark.notes(self.loaded),
            "model": model,
            "libraries": library_versions(),
        }


def process_state() -> PartialState:
    """Return which of how many processes this is, as `accelerate launch` started it."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU", not torch.accelerator.is_available()))


def generate(job: Job, answerer: Answerer, model: dict[str, Any], batch_size: int) -> list[Line]:
    """Ask what is not answered yet; return all lines in the order of the samples, also to the other processes.

    Args:
        model: of the manifest.
        batch_size: questions at a time.

    Raises:
        ValueError: the folder holds an evaluation of something else, or another run is in it.
    """
    state = process_state()
    file = PredictionFile(job.folder, state.process_index, state.num_processes)
    order = [sample.id for sample in job.samples]
    if not state.is_main_process:
        state.wait_for_everyone()
        return _generate(job, answerer, batch_size, file, order)
    check_manifest(job.folder, job.manifest(model))
    with file.alone():
        state.wait_for_everyone()
        return _generate(job, answerer, batch_size, file, order)


def _generate(job: Job, answerer: Answerer, batch_size: int, file: PredictionFile, order: Sequence[str]) -> list[Line]:
    """Do the share of one process."""
    state = process_state()
    with state.main_process_first():
        answered = {line["id"] for line in (file.join() if state.is_main_process else _read(file))}
    state.wait_for_everyone()  # nobody writes before all have read
    mine = [sample for sample in job.samples if _owner(sample, state.num_processes) == state.process_index]
    waiting = [sample for sample in mine if sample.id not in answered]
    progress = tqdm(
        total=len(mine), initial=len(mine) - len(waiting), desc=job.benchmark.name, disable=not state.is_main_process
    )
    with ThreadPoolExecutor(1) as reader:  # reads the next batch's images while this one is answered
        reading: Future[ReadImages] | None = None
        batches = _batches(waiting, batch_size)
        batch = next(batches, None)
        while batch is not None:
            images = read_images(job, batch) if reading is None else reading.result()
            coming = next(batches, None)
            reading = None if coming is None else reader.submit(read_images, job, coming)
            file.append(ask(job, answerer, batch, images))
            progress.update(len(batch))
            batch = coming
    progress.close()
    state.wait_for_everyone()
    if state.is_main_process:
        file.join(order)
    state.wait_for_everyone()
    return _read(file)


def _read(file: PredictionFile) -> list[Line]:
    return read_lines(file.whole)


def _owner(sample: Sample, processes: int) -> int:
    """Return the process that asks a sample: the same for all samples about one image."""
    return stable_number(0, sample.cluster or sample.id) % processes


def _batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Yield batches in which samples about one image stand beside each other."""
    first: dict[tuple[str, ...], int] = {}
    for number, sample in enumerate(samples):
        first.setdefault(tuple(image.name for image in sample.images), number)
    ordered = sorted(samples, key=lambda sample: first[tuple(image.name for image in sample.images)])
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def read_images(job: Job, batch: Sequence[Sample]) -> ReadImages:
    """Return the images of a batch by name, each with its SHA-256, or why it cannot be read."""
    read: ReadImages = {}
    for source in () if job.without_images else (source for sample in batch for source in sample.images):
        if source.name not in read:
            try:
                read[source.name] = source.read()
            except BadSample as error:
                read[source.name] = error
    return read


def ask(job: Job, answerer: Answerer, batch: Sequence[Sample], read: ReadImages) -> list[Line]:
    """Return the lines of a batch, scored; a sample that cannot be asked becomes a line with an `error`.

    Args:
        read: of `read_images`.
    """
    lines: list[Line] = []
    asked: list[tuple[Line, Question]] = []
    for sample in batch:
        line = _new_line(job, sample)
        lines.append(line)
        try:
            if sample.fault:
                raise BadSample("unusable row", sample.fault)
            asked.append((line, _question(job, answerer, sample, line, read)))
        except BadSample as error:
            line["error"] = printable(str(error))
    if asked:
        answers = answerer.answer([question for _, question in asked], **job.generation)
        for (line, _), answer in zip(asked, answers, strict=True):
            drawn = answer.more.get("drawn", [])
            more = {name: value for name, value in answer.more.items() if name != "drawn"}
            line |= {"raw": answer.raw, "token_ids": answer.token_ids, "images": drawn + line["images"]} | more
    return [scored(job.benchmark, line) for line in lines]


def _new_line(job: Job, sample: Sample) -> Line:
    return {
        "id": sample.id,
        "group": sample.group,
        "cluster": sample.cluster,
        "protocol": job.protocol,
        "asked": sample.asked,
        "prompt": None,
        "raw": "",
        "token_ids": [],
        "truth": sample.truth,
        "about": sample.about,
        "seed": stable_number(job.seed, sample.id),
        "images": [],
    }


def _question(job: Job, answerer: Answerer, sample: Sample, line: Line, read: ReadImages) -> Question:
    """Return what is asked; adds prompt and images to the line. Raises BadSample for an image that could not be read."""
    request: Request = job.benchmark.request(sample, job.protocol)
    if job.without_images:
        line["prompt"] = answerer.prompt(request.without_images())
        return Question(sample.id, line["prompt"], options=job.benchmark.options(sample))
    line["prompt"] = answerer.prompt(request)
    images = []
    for source in sample.images:
        found = read[source.name]
        if isinstance(found, BadSample):
            raise found
        images.append(found)
    line["images"] = [
        {"name": source.name, "sha256": sha, "file": str(source.where) if isinstance(source.where, Path) else None}
        for source, (_, sha) in zip(sample.images, images, strict=True)
    ]
    masks: tuple[Any, ...] = ()
    if any(source.segmentation is not None for source in sample.images):
        try:
            pairs = zip(sample.images, images, strict=True)
            masks = tuple(source.mask(image) for source, (image, _) in pairs)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise BadSample("broken mask", sample.id) from error
    names = tuple(sha for _, sha in images)
    shown = tuple(image for image, _ in images)
    return Question(sample.id, line["prompt"], shown, names, masks, job.benchmark.options(sample), sample.asked)


def _given(line: Line) -> tuple[Any, ...]:
    """Return what a model gave: words, and images by their content."""
    return line["token_ids"], line["raw"], [image["sha256"] for image in line["images"]]


def check_batching(job: Job, answerer: Answerer, lines: Sequence[Line], number: int) -> dict[str, Any]:
    """Ask some samples again, each alone and its images anew, and report where the answer differs.

    Args:
        number: how many; drawn by the seed.
    """
    alone = answerer.alone()
    known = {line["id"]: line for line in lines if not line.get("error")}
    by_chance = sorted(job.samples, key=lambda sample: stable_number(job.seed, f"check {sample.id}"))
    chosen = [sample for sample in by_chance if sample.id in known][:number]
    different = []
    for sample in chosen:
        (again,) = ask(job, alone, [sample], read_images(job, [sample]))
        before = known[sample.id]
        if _given(again) != _given(before):
            different.append({"id": sample.id, "in_batch": before["raw"], "alone": again["raw"]})
    return {"checked": len(chosen), "different": different}


__all__ = ["Answer", "Job", "ask", "check_batching", "generate"]
