# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The table of benchmarks that `recipes/evaluate.py --benchmarks` knows; a new one is a file here and a line."""

from recipes.evaluation.benchmark import Benchmark
from recipes.evaluation.benchmarks.pope import Pope

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (Pope(),)}


def benchmark_named(name: str) -> Benchmark:
    """Return a benchmark. Raises ValueError for an unknown name, listing those that are known."""
    if name not in BENCHMARKS:
        raise ValueError(f"Unknown benchmark {name!r}; give one or more of {', '.join(BENCHMARKS)}, world.")
    return BENCHMARKS[name]
