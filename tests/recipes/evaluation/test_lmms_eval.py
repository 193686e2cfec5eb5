# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""DEEM and a LLaVA in lmms-eval, offline, on tables that recipes/export_benchmark.py wrote: `pip install -e ".[lmms]"`."""

from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixtures import checkpoint, lines_of, run

from recipes.evaluation.benchmarks import benchmark_named
from recipes.evaluation.sources import DataSource
from recipes.export_benchmark import ExportArguments, main
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers import write_formats

if find_spec("lmms_eval") is None:
    pytest.skip('lmms-eval is not installed (pip install -e ".[lmms]")', allow_module_level=True)

from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms")
    write_formats(folder, World(), 3, HELD_OUT, "medium", ["pope", "robustvqa", "visdial", "refcocog_region"])
    return folder


def evaluate(model: str, arguments: str, task: str, folder: Path, **options: Any) -> dict[str, Any]:
    tasks = TaskManager(include_path=str(folder), include_defaults=False, model_name=model)
    return evaluator.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=tasks, log_samples=True, **options
    )


def test_the_entry_point_is_there() -> None:
    (found,) = entry_points(group="lmms_eval.models", name="deem")
    assert found.load()().chat_class_path.endswith("DeemChat")


@pytest.mark.parametrize("protocol", ["standard", "deem"])
@pytest.mark.parametrize("simple", [False, True])
def test_pope_equals_ours_sample_by_sample(data: Path, tmp_path: Path, protocol: str, simple: bool) -> None:
    deem = checkpoint("deem")
    ours = run(deem, tmp_path / "ours", data, "pope", protocol=protocol, num_beams=2)["pope"]
    main(ExportArguments("pope", str(data), "lmms_eval", str(tmp_path / "task"), protocol))
    kept = tmp_path / "answers"
    arguments = f"pretrained={deem},protocol={protocol},max_new_tokens=3,num_beams=2,answers={kept}"
    options = {"batch_size": 5, "force_simple": simple, "device": "cpu"}
    found = evaluate("deem", arguments, "pope_file", tmp_path / "task", **options)
    samples = sorted(found["samples"]["pope_file"], key=lambda sample: sample["doc_id"])
    lines = lines_of(tmp_path / "ours" / "pope")
    assert [sample["accuracy"]["raw"] for sample in samples] == [line["raw"] for line in lines]
    assert [sample["accuracy"]["score"] for sample in samples] == [line["score"] for line in lines]
    for name in ("accuracy", "f1", "yes_ratio", "unparsed"):
        assert found["results"]["pope_file"][f"{name},none"] == ours["figures"][name]["value"]
    (file,) = kept.glob("*.jsonl")
    before = file.read_text()
    assert 0 < len(before.splitlines()) <= len(lines)
    evaluate("deem", arguments, "pope_file", tmp_path / "task", **options)
    assert file.read_text() == before  # nothing was asked again


def test_robustvqa_runs_for_a_llava(data: Path, tmp_path: Path) -> None:
    llava = checkpoint("llava")
    main(ExportArguments("robustvqa", str(data), "lmms_eval", str(tmp_path / "task")))
    arguments = f"pretrained={llava},protocol=standard,max_new_tokens=3,answers=none"
    found = evaluate("deem", arguments, "robustvqa", tmp_path / "task", batch_size=4, device="cpu")
    ours = run(llava, tmp_path / "ours", data, "robustvqa")["robustvqa"]
    for name in ("accuracy", "item_accuracy", "choice_accuracy", "choice_first_ratio"):
        assert found["results"]["robustvqa"][f"{name},none"] == ours["figures"][name]["value"]


def test_robustvqa_runs_in_a_model_of_lmms_eval(data: Path, tmp_path: Path) -> None:
    """A LLaVA as lmms-eval itself loads it, with the text that the same LLaVA writes in our evaluation."""
    pytest.importorskip("decord", reason="lmms-eval's llava_hf needs it (pip install decord)")
    llava = checkpoint("llava")
    main(ExportArguments("robustvqa", str(data), "lmms_eval", str(tmp_path / "task")))
    arguments = f"pretrained={llava},device_map=cpu,dtype=float32"
    options = {"batch_size": 1, "device": "cpu", "gen_kwargs": "max_new_tokens=3"}
    found = evaluate("llava_hf", arguments, "robustvqa", tmp_path / "task", **options)
    ours = run(llava, tmp_path / "ours", data, "robustvqa", num_beams=1)["robustvqa"]
    samples = sorted(found["samples"]["robustvqa"], key=lambda sample: sample["doc_id"])
    raw = [line["raw"] for line in lines_of(tmp_path / "ours" / "robustvqa")]
    assert [sample["accuracy"]["raw"].strip() for sample in samples] == raw
    assert found["results"]["robustvqa"]["accuracy,none"] == ours["figures"]["accuracy"]["value"]


def test_unknown_arguments_are_refused(data: Path, tmp_path: Path) -> None:
    main(ExportArguments("pope", str(data), "lmms_eval", str(tmp_path), limit=3))
    with pytest.raises(ValueError, match="Unknown --model_args colour"):
        evaluate("deem", f"pretrained={checkpoint('deem')},colour=red", "pope_file", tmp_path, device="cpu")


@pytest.mark.parametrize(("benchmark", "model"), [("visdial", "deem"), ("refcocog_region", "llava")])
def test_other_tasks_run(benchmark: str, model: str, data: Path, tmp_path: Path) -> None:
    main(ExportArguments(benchmark, str(data), "lmms_eval", str(tmp_path / "task")))
    arguments = f"pretrained={checkpoint(model)},protocol=standard,max_new_tokens=3,answers=none"
    found = evaluate("deem", arguments, benchmark, tmp_path / "task", batch_size=4, device="cpu")
    samples = found["samples"][benchmark]
    assert len(samples) == len(benchmark_named(benchmark).load(DataSource(benchmark, str(data))).samples) > 1
    names = {"visdial": ("ndcg", "mrr", "recall_10"), "refcocog_region": ("cider", "rouge_l")}[benchmark]
    assert all(found["results"][benchmark][f"{name},none"] >= 0 for name in names)
    assert all(sample[names[0]]["raw"] == sample["filtered_resps"][0] for sample in samples)


def test_drawn_answers_differ_between_repeats_alone(data: Path, tmp_path: Path) -> None:
    main(ExportArguments("pope", str(data), "lmms_eval", str(tmp_path), limit=3))
    arguments = f"pretrained={checkpoint('deem')},protocol=standard,max_new_tokens=3,answers={tmp_path / 'answers'}"
    written = []
    for folder, batch_size in ("answers", 1), ("answers", 2), ("anew", 3):
        arguments = arguments.replace(f"{tmp_path}/answers", f"{tmp_path}/{folder}")
        found = evaluate(
            *("deem", arguments, "pope_file", tmp_path),
            **{"batch_size": batch_size, "device": "cpu", "repeats": 2},
            gen_kwargs="do_sample=true,temperature=5.0",
        )
        written.append({one["doc_id"]: one["resps"] for one in found["samples"]["pope_file"]})
    assert written[0] == written[1] == written[2]
    assert any(len(set(map(str, one[0]))) > 1 for one in written[0].values())
