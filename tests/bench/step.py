# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A training step of DEEM against its bare parts at the same sizes, as ratios of time and of peak memory.

    python tests/bench/step.py [--size mid] [--batch 2] [--text 96] [--images 1] [--cached]

The bare parts are what any step must at least do: one forward and backward of the vision trunk, one of the language
model, one encoding by the VAE, and two forwards and backwards of the UNet. In both, the language model and the UNet
are frozen but pass gradients to their inputs, as in the alignment stage. Times are medians of alternating runs in one
process; peak memory is the growth of a fresh process's resident set over one step. Run it on an idle machine; on a busy
one `--clock cpu` with `--threads 1` counts the process's own time.

Sizes: "small" has 64 px images and 8 x 8 latents, "mid" 256 px images, a ConvNeXt-T, a language model of 8 layers of
width 512, and a UNet of 54 M on 32 x 32 latents, "1b" a ConvNeXt-L, a language model of 1 B and SD 2.1's UNet and VAE on
64 x 64 latents, for a GPU. With `--images 3` each row has three images with text between them, so that two of three have a
previous one. With `--cached` the step reads latents instead of encoding, and the bare parts have no VAE. On a GPU (`--device cuda --dtype bfloat16`) memory is the allocator's peak above the weights, gradients of one step
included, and MFU is the share of `--peak_tflops` that both losses' floating point operations reach; `--checkpointing` and
`--compile` change DEEM's step alone.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_deem import DeemConfig, DeemForConditionalGeneration

START, IMAGE, VOCABULARY = 500, 501, 512


def perceiver(queries: int, width: int, layers: int, **changes: Any) -> dict[str, Any]:
    sizes = {
        "num_queries": queries,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
    }
    return {**sizes, "intermediate_size": 4 * width, **changes}


def unet(side: int, widths: list[int], plain_last: bool = True, **changes: Any) -> dict[str, Any]:
    """Attention on all levels but the coarsest, heads of 64 channels."""
    levels = len(widths)
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": side,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
        "attention_head_dim": [width // 64 for width in widths],
        "use_linear_projection": True,
        **changes,
    }


def vae(side: int, widths: list[int], **changes: Any) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": widths,
        "norm_num_groups": 16,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "latent_channels": 4,
        "sample_size": side,
        **changes,
    }


# Image side; what the config says of each part; image tokens.
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "side": 64,
        "vision": {"hidden_sizes": [32, 64, 128, 192], "depths": [2, 2, 4, 2]},
        "text": {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8},
        "feature_size": 128,
        "perceivers": [perceiver(16, 128, 4), perceiver(16, 128, 1, intermediate_size=384)],
        "denoiser": unet(8, [64, 128, 128], cross_attention_dim=128),
        "vae": vae(64, [16, 32, 64, 64]),
        "heads": 4,
        "points": 4,
    },
    "mid": {
        "side": 256,
        "vision": {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]},
        "text": {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8},
        "feature_size": 256,
        "perceivers": [perceiver(32, 256, 4), perceiver(32, 512, 1)],
        "denoiser": unet(32, [128, 256, 256, 256], cross_attention_dim=512),
        "vae": vae(256, [32, 64, 128, 128]),
        "heads": 8,
        "points": 8,
    },
    "1b": {
        "side": 256,
        "target_side": 512,
        "vision": {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3]},
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
        },
        "feature_size": 1024,
        "perceivers": [perceiver(64, 768, 12), perceiver(64, 1024, 1)],
        "denoiser": unet(64, [320, 640, 1280, 1280], cross_attention_dim=1024),
        "vae": vae(512, [128, 256, 512, 512], layers_per_block=2),
        "heads": 16,
        "points": 8,
    },
}


def build_config(size: str) -> DeemConfig:
    """The config of a model of that size; see `SIZES`."""
    parts = SIZES[size]
    side, heads = parts["side"], {"heads": parts["heads"], "points": parts["points"]}
    sides = [side // stride for stride in (4, 8, 16, 32)]
    return DeemConfig(
        vision_config={"model_type": "convnext", "image_size": side, **parts["vision"]},
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "num_hidden_layers": 8,  # "text" may say otherwise
            "tie_word_embeddings": False,
            "max_position_embeddings": 8192,
            **parts["text"],
        },
        perceiver_config=parts["perceivers"][0],
        image_decoder_config={
            "denoiser": parts["denoiser"],
            "vae": parts["vae"],
            "feature_sides": sides,
            "fusion_size": parts["feature_size"],
            **{f"fusion_{name}": value for name, value in heads.items()},
            "perceiver_config": {**parts["perceivers"][1], "cross_attention_frequency": 1, "qk_norm": False},
        },
        image_token_id=IMAGE,
        start_of_image_token_id=START,
        pad_token_id=0,
        feature_size=parts["feature_size"],
        position_grid_side=sides[2],
        image_attention_sides=sides[1:],
        image_attention_base_side=sides[2],
        **{f"image_attention_{name}": value for name, value in heads.items()},
    )


def build_text(rows: int, length: int, images: int, tokens: int) -> torch.Tensor:
    """Rows (rows, length) of one document each, with `images` images of `tokens` tokens, text before and between them."""
    input_ids = torch.randint(3, START, (rows, length))
    input_ids[:, 0] = DeemConfig().bos_token_id
    for first in range(8, 8 + images * (tokens + 8), tokens + 8):
        input_ids[:, first], input_ids[:, first + 1 : first + 1 + tokens] = START, IMAGE
    return input_ids


def build(
    batch: int,
    text: int,
    size: str = "small",
    images: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[DeemForConditionalGeneration, dict[str, torch.Tensor]]:
    """A model and a batch of rows of `text` tokens, with `images` images each."""
    torch.manual_seed(0)
    with torch.device(device):
        model = DeemForConditionalGeneration(build_config(size)).to(device, dtype).train()
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    model.image_decoder.denoiser.requires_grad_(False)
    input_ids = build_text(
        batch, max(text, 8 + images * (model.config.num_image_tokens + 8)), images, model.config.num_image_tokens
    )
    sides = SIZES[size]["side"], SIZES[size].get("target_side", SIZES[size]["side"])
    pixels, targets = (torch.rand(batch * images, 3, side, side, device=device, dtype=dtype) * 2 - 1 for side in sides)
    input_ids = input_ids.to(device)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(input_ids == IMAGE, -100),
        "pixel_values": pixels,
        "target_pixel_values": targets,
    }
    return model, batch


def use_cache(model: DeemForConditionalGeneration, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with latents instead of target pixels."""
    latents = model.image_decoder.encode_posterior(batch["target_pixel_values"])
    return {name: value for name, value in batch.items() if name != "target_pixel_values"} | {
        "target_latents": latents
    }


def deem_step(model: DeemForConditionalGeneration, batch: dict[str, torch.Tensor], called: torch.nn.Module) -> None:
    """One step of `called`, the model or what it was compiled to."""
    called(**batch).loss.backward()
    model.zero_grad()


def bare_step(model: DeemForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    """The same parts side by side, without what joins them; one backward of the sum, as in a step that trains them."""
    decoder, config = model.image_decoder, model.config
    losses = [model.model.vision_tower.encoder(batch["pixel_values"]).last_hidden_state.sum()]

    like = {"device": batch["pixel_values"].device, "dtype": batch["pixel_values"].dtype, "requires_grad": True}
    embeds = torch.randn(*batch["input_ids"].shape, config.text_config.hidden_size, **like)
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], use_cache=False)
    logits = model.lm_head(hidden.last_hidden_state)
    losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten()))

    cached = "target_latents" in batch
    latents = batch["target_latents"][:, :4] if cached else decoder.encode(batch["target_pixel_values"])
    count = len(latents)
    for _ in range(2):
        condition = torch.randn(count, config.num_image_tokens, decoder.config.condition_size, **like)
        noisy = torch.randn_like(latents).requires_grad_()
        timesteps = torch.randint(1000, (count,), device=latents.device)
        losses.append(decoder.denoiser(noisy, timesteps, condition).square().mean())
    sum(losses).backward()
    model.zero_grad()


STEPS = ("deem", "bare")


def growth_of_memory(run) -> float:
    """MB by which a call raises the resident set of this process at most."""
    process, done, sizes = psutil.Process(), threading.Event(), []

    def watch() -> None:
        while not done.wait(0.001):
            sizes.append(process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return (max(sizes) - before) / 2**20


def peak_memory(which: str, step: Callable[[], None], device: str) -> float:
    """MB by which one step raises the resident set of a fresh process, or the allocated memory of the GPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, *sys.argv[1:], "--measure-memory", which]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--batch", type=int, help="rows; default 8, of larger sizes 2")
    parser.add_argument("--text", type=int, default=96, help="tokens per row, more if the images need more")
    parser.add_argument("--images", type=int, default=1, help="images per row")
    parser.add_argument("--cached", action="store_true", help="latents are given")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="DEEM keeps no activations of its layers")
    parser.add_argument("--compile", action="store_true", help="DEEM's forward is compiled")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU, for MFU; H100 and H200 in bf16")
    parser.add_argument("--only-time", action="store_true", help="leave memory out")
    parser.add_argument("--measure-memory", choices=STEPS, help="internal: one step, print the growth in MB")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = args.batch or (8 if args.size == "small" else 2)
    model, batch = build(rows, args.text, args.size, args.images, args.device, getattr(torch, args.dtype))
    if args.cached:
        batch = use_cache(model, batch)
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    called = torch.compile(model) if args.compile else model
    steps = {"deem": lambda: deem_step(model, batch, called), "bare": lambda: bare_step(model, batch)}

    if args.measure_memory:
        print(growth_of_memory(steps[args.measure_memory]))
        return

    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(args.runs + 2):  # the first two warm up
        for name, step in steps.items():
            wait()
            start = clock()
            step()
            wait()
            if run >= 2:
                seconds[name].append(clock() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    memory = {
        name: float("nan") if args.only_time else peak_memory(name, step, args.device) for name, step in steps.items()
    }

    length = batch["input_ids"].shape[1]
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads, {args.clock} time"
    how = "".join(f", {name}" for name in ("cached", "checkpointing", "compile") if getattr(args, name))
    print(f"{args.size}, {rows} rows of {length} tokens and {args.images} images, {args.dtype}{how}, {where}")
    print(f"{'':12}{'seconds':>10}{'peak MB':>10}")
    for name in steps:
        print(f"{name:12}{medians[name]:10.3f}{memory[name]:10.0f}")
    print(f"{'deem / bare':12}{medians['deem'] / medians['bare']:10.2f}{memory['deem'] / memory['bare']:10.2f}")
    if args.compile:
        breaks = torch._dynamo.utils.counters["graph_break"]
        print(
            f"{sum(breaks.values())} graph breaks",
            *(f"{count} {why[:100]!r}" for why, count in breaks.items()),
            sep="\n",
        )
    if args.device == "cuda":
        if args.checkpointing:
            model.gradient_checkpointing_disable()  # what is computed anew does not count
        with FlopCounterMode(display=False) as counter:
            deem_step(model, batch, model)
        teraflops = counter.get_total_flops() / 1e12
        share = teraflops / medians["deem"] / args.peak_tflops
        print(f"{teraflops:.2f} TFLOP a step, MFU {100 * share:.1f} % of {args.peak_tflops:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
