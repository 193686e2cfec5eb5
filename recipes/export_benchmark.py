# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A benchmark of ours as another harness reads it: tasks of lmms-eval, tables of VLMEvalKit.

    python recipes/export_benchmark.py --benchmark robustvqa --data robustvqa/ --to lmms_eval --out outputs/lmms_eval
    lmms-eval --model MODEL --model_args ... --tasks robustvqa --include_path outputs/lmms_eval

    python recipes/export_benchmark.py --benchmark robustvqa --data robustvqa/ --to vlmevalkit --out ~/LMUData

For lmms-eval: `<benchmark>.parquet` and a YAML beside it that includes the task (robustvqa, pope as `pope_file`, visdial,
refcocog_region). For VLMEvalKit: `<benchmark>.tsv`, of any benchmark. Samples that cannot be asked are listed, left out,
and make the exit status 1.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow
import yaml
from pyarrow.parquet import ParquetWriter
from trl import TrlParser

from recipes.evaluation.benchmark import PROTOCOLS, distinct, some_clusters
from recipes.evaluation.benchmarks import BENCHMARKS, benchmark_named
from recipes.evaluation.harnesses import lmms_tasks
from recipes.evaluation.harnesses.tables import Row, rows_of
from recipes.evaluation.harnesses.vlmevalkit import write_tables
from recipes.evaluation.sources import DataSource
from recipes.whole_files import check_writable, whole_file, write_whole

TASKS = {"robustvqa": "robustvqa", "pope": "pope_file", "visdial": "visdial", "refcocog_region": "refcocog_region"}
ROWS_AT_A_TIME = 100
HARNESSES = ("lmms_eval", "vlmevalkit")


@dataclass
class ExportArguments:
    """Options of `recipes/export_benchmark.py`."""

    benchmark: str = field(default="robustvqa", metadata={"help": f"One of {', '.join(BENCHMARKS)}."})
    data: str = field(default="data", metadata={"help": "Folder of its files, or hub:<owner>/<name>."})
    to: str = field(default="lmms_eval", metadata={"help": "The harness.", "choices": [*HARNESSES]})
    out: str = field(default="outputs/lmms_eval", metadata={"help": "Folder for what is written."})
    protocol: str = field(
        default="standard",
        metadata={"help": "Prompts, and rules by which the task scores: standard or deem.", "choices": [*PROTOCOLS]},
    )
    limit: int = field(default=0, metadata={"help": "At least so many samples, in whole images or pairs; 0: all."})
    seed: int = field(default=0, metadata={"help": "Of what `--limit` draws."})


def main(arguments: ExportArguments) -> list[str]:
    """Write the files; return what is wrong with the samples that were left out, a line each.

    Raises:
        ValueError: there is no such benchmark, no data, no usable sample, or no task of lmms-eval for the benchmark.
    """
    benchmark = benchmark_named(arguments.benchmark)
    if arguments.to == "lmms_eval" and benchmark.name not in TASKS:
        raise ValueError(f"No task of lmms-eval for {benchmark.name!r}; there is one for {', '.join(TASKS)}.")
    out = Path(arguments.out).expanduser()
    check_writable(out)
    loaded = benchmark.load(DataSource(benchmark.name, arguments.data))
    samples = some_clusters(distinct(loaded.samples), arguments.limit, arguments.seed)
    rows, faults = rows_of(benchmark, samples, arguments.protocol)
    for fault in faults:
        print(f"left out: {fault}")
    if not rows:
        raise ValueError(f"None of the {len(samples)} samples of {benchmark.name} in {arguments.data} can be asked.")
    if arguments.to == "vlmevalkit":
        written = write_tables(benchmark.name, rows, out)
    else:
        options = benchmark.generation[arguments.protocol]
        written = write_task(benchmark.name, rows, options, out)
    print(f"{len(rows)} rows: {', '.join(map(str, written))}")
    return faults


def write_task(name: str, rows: list[Row], options: dict[str, object], out: Path) -> list[Path]:
    """Write the rows, and the YAML of lmms-eval that includes the task's and says where they lie; return both.

    Args:
        options: of `generate`, for the task's `generation_kwargs`.
    """
    table = out / f"{name}.parquet"
    columns = {one: datasets.Value("string") for one in rows[0].columns}
    schema = datasets.Features({"image": datasets.Image(), **columns}).arrow_schema
    with whole_file(table) as unfinished, ParquetWriter(unfinished, schema) as writer:
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            part = rows[start : start + ROWS_AT_A_TIME]
            values = [{"image": {"bytes": row.images[0], "path": None}, **row.columns} for row in part]
            writer.write_table(pyarrow.Table.from_pylist(values, schema))
    task = Path(lmms_tasks.__file__).with_name(f"{TASKS[name]}.yaml")
    changes = {
        "include": str(task),
        "task": TASKS[name],
        "dataset_kwargs": {"data_files": {"test": str(table.resolve())}},
        "generation_kwargs": {"temperature": 0, "until": [], **options},
    }
    file = out / task.name
    write_whole(file, yaml.safe_dump(changes, sort_keys=False))
    return [table, file]


if __name__ == "__main__":
    sys.exit(1 if main(*TrlParser(ExportArguments, allow_abbrev=False).parse_args_and_config()) else 0)
