# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Parts in precisions of their own: an image decoder beside a language model of another dtype, and quantization."""

import pytest
import torch
from deem_fixtures import tiny_batch, tiny_draws, tiny_model
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from modeling_deem import DeemForConditionalGeneration
from modeling_deem.base_deem import UNQUANTIZED, quantize_language_model_only
from modeling_deem.modeling_deem import DeemModel

BATCH = tiny_batch("btittti", "btitt")
DRAWS = {"consistency_draws": tiny_draws(3), "image_draws": tiny_draws(3, seed=1, image=True)}


def losses(model: DeemForConditionalGeneration) -> torch.Tensor:
    outputs = model(**BATCH, **DRAWS)
    return torch.stack([outputs.text_loss, outputs.image_loss, outputs.consistency_loss]).float()


@pytest.mark.parametrize(
    ("rest", "decoder"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_the_image_decoder_may_be_of_another_precision(rest: torch.dtype, decoder: torch.dtype) -> None:
    model = tiny_model()
    with torch.no_grad():
        expected = losses(model)
    model.to(rest)
    model.image_decoder.to(decoder)
    model.image_decoder.vae.float()
    got = losses(model)
    torch.testing.assert_close(got.detach(), expected, rtol=0.05, atol=0.0)
    got.sum().backward()
    for part in (model.model.vision_tower.encoder, model.image_decoder.denoiser, model.model.language_model):
        gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)

    prompt = {name: BATCH[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    for pictures in (
        model.generate_images(**prompt, num_inference_steps=2),
        model.reconstruct(BATCH["pixel_values"], num_inference_steps=2),
    ):
        assert pictures.isfinite().all() and pictures.dtype == torch.float32


def test_loading_in_half_precision_keeps_the_vae(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = DeemForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == model.image_decoder.denoiser.dtype == torch.bfloat16
    assert model.image_decoder.vae.dtype == torch.float32
    with torch.no_grad():
        assert losses(model).isfinite().all()


@pytest.mark.parametrize("headless", [False, True], ids=["whole", "without head"])
def test_only_linear_layers_of_the_language_model_are_quantized(headless: bool) -> None:
    model = tiny_model()
    model = DeemModel(model.config) if headless else model
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    converted = [name for name in linear if should_convert_module(name, UNQUANTIZED)]
    assert converted == [name for name in linear if "language_model" in name] and len(converted) == 4 * 7


def test_the_list_goes_into_every_kind_of_config_and_gives_way_to_the_callers() -> None:
    given = BitsAndBytesConfig(load_in_8bit=True)
    assert quantize_language_model_only(given).llm_int8_skip_modules == UNQUANTIZED
    assert given.llm_int8_skip_modules is None
    as_dict = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert quantize_language_model_only(as_dict).llm_int8_skip_modules == UNQUANTIZED
    own = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "image_decoder.vae"])
    assert quantize_language_model_only(own).llm_int8_skip_modules == ["lm_head", "image_decoder.vae"]


def test_eight_bits_of_torchao(tmp_path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is no dependency: pip install torchao")
    tiny_model().save_pretrained(tmp_path / "plain")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = DeemForConditionalGeneration.from_pretrained(tmp_path / "plain", quantization_config=config)
    small = {name for name, parameter in model.named_parameters() if "Int8" in type(parameter.data).__name__}
    assert small and all(name.startswith("model.language_model.layers.") for name in small) and len(small) == 4 * 7
    with torch.no_grad():
        plain = losses(DeemForConditionalGeneration.from_pretrained(tmp_path / "plain"))
        torch.testing.assert_close(losses(model), plain, rtol=0.02, atol=0.0)
    model.consistency_loss(BATCH["pixel_values"], BATCH["target_pixel_values"]).backward()
    assert next(model.model.vision_tower.encoder.parameters()).grad.abs().max() > 0
    model.save_pretrained(tmp_path / "small")
    again = DeemForConditionalGeneration.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(losses(again), losses(model), rtol=1e-5, atol=1e-6)
