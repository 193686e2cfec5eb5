# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""One arm of one seed, from the common start to its figures; `result.json` is written last and whole.

seed<k>/<arm>/model/, trained.json                              the arm's model, and how it was trained
seed<k>/<arm>/answers/<grade>/<benchmark>/predictions.jsonl     what it said to each question
seed<k>/<arm>/redrawn<grade>.npy                                uint8 (N, 64, 64, 3), from its tokens at fixed noise
seed<k>/<arm>/result.json                                       scores of each measure and grade, times, memory
"""

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor
from recipes.evaluation.answering import Answerer
from recipes.evaluation.benchmark import Loaded
from recipes.evaluation.benchmarks import benchmark_named
from recipes.evaluation.running import Job, generate
from recipes.generation.tasks import redraw_images
from recipes.study.dialogues import as_caption, dialogue_rows, image_row
from recipes.study.probes import CAPTIONED, OMITTED, Probe, label, tokens_of
from recipes.study.questions import BENCHMARKS, load_questions, scores_of
from recipes.study.settings import ARMS, EvidenceArguments
from recipes.study.start import image_sets, read_images
from recipes.study.training import (
    caption_rows,
    renew_projector,
    train_answers,
    train_arm,
    train_redrawing,
    training_arguments,
)
from recipes.synthetic.scenes import Scene
from recipes.whole_files import whole_file, write_whole

Scores = dict[str, dict[str, dict[str, list[Any]]]]  # measure -> grade -> "scores", "units"
REDRAWING_STEPS = 25
GENERATION = {"num_beams": 1, "max_new_tokens": 6, "do_sample": False}


def probe_scores(
    model: DeemForConditionalGeneration, processor: DeemProcessor, sets: dict[str, list[Scene]], start: Path
) -> Scores:
    """Return what linear probes tell of each attribute, by grade."""
    vectors = tokens_of(model, processor, read_images(start, "labelled")).flatten(1)
    scenes = sets["labelled"]
    probes = {one: Probe(vectors, [label(scene, one) for scene in scenes]) for one in (*CAPTIONED, *OMITTED)}
    found: Scores = {f"probe {one}": {} for one in probes}
    for name in (name for name in sets if name.startswith("tested")):
        vectors = tokens_of(model, processor, read_images(start, name)).flatten(1)
        for attribute, probe in probes.items():
            labels = [label(scene, attribute) for scene in sets[name]]
            units = [str(scene.index) for scene, one in zip(sets[name], labels, strict=True) if one is not None]
            if units:
                scores = {"scores": probe.scores(vectors, labels), "units": units}
                found[f"probe {attribute}"][name.removeprefix("tested")] = scores
    return found


def tune(
    model: DeemForConditionalGeneration,
    processor: DeemProcessor,
    scenes: list[Scene],
    folder: Path,
    arguments: EvidenceArguments,
    seed: int,
) -> list[dict[str, float]]:
    """Train the language side on labelled images: first full captions, by which all attributes are heard, then questions.

    Returns:
        The log of both.
    """
    count = arguments.answer_steps * arguments.answer_batch_size
    described = [image_row(scene, [as_caption(scene)]) | {"id": str(number)} for number, scene in enumerate(scenes)]
    asked = dialogue_rows(scenes, max(arguments.answer_batch_size, count))
    size = min(arguments.batch_size, len(described))
    stages = (
        (described, (arguments.describe_steps, size, arguments.describe_learning_rate)),
        (asked, (arguments.answer_steps, arguments.answer_batch_size, arguments.answer_learning_rate)),
    )
    log = []
    for rows, how in stages:
        log += train_answers(model, processor, rows, training_arguments(arguments, folder, seed, *how))
    return log


def answer_scores(
    model: DeemForConditionalGeneration,
    processor: DeemProcessor,
    sets: dict[str, list[Scene]],
    start: Path,
    folder: Path,
    arguments: EvidenceArguments,
) -> Scores:
    """Ask all questions of each grade; return what the answers are worth."""
    found: Scores = {}
    answerer = Answerer(model, processor, "deem", kept_images=400)
    for grade in arguments.grades:
        scenes = sets[f"tested{grade}"][: arguments.num_asked]
        for name in BENCHMARKS:
            questions = load_questions(start / "questions" / f"tested{grade}" / name, name, scenes)
            if not questions:  # the judge got no image wrong
                continue
            benchmark, loaded = benchmark_named(name), Loaded(questions, {})
            job = Job(benchmark, loaded, questions, folder / "answers" / str(grade) / name, "deem", GENERATION)
            lines = generate(job, answerer, {}, batch_size=100)
            for measure, (scores, units) in scores_of(name, lines).items():
                found.setdefault(measure, {})[str(grade)] = {"scores": scores, "units": units}
    return found


def write_redrawn(
    model: DeemForConditionalGeneration, processor: DeemProcessor, start: Path, folder: Path, grade: int, count: int
) -> None:
    """Redraw some tested images from their tokens, with the same noise in every arm."""
    images = read_images(start, f"tested{grade}")[:count]
    scheduler = model.image_decoder.make_scheduler("DDIMScheduler")
    drawn = redraw_images(model, processor, images, seed=1, num_inference_steps=REDRAWING_STEPS, scheduler=scheduler)
    with whole_file(folder / f"redrawn{grade}.npy") as unfinished, open(unfinished, "wb") as stream:
        np.save(stream, np.stack([np.asarray(image) for image in drawn]))


def peak_megabytes() -> float:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def run_arm(arguments: EvidenceArguments, seed: int, name: str) -> None:
    """Train and measure one arm, unless its result is there."""
    folder, start, arm = arguments.folder(seed, name), arguments.folder(seed, "start"), ARMS[name]
    if arguments.finished(seed, name):
        return
    torch.set_num_threads(1)
    shutil.rmtree(folder / "answers", ignore_errors=True)  # what a killed run left
    folder.mkdir(parents=True, exist_ok=True)
    sets, seconds, begun = image_sets(arguments, seed), {}, time.process_time()

    def lap(what: str) -> None:
        nonlocal begun
        seconds[what], begun = time.process_time() - begun, time.process_time()
        print(f"seed {seed} {name}: {what} {seconds[what]:.0f} s", flush=True)

    kept = folder / "trained.json"  # the model behind the training, from which a killed run goes on
    model = DeemForConditionalGeneration.from_pretrained(folder / "model" if kept.is_file() else start / "model")
    model.to(arguments.device)
    processor = AutoProcessor.from_pretrained(start / "model")
    images, latents = read_images(start, "train"), torch.load(start / "latents.pt")
    captions = [scene.caption("coarse") for scene in sets["train"]]
    rows = caption_rows(captions, images, arm.draws)
    lap("load")
    if not kept.is_file():
        trained = {"log": train_arm(model, processor, arm, rows, latents, arguments, folder / "run", seed)}
        lap("train")
        trained |= {"seconds": dict(seconds), "peak_megabytes": peak_megabytes()}
        model.save_pretrained(folder / "model")
        write_whole(kept, json.dumps(trained))
    trained = json.loads(kept.read_text(encoding="utf-8"))
    seconds |= trained["seconds"]
    scores = probe_scores(model, processor, sets, start)
    lap("probe")
    tokens = tokens_of(model, processor, images)
    # "confounded_a" trains its denoiser: the tokens of every arm are redrawn by the one that all began with
    begun_with = DeemForConditionalGeneration.from_pretrained(start / "model").image_decoder
    model.image_decoder.load_state_dict(begun_with.state_dict())
    count = (arguments.redraw_steps, arguments.batch_size, seed)
    redrawing = train_redrawing(model, tokens, latents, *count)
    for grade in sorted({0, 2} & set(arguments.grades)):
        write_redrawn(model, processor, start, folder, grade, arguments.num_redrawn)
    lap("redraw")
    answer_log = []
    if name in arguments.asked_arms:
        renew_projector(model, tokens, seed)
        answer_log = tune(model, processor, sets["labelled"], folder / "run", arguments, seed)
        lap("tune")
        scores |= answer_scores(model, processor, sets, start, folder, arguments)
        lap("ask")
    result = {"seed": seed, "arm": name, "scores": scores, "redrawing_loss": redrawing, "seconds": seconds}
    result |= {"peak_megabytes": trained["peak_megabytes"], "log": trained["log"], "answer_log": answer_log}
    write_whole(folder / "result.json", json.dumps(result))
