# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Trains the small pretrained parts that a DEEM of the synthetic world starts from: minutes on two CPU cores.

    python recipes/parts.py --out runs/parts

    runs/parts/text/        LlamaForCausalLM with its tokenizer, trained on the world's texts (no pictures)
    runs/parts/vision/      ConvNextModel with its image processor, trained contrastively against captions that name
                            kinds, counts and colors: like real encoders it has no reason to keep the rest
    runs/parts/diffusion/   a StableDiffusionPipeline: VAE, UNet, and a text encoder trained jointly with the UNet

Each is an ordinary `save_pretrained` folder, and stands for the large checkpoint one would take instead. A part that is
there is not trained again; `--overwrite` trains all anew. Every part prints one line: its loss, its time, and a figure
on pictures or texts that it was not trained on.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    ConvNextConfig,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from trl import TrlParser

from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.tiny_diffusion import SIZE, new_scheduler, new_unet, new_vae
from recipes.synthetic.vocabulary import (
    COLORS,
    DETAILS,
    HELD_OUT,
    KINDS,
    UNSEEN,
    dominant_color,
    first_color,
    first_kind,
)

PARTS = ("text", "vision", "diffusion")
CAPTION_LENGTH = 32  # tokens the text encoders read
DIALOGUE = "You are a helpful assistant.\n\n ## USER: {user}\n ## ASSISTANT: {assistant}"
QUESTION = "Based on the image, please answer the question. "
DESCRIBE = ("Could you provide a short description of the image? ", "Describe the image in one sentence. ")


@dataclass
class PartsArguments:
    """Options of `recipes/parts.py`."""

    out: str = field(default="runs/parts", metadata={"help": "Folder of the parts: text/, vision/, diffusion/."})
    only: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": f"Parts to make, of {', '.join(PARTS)} (all)."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Train parts anew that are there already."})
    seed: int = field(default=0, metadata={"help": "Seed of the world, the initial weights and the batches."})
    num_pictures: int = field(default=6000, metadata={"help": "World pictures to train on."})
    num_texts: int = field(default=8000, metadata={"help": "World texts to train on, of each of three sorts."})
    num_held_out: int = field(default=300, metadata={"help": "Pictures or texts that the figures are measured on."})
    text_steps: int = field(default=300, metadata={"help": "Training steps of the language model."})
    vision_steps: int = field(default=800, metadata={"help": "Training steps of the vision encoder."})
    vae_steps: int = field(default=400, metadata={"help": "Training steps of the VAE."})
    unet_steps: int = field(default=600, metadata={"help": "Training steps of the UNet and its text encoder."})
    steps_scale: float = field(default=1.0, metadata={"help": "Multiplies all four numbers of steps."})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.only) - set(PARTS))
        if unknown:
            raise ValueError(f"--only {' '.join(unknown)}: no such part. Give one or more of {', '.join(PARTS)}.")
        for name in ("num_pictures", "num_texts", "num_held_out"):
            if getattr(self, name) < 8:
                raise ValueError(f"--{name} {getattr(self, name)} is too few to train or measure on. Give at least 8.")

    def steps(self, name: str) -> int:
        """Training steps of text, vision, vae or unet, scaled; at least one."""
        return max(1, round(getattr(self, f"{name}_steps") * self.steps_scale))


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def render(scenes: Iterable[Scene], what: str) -> Tensor:
    """The scenes' pictures as one tensor, (N, 3, 64, 64) uint8."""
    pictures = [torch.frombuffer(bytearray(scene.image.tobytes()), dtype=torch.uint8) for scene in tqdm(scenes, what)]
    return torch.stack(pictures).view(-1, SIZE, SIZE, 3).permute(0, 3, 1, 2).contiguous()


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 pictures as float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """Pictures (N, 3, H, W) in [-1, 1] as PIL pictures."""
    values = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(value) for value in values]


def world_texts(world: World, indices: range) -> Iterator[str]:
    """Per index a document, a caption (bare or as the answer of a dialogue) and a question with its answer."""
    for index in indices:
        scene = world.scene(index)
        caption = scene.caption(DETAILS[index % 3])
        yield " ".join(world.document(index).text_list)
        yield (
            DIALOGUE.format(user=DESCRIBE[index // 3 % 2], assistant=f"A photo of {caption}") if index % 2 else caption
        )
        questions = scene.questions()
        asked = questions[index * 7 % len(questions)]
        yield DIALOGUE.format(user=QUESTION + asked["question"], assistant=f"The answer is {asked['answer']}")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: reads any text, and every word of the world is one token. bos goes in front."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # eos must not be 2: CLIPTextModel takes a config with that value for an old one, and pools at another place
    special = ["<pad>", "</s>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return wrap_tokenizer(backend, template="<s> $A")


def wrap_tokenizer(backend: Tokenizer, template: str, **kwargs: Any) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer that puts the special tokens of `template` around a text `$A`."""
    backend = Tokenizer.from_str(backend.to_str())
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>") if token in template]
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=template, special_tokens=ids)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **names,
        **kwargs,
    )


def caption_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The language model's tokenizer as text encoders use it: bos in front, eos behind, at most 32 tokens."""
    return wrap_tokenizer(tokenizer.backend_tokenizer, template="<s> $A </s>", model_max_length=CAPTION_LENGTH)


def encode_captions(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Token ids, (N, 32), padded at the right."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(
    name: str,
    modules: list[nn.Module],
    loss_of: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    after_step: Callable[[], None] | None = None,
) -> float:
    """AdamW with warm-up and cosine decay; returns the mean loss of the last tenth of the steps."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=min(50, steps // 10), num_training_steps=steps
    )
    losses = []
    for module in modules:
        module.train()
    for _ in (bar := tqdm(range(steps), desc=name, unit=" steps")):
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    for module in modules:
        module.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def train_text(arguments: PartsArguments, folder: Path) -> str:
    """A language model of about one million parameters that knows how the world is talked about."""
    world = World(arguments.seed, SIZE)
    texts = list(world_texts(world, range(arguments.num_texts)))
    tokenizer = train_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)

    def rows(texts: list[str], length: int) -> Tensor:
        """Texts, each between bos and eos, one after the other in rows of equal length, (N, length)."""
        order = torch.randperm(len(texts)).tolist()
        ids = tokenizer([texts[i] + tokenizer.eos_token for i in order]).input_ids
        stream = torch.tensor([token for row in ids for token in row])
        return stream[: len(stream) // length * length].view(-1, length)

    data = rows(texts, length=128)

    def loss_of() -> Tensor:
        batch = data[torch.randint(len(data), (16,))]
        return model(input_ids=batch, labels=batch).loss

    loss = train("text", [model], loss_of, arguments.steps("text"), learning_rate=3e-3)
    held_out = rows(list(world_texts(world, range(HELD_OUT, HELD_OUT + arguments.num_held_out))), length=128)
    with torch.no_grad():
        surprise = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in held_out]).mean()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"loss {loss:.3f}; held-out perplexity {surprise.exp():.2f} per token ({len(tokenizer)} tokens)"


def text_encoder(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> CLIPTextModel:
    """A fresh text encoder that reads captions of at most `CAPTION_LENGTH` tokens."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CAPTION_LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def train_vision(arguments: PartsArguments, folder: Path) -> str:
    """A ConvNeXt whose pooled output says which kinds of objects are there, how many, and in which colors."""
    world = World(arguments.seed, SIZE)
    scenes = [world.scene(index) for index in range(arguments.num_pictures)]
    pictures = render(scenes, "vision pictures")
    captions = [scene.caption(detail) for scene in scenes for detail in ("coarse", "medium")]
    tokenizer = caption_tokenizer(PreTrainedTokenizerFast.from_pretrained(Path(arguments.out, "text")))
    config = ConvNextConfig(
        image_size=SIZE,
        patch_size=4,
        hidden_sizes=[32, 64, 128, 192],
        depths=[1, 1, 2, 1],
        layer_norm_eps=1e-6,
        layer_scale_init_value=1.0,  # the usual 1e-6, and weights of 0.02, are for training over many epochs
        initializer_range=0.08,
    )
    width = 64
    model, reader = ConvNextModel(config), text_encoder(tokenizer, width, layers=1)
    # Without batch norm all pictures, and without the mean over tokens all captions, look alike for most of the steps.
    projection = nn.Sequential(
        nn.BatchNorm1d(config.hidden_sizes[-1]), nn.Linear(config.hidden_sizes[-1], width, bias=False)
    )
    different = sorted(set(captions))
    ids, classes = encode_captions(tokenizer, different), {caption: i for i, caption in enumerate(different)}
    labels = torch.tensor([classes[caption] for caption in captions]).view(-1, 2)  # [N, 2]

    def similarities(pictures: Tensor, ids: Tensor) -> Tensor:
        """Cosine of every picture with every caption at temperature 0.07."""
        seen = F.normalize(projection(model(to_unit(pictures)).pooler_output), dim=-1)  # [N, 64]
        is_token = (ids != tokenizer.pad_token_id)[..., None]
        read = (reader(ids).last_hidden_state * is_token).sum(1) / is_token.sum(1)
        return seen @ F.normalize(read, dim=-1).T / 0.07

    def loss_of() -> Tensor:
        chosen = torch.randint(len(pictures), (64,))
        told = labels[chosen, int(torch.randint(2, ()))]  # kinds alone in half of the steps: they are learned slower
        logits = similarities(pictures[chosen], ids[told])
        same = (told[:, None] == told).float()  # pictures with equal captions are no negatives
        target = same / same.sum(1)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    loss = train("vision", [model, reader, projection], loss_of, arguments.steps("vision"), learning_rate=2e-3)
    unseen = [world.scene(HELD_OUT + i) for i in range(arguments.num_held_out)]
    with torch.no_grad():
        best = similarities(render(unseen, "vision held-out pictures"), ids).argmax(1).tolist()
    pairs = [(different[i], scene.main) for i, scene in zip(best, unseen, strict=True)]
    kind = sum(first_kind(text) == main.kind for text, main in pairs) / len(pairs)
    color = sum(first_color(text) == main.color for text, main in pairs) / len(pairs)
    model.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half).save_pretrained(folder)
    return (
        f"loss {loss:.3f}; held-out pictures whose best of {len(different)} captions names the right kind first "
        f"{kind:.1%}, the right color {color:.1%}"
    )


def train_vae(arguments: PartsArguments, pictures: Tensor) -> tuple[AutoencoderKL, float]:
    """The VAE, trained on uint8 pictures (N, 3, 64, 64), and its loss."""
    vae = new_vae()

    def loss_of() -> Tensor:
        batch = to_unit(pictures[torch.randint(len(pictures), (8,))]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        drawn = vae.decode(posterior.sample()).sample
        return F.mse_loss(drawn, batch) + 1e-6 * posterior.kl().mean()

    loss = train("vae", [vae], loss_of, arguments.steps("vae"), learning_rate=2e-3)
    return vae, loss


def in_batches(function: Callable[[Tensor], Tensor], values: Tensor, size: int = 100) -> Tensor:
    """The function's values, without gradients, computed `size` rows at a time."""
    with torch.no_grad():
        return torch.cat([function(batch) for batch in values.split(size)])


def train_diffusion(arguments: PartsArguments, folder: Path) -> str:
    """A latent diffusion model with the schedule of Stable Diffusion 2.1, in 64-pixel pictures of the world."""
    world = World(arguments.seed, SIZE)
    scenes = [world.scene(index) for index in range(arguments.num_pictures)]
    pictures = render(scenes, "diffusion pictures")
    tokenizer = caption_tokenizer(PreTrainedTokenizerFast.from_pretrained(Path(arguments.out, "text")))
    vae, vae_loss = train_vae(arguments, pictures)

    unseen = [world.scene(HELD_OUT + i) for i in range(arguments.num_held_out)]
    truth = to_unit(render(unseen, "diffusion held-out pictures"))
    redrawn = in_batches(lambda x: vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1), truth)
    psnr = -10 * ((redrawn - truth) / 2).square().mean((1, 2, 3)).log10().mean()
    kept = share_of_colors(to_pil(redrawn), [scene.main.color for scene in unseen])

    latents = in_batches(lambda x: vae.encode(to_unit(x)).latent_dist.mode(), pictures)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents = latents * vae.config.scaling_factor
    captions = torch.stack(
        [encode_captions(tokenizer, [scene.caption(detail) for scene in scenes]) for detail in ("medium", "full")]
    )  # [2, N, CAPTION_LENGTH]
    nothing = encode_captions(tokenizer, [""])
    reader = text_encoder(tokenizer, width=128, layers=2)
    unet, scheduler = new_unet(), new_scheduler()
    averages = [EMAModel(module.parameters(), decay=0.99) for module in (unet, reader)]

    def loss_of() -> Tensor:
        chosen = torch.randint(len(latents), (32,))
        target = latents[chosen]  # [32, 4, 8, 8]
        ids = captions[torch.randint(2, (32,)), chosen]  # [32, CAPTION_LENGTH]
        ids = torch.where(torch.rand(32, 1) < 0.1, nothing, ids)  # for classifier-free guidance
        noise, timesteps = torch.randn_like(target), torch.randint(1000, (32,))
        noisy = scheduler.add_noise(target, noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, reader(ids).last_hidden_state).sample, noise)

    def after_step() -> None:
        for average, module in zip(averages, (unet, reader), strict=True):
            average.step(module.parameters())

    loss = train("unet", [unet, reader], loss_of, arguments.steps("unet"), learning_rate=2e-3, after_step=after_step)
    for average, module in zip(averages, (unet, reader), strict=True):
        average.copy_to(module.parameters())

    pipeline = StableDiffusionPipeline(
        vae, reader, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    names = [(kind, color) for kind in KINDS for color in COLORS if (kind, color) not in UNSEEN]
    names = [names[i % len(names)] for i in range(min(100, arguments.num_held_out))]
    drawn = draw(pipeline, [f"a {color} {kind}" for kind, color in names], seed=arguments.seed)
    right = share_of_colors(drawn, [color for _, color in names])
    return (
        f"VAE loss {vae_loss:.4f}, held-out PSNR {psnr:.1f} dB, main color kept in {kept:.1%}; UNet loss {loss:.3f}, "
        f"{len(names)} pictures drawn from captions like 'a red circle' have the right color in {right:.1%}"
    )


def draw(pipeline: StableDiffusionPipeline, captions: list[str], seed: int) -> list[Image.Image]:
    """One picture per caption: DDIM, 25 steps, guidance 3."""
    scheduler, pipeline.scheduler = pipeline.scheduler, DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(desc="drawing", leave=False)
    generator = torch.Generator().manual_seed(seed)
    try:
        return pipeline(captions, num_inference_steps=25, guidance_scale=3.0, generator=generator).images
    finally:
        pipeline.scheduler = scheduler


def share_of_colors(pictures: list[Image.Image], colors: list[str]) -> float:
    """Share of pictures whose dominant color is the given one."""
    return sum(dominant_color(p) == color for p, color in zip(pictures, colors, strict=True)) / len(colors)


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, that gets its name only when all is written: what has the name is never half a part."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(unfinished, folder)


def make_parts(arguments: PartsArguments) -> tuple[str, str, str]:
    """Trains the parts that are not there yet; returns the folders of vision, text and diffusion."""
    # text comes first: the other two read captions with its tokenizer
    train_part = {"text": train_text, "vision": train_vision, "diffusion": train_diffusion}
    for name, function in train_part.items():
        folder = Path(arguments.out, name)
        if name not in arguments.only:
            continue
        if folder.exists() and not arguments.overwrite:
            print(f"{name}: there already, {folder} (--overwrite trains it anew)")
            continue
        if name != "text" and not Path(arguments.out, "text").exists():
            raise ValueError(
                f"The part {name!r} needs the tokenizer of the part 'text', and {Path(arguments.out, 'text')} is missing. "
                "Make it first, or leave out --only."
            )
        start = time.perf_counter()
        set_seed(arguments.seed)  # here, so that a part does not depend on which others were there already
        with whole_folder(folder) as unfinished:
            figures = function(arguments, unfinished)
            where = ("out", "only", "overwrite")  # what the part is does not depend on these
            settings = {key: value for key, value in asdict(arguments).items() if key not in where}
            settings["figures"] = figures
            (unfinished / "training.json").write_text(json.dumps(settings, indent=2) + "\n")
        print(f"{name}: {figures}; {time.perf_counter() - start:.0f} s, {folder}", flush=True)
    vision, text, diffusion = (str(Path(arguments.out, name)) for name in ("vision", "text", "diffusion"))
    return vision, text, diffusion


if __name__ == "__main__":
    make_parts(*TrlParser(PartsArguments, allow_abbrev=False).parse_args_and_config())
