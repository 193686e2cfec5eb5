# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Measure a checkpoint on published benchmarks, or what it names, answers, sees and draws in the synthetic world.

    python recipes/evaluate.py --model runs/demo/sft --reference runs/demo/initial --out runs/demo/evaluation
    python recipes/evaluate.py --model MODEL --benchmarks pope mmvp --data DIR --out OUT    # any vision-language model
    python recipes/evaluate.py --model CLIP --benchmarks mmvp_vlm --data DIR --out OUT         # a two-tower model
    python recipes/evaluate.py --model MODEL --benchmarks fid --data DIR --out OUT --extractors inception=FILE   # drawings
    python recipes/evaluate.py --score OUT                                  # figures of saved predictions, no model

Benchmarks (recipes/evaluation/benchmarks/) read local files in the official layouts from DIR/<name> or DIR, or rows of
`datasets`; `--data pope=FOLDER mmvp=hub:owner/name` says it for each. Predictions are written as they come, so that the
same command goes on after a kill, with any batch size and, by `accelerate launch`, any number of processes. Writes
`<name>/predictions.jsonl` with its manifest, `results.json` and `evaluation.html`; ends with status 1 if a sample failed.

Without benchmarks, or with the benchmark `world` (in OUT/world then): figures on images of the world that the model never
trained on, each beside its aim (where there is one) and what chance would give:

1. caption: the first kind of object that the caption names is the kind of the main object;
2. color: a question about an object's color is answered exactly;
3. consistency: DEEM's feedback loss lies below that of a reference (the composed model before pretraining), with the
   same noise and timesteps;
4. drawing: an image drawn from a caption that names one color has it as its dominant color;
5. region (with --num_regions, after the region stage): the description of a marked object names its color first; and the
   same where another object of the image is marked, which must be near 0 if the mask is what decides.

Writes `metrics.json` and `samples/` (images and `samples.json`), which the run report shows. The table of measures is
in recipes/evaluation/measures.py.
"""

import json
import sys
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from trl import TrlParser

from recipes.evaluation.figures import format_figures
from recipes.evaluation.measures import MEASURES
from recipes.evaluation.samples import describe_scene, write_drawings, write_samples
from recipes.evaluation.subject import Subject
from recipes.evaluation.suite import (
    WORLD,
    SuiteArguments,
    data_sources,
    has_failed,
    run_suite,
    score_and_report,
    take_features,
)
from recipes.generation.checkpoint import load_for_inference, make_scheduler
from recipes.prompts import PROMPTS
from recipes.synthetic.scenes import World
from recipes.whole_files import check_writable, write_whole

# One option --num_<name> per line of the table of measures; 0 leaves the measure out.
Numbers = make_dataclass(
    "Numbers",
    [
        (f"num_{name}", int, field(default=measure.number, metadata={"help": measure.help}))
        for name, measure in MEASURES.items()
    ],
)


@dataclass
class EvaluateArguments(SuiteArguments, Numbers):
    """Options of `recipes/evaluate.py`."""

    reference: str | None = field(
        default=None, metadata={"help": "Checkpoint to compare the consistency loss with; without it, no comparison."}
    )
    num_samples: int = field(
        default=8, metadata={"help": "Images on the sample sheet; 0 leaves out the sheet of drawings too."}
    )
    draw_template: str = field(
        default="plain", metadata={"help": "Form of the prompt that images are drawn from.", "choices": [*PROMPTS]}
    )
    world_seed: int = field(default=0, metadata={"help": "Seed of the world; its held-out scenes are used."})
    size: int = field(default=64, metadata={"help": "Side of the world's images, in pixels."})
    shifted: bool = field(default=False, metadata={"help": "Use the out-of-distribution variant of the world."})


def main(arguments: EvaluateArguments) -> dict[str, dict[str, Any]]:
    """Measure, print and write the figures; return them: those of the world, or the results of the benchmarks by name."""
    if arguments.score:
        names = [name for name in arguments.benchmarks if name != WORLD]
        sources = data_sources(arguments.data, names) if arguments.data else {}
        take_features(arguments, Path(arguments.score), names)
        return score_and_report(Path(arguments.score), names, sources)
    out = Path(arguments.out)
    if not arguments.benchmarks:
        return measure_world(arguments, out)
    results = run_suite(arguments) if set(arguments.benchmarks) - {WORLD} else {}
    if WORLD in arguments.benchmarks:
        results = results | {WORLD: measure_world(arguments, out / WORLD)}
    return results


def measure_world(arguments: EvaluateArguments, out: Path) -> dict[str, dict[str, Any]]:
    """Write the figures and samples of the world into a folder; return the figures."""
    check_writable(out)
    model, processor = load_for_inference(arguments.model)
    scheduler = None if model.image_decoder is None else make_scheduler(model, arguments.scheduler)
    subject = Subject(
        model,
        processor,
        World(seed=arguments.world_seed, size=arguments.size, shifted=arguments.shifted),
        reference=arguments.reference,
        draw_template=arguments.draw_template,
        guidance_scale=arguments.guidance_scale,
        sampling={"num_inference_steps": arguments.num_inference_steps, "scheduler": scheduler},
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    metrics = {}
    for name, measure in MEASURES.items():
        if number := getattr(arguments, f"num_{name}"):
            metrics |= measure.figures(subject, number)
    if arguments.num_samples:
        write_samples(
            subject, [describe_scene(scene) for scene in subject.unseen(arguments.num_samples)], out / "samples"
        )
        write_drawings(subject, out / "samples")
    write_whole(out / "metrics.json", json.dumps(metrics, indent=1))
    print(format_figures(metrics))
    return metrics


if __name__ == "__main__":
    sys.exit(has_failed(main(*TrlParser(EvaluateArguments, allow_abbrev=False).parse_args_and_config())))
