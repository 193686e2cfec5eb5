# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Three pretrained parts -> one model that at first does what each part did alone."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from deem_fixtures import SIDE, VISION, tensors_of, tiny_batch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from family_fixtures import OLD_VOCABULARY, save_diffusion, save_text
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    ConvNextImageProcessorPil,
    GenerationConfig,
    Siglip2ImageProcessorPil,
)

from modeling_deem import DeemConfig, DeemForConditionalGeneration, DeemImageDecoderConfig
from modeling_deem.composing_deem import encoder_image_size, joint_sizes
from processing import DeemProcessor

FIELDS = {
    "num_image_tokens": 4,
    "feature_size": 32,
    "image_attention_heads": 4,
    "image_attention_interval": 2,
    "perceiver_config": {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1},
    "image_decoder_config": {"fusion_size": 32, "fusion_heads": 4},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """Folders of three random parts, each saved as its own library does."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("parts")
    vision = AutoModel.from_config(AutoConfig.for_model(**VISION))
    vision.save_pretrained(root / "vision")
    ConvNextImageProcessorPil(size={"shortest_edge": SIDE}).save_pretrained(root / "vision")
    save_text(root / "text")
    save_diffusion(root / "diffusion")
    return {"vision": str(root / "vision"), "text": str(root / "text"), "diffusion": str(root / "diffusion")}


def compose(parts: dict[str, str], **changes) -> DeemForConditionalGeneration:
    torch.manual_seed(1)
    return DeemForConditionalGeneration.from_vision_text_diffusion_pretrained(
        **parts, **{**copy.deepcopy(FIELDS), **changes}
    )


@pytest.fixture(scope="module")
def model(parts) -> DeemForConditionalGeneration:
    return compose(parts)


def assert_inside(part: torch.nn.Module, place: torch.nn.Module, rows: int | None = None) -> None:
    """Every tensor and buffer of `part` is in `place`, bit by bit; of grown tensors the first `rows`."""
    ours, theirs = tensors_of(place), tensors_of(part)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        mine = ours[name][:rows] if rows and ours[name].shape != tensor.shape else ours[name]
        assert torch.equal(mine, tensor), name


def test_parts_are_inside_bit_by_bit(parts, model) -> None:
    assert not model.training
    diffusion = parts["diffusion"]
    assert_inside(AutoModel.from_pretrained(parts["vision"]), model.model.vision_tower.encoder)
    language_model = AutoModelForCausalLM.from_pretrained(parts["text"])
    assert_inside(language_model.model, model.model.language_model, OLD_VOCABULARY)
    assert torch.equal(model.lm_head.weight[:OLD_VOCABULARY], language_model.lm_head.weight)
    assert_inside(UNet2DConditionModel.from_pretrained(diffusion, subfolder="unet"), model.image_decoder.denoiser)
    assert_inside(AutoencoderKL.from_pretrained(diffusion, subfolder="vae"), model.image_decoder.vae)
    betas = DDPMScheduler.from_pretrained(diffusion, subfolder="scheduler").alphas_cumprod
    assert torch.equal(model.image_decoder.scheduler.alphas_cumprod, betas)
    assert isinstance(model.image_decoder.scheduler, DDPMScheduler)
    assert model.image_decoder.vae.config.scaling_factor == 0.7


def test_joints_start_as_specified(model) -> None:
    for block in model.model.image_attention.values():
        assert not block.gate.any()
        assert not block.synchronizer.sampling_offsets.weight.any() and not block.synchronizer.null_value.any()
        bias = block.synchronizer.sampling_offsets.bias
        assert 2 < bias.abs().max() <= 3
    for block in (*model.image_decoder.feature_fusion.skip_blocks, model.image_decoder.feature_fusion.mid_block):
        assert not block.conv.weight.any() and not block.conv.bias.any()
        assert 0.5 < block.synchronizer.sampling_offsets.bias.abs().max() <= 1
    assert not model.model.start_of_image.any()
    for projector in (model.model.projector, model.image_decoder.token_projector):
        assert 0.0005 < projector.weight.std() < 0.002 and not projector.bias.any()
    tower = model.model.vision_tower
    assert torch.equal(tower.positions, tower.compute_positions()) and tower.positions.abs().max() == 1


def test_new_tokens_start_rare(model) -> None:
    assert model.config.text_config.vocab_size == OLD_VOCABULARY + 6 == len(model.lm_head.weight)
    assert not model.lm_head.weight[OLD_VOCABULARY:].any()
    assert model.lm_head.bias[OLD_VOCABULARY:].tolist() == [-5.0] * 6
    assert not model.lm_head.bias[:OLD_VOCABULARY].any()
    rows = model.get_input_embeddings().weight[OLD_VOCABULARY:]
    assert 0.1 < rows.std() < 0.2  # initializer_range of the language model: 0.15


def test_token_ids_are_those_of_the_processor(parts, model) -> None:
    processor = DeemProcessor.from_parts(
        ConvNextImageProcessorPil.from_pretrained(parts["vision"]),
        build_tokenizer(),
        num_image_tokens=4,
        target_size=64,
        grounding_tokens=True,
    )
    config, tokenizer = model.config, processor.tokenizer
    assert len(tokenizer) == config.text_config.vocab_size
    assert config.image_token_id == processor.image_token_id
    assert config.start_of_image_token_id == processor.start_of_image_token_id
    assert config.bos_token_id == tokenizer.bos_token_id and config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.num_image_tokens == processor.num_image_tokens
    assert config.image_decoder_config.target_size == 64


def test_it_writes_what_the_language_model_writes(parts, model) -> None:
    plain = AutoModelForCausalLM.from_pretrained(parts["text"])
    batch = tiny_batch("btttt", "btt", padding_side="left", targets=False)
    for options in ({}, {"num_beams": 3}):
        ours, theirs = (m.generate(**batch, **options, max_new_tokens=8, eos_token_id=2) for m in (model, plain))
        assert torch.equal(ours, theirs)
    assert len(set(ours[0, -8:].tolist())) > 1
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch).logits[..., :OLD_VOCABULARY], plain(**batch).logits, rtol=0, atol=1e-5
        )


def test_it_denoises_what_the_unet_denoises(parts, model) -> None:
    unet = UNet2DConditionModel.from_pretrained(parts["diffusion"], subfolder="unet")
    latents, timesteps, condition = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 4, 32)
    pixel_values = tiny_batch("btiti", targets=False)["pixel_values"]
    with torch.no_grad():
        images = model.get_image_features(pixel_values)
        states = model.image_decoder.consistency_states(images.image_tokens, images.image_features)
        ours = model.image_decoder.denoise(latents, timesteps, condition, states)
        assert torch.equal(ours, unet(latents, timesteps, condition).sample)


def test_null_condition_is_the_text_encoders_empty_prompt(parts, model) -> None:
    text_encoder = CLIPTextModel.from_pretrained(parts["diffusion"], subfolder="text_encoder")
    tokenizer = build_tokenizer()
    inputs = tokenizer("", padding="max_length", max_length=4, return_tensors="pt")
    with torch.no_grad():
        expected = text_encoder(input_ids=inputs.input_ids).last_hidden_state
    assert model.image_decoder.null_condition.shape == (1, 4, 32)
    torch.testing.assert_close(model.image_decoder.null_condition.detach(), expected, rtol=0, atol=1e-6)
    assert model.image_decoder.null_condition.requires_grad


def test_sides_follow_the_encoders_image_size(model) -> None:
    config = model.config
    assert list(config.image_decoder_config.feature_sides) == [16, 8, 4, 2]
    assert list(config.image_attention_sides) == [8, 4, 2]
    assert config.image_attention_base_side == config.position_grid_side == 4


def test_generation_config(model) -> None:
    generation = model.generation_config
    assert isinstance(generation, GenerationConfig)
    assert generation.eos_token_id == [2, model.config.start_of_image_token_id]
    assert (generation.bos_token_id, generation.pad_token_id) == (1, 0)


def test_what_is_frozen_stays_frozen(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    for one in (model, DeemForConditionalGeneration.from_pretrained(tmp_path)):
        assert not any(parameter.requires_grad for parameter in one.image_decoder.vae.parameters())
        for block in (*one.image_decoder.feature_fusion.skip_blocks, one.image_decoder.feature_fusion.mid_block):
            assert not block.synchronizer.null_value.requires_grad
    assert all(parameter.requires_grad for parameter in one.model.parameters())  # of a loaded model all else trains


@pytest.mark.parametrize("freeze", [None, ("model.vision_tower.encoder",), ()])
def test_a_composed_model_trains_what_the_paper_trains(parts, freeze) -> None:
    model = compose(parts, **({} if freeze is None else {"freeze": freeze}))
    expected = ("model.language_model", "image_decoder.denoiser") if freeze is None else freeze
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    always = {name for name in frozen if name.startswith("image_decoder.vae") or name.endswith("null_value")}
    assert frozen - always == {name for name, _ in model.named_parameters() if name.startswith(expected or "nothing")}


def test_sizes_of_the_joints_follow_the_encoder() -> None:
    published, sizes = DeemConfig(), joint_sizes(1024)
    for name, part in (("perceiver_config", published.perceiver_config), ("image_decoder_config", None)):
        fields = sizes.pop(name)
        part = part or DeemImageDecoderConfig()
        assert fields == {key: getattr(part, key) for key in fields}
    assert sizes == {key: getattr(published, key) for key in sizes}
    for width in (8, 24, 32, 96, 384, 768, 1152, 1280):
        sizes = joint_sizes(width)
        perceiver = sizes["perceiver_config"]
        assert width <= sizes["feature_size"] < width + 64 and sizes["feature_size"] % 4 == 0
        assert sizes["feature_size"] % sizes["image_attention_heads"] == 0
        assert perceiver["hidden_size"] % perceiver["num_attention_heads"] == 0


def test_a_composed_model_learns_from_all_three_losses(parts) -> None:
    model = compose(parts).train()
    outputs = model(**tiny_batch("btitti", "btit"))
    outputs.loss.backward()
    assert min(outputs.text_loss, outputs.image_loss, outputs.consistency_loss) > 0
    assert model.model.vision_tower.encoder.embeddings.patch_embeddings.weight.grad.abs().max() > 0


def save_vision(folder, family: str) -> None:
    """An encoder as its own library saves it, with an image processor of mean 0.1, 0.2, 0.3 for 64 pixels."""
    numbers = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    tiny |= {"patch_size": 16, "image_size": SIDE}
    crop = {"do_center_crop": True, "size": {"shortest_edge": 70}, "crop_size": {"height": SIDE, "width": SIDE}}
    if family == "clip":  # a pair: its text half is left out
        text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        model = CLIPModel(CLIPConfig(text_config={**text, "num_attention_heads": 4}, vision_config=tiny))
        processor = CLIPImageProcessorPil(**crop, **numbers)
    elif family == "dinov2":  # trained on larger pictures than its image processor makes
        model = AutoModel.from_config(AutoConfig.for_model("dinov2", **{**tiny, "image_size": 128}, mlp_ratio=2))
        processor = BitImageProcessorPil(**crop, **numbers)
    elif family == "siglip2":
        vision = AutoConfig.for_model("siglip2_vision_model", **tiny, num_patches=16)
        model, processor = AutoModel.from_config(vision), Siglip2ImageProcessorPil(max_num_patches=16, **numbers)
    else:  # its config knows no picture size
        sizes = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1], "embedding_size": 8, "layer_type": "basic"}
        model = AutoModel.from_config(AutoConfig.for_model("resnet", **sizes))
        processor = ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, **numbers)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.mark.parametrize("family", ["clip", "dinov2", "resnet", "siglip2"])
def test_encoders_bring_their_weights_and_the_numbers_of_their_image_processor(parts, tmp_path, family: str) -> None:
    save_vision(tmp_path, family)
    model = compose({**parts, "vision": str(tmp_path)})
    encoder = AutoModel.from_pretrained(tmp_path)
    assert_inside(getattr(encoder, "vision_model", encoder), model.model.vision_tower.encoder)
    assert list(model.config.image_decoder_config.feature_sides) == [16, 8, 4, 2]
    assert model.config.position_grid_side == 4

    own = AutoImageProcessor.from_pretrained(tmp_path)
    processor = DeemProcessor.from_parts(own, build_tokenizer(), num_image_tokens=4, target_size=SIDE)
    images = processor.image_processor
    assert dict(images.size) == {"height": SIDE, "width": SIDE}
    assert (list(images.image_mean), list(images.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    picture = np.full((50, 90, 3), 51, dtype=np.uint8)
    inputs = processor(text="<image>", images=picture, return_tensors="pt")
    expected = (0.2 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.4, 0.5, 0.6])
    torch.testing.assert_close(inputs.pixel_values, expected[None, :, None, None].expand(1, 3, SIDE, SIDE))
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_sizes_of_image_processors_that_cannot_be_built_here(tmp_path) -> None:
    # DINOv3's exists for torchvision only; its numbers are read all the same.
    settings = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 224, "width": 224}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "do_center_crop": None}))
    assert encoder_image_size(str(tmp_path)) == 224
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_resize": False}))
    with pytest.raises(ValueError, match="names no size.*image_size"):
        encoder_image_size(str(tmp_path))


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox"])
def test_families_with_other_names_or_scaled_embeddings(parts, tmp_path, family: str) -> None:
    save_text(tmp_path, model_type=family)
    model, plain = compose({**parts, "text": str(tmp_path)}), AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = tiny_batch("btttttt", targets=False)
    with torch.no_grad():
        ours, theirs = model(**batch).logits[..., :OLD_VOCABULARY], plain(**batch).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied head"])
def test_vocabularies_with_spare_rows_and_tied_heads(parts, tmp_path, tied: bool) -> None:
    save_text(tmp_path, vocabulary=300, tie_word_embeddings=tied)
    model = compose({**parts, "text": str(tmp_path)}, text_loss_weight=0.5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.text_config.vocab_size == 300 and model.config.text_loss_weight == 0.5
    rows = [*range(OLD_VOCABULARY), *range(OLD_VOCABULARY + 6, 300)]
    for ours, theirs in ((model.get_input_embeddings(), plain.get_input_embeddings()), (model.lm_head, plain.lm_head)):
        assert torch.equal(ours.weight[rows], theirs.weight[rows])
        assert not torch.equal(ours.weight, theirs.weight)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.lm_head.bias[OLD_VOCABULARY : OLD_VOCABULARY + 6].tolist() == [-5.0] * 6
    assert not model.lm_head.bias[rows].any()


def test_a_tokenizer_of_the_callers(parts, tmp_path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<note>", "<|startofimage|>", "<image>"]})
    model = compose(parts, tokenizer=tokenizer)
    assert model.config.text_config.vocab_size == OLD_VOCABULARY + 3
    assert (model.config.start_of_image_token_id, model.config.image_token_id) == (260, 261)


@pytest.mark.parametrize(
    "own", [{"bos_token": "</s>", "pad_token": None}, {"bos_token": None, "pad_token": None}, {"pad_token": None}]
)
def test_model_and_processor_agree_on_the_tokens_that_a_language_model_lacks(parts, tmp_path, own: dict) -> None:
    """As GPT-NeoX, Qwen and Llama have them."""
    save_text(tmp_path)
    tokenizer = build_tokenizer()
    for name, token in own.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Make the processor first.*tokenizer=processor.tokenizer"):
        compose({**parts, "text": str(tmp_path)})
    processor = DeemProcessor.from_parts(
        AutoImageProcessor.from_pretrained(parts["vision"]), tokenizer, num_image_tokens=4, target_size=64
    )
    config = compose({**parts, "text": str(tmp_path)}, tokenizer=processor.tokenizer).config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(processor.tokenizer, name) is not None
    assert config.bos_token_id != config.eos_token_id and config.text_config.vocab_size >= len(processor.tokenizer)


def test_precision_is_the_language_models_unless_told_otherwise(parts, tmp_path) -> None:
    AutoModel.from_pretrained(parts["vision"], dtype=torch.float16).save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(parts["vision"]).save_pretrained(tmp_path)
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = compose({**parts, "vision": str(tmp_path)}, dtype=dtype)
        kinds = {p.dtype for name, p in model.named_parameters() if ".vae." not in name}
        assert kinds == {expected} and model.image_decoder.vae.dtype == torch.float32


def test_a_tokenizer_without_image_tokens_is_refused(parts) -> None:
    with pytest.raises(ValueError, match="<image>"):
        compose(parts, tokenizer=build_tokenizer())


def test_parts_that_do_not_fit_are_refused(parts, tmp_path) -> None:
    with pytest.raises(ValueError, match="20 condition tokens.*at most 16"):
        compose(parts, num_image_tokens=20)
    with pytest.raises(ValueError, match="'feature_sise'"):
        compose(parts, feature_sise=3)
    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_layer=1, vocab_size=OLD_VOCABULARY)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2"):
        compose({**parts, "text": str(tmp_path)})


@pytest.mark.parametrize(
    ("family", "crop"), [("clip", True), ("dinov2", False), ("resnet", False), ("siglip2", False)]
)
def test_an_exported_encoder_sees_the_same(parts, tmp_path, monkeypatch, family: str, crop: bool) -> None:
    monkeypatch.chdir(tmp_path)
    save_vision(tmp_path / "vision", family)
    model = compose({**parts, "vision": str(tmp_path / "vision")})
    own = AutoImageProcessor.from_pretrained(tmp_path / "vision")
    sizes = {"num_image_tokens": 4, "target_size": SIDE}
    processor = DeemProcessor.from_parts(own, build_tokenizer(), do_center_crop=crop, **sizes)
    height, width = (SIDE, SIDE) if family == "siglip2" else (100, 80)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    model.export_encoder(tmp_path / "out", processor)
    np.save(tmp_path / "image.npy", image)
    code = (
        "import numpy, torch\n"
        "from transformers import AutoImageProcessor, AutoModel\n"
        "image = numpy.load('image.npy')\n"
        "images, encoder = AutoImageProcessor.from_pretrained('out'), AutoModel.from_pretrained('out')\n"
        "inputs = images(images=image, return_tensors='pt')\n"
        "torch.save([inputs['pixel_values'], encoder(**inputs).last_hidden_state], 'seen.pt')\n"
    )
    exec(code, {})  # in a process without this package: tests/first_hour.py
    pixels, seen = torch.load(tmp_path / "seen.pt")
    with torch.no_grad():
        ours = processor(text="<image>", images=image, return_tensors="pt")["pixel_values"]
        expected = model.get_image_features(ours).last_hidden_state
    if family != "siglip2":
        torch.testing.assert_close(pixels, ours, rtol=0, atol=1e-6)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)
