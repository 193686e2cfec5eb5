# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Ten thousand steps: memory that stays, checkpoints that rotate, and answers of four threads that do not mix.

python tests/reliability/endurance.py [--steps 10000] [--calls 1000]
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import ConvNextImageProcessorPil, TrainerCallback, TrainingArguments

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from conftest import build_tokenizer  # noqa: E402
from deem_fixtures import tiny_batch, tiny_model  # noqa: E402

from modeling_deem import DeemTrainer  # noqa: E402
from processing import DeemDataCollator, DeemProcessor  # noqa: E402


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


class Memory(TrainerCallback):
    """Resident memory every hundredth of the run."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % max(state.max_steps // 100, 1) == 0:
            self.seen.append(resident())


def train(steps: int, folder: Path) -> str:
    """Train, save every tenth step, and say how memory grew after the first fifth."""
    encoder = ConvNextImageProcessorPil(size={"shortest_edge": 32})
    processor = DeemProcessor.from_parts(encoder, build_tokenizer(), num_image_tokens=4, target_size=64)
    colors = ("red", "green", "blue", "white")
    rows = [{"text": f"A <image> {color} card.", "images": [Image.new("RGB", (40, 30), color)]} for color in colors]
    rows += [{"text": "No card at all, and a text of another length.", "images": []}]
    args = TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", max_steps=steps, logging_steps=steps // 10,
        save_steps=max(steps // 1000, 1), save_total_limit=2, per_device_train_batch_size=1, logging_nan_inf_filter=False,
    )  # fmt: skip
    model = tiny_model()
    model.model.language_model.requires_grad_(False)
    model.image_decoder.denoiser.requires_grad_(False)
    memory, began = Memory(), time.monotonic()
    DeemTrainer(model, args, DeemDataCollator(processor), train_dataset=rows, callbacks=[memory]).train()
    warm, late = (sum(part) / len(part) for part in (memory.seen[20:30], memory.seen[-10:]))
    kept = sorted(path.name for path in folder.glob("checkpoint-*"))
    return (
        f"{steps} steps and {steps // args.save_steps} checkpoints in {time.monotonic() - began:.0f} s: resident memory "
        f"{warm:.0f} MB after warm-up, {late:.0f} MB at the end ({late / warm - 1:+.2%}); kept: {', '.join(kept)}"
    )


def answer(calls: int, threads: int = 4) -> str:
    """Generate from several threads on one model; each must answer as it would alone."""
    model = tiny_model(image_decoder_config=None)
    words = ("btitt", "bti", "btitit", "btt")
    batches = [tiny_batch(word, targets=False, seed=index) for index, word in enumerate(words)]
    alone = [model.generate(**batch, max_new_tokens=8, do_sample=False) for batch in batches]
    wrong: list[int] = []

    def ask(index: int) -> None:
        for _ in range(calls // threads):
            found = model.generate(**batches[index % len(batches)], max_new_tokens=8, do_sample=False)
            if not torch.equal(found, alone[index % len(batches)]):
                wrong.append(index)

    began, before = time.monotonic(), resident()
    workers = [threading.Thread(target=ask, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return (
        f"{calls} answers of {threads} threads in {time.monotonic() - began:.0f} s: {len(wrong)} unlike those of one thread; "
        f"memory {resident() - before:+.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=1_000)
    parser.add_argument("--out", type=Path, help="where to write what was said, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    said = [answer(args.calls)]
    print(said[0], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        said.append(train(args.steps, Path(folder)))
    print(said[1], flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
