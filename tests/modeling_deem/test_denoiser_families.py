# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every supported denoiser in a tiny image decoder, and the pipelines it comes from (docs/parts.md)."""

from typing import Any

import diffusers
import pytest
import torch
from conftest import build_tokenizer
from deem_fixtures import (
    SCHEDULER,
    SIDE,
    VAE,
    Q,
    tensors_of,
    tiny_decoder_config,
    wake,
)
from diffusers import AutoModel as DiffusersModel
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from family_fixtures import (
    DIFFUSIONS,
    FLOW,
    PIXART,
    SANA,
    SD3,
    text_config,
    vision_config,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    ViTImageProcessorPil,
)

from modeling_deem import DeemForConditionalGeneration, DeemImageDecoder, DeemImageDecoderConfig, drawn_size
from modeling_deem.configuration_deem import DENOISERS
from modeling_deem.image_states_deem import own_features
from modeling_deem.scheduling_deem import add_noise


def image_decoder(name: str, seed: int = 0, **changes: Any) -> DeemImageDecoder:
    torch.manual_seed(seed)
    fields = tiny_decoder_config(**{**DIFFUSIONS[name], **changes})
    config = DeemImageDecoderConfig(**fields, token_size=24, context_size=32, feature_size=32)
    config.perceiver_config.encoder_hidden_size = 32
    decoder = DeemImageDecoder(config).eval()
    wake(decoder, seed)
    with torch.no_grad():  # transformers of diffusion start with outputs of zero
        for parameter in decoder.denoiser.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return decoder


def test_every_denoiser_is_tried() -> None:
    tried = {fields.get("denoiser", {}).get("_class_name", "UNet2DConditionModel") for fields in DIFFUSIONS.values()}
    assert tried == set(DENOISERS)


def losses_of(decoder: DeemImageDecoder, seed: int = 0) -> list[torch.Tensor]:
    """Both losses of two pictures; the second image of a row, after the first."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(2, 3, SIDE, SIDE, generator=generator) * 2 - 1
    tokens, contexts = torch.randn(2, Q, 24, generator=generator), torch.randn(2, 7, 32, generator=generator)
    features = tuple(torch.randn(2, 32, side, side, generator=generator) for side in (16, 8, 4, 2))
    latents = decoder.encode(pictures, generator)
    mask = torch.ones(2, 7, dtype=torch.bool)
    image = decoder.image_loss(contexts, mask, own_features(features), latents, generator=generator)
    consistency = decoder.consistency_loss(latents, tokens, features, generator=generator)
    return [image, consistency]


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_every_trainable_parameter_of_every_denoiser_moves(name: str) -> None:
    decoder = image_decoder(name).train()
    before = {key: parameter.detach().clone() for key, parameter in decoder.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for step in range(2):
        losses = losses_of(decoder, step)
        assert all(loss.isfinite() and loss > 0 for loss in losses)
        sum(losses).backward()
    optimizer.step()
    for key, parameter in decoder.named_parameters():
        # The null condition needs a dropped picture, which chance may not bring; see test_losses_deem.
        if key != "null_condition":
            assert torch.equal(parameter, before[key]) == (not parameter.requires_grad), key
    assert not any(parameter.requires_grad for parameter in decoder.vae.parameters())


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_every_denoiser_draws_and_survives_saving(name: str, tmp_path) -> None:
    decoder = image_decoder(name)
    condition = torch.randn(2, Q, 32, generator=torch.Generator().manual_seed(0))

    def draw(decoder: DeemImageDecoder) -> torch.Tensor:
        return decoder.sample(condition, decoder.no_features(2), generator=torch.Generator().manual_seed(1))

    pictures = draw(decoder)
    assert pictures.shape == (2, 3, SIDE, SIDE) and pictures.isfinite().all()
    assert decoder.config.target_size == SIDE
    assert pictures.std() > 1e-3 and not torch.allclose(pictures[0], pictures[1], atol=1e-3)
    decoder.save_pretrained(tmp_path)
    loaded = DeemImageDecoder.from_pretrained(tmp_path)
    ours, theirs = tensors_of(decoder), tensors_of(loaded)
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    torch.testing.assert_close(draw(loaded), pictures, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_other_schedulers_draw_nearly_the_same_in_many_steps(name: str) -> None:
    decoder = image_decoder(name)
    condition = torch.randn(1, Q, 32, generator=torch.Generator().manual_seed(0))
    flow = "Flow" in type(decoder.scheduler).__name__
    latents = torch.randn(1, decoder.denoiser.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    names = (
        ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
        if flow
        else ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler")
    )
    pictures = [
        decoder.sample(
            condition,
            decoder.no_features(1),
            num_inference_steps=40,
            guidance_scale=1.0,
            latents=latents,
            scheduler=decoder.make_scheduler(other),
        )
        for other in names
    ]
    for picture in pictures[1:]:
        assert (picture - pictures[0]).abs().mean() < 0.05 * pictures[0].std()
    refused = "DDIMScheduler" if flow else "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(ValueError, match=f"No scheduler '{refused}'.*{names[1]}"):
        decoder.make_scheduler(refused)
    with pytest.raises(ValueError, match="make_scheduler"):
        decoder.sample(condition, decoder.no_features(1), scheduler=getattr(diffusers, refused)())


class PerfectDenoiser(torch.nn.Module):
    """The best denoiser of a world that holds one picture: it predicts what the scheduler asks for exactly."""

    dtype = torch.float32

    def __init__(self, decoder: DeemImageDecoder, picture: torch.Tensor):
        super().__init__()
        self.config, self.picture, self.scheduler = decoder.denoiser.config, picture, decoder.scheduler

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor, **extra) -> torch.Tensor:
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            return (sample - self.picture) / (timestep / 1000).view(-1, 1, 1, 1)
        share = self.scheduler.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
        noise = (sample - share.sqrt() * self.picture) / (1 - share).sqrt()
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        return share.sqrt() * noise - (1 - share).sqrt() * self.picture


@pytest.mark.parametrize("name", ["unet", "unet, v", "sd3"])
def test_a_perfect_denoiser_has_no_loss_and_draws_its_picture_by_every_scheduler(name: str) -> None:
    decoder = image_decoder(name)
    picture = decoder.encode(torch.rand(1, 3, SIDE, SIDE) * 2 - 1)
    decoder.denoiser = PerfectDenoiser(decoder, picture)
    condition = torch.zeros(1, Q, 32)
    noise, times = torch.randn(4, *picture.shape[1:]), torch.tensor([0, 300, 600, 999])
    with torch.no_grad():
        latents, states = picture.expand(4, -1, -1, -1), decoder.no_features(4)
        errors = decoder.error_map(latents, condition.expand(4, -1, -1), states, times, noise)
    assert errors.max() < 1e-3
    flow = ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    denoising = ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", *flow[1:])
    for scheduler in flow if name == "sd3" else denoising:
        drawn = decoder.sample(
            condition,
            decoder.no_features(1),
            num_inference_steps=20,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            scheduler=decoder.make_scheduler(scheduler),
        )
        # Solvers of flow matching round their timesteps to integers.
        assert (drawn - decoder.decode(picture)).abs().mean() < 1e-3, scheduler


def test_flow_matching_is_that_of_diffusers() -> None:
    decoder = image_decoder("sd3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = torch.randn(2, 3, 16, 8, 8)[:2].unbind(1)[:2]
    noisy, target, times = add_noise(decoder.scheduler, latents, noise, torch.tensor([0, 600]))
    expected = scheduler.timesteps.flip(0)[[0, 600]]
    assert torch.equal(times, expected)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, expected, noise))
    assert torch.equal(target, noise - latents)
    # One step from there along the exact target ends in the picture.
    share = times.view(-1, 1, 1, 1) / 1000
    torch.testing.assert_close(noisy - share * target, latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_latents_are_those_of_the_pipeline(name: str) -> None:
    """Scaled as the pipelines of diffusers do, and back."""
    decoder = image_decoder(name)
    pictures = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        encoded = decoder.vae.encode(pictures)
        plain = encoded.latent if "latent" in encoded else encoded.latent_dist.mean
        ours = decoder.encode(pictures, noise=torch.zeros_like(plain))
        config = decoder.vae.config
        shift = {"sd3": 0.06}.get(name, 0.0)
        torch.testing.assert_close(ours, (plain - shift) * config.scaling_factor)
        expected = (decoder.vae.decode(plain).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(decoder.decode(ours), expected, rtol=0, atol=1e-5)


def test_denoisers_get_what_their_pipelines_give_them() -> None:
    """The calls of the pipelines of diffusers, written out."""
    sample, condition = torch.randn(2, 4, 8, 8), torch.randn(2, Q, 32)
    times = torch.tensor([10.0, 900.0])
    with torch.no_grad():
        decoder = image_decoder("sana")
        plain = SanaTransformer2DModel.from_config(SANA).eval()
        plain.load_state_dict(decoder.denoiser.state_dict())
        ours = decoder.denoise(sample, times, condition, decoder.no_features(2))
        assert torch.equal(ours, plain(sample, condition, times * 0.5).sample)

        decoder = image_decoder("pixart, told the size")
        plain = PixArtTransformer2DModel.from_config(decoder.config.denoiser).eval()
        plain.load_state_dict(decoder.denoiser.state_dict())
        size = {"resolution": torch.tensor([[64.0, 64.0]] * 2), "aspect_ratio": torch.ones(2, 1)}
        ours = decoder.denoise(sample, times, condition, decoder.no_features(2))
        assert torch.equal(ours, plain(sample, condition, times, size).sample.chunk(2, dim=1)[0])

        decoder = image_decoder("sd3")
        plain = SD3Transformer2DModel.from_config(SD3).eval()
        plain.load_state_dict(decoder.denoiser.state_dict())
        sample = torch.randn(2, 16, 8, 8)
        pooled = decoder.pooled_projector(condition.mean(1))
        assert pooled.std() > 0.1
        ours = decoder.denoise(sample, times, condition, decoder.no_features(2))
        assert torch.equal(ours, plain(sample, condition, pooled, times).sample)


def save_pipeline(name: str, folder) -> None:
    """A pipeline as diffusers saves it, with its text encoders, for the denoisers of DIFFUSIONS."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 16
    end = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = end
    size = {"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    t5 = T5EncoderModel(T5Config(**size)).eval()
    fields = tiny_decoder_config(**DIFFUSIONS[name])
    denoiser = image_decoder(name).denoiser
    parts = {
        "transformer": getattr(diffusers, fields["denoiser"]["_class_name"]).from_config(denoiser.config),
        "vae": getattr(diffusers, fields["vae"]["_class_name"]).from_config(fields["vae"]),
    }
    parts["transformer"].load_state_dict(denoiser.state_dict())
    if name == "sd3":
        clip = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=12,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=12,
            eos_token_id=tokenizer.eos_token_id,
        )
        clips = {f"text_encoder{n}": CLIPTextModelWithProjection(clip).eval() for n in ("", "_2")}
        tokenizers = {f"tokenizer{n}": tokenizer for n in ("", "_2", "_3")}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline = StableDiffusion3Pipeline(**parts, **clips, **tokenizers, text_encoder_3=t5, scheduler=scheduler)
    elif name == "sana":
        gemma = AutoModel.from_config(AutoConfig.for_model(**text_config("gemma", model_type="gemma2"))).eval()
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        pipeline = SanaPipeline(**parts, text_encoder=gemma, tokenizer=tokenizer, scheduler=scheduler)
    else:
        scheduler = DPMSolverMultistepScheduler(beta_start=0.0002, beta_end=0.03)
        pipeline = PixArtSigmaPipeline(**parts, text_encoder=t5, tokenizer=tokenizer, scheduler=scheduler)
    pipeline.save_pretrained(folder / "diffusion")


@pytest.mark.parametrize("name", ["sd3", "sana", "pixart, told the size"])
def test_pipelines_bring_their_denoiser_and_their_empty_prompt(name: str, tmp_path) -> None:
    save_pipeline(name, tmp_path)
    AutoModel.from_config(vision_config("dinov2")).save_pretrained(tmp_path / "vision")
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path / "vision")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**text_config("qwen3"))).save_pretrained(tmp_path / "text")
    build_tokenizer().save_pretrained(tmp_path / "text")
    model = DeemForConditionalGeneration.from_vision_text_diffusion_pretrained(
        *(str(tmp_path / part) for part in ("vision", "text", "diffusion")),
        num_image_tokens=Q,
        feature_size=32,
        image_attention_heads=4,
        perceiver_config={"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1},
    )
    decoder = model.image_decoder
    DiffusersModel.from_pretrained(
        str(tmp_path / "diffusion"), subfolder="transformer"
    )  # changes how it reads configs
    assert drawn_size(str(tmp_path / "diffusion")) == decoder.config.target_size == SIDE
    if name == "pixart, told the size":
        assert isinstance(decoder.scheduler, DDPMScheduler)
        assert (decoder.scheduler.config.beta_end, decoder.scheduler.config.clip_sample) == (0.03, False)
    else:
        assert isinstance(decoder.scheduler, FlowMatchEulerDiscreteScheduler)
        assert decoder.scheduler.config.shift == 3.0

    # Without condition it denoises as the pipeline without prompt; Stable Diffusion 3 reads more tokens than we have.
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "diffusion")
    channels = decoder.denoiser.config.in_channels
    sample, times = torch.randn(2, channels, 8, 8), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        null = decoder.null_condition.expand(2, -1, -1)
        ours = decoder.denoise(sample, times, null, decoder.no_features(2))
        if name == "sd3":
            tokens, _, pooled, _ = pipeline.encode_prompt("", "", "", do_classifier_free_guidance=False)
            assert torch.equal(decoder.null_condition, tokens[:, :Q])
            tokens = tokens[:, :Q].repeat(2, 1, 1)
            theirs = pipeline.transformer(sample, tokens, pooled.repeat(2, 1), times).sample
        else:
            tokens, mask, _, _ = pipeline.encode_prompt("", num_images_per_prompt=2)
            assert mask[0].sum() == 1 and tokens.shape[1] == 300
            extra = {"encoder_attention_mask": mask}
            if name == "sana":
                times = times * 0.5
            else:
                size = {"resolution": torch.tensor([[64.0, 64.0]] * 2), "aspect_ratio": torch.ones(2, 1)}
                extra["added_cond_kwargs"] = size
            theirs = pipeline.transformer(sample, tokens, timestep=times, **extra).sample[:, :channels]
    assert ours.std() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_what_a_denoiser_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="'tokens\\+features'.*SanaTransformer2DModel"):
        image_decoder("sana", consistency_condition="tokens+features")
    assert image_decoder("sana").config.consistency_condition == "tokens"
    with pytest.raises(ValueError, match="16 channels.*takes 4"):
        image_decoder("pixart", vae={**VAE, "latent_channels": 16})
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        image_decoder("sd3", scheduler={**FLOW, "use_dynamic_shifting": True}).scheduler  # noqa: B018
    with pytest.raises(ValueError, match="'sample' is not supported"):
        image_decoder("unet", scheduler={**SCHEDULER, "prediction_type": "sample"}).scheduler  # noqa: B018
    with pytest.raises(ValueError, match="must give caption_channels"):
        image_decoder("pixart", denoiser={**PIXART, "caption_channels": None})
    with pytest.raises(ValueError, match="guidance_embeds"):
        image_decoder("sana", denoiser={**SANA, "guidance_embeds": True})
