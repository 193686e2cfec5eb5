# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A run killed at random times gives the losses and weights of one that was not; a full disk costs no checkpoint.

    python tests/reliability/kills.py [--kills 20] [--seed 0] [--parts alone,workers,processes,disk]

Tiny model, float32, one thread, with and without data workers, in one process and in two (gloo), saving and evaluating
every other step.
"""

import argparse
import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ConvNextImageProcessorPil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from conftest import build_tokenizer  # noqa: E402
from deem_fixtures import tiny_model  # noqa: E402

from modeling_deem import DeemForConditionalGeneration  # noqa: E402
from processing import DeemDataCollator, DeemProcessor  # noqa: E402
from recipes.data.sources import DataArguments, build_dataset  # noqa: E402
from recipes.synthetic.scenes import World  # noqa: E402
from recipes.synthetic.writers import write_formats  # noqa: E402
from recipes.training.resuming import last_complete_checkpoint  # noqa: E402
from recipes.training.trainer import DeemTrainingArguments, RecipeTrainer  # noqa: E402

STEPS = 24


def train(world: Path, processor: DeemProcessor, out: Path, workers: int) -> None:
    """One run to its end, from its last checkpoint if there is one."""
    torch.set_num_threads(1)
    args = DeemTrainingArguments(
        output_dir=str(out), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=STEPS, save_steps=2,
        eval_strategy="steps", eval_steps=2, save_total_limit=2, logging_steps=1, per_device_train_batch_size=2,
        per_device_eval_batch_size=2, gradient_accumulation_steps=2, dataloader_num_workers=workers, learning_rate=1e-3,
        freeze=["model.language_model", "image_decoder.denoiser", "image_decoder.vae"],
    )  # fmt: skip
    sources = [str(world / "mmc4_annts"), str(world / "captions")]
    data = DataArguments(data=sources, shuffle_buffer=8, pack_length=100, max_images=4)
    dataset, report = build_dataset(data, processor, 2, args.seed)
    cards = [{"text": "A card. <image> It is red.", "images": [Image.new("RGB", (48, 48), "red")]}]
    trainer = RecipeTrainer(
        model=tiny_model(), args=args, train_dataset=dataset, eval_dataset=cards,
        data_collator=DeemDataCollator(processor), processing_class=processor, data_report=report,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(out))
    trainer.save_model()
    trainer.save_state()


def start(*arguments: Any, processes: int = 1, limit: int | None = None) -> int:
    """Fork a run, in a process group of its own; `limit` is the size in bytes that no file may pass."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    if processes == 1:
        become(arguments, limit)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    for rank in range(processes):  # what torchrun does
        if os.fork() == 0:
            os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
            become(arguments, limit)
    os._exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(processes)))


def become(arguments: tuple[Any, ...], limit: int | None) -> None:
    """Run to the end in this process, and end it."""
    status = 1
    try:
        out = os.open(arguments[2].parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        train(*arguments)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def result(out: Path) -> tuple[list, dict[str, torch.Tensor]]:
    """The logged losses of a finished run, and its weights."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    names = ("text_loss", "image_loss", "consistency_loss", "eval_loss", "grad_norm")
    losses = [
        [log["step"], *(log.get(name) for name in names)] for log in history if "loss" in log or "eval_loss" in log
    ]
    return losses, DeemForConditionalGeneration.from_pretrained(out).state_dict()


def killed(
    world: Path,
    processor: DeemProcessor,
    folder: Path,
    workers: int,
    kills: int,
    rng: random.Random,
    processes: int = 1,
) -> str:
    """Kill runs at random times until there were `kills`; say what differs from a run that was left alone."""
    began = time.monotonic()
    if os.waitpid(start(world, processor, folder / "whole", workers, processes=processes), 0)[1]:
        sys.exit((folder / "log").read_text()[-3000:])
    seconds, expected = time.monotonic() - began, result(folder / "whole")
    done = finished = different = 0
    while done < kills:
        out = folder / f"killed{finished}"
        while True:
            child = start(world, processor, out, workers, processes=processes)
            deadline = time.monotonic() + rng.uniform(0, seconds)
            while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            if ended[0]:
                break
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
        if ended[1]:
            sys.exit((folder / "log").read_text()[-3000:])
        losses, weights = result(out)
        same = losses == expected[0] and all(torch.equal(weights[name], one) for name, one in expected[1].items())
        finished, different = finished + 1, different + (not same)
    return (
        f"{processes} processes, {workers} workers: {done} kills in {finished} runs of {STEPS} steps ({seconds:.0f} s each), "
        f"{different} differ"
    )


def full_disk(world: Path, processor: DeemProcessor, folder: Path) -> str:
    """Let no file pass a size that a checkpoint needs, while a run goes on: the last checkpoint must load."""
    out = folder / "full"
    child = start(world, processor, out, 0)
    while last_complete_checkpoint(out) is None:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    before = last_complete_checkpoint(out)
    code = os.waitstatus_to_exitcode(os.waitpid(start(world, processor, out, 0, limit=100_000), 0)[1])
    said = [line for line in (folder / "log").read_text().splitlines() if "Error" in line][-1]
    DeemForConditionalGeneration.from_pretrained(last_complete_checkpoint(out))
    whole = os.waitpid(start(world, processor, out, 0), 0)[1] == 0
    return f"full disk: exit {code}, {Path(before).name} loads, goes on: {whole}; said: {said[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of one process; half as many of two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default="alone,workers,processes,disk")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    parts = {
        "alone": (0, args.kills // 2, 1),
        "workers": (2, args.kills // 2, 1),
        "processes": (0, args.kills // 2, 2),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_formats(folder / "world", World(size=48), 24, formats=["mmc4", "captions"])
        encoder = ConvNextImageProcessorPil(size={"shortest_edge": 64})
        processor = DeemProcessor.from_parts(encoder, build_tokenizer(), num_image_tokens=4, target_size=64)
        for part in args.parts.split(","):
            (folder / part).mkdir()
            if part == "disk":
                print(full_disk(folder / "world", processor, folder / part), flush=True)
                continue
            workers, kills, processes = parts[part]
            print(killed(folder / "world", processor, folder / part, workers, kills, rng, processes), flush=True)


if __name__ == "__main__":
    main()
