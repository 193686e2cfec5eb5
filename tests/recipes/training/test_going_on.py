# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a run goes on from: the right checkpoint, whole, of the same run; and steps of NaN, which leave no trace."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deem_fixtures import tiny_model
from transformers import AutoModel

from modeling_deem import DeemForConditionalGeneration
from recipes import pretrain
from recipes.generation.checkpoint import load_for_inference
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_formats
from recipes.training.resuming import CHECKSUMS, last_complete_checkpoint, torn_files
from recipes.training.run import load_for_training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_formats(folder, World(size=64), 12, formats=["captions"])
    return folder


@pytest.fixture
def run(world, tiny_processor, tmp_path, monkeypatch):
    """Runs recipes/pretrain.py on a tiny checkpoint for so many steps; gives the log."""
    tiny_model().save_pretrained(tmp_path / "deem")
    tiny_processor.save_pretrained(tmp_path / "deem")

    def run(max_steps: int = 4, **options: Any) -> list[dict[str, Any]]:
        flags = {
            **{"model": tmp_path / "deem", "data": world / "captions", "output_dir": tmp_path / "run"},
            **{"max_steps": max_steps, "save_steps": 2, "logging_steps": 1, "save_total_limit": 5, "pack_length": 60},
            **{"per_device_train_batch_size": 2, "groups": "{}", "report_to": "none", "disable_tqdm": "true"},
            **{"lr_scheduler_type": "constant", "warmup_steps": 0, **options},
        }
        argv = ["pretrain.py", *(str(x) for key, value in flags.items() for x in (f"--{key}", value))]
        monkeypatch.setattr(sys, "argv", argv)
        pretrain.main()
        log = json.loads(Path(flags["output_dir"], "trainer_state.json").read_text())["log_history"]
        return [one for one in log if "loss" in one]

    return run


# ---- which checkpoint ----


def test_it_says_where_it_goes_on_and_refuses_another_start(run, tmp_path, capsys):
    run()
    shutil.copytree(tmp_path / "deem", tmp_path / "other")
    for steps in (6, 4):  # a run that is done already, too
        with pytest.raises(
            ValueError, match=r"began from --model .*deem, this one names --model .*other, which would"
        ):
            run(steps, model=tmp_path / "other")
    os.symlink(tmp_path / "deem", tmp_path / "link")
    assert [log["step"] for log in run(6, model=tmp_path / "link")] == [1, 2, 3, 4, 5, 6]
    assert f"Going on from {tmp_path / 'run' / 'checkpoint-4'} at step 4." in capsys.readouterr().out


def test_a_run_that_starts_anew_is_not_mixed_with_the_old_one(run, tmp_path, tiny_processor):
    run(6)
    other = tiny_model(seed=5)
    other.save_pretrained(tmp_path / "other")
    tiny_processor.save_pretrained(tmp_path / "other")
    logs = run(2, model=tmp_path / "other", resume_from_checkpoint="false")
    assert [log["step"] for log in logs] == [1, 2]
    assert Path(last_complete_checkpoint(tmp_path / "run")).name == "checkpoint-2"
    initial = AutoModel.from_pretrained(tmp_path / "run" / "initial").state_dict()
    assert all(torch.equal(tensor, initial[name]) for name, tensor in other.state_dict().items())


def test_what_the_optimizer_would_not_hear_is_refused(run, tmp_path):
    run(2)
    refused = [
        ({"learning_rate": 5e-4}, "was trained with learning_rate 0.001, this run has 0.0005; the optimizer's state"),
        ({"optim": "sgd"}, "was trained with optim adamw_torch(_fused)?, this run has sgd"),
        ({"adam_beta2": 0.9}, "was trained with adam_beta2 0.995, this run has 0.9"),
        ({"freeze": "image_decoder"}, r"was trained with freeze \[.*\], this run has \['image_decoder'\]"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=f"{message}.*--resume_from_checkpoint false"):
            run(4, **options)
    for name in ("optimizer.pt", "scheduler.pt"):  # a lost state does not restart the schedule
        file = tmp_path / "run" / "checkpoint-2" / name
        file.rename(tmp_path / name)
        with pytest.raises(ValueError, match=f"checkpoint-2 holds no {name}: the schedule would begin anew"):
            run(4)
        (tmp_path / name).rename(file)


# ---- torn files ----


def test_a_torn_checkpoint_is_named_and_passed_over(run, tmp_path, capsys):
    whole = run(6, output_dir=tmp_path / "whole")
    run(4)
    for name in ("optimizer.pt", "trainer_state.json", "data_position_0.pt", "model.safetensors"):
        file = tmp_path / "run" / "checkpoint-4" / name
        content = file.read_bytes()
        os.truncate(file, len(content) // 2)
        assert torn_files(file.parent) == [str(file)]
        if name != "model.safetensors":
            file.write_bytes(content)
    logs = run(6)
    said = capsys.readouterr().out
    assert f"{file} cannot be read as it was written (damaged, cut or lost): {file.parent} is passed over." in said
    assert "checkpoint-2 at step 2." in said
    assert [log["loss"] for log in logs] == [log["loss"] for log in whole] and not torn_files(file.parent)


def test_without_a_whole_checkpoint_nothing_starts_by_itself(run, tmp_path):
    """One byte changed in any file, also where no format can tell: in weights and states, in a JSON that stays one."""
    run(2)
    folder = tmp_path / "run" / "checkpoint-2"
    files = [file for file in folder.iterdir() if file.name not in (CHECKSUMS, "complete") and file.stat().st_size]
    assert len(files) > 10 and not torn_files(folder)
    for file in files:
        content = file.read_bytes()
        file.unlink()
        assert torn_files(folder) == (
            [] if file.name in ("optimizer.pt", "scheduler.pt") else [str(file)]
        )  # see above
        for at in {0, 8, len(content) // 2, len(content) - 2}:
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert torn_files(folder) == [str(file)]
        file.write_bytes(content)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be .*\(delete checksums.json if it was changed"):
        run(4)
    (folder / CHECKSUMS).unlink()
    assert not torn_files(folder)
    os.truncate(file, 1000)
    for named in ({}, {"resume_from_checkpoint": file.parent}):
        with pytest.raises(ValueError, match=r"model.safetensors cannot be read as it was .*and there is no other"):
            run(4, **named)
    with pytest.raises(ValueError, match=r"is no checkpoint: it holds no trainer_state.json"):
        run(4, resume_from_checkpoint=tmp_path / "deem")
    os.truncate(tmp_path / "deem" / "model.safetensors", 5000)
    with pytest.raises(ValueError, match=r"deem/model.safetensors cannot be read as it was .* Copy the file anew"):
        load_for_training(str(tmp_path / "deem"))


# ---- NaN ----


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, loss: str | None) -> None:
    """One loss of a training step becomes NaN, or (None) the gradient inf where the losses are sound."""
    forward, calls = DeemForConditionalGeneration.forward, []

    def spoilt(self, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == step:
            if loss is None:
                outputs.text_loss.register_hook(lambda gradient: gradient * float("inf"))
            else:
                outputs[loss] = outputs[loss] * float("nan")
        return outputs

    monkeypatch.setattr(DeemForConditionalGeneration, "forward", spoilt)


@pytest.mark.parametrize("loss", ["consistency_loss", None])
def test_a_step_of_nan_stops_the_run_and_names_its_samples(run, tmp_path, monkeypatch, loss):
    spoil(monkeypatch, 3, loss)
    what = loss or "the gradient, all losses finite"
    message = rf"NaN or inf in {what} of \d+\.tar/\d+.*, in step 3\. No step was made of it.*--on_nan skip"
    with pytest.raises(ValueError, match=message):
        run()
    saved = AutoModel.from_pretrained(last_complete_checkpoint(tmp_path / "run"))
    assert all(torch.isfinite(tensor).all() for tensor in saved.state_dict().values())


@pytest.mark.parametrize("loss", ["image_loss", None])
def test_a_step_of_nan_is_skipped_and_counted(run, tmp_path, monkeypatch, loss, capsys):
    options = {"on_nan": "skip", "save_steps": 1, "gradient_accumulation_steps": 2, "weight_decay": 0.5}
    spoil(monkeypatch, 5, loss)  # the first micro-batch of the third step
    logs = run(**options)
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    assert all(torch.isfinite(torch.tensor(value)) for log in logs for value in log.values())
    saved = [tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    weights = [AutoModel.from_pretrained(folder).state_dict() for folder in saved]
    same = [
        all(torch.equal(one, after[name]) for name, one in before.items())
        for before, after in zip(weights[:-1], weights[1:], strict=True)
    ]
    assert same == [False, True, False]
    report = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert report["count"] == 1 and list(report["skipped_steps"]) == ["3"]
    (name,) = report["skipped_steps"]["3"]
    assert name == (loss or "gradient") and report["skipped_steps"]["3"][name]
    assert "Step 3 is skipped: NaN or inf in" in capsys.readouterr().out


# ---- damaged models ----


def test_a_damaged_model_is_refused_by_name(tiny_processor, tmp_path):
    """Transformers would initialize anew what a damaged name hides."""
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    sound = weights.read_bytes(), config.read_bytes()
    damages = [
        (weights, b'"lm_head.', b'"lm_heae.', r"lack 1 that .*\(lm_head.bias\), and hold 1 .*\(lm_heae.bias\)"),
        (weights, b'{"', b'["', "model.safetensors cannot be read as it was written"),
        (weights, sound[0][-1:], b"", "model.safetensors cannot be read as it was written"),
        (config, b'"', b"'", "config.json cannot be read as it was written"),
        (
            config,
            b'"intermediate_size": ',
            b'"intermediate_size": 1',
            "weights of .*model have other shapes than its config",
        ),
    ]
    for file, before, after, words in damages:
        content = file.read_bytes()
        at = content.rindex(before) if not after else content.index(before)
        file.write_bytes(content[:at] + after + content[at + len(before) :])
        for load in (load_for_inference, load_for_training):
            with pytest.raises(ValueError, match=words):
                load(str(folder))
        weights.write_bytes(sound[0]), config.write_bytes(sound[1])
    load_for_inference(folder)
