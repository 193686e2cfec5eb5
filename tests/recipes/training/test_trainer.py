# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""RecipeTrainer on the real model made tiny: losses under accumulation, named parts, resuming after any interruption."""

import io
import json
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from deem_fixtures import START, tiny_batch, tiny_draws, tiny_model
from scripts import start_script
from torch.utils.data import IterableDataset
from transformers import AutoModel, AutoProcessor, TrainerCallback

from modeling_deem.training_deem import LOSSES
from processing import DeemDataCollator
from recipes import pretrain
from recipes.data.sources import DataArguments, build_dataset
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_formats
from recipes.training.parameter_groups import freeze_parts, match_parameters, parameter_groups, parts_table
from recipes.training.resuming import last_complete_checkpoint
from recipes.training.run import save_initial
from recipes.training.trainer import DeemTrainingArguments, RecipeTrainer

FROZEN = ["model.language_model", "image_decoder.denoiser", "image_decoder.vae"]
ROOT = Path(__file__).resolve().parents[3]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_formats(folder, World(size=64), 24, formats=["mmc4", "captions"])
    return folder


def arguments(output_dir: Path, **options) -> DeemTrainingArguments:
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 100} | options
    return DeemTrainingArguments(
        output_dir=str(output_dir), use_cpu=True, report_to="none", disable_tqdm=True, warmup_steps=1, **options
    )


def world_trainer(world: Path, processor, output_dir: Path, **options) -> RecipeTrainer:
    args = arguments(output_dir, **{"freeze": FROZEN, "learning_rate": 1e-3, **options})
    data = DataArguments(
        data=[str(world / "mmc4_annts"), str(world / "captions")], shuffle_buffer=8, pack_length=120, max_images=4
    )
    dataset, report = build_dataset(data, processor, args.per_device_train_batch_size, args.seed)
    return RecipeTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=dataset,
        data_collator=DeemDataCollator(processor),
        processing_class=processor,
        data_report=report,
    )


# ---- names ----

NAMES = ["model.image_attention.0.gate", "model.language_model.layers.0.mlp.gate_proj.weight", "lm_head.bias"]


@pytest.mark.parametrize(
    "pattern, found",
    [
        ("gate", [0]),
        ("gate*", [0, 1]),
        ("image_attention.*.gate", [0]),
        ("model", [0, 1]),
        ("language_model.layers", [1]),
        ("lm_head", [2]),
        ("bias", [2]),
        ("*", [0, 1, 2]),
    ],
)
def test_names_match_whole_components(pattern, found):
    assert match_parameters(pattern, NAMES) == [NAMES[i] for i in found]


@pytest.mark.parametrize(
    "pattern, near",
    [
        ("language_modell", "'language_model'"),
        ("image_atention.0", "'image_attention.0'"),
        ("xyz", "Parts: image_attention, language_model, lm_head"),
    ],
)
def test_a_name_that_matches_nothing_offers_near_ones(pattern, near):
    with pytest.raises(ValueError, match=f"{pattern!r} matches none of the 3 parameters.*{near}"):
        match_parameters(pattern, NAMES)


def test_freezing_and_groups_refuse_unknown_names():
    model = tiny_model()
    with pytest.raises(ValueError, match="'vision_towr' matches none.*'vision_tower'"):
        freeze_parts(model, ["vision_towr"])
    with pytest.raises(ValueError, match="'perciever' matches none.*'perceiver'"):
        parameter_groups(model, {"perciever": {"lr": 1.0}}, 1e-3, 0.1)
    with pytest.raises(ValueError, match=r"unknown settings \['rate'\]"):
        parameter_groups(model, {"perceiver": {"rate": 1.0}}, 1e-3, 0.1)


def test_a_group_must_be_a_mapping():
    with pytest.raises(ValueError, match="Group 'perceiver' is 3: give a mapping"):
        parameter_groups(tiny_model(), {"perceiver": 3}, 1e-3, 0.1)


def test_the_model_before_training_is_that_of_this_run(tiny_processor, tmp_path):
    """One left by a run that wrote no checkpoint is replaced, one that training goes on from is not."""
    folder, models = tmp_path / "initial", [tiny_model(seed=seed) for seed in (1, 2, 3)]

    def saved() -> torch.Tensor:
        return AutoModel.from_pretrained(folder).lm_head.weight

    for model in models[:2]:
        save_initial(model, tiny_processor, folder)
        assert torch.equal(saved(), model.lm_head.weight)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "complete").touch()
    save_initial(models[2], tiny_processor, folder)
    assert torch.equal(saved(), models[1].lm_head.weight)


def test_first_matching_group_wins_and_norms_and_biases_do_not_decay():
    model = tiny_model()
    freeze_parts(model, FROZEN)
    groups = parameter_groups(
        model,
        {
            "model.image_attention.*.gate": {"lr": 1, "weight_decay": 0},
            "model.image_attention": {"lr": 2},
            "model": {"lr": 3},
        },
        4.0,
        0.5,
    )
    setting = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert setting["model.image_attention.0.gate"] == (1, 0)
    assert setting["model.image_attention.0.query_norm.weight"] == (2, 0)
    assert setting["model.image_attention.0.synchronizer.query_projection.weight"] == (2, 0.5)
    assert setting["model.image_attention.0.synchronizer.query_projection.bias"] == (2, 0)
    assert setting["model.perceiver.queries"] == (3, 0.5)
    assert setting["image_decoder.null_condition"] == (4, 0.5)
    assert setting["lm_head.weight"] == setting["lm_head.bias"] == (4, 0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(setting) == trainable and sum(len(group["params"]) for group in groups) == len(trainable)
    assert not any(name.startswith(tuple(FROZEN)) for name in trainable)


def test_parts_of_a_model_whose_parameters_are_shared_out():
    """Under ZeRO-3 a parameter is empty between its uses, and `ds_shape` says what it is."""
    model = tiny_model()
    freeze_parts(model, FROZEN)
    groups = parameter_groups(model, None, 1e-3, 0.1)
    expected = parts_table(model, groups)
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, parameter.new_empty(0)
    assert parts_table(model, groups) == expected and expected["lm_head"]["frozen"] > expected["lm_head"]["trainable"]
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.image_decoder.denoiser.modules():  # nothing is started anew that is loaded
        model._init_weights(module)


@pytest.mark.parametrize("tied", [False, True])
def test_old_rows_of_the_head_get_no_gradient_wherever_they_are_used(tied):
    model = tiny_model(lm_head_bias=True, text_config={"tie_word_embeddings": tied}, tie_word_embeddings=tied)
    batch = tiny_batch("bttitte")
    before = model(**batch).logits
    whole = torch.autograd.grad(before.square().sum(), model.lm_head.weight)[0]
    freeze_parts(model, FROZEN)
    logits = model(**batch).logits
    assert torch.equal(logits, before)
    logits.square().sum().backward()
    for gradient in (model.lm_head.weight.grad, model.lm_head.bias.grad):
        assert not gradient[:START].any() and gradient[START:].any()
    torch.testing.assert_close(model.lm_head.weight.grad[START:], whole[START:])
    embedding = model.get_input_embeddings().weight
    assert (embedding is model.lm_head.weight) == tied == (embedding.grad is not None)


# ---- losses ----


class _Batches(IterableDataset):
    """Ready-made micro-batches; the collator takes the only one of each."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches


def train_on(batches: list[dict], output_dir: Path, weights: dict[str, float], **options) -> RecipeTrainer:
    model = tiny_model(lm_head_bias=True)
    for name in LOSSES:
        setattr(model.config, f"{name}_weight", weights[name])
    args = arguments(
        output_dir,
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(batches),
        max_grad_norm=0.0,
        optim="sgd",
        weight_decay=0.0,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        freeze=FROZEN,
        save_strategy="no",
        **options,
    )
    trainer = RecipeTrainer(
        model=model, args=args, train_dataset=_Batches(batches), data_collator=lambda rows: rows[0]
    )
    trainer.train()
    return trainer


def with_draws(batch: dict, rows: slice = slice(None)) -> dict:
    """Fixed noise for four images, of which this batch has `rows`."""
    consistency = {key: value[rows] for key, value in tiny_draws(4, seed=1).items()}
    image = {key: value[rows] for key, value in tiny_draws(4, seed=2, image=True).items()}
    return {**batch, "consistency_draws": consistency, "image_draws": image}


@pytest.mark.parametrize("only", [*LOSSES, None])
def test_two_accumulated_batches_equal_one_double_batch(tmp_path, only):
    words = ["bttttttite", "bttie", "btite", "btttttttttttttttie"]  # unequal numbers of text targets, one image each
    double = tiny_batch(*words)
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        length = int(double["attention_mask"][rows].sum(1).max())
        half = {key: value[rows] for key, value in double.items()}
        for key in ("input_ids", "attention_mask", "labels"):
            half[key] = half[key][:, :length]
        halves.append(with_draws(half, rows))
    weights = {name: weight * (only in (None, name)) for name, weight in zip(LOSSES, (1.0, 5.0, 5.0), strict=True)}
    one = train_on([with_draws(double)], tmp_path / "one", weights)
    two = train_on(halves, tmp_path / "two", weights)

    start = dict(tiny_model(lm_head_bias=True).named_parameters())
    moved = 0
    for (name, a), (_, b) in zip(one.model.named_parameters(), two.model.named_parameters(), strict=True):
        # the step of SGD at rate 1 is the gradient
        torch.testing.assert_close(
            a - start[name], b - start[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        moved += bool((a != start[name]).any())
    assert moved > 10
    first, second = one.state.log_history[0], two.state.log_history[0]
    logged = {name for name in LOSSES if name in first}
    assert logged == {name for name in LOSSES if weights[name]} == {name for name in LOSSES if name in second}
    for name in (*logged, "loss"):
        assert first[name] == pytest.approx(second[name], rel=1e-5)
    assert first["loss"] == pytest.approx(sum(weights[name] * first[name] for name in logged), rel=1e-5)


def test_losses_are_averaged_over_the_batches_that_have_them(tmp_path):
    weights = dict.fromkeys(LOSSES, 1.0)
    image_to_text = {**with_draws(tiny_batch("btite", "bttie"), slice(0, 2)), "image_loss_weight": 0.0}
    text_to_image = {**with_draws(tiny_batch("btite", "bttie"), slice(2, 4)), "text_loss_weight": 0.0}
    logs = train_on([image_to_text, text_to_image], tmp_path / "both", weights).state.log_history[0]
    text = train_on([image_to_text], tmp_path / "text", weights).state.log_history[0]
    image = train_on([text_to_image], tmp_path / "image", weights).state.log_history[0]
    assert "image_loss" not in text and "text_loss" not in image
    assert logs["text_loss"] == pytest.approx(text["text_loss"], rel=1e-5)
    assert logs["image_loss"] == pytest.approx(image["image_loss"], rel=1e-5)
    consistency = (text["consistency_loss"] + image["consistency_loss"]) / 2
    assert logs["consistency_loss"] == pytest.approx(consistency, rel=1e-5)
    text_only = train_on([tiny_batch("bttte", "btte")], tmp_path / "words", weights).state.log_history[0]
    assert [name for name in LOSSES if name in text_only] == ["text_loss"]


def test_a_batch_with_nothing_to_learn_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Nothing to learn in a batch with input_ids"):
        train_on([{**tiny_batch("bttte"), "text_loss_weight": 0.0}], tmp_path, dict.fromkeys(LOSSES, 1.0))


# ---- a whole run ----


def test_a_run_trains_what_it_should_and_leaves_its_files(world, tiny_processor, tmp_path):
    before = {name: tensor.clone() for name, tensor in tiny_model().state_dict().items()}
    trainer = world_trainer(world, tiny_processor, tmp_path, weight_decay=0.5, save_steps=2, save_total_limit=1)
    trainer.train()
    after = trainer.model.state_dict()
    for name, tensor in after.items():
        if name.startswith(tuple(FROZEN)):
            assert torch.equal(tensor, before[name]), name
    for name in ("lm_head.weight", "lm_head.bias"):
        assert torch.equal(after[name][:START], before[name][:START])  # bit for bit, in spite of weight decay
        assert (after[name][START] != before[name][START]).any()
    for part in ("vision_tower", "perceiver", "projector", "image_attention", "start_of_image"):
        assert any((after[n] != before[n]).any() for n in after if n.startswith(f"model.{part}")), part

    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3]
    for log in logs:
        assert all(torch.isfinite(torch.tensor(log[name])) for name in (*LOSSES, "grad_norm"))
        assert log["step_seconds"] > 0 and 0.05 < log["peak_memory_gb"] < 100
        assert log["loss"] == pytest.approx(
            log["text_loss"] + 5 * log["image_loss"] + 5 * log["consistency_loss"], rel=1e-4
        )

    parts = json.loads((tmp_path / "parts.json").read_text())
    assert parts["language_model"]["trainable"] == 0 and parts["image_decoder.vae"]["trainable"] == 0
    new_rows = after["lm_head.weight"].shape[0] - START
    assert parts["lm_head"]["trainable"] == new_rows * (after["lm_head.weight"].shape[1] + 1)
    assert parts["lm_head"]["weight_decay"] == [0.0] and parts["perceiver"]["lr"] == [1e-3]
    total = sum(part["trainable"] + part["frozen"] for part in parts.values())
    assert total == sum(parameter.numel() for parameter in trainer.model.parameters())

    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report[str(world / "captions")]["read"] > 0 and not report[str(world / "captions")]["skipped"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    checkpoint = last_complete_checkpoint(tmp_path)
    loaded, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    assert all(torch.equal(tensor, after[name]) for name, tensor in loaded.state_dict().items())
    assert processor.num_image_tokens == tiny_processor.num_image_tokens

    again = world_trainer(
        world, tiny_processor, tmp_path, weight_decay=0.5
    )  # the same command once more: there is nothing left to do
    assert again.train().global_step == 3
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.model.state_dict().items())


def test_with_the_language_model_all_of_the_head_trains(world, tiny_processor, tmp_path):
    before = tiny_model().state_dict()["lm_head.weight"].clone()
    trainer = world_trainer(world, tiny_processor, tmp_path, freeze=FROZEN[1:], max_steps=2, save_strategy="no")
    trainer.train()
    assert (trainer.model.lm_head.weight[:START] != before[:START]).any()


def test_everything_frozen_is_an_error(world, tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="Every parameter is frozen"):
        world_trainer(world, tiny_processor, tmp_path, freeze=["*"]).train()


# ---- interruptions ----


class _Interrupt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def comparable(log_history: list[dict]) -> list[dict]:
    measured = ("step_seconds", "peak_memory_gb")
    return [{key: value for key, value in log.items() if key not in measured} for log in log_history if "loss" in log]


def test_an_interrupted_run_goes_on_bit_for_bit(world, tiny_processor, tmp_path, monkeypatch):
    options = {
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 3,
        "gradient_accumulation_steps": 2,
        "save_total_limit": 1,
    }
    whole = world_trainer(world, tiny_processor, tmp_path / "whole", **options)
    whole.train()

    interrupted = world_trainer(world, tiny_processor, tmp_path / "cut", **options)
    interrupted.add_callback(_Interrupt(3))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert (tmp_path / "cut" / "data_report.json").is_file()
    assert Path(last_complete_checkpoint(tmp_path / "cut")).name == "checkpoint-2"

    # The next try dies while it saves step 4: half a checkpoint lies there, and the one before is still whole.
    half = world_trainer(world, tiny_processor, tmp_path / "cut", **options)
    monkeypatch.setattr(half, "_save_rng_state", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        half.train()
    assert (tmp_path / "cut" / "checkpoint-4" / "model.safetensors").is_file()
    assert Path(last_complete_checkpoint(tmp_path / "cut")).name == "checkpoint-2"

    resumed = world_trainer(world, tiny_processor, tmp_path / "cut", **options)
    torch.manual_seed(12345)  # what happened before must not matter
    resumed.train()
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert comparable(whole.state.log_history) == comparable(resumed.state.log_history)
    assert [log["step"] for log in comparable(whole.state.log_history)] == [1, 2, 3, 4, 6]
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-6"]


def test_sigkill_and_the_same_command_again(tiny_processor, tmp_path, monkeypatch):
    """The recipe itself, killed from outside, with a corrupt image in its tar."""
    checkpoint, tars = tmp_path / "deem", tmp_path / "tars"
    tiny_model().save_pretrained(checkpoint)
    tiny_processor.save_pretrained(checkpoint)
    tars.mkdir()
    with tarfile.open(tars / "0.tar", "w") as tar:
        for index in range(40):
            data = io.BytesIO()
            World().scene(index).image.save(data, "JPEG")
            for suffix, content in (("jpg", data.getvalue()[: 200 if index == 5 else None]), ("txt", b"a %d" % index)):
                info = tarfile.TarInfo(f"{index:02d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    def command(output_dir: str, max_steps: int = 8) -> list[str]:
        flags = {
            "model": checkpoint,
            "data": tars,
            "output_dir": tmp_path / output_dir,
            "max_steps": max_steps,
            "save_steps": 2,
            "logging_steps": 2,
            "pack_length": 60,
            "per_device_train_batch_size": 2,
            "groups": "{}",
            "report_to": "none",
            "disable_tqdm": "true",
        }
        return [
            str(ROOT / "recipes" / "pretrain.py"),
            *(str(x) for key, value in flags.items() for x in (f"--{key}", value)),
        ]

    def run_here(output_dir: str) -> dict:
        monkeypatch.setattr(sys, "argv", command(output_dir))
        pretrain.main()
        return json.loads((tmp_path / output_dir / "trainer_state.json").read_text())

    script = start_script(*command("killed"), logs=tmp_path / "logs", cwd=tmp_path, OMP_NUM_THREADS="1")
    try:
        deadline = time.time() + 120
        while last_complete_checkpoint(tmp_path / "killed") is None and script.returncode is None:
            assert time.time() < deadline, "no checkpoint within two minutes"
            time.sleep(0.02)
    finally:
        script.process.kill()
        script.process.join()
    assert script.returncode == -signal.SIGKILL, script.stdout + script.stderr
    assert not (tmp_path / "killed" / "trainer_state.json").exists()

    resumed, whole = run_here("killed"), run_here("whole")
    a, b = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert comparable(resumed["log_history"]) == comparable(whole["log_history"])
    assert any((a[name] != tensor).any() for name, tensor in tiny_model().state_dict().items())
    initial = AutoModel.from_pretrained(tmp_path / "killed" / "initial").state_dict()
    assert all(torch.equal(tensor, initial[name]) for name, tensor in tiny_model().state_dict().items())
    report = json.loads((tmp_path / "killed" / "data_report.json").read_text())[str(tars)]
    assert report["skipped"] == {"truncated or broken image": {"count": 1, "examples": ["0.tar/05.jpg"]}}
