# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Compare two evaluations of the same samples, written by `recipes/evaluate.py --benchmarks`.

    python recipes/compare.py runs/first/evaluation runs/second/evaluation --out runs/comparison

Per benchmark: the difference of the mean scores with its 95 % interval (paired bootstrap of whole images or pairs), and
how odd it is (McNemar's exact test, or the clusters' differences with signs at random), corrected by Holm for the number
of benchmarks. Evaluations under another protocol or over other samples are refused. Writes `comparison.json` and
`comparison.html` with the samples that changed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from recipes.evaluation.comparing import compare, format_comparison, read_pairs, write_comparison
from recipes.evaluation.suite import data_sources
from recipes.whole_files import write_whole


@dataclass
class CompareArguments:
    """Options of `recipes/compare.py`."""

    folders: list[str] = field(
        default_factory=list, metadata={"help": "Two folders of evaluations; may also be given without this flag."}
    )
    out: str = field(default="outputs/compare", metadata={"help": "Folder for comparison.json and comparison.html."})
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "As of recipes/evaluate.py, for images that lie in rows and not in files."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap and of the random signs."})


def main(arguments: CompareArguments) -> dict[str, dict[str, Any]]:
    """Compare, print and write; return the comparison by benchmark."""
    if len(arguments.folders) != 2:
        raise ValueError(f"Two evaluations are compared; got {arguments.folders}: python recipes/compare.py A B")
    first, second = map(Path, arguments.folders)
    pairs = read_pairs(first, second)
    results = compare(pairs, arguments.seed)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "comparison.json", json.dumps(results, indent=1))
    sources = data_sources(arguments.data, [pair.name for pair in pairs]) if arguments.data else {}
    page = write_comparison(out / "comparison.html", (str(first), str(second)), pairs, results, sources)
    print(f"{format_comparison(results)}\npage: {page}")
    return results


if __name__ == "__main__":
    import sys

    flags = sys.argv[1:]
    positional = 0
    while positional < len(flags) and not flags[positional].startswith("-"):
        positional += 1
    given = ["--folders", *flags[:positional]] if positional else []
    main(*TrlParser(CompareArguments, allow_abbrev=False).parse_args_and_config([*given, *flags[positional:]]))
