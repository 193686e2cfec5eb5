# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What refining an encoder gains and costs: detail, separability of classes, drift of zero-shot labels.

    python tests/bench/refine.py --text runs/parts/text --data '../shared/photos/*.tar' --out runs/refine_bench

A small CLIP learns from captions of the synthetic world that name kinds and numbers alone. Then `recipes/refine_encoder.py`
refines it on unlabelled images, once per way (`--ways`). Before and after, linear probes read its pooled vectors of world
images: of what captions named (kind, number: separability) and of what they omitted (color, background, ...: detail); they
learn from 600 images and are tested on 1000. Drift is the share of world images that keep their zero-shot kind among four.
The loss of the way, and the error of redrawing, are measured on 200 images that were kept apart, with the same noise for the
encoder before and after its training, and under the tokens of another image. Writes `refine.json`, and prints it as a table.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from modeling_deem import DeemFeedback
from recipes import refine_encoder
from recipes.study.probes import CAPTIONED, OMITTED, Probe, label
from recipes.synthetic.parts.images import render
from recipes.synthetic.parts.optimization import train
from recipes.synthetic.parts.texts import CAPTION_LENGTH, caption_tokenizer, encode_captions
from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import HELD_OUT, KINDS
from recipes.training.refining import Images

WIDTH, SIDE, NUM_LABELLED, NUM_TESTED = 96, 64, 600, 1000
CONNECTOR = {"connector_std": 0.1, "connector": "linear", "width": 128, "num_layers": 4}
WAYS = {
    "denoise, all tokens": {},
    "denoise, global token": {"tokens": "global"},
    "contrastive, global token": {"tokens": "global", "objective": "contrastive", "num_negatives": 3},
}


def train_clip(text: str, folder: Path, world: World, steps: int, count: int) -> None:
    """Train a CLIP of two small towers against coarse captions, and the name of the main object's kind."""
    torch.manual_seed(0)
    tokenizer = caption_tokenizer(AutoTokenizer.from_pretrained(text))
    size = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    reader = CLIPTextConfig(
        **size, **ids, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=CAPTION_LENGTH
    )
    vision = CLIPVisionConfig(**size, num_hidden_layers=4, image_size=SIDE, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=reader, vision_config=vision, projection_dim=64))
    processor = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    scenes = [world.scene(index) for index in range(count)]
    mean, deviation = (torch.tensor(one).view(3, 1, 1) for one in (processor.image_mean, processor.image_std))
    images = (render(scenes, "images") / 255 - mean) / deviation
    texts = [[f"a photo of a {scene.main.kind}" for scene in scenes], [scene.caption("coarse") for scene in scenes]]
    different = [sorted(set(one)) for one in texts]
    tokens = [encode_captions(tokenizer, one) for one in different]
    labels = [torch.tensor([names.index(one) for one in said]) for names, said in zip(different, texts, strict=True)]

    def loss_of() -> torch.Tensor:
        chosen, which = torch.randint(count, (64,)), int(torch.randint(2, ()))
        seen = F.normalize(
            model.get_image_features(pixel_values=images[chosen], return_dict=True).pooler_output, dim=-1
        )
        read = model.get_text_features(input_ids=tokens[which], return_dict=True).pooler_output
        return F.cross_entropy(seen @ F.normalize(read, dim=-1).T / 0.07, labels[which][chosen])

    print(f"CLIP: loss {train('CLIP', [model], loss_of, steps, learning_rate=1e-3):.3f}")
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)


@torch.inference_mode()
def look(folder: Path, scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pooled vectors (N, W), and the zero-shot kind of each image, int64 (N,)."""
    model, processor = AutoModel.from_pretrained(folder).eval(), CLIPImageProcessorPil.from_pretrained(folder)
    words = encode_captions(AutoTokenizer.from_pretrained(folder), [f"a photo of a {kind}" for kind in KINDS])
    read = F.normalize(model.get_text_features(input_ids=words, return_dict=True).pooler_output, dim=-1)
    vectors, chosen = [], []
    for start in range(0, len(scenes), 100):
        pixels = processor([scene.image for scene in scenes[start : start + 100]], return_tensors="pt")["pixel_values"]
        vectors.append(model.vision_model(pixels).pooler_output)
        seen = F.normalize(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output, dim=-1)
        chosen.append((seen @ read.T).argmax(1))
    return torch.cat(vectors), torch.cat(chosen)


def probe(vectors: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Share of the last images that a probe of the first `NUM_LABELLED` tells rightly, by attribute."""
    found = {}
    for name in (*CAPTIONED, *OMITTED):
        labels = [label(scene, name) for scene in scenes]
        probe = Probe(vectors[:NUM_LABELLED], labels[:NUM_LABELLED])
        scores = probe.scores(vectors[NUM_LABELLED:], labels[NUM_LABELLED:])
        found[name] = sum(scores) / len(scores)
    return found


@torch.no_grad()
def redraw(feedback: DeemFeedback, encoder: Path, images: list[Image.Image]) -> dict[str, float]:
    """Return the feedback's loss, and its error of redrawing from an image's own tokens and from those of another."""
    vision = AutoModel.from_pretrained(encoder).vision_model.eval()
    processor, found = CLIPImageProcessorPil.from_pretrained(encoder), []
    for start in range(0, len(images), 20):
        batch = images[start : start + 20]
        targets = feedback.image_processor(batch)["target_pixel_values"]
        seen = vision(processor(batch, return_tensors="pt")["pixel_values"])
        other = type(seen)({name: value.roll(1, 0) for name, value in seen.items()})
        loss = feedback(seen, targets, generator=torch.Generator().manual_seed(start)).loss
        errors = [feedback.image_error(one, targets).image_errors.mean() for one in (seen, other)]
        found.append(torch.stack([loss, *errors]))
    return dict(zip(("loss", "own", "other"), torch.stack(found).mean(0).tolist(), strict=True))


def losses_of(log: list[dict[str, float]]) -> list[float]:
    """The logged losses of a stage: the first, and the mean of the last fifth."""
    losses = [entry["feedback_loss"] for entry in log if "feedback_loss" in entry]  # each a mean of 10 steps
    last = losses[-max(1, len(losses) // 5) :]
    return [losses[0], sum(last) / len(last)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="folder whose tokenizer reads the captions (recipes/parts.py)")
    parser.add_argument("--data", nargs="+", required=True, help="unlabelled images, as in refine_encoder.py")
    parser.add_argument("--out", type=Path, default=Path("runs/refine_bench"))
    parser.add_argument("--clip_steps", type=int, default=1500)
    parser.add_argument("--connector_steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", default="3e-4")
    parser.add_argument("--keep", default="0")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    world, clip = World(size=SIDE, max_objects=3), args.out / "clip"
    if not (clip / "model.safetensors").is_file():
        train_clip(args.text, clip, world, args.clip_steps, count=3000)
    names = args.out / "kinds.txt"
    names.write_text("\n".join(KINDS), encoding="utf-8")
    scenes = [world.scene(HELD_OUT + index) for index in range(NUM_LABELLED + NUM_TESTED)]
    vectors, before = look(clip, scenes)
    unseen = Images(args.data)  # the last 200, which refine_encoder.py keeps apart
    kept = [unseen[index]["image"] for index in range(len(unseen) - 200, len(unseen))]
    truth = torch.tensor([KINDS.index(scene.main.kind) for scene in scenes])
    found = {"before": probe(vectors, scenes) | {"zero-shot kind": float((before == truth).float().mean())}}
    for way in args.ways:
        folder = args.out / way.replace(", ", "_").replace(" ", "_")
        flags = ["--encoder", str(clip), "--data", *args.data, "--class_names", str(names), "--keep", args.keep]
        flags += ["--feedback", json.dumps({**CONNECTOR, **WAYS[way]}), "--output_dir", str(folder)]
        flags += ["--max_steps", str(args.steps), "--connector_steps", str(args.connector_steps), "--use_cpu", "true"]
        flags += ["--learning_rate", args.learning_rate, "--connector_learning_rate", "1e-3", "--disable_tqdm", "true"]
        report = refine_encoder.main(flags)
        feedback = DeemFeedback.from_pretrained(folder / "feedback").eval()
        redrawing = {when: redraw(feedback, one, kept) for when, one in (("before", clip), ("after", folder))}
        vectors, after = look(folder, scenes)
        found[way] = probe(vectors, scenes) | {
            "zero-shot kind": float((after == truth).float().mean()),
            "labels kept": float((after == before).float().mean()),
            "labels kept, images refined on": report["drift"]["zero_shot_agreement"],
            "redrawing": redrawing,
            "losses": {stage: losses_of(log) for stage, log in report["log"].items() if log},
            "seconds": sum(log[-1]["train_runtime"] for log in report["log"].values() if log),
        }
        (args.out / "refine.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name in (*CAPTIONED, *OMITTED, "zero-shot kind", "labels kept", "labels kept, images refined on"):
        print(f"{name:32}" + "".join(f"{100 * one[name]:8.1f}" if name in one else " " * 8 for one in found.values()))
    print("columns:", "; ".join(found))
    for way in args.ways:
        print(way, json.dumps(found[way]["losses"]), f"{found[way]['seconds']:.0f} s")
        print(" " * 8, json.dumps(found[way]["redrawing"]))


if __name__ == "__main__":
    main()
