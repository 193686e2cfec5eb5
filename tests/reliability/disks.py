# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Disks that are full or cannot be written, while checkpoints, latents, reports and evaluations are on their way there.

    sudo python tests/reliability/disks.py

Each is a small tmpfs of its own, mounted here: full means ENOSPC, read-only EROFS, also in the midst of a run. Mounting
needs root; without it the limits of `kills.py` and `tests/recipes/test_whole_files.py` remain.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kills
import torch
from conftest import build_tokenizer
from deem_fixtures import tiny_model
from transformers import ConvNextImageProcessorPil

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor
from recipes.evaluate import EvaluateArguments, main
from recipes.run_report.page import write_report
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_formats
from recipes.training.latent_cache import LatentCache, transform_id, vae_id
from recipes.training.latent_writer import LatentArguments, fill
from recipes.training.resuming import last_complete_checkpoint, torn_files

ROOMY = "64m"


@contextmanager
def disk(folder: Path, size: str = ROOMY) -> Iterator[Path]:
    """A disk of its own at `folder`."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def change(folder: Path, options: str) -> None:
    """Mount a disk anew with other options; waits for files that are open for writing."""
    deadline = time.monotonic() + 60
    while subprocess.run(["mount", "-o", f"remount,{options}", folder], capture_output=True).returncode:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder} stayed busy")


def said(work: Callable[[], Any]) -> str:
    """What an OSError says of work that must not succeed."""
    try:
        work()
    except OSError as error:
        words = str(error)
        if not any(one in words for one in ("Make room or write access", "goes on from")):
            raise AssertionError(f"no words: {words}") from error
        return words
    raise AssertionError("succeeded")


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def last_words(folder: Path) -> str:
    return [line for line in (folder / "log").read_text().splitlines() if line.startswith("OSError")][-1][:400]


def checkpoints(world: Path, processor: DeemProcessor, folder: Path) -> None:
    """A run whose disk is full, then read-only from the start, then in its midst; at last it ends as one without faults."""
    folder.mkdir()
    if ended(kills.start(world, processor, folder / "whole", 0)):
        sys.exit((folder / "log").read_text()[-3000:])
    expected = kills.result(folder / "whole")
    one = sum(file.stat().st_size for file in Path(last_complete_checkpoint(folder / "whole")).iterdir())
    with disk(folder / "disk", str(int(2.5 * one))) as out:
        print(f"checkpoints of {one / 2**20:.1f} MB, full disk: exit {ended(kills.start(world, processor, out, 0))}")
        sound(out)
        change(out, f"size={ROOMY}")
        change(out, "ro")
        print(f"read-only from the start: exit {ended(kills.start(world, processor, out, 0))}")
        sound(out)
        change(out, "rw")
        child, before = kills.start(world, processor, out, 0), last_complete_checkpoint(out)
        while last_complete_checkpoint(out) == before:
            time.sleep(0.05)
        change(out, "ro")
        print(f"read-only in the midst: exit {ended(child)}")
        sound(out)
        change(out, "rw")
        if ended(kills.start(world, processor, out, 0)):
            sys.exit((folder / "log").read_text()[-3000:])
        losses, weights = kills.result(out)
        same = losses == expected[0] and all(torch.equal(weights[name], one) for name, one in expected[1].items())
        print(f"goes on to its end: losses and weights {'bit-equal' if same else 'DIFFER'}", flush=True)


def sound(out: Path) -> None:
    """Say what the run said last; its last checkpoint must be whole and load."""
    last = last_complete_checkpoint(out)
    assert not torn_files(last), torn_files(last)
    DeemForConditionalGeneration.from_pretrained(last)
    print(f"  {Path(last).name} loads; said: {last_words(out.parent)}", flush=True)


def latents(processor: DeemProcessor, folder: Path) -> None:
    """A cache that is filled until its disk is full, then on a read-only one, then to its end."""
    decoder, images = tiny_model().image_decoder, [World(size=64).scene(index).image for index in range(40)]
    arguments = LatentArguments(latent_batch_size=4, shard_size=4)

    def go(place: Path) -> None:
        fill(place, decoder, processor, iter(images), arguments)

    def cache(place: Path) -> LatentCache:
        one = LatentCache(place, vae_id(decoder.vae), transform_id(processor))
        one.verify()
        return one

    with disk(folder, "48k") as place:
        words = said(lambda: go(place))
        print(
            f"latents, full disk: {len(cache(place))} of 40 are whole, {len(list(place.glob('*unfinished')))} halves; {words}"
        )
        change(place, "ro")
        print(f"latents, read-only: {said(lambda: go(place))}")
        change(place, f"rw,size={ROOMY}")
        go(place)
        print(f"latents: goes on to {len(cache(place))} of 40", flush=True)


def pages(processor: DeemProcessor, folder: Path) -> None:
    """Evaluation files and the run report, over older ones, on a full and on a read-only disk."""
    model = folder / "model"
    tiny_model().save_pretrained(model)
    processor.save_pretrained(model)
    counts = {f"num_{name}": 0 for name in ("captions", "consistency", "drawings", "regions")}
    counts |= {"num_questions": 2, "num_samples": 1, "num_inference_steps": 1}
    with disk(folder / "disk") as place:
        evaluate = EvaluateArguments(model=str(model), out=str(place / "evaluation"), **counts)

        def contents() -> dict[str, bytes]:
            return {
                str(file): file.read_bytes() for file in sorted(place.rglob("*")) if file.suffix in (".json", ".html")
            }

        main(evaluate)
        write_report(place)
        whole, used = contents(), int(subprocess.check_output(["df", "--output=used", "-B1", place]).split()[-1])
        change(place, f"size={used + 4096}")
        for name, work in (("evaluation", lambda: main(evaluate)), ("report", lambda: write_report(place))):
            words = said(work)
            print(f"{name}, full disk: what was there before is {'whole' if contents() == whole else 'LOST'}; {words}")
        change(place, f"ro,size={ROOMY}")
        for name, work in (("evaluation", lambda: main(evaluate)), ("report", lambda: write_report(place))):
            print(f"{name}, read-only: {said(work)}", flush=True)
        assert contents() == whole


def run() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with disk(folder / "probe"):
                pass
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"not run: no disk can be mounted here ({error})")
            return
        write_formats(folder / "world", World(size=48), 24, formats=["mmc4", "captions"])
        encoder = ConvNextImageProcessorPil(size={"shortest_edge": 64})
        processor = DeemProcessor.from_parts(encoder, build_tokenizer(), num_image_tokens=4, target_size=64)
        checkpoints(folder / "world", processor, folder / "checkpoints")
        latents(processor, folder / "latents")
        (folder / "pages").mkdir()
        pages(processor, folder / "pages")


if __name__ == "__main__":
    run()
