# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The small pretrained parts: ordinary folders of their libraries, made once, never half made, and fit for a DEEM."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer, ConvNextModel

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor
from recipes.parts import PARTS, PartsArguments, make_parts, whole_folder
from recipes.synthetic.parts.diffusion_modules import new_vae
from recipes.synthetic.parts.diffusion_pipeline import draw, train_vae
from recipes.synthetic.parts.images import render, share_of_colors, to_pil, to_unit
from recipes.synthetic.parts.language_model import least_color_distance
from recipes.synthetic.parts.texts import train_tokenizer, world_texts
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT

TINY = {"num_pictures": 16, "num_texts": 40, "num_held_out": 8, "steps_scale": 0.004}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    vision, text, diffusion = make_parts(PartsArguments(out=str(folder), **TINY))
    assert (vision, text, diffusion) == tuple(str(folder / name) for name in ("vision", "text", "diffusion"))
    return folder


def test_vision_loads_with_its_image_processor(parts):
    model = AutoModel.from_pretrained(parts / "vision")
    assert isinstance(model, ConvNextModel) and len(model.config.hidden_sizes) == 4
    pixels = AutoImageProcessor.from_pretrained(parts / "vision")(World().scene(0).image, return_tensors="pt")
    assert pixels.pixel_values.shape == (1, 3, 64, 64) and pixels.pixel_values.min() < -0.3
    torch.testing.assert_close(pixels.pixel_values, to_unit(render([World().scene(0)], "test")))
    assert model(**pixels).pooler_output.isfinite().all()


def test_text_loads_with_its_tokenizer_and_continues_a_text(parts):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(parts / "text"),
        AutoTokenizer.from_pretrained(parts / "text"),
    )
    assert len(tokenizer) == model.config.vocab_size
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name) is not None
    ids = tokenizer("A photo of", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids.input_ids.shape[1]


def test_last_states_keep_words_that_go_on_alike(parts):
    """Drawings come from last states, and "red" and "blue" are followed by the same words."""
    tokenizer = AutoTokenizer.from_pretrained(parts / "text")
    model = AutoModelForCausalLM.from_pretrained(parts / "text")
    assert least_color_distance(model, tokenizer) > 1.0  # nearly orthogonal at the start; 1.4 is the most
    model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(["Ġred", "Ġblue"])] = 1.0
    assert least_color_distance(model, tokenizer) < 1e-5


def test_the_tokenizer_puts_bos_in_front_and_reads_any_text(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts / "text")
    for text in (*world_texts(World(), range(5)), "Üben: 3\n  Zeilen 🙂"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_words_of_the_world_are_single_tokens():
    tokenizer = train_tokenizer(list(world_texts(World(), range(400))))
    for index in range(HELD_OUT, HELD_OUT + 50):
        caption = World().scene(index).caption("full")
        words = caption.replace(",", " ,").split()
        assert len(tokenizer(" " + caption).input_ids) == 1 + len(words)


def test_diffusion_loads_as_a_pipeline_and_draws(parts):
    pipeline = StableDiffusionPipeline.from_pretrained(parts / "diffusion")
    assert (parts / "diffusion" / "model_index.json").is_file()
    scheduler, latents = pipeline.scheduler.config, pipeline.vae.config
    assert (scheduler.num_train_timesteps, scheduler.prediction_type, scheduler.steps_offset) == (1000, "epsilon", 1)
    assert (scheduler.beta_schedule, scheduler.beta_start, scheduler.beta_end) == ("scaled_linear", 0.00085, 0.012)
    images = to_unit(render([World().scene(i) for i in range(8)], "test"))
    with torch.no_grad():
        scaled = pipeline.vae.encode(images).latent_dist.mode() * latents.scaling_factor
    assert scaled.shape == (8, 4, 8, 8) and 0.5 < scaled.std() < 2
    ids = pipeline.tokenizer("a red circle", padding="max_length", truncation=True).input_ids
    text = AutoTokenizer.from_pretrained(parts / "text")
    assert pipeline.tokenizer.get_vocab() == text.get_vocab()
    said = text("a red circle").input_ids
    assert ids[: len(said) + 1] == [*said, text.eos_token_id] and len(ids) == 32
    images = draw(pipeline, ["a red circle", "a blue star"], seed=0)
    assert [image.size for image in images] == [(64, 64)] * 2
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler"  # drawing leaves the pipeline as it was


def test_a_deem_is_composed_of_them(parts):
    folders = [str(parts / name) for name in ("vision", "text", "diffusion")]
    image_processor, tokenizer = (
        AutoImageProcessor.from_pretrained(folders[0]),
        AutoTokenizer.from_pretrained(folders[1]),
    )
    processor = DeemProcessor.from_parts(image_processor, tokenizer, num_image_tokens=4, target_size=64)
    model = DeemForConditionalGeneration.from_vision_text_diffusion_pretrained(
        *folders,
        num_image_tokens=4,
        tokenizer=processor.tokenizer,
        perceiver_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
    )
    inputs = processor(text="<image>A photo of", images=World().scene(0).image, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_what_is_there_is_not_made_again(parts, capsys):
    before = {file: file.stat().st_mtime_ns for file in parts.rglob("*")}
    make_parts(PartsArguments(out=str(parts), **TINY))
    assert {file: file.stat().st_mtime_ns for file in parts.rglob("*")} == before
    assert capsys.readouterr().out.count("there already") == 3


def test_overwrite_makes_the_same_part_again(parts, tmp_path):
    (tmp_path / "text").mkdir()  # an old part
    make_parts(PartsArguments(out=str(tmp_path), only=["text"], overwrite=True, **TINY))
    first, again = (load_file(folder / "text" / "model.safetensors") for folder in (parts, tmp_path))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


def test_an_interrupted_part_is_not_taken_for_a_whole_one(tmp_path):
    folder = tmp_path / "text"
    with pytest.raises(KeyboardInterrupt):
        with whole_folder(folder) as unfinished:
            (unfinished / "config.json").write_text("{}")
            raise KeyboardInterrupt
    assert not folder.exists()
    with whole_folder(folder) as unfinished:
        assert not list(unfinished.iterdir())  # what the interrupted run left is gone
        (unfinished / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["text"] and (folder / "whole").exists()


def test_the_vae_starts_as_an_average_and_learns():
    scenes = [World().scene(index) for index in range(24)]
    images = render(scenes, "test")
    fresh = new_vae()

    def redraw(vae: AutoencoderKL) -> torch.Tensor:
        with torch.no_grad():
            return vae.decode(vae.encode(to_unit(images)).latent_dist.mode()).sample

    def error(vae: AutoencoderKL) -> float:
        return (redraw(vae) - to_unit(images)).square().mean().item()

    assert share_of_colors(to_pil(redraw(fresh)), [scene.main.color for scene in scenes]) >= 0.9
    torch.manual_seed(0)
    trained, _ = train_vae(images, steps=25)
    assert error(trained) < 0.9 * error(fresh)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="--only language: no such part.*text, vision, diffusion"):
        PartsArguments(only=["language"])
    with pytest.raises(ValueError, match="--num_pictures 3 is too few"):
        PartsArguments(num_pictures=3)
    with pytest.raises(ValueError, match="needs the tokenizer of the part 'text'"):
        make_parts(PartsArguments(out=str(tmp_path), only=["vision"], **TINY))
    assert PARTS == ("text", "vision", "diffusion") and not list(tmp_path.iterdir())
