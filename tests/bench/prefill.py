# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What reading a prompt costs, by images and by tokens, against the language model's own cost.

    python tests/bench/prefill.py [--size mid] [--images 1 2 4 8 16] [--tokens 256 1024 4096]

For each number of images in one prompt: seconds for the whole prompt, per image, and this over that of one image; 1.0 is
linear. For each number of tokens behind one image: seconds of DEEM and of its bare language model on as many tokens.
Medians of alternating runs in one process.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from step import SIZES, build_config, build_text

from modeling_deem import DeemForConditionalGeneration


def median_seconds(
    measured: dict[int, Callable[[], object]], runs: int, clock: Callable[[], float]
) -> dict[int, float]:
    """Median seconds of each call, in turns; the first turn warms up."""
    seconds: dict[int, list[float]] = {key: [] for key in measured}
    for turn in range(runs + 1):
        for key, call in measured.items():
            began = clock()
            call()
            if turn:
                seconds[key].append(clock() - began)
    return {key: statistics.median(values) for key, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="mid")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    model = DeemForConditionalGeneration(build_config(args.size)).eval()
    tokens, side = model.config.num_image_tokens, SIZES[args.size]["side"]

    @torch.no_grad()
    def read(images: int, length: int) -> None:
        input_ids = build_text(1, length, images, tokens)
        model(input_ids=input_ids, pixel_values=torch.randn(images, 3, side, side), use_cache=False, logits_to_keep=1)

    @torch.no_grad()
    def read_text(length: int) -> None:
        model.model.language_model(input_ids=torch.randint(3, 500, (1, length)), use_cache=False)

    by_images = {count: lambda count=count: read(count, 8 + count * (tokens + 8)) for count in args.images}
    seconds = median_seconds(by_images, args.runs, clock)
    one = seconds[args.images[0]] / args.images[0]
    for count, value in seconds.items():
        print(f"{count:5} images {value:9.3f} s {value / count:9.4f} s/image   {value / count / one:.2f} of linear")
    ours = median_seconds({length: lambda length=length: read(1, length) for length in args.tokens}, args.runs, clock)
    bare = median_seconds(
        {length: lambda length=length: read_text(length) for length in args.tokens}, args.runs, clock
    )
    for length in args.tokens:
        ratio = (ours[length] - ours[args.tokens[0]]) / max(bare[length] - bare[args.tokens[0]], 1e-9)
        slope = f"   slope {ratio:.2f} of the language model's" if length > args.tokens[0] else ""
        print(f"{length:5} tokens {ours[length]:9.3f} s, language model alone {bare[length]:9.3f} s{slope}")


if __name__ == "__main__":
    main()
