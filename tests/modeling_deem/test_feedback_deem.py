# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The feedback for models of other classes: transformers' vision-language models, random and tiny."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deem_fixtures import SCHEDULER, UNET, VAE
from family_fixtures import DIFFUSIONS, save_diffusion
from PIL import Image
from transformers import AutoConfig, AutoModel, CLIPImageProcessorPil, LlamaConfig, LlamaForCausalLM
from vlm_fixtures import FAMILIES, IMAGE, TinyVlm, count_calls, tiny_vlm, vision_tower

from modeling_deem import DeemFeedback, DeemFeedbackConfig
from modeling_deem.feedback_images_deem import FeedbackImageProcessor, seen_part
from modeling_deem.feedback_losses_deem import choose_others, contrastive_losses

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"num_queries": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
SCRATCH = {"image_size": 32, "width": 32, "num_layers": 1, "perceiver_config": SMALL}
SQUARE = {"height": 32, "width": 32}
IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes")


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("diffusion")
    save_diffusion(folder)
    return str(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request) -> TinyVlm:
    return tiny_vlm(request.param)


@pytest.fixture(scope="module")
def llava() -> TinyVlm:
    return tiny_vlm("llava")


@pytest.fixture(scope="module")
def qwen() -> TinyVlm:
    return tiny_vlm("qwen2_5_vl")


def seeing(vlm: TinyVlm, batch: dict[str, Any]) -> tuple[Any, dict[str, Any], list[int] | None]:
    """Encoded images of a batch, what the model still needs, and the tiles of each image."""
    given = {name: batch[name] for name in IMAGE_INPUTS if name in batch}
    images = vlm.model.get_image_features(**given, return_dict=True)
    rest = {name: value for name, value in batch.items() if name != "pixel_values"}
    return images, rest, [1, 2, 2] if vlm.family in ("internvl", "smolvlm") else None


def targets_of(count: int, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(7)) * 2 - 1


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# ---- models of other classes ----


def test_the_three_lines(vlm: TinyVlm, diffusion: str) -> None:
    batch = vlm.collate([vlm.row(0), vlm.row(1), vlm.row(2, with_image=False), vlm.row(3)])
    model, tower = vlm.model, vision_tower(vlm.model)
    feedback = DeemFeedback.from_diffusion_pretrained(diffusion, model=model, perceiver_config=SMALL)
    plain = model(**batch)
    calls = count_calls(tower)
    images, rest, tiles = seeing(vlm, batch)
    outputs = model(**rest, mm_encoder_outputs={"image": images})
    loss = feedback(images, targets_of(3, 64), num_tiles=tiles).loss
    assert len(calls) == 1
    assert torch.equal(plain.logits, outputs.logits) and torch.equal(plain.loss, outputs.loss)
    assert torch.isfinite(loss)

    # the text loss says which tensors of the encoder are used at all
    used = grads(model, outputs.loss)
    fed = grads(model, loss)
    parts = [
        name for name in used if "language_model" not in name and "lm_head" not in name and "text_model" not in name
    ]
    assert any(name.startswith("model.vis") for name in parts) and len(parts) > 20
    only_text = {name for name in parts if name not in fed}
    assert only_text <= {name for name in parts if "deepstack" in name}, (
        only_text
    )  # Qwen3 gives those to deeper layers
    assert set(grads(feedback, feedback(images, targets_of(3, 64), num_tiles=tiles).loss)) >= {
        name for name, parameter in feedback.named_parameters() if name.startswith("connector.projector")
    }


def grads(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients that are not zero, by name."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None and bool(grad.any())}


@pytest.mark.parametrize("source", ["encoder", "language"])
@pytest.mark.parametrize("connector", ["linear", "perceiver"])
def test_sources_and_connectors(vlm: TinyVlm, source: str, connector: str) -> None:
    rows = [vlm.row(0), vlm.row(1), vlm.row(2, with_image=False), vlm.row(3)]
    options = dict(SCRATCH, source=source, connector=connector)
    feedback = DeemFeedback.from_scratch(vlm.model, **options)

    def losses(rows: list[dict[str, Any]], targets: torch.Tensor, tiles: list[int], **draws: Any) -> torch.Tensor:
        batch = vlm.collate(rows)
        images, rest, _ = seeing(vlm, batch)
        outputs = vlm.model(**rest, mm_encoder_outputs={"image": images}, output_hidden_states=True)
        language = {"hidden_states": outputs.hidden_states[-1], "image_mask": batch["input_ids"] == IMAGE}
        return feedback(
            images, targets, num_tiles=tiles, **(language if source == "language" else {}), **draws
        ).image_losses

    tiled = {"internvl": [1, 2, 2], "smolvlm": [1, 2, 2], "llava_onevision": [5, 3, 3]}.get(vlm.family, [1, 1, 1])
    noise = torch.randn(3, 192, 4, 4, generator=generator())
    timesteps, targets = torch.tensor([300, 500, 700]), targets_of(3)
    together = losses(rows, targets, tiled, noise=noise, timesteps=timesteps)
    name = "model.visual.patch_embed.proj.weight" if "qwen" in vlm.family else None
    names = [key for key, _ in vlm.model.named_parameters() if "patch_emb" in key and key.endswith("weight")]
    assert (name or names[0]) in grads(vlm.model, together.mean())
    # a batch equals its rows: padded tokens do not count
    alone = losses(rows[1:2], targets[1:2], tiled[1:2], noise=noise[1:2], timesteps=timesteps[1:2])
    assert torch.allclose(together[1:2], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(DIFFUSIONS))
def test_denoisers(kind: str, llava: TinyVlm, qwen: TinyVlm) -> None:
    parts = {"denoiser": UNET, "vae": VAE, "scheduler": SCHEDULER, **DIFFUSIONS[kind]}
    sizes = {"source_size": 32, "perceiver_config": SMALL, "objective": "contrastive"}
    feedback = DeemFeedback._from_config(DeemFeedbackConfig(**parts, **sizes))
    images, *_ = seeing(llava, llava.collate([llava.row(0), llava.row(1)]))
    loss = feedback(images, targets_of(2, 64)).loss
    assert torch.isfinite(loss) and "connector.norm.weight" in grads(feedback, loss)
    assert not any(parameter.requires_grad for parameter in feedback.denoiser.parameters())
    if kind == "sd3":
        return
    # direct cross-attention to different numbers of tokens: padding does not count
    sizes = {"source_size": 32, "connector": "linear", "connector_std": 0.3}
    feedback = DeemFeedback._from_config(DeemFeedbackConfig(**parts, **sizes)).eval()
    images, *_ = seeing(qwen, qwen.collate([qwen.row(0), qwen.row(1)]))
    draws = {"noise": torch.randn(2, 4, 8, 8, generator=generator()), "timesteps": torch.tensor([300, 600])}
    draws["target_latents"] = torch.randn(2, 4, 8, 8, generator=generator())
    together = feedback(images, **draws).image_losses[:1]
    images.pooler_output = images.pooler_output[:1]
    alone = feedback(images, **{name: value[:1] for name, value in draws.items()}).image_losses
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-6)


def test_a_small_denoiser_learns_whose_tokens_they_are(llava: TinyVlm) -> None:
    torch.manual_seed(0)
    options = {"width": 64, "timestep_range": (700, 999), "connector": "linear"}
    feedback = DeemFeedback.from_scratch(llava.model, **{**SCRATCH, **options})
    images, *_ = seeing(llava, llava.collate([llava.row(seed) for seed in range(4)]))
    images.pooler_output = [one.detach() for one in images.pooler_output]
    colors = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]])[:, :, None, None]
    targets = colors.expand(4, 3, 32, 32)
    optimizer = torch.optim.AdamW([parameter for parameter in feedback.parameters() if parameter.requires_grad], 3e-3)
    draws = torch.Generator().manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        feedback(images, targets, generator=draws).loss.backward()
        optimizer.step()
    with torch.no_grad():
        own = feedback(images, targets, generator=generator()).loss
        images.pooler_output = images.pooler_output[1:] + images.pooler_output[:1]
        exchanged = feedback(images, targets, generator=generator()).loss
    assert exchanged > 1.2 * own


def test_a_small_denoiser_on_latents_trains_whole(llava: TinyVlm, diffusion: str) -> None:
    feedback = DeemFeedback.from_scratch(llava.model, **{**SCRATCH, "image_size": 64, "vae": diffusion})
    images, *_ = seeing(llava, llava.collate([llava.row(0), llava.row(1)]))
    found = grads(feedback, feedback(images, targets_of(2, 64)).loss)
    trains = {name for name, parameter in feedback.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, _ in feedback.named_parameters() if not name.startswith("vae.")}
    assert trains - found.keys() <= {name for name in trains if name.endswith("key.bias")}  # softmax ignores it


def test_a_connector_at_zero_moves_nothing(llava: TinyVlm) -> None:
    feedback = DeemFeedback.from_scratch(llava.model, **SCRATCH, connector_std=0.0)
    images, *_ = seeing(llava, llava.collate([llava.row(0)]))
    assert grads(llava.model, feedback(images, targets_of(1)).loss) == {}


# ---- saving ----


def test_a_saved_feedback_is_bit_equal(diffusion: str, llava: TinyVlm, tmp_path: Path) -> None:
    feedback = DeemFeedback.from_diffusion_pretrained(diffusion, llava.model, perceiver_config=SMALL)
    feedback.save_pretrained(tmp_path / "pretrained")
    scratch = DeemFeedback.from_scratch(llava.model, **SCRATCH, connector="linear")
    scratch.save_pretrained(tmp_path / "scratch")
    for one, folder in ((feedback, "pretrained"), (scratch, "scratch")):
        again = AutoModel.from_pretrained(tmp_path / folder)
        assert type(again) is DeemFeedback
        before, after = (dict([*x.named_parameters(), *x.named_buffers()]) for x in (one, again))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        trains = [name for name, parameter in again.named_parameters() if parameter.requires_grad]
        assert trains == [name for name, parameter in one.named_parameters() if parameter.requires_grad]
        assert any("denoiser" in name for name in trains) == (folder == "scratch")
    assert type(AutoConfig.from_pretrained(tmp_path / "scratch")) is DeemFeedbackConfig


# ---- the contrastive objective ----


def test_the_contrastive_objective_is_its_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    shape = (4, 3, 2, 2)
    own, target, view = (torch.randn(shape, generator=draw, requires_grad=True) for _ in range(3))
    others = torch.randn(4, 2, *shape[1:], generator=draw, requires_grad=True)
    losses = contrastive_losses(own, target, others, view, temperature=0.3)
    expected = []
    for i in range(4):
        unit = [F.normalize(one.flatten(), dim=0) for one in (own[i], view[i], target[i], *others[i])]
        scores = [(unit[0] @ one / 0.3).exp() for one in unit[1:]]
        total = sum(scores)
        expected.append(-0.5 * ((scores[0] / total).log() + (scores[1] / total).log()))
    expected = torch.stack(expected)
    assert torch.allclose(losses, expected, atol=1e-6)
    leaves = (own, target, view, others)
    for one, other in zip(
        torch.autograd.grad(losses.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-5)


def test_all_others_are_the_published_form(diffusion: str, llava: TinyVlm) -> None:
    """B x B predictions: image i under the tokens of j, of which the diagonal are the anchors."""
    options = {"objective": "contrastive", "connector_std": 0.3, "perceiver_config": SMALL}
    feedback = DeemFeedback.from_diffusion_pretrained(diffusion, llava.model, **options)
    images, *_ = seeing(llava, llava.collate([llava.row(seed) for seed in range(3)]))
    views, *_ = seeing(llava, llava.collate([llava.row(seed) for seed in range(3, 6)]))
    latents = torch.randn(3, 4, 8, 8, generator=generator())
    noise, timesteps = torch.randn(latents.shape, generator=generator()), torch.tensor([250, 450, 650])
    calls = count_calls(feedback.denoiser)
    draws = {"target_latents": latents, "noise": noise, "timesteps": timesteps}
    losses = feedback(images, views=views, **draws).image_losses
    assert len(calls) == 1

    condition, _ = feedback.condition(*feedback.gather_tokens(images, 3))
    seen, _ = feedback.condition(*feedback.gather_tokens(views, 3))
    expected = []
    for i in range(3):
        noisy = feedback.scheduler.add_noise(latents[i : i + 1], noise[i : i + 1], timesteps[i : i + 1])
        row = [feedback.denoise(noisy, timesteps[i : i + 1], condition[j : j + 1]).flatten() for j in range(3)]
        view = feedback.denoise(noisy, timesteps[i : i + 1], seen[i : i + 1]).flatten()
        row, view, target = [F.normalize(one, dim=0) for one in row], F.normalize(view, dim=0), noise[i].flatten()
        scores = torch.stack([row[i] @ view, row[i] @ F.normalize(target, dim=0)])
        negatives = torch.stack([row[i] @ row[j] for j in range(3) if j != i])
        scores, negatives = scores / 0.1, negatives / 0.1
        expected.append((torch.cat([scores, negatives]).logsumexp(0) - scores).mean())
    assert torch.allclose(losses, torch.stack(expected), atol=2e-5)


def test_others_are_never_the_image_itself() -> None:
    for number in (1, 2, 5, None):
        others = choose_others(4, number, torch.device("cpu"), generator())
        assert others.shape == (4, min(number or 3, 3))
        assert all(i not in row and len(set(row)) == len(row) for i, row in enumerate(others.tolist()))


# ---- images ----


def test_the_image_processor_makes_targets(llava: TinyVlm) -> None:
    feedback = DeemFeedback.from_scratch(llava.model, **SCRATCH)
    half = Image.new("RGB", (40, 20))
    half.paste((255, 255, 255), (0, 0, 20, 20))
    made = feedback.image_processor([half, Image.new("L", (7, 9), 255)])["target_pixel_values"]
    assert made.shape == (2, 3, 32, 32) and made[0, 0, 16, 4] == 1 and made[0, 0, 16, 28] == -1 and made[1].min() == 1
    (mirrored,) = feedback.image_processor.flip_and_crop([half], flip=1.0, smallest=1.0)
    assert mirrored.size == (40, 20) and mirrored.getpixel((30, 10)) == (255, 255, 255)
    (cut,) = feedback.image_processor.flip_and_crop([half], generator(), smallest=0.25)
    assert 20 <= cut.size[0] < 40 and abs(cut.size[0] - 2 * cut.size[1]) <= 1


@pytest.mark.parametrize("size, crop", [({"shortest_edge": 32}, 32), ({"shortest_edge": 48}, 32), (SQUARE, 16)])
def test_targets_show_what_the_model_sees(size: dict[str, int], crop: int) -> None:
    """The same smooth image, cut by CLIP's processor and by ours: equal but for resampling at another place."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    cut = {"crop_size": {"height": crop, "width": crop}, **half}
    processor = CLIPImageProcessorPil(size=size, **cut)
    across = torch.linspace(0, 255, 128).expand(64, 128)
    down = torch.linspace(0, 255, 64)[:, None].expand(64, 128)
    pixels = torch.stack([across, down, 255 - across], -1).round().to(torch.uint8).numpy()
    image = Image.fromarray(pixels)
    seen = processor([image], return_tensors="pt")["pixel_values"]
    made = FeedbackImageProcessor(crop, like=processor)([image])["target_pixel_values"]
    assert (made - seen).abs().max() < 0.06
    whole = FeedbackImageProcessor(crop)([image])["target_pixel_values"]
    assert (whole - seen).abs().max() > 0.3
    assert seen_part(image, CLIPImageProcessorPil(size=SQUARE, do_center_crop=False, **cut)) is image


# ---- what is refused ----


def test_bad_input_in_words(llava: TinyVlm, qwen: TinyVlm, diffusion: str) -> None:
    feedback = DeemFeedback.from_scratch(llava.model, **SCRATCH)
    images, *_ = seeing(llava, llava.collate([llava.row(0), llava.row(1)]))
    ragged, *_ = seeing(qwen, qwen.collate([qwen.row(0), qwen.row(1)]))
    sd3 = DeemFeedbackConfig(**DIFFUSIONS["sd3"], source_size=32, connector="linear")
    language = DeemFeedback.from_scratch(llava.model, **SCRATCH, source="language")
    encoder = DeemFeedback.from_scratch(llava.model, **SCRATCH, source="encoder")
    text = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    bare = type(images)(pooler_output=images.pooler_output)
    cases = [
        (lambda: feedback(images, targets_of(3)), "3 target images, but the model gives tokens of 2"),
        (lambda: feedback(images, targets_of(2) * 3), r"lie in \[-3.00, 3.00\]"),
        (lambda: feedback(images, targets_of(2, 16)), r"expected \(N, 3, 32, 32\)"),
        (lambda: feedback(images), "Give target_pixel_values"),
        (lambda: feedback(images, targets_of(2), num_tiles=[1, 2, 3]), None),
        (lambda: feedback(images.pooler_output, targets_of(2)), "without image tokens in pooler_output"),
        (lambda: language(images, targets_of(2)), "source is 'language': give hidden_states"),
        (lambda: encoder(bare, targets_of(2)), "has no last_hidden_state"),
        (lambda: encoder(images, targets_of(3)), "3 target images"),
        (lambda: DeemFeedback.from_scratch(text, **SCRATCH), "no argument mm_encoder_outputs of its forward"),
        (lambda: DeemFeedback._from_config(sd3)(ragged, targets_of(2, 64)), "takes no mask"),
        (lambda: DeemFeedback.from_scratch(llava.model, image_size=30), "multiple of 8"),
        (lambda: DeemFeedback.from_scratch(llava.model, pixel_unshuffle=4, denoiser=UNET), "Pixels, unshuffled"),
        (
            lambda: DeemFeedback.from_diffusion_pretrained(
                diffusion, source_size=8, vae={**VAE, "latent_channels": 8}
            ),
            "latents have 8 channels, the denoiser takes 4",
        ),
        (lambda: DeemFeedbackConfig(timestep_range=[5, 5000]), "timestep_range is"),
        (lambda: DeemFeedbackConfig(feedback_share=0.0), "feedback_share is 0.0"),
        (lambda: choose_others(1, None, torch.device("cpu")), "at least 2 images"),
    ]
    for make, message in cases:
        if message is None:  # as many tokens as images: the tiles need not be told
            make()
            continue
        with pytest.raises(ValueError, match=message):
            make()
    narrow = DeemFeedback.from_scratch(**SCRATCH, source_size=8)
    with pytest.raises(ValueError, match="32 wide, the feedback was made for 8"):
        narrow(images, targets_of(2))
