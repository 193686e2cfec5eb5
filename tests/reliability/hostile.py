# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Files that want more than to be read: nothing runs, nothing outside of the given folders is read or written.

python tests/reliability/hostile.py
"""

import io
import json
import os
import pickle
import random
import struct
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mutations import png_chunk
from PIL import Image
from transformers import AutoModel, ConvNextImageProcessorPil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from conftest import build_tokenizer  # noqa: E402
from deem_fixtures import tiny_model  # noqa: E402

from modeling_deem import DeemForConditionalGeneration  # noqa: E402
from processing import DeemProcessor  # noqa: E402
from recipes.data.faults import DataReport  # noqa: E402
from recipes.data.sources import make_reader  # noqa: E402
from recipes.data.stream.shuffle import ReaderPass  # noqa: E402

SECRET = (12, 34, 56)  # color of the image that no row may read


class Runs:
    """Unpickling it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


class Hostile:
    """The cases; each returns what was said instead of obeying.

    Args:
        folder: `inside` is the data folder, `secret.png` and `canary` lie beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.inside, self.canary = folder, folder / "inside", folder / "canary"
        self.inside.mkdir()
        Image.new("RGB", (48, 48), SECRET).save(folder / "secret.png")
        encoder = ConvNextImageProcessorPil(size={"shortest_edge": 64})
        sizes = {"num_image_tokens": 4, "target_size": 64, "grounding_tokens": True}
        self.processor = DeemProcessor.from_parts(encoder, build_tokenizer(), **sizes)

    def read(self, source: Path) -> str:
        """Read a source; what it refused by reason. AssertionError if the secret image was read."""
        _, reader = make_reader(str(source), self.processor, "plain")
        report = DataReport()
        for _, sample in ReaderPass(reader, report, seed=0):
            for image in sample.get("images", []):
                assert image.convert("RGB").getpixel((0, 0)) != SECRET, "the secret image was read"
        return str(
            {reason: one["count"] for one in report.to_dict().values() for reason, one in one["skipped"].items()}
        )

    def rows(self, image: str) -> str:
        """A row that names an image outside of its folder."""
        Image.new("RGB", (48, 48), "red").save(self.inside / "a.png")
        lines = [{"image": name, "text": "a card"} for name in ("a.png", image)]
        (self.inside / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return self.read(self.inside / "rows.jsonl")

    def upwards(self) -> str:
        return self.rows("../secret.png")

    def absolute(self) -> str:
        return self.rows(str(self.folder / "secret.png"))

    def address_of_a_file(self) -> str:
        return self.rows(f"file://{self.folder}/secret.png")

    def tar_with_paths(self) -> str:
        """Members that point out of the tar, by name and by link."""
        buffer = io.BytesIO()
        Image.new("RGB", (48, 48), "red").save(buffer, "PNG")
        with tarfile.open(self.inside / "a.tar", "w") as tar:
            for name, data in (
                ("../../canary.txt", b"x"),
                ("../../canary.png", buffer.getvalue()),
                ("/canary.txt", b"y"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info = tarfile.TarInfo(f"link{int(kind)}.png")
                info.type, info.linkname = kind, str(self.folder / "secret.png")
                tar.addfile(info)
        said = self.read(self.inside / "a.tar")
        assert not list(self.folder.rglob("canary*")), "a member was written"
        return said

    def pickled_annotations(self) -> str:
        """RefCOCO's annotations are pickles; they are read without running them."""
        folder = self.inside / "refcoco"
        folder.mkdir()
        (folder / "refs(unc).p").write_bytes(pickle.dumps([Runs(self.canary)]))
        (folder / "instances.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
        return self.read(folder)

    def pickled_weights(self) -> str:
        """A checkpoint whose weights are a pickle that runs."""
        model = self.folder / "pickled"
        tiny_model(image_decoder_config=None).save_pretrained(model)
        (model / "model.safetensors").unlink()
        torch.save({"a": Runs(self.canary)}, model / "pytorch_model.bin")
        return self.refusal(lambda: DeemForConditionalGeneration.from_pretrained(model))

    def tampered_weights(self) -> str:
        """A header that says more than the file holds."""
        model = self.folder / "tampered"
        tiny_model(image_decoder_config=None).save_pretrained(model)
        data = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + data[8:])
        return self.refusal(lambda: DeemForConditionalGeneration.from_pretrained(model))

    def code_in_a_config(self) -> str:
        """A config that names code beside it, which is not run unasked."""
        model = self.folder / "code"
        model.mkdir()
        (model / "config.json").write_text(
            json.dumps({"model_type": "deem_evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}})
        )
        (model / "evil.py").write_text(f"open({str(self.canary)!r}, 'w')\nclass Evil: pass\n")
        return self.refusal(lambda: AutoModel.from_pretrained(model, trust_remote_code=False))

    def chat_template(self) -> str:
        """A template that tries to reach Python."""
        self.processor.chat_template = (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch "
            + str(self.canary)
            + "') }}"
        )
        chat = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        return self.refusal(lambda: self.processor.apply_chat_template(chat))

    def bomb(self) -> str:
        """A few bytes that would be an image of gigabytes."""
        data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
        data += png_chunk(b"IDAT", zlib.compress(bytes(10_000_000))) + png_chunk(b"IEND", b"")
        said = self.refusal(lambda: self.processor(text="<image>", images=data))
        (self.inside / "bomb.png").write_bytes(data)
        return f"{said} / {self.rows('bomb.png')}"

    @staticmethod
    def refusal(call: Callable[[], Any]) -> str:
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:150]}"
        raise AssertionError("not refused")


CASES = (
    "upwards", "absolute", "address_of_a_file", "tar_with_paths", "pickled_annotations", "pickled_weights",
    "tampered_weights", "code_in_a_config", "chat_template", "bomb",
)  # fmt: skip


def main() -> None:
    random.seed(0)
    failures = 0
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            hostile = Hostile(Path(folder))
            try:
                said = getattr(hostile, name)()
                assert not hostile.canary.exists(), "code ran"
            except AssertionError as error:
                failures, said = failures + 1, f"FAILED: {error}"
        print(f"{name:22}{said}")
    print(f"{len(CASES)} cases, {failures} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
