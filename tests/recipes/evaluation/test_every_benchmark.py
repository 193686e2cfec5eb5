# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every benchmark of the table runs from files of the world in its real layout to its figures, for two kinds of model."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from deem_fixtures import tiny_model
from evaluation_fixtures import checkpoint, lines_of, run, two_towers
from family_fixtures import save_diffusion

from processing import DeemProcessor
from recipes import evaluate
from recipes.evaluation.benchmarks import BENCHMARKS
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers import BENCHMARK_FORMATS
from recipes.synthetic.writers.benchmarks import write_captioned, write_easy_vqa
from recipes.synthetic.writers.captions import write_paragraphs
from recipes.synthetic.writers.evaluation import write_pope, write_robustvqa
from recipes.synthetic.writers.questions import write_gqa, write_okvqa, write_textvqa, write_vqa

WRITERS: dict[str, Callable[..., None]] = {
    "robustvqa": write_robustvqa,
    "pope": write_pope,
    "mmvp": BENCHMARK_FORMATS["mmvp"],
    "mmvp_vlm": BENCHMARK_FORMATS["mmvp_vlm"],
    "vqav2": partial(write_vqa, split="val2014"),
    "okvqa": write_okvqa,
    "textvqa": write_textvqa,
    "vizwiz": BENCHMARK_FORMATS["vizwiz"],
    "gqa": write_gqa,
    "coco": write_captioned,
    "nocaps": BENCHMARK_FORMATS["nocaps"],
    "flickr30k": BENCHMARK_FORMATS["flickr30k_test"],
    "textcaps": BENCHMARK_FORMATS["textcaps_val"],
    "image2paragraph": write_paragraphs,
    "refcoco_grounding": BENCHMARK_FORMATS["refcoco_grounding"],
    "visdial": BENCHMARK_FORMATS["visdial"],
    "visdial_rounds": BENCHMARK_FORMATS["visdial"],
    "refcocog_region": BENCHMARK_FORMATS["refcocog_region"],
    "fid": write_captioned,
    "fid_karpathy": write_captioned,
    "fid_ln_coco": BENCHMARK_FORMATS["ln_coco"],
    "easy_vqa": write_easy_vqa,
}
IMAGES = 11  # at least one in every split of the layouts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A model of each kind that a benchmark asks: a DEEM or CLIP as the first, LLaVA, SigLIP or diffusers as the second."""
    drawing, pipeline = tmp_path_factory.mktemp("drawing"), tmp_path_factory.mktemp("pipeline")
    tiny_model(text_config={"max_position_embeddings": 1024}).save_pretrained(drawing)
    DeemProcessor.from_pretrained(checkpoint("deem")).save_pretrained(drawing)
    save_diffusion(pipeline)
    file = pipeline / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 16}))
    return {
        ("language", "first"): checkpoint("deem"),
        ("language", "second"): checkpoint("llava"),
        ("towers", "first"): two_towers("clip"),
        ("towers", "second"): two_towers("siglip"),
        ("drawing", "first"): drawing,
        ("drawing", "second"): pipeline,
    }


def test_every_benchmark_has_a_writer() -> None:
    assert set(WRITERS) == set(BENCHMARKS)


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_benchmark_runs(
    name: str, which: str, models: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # without Java: METEOR takes seconds to start
    WRITERS[name](tmp_path / "data", World(size=32), IMAGES, HELD_OUT)
    benchmark, out = BENCHMARKS[name], tmp_path / "out"
    options = {"limit": 3, "num_inference_steps": 6} | ({} if benchmark.asks != "language" else {"num_beams": 1})
    model = models[benchmark.asks, which]
    if benchmark.takes_regions and which == "second":
        with pytest.raises(ValueError, match="marks regions by masks"):
            run(model, out, tmp_path / "data", name, **options)
        return
    results = run(model, out, tmp_path / "data", name, **options)
    result, lines = results[name], lines_of(out / name)
    assert result["failed"] == [] and not evaluate.has_failed(results)
    assert 0 < result["samples"] == len(lines) == len({line["id"] for line in lines})
    assert {line["cluster"] for line in lines} and result["headline"] in result["figures"]
    again = evaluate.main(evaluate.EvaluateArguments(model="nowhere", score=str(out)))
    assert again[name]["figures"] == result["figures"]
    for figure in result["figures"].values():
        assert figure["count"] > 0
        assert figure["low"] is None or figure["low"] - 1e-9 <= figure["value"] <= figure["high"] + 1e-9
    assert name in (out / "evaluation.html").read_text()
