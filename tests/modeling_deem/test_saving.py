# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Saving and loading of the whole model."""

from pathlib import Path

import torch
from deem_fixtures import (
    tensors_of,
    tiny_batch,
    tiny_model,
)
from family_fixtures import vision_config
from scripts import run_script

from modeling_deem import DeemForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]


LOADING = """
import sys, torch
import modeling_deem
from transformers import AutoModel, AutoModelForImageTextToText

expected, expected_frozen = torch.load(sys.argv[2])
for auto in (AutoModel, AutoModelForImageTextToText):
    model = auto.from_pretrained(sys.argv[1])
    assert type(model) is modeling_deem.DeemForConditionalGeneration, type(model)
    assert not model.training
    got = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert set(got) == set(expected), set(got) ^ set(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == got[name].dtype and torch.equal(tensor, got[name]), name
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == set(expected_frozen), (len(frozen), len(expected_frozen))
print("all equal")
"""


def test_every_tensor_and_buffer_survives_in_a_fresh_process(tmp_path) -> None:
    model = tiny_model(use_region_tokens=True)
    model.save_pretrained(tmp_path / "model")
    expected = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
    for buffer in ("positions", "inv_freq"):  # not in the file: rebuilt
        assert any(name.endswith(f".{buffer}") for name in expected)
        assert not any(name.endswith(f".{buffer}") for name in model.state_dict())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    torch.save((expected, frozen), tmp_path / "expected.pt")
    files = (tmp_path / "model", tmp_path / "expected.pt")
    result = run_script("-c", LOADING, *files, logs=tmp_path / "logs", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert result.returncode == 0 and "all equal" in result.stdout, result.stderr[-3000:]


def test_a_second_save_equals_the_first(tmp_path) -> None:
    model = tiny_model(tie_word_embeddings=True, text_config={"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "first")
    loaded = DeemForConditionalGeneration.from_pretrained(tmp_path / "first")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    loaded.save_pretrained(tmp_path / "second")
    for name in ("generation_config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name

    def config(folder: str) -> list[str]:
        lines = (tmp_path / folder / "config.json").read_text().splitlines()
        return [line for line in lines if '"dtype"' not in line]  # transformers notes it on loading

    assert config("first") == config("second")


def test_one_name_of_attention_is_set_where_it_applies(tmp_path) -> None:
    """ConvNeXt has none, and keeps that; CLIP and Llama have it."""
    for encoder in ("convnext", "clip_vision_model"):
        model = tiny_model(vision_config=vision_config(encoder))
        model.save_pretrained(tmp_path / encoder)
        sets = DeemForConditionalGeneration.from_pretrained(tmp_path / encoder, attn_implementation="eager")
        given = DeemForConditionalGeneration.from_pretrained(tmp_path / encoder, attn_implementation="sdpa")
        sets.set_attn_implementation("sdpa")
        for one in (sets, given):
            assert one.model.language_model.config._attn_implementation == "sdpa"
            own = one.model.vision_tower.encoder.config._attn_implementation
            assert own == ("sdpa" if encoder == "clip_vision_model" else "eager")
        batch = tiny_batch("btitt", targets=False)
        with torch.no_grad():
            torch.testing.assert_close(sets(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)
