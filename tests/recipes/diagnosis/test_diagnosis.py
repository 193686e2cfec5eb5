# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/diagnose.py: each station against a plain loop, on a tiny model with every path awake."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deem_fixtures import SIDE, tiny_model

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor
from recipes import diagnose
from recipes.diagnosis.adapting import ATTRIBUTES, adapt_report
from recipes.diagnosis.answers import ASKED, answer, questions_of
from recipes.diagnosis.auroc import auroc, difference
from recipes.diagnosis.conditions import CONDITIONS, by_timestep, condition_errors, leak_test
from recipes.diagnosis.gradients import gradient_report
from recipes.diagnosis.images import Images, images_of, read_batches, world_samples
from recipes.diagnosis.tokens import effective_number, spread_of, token_effects
from recipes.generation.prompt import make_prompt
from recipes.synthetic.scenes import World

pytestmark = pytest.mark.usefixtures("one_thread")
TIMESTEPS, COUNT = [100, 500], 5
DRAWS = {"timesteps": TIMESTEPS, "num_noise": 2, "seed": 3}


def some_images(count: int = COUNT) -> Images:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=draw)
    return Images(pixels, torch.rand(count, 3, SIDE, SIDE, generator=draw) * 2 - 1)


@torch.no_grad()
def redrawn(model: DeemForConditionalGeneration, images: Images, place: int, name: str, t: int) -> float:
    """The error of one image under one condition at one timestep, from consistency losses of single images."""
    decoder, count = model.image_decoder, len(images)
    whose, features, _ = CONDITIONS[name]
    seen = model.get_image_features(images.pixel_values, return_dict=True)
    other = (place - 1) % count
    row = {"own": seen.image_tokens[place], "other": seen.image_tokens[other], "mean": seen.image_tokens.mean(0)}
    maps = None
    if features is not None:
        maps = [level[place if features == "own" else other][None] for level in seen.image_features]
    decoder.config.consistency_condition = "tokens" if maps is None else "tokens+features"
    latents = decoder.encode(images.target_pixel_values[place][None], noise=torch.zeros(()))
    draws = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    given = [{"noise": one[None], "timesteps": torch.tensor([t])} for one in draws]
    losses = [float(decoder.consistency_loss(latents, row[whose][None], maps, **one)) for one in given]
    decoder.config.consistency_condition = "tokens+features"
    return sum(losses) / 2


def test_conditions_are_what_they_say() -> None:
    model, images = tiny_model(), some_images()
    found = condition_errors(model, images, DRAWS)
    assert list(found) == list(CONDITIONS)
    for name, errors in found.items():
        expected = [[redrawn(model, images, place, name, t) for t in TIMESTEPS] for place in (0, 1)]
        torch.testing.assert_close(errors.timestep_errors[:2], torch.tensor(expected), rtol=1e-4, atol=1e-6)
    values = [one.image_errors for one in found.values()]
    assert all((a - b).abs().max() > 1e-4 for k, a in enumerate(values) for b in values[:k])  # no two are the same
    own = model.image_error(*images.given(), **DRAWS)
    torch.testing.assert_close(found["own"].error_maps, own.error_maps)
    # another image is one of the same batch, and no batch has a single one
    assert [len(piece) for piece in images.split(4)] == [2, 3]
    halves = condition_errors(model, images, DRAWS, batch_size=4)["other tokens"].image_errors
    parts = [condition_errors(model, piece, DRAWS)["other tokens"].image_errors for piece in images.split(4)]
    torch.testing.assert_close(halves, torch.cat(parts))


def test_without_features_there_is_nothing_to_leak() -> None:
    model, images = tiny_model(), some_images(3)
    model.image_decoder.config.consistency_condition = "tokens"
    found = condition_errors(model, images, DRAWS)
    assert list(found) == ["own", "other tokens", "neither"]
    torch.testing.assert_close(found["own"].image_errors, model.image_error(*images.given(), **DRAWS).image_errors)


def test_leak_and_timesteps_are_means_of_the_errors() -> None:
    model, images = tiny_model(), some_images()
    errors = condition_errors(model, images, DRAWS)
    leak = leak_test(errors, (200, 799))  # of the two timesteps, the second
    table = {name: one.timestep_errors.double().numpy() for name, one in errors.items()}
    assert leak["own"]["more"] == leak["own"]["high"] == 0
    for name, one in leak.items():
        more = table[name][:, 1] - table["own"][:, 1]
        half = 2.7764451 * more.std(ddof=1) / math.sqrt(COUNT)  # Student's quantile of 4
        expected = {"error": table[name][:, 1].mean(), "more": more.mean(), "low": more.mean() - half}
        expected |= {"high": more.mean() + half, "share": more.mean() / table["own"][:, 1].mean()}
        assert one == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert leak_test(errors, (900, 999))["own"]["error"] == pytest.approx(table["own"].mean(), rel=1e-5)
    levels = by_timestep(errors)
    assert levels["timesteps"] == TIMESTEPS
    for column in range(2):
        told = np.mean([table["own"][row, column] < table["other tokens"][row, column] for row in range(COUNT)])
        assert levels["told_apart"][column] == pytest.approx(told)
        assert levels["errors"]["neither"][column] == pytest.approx(table["neither"][:, column].mean(), rel=1e-5)
        share = (table["other tokens"] - table["own"])[:, column].mean() / table["own"][:, column].mean()
        assert levels["more"][column] == pytest.approx(share, rel=1e-4)


def test_shares_of_the_gradient_are_those_of_single_losses(tiny_processor: DeemProcessor) -> None:
    model = tiny_model().train()
    model.model.language_model.requires_grad_(False)
    before = [(one.requires_grad, one.grad) for one in model.parameters()]
    batches = read_batches([], tiny_processor, World(), 4, 2, seed=0)
    found = gradient_report(model, batches, seed=7)
    assert [(one.requires_grad, one.grad) for one in model.parameters()] == before and model.training
    names = ("text_loss", "image_loss", "consistency_loss")
    assert list(found["losses"]) == list(names) and found["batches"] == 2
    model.eval()
    tower, vectors = list(model.model.vision_tower.parameters()), []
    for one in tower:
        one.requires_grad_(True)
    for number, batch in enumerate(batches):
        rows = {}
        for name in names:
            model.zero_grad()
            outputs = model(**batch, generator=torch.Generator().manual_seed(7 + number))
            (getattr(model.config, f"{name}_weight") * outputs[name]).backward()
            learned = [torch.zeros_like(one) if one.grad is None else one.grad for one in tower]
            rows[name] = torch.cat([one.flatten() for one in learned]).double()
        vectors.append(rows)
    for name in names:
        one = found["losses"][name]
        assert one["norm"] == pytest.approx(np.mean([float(rows[name].norm()) for rows in vectors]), rel=1e-3)
        totals = [sum(rows.values()) for rows in vectors]
        shares = [float(rows[name] @ total / (total @ total)) for rows, total in zip(vectors, totals, strict=True)]
        assert one["share"] == pytest.approx(np.mean(shares), rel=1e-3, abs=1e-4) and one["norm"] > 0
        first, second = (rows[name] for rows in vectors)
        cosine = float(first @ second / first.norm() / second.norm())
        assert one["agreement"] == pytest.approx(cosine, rel=1e-3, abs=1e-3)
    assert sum(one["share"] for one in found["losses"].values()) == pytest.approx(1, abs=1e-5)
    angle = [float(r["text_loss"] @ r["image_loss"] / r["text_loss"].norm() / r["image_loss"].norm()) for r in vectors]
    assert found["cosines"]["text_loss, image_loss"] == pytest.approx(np.mean(angle), rel=1e-3, abs=1e-3)
    with pytest.raises(ValueError, match="part='eyes' names no parameter"):
        gradient_report(model, batches, "eyes")


def test_effects_and_spread_of_tokens() -> None:
    model, images = tiny_model(), some_images(3)
    found = token_effects(model, images, DRAWS)
    exact = model.image_error(*images.given(), **DRAWS, per_token=True).token_errors.double()
    assert found["effects"] == pytest.approx(exact.mean(0).tolist(), rel=1e-5)
    assert found["used"] == sum(low > 0 for low in found["low"])
    assert effective_number(torch.tensor([1.0, 1, 1, 0])) == pytest.approx(3)
    assert effective_number(torch.tensor([5.0, 0])) == pytest.approx(1) and effective_number(torch.zeros(2)) == 0
    draw = torch.Generator().manual_seed(0)
    places, pictures = torch.randn(1, 6, 8, generator=draw), torch.randn(40, 1, 8, generator=draw)
    same = spread_of(places + pictures)  # all tokens of an image say the same of it
    assert same["alike"] == pytest.approx(1) and 6 < same["directions"] <= 8
    assert spread_of(places + 0 * pictures + 1e-9 * torch.randn(40, 6, 8, generator=draw))["of_images"] < 1e-6
    free = spread_of(torch.randn(40, 6, 8, generator=draw))
    assert abs(free["alike"]) < 0.05 and free["of_images"] > 0.95


def test_auroc_is_the_share_of_pairs() -> None:
    draw = np.random.default_rng(0)
    truth = draw.random(60) < 0.4
    scores, others = np.round(draw.normal(size=(2, 60)) + truth, 1)
    pairs = [(a, b) for a in scores[truth] for b in scores[~truth]]
    area = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
    found = auroc(scores, truth)
    assert found.value == pytest.approx(area) and (found.positives, found.negatives) == (truth.sum(), (~truth).sum())
    drawn = []
    for _ in range(2000):  # the interval of drawing samples of each kind anew
        rows = [draw.choice(np.flatnonzero(kind), kind.sum()) for kind in (truth, ~truth)]
        drawn.append(auroc(scores[np.concatenate(rows)], np.arange(60) < truth.sum()).value)
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert found.low == pytest.approx(low, abs=0.03) and found.high == pytest.approx(min(1, high), abs=0.03)
    both = difference(scores, others, truth)
    assert both.value == pytest.approx(found.value - auroc(others, truth).value)
    assert difference(scores, scores, truth).high == 0  # paired
    assert auroc([1, 2, 3], [True, False, False]) is None
    with pytest.raises(ValueError, match="1 of them not finite"):
        auroc([1, 2, math.nan, 4], [True, True, False, False])


def test_answers_carry_the_log_probability_of_their_tokens(tiny_processor: DeemProcessor) -> None:
    model = tiny_model()
    scenes = [World().scene(index) for index in range(3)]
    asked = [questions_of(scene)["color"] for scene in scenes]
    assert set(questions_of(scenes[0])) == set(ASKED) and asked[0][1] == scenes[0].main.color
    found = answer(model, tiny_processor, [scene.image for scene in scenes], asked, batch_size=2)
    for scene, (question, _), said in zip(scenes, asked, found, strict=True):
        prompt = make_prompt(tiny_processor, "question", question, 1)
        inputs = tiny_processor(text=[prompt], images=[scene.image], return_tensors="pt")
        row, total = inputs["input_ids"], 0.0
        for _ in range(8):
            with torch.no_grad():
                given = {"input_ids": row, "attention_mask": torch.ones_like(row)}
                logits = model(pixel_values=inputs["pixel_values"], **given).logits[0, -1]
            best = int(logits.argmax())
            total += float(logits.log_softmax(-1)[best])
            row = torch.cat([row, torch.tensor([[best]])], 1)
            if best == tiny_processor.tokenizer.eos_token_id:
                break
        assert said.log_probability == pytest.approx(total, rel=1e-3)
        written = row[0, inputs["input_ids"].shape[1] :]
        assert said.text == tiny_processor.decode(written, skip_special_tokens=True).strip() and not said.right


def test_adapting_moves_the_error_of_its_own_image(tiny_processor: DeemProcessor) -> None:
    model = tiny_model()
    draws = {"num_noise": 2, "seed": 0}
    found = adapt_report(model, tiny_processor, World(), 2, 2, 8, [0.0, 1e-2], draws)
    still, moved = found["rates"]["0"], found["rates"]["0.01"]
    assert still["own"]["error"]["value"] == pytest.approx(0, abs=1e-5)
    assert moved["own"]["error"]["value"] < -1e-3
    assert set(moved["control"]["change"]) == {*ATTRIBUTES, "all"}
    assert all(one["value"] == 0 for one in still["control"]["change"].values())


@pytest.fixture
def checkpoint(tiny_processor: DeemProcessor, tmp_path: Path) -> str:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_recipe_writes_page_and_numbers(checkpoint: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_images": 6, "num_timesteps": 4, "gradient_batches": 2, "token_images": 3}
    arguments = diagnose.DiagnoseArguments(
        checkpoint,
        out=str(tmp_path / "out"),
        score_images=4,
        grades=[2],
        adapt_images=2,
        adapt_learning_rates=[1e-3],
        adapt_steps=1,
        batch_size=3,
        **options,
    )
    found = diagnose.main(arguments)
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text()) == json.loads(json.dumps(found))
    page = (tmp_path / "out" / "diagnosis.html").read_text()
    for title in ("Leak test", "Timesteps", "Gradient", "Tokens", "Scores", "Adapting at test time", "Images"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("data:image/png;base64,") == 4 and found["timesteps"]["timesteps"] == [125, 375, 625, 875]
    assert found["scores"]["shifted"][2]["error"]["positives"] == 4
    with pytest.raises(ValueError, match="--num_timesteps 0"):
        diagnose.main(replace(arguments, num_timesteps=0))


def test_data_of_ones_own(checkpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "captions"
    folder.mkdir()
    for sample in world_samples(World(), 1) + world_samples(World(seed=1), 1) + world_samples(World(seed=2), 1):
        name = f"{len(list(folder.iterdir())):04d}"
        sample["images"][0].save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text("a shape")
    arguments = diagnose.DiagnoseArguments(checkpoint, data=[str(folder)], out=str(tmp_path / "out"), num_timesteps=2)
    found = diagnose.main(replace(arguments, token_images=0, gradient_batches=1))
    assert found["images"] == 3 and "scores" not in found and "tokens" not in found
    assert found["gradients"]["losses"]["consistency_loss"]["norm"] > 0
    with pytest.raises(ValueError, match="at least 2 are needed"):
        images_of([{}], 5, torch.device("cpu"))
