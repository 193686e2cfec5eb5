# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""LoRA by peft alone, with the lists of the package."""

import re
from pathlib import Path

import pytest
import torch
from deem_fixtures import tiny_batch, tiny_model
from peft import PeftModel

from modeling_deem import adapter_targets, modules_to_save
from modeling_deem.adapters_deem import DENOISER, ENCODER, LANGUAGE_MODEL

pytestmark = pytest.mark.usefixtures("one_thread")


def adapt(model: torch.nn.Module) -> PeftModel:
    """The example of docs/adapters.md."""
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    found = {"model": model}
    exec(re.search(r"### In your own script\n.*?```python\n(.*?)```", text, re.DOTALL)[1], found)
    return found["adapted"]


def test_the_example_of_the_docs_learns_saves_and_loads(tmp_path) -> None:
    batch = tiny_batch("btitti", "btit")
    model = adapt(tiny_model())
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


def test_lists_of_a_model_that_trains_whole() -> None:
    model = tiny_model()
    saved = modules_to_save(model)
    assert all(not name.startswith((LANGUAGE_MODEL, DENOISER, "image_decoder.vae")) for name in saved)
    assert {"model.vision_tower", "model.perceiver", "model.projector", "lm_head"} <= set(saved)
    assert not any(name.startswith(ENCODER) for name in modules_to_save(model, [LANGUAGE_MODEL, DENOISER, ENCODER]))
    assert all(parameter.requires_grad for parameter in model.model.language_model.parameters())  # left as it was
    pattern = re.compile(adapter_targets(model))
    linear = {
        name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and pattern.fullmatch(name)
    }
    assert linear and all(name.startswith(LANGUAGE_MODEL) for name in linear)
