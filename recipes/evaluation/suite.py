# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Several benchmarks, one after the other: find the data, ask the model, score, write the page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.evaluation.benchmark import Benchmark, Loaded, Sample, distinct, some_clusters
from recipes.evaluation.benchmarks import BENCHMARKS, benchmark_named
from recipes.evaluation.distances import extract
from recipes.evaluation.extractors import load_extractors
from recipes.evaluation.page import write_page
from recipes.evaluation.results import CHECKED, RESULTS, evaluated, format_results, load_lines, score
from recipes.evaluation.running import Job, check_batching, generate, process_state
from recipes.evaluation.sources import DataSource
from recipes.evaluation.subjects import Subjects
from recipes.generation.checkpoint import DRAWING_STEPS
from recipes.whole_files import write_whole

WORLD = "world"


@dataclass
class SuiteArguments:
    """Options of an evaluation on benchmarks."""

    model: str = field(default="runs/demo/sft", metadata={"help": "Checkpoint folder or Hub id."})
    out: str = field(default="outputs/evaluate", metadata={"help": "Folder for all that is written."})
    batch_size: int = field(default=50, metadata={"help": "Images or questions at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of all that is drawn at random."})
    benchmarks: list[str] = field(
        default_factory=list, metadata={"help": f"Any of {', '.join(BENCHMARKS)}, {WORLD}; without it, the world."}
    )
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folder of the benchmarks' files, and NAME=FOLDER or NAME=hub:<owner>/<name> for single ones."
        },
    )
    protocol: str | None = field(
        default=None,
        metadata={"help": "Prompts and parsing: deem (the released ones) or standard; by default deem for a DEEM."},
    )
    limit: int = field(
        default=0, metadata={"help": "At least so many samples per benchmark, drawn in whole images or pairs; 0: all."}
    )
    without_images: bool = field(default=False, metadata={"help": "Ask without the images, as a control."})
    encode_once: bool = field(
        default=True, metadata={"help": "Encode an image once for all questions about it (models of type deem)."}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "Encoder that replaces the vision tower of a two-tower model (mmvp_vlm)."}
    )
    extractors: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Features of drawings, NAME=WHERE each: a file of Inception's weights (FID), an encoder or two-tower "
            "model of transformers, or module:function."
        },
    )
    drawings_per_caption: int = field(
        default=1, metadata={"help": "Drawings of a caption, of which --rank_by keeps one."}
    )
    rank_by: str | None = field(default=None, metadata={"help": "Two-tower model that chooses among drawings."})
    num_inference_steps: int = field(
        default=DRAWING_STEPS,
        metadata={"help": "Denoising steps of an image; give more with a scheduler that adds noise."},
    )
    guidance_scale: float = field(default=3.5, metadata={"help": "Classifier-free guidance of drawn images."})
    scheduler: str | None = field(
        default=None,
        metadata={"help": "Class name of a diffusers scheduler; DDIM, or the model's own for flow matching."},
    )
    num_beams: int | None = field(default=None, metadata={"help": "Instead of the protocol's number of beams."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Instead of the protocol's longest answer."})
    do_sample: bool = field(default=False, metadata={"help": "Draw answers at random, each by its sample's seed."})
    temperature: float = field(default=1.0, metadata={"help": "Of answers drawn at random."})
    check_batching: int = field(
        default=0, metadata={"help": "Ask so many samples again, each alone, and report where the answer differs."}
    )
    dtype: str = field(default="auto", metadata={"help": "Of the model: auto (as saved), float32, bfloat16, ..."})
    score: str | None = field(
        default=None, metadata={"help": "Folder of saved predictions to score and report, without any model."}
    )


def data_sources(given: Sequence[str], names: Sequence[str]) -> dict[str, DataSource]:
    """Return where the data of each benchmark is: `NAME=WHERE` for one of them, else the value without a name.

    Raises:
        ValueError: a name is no benchmark asked for, or there is no data for one.
    """
    own = dict(value.split("=", 1) for value in given if "=" in value and "/" not in value.split("=", 1)[0])
    common = [value for value in given if value.split("=", 1)[0] not in own]
    if unknown := sorted(set(own) - set(names)):
        raise ValueError(f"--data names {unknown}, which are none of the benchmarks asked for: {', '.join(names)}.")
    if len(common) > 1 or (not common and set(names) - set(own)):
        raise ValueError(
            f"--data takes one folder for all benchmarks and NAME=FOLDER for single ones; got {list(given)} for "
            f"{', '.join(names)}."
        )
    return {name: DataSource(name, own.get(name) or common[0]) for name in names}


def run_suite(arguments: SuiteArguments) -> dict[str, dict[str, Any]]:
    """Ask, score and report the benchmarks; return the results, to the main process alone."""
    names = [name for name in arguments.benchmarks if name != WORLD]
    sources = data_sources(arguments.data, names)
    found = [
        _read(name, sources[name], arguments) for name in names
    ]  # all that can be missing, before anything is asked
    state = process_state()
    subjects = Subjects(arguments, state.device, names_files=state.is_main_process)  # which alone compares them
    for benchmark, loaded, _ in found:
        for note in benchmark.notes(loaded) if state.is_main_process else ():
            print(f"{benchmark.name}: {note}")
        _check(benchmark, subjects.of(benchmark.asks)[0])
    for benchmark, loaded, samples in found:
        subject, protocol, about = subjects.of(benchmark.asks)
        job = Job(
            benchmark,
            loaded,
            samples,
            Path(arguments.out, benchmark.name),
            protocol,
            _generation(benchmark, protocol, arguments),
            arguments.limit,
            arguments.seed,
            arguments.without_images,
        )
        if benchmark.asks == "drawing":
            subject.folder = job.folder
        lines = generate(job, subject, about, arguments.batch_size)
        if arguments.check_batching and state.is_main_process:
            checked = check_batching(job, subject, lines, arguments.check_batching)
            write_whole(job.folder / CHECKED, json.dumps(checked, indent=1))
    if not state.is_main_process:
        return {}
    take_features(arguments, Path(arguments.out), names)
    return score_and_report(Path(arguments.out), names, sources)


def take_features(arguments: SuiteArguments, out: Path, names: Sequence[str] = ()) -> None:
    """Take the features of drawings in a folder by each of `--extractors`.

    Raises:
        ValueError: an extractor or a drawing is not there, or there are no drawings at all.
    """
    if not arguments.extractors:
        return
    drawn = [name for name in names or evaluated(out) if benchmark_named(name).asks == "drawing"]
    if not drawn:
        raise ValueError("--extractors makes features of drawings, but none of the benchmarks draws.")
    for extractor in load_extractors(arguments.extractors, process_state().device):
        for name in drawn:
            extract(out / name, load_lines(out / name)[2], extractor, arguments.batch_size)


def _read(name: str, source: DataSource, arguments: SuiteArguments) -> tuple[Benchmark, Loaded, list[Sample]]:
    """Return a benchmark, what it holds, and the samples to be asked.

    Raises:
        ValueError: something that it needs is missing.
    """
    benchmark = benchmark_named(name)
    if missing := benchmark.missing():
        raise ValueError(f"The benchmark {name} cannot be scored here: {'; '.join(missing)}.")
    loaded = benchmark.load(source)
    if not loaded.samples:
        raise ValueError(f"The data of {name} in {source.where} holds no samples.")
    if arguments.without_images and benchmark.asks != "language":
        raise ValueError(f"{name} cannot be asked without images.")
    return benchmark, loaded, some_clusters(distinct(loaded.samples), arguments.limit, arguments.seed)


def _check(benchmark: Benchmark, subject: Any) -> None:
    """Raise ValueError if a benchmark gives a model what it does not take."""
    if benchmark.takes_regions and not subject.is_deem:
        kind = type(subject.model).__name__
        raise ValueError(f"{benchmark.name} marks regions by masks, which {kind} does not take.")


def score_and_report(
    out: Path, names: Sequence[str] = (), sources: dict[str, DataSource] | None = None
) -> dict[str, dict[str, Any]]:
    """Score what lies in a folder, print the figures, write `results.json` and `evaluation.html`; return the results."""
    results = score(out, names)
    print(format_results(results))
    every = json.loads((out / RESULTS).read_text(encoding="utf-8"))  # also of benchmarks asked before
    print(f"page: {write_page(out, every, sources or {})}")
    return results


def has_failed(results: dict[str, dict[str, Any]]) -> bool:
    """Return whether any sample of any benchmark failed."""
    return any(result.get("failed") for result in results.values())


def _generation(benchmark: Benchmark, protocol: str, arguments: SuiteArguments) -> dict[str, Any]:
    """Return a protocol's options with those given over them; of drawings, how they are drawn."""
    options = benchmark.generation[protocol]
    if benchmark.asks == "drawing":
        drawn = ("num_inference_steps", "guidance_scale", "scheduler", "drawings_per_caption")
        return {name: getattr(arguments, name) for name in drawn}
    if not options:  # nothing is written
        return {}
    given = {"num_beams": arguments.num_beams, "max_new_tokens": arguments.max_new_tokens}
    options = options | {name: value for name, value in given.items() if value is not None}
    if arguments.do_sample:
        options = options | {"do_sample": True, "temperature": arguments.temperature, "num_beams": 1}
    if options.get("num_beams", 1) == 1:
        options.pop("length_penalty", None)
    if "min_new_tokens" in options:
        options["min_new_tokens"] = min(options["min_new_tokens"], options["max_new_tokens"])
    return options
