# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Conversion of original checkpoints: exact, repeatable, and loud about every tensor that does not fit."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, ConvNextConfig, ConvNextModel

from modeling_deem import DeemConfig, DeemForConditionalGeneration, DeemProcessor
from processing import DeemImageProcessorPil
from recipes.convert_checkpoint import main
from recipes.original.conversion import convert
from recipes.original.names import drop_unused_points
from recipes.original.processor import number_tokenizer
from recipes.original.sizes import config_of_weights, deem_config
from recipes.original.weights import load_weights, shapes_of

GOLDEN = Path(__file__).resolve().parents[3] / "../shared/golden"


@pytest.fixture(scope="module")
def golden() -> Path:
    if not GOLDEN.exists():
        pytest.skip("the original's tensors (../shared/golden) are not here")
    return GOLDEN


@pytest.fixture(scope="module")
def source(golden: Path) -> dict:
    return json.loads((golden / "config.json").read_text())


@pytest.fixture
def weights(golden: Path) -> dict[str, torch.Tensor]:
    return load_weights([golden / "state_dict.safetensors"])


@pytest.fixture(scope="module")
def shapes(golden: Path, source: dict) -> dict[str, torch.Size]:
    config = config_of_weights(source, load_weights([golden / "state_dict.safetensors"]))
    return shapes_of(lambda: DeemForConditionalGeneration(config))


def run(golden: Path, out: Path, *extra: str) -> None:
    weights, config = golden / "state_dict.safetensors", golden / "config.json"
    main(["--source", "official", "--weights", str(weights), "--config", str(config), "--out", str(out), *extra])


@pytest.fixture(scope="module")
def converted(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    run(golden, folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_twice_gives_the_same_files_and_reload_is_bit_equal(golden: Path, converted: Path, tmp_path: Path) -> None:
    run(golden, tmp_path)
    assert files(tmp_path) == files(converted)
    written = load_file(converted / "model.safetensors")
    model = AutoModel.from_pretrained(converted)
    assert isinstance(model, DeemForConditionalGeneration)
    state = model.state_dict()
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in written.items())
    # A copy, not a computation: a tensor, and the sum of both heads.
    original = load_file(golden / "state_dict.safetensors")
    name = "mm_decoder.layers.1.self_attn.q_proj.weight"
    assert torch.equal(state["model.language_model.layers.1.self_attn.q_proj.weight"], original[name])
    head = original["text_decoder.head.weight"].clone()
    head[-6:] += original["text_decoder.head_new.weight"]
    assert torch.equal(state["lm_head.weight"], head)


def test_every_source_tensor_is_accounted_for(golden: Path, converted: Path) -> None:
    account = json.loads((converted / "conversion.json").read_text())
    assert account["sources"].keys() == load_file(golden / "state_dict.safetensors").keys()
    outcomes = [outcome for outcome, _ in account["sources"].values()]
    counts = {outcome: outcomes.count(outcome) for outcome in outcomes}
    assert counts == {"converted": 1405, "merged": 2, "recomputed": 16, "duplicate": 1, "unused": 3}
    assert account["fresh"] == {}


def test_the_processor_has_the_models_ids(converted: Path) -> None:
    processor = AutoProcessor.from_pretrained(converted)
    assert isinstance(processor, DeemProcessor)
    config = DeemConfig.from_pretrained(converted)
    assert (processor.image_token_id, processor.start_of_image_token_id) == (101, 100)
    assert processor.tokenizer("10 11").input_ids == [config.bos_token_id, 10, 11]
    assert len(processor.tokenizer) == config.text_config.vocab_size
    assert processor.num_image_tokens == config.num_image_tokens


def test_a_real_vocabulary_needs_its_tokenizer(golden: Path, source: dict, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**source, "txt_vocab_size": 32006}))
    weights = ["--weights", str(golden / "state_dict.safetensors")]
    with pytest.raises(ValueError, match="--tokenizer"):
        main(["--source", "official", *weights, "--config", str(config), "--out", str(tmp_path / "out")])


def test_without_tokenizer_model_and_image_processor(golden: Path, tmp_path: Path) -> None:
    run(golden, tmp_path, "--tokenizer", "none")
    processor = DeemImageProcessorPil.from_pretrained(tmp_path)
    assert (processor.size["height"], processor.target_size["height"]) == (256, 512)


def test_a_tokenizer_with_other_ids_is_refused(golden: Path, source: dict, tmp_path: Path) -> None:
    shorter = {**source, "special_token_dict": {**source["special_token_dict"], "soi_token_id": 90, "pad_token_id": 9}}
    tokenizer = number_tokenizer(deem_config(shorter))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="trained with"):
        run(golden, tmp_path / "out", "--tokenizer", str(tmp_path / "tokenizer"))


# ---- surprises stop with the tensor's name ----


@pytest.mark.parametrize(
    "name",
    [
        "soi_token",
        "mm_decoder.layers.2.llama_cross_attn.gate",
        "text_decoder.head_new.bias",
        "visual_tokenizer.encoder.vae.quant_conv.weight",
        "visual_tokenizer.pos_embed",
    ],
)
def test_a_missing_tensor_is_named(name: str, golden: Path, source: dict, tmp_path: Path) -> None:
    weights = load_file(golden / "state_dict.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "w.safetensors")
    config = ["--config", str(golden / "config.json")]
    with pytest.raises(ValueError, match=re.escape(name)):
        main(["--source", "official", "--weights", str(tmp_path / "w.safetensors"), *config, "--out", str(tmp_path)])


def test_a_missing_tensor_is_named_where_the_config_lists_none(weights: dict, shapes: dict) -> None:
    del weights["soi_token"]
    with pytest.raises(ValueError, match="model.start_of_image"):
        convert(weights, shapes)


@pytest.mark.parametrize(
    "name", ["surprise.weight", "mm_decoder.layers.7.mlp.up_proj.weight", "visual_tokenizer.proj_x.bias"]
)
def test_an_extra_tensor_is_named(name: str, weights: dict, shapes: dict) -> None:
    with pytest.raises(ValueError, match=re.escape(name)):
        convert({**weights, name: torch.zeros(3)}, shapes)


@pytest.mark.parametrize(
    "name",
    [
        "context_feat_proj.weight",
        "mm_decoder.layers.0.llama_cross_attn.attn.attention_weights.weight",
        "text_decoder.head_new.weight",
        "visual_tokenizer.clip_mean",
    ],
)
def test_a_misshaped_tensor_is_named(name: str, weights: dict, shapes: dict) -> None:
    weights[name] = torch.cat([weights[name], weights[name][:1]])
    with pytest.raises(ValueError, match=re.escape(name)):
        convert(weights, shapes, new_tokens=6)


def test_values_that_the_model_computes_must_agree(weights: dict, shapes: dict) -> None:
    name = "visual_tokenizer.encoder.mmfs_module.mmfs_mid_block.pos_embed"
    weights[name] = weights[name] + 1e-3
    with pytest.raises(ValueError, match=re.escape(name)):
        convert(weights, shapes)


def test_two_names_of_one_tensor_must_agree_and_one_suffices(weights: dict, shapes: dict) -> None:
    name = "visual_tokenizer.neg_prompt_embeds"
    with pytest.raises(ValueError, match=re.escape(name)):
        convert({**weights, name: weights[name] + 1}, shapes)
    one = convert({key: tensor for key, tensor in weights.items() if key != name}, shapes)
    assert torch.equal(one.state["image_decoder.null_condition"], weights[name])


def test_drop_unused_points() -> None:
    rows = torch.arange(2 * 3).view(6, 1)  # two groups of K + 1 = 3
    assert drop_unused_points(rows, torch.Size([4, 1])).flatten().tolist() == [0, 1, 3, 4]


# ---- files ----


def test_pickles_only_on_request_and_only_tensors(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "w.bin")
    with pytest.raises(ValueError, match="--allow-pickle"):
        load_weights([tmp_path / "w.bin"])
    assert torch.equal(load_weights([tmp_path / "w.bin"], allow_pickle=True)["a"], torch.ones(2))
    torch.save({"a": torch.ones(2), "path": Path("x")}, tmp_path / "v.bin")
    with pytest.raises(Exception, match="weights_only|WeightsUnpickler"):
        load_weights([tmp_path / "v.bin"], allow_pickle=True)


def test_a_name_with_two_values_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "2.safetensors")
    with pytest.raises(ValueError, match="'a'"):
        load_weights([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


# ---- the other sources ----

TO_TIMM = [
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^layernorm\.", "head.norm."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm\.", r"stages.\1.blocks.\2.norm."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.pwconv(\d)\.", r"stages.\1.blocks.\2.mlp.fc\3."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_scale_parameter$", r"stages.\1.blocks.\2.gamma"),
]


def open_clip_weights() -> tuple[ConvNextModel, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = ConvNextModel(ConvNextConfig(depths=[1, 2, 1, 1], hidden_sizes=[4, 8, 12, 16]))
    weights = {
        "logit_scale": torch.ones(()),
        "visual.head.proj.weight": torch.ones(2, 16),
        "text.ln.bias": torch.ones(2),
    }
    for name, tensor in model.state_dict().items():
        for pattern, replacement in TO_TIMM:
            name = re.sub(pattern, replacement, name)
        weights[f"visual.trunk.{name}"] = tensor.clone()
    return model, weights


def test_open_clip_trunk_becomes_an_encoder(tmp_path: Path) -> None:
    model, weights = open_clip_weights()
    save_file(weights, tmp_path / "clip.safetensors")
    main(["--source", "open_clip", "--weights", str(tmp_path / "clip.safetensors"), "--out", str(tmp_path / "out")])
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert loaded.config.depths == [1, 2, 1, 1] and loaded.config.hidden_sizes == [4, 8, 12, 16]
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert (tmp_path / "out/preprocessor_config.json").exists()
    weights["visual.trunk.extra.weight"] = torch.ones(1)
    save_file(weights, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="visual.trunk.extra.weight"):
        main(
            ["--source", "open_clip", "--weights", str(tmp_path / "clip.safetensors"), "--out", str(tmp_path / "out")]
        )


def test_mm_interleaved_takes_over_all_but_the_vision_tower(weights: dict, shapes: dict) -> None:
    """By the structure assumed for the parent: no such checkpoint was at hand."""
    parent = {}
    for name, tensor in weights.items():
        if name.startswith(
            ("visual_tokenizer.sniffer.", "visual_tokenizer.proj_i", "visual_tokenizer.pos_", "visual_tokenizer.post_")
        ):
            continue
        name = re.sub(r"^visual_tokenizer\.encoder\.(unet|vae|mmfs_module)\.", r"image_decoder.decoder.\1.", name)
        parent[name.replace("visual_tokenizer.proj_t.", "visual_tokenizer.proj.")] = tensor
    parent["visual_tokenizer.encoder.vision_model.embeddings.class_embedding"] = torch.zeros(4)
    result = convert(parent, shapes, "mm_interleaved")
    ours = convert(weights, shapes)
    assert {name.split(".")[1] for name in result.fresh} == {"vision_tower", "token_projector"}
    assert all(torch.equal(tensor, ours.state[name]) for name, tensor in result.state.items())
    assert result.sources["visual_tokenizer.encoder.vision_model.embeddings.class_embedding"][0] == "unused"
    with pytest.raises(ValueError, match="image_decoder.decoder.unet.new.weight"):
        convert({**parent, "image_decoder.decoder.unet.new.weight": torch.zeros(1)}, shapes, "mm_interleaved")
