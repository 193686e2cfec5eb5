# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The first hour: what a new user types, from README and docs, on tiny parts.

python -m pytest -q tests/first_hour.py
"""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from datasets import Dataset
from deem_fixtures import SIDE, Q, tiny_batch, tiny_model
from family_fixtures import OLD_VOCABULARY, save_diffusion, save_text, text_config, vision_config
from peft import PeftModel
from PIL import Image
from scripts import run_script
from transformers import AutoModel, ConvNextImageProcessorPil, SiglipImageProcessorPil

import hub_upload
from processing import DeemProcessor
from recipes import generate, pretrain
from recipes.run_report.card import REQUIREMENTS

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
COLORS = ("red", "green", "blue", "gray", "white")
FORMATS = ("imagefolder", "csv", "jsonl", "parquet")
NUMBER = 50  # images of one's own
Script = dict[str, Any]


def example(file: str, heading: str) -> str:
    """The first Python block below a heading."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.search(rf"{re.escape(heading)}\n.*?```python\n(.*?)```", text, re.DOTALL)[1]


def run_in(folder: Path, script: str) -> Script:
    """Run a script in a folder, in this process; return its names."""
    found: Script = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(script, found)
    return found


def type_in(folder: Path, recipe: Any, *words: str) -> None:
    """Type `python recipes/<recipe>.py <words>` in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [recipe.__file__, *words])
        if recipe is generate:
            recipe.main(*recipe.TrlParser(recipe.GenerateArguments).parse_args_and_config())
        else:
            recipe.main()


# ---- what a user has ----


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a checkpoint, `runs/demo/sft`, and an image."""
    folder = tmp_path_factory.mktemp("home")
    tiny_model().save_pretrained(folder / "runs/demo/sft")
    encoder = ConvNextImageProcessorPil(size={"shortest_edge": SIDE})
    DeemProcessor.from_parts(encoder, build_tokenizer(), Q, SIDE).save_pretrained(folder / "runs/demo/sft")
    (folder / "runs/demo/generate").mkdir()
    Image.new("RGB", (90, 60), "red").save(folder / "runs/demo/generate/picture_0.png")
    return folder


@pytest.fixture(scope="module")
def photos(home: Path) -> Path:
    """Fifty captioned images, in each of the formats in which people have them."""
    rows = []
    for number in range(NUMBER):
        color = COLORS[number % len(COLORS)]
        rows.append((f"{number}.png", f"a {color} card"))
        for name in FORMATS[:3]:
            (home / name).mkdir(exist_ok=True)
            Image.new("RGB", (30 + number, 40), color).save(home / name / rows[-1][0])
    as_dicts = {name: [dict(zip(keys, row, strict=True)) for row in rows] for name, keys in NAMES.items()}
    for name, file in (("imagefolder", "metadata.jsonl"), ("jsonl", "mine.jsonl")):
        (home / name / file).write_text("".join(json.dumps(row) + "\n" for row in as_dicts[name]))
    with open(home / "csv" / "mine.csv", "w", newline="") as table:
        csv.writer(table).writerows([NAMES["csv"], *rows])
    (home / "parquet").mkdir()
    stored = [
        {"image": {"bytes": (home / "csv" / file).read_bytes(), "path": None}, "text": text} for file, text in rows
    ]
    Dataset.from_list(stored).to_parquet(home / "parquet" / "mine.parquet")
    return home


NAMES = {"imagefolder": ("file_name", "text"), "csv": ("image", "caption"), "jsonl": ("image", "caption")}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A folder with a random SigLIP, Qwen3 and UNet, as their libraries save them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    AutoModel.from_config(vision_config("siglip_vision_model")).save_pretrained(folder / "vision")
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "vision")
    save_text(folder / "text", **text_config("qwen3", vocab_size=OLD_VOCABULARY))
    save_diffusion(folder / "diffusion")
    return folder


@pytest.fixture(scope="module")
def composed(parts: Path) -> Script:
    """The script of docs/parts.md."""
    return run_in(parts, example("docs/parts.md", "## Compose, train, draw"))


# ---- what a user does ----


def test_ask_and_draw(home) -> None:
    found = run_in(home, example("README.md", "## Twelve lines of use"))
    assert isinstance(found["answer"](text=found["chat"], max_new_tokens=2)[0]["generated_text"], list)
    for image in (found["drawn"], found["seen"]):
        assert image.shape == (1, 3, SIDE, SIDE) and 0 <= image.min() < image.max() <= 1


@pytest.mark.parametrize("form", FORMATS)
def test_train_on_images_of_ones_own_load_and_ask(photos, form) -> None:
    options = "--pack_length 0 --per_device_train_batch_size 10 --max_steps 5 --report_to none --save_strategy no"
    where = ("--model", "runs/demo/sft", "--data", form, "--output_dir", f"runs/{form}")
    type_in(photos, pretrain, *where, *options.split())
    (counts,) = json.loads((photos / "runs" / form / "data_report.json").read_text()).values()
    assert (counts["rows"], counts["read"], counts["skipped"]) == (NUMBER, NUMBER, {})
    logs = json.loads((photos / "runs" / form / "trainer_state.json").read_text())["log_history"]
    losses = [log["text_loss"] for log in logs if "text_loss" in log]
    assert len(losses) == 2 and losses[-1] < losses[0]  # the first step and the last

    asked = ("--images", "csv/0.png", "--text", "Which color?", "--max_new_tokens", "3")
    type_in(photos, generate, "--model", f"runs/{form}", "--out", f"out/{form}", *asked)
    (answer,) = map(json.loads, (photos / "out" / form / "answers.jsonl").read_text().splitlines())
    assert answer["text"] == "Which color?" and isinstance(answer["answer"], str)


def test_compose_train_and_draw(composed, parts) -> None:
    assert len(example("docs/parts.md", "## Compose, train, draw").splitlines()) <= 20
    side = composed["model"].config.image_decoder_config.target_size
    assert composed["drawn"].shape == (1, 3, side, side) and composed["drawn"].isfinite().all()
    assert composed["model"].config.text_config.model_type == "qwen3"
    assert (parts / "mine" / "checkpoint-10" / "model.safetensors").is_file()


def test_a_plain_trainer_may_accumulate(composed, parts) -> None:
    """One micro-batch of three images, and three of one: the same loss, but for the noise, and not three times it."""
    script, options = example("docs/parts.md", "## Compose, train, draw"), '"mine", max_steps=10,'
    assert options in script
    accumulated = '"accumulated", max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=3,'
    other = run_in(parts, script[: script.index("inputs = ")].replace(options, accumulated))
    logs = [found["trainer"].state.log_history[0] for found in (composed, other)]
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=0.3)
    assert logs[1]["grad_norm"] < 2 * logs[0]["grad_norm"]


def test_adapters_of_ones_own_learn_save_and_load(tmp_path) -> None:
    batch, script = tiny_batch("btitti", "btit"), example("docs/adapters.md", "### In your own script")
    found = {"model": tiny_model()}
    exec(script, found)
    model = found["adapted"]
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".lora_A." in name and ".language_model." in name for name in names)
    assert not any("image_decoder.vae" in name or "image_decoder.denoiser" in name for name in names)
    assert not any(".language_model." in name and "lora" not in name for name in names)
    assert any("image_attention" in name for name in names) and any(".encoder." in name for name in names)

    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 1e-2)
    model.train()(**batch).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    with torch.no_grad():
        expected, found = model(**batch).logits, again(**batch).logits
        assert not torch.equal(expected, tiny_model()(**batch).logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["modeling_deem"] = sys.modules["processing"] = None  # importing them fails
import numpy, torch
from transformers import AutoImageProcessor, AutoModel

encoder, images = AutoModel.from_pretrained("encoder"), AutoImageProcessor.from_pretrained("encoder")
inputs = images(images=numpy.load("image.npy"), return_tensors="pt")
torch.save([inputs["pixel_values"], encoder(**inputs).last_hidden_state], "seen.pt")
"""


def test_the_encoder_is_of_use_without_the_package(composed, parts) -> None:
    image = np.random.default_rng(0).integers(0, 256, (100, 80, 3), dtype=np.uint8)
    np.save(parts / "image.npy", image)
    model, processor = composed["model"].eval(), composed["processor"]
    script = example("docs/parts.md", "## The feedback alone, and the encoder afterwards")
    exec(script.replace('"encoder"', repr(str(parts / "encoder"))), composed | {"image": image})
    assert model.model.vision_tower.encoder.embeddings.patch_embedding.weight.grad.any()
    alone = run_script("-c", WITHOUT_THE_PACKAGE, cwd=parts, logs=parts / "logs")
    assert alone.returncode == 0, alone.stderr
    pixels, seen = torch.load(parts / "seen.pt")
    with torch.no_grad():
        ours = processor(text="<image>", images=image, return_tensors="pt")["pixel_values"]
        expected = model.get_image_features(ours).last_hidden_state
    torch.testing.assert_close(pixels, ours, rtol=0, atol=1e-6)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


# ---- the card ----


def cells(card: str) -> dict[str, list[str]]:
    """The rows of all tables of a card by their first cell."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in card.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows if row[0] != "---"}


def expected_cells(run: Path, metrics: dict[str, Any]) -> dict[str, list[str]]:
    """What the card must say of a run: from the model itself and from what the run logged."""
    model, logs = AutoModel.from_pretrained(run), json.loads((run / "trainer_state.json").read_text())["log_history"]
    sizes = {"all": model, "vision": model.model.vision_tower, "text": model.model.language_model}
    sizes |= {"denoiser": model.image_decoder.denoiser, "vae": model.image_decoder.vae}
    size = {name: sum(one.numel() for one in part.parameters()) for name, part in sizes.items()}
    joints = 2 * size["all"] - sum(size.values())
    last = {name: next(log for log in reversed(logs) if name in log) for name in ("text_loss", "image_loss", "consistency_loss")}  # fmt: skip
    rows = {
        "vision encoder": ["convnext", f"{size['vision']:,}", "mit"],
        "language model": ["llama", f"{size['text']:,}", "not recorded"],
        "denoiser": ["UNet2DConditionModel", f"{size['denoiser']:,}", "not recorded"],
        "VAE": ["AutoencoderKL", f"{size['vae']:,}", "not recorded"],
        "what joins them": ["DEEM", f"{joints:,}", "as the whole"],
        "jsonl": [str(NUMBER), str(NUMBER), "0", "0"],
        "optimizer steps": ["5"],
        "sequences per step": ["10 (10 per micro-batch x 1 micro-batches x 1 processes)"],
        "optimizer": ["adamw_torch_fused, betas 0.9, 0.995, epsilon 1e-08"],
        "schedule": ["cosine, warm-up 0.125"],
        "seed": ["32"],
        "precision": ["as the weights"],
        "highest learning rate logged": [f"{max(log.get('learning_rate', 0) for log in logs):.3g}"],
    }
    what = {
        "text_loss": "cross-entropy of the next token",
        "image_loss": "drawing the next image from the text before it",
    }
    what["consistency_loss"] = "redrawing each image from its own image tokens"
    for name, log in last.items():
        rows[name] = [what[name], f"{model.loss_weights()[name]}", f"{log[name]:.4g} at step 5"]
    for figure in metrics.values():
        rows[figure["what"]] = [f"{figure['value']:.4g}", str(figure["chance"]), str(figure["count"])]
    for part, row in json.loads((run / "parts.json").read_text()).items():
        if row["trainable"]:
            rate = ", ".join(f"{lr:.3g}" for lr in row["lr"])
            rows[f"`{part}` trains"] = [f"{row['trainable']:,} parameters at a rate of at most {rate}"]
    return rows


def test_a_dry_run_for_the_hub_writes_a_card_whose_numbers_are_true(photos, monkeypatch) -> None:
    run = photos / "runs" / "jsonl"
    metrics = {"color": {"what": "colors named", "value": 0.85, "aim": None, "chance": 0.2, "count": 40}}
    (photos / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.chdir(photos)
    words = "runs/jsonl --repo me/cards --dry-run --metrics metrics.json --part-licences vision=mit --drawing-steps 1"
    out = hub_upload.main(words.split())
    card = (out / "README.md").read_text()
    found, expected = cells(card), expected_cells(run, metrics)
    headers = {"part", "loss", "data set", "setting", "figure"}
    assert {name: row for name, row in found.items() if name not in headers} == expected
    assert "- colors named: not so in 6 of 40." in card and 'processor(text="a ' in card and "a red circle" not in card

    rest = "\n".join(line for line in card.splitlines() if line[:1] != "|")
    for known in (
        *REQUIREMENTS,
        "arxiv.org/abs/2405.15232",
        "luo2025deem",
        "{2025}",
        "License 2.0",
        "not so in 6 of 40",
    ):
        assert known in rest
        rest = rest.replace(known, "")
    for known in (f"{SIDE}x{SIDE} pixels and drawn at {SIDE}x{SIDE}", f"takes {Q} image tokens", "max_new_tokens=20"):
        assert known in rest
        rest = rest.replace(known, "")
    assert re.findall(r"\d+", rest.replace("num_inference_steps=25", "").replace("(1, 3, H, H) in [0, 1]", "")) == []
