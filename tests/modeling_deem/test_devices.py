# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""GPU-readiness without a GPU: while everything not told otherwise is made on the meta device, a model on the CPU computes
what it always does, so that no tensor is made without its device.

Left out are diffusers' DDPM steps and transformers' beams, which make tensors of their own without a device.
"""

import pytest
import torch
from deem_fixtures import SIDE, tiny_batch, tiny_model

from modeling_deem import attention_deem


@pytest.mark.parametrize("sparse", [False, True], ids=["plain", "sparse"])
def test_every_tensor_is_made_where_the_model_is(sparse: bool, monkeypatch) -> None:
    monkeypatch.setattr(attention_deem, "can_sample_sparsely", lambda *given: sparse)
    model = tiny_model().train()
    batch = tiny_batch("btitit", "bti")
    masks = torch.ones(3, 1, SIDE, SIDE)
    masks[..., :24] = 0
    prompt = tiny_batch("btit", targets=False, padding_side="left")
    scheduler = model.image_decoder.make_scheduler("DDIMScheduler")
    with torch.device("meta"):
        outputs = model(**batch, region_masks=masks)
        outputs.loss.backward()
        losses = [outputs.text_loss, outputs.image_loss, outputs.consistency_loss]
        model.eval()
        written = model.generate(**prompt, max_new_tokens=3)
        drawn = model.generate_images(**prompt, num_inference_steps=2, scheduler=scheduler)
        seen = model.reconstruct(prompt["pixel_values"], masks[:1], num_inference_steps=2, scheduler=scheduler)
    made = [*losses, written, drawn, seen, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert all(tensor.isfinite().all() for tensor in (*losses, drawn, seen))
