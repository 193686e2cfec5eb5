# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Ten thousand bad inputs: every outcome is right, skipped and counted, or a ValueError of ours.

    python tests/reliability/fuzz.py [--count 10000] [--seed 0] [--kinds images,arrays,...] [--only KIND:SEED]

A failure is any other exception, more than 10 s, or more than 1 GB of memory. Each is printed with the command that
repeats it.
"""

import argparse
import io
import json
import logging
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from mutations import STRANGE, encoded, sound_image, spoiled_bytes, spoiled_json, strange_array
from PIL import Image
from transformers import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from conftest import build_tokenizer  # noqa: E402
from deem_fixtures import tiny_batch, tiny_config, tiny_model  # noqa: E402
from transformers import ConvNextImageProcessorPil  # noqa: E402

from modeling_deem import DeemConfig, DeemImageDecoderConfig, DeemPerceiverConfig  # noqa: E402
from processing import DeemDataCollator, DeemProcessor  # noqa: E402
from recipes.data.faults import DataReport  # noqa: E402
from recipes.data.sources import make_reader  # noqa: E402
from recipes.data.stream.shuffle import ReaderPass  # noqa: E402
from recipes.synthetic.scenes import World  # noqa: E402
from recipes.synthetic.writers import FORMATS, MORE_FORMATS, write_formats  # noqa: E402

SECONDS, BYTES = 10, 1 << 30
PACKAGE = tuple(str(ROOT / name) for name in ("modeling_deem", "processing", "recipes"))
CARD = Image.new("RGB", (20, 30), "red")

PARTS = {"perceiver_config": DeemPerceiverConfig, "image_decoder_config": DeemImageDecoderConfig}


class Hang(BaseException):
    """Raised by the alarm."""


class Fuzzer:
    """What the cases share: a processor, a collator, a tiny model and small data of every format.

    Args:
        folder: where data is written.
    """

    def __init__(self, folder: Path) -> None:
        encoder = ConvNextImageProcessorPil(size={"shortest_edge": 64})
        sizes = {"num_image_tokens": 4, "target_size": 64, "grounding_tokens": True}
        self.processor = DeemProcessor.from_parts(encoder, build_tokenizer(), **sizes)
        self.collator = DeemDataCollator(self.processor)
        self.folder, self.model = folder, tiny_model()
        write_formats(folder / "world", World(size=48), 3, formats=[*FORMATS, *MORE_FORMATS])
        files = [file for file in sorted((folder / "world").rglob("*")) if file.is_file()]
        self.annotations = [
            file for file in files if file.suffix in (".json", ".jsonl", ".csv") and file.stem != "truth"
        ]
        self.tars = [file for file in files if file.suffix == ".tar"]

    # ---- kinds: each takes a generator and returns how it came out ----

    def images(self, rng: random.Random) -> str:
        """Spoiled image files by the doors of the processor."""
        data = spoiled_bytes(encoded(*sound_image(rng), rng), rng)
        path = self.folder / "image.bin"
        path.write_bytes(data)
        doors: list[Callable[[], Any]] = [lambda: data, lambda: str(path), lambda: Image.open(io.BytesIO(data))]
        try:
            image = rng.choice(doors)()
        except Exception:
            return "not opened by Pillow"  # the caller's own call
        return self._seen(self.processor(text="<image> a", images=image, return_tensors="pt"), 1)

    def arrays(self, rng: random.Random) -> str:
        """Arrays and tensors of any kind as images and region masks."""
        image: Any = strange_array(rng)
        if (
            rng.random() < 0.3
            and isinstance(image, np.ndarray)
            and image.dtype.kind in "uifb"
            and image.dtype != np.uint16
        ):
            image = torch.from_numpy(image)
        if rng.random() < 0.3:
            masks = rng.choice([strange_array(rng), [strange_array(rng)], [None], rng.choice(STRANGE)])
            return self._seen(self.processor.image_processor(CARD, region_masks=masks, return_tensors="pt"), 1)
        return self._seen(self.processor(text="<image> a", images=image, return_tensors="pt"), 1)

    def texts(self, rng: random.Random) -> str:
        """Texts and numbers of images that do not belong together."""
        pieces = [
            "<image>",
            "<|startofimage|>",
            "<s>",
            "</s>",
            "<box>",
            "a",
            " ",
            "\n",
            "\ud800",
            "é",
            "<im",
            "age>",
            "<pad>",
        ]
        text: Any = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 8)))
        text = rng.choice([text, [text], [text, text], rng.choice(STRANGE), [rng.choice(STRANGE)]])
        images = rng.choice([None, CARD, [CARD], [CARD, CARD], [[CARD], [CARD]], [], [[]], rng.choice(STRANGE)])
        options = rng.choice([{}, {"padding": True}, {"truncation": True, "max_length": 3}, {"return_tensors": "pt"}])
        return self._done(self.processor(text=text, images=images, **options))

    def chats(self, rng: random.Random) -> str:
        """Chats with values taken out or exchanged."""
        said = [{"type": "image", "image": CARD.tobytes().hex()}, {"type": "text", "text": "What is it?"}]
        chat: Any = [{"role": "user", "content": said}, {"role": "assistant", "content": "A card."}]
        chat = spoiled_json(chat, rng)
        for message in chat if isinstance(chat, list) else []:
            parts = message.get("content") if isinstance(message, dict) else None
            for part in parts if isinstance(parts, list) else []:
                if isinstance(part, dict) and "image" in part and rng.random() < 0.8:
                    part["image"] = CARD
        options = {"tokenize": rng.random() < 0.8, "return_dict": True, "add_generation_prompt": rng.random() < 0.5}
        return self._done(self.processor.apply_chat_template(chat, **options))

    def samples(self, rng: random.Random) -> str:
        """Samples of every form, spoiled, through the collator."""
        forms = [
            {"text": "A <image> card.", "images": ["IMAGE"]},
            {"text": "It is red.", "images": []},
            {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "Red."}], "images": ["IMAGE"]},
            {"text": "<image> here", "images": ["IMAGE"], "region_masks": ["MASK"]},
            {"samples": [{"text": "A <image>", "images": ["IMAGE"]}, {"text": "more", "images": []}]},
        ]  # fmt: skip
        picked = [spoiled_json(rng.choice(forms), rng), rng.choice(forms)]
        samples = [self._with_images(sample) for sample in picked[: rng.choice([1, 2])]]
        return self._done(self.collator(samples))

    def annotations_of_data(self, rng: random.Random) -> str:
        """Annotation files of every format, spoiled as JSON or as bytes, through the reader of the format."""
        file = rng.choice(self.annotations)
        data = file.read_bytes()
        if file.suffix == ".json" and data.count(b"\n") <= 1 and rng.random() < 0.7:
            spoiled = json.dumps(spoiled_json(json.loads(data), rng)).encode("utf-8", "surrogatepass")
        elif file.suffix == ".jsonl" and rng.random() < 0.7:
            lines = [spoiled_json(json.loads(line), rng) for line in data.splitlines() if line.strip()]
            spoiled = "\n".join(map(json.dumps, lines)).encode("utf-8", "surrogatepass")
        else:
            spoiled = spoiled_bytes(data, rng)
        return self._read(file, spoiled, data)

    def tar_files(self, rng: random.Random) -> str:
        """Tars of images and captions with their bytes spoiled."""
        file = rng.choice(self.tars)
        data = file.read_bytes()
        return self._read(file, spoiled_bytes(data, rng), data)

    def tensors(self, rng: random.Random) -> str:
        """Batches of the model with one tensor of another kind, shape or content."""
        batch = tiny_batch("btitti", "btit", targets=rng.random() < 0.5)
        name = rng.choice(list(batch))
        given = batch[name]
        way = rng.choice(["cut", "nan", "inf", "type", "empty", "more", "flat", "none", "strange"])
        if way == "cut":
            batch[name] = given[..., : max(given.shape[-1] // 2, 1)]
        elif way in ("nan", "inf") and given.is_floating_point():
            batch[name] = given.clone()
            batch[name][0] = float(way)
        elif way == "type":
            batch[name] = given.to(rng.choice([torch.float64, torch.float16, torch.int32, torch.bool]))
        elif way == "empty":
            batch[name] = given[:0]
        elif way == "more":
            batch[name] = torch.cat([given, given])
        elif way == "flat":
            batch[name] = given[0]
        elif way == "none":
            batch[name] = None
        elif way == "strange":
            batch[name] = rng.choice(STRANGE)
        with torch.no_grad():
            outputs = self.model(**batch)
        return "computed" if outputs.logits is not None else "nothing"

    def options(self, rng: random.Random) -> str:
        """Fields of a config exchanged for strange values."""
        fields = tiny_config().to_dict()
        fields = {key: fields[key] for key in DeemConfig.__annotations__ if key in fields}
        for key, kind in PARTS.items():  # fields of the library's own are not ours
            fields[key] = {name: fields[key][name] for name in kind.__annotations__ if name in fields[key]}
        fields["image_decoder_config"]["perceiver_config"] = dict(fields["perceiver_config"], hidden_size=32)
        name = rng.choice(sorted(set(fields) - {"vision_config", "text_config"}))
        value = fields[name]
        fields[name] = spoiled_json(value, rng) if isinstance(value, dict) and value else rng.choice(STRANGE)
        return self._done(DeemConfig(**fields))

    # ---- parts of cases ----

    def _with_images(self, value: Any) -> Any:
        marks = {"IMAGE": CARD, "MASK": np.ones((30, 20), bool)}
        if isinstance(value, dict):
            return {key: self._with_images(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._with_images(inner) for inner in value]
        return marks.get(value, value) if isinstance(value, str) else value

    def _read(self, file: Path, spoiled: bytes, sound: bytes) -> str:
        """Read the file's format with the file spoiled; the account must add up."""
        relative = file.relative_to(self.folder / "world")
        source = self.folder / "world" / relative.parts[0]
        file.write_bytes(spoiled)
        try:
            data, reader = make_reader(str(source), self.processor, "plain")
            report = DataReport()
            samples = [sample for _, sample in ReaderPass(reader, report, seed=0, finish=self._collated)]
        finally:
            file.write_bytes(sound)
        counts = report.to_dict()  # raises where an entry has no outcome, or two
        foreseen = sum(len(one["skipped"]) for one in counts.values())
        unforeseen = [reason for one in counts.values() for reason in one["skipped"] if "Error)" in reason]
        if unforeseen:
            raise AssertionError(f"no reader foresaw: {unforeseen}")
        return "skipped and counted" if foreseen else f"read {len(samples) > 0}"

    def _collated(self, sample: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        self.collator.check(sample)
        return sample

    @staticmethod
    def _seen(inputs: Any, count: int) -> str:
        pixels = inputs["pixel_values"]
        assert pixels.shape == (count, 3, 64, 64) and pixels.isfinite().all(), "pixels are not finite"
        return "read"

    @staticmethod
    def _done(value: Any) -> str:
        return "read"


KINDS = {
    "images": 0.25, "arrays": 0.1, "texts": 0.1, "chats": 0.1, "samples": 0.1, "annotations_of_data": 0.15,
    "tar_files": 0.05, "tensors": 0.1, "options": 0.05,
}  # fmt: skip


def is_ours(error: BaseException) -> bool:
    """Whether an error is a ValueError that the package raised itself, with words."""
    if isinstance(error, StrictDataclassError):
        return True  # a field of a config, its value and the type expected
    if not isinstance(error, ValueError) or len(str(error)) < 20:
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    # transformers' own count of images and placeholders says what was given
    return last.filename.startswith(PACKAGE) or last.name == "validate_inputs"


def run(fuzzer: Fuzzer, kind: str, seed: int) -> tuple[str, str | None]:
    """Outcome of one case, and what is wrong with it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(SECONDS)
    try:
        outcome, fault = getattr(fuzzer, kind)(random.Random(f"{kind}/{seed}")), None
    except Hang:
        outcome, fault = "hang", f"more than {SECONDS} s"
    except Exception as error:
        outcome, fault = "refused", None
        if not is_ours(error):
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = "failure"
            fault = f"{type(error).__name__}: {str(error)[:160]!r} at {Path(where.filename).name}:{where.lineno}"
    finally:
        signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > BYTES:
        fault = f"{fault or outcome}, and {grown / 2**30:.1f} GB of memory"
    return outcome, fault


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--only", help="KIND:SEED, one case with its traceback")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()

    def ring(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        if args.only:
            kind, seed = args.only.split(":")
            print(getattr(fuzzer, kind)(random.Random(f"{kind}/{seed}")))
            return
        kinds, start = args.kinds.split(","), time.monotonic()
        share = sum(KINDS[kind] for kind in kinds)
        outcomes, faults = {kind: Counter() for kind in kinds}, {}
        for kind in kinds:
            first = args.seed * 1_000_000  # runs of two seeds have no case in common
            for seed in range(first, first + round(args.count * KINDS[kind] / share)):
                outcome, fault = run(fuzzer, kind, seed)
                outcomes[kind][outcome] += 1
                if fault:
                    faults.setdefault(f"{kind}: {fault}", []).append(seed)
    for kind, counts in outcomes.items():
        print(f"{kind:22}{sum(counts.values()):6} cases  {dict(counts)}")
    for fault, seeds in sorted(faults.items(), key=lambda pair: -len(pair[1])):
        print(f"{len(seeds):5} x {fault}  --only {fault.split(':')[0]}:{seeds[0]}")
    figures = {
        "cases": sum(sum(counts.values()) for counts in outcomes.values()),
        "failures": sum(map(len, faults.values())),
        "seconds": round(time.monotonic() - start),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "outcomes": {kind: dict(counts) for kind, counts in outcomes.items()},
    }
    print(json.dumps({name: value for name, value in figures.items() if name != "outcomes"}))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
