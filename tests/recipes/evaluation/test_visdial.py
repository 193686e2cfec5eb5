# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""VisDial: options in order of their likelihood, behind a prompt that is read once."""

import json
from pathlib import Path

import pytest
import torch
from evaluation_fixtures import checkpoint, lines_of, run
from transformers import LlavaForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from recipes import evaluate
from recipes.data.samples import IMAGE
from recipes.evaluation.answering import Answerer, Question, load_model
from recipes.evaluation.benchmark import Request, scored
from recipes.evaluation.benchmarks import BENCHMARKS
from recipes.evaluation.ranking import goes_on_behind_cache, log_likelihoods, option_token_ids
from recipes.evaluation.scoring.ranking import ndcg
from recipes.evaluation.sources import DataSource
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers.image_benchmarks import write_visdial

OPTIONS = ("red", "it is a blue circle on the left", "no", "two small squares")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_visdial(folder / "visdial", World(), 3, HELD_OUT)
    return folder


def test_the_world_writes_the_real_layout(data: Path) -> None:
    read = json.loads((data / "visdial" / "visdial_1.0_val.json").read_text())["data"]
    dense = json.loads((data / "visdial" / "visdial_1.0_val_dense_annotations.json").read_text())
    assert len(read["dialogs"]) == len(dense) == 3
    for dialogue in read["dialogs"]:
        for one in dialogue["dialog"]:
            assert len(one["answer_options"]) == len(set(one["answer_options"])) == 100
            assert one["answer_options"][one["gt_index"]] == one["answer"]
    for row in dense:
        asked = read["dialogs"][row["image_id"] - 1]["dialog"][row["round_id"] - 1]
        assert sorted(row["gt_relevance"])[-3:] == [0, 0.5, 1] and row["gt_relevance"][asked["gt_index"]] == 1


@pytest.mark.parametrize("kind", ["deem", "llava"])
def test_a_prompt_read_once_gives_the_same_scores(kind: str) -> None:
    model, processor = load_model(checkpoint(kind))
    once = Answerer(model, processor, "standard", options_at_once=3)
    plain = once.alone()
    image = World().scene(HELD_OUT).image
    prompt = once.prompt(Request((IMAGE, "What is there?")))
    for images in ((image,), ()):
        asked = prompt if images else once.prompt(Request(("What is there?",)))
        question = Question("1", asked, images, ("a",) * len(images), options=OPTIONS)
        (fast,), (slow,) = once.answer([question]), plain.answer([question])
        assert fast.raw == slow.raw and fast.token_ids == slow.token_ids
        assert fast.more["option_scores"] == pytest.approx(slow.more["option_scores"], abs=1e-4)
        # and by hand: each option alone behind the prompt
        for option, score in zip(OPTIONS, fast.more["option_scores"], strict=True):
            ids = option_token_ids(processor.tokenizer, [option])[0]
            inputs = plain._inputs([Question("1", asked, images, ("a",) * len(images))])
            whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
            inputs |= {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
            with torch.inference_mode():
                logs = model(**inputs).logits[0].log_softmax(-1)
            start = whole.shape[1] - len(ids)
            expected = sum(float(logs[start + n - 1, token]) for n, token in enumerate(ids))
            assert score == pytest.approx(expected, abs=1e-4)
    assert once.encoded == (1 if kind == "deem" else 0)
    with pytest.raises(ValueError, match="has no tokens"):
        option_token_ids(processor.tokenizer, ["a", ""])


@pytest.mark.parametrize("kind", ["deem", "llava"])
def test_visdial(kind: str, data: Path, tmp_path: Path) -> None:
    results = run(checkpoint(kind), tmp_path, data, "visdial", check_batching=1)
    result, lines = results["visdial"], lines_of(tmp_path / "visdial")
    figures = result["figures"]
    assert result["failed"] == [] and not evaluate.has_failed(results) and result["samples"] == 3
    assert result["headline"] == "ndcg" and figures["ndcg"]["clusters"] == 3 and 0 < figures["ndcg"]["chance"] < 0.2
    assert figures["recall@10"]["chance"] == pytest.approx(0.1) and figures["mean_rank"]["chance"] == 50.5
    assert result["check_batching"] == {"checked": 1, "different": []}
    for line in lines:
        scores, about = line["option_scores"], line["about"]
        assert len(scores) == 100 and line["raw"] == about["options"][scores.index(max(scores))]
        assert line["score"] == ndcg(scores, about["relevance"])
    rows = json.loads((tmp_path / "visdial" / "submission.json").read_text())
    assert all(sorted(row["ranks"]) == list(range(1, 101)) for row in rows)
    assert "visdial" in (tmp_path / "evaluation.html").read_text()


def test_the_history_is_the_protocol_s(data: Path) -> None:
    benchmark = BENCHMARKS["visdial_rounds"]
    samples = benchmark.load(DataSource("visdial_rounds", str(data / "visdial"))).samples
    assert len(samples) == 12 and all(sample.fault is None for sample in samples)
    sample = samples[2]
    (first, answer), (second, _) = sample.about["history"]
    deem, standard = (benchmark.request(sample, protocol) for protocol in ("deem", "standard"))
    assert deem.pieces[1] == (
        f" caption: {sample.about['caption']}. question: {first}? answer: {answer}. question: {sample.asked}? "
    )
    assert deem.answer_begin == " the answer is" and f"Question: {second}?" in standard.pieces[1]
    model, processor = load_model(checkpoint("deem"))
    prompt = Answerer(model, processor, "deem").prompt(deem)
    assert prompt.endswith(f"question: {sample.asked}? \n ## ASSISTANT: the answer is")
    assert "## USER: <image> caption: " in prompt


def test_every_round_can_be_asked(data: Path, tmp_path: Path) -> None:
    results = run(checkpoint("llava"), tmp_path, data / "visdial", "visdial_rounds", limit=1)
    figures = results["visdial_rounds"]["figures"]
    assert figures["mrr"]["count"] == 4 and figures["mrr"]["clusters"] == 1 and figures["ndcg"]["count"] == 1


def test_ranks_count_as_they_should(data: Path) -> None:
    benchmark = BENCHMARKS["visdial"]
    lines = []
    for sample in benchmark.load(DataSource("visdial", str(data))).samples:
        line = {"id": sample.id, "truth": sample.truth, "about": sample.about, "cluster": sample.cluster, "raw": ""}
        lines.append(scored(benchmark, line | {"option_scores": sample.about["relevance"]}))
    figures = benchmark.figures(lines)
    assert (
        figures["ndcg"].value == figures["mrr"].value == figures["recall@1"].value == figures["mean_rank"].value == 1
    )
    failed = [{**line, "error": "missing image"} for line in lines]
    for line in failed:
        del line["option_scores"]
    figures = benchmark.figures([scored(benchmark, line) for line in failed])
    assert figures["ndcg"].value == figures["mrr"].value == 0 and figures["mean_rank"].value == 100
    assert benchmark.submission(failed) == []


def test_rows_that_cannot_be_used_fail_alone(data: Path, tmp_path: Path) -> None:
    write_visdial(tmp_path, World(), 3, HELD_OUT)
    file, dense = tmp_path / "visdial_1.0_val.json", tmp_path / "visdial_1.0_val_dense_annotations.json"
    read, judged = json.loads(file.read_text()), json.loads(dense.read_text())
    judged[0]["gt_relevance"].pop()
    judged[1]["image_id"] = 77
    read["data"]["dialogs"][2]["dialog"][judged[2]["round_id"] - 1]["gt_index"] = 100
    file.write_text(json.dumps(read))
    dense.write_text(json.dumps(judged))
    samples = BENCHMARKS["visdial"].load(DataSource("visdial", str(tmp_path))).samples
    faults = [sample.fault for sample in samples]
    assert "99 relevances" in faults[0] and "gt_index 100" in faults[1] and "no dialogue" in faults[2]
    dense.unlink()
    with pytest.raises(ValueError, match="dense_annotations"):
        BENCHMARKS["visdial"].load(DataSource("visdial", str(tmp_path)))


def test_places_in_three_directions_go_on_behind_the_cache() -> None:
    """Qwen2-VL: an image takes fewer places than tokens."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope, "initializer_range": 0.2}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    marks = {"vision_start_token_id": 61, "vision_end_token_id": 62, "image_token_id": 60, "video_token_id": 63}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **marks)).eval()
    ids = torch.tensor([[1, 61, *[60] * 16, 62, 3, 4, 20]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 60).long()}
    inputs |= {"pixel_values": torch.randn(64, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    options = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
    assert goes_on_behind_cache(model, inputs, options)
    fast, slow = (log_likelihoods(model, inputs, options, 3, once) for once in (True, False))
    assert fast == pytest.approx(slow, abs=1e-4)


class _Forgetful(LlavaForConditionalGeneration):
    """A model of others that loses its place behind a cache."""

    def forward(self, *args, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length():
            kwargs |= {"position_ids": torch.zeros_like(kwargs["input_ids"])}
        return super().forward(*args, past_key_values=past_key_values, **kwargs)


def test_a_model_that_does_not_go_on_behind_a_cache_is_read_whole() -> None:
    model, processor = load_model(checkpoint("llava"))
    question = Question("1", "USER: What is there? ASSISTANT:", options=OPTIONS)
    (right,) = Answerer(model, processor).answer([question])
    forgetful = _Forgetful(model.config).eval()
    forgetful.load_state_dict(model.state_dict())
    answerer = Answerer(forgetful, processor)
    with pytest.warns(UserWarning, match="does not go on behind a repeated cache"):
        (answer,) = answerer.answer([question])
    assert answer.more["option_scores"] == pytest.approx(right.more["option_scores"], abs=1e-4)
