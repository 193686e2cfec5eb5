# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/evidence.py: the whole experiment in miniature, what it goes on with, its controls, and its sentences."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from family_fixtures import save_diffusion
from PIL import Image, ImageOps
from transformers import AutoProcessor

from modeling_deem import DeemForConditionalGeneration
from recipes import evidence
from recipes.study.arm_run import run_arm
from recipes.study.dialogues import as_caption, dialogue_rows, messages_of, question
from recipes.study.parts import make_part, words_of
from recipes.study.photographs import brighter_half, dominant_hue, group_of, run_photographs
from recipes.study.probes import Probe, tokens_of
from recipes.study.questions import PAIRED, variant
from recipes.study.reading import encode
from recipes.study.report import headline, write_report
from recipes.study.settings import ARMS, EvidenceArguments
from recipes.study.start import image_sets, make_encoder, make_start
from recipes.study.summary import difference, read_results, said_of
from recipes.study.training import (
    ArmCollator,
    ArmTrainer,
    caption_rows,
    renew_projector,
    train_arm,
    train_redrawing,
)
from recipes.synthetic.scenes import World
from recipes.whole_files import alone

TINY = {"num_images": 16, "num_labelled": 12, "num_tested": 8, "num_asked": 2, "vision_steps": 1, "steps": 2}
TINY |= {
    "batch_size": 4,
    "answer_steps": 1,
    "describe_steps": 1,
    "redraw_steps": 1,
    "reading_steps": 2,
    "num_redrawn": 1,
    "grades": [0, 2],
    "seeds": [0],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> EvidenceArguments:
    """Two arms and the control, of a few steps each."""
    out = tmp_path_factory.mktemp("evidence")
    arguments = EvidenceArguments(out=str(out), parts=str(out / "parts"), **TINY)
    arguments.check_same()
    make_part(arguments, "text")
    save_diffusion(out / "parts" / "diffusion")
    make_encoder(arguments, 0)
    make_start(arguments, 0)
    for arm in arguments.arms:
        run_arm(arguments, 0, arm)
    return arguments


def test_the_whole_experiment_in_miniature(run):
    summary = write_report(run)
    page = (run.folder(0).parent / "evidence.html").read_text()
    assert all(
        word in page for word in ("Grade 0", "Grade 2", "consistency - exchanged", "Cost", "What the tokens hold")
    )
    kept = json.loads((run.folder(0).parent / "evidence.json").read_text())
    assert kept["arms"] == ["text", "consistency", "exchanged"] and kept["table"].keys() == {"0", "2"}
    row = kept["table"]["0"]["probe color"]
    assert row["arms"]["text"]["count"] == 8 and set(row["differences"]) >= {"consistency - text"}
    assert {"probe kind", "open color", "pope adversarial", "mmvp pairs"} <= kept["table"]["0"].keys()
    assert "probe background" not in kept["table"]["2"]  # never labelled, so there is no right answer
    assert kept["cost"]["consistency"]["peak MB"] > 100 and "probe color" in headline(summary)


def test_arms_of_a_seed_begin_alike_and_a_finished_one_is_kept(run):
    logs = [json.loads((run.folder(0, arm) / "result.json").read_text())["log"] for arm in run.arms]
    first = [next(row["text_loss"] for row in log if "text_loss" in row) for log in logs]
    assert first[0] == first[1] == first[2]
    feedback = [next(row["consistency_loss"] for row in log if "consistency_loss" in row) for log in logs[1:]]
    assert feedback[0] != feedback[1]
    file = run.folder(0, "text") / "result.json"
    before = file.stat().st_mtime_ns
    run_arm(run, 0, "text")
    assert file.stat().st_mtime_ns == before and evidence.is_done(run)


def test_a_killed_run_goes_on_and_other_settings_are_refused(run, tmp_path):
    again = EvidenceArguments(out=str(tmp_path / "again"), parts=run.parts, **TINY)
    shutil.copytree(run.out, again.out)
    (again.folder(0, "text") / "result.json").unlink()
    (again.folder(0, "text") / "answers" / "0" / "pope" / "predictions.jsonl").write_text("{half a line")
    assert not evidence.is_done(again)
    run_arm(again, 0, "text")
    results = [json.loads((one.folder(0, "text") / "result.json").read_text())["scores"] for one in (run, again)]
    assert results[0] == results[1]  # the same figures: everything is drawn from the seed
    with pytest.raises(ValueError, match="steps 2, now 3.*another --out"):
        EvidenceArguments(out=again.out, parts=run.parts, **TINY | {"steps": 3}).check_same()


def test_an_arm_that_is_not_asked_is_asked_later(run, tmp_path):
    again = EvidenceArguments(out=str(tmp_path), parts=run.parts, **TINY, arms=["text", "consistency", "anchor"])
    shutil.copytree(run.out, again.out, dirs_exist_ok=True)
    run_arm(again, 0, "anchor")
    rows = write_report(again)["table"]["0"]
    assert rows["open color"]["arms"]["anchor"] is None and rows["probe color"]["arms"]["anchor"]["count"] == 8
    assert "anchor - text" in rows["probe color"]["differences"]
    assert "anchor - text" not in rows["open color"]["differences"]
    assert evidence.is_done(again)
    again.asked_arms.append("anchor")
    trained = (again.folder(0, "anchor") / "trained.json").stat().st_mtime_ns
    assert not evidence.is_done(again)
    run_arm(again, 0, "anchor")
    assert evidence.is_done(again) and (again.folder(0, "anchor") / "trained.json").stat().st_mtime_ns == trained
    assert write_report(again)["table"]["0"]["open color"]["arms"]["anchor"]["count"]


def test_an_arm_asked_in_one_seed_alone_is_compared_there(run):
    results = read_results(run)
    results["consistency"][1] = results["consistency"][0]
    results["text"][1] = results["text"][0] | {
        "scores": {name: one for name, one in results["text"][0]["scores"].items() if name != "open color"}
    }
    assert set(difference(results, "consistency", "text", ["open color"], "0", False)["seeds"]) == {0}
    assert set(difference(results, "consistency", "text", ["probe color"], "0", False)["seeds"]) == {0, 1}


def test_tokens_of_every_arm_are_redrawn_by_the_same_denoiser(run, tmp_path, monkeypatch):
    again = EvidenceArguments(**asdict(run) | {"out": str(tmp_path / "again"), "arms": ["confounded_a"]})
    shutil.copytree(run.folder(0, "start"), again.folder(0, "start"))
    used = {}

    def watch(model, *args):
        used.update({own: value.clone() for own, value in model.image_decoder.denoiser.state_dict().items()})
        return train_redrawing(model, *args)

    monkeypatch.setattr("recipes.study.arm_run.train_redrawing", watch)
    run_arm(again, 0, "confounded_a")
    own, first = (
        DeemForConditionalGeneration.from_pretrained(
            again.folder(0, name) / "model"
        ).image_decoder.denoiser.state_dict()
        for name in ("confounded_a", "start")
    )
    assert all(torch.equal(used[name], value) for name, value in first.items())
    assert any(not torch.equal(own[name], value) for name, value in first.items())  # the arm had trained it


def test_one_run_at_a_time(run, tmp_path):
    """Also where the run is gone and one of its jobs is not."""
    again = EvidenceArguments(**asdict(run) | {"out": str(tmp_path)})
    flags = ["--out", again.out, "--parts", again.parts, "--seeds", "0"]
    for name, value in TINY.items():
        flags += [] if name == "seeds" else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    with alone(tmp_path, "") as lock:
        job = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with pytest.raises(ValueError, match="a job that outlived one"):
        evidence.main(flags)
    job.communicate(b"\n")
    with alone(tmp_path, "still held"):
        pass


def test_parts_of_other_settings_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="reading_steps 2, now 3.*another --parts"):
        EvidenceArguments(out=str(tmp_path / "a"), parts=run.parts, **TINY | {"reading_steps": 3}).check_same()
    (tmp_path / "old" / "text").mkdir(parents=True)
    with pytest.raises(ValueError, match="earlier version"):
        EvidenceArguments(out=str(tmp_path / "b"), parts=str(tmp_path / "old"), **TINY).check_same()


def test_the_control_rolls_the_targets_and_nothing_else(run):
    start = run.folder(0, "start")
    processor, latents = AutoProcessor.from_pretrained(start / "model"), torch.load(start / "latents.pt")
    images = [World().scene(index).image for index in range(4)]
    rows = caption_rows(["a circle"] * 4, images, draws=False)
    own, other = (ArmCollator(processor, latents, exchanged)(rows) for exchanged in (False, True))
    assert torch.equal(own["target_latents"], latents[:4])
    assert torch.equal(other["target_latents"], latents[[3, 0, 1, 2]])
    assert all(
        torch.equal(own[name], other[name]) for name in own if torch.is_tensor(own[name]) and "target" not in name
    )


@pytest.mark.parametrize("name", ["pixels", "contrastive", "leak", "confounded_a", "confounded_b", "align"])
def test_what_every_other_arm_trains(run, name, tmp_path, monkeypatch):
    """Next to no text loss, the arm's own loss moves the encoder and nothing that the arm freezes; then nothing is left."""
    arm, start = ARMS[name], run.folder(0, "start")
    arguments = EvidenceArguments(**asdict(run) | {"parts": str(tmp_path)})
    shutil.copytree(start / "vision", tmp_path / "vision")  # whom "align" aligns to
    model = DeemForConditionalGeneration.from_pretrained(start / "model")
    processor, latents = AutoProcessor.from_pretrained(start / "model"), torch.load(start / "latents.pt")
    rows = caption_rows(["a circle"] * 4, [World().scene(index).image for index in range(4)], arm.draws)
    model.config.text_loss_weight = 1e-20  # of a micro-batch without any other loss of the model, 0 is refused
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients: dict[str, float] = {}

    class Watched(ArmTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            for own, value in model.named_parameters():
                if value.grad is not None:
                    gradients[own] = max(gradients.get(own, 0.0), float(value.grad.abs().max()))
            return loss

    monkeypatch.setattr("recipes.study.training.ArmTrainer", Watched)
    train_arm(model, processor, arm, rows, latents, arguments, tmp_path / "run", 0)
    reached = {own for own, size in gradients.items() if size > 1e-15}
    encoder = {own for own in reached if own.startswith("model.vision_tower.encoder")}
    assert bool(encoder) == (name != "confounded_a")
    assert any(own.startswith("image_decoder.denoiser") for own in reached) == (name == "confounded_a")
    frozen = tuple(f"{part}." for part in arm.freeze)
    after = model.state_dict()
    assert after.keys() == before.keys()  # a head that an arm brought is gone
    assert all(torch.equal(after[own], value) for own, value in before.items() if own.startswith(frozen))


def test_the_anchor_pulls_the_encoder_back(run, tmp_path):
    start, arguments = run.folder(0, "start"), EvidenceArguments(**asdict(run) | {"steps": 8, "weight": 1e3})
    processor, latents = AutoProcessor.from_pretrained(start / "model"), torch.load(start / "latents.pt")
    rows = caption_rows(["a circle"] * 8, [World().scene(index).image for index in range(8)], draws=False)
    away = {}
    for name in ("text", "anchor"):
        model = DeemForConditionalGeneration.from_pretrained(start / "model")
        before = [value.clone() for value in model.model.vision_tower.encoder.parameters()]
        train_arm(model, processor, ARMS[name], rows, latents, arguments, tmp_path, 0)
        pairs = zip(before, model.model.vision_tower.encoder.parameters(), strict=True)
        away[name] = sum(float((one - other).detach().square().sum()) for one, other in pairs)
    assert 0 < away["anchor"] < 0.5 * away["text"]


def test_dialogues_show_an_image_once_and_ask_several_benchmarks(run):
    scenes = image_sets(run, 0)["labelled"]
    rows = dialogue_rows(scenes, 40)
    shown = [[part["type"] for message in row["messages"] for part in message["content"]] for row in rows]
    assert len(rows) == 40 and all(parts.count("image") == 1 for parts in shown)
    lengths = [len(row["messages"]) for row in rows]
    assert min(lengths) == 2 and max(lengths) >= 8  # captions, and dialogues of several questions
    assert all(row["messages"][-1]["content"][0]["text"].strip() for row in rows)


def test_a_new_projector_hears_what_differs_between_images(run):
    start = run.folder(0, "start") / "model"
    model, processor = DeemForConditionalGeneration.from_pretrained(start), AutoProcessor.from_pretrained(start)
    tokens = tokens_of(model, processor, [World().scene(index).image for index in range(40)])
    renew_projector(model, tokens, seed=0)
    with torch.no_grad():
        heard = model.model.projector(tokens.clone())
    words = model.get_input_embeddings().weight.detach()
    assert torch.allclose(heard.mean((0, 1)), words.mean(0), atol=0.1 * float(words.std()))
    assert 0.5 < float((heard - heard.mean(0)).std() / words.std()) < 2
    same = heard.mean(0)  # [Q, D], for all images: a token is known by it, and it does not drown the rest
    assert 0.5 < float((same - same.mean(0)).std() / words.std()) < 1.5
    assert float(torch.cdist(same, same)[~torch.eye(len(same), dtype=bool)].min()) > float(words.std())


def test_photographs_are_asked_the_same_question(run, tmp_path):
    """Colored noise in the layout of labelled photographs; every arm begins alike and is probed on the same ones."""
    draws = np.random.default_rng(0)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(24):
            pixels = draws.integers(0, 255, 3) * draws.uniform(0.3, 1, (40, 48, 1))
            image, about = io.BytesIO(), {"class_id": 40 * number, "label": f"class {number}"}
            Image.fromarray(pixels.astype("uint8")).save(image, "JPEG")
            for suffix, held in (("jpg", image.getvalue()), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(held)
                tar.addfile(member, io.BytesIO(held))
    arguments = EvidenceArguments(**{**asdict(run), "photos": str(tmp_path)})
    assert not evidence.is_done(arguments)
    run_photographs(arguments, 0)
    assert evidence.is_done(arguments)
    summary = write_report(arguments)["photographs"]
    row = summary["table"]["0"]["photographs, what labels omit"]
    assert summary["arms"] == ["before", "text", "consistency", "exchanged"]
    assert row["arms"]["text"]["count"] == 6 * 3 + 12 and "consistency - exchanged" in row["differences"]
    with pytest.raises(ValueError, match="was made of the photographs in .* now --photos .*elsewhere"):
        EvidenceArguments(**asdict(arguments) | {"photos": str(tmp_path / "elsewhere")}).check_same()
    told = json.loads((arguments.folder(0, "photographs") / "result.json").read_text())["losses"]
    assert set(told["text"]) == {"group_loss"} and set(told["consistency"]) == {"group_loss", "feedback_loss"}
    assert told["consistency"]["feedback_loss"] != told["exchanged"]["feedback_loss"]
    shutil.rmtree(arguments.folder(0, "photographs"))


def test_what_is_measured_in_a_photograph():
    half = Image.new("RGB", (64, 64), (200, 20, 20))
    half.paste((40, 0, 0), (0, 0, 32, 64))
    assert dominant_hue(half) == "red" and dominant_hue(Image.new("RGB", (64, 64), (90, 90, 95))) == "gray"
    assert dominant_hue(Image.new("RGB", (64, 64), (30, 30, 200))) == "blue"
    assert brighter_half(half) == "right" and brighter_half(ImageOps.mirror(half)) == "left"
    assert group_of(151) == ("mammal", "dog") and group_of(999) == ("thing", "thing") and group_of(0)[1] == "fish"


def test_probes_find_what_is_there_and_nothing_else():
    draws = torch.Generator().manual_seed(0)
    vectors = torch.randn(400, 100, generator=draws)
    told = ["red" if row[7] > 0 else "blue" for row in vectors]
    noise = ["red" if value > 0 else "blue" for value in torch.randn(400, generator=draws)]
    assert np.mean(Probe(vectors[:200], told[:200]).scores(vectors[200:], told[200:])) > 0.7
    assert 0.4 < np.mean(Probe(vectors[:200], noise[:200]).scores(vectors[200:], noise[200:])) < 0.6
    some = [None if index % 2 else one for index, one in enumerate(told)]
    assert len(Probe(vectors, some).scores(vectors, some)) == 200


@pytest.mark.parametrize("attribute", PAIRED)
def test_pairs_differ_in_one_attribute_and_in_nothing_else(attribute):
    made = 0
    for index in range(20):
        scene = World(max_objects=3).scene(index)
        if (other := variant(scene, attribute)) is None:
            continue
        made += 1
        names = ("kind", "color", "size", "orientation", "position")
        odd = [name for name in names if getattr(scene.main, name) != getattr(other.main, name)]
        assert odd == [attribute] and scene.objects[1:] == other.objects[1:]
        assert np.any(np.asarray(scene.image) != np.asarray(other.image))
    assert made > 8


def results_of(**shares: float) -> dict:
    """Results of three seeds, of 40 items each, with a share of right answers per arm."""
    made: dict = {}
    for arm, share in shares.items():
        for seed in range(3):
            right = round(40 * share) + seed
            entry = {"scores": [1.0] * right + [0.0] * (40 - right), "units": [str(index) for index in range(40)]}
            made.setdefault(arm, {})[seed] = {"scores": {"probe color": {"0": entry}}}
    return made


def test_differences_are_paired_and_clustered_by_seed():
    found = difference(results_of(consistency=0.8, text=0.5), "consistency", "text", ["probe color"], "0", True)
    assert found["value"] == pytest.approx(0.3) and found["seeds"] == {seed: pytest.approx(0.3) for seed in range(3)}
    assert found["high"] - found["low"] < 1e-6 and found["p_value"] < 1e-6  # every seed gains the same
    with pytest.raises(ValueError, match="different things"):
        other = results_of(consistency=0.8, text=0.5)
        other["text"][0]["scores"]["probe color"]["0"]["units"][0] = "another"
        difference(other, "consistency", "text", ["probe color"], "0", False)


def test_what_the_control_has_too_is_not_claimed():
    gain = {"value": 0.3, "low": 0.2, "high": 0.4}
    rows = {"differences": {"consistency - text": gain, "consistency - exchanged": gain}}
    table = {"0": {"probes of what captions omit": rows}}
    assert said_of({"table": table})[0][0] == "holds"
    rows["differences"]["consistency - exchanged"] = {"value": 0.01, "low": -0.1, "high": 0.1}
    assert said_of({"table": table})[0][0] == "open" and "own is not shown" in said_of({"table": table})[0][1]
    rows["differences"]["consistency - text"] = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert said_of({"table": table})[0][0] == "open" and "learned at all" in said_of({"table": table})[0][1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arms": ["textual"]}, "textual: no such arm.*consistency"),
        ({"grades": [1, 2]}, "lack 0"),
        ({"grades": [0, 7]}, "0 to 4"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"num_images": 8}, "no batch"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(ValueError, match=message):
        EvidenceArguments(**given)


def test_the_shipped_configuration_is_the_default():
    assert evidence.parse([]) == EvidenceArguments()
    assert evidence.parse(["--full", "--seeds", "3", "4"]).arms == list(ARMS)


def test_the_language_model_reads_what_it_is_asked_about(run):
    scene = World(0, max_objects=3).scene(5)
    words = words_of(run)
    dialogue = messages_of({"type": "text", "text": f"{scene.caption('full')} "}, [as_caption(scene)])
    encoded = encode(words, dialogue)
    pairs = list(zip(encoded["input_ids"], encoded["labels"], strict=True))
    assert (
        words.decode([one for one, label in pairs if label == one]).strip()
        == f"A photo of {scene.caption('full')}</s>"
    )
    assert scene.caption("full") in words.decode([one for one, label in pairs if label == -100])
    assert len(words(" Please anwser yes or no").input_ids) == 6  # bos and a token for each word


@pytest.mark.parametrize("name", ["vqav2", "pope", "robustvqa", "mmvp"])
def test_questions_of_dialogues_are_right(name):
    """A benchmark's own rule takes the answer for right, of what the caption tells and of nothing else."""
    draws = np.random.default_rng(0)
    for index in range(40):
        scene = World(0, max_objects=3).scene(index)
        request, answer = question(scene, name, draws, detail="medium")
        asked = request.pieces[-1]
        assert answer.startswith("The answer is ")
        said = answer.removeprefix("The answer is ")
        things = [(thing.color, thing.kind) for thing in scene.objects]
        if name == "pope":
            color, kind = asked.split()[3:5]
            assert said == ("yes" if (color, kind) in things else "no")
        elif name == "robustvqa" and said not in ("yes", "no"):
            assert said == scene.main.kind and f" {said}" in asked
        elif name == "robustvqa":
            assert (said == "yes") == (f"Is {scene.main.kind} " in asked)
        elif name == "mmvp":
            assert f"{said} {scene.main.color}" in asked and "What color" in asked
        else:
            assert said in scene.caption("medium") or said in ("1", "2", "3")
