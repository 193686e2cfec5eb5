# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Drawing against a plain diffusers loop of the same UNet, steps and guidance, as ratios of time.

    python tests/bench/draw.py [--size mid] [--steps 10]

Drawn from text alone, after one and after four images, and reconstructed; each against the loop with as many UNet passes
(two per step under guidance, one while reconstructing), and one decoding by the VAE. Medians of alternating runs in one
process.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from step import SIZES, START, build_config, build_text

from modeling_deem import DeemForConditionalGeneration


def build(size: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DeemForConditionalGeneration:
    """A model whose fusion is heard."""
    torch.manual_seed(0)
    with torch.device(device):
        model = DeemForConditionalGeneration(build_config(size)).to(device, dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("conv.weight") and "feature_fusion" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@torch.no_grad()
def plain_loop(model: DeemForConditionalGeneration, steps: int, guided: bool) -> None:
    """diffusers' own loop, with a condition given."""
    decoder = model.image_decoder
    scheduler = decoder.make_scheduler("DDIMScheduler")
    scheduler.set_timesteps(steps)
    rows, side = 2 if guided else 1, decoder.config.latent_side
    like = {"device": model.device, "dtype": model.dtype}
    condition = torch.randn(rows, model.config.num_image_tokens, decoder.config.condition_size, **like)
    latents = torch.randn(1, decoder.denoiser.config.in_channels, side, side, **like)
    for timestep in scheduler.timesteps:
        prediction = decoder.denoiser(latents.expand(rows, -1, -1, -1), timestep, condition)
        if guided:
            without, within = prediction.chunk(2)
            prediction = without + 3.5 * (within - without)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    decoder.decode(latents)


def draw_after(model: DeemForConditionalGeneration, images: int, side: int, steps: int) -> Callable[[], object]:
    """A call that draws one image behind so many, and text."""
    tokens = model.config.num_image_tokens
    input_ids = build_text(1, 17 + images * (tokens + 8), images, tokens)
    input_ids[:, -1] = START
    input_ids = input_ids.to(model.device)
    like = {"device": model.device, "dtype": model.dtype}
    pixels = {"pixel_values": torch.randn(images, 3, side, side, **like)} if images else {}
    scheduler = model.image_decoder.make_scheduler("DDIMScheduler")
    return lambda: model.generate_images(input_ids, **pixels, num_inference_steps=steps, scheduler=scheduler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="mid")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    model, side = build(args.size, args.device, getattr(torch, args.dtype)), SIZES[args.size]["side"]
    scheduler = model.image_decoder.make_scheduler("DDIMScheduler")
    image = torch.randn(1, 3, side, side, device=model.device, dtype=model.dtype)
    measured = {
        "loop, guided": lambda: plain_loop(model, args.steps, guided=True),
        "from text": draw_after(model, 0, side, args.steps),
        "after one image": draw_after(model, 1, side, args.steps),
        "after four images": draw_after(model, 4, side, args.steps),
        "loop, one pass": lambda: plain_loop(model, args.steps, guided=False),
        "reconstructing": lambda: model.reconstruct(image, num_inference_steps=args.steps, scheduler=scheduler),
    }
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(args.runs + 1):  # the first one warms up
        for name, call in measured.items():
            wait()
            began = clock()
            call()
            wait()
            if turn:
                seconds[name].append(clock() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        loop = medians["loop, one pass" if name in ("reconstructing", "loop, one pass") else "loop, guided"]
        print(f"{name:<20}{value:9.3f} s   {value / loop:.2f} of the loop")


if __name__ == "__main__":
    main()
