# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A training step of DEEM against its bare parts at the same sizes, as ratios of time and of peak memory.

    python tests/bench/step.py [--batch 8] [--text 96]

The bare parts are what any step must at least do: one forward and backward of the vision trunk, one of the language
model, one encoding by the VAE, and two forwards and backwards of the UNet. In both, the language model and the UNet
are frozen but pass gradients to their inputs, as in the alignment stage. Times are medians of 5 alternating runs in one
process; peak memory is the growth of a fresh process's resident set over one step. Run it on an idle machine.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time

import psutil
import torch

from modeling_deem import DeemConfig, DeemForConditionalGeneration


def build(batch: int, text: int) -> tuple[DeemForConditionalGeneration, dict[str, torch.Tensor]]:
    """A model of a few million parameters, one image per row of `text` tokens, 64 px pictures, 8 x 8 latents."""
    torch.manual_seed(0)
    blocks = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    config = DeemConfig(
        vision_config={
            "model_type": "convnext",
            "hidden_sizes": [32, 64, 128, 192],
            "depths": [2, 2, 4, 2],
            "image_size": 64,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "tie_word_embeddings": False,
        },
        perceiver_config={
            "num_queries": 16,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
        },
        image_decoder_config={
            "denoiser": {
                "_class_name": "UNet2DConditionModel",
                "sample_size": 8,
                "block_out_channels": [64, 128, 128],
                "down_block_types": blocks,
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
                "cross_attention_dim": 128,
                "attention_head_dim": [1, 2, 2],
                "use_linear_projection": True,
            },
            "vae": {
                "_class_name": "AutoencoderKL",
                "block_out_channels": [16, 32, 64, 64],
                "norm_num_groups": 16,
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
                "latent_channels": 4,
                "sample_size": 64,
            },
            "feature_sides": [16, 8, 4, 2],
            "fusion_size": 128,
            "fusion_heads": 4,
            "fusion_points": 4,
            "perceiver_config": {
                "num_queries": 16,
                "hidden_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 384,
                "cross_attention_frequency": 1,
                "qk_norm": False,
            },
        },
        image_token_id=501,
        start_of_image_token_id=500,
        pad_token_id=0,
        feature_size=128,
        position_grid_side=4,
        image_attention_sides=[8, 4, 2],
        image_attention_base_side=4,
        image_attention_heads=4,
        image_attention_points=4,
    )
    model = DeemForConditionalGeneration(config).train()
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    model.image_decoder.denoiser.requires_grad_(False)

    input_ids = torch.randint(3, 500, (batch, text))
    input_ids[:, 0] = config.bos_token_id
    input_ids[:, 8] = config.start_of_image_token_id
    input_ids[:, 9 : 9 + config.num_image_tokens] = config.image_token_id
    labels = input_ids.masked_fill(input_ids == config.image_token_id, -100)
    pictures = torch.rand(batch, 3, 64, 64) * 2 - 1
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "pixel_values": pictures,
        "target_pixel_values": pictures,
    }
    return model, batch


def deem_step(model: DeemForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    model(**batch).loss.backward()
    model.zero_grad()


def bare_step(model: DeemForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    decoder, config = model.image_decoder, model.config
    count, length = batch["input_ids"].shape

    model.model.vision_tower.encoder(batch["pixel_values"]).last_hidden_state.sum().backward()

    embeds = torch.randn(count, length, config.text_config.hidden_size, requires_grad=True)
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], use_cache=False)
    logits = model.lm_head(hidden.last_hidden_state)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten()).backward()

    latents = decoder.encode(batch["target_pixel_values"])
    for _ in range(2):
        condition = torch.randn(count, config.num_image_tokens, decoder.config.condition_size, requires_grad=True)
        noisy = torch.randn_like(latents).requires_grad_()
        timesteps = torch.randint(1000, (count,))
        decoder.denoiser(noisy, timesteps, condition).square().mean().backward()
    model.zero_grad()


STEPS = {"deem": deem_step, "bare": bare_step}


def peak_memory(which: str, batch: int, text: int) -> float:
    """MB by which one step raises the resident set of a fresh process."""
    command = [sys.executable, __file__, "--batch", str(batch), "--text", str(text), "--measure-memory", which]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="rows, and images")
    parser.add_argument("--text", type=int, default=96, help="tokens per row")
    parser.add_argument("--measure-memory", choices=sorted(STEPS), help="internal: one step, print the growth in MB")
    args = parser.parse_args()
    model, batch = build(args.batch, args.text)

    if args.measure_memory:
        process, done, sizes = psutil.Process(), threading.Event(), []

        def watch() -> None:
            while not done.wait(0.001):
                sizes.append(process.memory_info().rss)

        before = process.memory_info().rss
        watcher = threading.Thread(target=watch)
        watcher.start()
        STEPS[args.measure_memory](model, batch)
        done.set()
        watcher.join()
        print((max(sizes) - before) / 2**20)
        return

    seconds = {name: [] for name in STEPS}
    for run in range(7):  # the first two warm up
        for name, step in STEPS.items():
            start = time.perf_counter()
            step(model, batch)
            if run >= 2:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    memory = {name: peak_memory(name, args.batch, args.text) for name in STEPS}

    print(
        f"{'':12}{'seconds':>10}{'peak MB':>10}   batch {args.batch}, {args.text} tokens, {torch.get_num_threads()} threads"
    )
    for name in STEPS:
        print(f"{name:12}{medians[name]:10.3f}{memory[name]:10.0f}")
    print(f"{'deem / bare':12}{medians['deem'] / medians['bare']:10.2f}{memory['deem'] / memory['bare']:10.2f}")


if __name__ == "__main__":
    main()
