# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Generating: going on after a kill, batches of any size, several processes, failed samples, what is refused."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from evaluation_fixtures import checkpoint, lines_of, run
from PIL import Image
from scripts import SERVER

from recipes import evaluate
from recipes.data.samples import IMAGE
from recipes.evaluation.answering import Answerer, Question, load_model
from recipes.evaluation.benchmark import Request, some_clusters
from recipes.evaluation.benchmarks import BENCHMARKS
from recipes.evaluation.sources import DataSource
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers.evaluation import write_pope
from recipes.synthetic.writers.questions import write_vqa

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """POPE of four images, one set of it."""
    folder = tmp_path_factory.mktemp("data")
    write_pope(folder / "pope", World(), 4, HELD_OUT)
    for name in ("popular", "adversarial"):
        (folder / "pope" / f"coco_pope_{name}.json").unlink()
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that ran to its end, in one piece."""
    out = tmp_path_factory.mktemp("whole")
    run(checkpoint("deem"), out, data, "pope")
    return out


def same_but_order(first: Path, second: Path) -> bool:
    return lines_of(first / "pope") == lines_of(second / "pope")


def test_killed_runs_go_on_with_another_batch_size(data: Path, whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "pope" / "predictions.jsonl"
    total = len(lines_of(whole / "pope"))
    for number, batch_size in ((1, 1), (total // 2, 2), (total - 2, 1)):
        process = FORK.Process(
            target=run, args=(checkpoint("deem"), tmp_path, data, "pope"), kwargs={"batch_size": batch_size}
        )
        process.start()
        deadline = time.monotonic() + 120
        while process.is_alive() and (not file.is_file() or file.read_bytes().count(b"\n") < number):
            assert time.monotonic() < deadline, f"fewer than {number} answers within two minutes"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert number <= file.read_bytes().count(b"\n") <= total
    with open(file, "a") as torn:
        torn.write('{"id": "random/1", "ra')
    results = run(checkpoint("deem"), tmp_path, data, "pope", batch_size=5)
    assert same_but_order(tmp_path, whole)
    assert results["pope"]["figures"] == json.loads((whole / "results.json").read_text())["pope"]["figures"]


def _one_of_two(rank: int, port: int, model: Path, out: Path, data: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState._reset_state()
    results = run(model, out, data, "pope", batch_size=3)
    os._exit(0 if bool(results) == (rank == 0) else 1)


def test_two_processes_give_each_id_once_and_the_same_answers(data: Path, whole: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "pope").mkdir()
    begun = lines_of(whole / "pope")[:3]  # what a run of one process had left
    shutil.copy(whole / "pope" / "manifest.json", tmp_path / "pope")
    (tmp_path / "pope" / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in begun))
    ranks = [  # forked from a process with threads, they may wait for ever
        SERVER.Process(target=_one_of_two, args=(rank, port, checkpoint("deem"), tmp_path, data)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert same_but_order(tmp_path, whole)
    assert not list((tmp_path / "pope").glob("predictions-*"))


@pytest.mark.parametrize("change", ["weights", "annotation", "protocol", "generation", "limit"])
def test_an_evaluation_of_something_else_is_refused_by_name(
    change: str, data: Path, whole: Path, tmp_path: Path
) -> None:
    out, model, options = shutil.copytree(whole, tmp_path / "out"), checkpoint("deem"), {}
    named = {"weights": "model.weights", "annotation": "annotations.coco_pope_random.json"}.get(change, change)
    if change == "weights":
        model = shutil.copytree(model, tmp_path / "model")
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x11")
    elif change == "annotation":
        data = shutil.copytree(data, tmp_path / "data")
        file = data / "pope" / "coco_pope_random.json"
        file.write_text(file.read_text().replace("in the image", "in the picture"))
    else:
        options = {"protocol": {"protocol": "standard"}, "generation": {"num_beams": 1}, "limit": {"limit": 4}}[change]
    before = (out / "pope" / "predictions.jsonl").read_bytes()
    with pytest.raises(ValueError, match=named):
        run(model, out, data, "pope", **options)
    assert (out / "pope" / "predictions.jsonl").read_bytes() == before


def test_failed_samples_are_listed_and_wrong_and_asked_again(data: Path, whole: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(data, tmp_path / "data")
    image = next((broken / "pope" / "val2014").glob("*.jpg"))
    sound = image.read_bytes()
    image.write_bytes(b"no image")
    file = broken / "pope" / "coco_pope_random.json"
    file.write_text(file.read_text() + '{"question_id": 99, "image": 7}\n')
    results = run(checkpoint("deem"), tmp_path / "out", broken, "pope")
    failed = results["pope"]["failed"]
    lines = lines_of(tmp_path / "out" / "pope")
    of_image = [line for line in lines if line["cluster"] == image.name]
    assert {one["id"] for one in failed} == {line["id"] for line in of_image} | {lines[-1]["id"]}
    assert all(line["score"] == 0 and line["parsed"] is None for line in (*of_image, lines[-1]))
    assert results["pope"]["figures"]["accuracy"]["count"] == len(lines) == len(lines_of(whole / "pope")) + 1
    assert evaluate.has_failed(results)
    assert failed[0]["id"] in (tmp_path / "out" / "evaluation.html").read_text()
    image.write_bytes(sound)  # mended: those alone are asked again
    results = run(checkpoint("deem"), tmp_path / "out", broken, "pope")
    assert [one["id"] for one in results["pope"]["failed"]] == [lines[-1]["id"]]


def test_scoring_needs_no_model(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "results.json").unlink()
    results = evaluate.main(evaluate.EvaluateArguments(model="nowhere", score=str(out)))
    assert results == json.loads((whole / "results.json").read_text())
    file = out / "pope" / "predictions.jsonl"
    file.write_bytes(b"\n".join(file.read_bytes().split(b"\n")[:-2]) + b"\n")
    with pytest.raises(ValueError, match="same command again"):
        evaluate.main(evaluate.EvaluateArguments(score=str(out)))


def test_a_limit_takes_whole_images_and_is_said(data: Path, tmp_path: Path) -> None:
    samples = BENCHMARKS["pope"].load(DataSource("pope", str(data))).samples
    few, more = (some_clusters(samples, limit, seed=0) for limit in (1, 5))
    clusters = {sample.cluster for sample in few}
    assert len(clusters) == 1 and few == [sample for sample in samples if sample.cluster in clusters]
    assert {sample.id for sample in few} < {sample.id for sample in more} and len(more) >= 5
    results = run(checkpoint("deem"), tmp_path, data, "pope", limit=1)
    assert results["pope"]["partial"] and results["pope"]["samples"] == len(few)
    assert "partial" in (tmp_path / "evaluation.html").read_text()


@pytest.mark.parametrize("kind", ["deem", "llava"])
def test_answers_do_not_depend_on_the_batch(kind: str, data: Path, tmp_path: Path) -> None:
    options = {"do_sample": True, "check_batching": 3}
    drawn = run(checkpoint(kind), tmp_path / "drawn", data, "pope", **options)
    assert drawn["pope"]["check_batching"] == {"checked": 3, "different": []}
    answers = []
    for size in (1, 7):
        run(checkpoint(kind), tmp_path / str(size), data, "pope", batch_size=size, check_batching=3)
        answers.append(lines_of(tmp_path / str(size) / "pope"))
    assert answers[0] == answers[1]
    assert answers[0] != lines_of(tmp_path / "drawn" / "pope")


def test_without_images_nothing_is_seen(data: Path, tmp_path: Path) -> None:
    results = run(checkpoint("llava"), tmp_path, data, "pope", without_images=True)
    lines = lines_of(tmp_path / "pope")
    assert not any("<image>" in line["prompt"] or line["images"] for line in lines)
    assert results["pope"]["manifest"]["without_images"]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_image_encoded_once_gives_the_same_answers(num_beams: int) -> None:
    model, processor = load_model(checkpoint("deem"))
    images = [World().scene(HELD_OUT + number).image for number in range(3)]
    once, plain = (Answerer(model, processor, "deem", encode_once=way) for way in (True, False))
    questions = []
    for number in range(7):
        prompt = once.prompt(Request((IMAGE, f"Is a <image> there? {'Really? ' * number}"), " The answer is"))
        questions.append(Question(str(number), prompt, (images[number % 3],), (str(number % 3),)))
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": num_beams, "do_sample": False}
    assert once.answer(questions, **options) == plain.answer(questions, **options)
    assert once.encoded == 3
    fast, slow = once._inputs_encoded_once(questions), plain._inputs(questions)
    assert torch.equal(fast["input_ids"], slow["input_ids"])
    assert torch.equal(fast["attention_mask"], slow["attention_mask"])


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No vision-language model"):
        load_model(tmp_path)
    model, processor = load_model(checkpoint("llava"))
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Answerer(model, processor)


def test_missing_data_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="coco_pope_random.json"):
        run(tmp_path / "no model", tmp_path, tmp_path, "pope")
    with pytest.raises(ValueError, match="Unknown benchmark 'pop'"):
        run(tmp_path / "no model", tmp_path, tmp_path, "pop")


def test_rows_of_datasets_are_read(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"question": "Is there a cat?", "answer": "yes", "category": "popular", "image_source": "a"},
        {"question": "Is there a dog?", "answer": "no", "category": "popular", "image_source": "a"},
    ]
    table = datasets.Dataset.from_list([row | {"image": Image.new("RGB", (64, 64), "red")} for row in rows])
    table = table.cast_column("image", datasets.Image())
    (tmp_path / "pope").mkdir()
    table.to_parquet(tmp_path / "pope" / "test-00000.parquet")
    results = run(checkpoint("llava"), tmp_path / "out", tmp_path, "pope")
    assert results["pope"]["samples"] == 2 and results["pope"]["failed"] == []
    assert results["pope"]["figures"]["popular_accuracy"]["clusters"] == 1
    assert (
        "data:image/png" in (tmp_path / "out" / "evaluation.html").read_text()
        or results["pope"]["figures"]["accuracy"]["value"] == 1
    )


def test_an_id_that_stands_twice_counts_once(tmp_path: Path) -> None:
    write_vqa(tmp_path / "data", World(), 1, HELD_OUT, split="val2014")
    file = tmp_path / "data" / "v2_OpenEnded_mscoco_val2014_questions.json"
    content = json.loads(file.read_text())
    content["questions"] = content["questions"][:2] + content["questions"][:1]
    file.write_text(json.dumps(content))
    results = run(checkpoint("llava"), tmp_path / "out", tmp_path / "data", "vqav2")
    (failed,) = results["vqav2"]["failed"]
    assert failed["error"].endswith("its id stands twice") and results["vqav2"]["samples"] == 3
