# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""One loss curve however a step is divided: one batch, two accumulated, two processes with DDP, two with FSDP2."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from deem_fixtures import START, tiny_batch, tiny_model
from scaling_run import MIXED, NUM_STEPS, STEPS, history, micro_batches, train, zero_steps
from scripts import run_ranks
from transformers import AutoModel

from modeling_deem.training_deem import loss_counts, with_same_parts

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
WEIGHTS = {"text_loss": 1.0, "image_loss": 5.0, "consistency_loss": 5.0}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Curves by way of dividing a step, and the weights that they ended in."""
    folder = tmp_path_factory.mktemp("scaling")
    steps = [micro_batches(step) for step in range(NUM_STEPS + 2)]
    double = train(folder / "double", [whole for whole, _ in steps[:NUM_STEPS]], max_steps=NUM_STEPS)
    accumulated = train(
        folder / "accumulated", [half for _, halves in steps for half in halves], gradient_accumulation_steps=2
    )
    curves = {"double": history(double), "accumulated": history(accumulated)}
    weights = {"accumulated": accumulated.model.state_dict()}
    ranks = run_ranks(
        *(FOLDER / "scaling_run.py", folder),
        logs=folder / "logs",
        timeout=300,
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    said = (rank.stdout[-3000:] + rank.stderr[-6000:] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    first, second = json.loads((folder / "draws.json").read_text())
    assert not set(first) & set(second)  # noise and timesteps of their own in every process
    curves |= json.loads((folder / "curves.json").read_text())
    weights |= {name: AutoModel.from_pretrained(folder / name).state_dict() for name in ("ddp", "fsdp2")}
    return curves, weights


@pytest.mark.parametrize("way", ["double", "ddp", "fsdp2", "fsdp2 resumed"])
def test_the_curve_is_that_of_two_accumulated_batches(runs, way):
    curves, expected = runs[0], runs[0]["accumulated"]
    assert len(expected) == NUM_STEPS + MIXED
    assert len(curves[way]) == {"double": NUM_STEPS}.get(way, NUM_STEPS + MIXED)
    for step, (one, other) in enumerate(zip(curves[way], expected, strict=False)):
        assert set(one) == set(other)
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=1e-5), (step, name)
    # the cases are there: a step of words alone, one without image loss, one with all three
    assert [sorted(set(WEIGHTS) & set(log)) for log in expected[2:5]] == [
        ["consistency_loss", "image_loss", "text_loss"],
        ["text_loss"],
        ["consistency_loss", "text_loss"],
    ]
    assert set(expected[-1]) == {"loss", *WEIGHTS}


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_the_trained_weights_are_those_of_two_accumulated_batches(runs, way):
    weights, start = runs[1], tiny_model(lm_head_bias=True).state_dict()
    assert set(weights[way]) == set(start)
    for name, tensor in weights["accumulated"].items():
        torch.testing.assert_close(weights[way][name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    head = weights[way]["lm_head.weight"]
    assert torch.equal(head[:START], start["lm_head.weight"][:START])  # bit for bit, sharded or not
    assert (head[START] != start["lm_head.weight"][START]).any()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is no dependency: pip install deepspeed")
@pytest.mark.parametrize("way", ["zero1", "zero2", "zero3"])
def test_deepspeed_with_the_shipped_files(tmp_path, way):
    """Losses and weights of two accumulated batches, from a checkpoint."""
    tiny_model(lm_head_bias=True).save_pretrained(tmp_path / "initial")
    config = ROOT / "recipes" / "configs" / "accelerate" / f"{way}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    done = subprocess.run(
        [*command, "--num_processes", "2", "--mixed_precision", "no", str(FOLDER / "scaling_run.py"), tmp_path, way],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    halves = [half for _, halves in zero_steps() for half in halves]
    options = {"gradient_accumulation_steps": 2, "max_steps": NUM_STEPS}
    expected = train(tmp_path / "accumulated", halves, tmp_path / "initial", **options)
    curve = json.loads((tmp_path / f"{way}.json").read_text())
    assert len(curve) == NUM_STEPS and all(set(WEIGHTS) < set(log) for log in curve)
    for one, other in zip(curve, history(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    weights = AutoModel.from_pretrained(tmp_path / way).state_dict()
    for name, tensor in expected.model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_counts_are_what_the_losses_are_means_over():
    config = tiny_model().config
    batch = tiny_batch("bitte", "bttitttie", "btte")
    assert loss_counts(batch, config, WEIGHTS) == {"text_loss": 3 + 8 + 3, "image_loss": 2, "consistency_loss": 3}
    masked = {**batch, "image_loss_mask": torch.tensor([True, False, True])}
    assert loss_counts(masked, config, WEIGHTS)["image_loss"] == 1
    assert loss_counts(batch, config, {**WEIGHTS, "text_loss": 0.0})["text_loss"] == 0
    config.image_decoder_config.image_loss_reduction = "all"
    assert loss_counts(batch, config, WEIGHTS)["image_loss"] == 3
    assert loss_counts(tiny_batch("btte"), config, WEIGHTS) == {**dict.fromkeys(WEIGHTS, 0), "text_loss": 3}


def test_a_rank_of_words_alone_takes_the_way_of_the_others_and_learns_the_same():
    model = tiny_model()
    words, images = tiny_batch(*STEPS[2][1]), tiny_batch(*STEPS[2][0])
    given = {}

    def gather(mine: torch.Tensor) -> torch.Tensor:
        given["words"] = mine
        return torch.cat([mine, given["images"]]) if "images" in given else mine

    silent = {**WEIGHTS, "text_loss": 0.0}
    alone = with_same_parts(images, model.config, silent, gather)
    assert alone["text_loss_weight"] == 0 and alone["image_loss_weight"] == 5
    given["images"] = given["words"]
    batch = with_same_parts(words, model.config, WEIGHTS, gather)
    assert batch["pixel_values"].shape == (1, 3, 64, 64) and batch["target_pixel_values"].shape == (1, 3, 64, 64)
    assert "target_latents" not in batch and len(batch["input_ids"]) == len(words["input_ids"]) + 1
    outputs, before = model(**batch), model(**words)
    torch.testing.assert_close(outputs.text_loss, before.text_loss)
    assert outputs.image_loss == 0 and outputs.consistency_loss > 0  # the latter gets the weight 0 in the trainer
    assert loss_counts(words, model.config, WEIGHTS)["consistency_loss"] == 0
