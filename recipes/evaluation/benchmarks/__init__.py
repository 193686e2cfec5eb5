# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The table of benchmarks that `recipes/evaluate.py --benchmarks` knows; a new one is a file here and a line."""

from recipes.evaluation.benchmark import Benchmark
from recipes.evaluation.benchmarks.captions import SETS
from recipes.evaluation.benchmarks.easy_vqa import EasyVqa
from recipes.evaluation.benchmarks.fid import FID
from recipes.evaluation.benchmarks.grounding import Grounding
from recipes.evaluation.benchmarks.mmvp import Mmvp
from recipes.evaluation.benchmarks.mmvp_vlm import MmvpVlm
from recipes.evaluation.benchmarks.pope import Pope
from recipes.evaluation.benchmarks.questions import Gqa, TextVqa, VizWiz, VqaFiles
from recipes.evaluation.benchmarks.regions import RegionCaptions
from recipes.evaluation.benchmarks.robustvqa import RobustVqa
from recipes.evaluation.benchmarks.visdial import VISDIAL

_ALL: tuple[Benchmark, ...] = (
    RobustVqa(),
    Pope(),
    Mmvp(),
    MmvpVlm(),
    VqaFiles("vqav2", "v2_"),
    VqaFiles("okvqa", ""),
    TextVqa(),
    VizWiz(),
    Gqa(),
    *SETS,
    Grounding(),
    *VISDIAL,
    RegionCaptions(),
    *FID,
    EasyVqa(),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def benchmark_named(name: str) -> Benchmark:
    """Return a benchmark. Raises ValueError for an unknown name, listing those that are known."""
    if name not in BENCHMARKS:
        raise ValueError(f"Unknown benchmark {name!r}; give one or more of {', '.join(BENCHMARKS)}, world.")
    return BENCHMARKS[name]
