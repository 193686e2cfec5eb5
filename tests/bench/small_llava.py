# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What the feedback keeps in a small LLaVA that learns from captions which omit most of an image, under control.

    python tests/bench/small_llava.py --parts runs/parts --out runs/small_llava [--seeds 0 1 2]

A LLaVA of transformers' own class: vision encoder (its last map, 4 tokens) and frozen language model of `recipes/parts.py`.
Encoder and projector train on images of one or two objects of the synthetic world, with captions of kinds and numbers alone.
Arms, from the same weights on the same batches: `text`; `feedback`, with the consistency loss; `exchanged`, the same with
another image's latents as target, so that there is nothing to gain. Then the encoder is frozen, and of 600 labelled images

- linear probes learn, from the mean of the encoder's tokens, what captions said and what they omitted;
- a new projector and the language model learn questions about the same (`--answer_steps`).

Both are tested on 400 others. Writes `small_llava.json` after each run, goes on from it, and prints means over seeds with the
95 % interval of the differences (Student's quantile; a seed is one observation).
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_deem import DeemFeedback
from recipes.diagnosis.answers import ASKED, questions_of
from recipes.evaluation.scoring.intervals import mean_interval
from recipes.study.probes import CAPTIONED, OMITTED, Probe, label
from recipes.synthetic.parts.images import render, to_unit
from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import HELD_OUT

ARMS = ("text", "feedback", "exchanged")
TOKENS, NUM_TRAINED, NUM_LABELLED, NUM_TESTED, BATCH = 4, 2400, 600, 400, 32
PROBED = (*CAPTIONED, *OMITTED)
IGNORED = -100


class MapTokens(nn.Module):
    """A convolutional encoder whose last map (N, W, h, w) is given as tokens (N, h * w, W), as LLaVA expects them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config

    def forward(self, pixel_values: torch.Tensor, **kwargs: object) -> BaseModelOutputWithPooling:
        tokens = self.encoder(pixel_values).last_hidden_state.flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


@dataclass
class Data:
    """Scenes with their images, float32 (N, 3, 64, 64) in [-1, 1]; latents, of what is trained on."""

    scenes: list[Scene]
    images: torch.Tensor
    latents: torch.Tensor | None = None


def compose(parts: Path, seed: int) -> tuple[LlavaForConditionalGeneration, AutoTokenizer]:
    """Return the LLaVA, whose projector alone is random, and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(parts / "text")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    language_model = AutoModelForCausalLM.from_pretrained(parts / "text")
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    encoder = AutoModel.from_pretrained(parts / "vision")
    vision = encoder.config.to_dict() | {"hidden_size": encoder.config.hidden_sizes[-1]}
    config = LlavaConfig(
        vision_config=vision,
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language_model.config.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language_model.base_model.state_dict())
    model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    model.model.vision_tower = MapTokens(encoder)
    return model.float(), tokenizer


def rows_of(tokenizer: AutoTokenizer, said: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Return inputs of prompts behind an image and what is to be written behind them, with eos; padded on the right."""
    rows, labels = [], []
    for prompt, written in said:
        front = tokenizer("<image>" * TOKENS + prompt).input_ids
        behind = [*tokenizer(written, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        behind = [one for one in behind if one != tokenizer.bos_token_id]
        rows.append(front + behind)
        labels.append([IGNORED] * len(front) + behind)
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels]),
    }


def schedule_of(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)


def train(
    model: LlavaForConditionalGeneration,
    tokenizer: AutoTokenizer,
    feedback: DeemFeedback,
    data: Data,
    arm: str,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """Train encoder and projector; return the mean losses of the last tenth of the steps."""
    model.requires_grad_(False)
    trained = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    for one in trained:
        one.requires_grad_(True)
    learns = [one for one in feedback.parameters() if one.requires_grad] if arm != "text" else []
    optimizer = torch.optim.AdamW([*trained, *learns], lr=1e-3, weight_decay=0.01)
    schedule, order = schedule_of(optimizer, steps), torch.Generator().manual_seed(seed)
    noise, losses = torch.Generator().manual_seed(seed), {"text": [], "consistency": []}
    for _ in range(steps):
        chosen = torch.randint(len(data.scenes), (BATCH,), generator=order)
        inputs = rows_of(tokenizer, [("", data.scenes[index].caption("coarse")) for index in chosen])
        images = model.get_image_features(pixel_values=data.images[chosen], return_dict=True)
        loss = model(**inputs, mm_encoder_outputs={"image": images}).loss
        losses["text"].append(loss.item())
        if arm != "text":
            latents = data.latents[chosen if arm == "feedback" else chosen.roll(1)]
            consistency = feedback(images, target_latents=latents, generator=noise).loss
            losses["consistency"].append(consistency.item())
            loss = loss + feedback.config.loss_weight * consistency
        loss.backward()
        nn.utils.clip_grad_norm_([*trained, *learns], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: sum(one[-steps // 10 :]) / len(one[-steps // 10 :]) for name, one in losses.items() if one}


@torch.no_grad()
def encode(model: LlavaForConditionalGeneration, images: torch.Tensor) -> torch.Tensor:
    """Return the encoder's tokens, (N, 4, W)."""
    return torch.cat([model.model.vision_tower(piece).last_hidden_state for piece in images.split(100)])


def probe(labelled: Data, tested: Data, tokens: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Return how often probes of the mean token are right, by attribute."""
    found = {}
    for name in PROBED:
        learned = Probe(tokens[0].mean(1), [label(scene, name) for scene in labelled.scenes])
        scores = learned.scores(tokens[1].mean(1), [label(scene, name) for scene in tested.scenes])
        found[name] = sum(scores) / len(scores)
    return found


def answers(
    model: LlavaForConditionalGeneration,
    tokenizer: AutoTokenizer,
    labelled: Data,
    tested: Data,
    tokens: tuple[torch.Tensor, torch.Tensor],
    steps: int,
    seed: int,
) -> dict[str, float]:
    """Train a new projector and the language model to answer about frozen tokens; return how often each attribute is right.

    An answer is right where every token of it, the eos included, is the likeliest behind those before: so greedy decoding
    writes exactly it.
    """
    torch.manual_seed(seed)
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector
    scale = model.get_input_embeddings().weight.std().item()  # as large as words
    for layer in projector.children():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    mean, deviation = tokens[0].mean((0, 1)), tokens[0].std((0, 1)) + 1e-6
    trained = [*projector.parameters(), *model.model.language_model.parameters(), *model.lm_head.parameters()]
    trained = list({id(one): one for one in trained}.values())
    for one in trained:
        one.requires_grad_(True)

    def read(rows: torch.Tensor, asked: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images = BaseModelOutputWithPooling(pooler_output=list(projector((rows - mean) / deviation) * scale))
        inputs = rows_of(tokenizer, [(f" {question}", f" {answer}") for question, answer in asked])
        outputs = model(**inputs, mm_encoder_outputs={"image": images})
        return outputs.loss, outputs.logits[:, :-1].argmax(-1), inputs["labels"][:, 1:]

    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    schedule, names = schedule_of(optimizer, steps), list(ASKED)
    for _ in range(steps):
        chosen = torch.randint(len(labelled.scenes), (BATCH,)).tolist()
        asked = [questions_of(labelled.scenes[i])[names[int(torch.randint(len(names), ()))]] for i in chosen]
        read(tokens[0][chosen], asked)[0].backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    found = {}
    with torch.no_grad():
        for name in names:
            right = []
            for start in range(0, len(tested.scenes), 100):
                asked = [questions_of(scene)[name] for scene in tested.scenes[start : start + 100]]
                _, best, truth = read(tokens[1][start : start + 100], asked)
                right += ((best == truth) | (truth == IGNORED)).all(1).tolist()
            found[name] = sum(right) / len(right)
    return found


def run(args: argparse.Namespace, seed: int, arm: str, sets: dict[str, Data]) -> dict[str, dict[str, float]]:
    """Train and measure one arm of one seed; the arm "before" trains nothing."""
    model, tokenizer = compose(args.parts, seed)
    feedback = DeemFeedback.from_diffusion_pretrained(str(args.parts / "diffusion"), model, connector="linear")
    if sets["trained"].latents is None:
        with torch.no_grad():
            sets["trained"].latents = torch.cat([feedback.encode(piece) for piece in sets["trained"].images.split(50)])
    found: dict[str, dict[str, float]] = {}
    if arm != "before":
        found["losses"] = train(model, tokenizer, feedback, sets["trained"], arm, args.steps, seed)
    model.eval()
    tokens = encode(model, sets["labelled"].images), encode(model, sets["tested"].images)
    found["probes"] = probe(sets["labelled"], sets["tested"], tokens)
    found["answers"] = answers(model, tokenizer, sets["labelled"], sets["tested"], tokens, args.answer_steps, seed)
    return found


def print_table(found: dict[str, dict[str, dict[str, float]]], seeds: list[int]) -> None:
    """Print means over seeds, and the differences with their intervals."""
    for kind in ("probes", "answers"):
        print(
            f"\n{kind:12} "
            + " ".join(f"{arm:>26}" for arm in ("before", *ARMS))
            + "  feedback-text  feedback-exchanged"
        )
        for name in PROBED if kind == "probes" else ASKED:
            cells, of_arm = [], {}
            for arm in ("before", *ARMS):
                of_arm[arm] = [100 * found[f"{seed}:{arm}"][kind][name] for seed in seeds if f"{seed}:{arm}" in found]
                each = ", ".join(f"{value:.1f}" for value in of_arm[arm])
                cells.append(f"{sum(of_arm[arm]) / max(1, len(of_arm[arm])):5.1f} ({each})".rjust(26))
            for other in ("text", "exchanged"):
                gains = [a - b for a, b in zip(of_arm["feedback"], of_arm[other], strict=False)]
                if len(gains) > 1:
                    one = mean_interval(gains, bounds=(-100, 100))
                    cells.append(f"{one.value:+6.1f} [{one.low:+.1f}, {one.high:+.1f}]")
            print(f"{name:12} " + " ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, required=True, help="folder of recipes/parts.py")
    parser.add_argument("--out", type=Path, default=Path("runs/small_llava"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--answer_steps", type=int, default=400)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "small_llava.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    world, sets = World(max_objects=2), {}
    for name, first, count in (
        ("trained", 0, NUM_TRAINED),
        ("labelled", 500_000, NUM_LABELLED),
        ("tested", HELD_OUT, NUM_TESTED),
    ):
        scenes = [world.scene(first + index) for index in range(count)]
        sets[name] = Data(scenes, to_unit(render(scenes, name)))
    for seed in args.seeds:
        for arm in ("before", *ARMS):
            if f"{seed}:{arm}" not in found:
                found[f"{seed}:{arm}"] = run(args, seed, arm, sets)
                file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(seed, arm, json.dumps(found[f"{seed}:{arm}"]), flush=True)
    print_table(found, args.seeds)


if __name__ == "__main__":
    main()
