# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Run all recipes on a CPU: parts -> pretrain -> SFT on questions -> generate -> evaluate -> inspect -> report.

    python recipes/demo.py                    # what `make demo` runs
    python recipes/demo.py --out runs/other   # the same into another folder

Each stage is one of the other recipes, run with its built-in default in a process of its own. The command can be
repeated at any time: a stage whose result is newer than that of the stage before is skipped, an interrupted training
goes on from its last checkpoint, and a training that began from an older stage begins anew.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from recipes.evaluation.figures import format_figures
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT

RECIPES = Path(__file__).resolve().parent


@dataclass
class DemoArguments:
    """Options of `recipes/demo.py`."""

    out: str = field(default="runs/demo", metadata={"help": "Folder of all that the demo makes, except the parts."})
    parts: str = field(default="runs/parts", metadata={"help": "Folder of the small parts; shared by runs."})


@dataclass
class Stage:
    """A stage of the demo.

    Attributes:
        result: the file that its last command writes last.
        commands: recipes with their flags.
        resumes_in: folder of the checkpoints that it goes on from.
    """

    name: str
    result: Path
    commands: list[list[str]]
    resumes_in: Path | None = None


def make_stages(arguments: DemoArguments) -> list[Stage]:
    """Return the stages in their order; write the image that `generate` is asked about."""
    out, parts = Path(arguments.out), arguments.parts
    pretrain, sft, generate, evaluation = (out / name for name in ("pretrain", "sft", "generate", "evaluation"))
    generate.mkdir(parents=True, exist_ok=True)
    image = str(generate / "picture_0.png")
    World().scene(HELD_OUT).image.save(image)

    composed = [flag for part in ("vision", "text", "diffusion") for flag in (f"--{part}", f"{parts}/{part}")]
    compose = ["pretrain.py", "--output_dir", str(pretrain), *composed]
    tune = ["sft.py", "--output_dir", str(sft), "--model", str(pretrain)]
    ask = ["--images", image, "--text", "What color is the main object?", "--reconstruct", "--out", str(generate)]
    draw = ["--text", "a red circle", "a blue star", "--draw", "--no_answer", "--out", f"{generate}/drawn"]
    measure = ["--model", str(sft), "--reference", f"{pretrain}/initial", "--out", str(evaluation)]
    generations = [["generate.py", "--model", str(sft), *flags] for flags in (draw, ask)]
    see = ["--model", str(sft), "--against", str(pretrain), "--images", image, "--out", str(out / "seen")]
    return [
        Stage("parts", Path(parts, "diffusion", "model_index.json"), [["parts.py", "--out", parts]]),
        Stage("pretrain", pretrain / "trainer_state.json", [compose], resumes_in=pretrain),
        Stage("sft", sft / "trainer_state.json", [tune], resumes_in=sft),
        Stage("generate", generate / "answers.jsonl", generations),
        Stage("evaluate", evaluation / "metrics.json", [["evaluate.py", *measure]]),
        Stage("inspect", out / "seen" / "inspection.html", [["inspect_image.py", *see]]),
        Stage("report", out / "report.html", [["report.py", "--run", str(out), "--title", "DEEM demo"]]),
    ]


def is_done(stage: Stage, before: Path | None) -> bool:
    """Return whether the stage's result is there and newer than that of the stage before it."""
    return stage.result.is_file() and (before is None or stage.result.stat().st_mtime >= before.stat().st_mtime)


def is_outdated(folder: Path, before: Path) -> bool:
    """Return whether all files of a training are older than the result it should have begun from."""
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    return bool(times) and max(times) < before.stat().st_mtime


def main(arguments: DemoArguments) -> None:
    """Run the stages that are not done, then print their times, the figures and where the report lies."""
    stages = make_stages(arguments)
    spent, before = {}, None
    for stage in stages:
        print(f"\n=== {stage.name}", flush=True)
        if is_done(stage, before):
            print(f"done already: {stage.result}")
        else:
            if stage.resumes_in is not None and is_outdated(stage.resumes_in, before):
                print(f"{stage.resumes_in} is older than {before}: removed")
                shutil.rmtree(stage.resumes_in)
            start = time.perf_counter()
            for recipe, *flags in stage.commands:
                command = [sys.executable, str(RECIPES / recipe), *flags]
                print(f"python recipes/{shlex.join([recipe, *flags])}", flush=True)
                if code := subprocess.run(command).returncode:
                    sys.exit(f"The stage {stage.name!r} failed (exit code {code}). `make demo` goes on from here.")
            if not stage.result.is_file():
                sys.exit(f"The stage {stage.name!r} came to its end without writing {stage.result}.")
            spent[stage.name] = time.perf_counter() - start
            print(f"=== {stage.name} took {spent[stage.name]:.0f} s", flush=True)
        before = stage.result

    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.items())
    print(f"\nTime: {times or 'nothing was left to do'}; in all {sum(spent.values()) / 60:.1f} min")
    evaluation = next(stage for stage in stages if stage.name == "evaluate")
    print(f"\n{format_figures(json.loads(evaluation.result.read_text(encoding='utf-8')))}")
    print(f"\nReport: {stages[-1].result.resolve()}")


if __name__ == "__main__":
    main(*TrlParser(DemoArguments, allow_abbrev=False).parse_args_and_config())
