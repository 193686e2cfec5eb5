# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Configs: what the defaults are, what survives a round trip, what is refused."""

import json

import pytest
from deem_fixtures import tiny_config, tiny_decoder_config
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, ConvNextConfig, LlamaConfig, MistralConfig, Qwen2Config

from modeling_deem import DeemConfig, DeemForConditionalGeneration, DeemImageDecoderConfig, DeemPerceiverConfig


def fields(config) -> dict:
    """All fields but the folder that a config was loaded from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def test_defaults_are_the_released_model() -> None:
    config = DeemConfig(image_decoder_config={})
    assert config.model_type == "deem"
    assert (config.num_image_tokens, config.perceiver_config.hidden_size) == (77, 768)
    assert (config.perceiver_config.num_hidden_layers, config.perceiver_config.cross_attention_frequency) == (12, 2)
    assert config.perceiver_config.encoder_hidden_size == config.feature_size == 1024
    assert list(config.image_attention_sides) == [32, 16, 8] and config.image_attention_base_side == 16
    assert config.image_attention_interval == 4 and config.image_attention_max_images == 50
    assert (config.text_loss_weight, config.image_loss_weight, config.consistency_loss_weight) == (1, 5, 5)
    decoder = config.image_decoder_config
    assert decoder.condition_size == 1024 and decoder.latent_side == 64 and decoder.target_size == 512
    assert decoder.perceiver_config.num_hidden_layers == 1 and decoder.perceiver_config.num_attention_heads == 16
    assert not decoder.perceiver_config.qk_norm
    assert tuple(decoder.consistency_timestep_range) == (200, 799)
    assert decoder.condition_dropout == 0.1 and decoder.num_previous_images == 1
    assert (decoder.num_inference_steps, decoder.guidance_scale) == (250, 3.5)
    assert decoder.scheduler["prediction_type"] == "epsilon" and decoder.scheduler["beta_end"] == 0.012


def test_sizes_are_filled_in_from_the_other_parts() -> None:
    decoder = tiny_config().image_decoder_config
    assert (decoder.token_size, decoder.context_size, decoder.feature_size) == (24, 32, 32)
    assert decoder.perceiver_config.encoder_hidden_size == 32
    assert decoder.target_size == 64


def test_round_trip_through_file_and_dict(tmp_path) -> None:
    config = tiny_config(
        text_loss_weight=0.5,
        use_region_tokens=True,
        image_decoder_config={"consistency_condition": "tokens", "num_previous_images": 2},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DeemConfig
    assert fields(loaded) == fields(config)
    assert DeemConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert loaded.image_decoder_config.consistency_condition == "tokens"
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )


def test_image_decoder_config_stands_alone(tmp_path) -> None:
    config = tiny_config().image_decoder_config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DeemImageDecoderConfig and fields(loaded) == fields(config)


def test_the_callers_dicts_are_not_changed() -> None:
    given = tiny_decoder_config()
    before = json.dumps(given)
    DeemConfig(image_decoder_config=given)
    assert json.dumps(given) == before


def test_sub_configs_as_dicts_and_as_objects_of_any_kind() -> None:
    text = Qwen2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = tiny_config(
        vision_config=ConvNextConfig(hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1]),
        text_config=text,
        perceiver_config=DeemPerceiverConfig(num_queries=4, hidden_size=24, num_attention_heads=4),
        image_decoder_config=DeemImageDecoderConfig(**tiny_decoder_config()),
    )
    assert config.text_config.model_type == "qwen2" and config.get_text_config() is config.text_config
    assert config.vision_config.hidden_sizes == [4, 8, 8, 8]
    assert isinstance(tiny_config(text_config={"model_type": "mistral"}).text_config, MistralConfig)
    assert isinstance(DeemConfig().text_config, LlamaConfig)
    assert isinstance(DeemConfig().vision_config, ConvNextConfig)
    assert DeemConfig().image_decoder_config is None


def test_tied_embeddings_follow_the_language_model() -> None:
    assert tiny_config(text_config={"tie_word_embeddings": True}).tie_word_embeddings
    assert not tiny_config().tie_word_embeddings


@pytest.mark.parametrize(
    ("key", "near"),
    [("image_loss_wieght", "image_loss_weight"), ("num_image_token", None), ("feature_sise", "feature_size")],
)
def test_unknown_keys_are_refused_with_the_nearest_name(key: str, near: str | None) -> None:
    with pytest.raises(ValueError, match=f"DeemConfig has no key '{key}'.*3.*{near or ''}"):
        tiny_config(**{key: 3})


@pytest.mark.parametrize(
    ("part", "key", "near"),
    [
        ("image_decoder_config", "fusion_point", "fusion_points"),
        ("perceiver_config", "num_querys", "num_queries"),
    ],
)
def test_unknown_keys_of_parts_are_refused(part: str, key: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"no key '{key}'.*'{near}'"):
        tiny_config(**{part: {key: 3}})


def test_unknown_key_given_to_from_pretrained_is_refused(tmp_path) -> None:
    tiny_config().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "consistency_los_weight": 1.0}))
    with pytest.raises(ValueError, match="'consistency_los_weight'.*'consistency_loss_weight'"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perceiver_config": {"hidden_size": 25}}, "hidden_size.*25.*multiple.*4"),
        ({"image_attention_sides": [8, 4]}, r"\[8, 4\].*\[1, 2, 3\].*one entry per level"),
        ({"image_decoder_config": {"token_size": 99}}, "token_size is 99.*24"),
        ({"image_decoder_config": {"context_size": 99}}, "context_size is 99.*32"),
        ({"image_decoder_config": {"feature_size": 99}}, "feature_size is 99.*32"),
        ({"image_decoder_config": {"perceiver_config": {"hidden_size": 48}}}, "width 48.*cross_attention_dim is 32"),
        ({"image_decoder_config": {"consistency_timestep_range": [200, 1000]}}, r"\[200, 1000\].*1000"),
        ({"image_decoder_config": {"consistency_timestep_range": [-1, 10]}}, r"\[-1, 10\]"),
        ({"image_decoder_config": {"consistency_timestep_range": [20, 10]}}, r"\[20, 10\]"),
        ({"image_attention_levels": [1, 2, 4]}, "image_attention_levels.*4"),
        ({"feature_size": 30}, "feature_size.*30.*multiple of 4"),
    ],
)
def test_wrong_sizes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"image_loss_weight": "much"}, "image_loss_weight"),
        ({"region_mask_resize": "nearest"}, "region_mask_resize"),
        ({"image_decoder_config": {"consistency_condition": "features"}}, "consistency_condition"),
        ({"image_decoder_config": {"image_loss_reduction": "sum"}}, "image_loss_reduction"),
        ({"perceiver_config": {"num_queries": 4.5}}, "num_queries"),
    ],
)
def test_wrong_types_and_choices_are_refused(changes: dict, name: str) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=name):  # of huggingface_hub, as for any config
        tiny_config(**changes)


def test_synchronizer_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="32.*multiple.*5"):
        DeemForConditionalGeneration(tiny_config(image_attention_heads=5))
