# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Training from cached latents is training with the VAE; a cache that does not fit is refused."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from deem_fixtures import tiny_model
from PIL import ExifTags, Image, ImageOps
from safetensors.torch import load_file
from transformers import AutoModel

from modeling_deem.training_deem import LOSSES
from processing import DeemDataCollator
from recipes import precompute_latents, pretrain
from recipes.data.faults import DataReport
from recipes.data.sources import DataArguments, build_dataset
from recipes.data.stream.steps import mirrored
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_caption_tars, write_formats
from recipes.training.latent_cache import LatentCache, LatentCollator, image_key, transform_id, vae_id, write_shard
from recipes.training.latent_writer import LatentArguments, check_complete, compare, encode, fill, read_images
from recipes.training.trainer import DeemTrainingArguments, RecipeTrainer

FROZEN = ["model.language_model", "image_decoder.denoiser", "image_decoder.vae"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_formats(folder, World(size=64), 12, formats=["mmc4", "captions"])
    return folder


def data_of(world: Path, processor, seed: int = 32):
    arguments = DataArguments(
        data=[str(world / "mmc4_annts"), str(world / "captions")],
        shuffle_buffer=4,
        pack_length=120,
        max_images=4,
        random_flip=True,
    )
    return build_dataset(arguments, processor, 2, seed)


def scenes(*indices: int) -> list[Image.Image]:
    return [World(size=64).scene(index).image for index in indices]


def fitting(folder: Path, decoder, processor) -> LatentCache:
    return LatentCache(folder, vae_id(decoder.vae), transform_id(processor))


def test_training_from_the_cache_is_training_with_the_vae(world, tiny_processor, tmp_path, caplog):
    decoder = tiny_model().image_decoder
    dataset, _ = data_of(world, tiny_processor)
    fill(tmp_path / "latents", decoder, tiny_processor, read_images(dataset, DataReport(), (0, 1)), LatentArguments())
    cache = fitting(tmp_path / "latents", decoder, tiny_processor)
    cache.verify()

    def run(name: str, collator: DeemDataCollator) -> RecipeTrainer:
        dataset, report = data_of(world, tiny_processor)
        trainer = RecipeTrainer(
            model=tiny_model(),
            args=DeemTrainingArguments(
                output_dir=str(tmp_path / name),
                max_steps=4,
                per_device_train_batch_size=2,
                logging_steps=1,
                save_steps=2,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                freeze=FROZEN,
                learning_rate=1e-3,
            ),
            train_dataset=dataset,
            data_collator=collator,
            processing_class=tiny_processor,
            data_report=report,
            without_vae=isinstance(collator, LatentCollator),
        )
        trainer.train()
        return trainer

    with_vae = run("with", DeemDataCollator(tiny_processor, return_targets=True))
    cached = LatentCollator(tiny_processor, cache)
    run("without", cached)
    shutil.rmtree(tmp_path / "without" / "checkpoint-4")
    without = run("without", cached)  # goes on from the checkpoint of step 2
    assert not list(without.model.image_decoder.vae.parameters()) and "unexpected keys" not in caplog.text
    logs = [[log for log in trainer.state.log_history if "loss" in log] for trainer in (with_vae, without)]
    assert len(logs[0]) == len(logs[1]) == 4
    for one, other in zip(*logs, strict=True):
        for name in ("loss", *LOSSES):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    saved, loaded = (
        AutoModel.from_pretrained(tmp_path / "with" / "checkpoint-4"),
        AutoModel.from_pretrained(tmp_path / "without" / "checkpoint-4"),
    )
    expected = saved.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)
        if ".vae." in name:
            assert torch.equal(tensor, expected[name])
    with pytest.raises(ValueError, match="holds no VAE"):
        without.model.image_decoder.encode(torch.zeros(1, 3, 64, 64))


def test_the_noise_of_the_posterior_is_that_of_the_vae(tiny_processor):
    decoder = tiny_model().image_decoder
    images = scenes(0, 1)
    targets = tiny_processor.image_processor(images, return_targets=True, return_tensors="pt")["target_pixel_values"]
    posterior = encode(decoder, tiny_processor, images)
    assert posterior.shape == (2, 8, 8, 8)
    sampled = [decoder.sample_latents(posterior, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    torch.testing.assert_close(
        sampled[0], decoder.encode(targets, torch.Generator().manual_seed(0)), rtol=0, atol=1e-5
    )
    assert (sampled[0] - sampled[1]).abs().max() > 1e-3
    assert decoder.sample_latents(sampled[0]) is sampled[0]


def test_every_image_and_its_mirror_image_are_encoded_once(world, tiny_processor, tmp_path):
    decoder = tiny_model().image_decoder
    arguments = LatentArguments(latent_batch_size=5, shard_size=7, num_verified=3)
    given = scenes(0, 1, 2, 0)
    given += [ImageOps.mirror(image) for image in given]
    fill(tmp_path, decoder, tiny_processor, iter(given[:3]), arguments)
    assert len(fitting(tmp_path, decoder, tiny_processor)) == 3
    first = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    sampled, seen = fill(tmp_path, decoder, tiny_processor, iter(given), arguments)  # goes on
    cache = fitting(tmp_path, decoder, tiny_processor)
    assert seen == {image_key(image) for image in given} == set(cache.shard_of) and len(seen) == 6
    assert all(path.read_bytes() == content for path, content in first.items())
    assert sampled == given[:1] and compare(cache, decoder, tiny_processor, given) < 1e-4
    dataset, _ = data_of(world, tiny_processor)
    every = {image_key(image) for image in read_images(dataset, DataReport(), (0, 1))}
    shares = [{image_key(image) for image in read_images(dataset, DataReport(), (rank, 2))} for rank in (0, 1)]
    assert shares[0] | shares[1] == every and shares[0] and shares[1]
    for seed in (32, 33):  # whatever the draws: documents with one image, and more than fit, included
        stream, _ = data_of(world, tiny_processor, seed)
        taken = (image for _, sample in zip(range(30), stream, strict=False) for image in sample["images"])
        assert {image_key(image) for image in taken} <= every


def test_an_image_is_known_by_what_is_seen(tiny_processor):
    exif, data = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    (seen,) = scenes(0)
    raw = seen.transpose(Image.Transpose.ROTATE_90)
    raw.save(data, "PNG", exif=exif)
    lying = Image.open(data)
    assert image_key(lying) == image_key(seen) != image_key(raw)
    assert image_key(mirrored(lying)) == image_key(ImageOps.mirror(seen))
    decoder = tiny_model().image_decoder
    assert torch.equal(encode(decoder, tiny_processor, [lying]), encode(decoder, tiny_processor, [seen]))


def test_two_files_of_one_folder_are_two_sources(tiny_processor, tmp_path):
    write_caption_tars(tmp_path, World(size=32), 20, per_tar=10)
    tars = [str(tmp_path / f"0000{number}.tar") for number in (0, 1)]
    arguments = DataArguments(data=[*tars, tars[0]], pack_length=0)
    dataset, _ = build_dataset(arguments, tiny_processor, 2, 0)
    assert [source.reader.name for source in dataset.sources] == [*tars, f"{tars[0]} (number 2)"]
    report = DataReport()
    given = [image_key(image) for image in read_images(dataset, report, (0, 1))]
    assert len(given) == len(set(given)) == 20  # the first tar is not read again
    assert {name: counts["read"] for name, counts in report.to_dict().items()} == dict.fromkeys(tars, 10)


def test_a_deleted_file_is_made_again_and_no_other_is_touched(tiny_processor, tmp_path):
    decoder = tiny_model().image_decoder
    arguments = LatentArguments(latent_batch_size=2, shard_size=2)
    images = scenes(*range(8))
    fill(tmp_path, decoder, tiny_processor, iter(images), arguments)
    (tmp_path / "000-00001.safetensors").unlink()
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert len(kept) == 3
    cut = fitting(tmp_path, decoder, tiny_processor)
    _, seen = fill(tmp_path, decoder, tiny_processor, iter(images), arguments)
    assert all(path.read_bytes() == content for path, content in kept.items())
    check_complete(fitting(tmp_path, decoder, tiny_processor), seen)
    with pytest.raises(ValueError, match="2 of 8 images are not in"):
        check_complete(cut, seen)


def test_what_does_not_fit_is_refused(tiny_processor, tmp_path):
    decoder, other = tiny_model().image_decoder, tiny_model(seed=1).image_decoder
    with pytest.raises(ValueError, match="no latents in .*precompute_latents.py"):
        fitting(tmp_path, decoder, tiny_processor)
    images = scenes(0, 1)
    fill(tmp_path, decoder, tiny_processor, iter(images), LatentArguments())
    with pytest.raises(ValueError, match="made with another vae: AutoencoderKL"):
        fitting(tmp_path, other, tiny_processor)
    tiny_processor.image_processor.do_center_crop = True
    with pytest.raises(ValueError, match="made with another transform"):
        fitting(tmp_path, decoder, tiny_processor)
    tiny_processor.image_processor.do_center_crop = False
    cache = fitting(tmp_path, decoder, tiny_processor)
    collator = LatentCollator(tiny_processor, cache)
    batch = collator([{"text": "<image>a", "images": images[:1]}])
    assert batch["target_latents"].shape == (1, 8, 8, 8) and "target_pixel_values" not in batch
    with pytest.raises(ValueError, match="1 of 2 images of a batch are not among the 2 latents"):
        collator([{"text": "<image><image>a", "images": [images[0], ImageOps.mirror(images[1])]}])


def test_a_broken_cache_is_noticed(tiny_processor, tmp_path):
    decoder = tiny_model().image_decoder
    fill(tmp_path, decoder, tiny_processor, iter(scenes(0, 1)), LatentArguments())
    (shard,) = tmp_path.glob("*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-8] + b"12345678")
    with pytest.raises(ValueError, match="does not hold what was written to it"):
        fitting(tmp_path, decoder, tiny_processor).verify()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        fitting(tmp_path, decoder, tiny_processor)
    shard.write_bytes(content)
    tensors = {key: tensor + 1 for key, tensor in load_file(shard).items()}
    write_shard(shard, tensors, vae_id(decoder.vae), transform_id(tiny_processor))
    with pytest.raises(ValueError, match="encoded once more differs"):
        compare(fitting(tmp_path, decoder, tiny_processor), decoder, tiny_processor, scenes(0))


def test_the_recipe_fills_a_cache_that_training_takes(world, tiny_processor, tmp_path, monkeypatch, capsys):
    tiny_model().save_pretrained(tmp_path / "deem")
    tiny_processor.save_pretrained(tmp_path / "deem")
    flags = {
        "model": tmp_path / "deem",
        "data": world / "captions",
        "latents": tmp_path / "latents",
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "pack_length": 60,
        "groups": "{}",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    options = [str(x) for key, value in flags.items() for x in (f"--{key}", value)]
    monkeypatch.setattr(sys, "argv", ["precompute_latents.py", "pretrain", *options, "--num_verified", "2"])
    precompute_latents.main()
    assert "12 images in" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *options])
    pretrain.main()
    saved = AutoModel.from_pretrained(tmp_path / "run").state_dict()
    assert torch.equal(saved["image_decoder.vae.quant_conv.weight"], tiny_model().image_decoder.vae.quant_conv.weight)
    monkeypatch.setattr(sys, "argv", ["precompute_latents.py", "train", *options])
    with pytest.raises(ValueError, match="The first word names the recipe"):
        precompute_latents.main()
    monkeypatch.setattr(sys, "argv", ["precompute_latents.py", "--help"])
    precompute_latents.main()
    assert "first word names the recipe" in capsys.readouterr().out
