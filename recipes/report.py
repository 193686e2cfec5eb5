# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Write one self-contained `report.html` per run: losses, drawings, answers, parameters, time, memory, data.

    python recipes/report.py --run runs/demo                      # all stages of a demo, with its evaluation
    python recipes/report.py --run runs/train                     # a single training run

Reads the files that the other recipes leave in the run's folder, and leaves out what is not there:

    trainer_state.json   (or that of the newest checkpoint)      curves, time and memory per step
    parts.json                                                   parameters trained and frozen per part
    data_report.json                                             samples read and skipped per source
    metrics.json, samples/samples.json                           figures, sample sheet and answers
    seen/inspection.json                                         what the encoder sees (recipes/inspect_image.py)

A run of several stages has them in folders of its own, one level below; `evaluation/` is one of them. The plots of the
report also lie as PNG files in `report/`.
"""

from dataclasses import dataclass, field

from trl import TrlParser

from recipes.run_report.page import write_report


@dataclass
class ReportArguments:
    """Options of `recipes/report.py`."""

    run: str = field(default="runs/demo", metadata={"help": "Folder of a run, or of a run's stages."})
    title: str | None = field(default=None, metadata={"help": "Headline; the folder's name by default."})


def main(arguments: ReportArguments) -> None:
    """Write the report and say where it lies."""
    print(f"report: {write_report(arguments.run, arguments.title)}")


if __name__ == "__main__":
    main(*TrlParser(ReportArguments, allow_abbrev=False).parse_args_and_config())
