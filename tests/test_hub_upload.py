# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The repo folder: what lies in it, that it loads without the package and answers the same, and what is refused."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import build_tokenizer
from deem_fixtures import STRUCTURE, Q, tiny_model
from scripts import run_script
from transformers import AutoModel, AutoProcessor, ConvNextImageProcessorPil

import hub_upload
from processing import DeemProcessor
from recipes.run_report.card import find_record, parameter_counts, write_card

CLASSES = ["DeemProcessor", "DeemImageProcessorPil", *["DeemForConditionalGeneration"] * 3, "DeemProcessor"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model and its processor as training leaves them: sharded, with the trainer's files."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint-7"
    model = tiny_model()
    model.generation_config.suppress_tokens = STRUCTURE
    model.generation_config.pad_token_id = model.config.pad_token_id
    model.save_pretrained(folder, max_shard_size="300KB")
    DeemProcessor.from_parts(
        ConvNextImageProcessorPil(size={"shortest_edge": 64}), build_tokenizer(), num_image_tokens=Q, target_size=64
    ).save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"not for the Hub")
    parts = {"perceiver": {"trainable": 120, "frozen": 0, "lr": [0.001], "weight_decay": [0.0]}}
    (folder.parent / "parts.json").write_text(json.dumps(parts))
    state = {"global_step": 7, "log_history": [{"step": 7, "text_loss": 1.25}, {"step": 7, "eval_loss": 2.0}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    counts = {"read": 1234, "rows": 617, "dropped_by_rule": 5, "skipped": {}, "example": {"question": 'Who is "it"?'}}
    report = {"photos/*.tar": counts}
    (folder.parent / "data_report.json").write_text(json.dumps(report))
    (folder / "metrics.json").write_text(json.dumps({"color": {"what": "colors named", "value": 0.5, "count": 10}}))
    return folder


@pytest.fixture(scope="module")
def repo(checkpoint, tmp_path_factory) -> Path:
    """The folder as it is uploaded; tests/first_hour.py makes a dry run, which tests it."""
    out = tmp_path_factory.mktemp("hub") / "deem"
    hub_upload.make_repo(checkpoint, out)
    licences = {"vision": "mit", "text": "apache-2.0"}
    write_card(out, checkpoint, "org/deem", find_record(checkpoint, "metrics.json"), licences=licences)
    return out


def test_the_folder_is_flat_and_whole(repo, checkpoint) -> None:
    names = {path.name for path in repo.iterdir()}
    assert all(path.is_file() for path in repo.iterdir())
    assert {path.name for path in hub_upload.code_files()} <= names
    assert {path.name for path in checkpoint.glob("*.safetensors*")} <= names and len(names) > 25
    assert {"chat_template.jinja", "tokenizer.json", "README.md", "LICENSE", "generation_config.json"} <= names
    assert not names & {"optimizer.pt", "trainer_state.json", "__init__.py", "data_report.json"}


def test_every_auto_class_has_an_entry(repo) -> None:
    maps = [json.loads((repo / name).read_text()) for name in ("config.json", "processor_config.json")]
    assert {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"} <= set(maps[0]["auto_map"])
    assert set(maps[1]["auto_map"]["AutoImageProcessor"]) == {"pil", "torchvision"}
    references = [value for value in maps[0]["auto_map"].values() if isinstance(value, str)]
    for reference in [*references, *maps[1]["image_processor"]["auto_map"]["AutoImageProcessor"].values()]:
        file, _, name = reference.partition(".")
        assert f"class {name}(" in (repo / f"{file}.py").read_text()


def test_the_card_tells_what_is_known(repo) -> None:
    card = (repo / "README.md").read_text()
    for expected in (
        "library_name: transformers",
        "| vision encoder | convnext |",
        "| mit |",
        "| not recorded |",  # the diffusion part's licence
        "| text_loss | cross-entropy of the next token | 1.0 | 1.25 at step 7 |",
        "| photos | 617 | 1,234 | 5 | 0 |",
        '{"type": "text", "text": "Who is \\"it\\"?"}',
        "| colors named | 0.5 |  | 10 |",
        "| optimizer steps | 7 |",
        "| `perceiver` trains | 120 parameters at a rate of at most 0.001 |",
        "Measured is what stands under Evaluation; no other figure is recorded.",
        "[modeling_deem.py](https://huggingface.co/org/deem/blob/main/modeling_deem.py)",
        "@inproceedings{luo2025deem,",
        "  title     = {{DEEM}: Diffusion",
        'from_pretrained("org/deem", trust_remote_code=True)',
    ):
        assert expected in card, expected
    total = sum(parameter_counts(repo).values())
    assert total == sum(parameter.numel() for parameter in tiny_model().parameters())


def test_a_second_dry_run_replaces_the_folder_and_nothing_else(repo, checkpoint, tmp_path) -> None:
    copy = tmp_path / "again"
    shutil.copytree(repo, copy)
    (copy / "stale_deem.py").touch()
    hub_upload.make_repo(checkpoint, copy)
    assert not (copy / "stale_deem.py").exists()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="no repo folder"):
        hub_upload.make_repo(checkpoint, tmp_path)


def test_a_folder_that_does_not_load_is_refused(repo, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(repo, broken)
    (broken / "losses_deem.py").unlink()
    with pytest.raises(RuntimeError, match="(?s)does not load with trust_remote_code.*losses_deem"):
        hub_upload.probe(broken, with_package=False, drawing_steps=0)


# What `transformers serve --trust-remote-code` does with a request; the server itself needs packages of its own.
SERVE = """
import json, sys
sys.modules["modeling_deem"] = sys.modules["processing"] = None
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler

folder, request = sys.argv[1], json.loads(sys.argv[2])
manager = ModelManager(device="cpu", trust_remote_code=True, force_model=folder)
model, processor = manager.load_model_and_processor(manager.process_model_name(folder))
modality = manager.get_model_modality(model, processor)
messages = BaseHandler.get_processor_inputs_from_messages(request, modality)
options = {"add_generation_prompt": True, "tools": None, "load_audio_from_video": False, "return_dict": True}
inputs = processor.apply_chat_template(messages, tokenize=True, return_tensors="pt", **options)
letters = {token: text for text, token in processor.tokenizer.get_vocab().items() if text in "abcdefghijklmnopqrstuvwxyz"}
others = [token for token in range(model.config.text_config.vocab_size) if token not in letters]
stop = {"stop_strings": list(letters.values()), "suppress_tokens": others}
answers = [
    model.generate(**inputs, max_new_tokens=8, do_sample=False, tokenizer=processor, **more)[0].tolist()
    for more in ({}, stop)
]
prompt = inputs["input_ids"].shape[1]
print("SERVED " + json.dumps({"answers": [answer[prompt:] for answer in answers], "modality": modality.name}))
"""


def test_it_is_served_without_the_package(repo, checkpoint, tmp_path) -> None:
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
    text = {"type": "text", "text": "What is this?"}
    request = [{"role": "user", "content": [{"type": "image_url", "image_url": url}, text]}]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", SERVE, str(repo), json.dumps(request)],
        cwd=tmp_path,
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("SERVED ")]
    assert lines, result.stderr[-3000:]
    served = json.loads(lines[0].removeprefix("SERVED "))
    assert served["modality"] == "MULTIMODAL"

    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, text]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, **options)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer, stopped = served["answers"]
    assert answer == expected.tolist()
    assert len(stopped) == 1  # it can only write letters, and each of them is a stop string


def test_differences_are_refused() -> None:
    expected = {"classes": CLASSES, "answers": [[[1, 2]], "text"], "drawn": [0.5, 0.25]}
    hub_upload.compare_probes(expected, {**expected, "drawn": [0.5, 0.25 + 1e-5]})
    for change in ({"answers": [[[1, 3]], "text"]}, {"classes": CLASSES[:-1]}, {"drawn": [0.5, 0.26]}):
        with pytest.raises(RuntimeError, match="package"):
            hub_upload.compare_probes(expected, {**expected, **change})


def test_changed_code_is_named_and_stops_unless_allowed(checkpoint, tmp_path) -> None:
    assert hub_upload.changed_code(checkpoint) == []
    copy = tmp_path / "old"
    shutil.copytree(checkpoint, copy)
    digests = json.loads((copy / "code_digests.json").read_text())
    assert set(digests) == {path.name for path in hub_upload.code_files()}
    (copy / "code_digests.json").write_text(json.dumps({**digests, "losses_deem.py": "0"}))
    with pytest.raises(SystemExit, match="losses_deem.py.*--allow-changed-code"):
        hub_upload.main([str(copy), "--repo", "org/deem", "--dry-run", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (copy / "code_digests.json").unlink()
    assert hub_upload.changed_code(copy) is None


def test_incomplete_checkpoints_are_refused(checkpoint, tmp_path) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="lacks config.json.*safetensors.*adapter: merge it"):
        hub_upload.make_repo(tmp_path, tmp_path / "out")
    copy = tmp_path / "other"
    shutil.copytree(checkpoint, copy)
    (copy / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="'llava', expected 'deem'"):
        hub_upload.make_repo(copy, tmp_path / "out")
    for entries in (["sight=mit"], ["mit"]):
        with pytest.raises(
            ValueError, match="--part-licences got .*KEY=VALUE with KEY one of vision, text, diffusion"
        ):
            hub_upload.pairs("--part-licences", entries, hub_upload.PARTS)
    assert hub_upload.pairs("--data-names", ["a=b.csv=Cats"], ["a=b.csv"]) == {"a=b.csv": "Cats"}


class RecordingApi:
    """The Hub's client without the Hub."""

    calls: list[str] = []
    fails = False

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        self.calls.append(f"create {repo} private={private}")

    def upload_folder(self, folder_path: Path, repo_id: str, commit_message: str, delete_patterns: list[str]):
        assert "*.safetensors" in delete_patterns  # or an earlier file would hide today's shards
        if self.fails:
            raise OSError("no route to the Hub")
        self.calls.append(f"upload {folder_path.name}")
        return type("Commit", (), {"commit_url": "url"})


def test_nothing_is_uploaded_unless_the_test_passes(checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(hub_upload, "HfApi", RecordingApi)
    monkeypatch.setattr(RecordingApi, "calls", [])
    arguments = [str(checkpoint), "--repo", "org/deem", "--private", "--out", str(tmp_path / "deem")]
    code = hub_upload.PROBE
    monkeypatch.setattr(hub_upload, "PROBE", "raise ImportError('no such thing')")
    with pytest.raises(RuntimeError, match="no such thing"):
        hub_upload.main(arguments)
    assert RecordingApi.calls == []
    answer = json.dumps({"classes": CLASSES, "answers": [], "drawn": None})
    monkeypatch.setattr(hub_upload, "PROBE", f"print('PROBE ' + {answer!r})")
    hub_upload.main(arguments)
    assert RecordingApi.calls == ["create org/deem private=True", "upload deem"] and code != hub_upload.PROBE


def test_a_failed_upload_says_what_is_ready(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(hub_upload, "HfApi", RecordingApi)
    monkeypatch.setattr(RecordingApi, "fails", True)
    with pytest.raises(RuntimeError, match="deem is ready and tested, but was not uploaded to org/deem: no route"):
        hub_upload.upload(tmp_path / "deem", "org/deem")


def test_neither_the_checkpoint_nor_the_code_is_overwritten(checkpoint, tmp_path) -> None:
    folder = tmp_path / "again"
    hub_upload.make_repo(checkpoint, folder)
    before = {path.name for path in folder.iterdir()}
    root = Path(hub_upload.ROOT)
    for source, out, what in (
        (folder, folder, "the checkpoint"),
        (folder, tmp_path, "the checkpoint"),
        (checkpoint, root / "processing" / "hub", "the code processing"),
        (checkpoint, root / "modeling_deem", "the code modeling_deem"),
        (checkpoint, root, "the code"),
    ):
        with pytest.raises(ValueError, match=f"would overwrite {what}"):
            hub_upload.make_repo(source, out)
    assert {path.name for path in folder.iterdir()} == before and (root / "modeling_deem" / "__init__.py").is_file()
    other = tmp_path / "code"  # code alone is no repo folder
    other.mkdir()
    (other / "modeling_deem.py").touch()
    with pytest.raises(ValueError, match="is no repo folder of an earlier run"):
        hub_upload.make_repo(checkpoint, other)
    hub_upload.make_repo(checkpoint, folder)  # an earlier one is replaced
    assert hub_upload.changed_code(folder) == []


def test_help_from_anywhere(tmp_path) -> None:
    result = run_script(hub_upload.__file__, "--help", cwd=tmp_path, logs=tmp_path)
    assert result.returncode == 0 and "--dry-run" in result.stdout
