# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The model card of a repo folder, from its config and from what training and evaluation left beside the checkpoint."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from safetensors import safe_open

CARD = """---
{metadata}
---

# {name}

A [DEEM](https://arxiv.org/abs/2405.15232) model: a language model that reads and draws images, and whose image encoder is
corrected by its own drawings. The code lies beside the weights.

## How to load

```python
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

model = AutoModelForImageTextToText.from_pretrained("{repo}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)

chat = [{{"role": "user", "content": [{{"type": "image", "image": "a.png"}}, {{"type": "text", "text": "{question}"}}]}}]
pipe = pipeline("image-text-to-text", model="{repo}", trust_remote_code=True)
pipe(text=chat, max_new_tokens=20, return_full_text=False)

inputs = processor(text="{caption}", return_tensors="pt")
model.generate_images(**inputs, num_inference_steps=25)  # (1, 3, H, H) in [0, 1]
```

With the package installed, `import modeling_deem` takes the place of `trust_remote_code=True`. Needs `torch`,
`transformers>=5.23` and `diffusers>=0.42`.

## Parts

{parts}

Images are read at {size} pixels{drawn}. One image takes {image_tokens} image tokens.

## Losses

{losses}

## Training data

Of the last stage; what its starting point was trained on stands in that one's card. A sample counts in every pass.

{data}

## Training settings

{settings}

## Evaluation

{evaluation}

## Limits

The model repeats what its parts and its training data contain, errors and prejudices included. It has had no safety
training: do not put its words or images before people without a check. {measured}

## Citing

```bibtex
@inproceedings{{luo2025deem,
  title     = {{{{DEEM}}: Diffusion models serve as the eyes of large language models for image perception}},
  author    = {{Luo, Run and others}},
  booktitle = {{International Conference on Learning Representations}},
  year      = {{2025}},
}}
```

## Licences

The code is under the Apache License 2.0. The weights are subject to the licences of the parts they grew from{licences}.
"""


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def parameter_counts(folder: Path) -> Counter:
    """Parameters per part, from the headers of the weight files."""
    counts: Counter = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as weights:
            for name in weights.keys():
                pieces = name.removeprefix("model.").split(".")
                part = pieces[1] if pieces[0] == "image_decoder" else pieces[0]
                counts[part] += math.prod(weights.get_slice(name).get_shape())
    return counts


def parts_table(folder: Path, config: dict[str, Any], licences: dict[str, str]) -> str:
    """What the model is made of: kind, size and licence of each part."""
    counts, decoder = parameter_counts(folder), config.get("image_decoder_config")
    unknown = "not recorded"
    parts = [
        ("vision encoder", config["vision_config"]["model_type"], "vision_tower", "vision"),
        ("language model", config["text_config"]["model_type"], "language_model", "text"),
    ]
    if decoder:
        parts.append(("denoiser", decoder["denoiser"]["_class_name"], "denoiser", "diffusion"))
        parts.append(("VAE", decoder["vae"]["_class_name"], "vae", "diffusion"))
    rows = [(what, kind, f"{counts.pop(part, 0):,}", licences.get(key, unknown)) for what, kind, part, key in parts]
    rows.append(("what joins them", "DEEM", f"{sum(counts.values()):,}", "as the whole"))
    return table(("part", "kind", "parameters", "licence"), rows)


def losses_table(config: dict[str, Any], trainer_state: dict[str, Any]) -> str:
    """Weights of the three losses, and their last logged values where training left a log."""
    kinds = {
        "text_loss": "cross-entropy of the next token",
        "image_loss": "drawing the next image from the text before it",
        "consistency_loss": "redrawing each image from its own image tokens",
    }
    if not config.get("image_decoder_config"):
        kinds = {"text_loss": kinds["text_loss"]}
    rows = []
    for name, what in kinds.items():
        logged = [entry for entry in trainer_state.get("log_history", []) if name in entry]
        last = f"{logged[-1][name]:.4g} at step {logged[-1]['step']}" if logged else "not recorded"
        rows.append((name, what, config.get(f"{name}_weight", "default"), last))
    return table(("loss", "what it asks", "weight", "last value"), rows)


def evaluation_table(metrics: dict[str, Any]) -> str:
    """Figures of `metrics.json`: either plain numbers, or `{what, value, chance, count}`."""
    rows = []
    for name, figure in metrics.items():
        figure = figure if isinstance(figure, dict) else {"value": figure}
        if isinstance(value := figure.get("value"), int | float):
            rows.append((figure.get("what", name), f"{value:.4g}", figure.get("chance", ""), figure.get("count", "")))
    return table(("figure", "value", "chance", "samples"), rows) if rows else "No figures were recorded."


def settings_table(trainer_state: dict[str, Any], parts: dict[str, Any]) -> str:
    """Steps, passes and what trained at which rate, as far as training wrote them down (`trainer_state.json`, `parts.json`)."""
    rows = []
    if trainer_state.get("global_step"):
        rows.append(("optimizer steps", trainer_state["global_step"]))
    if (size := trainer_state.get("train_batch_size")) is not None:
        rows.append(("samples per process and micro-batch", size))
    rates = [log["learning_rate"] for log in trainer_state.get("log_history", []) if "learning_rate" in log]
    if rates:
        rows.append(("highest learning rate logged", f"{max(map(float, rates)):.3g}"))
    for part, row in parts.items():
        if row["trainable"]:
            lr = ", ".join(f"{rate:.3g}" for rate in row["lr"])
            rows.append((f"`{part}` trains", f"{row['trainable']:,} parameters at a rate of {lr}"))
    return table(("setting", "value"), rows) if rows else "Not recorded."


def find_record(checkpoint: Path, *names: str) -> dict[str, Any]:
    """A JSON file that training or evaluation left with the checkpoint, or beside a `checkpoint-<step>`; {} if none."""
    folders = [checkpoint, *([checkpoint.parent] if checkpoint.name.startswith("checkpoint-") else [])]
    paths = (folder / name for folder in folders for name in names)
    return next((_read_json(path) for path in paths if path.is_file()), {})


def write_card(
    folder: Path,
    checkpoint: Path,
    repo: str,
    metrics: dict[str, Any],
    licence: str = "other",
    licences: dict[str, str] | None = None,
    base_models: Sequence[str] = (),
    question: str = "What is this?",
    caption: str = "a red circle",
) -> None:
    """Write the model card README.md of a repo folder.

    Args:
        metrics: of `metrics.json`, see `evaluation_table`.
        question, caption: what the example asks and draws; give one of the data that the model was trained on.
    """
    config, processor = _read_json(folder / "config.json"), _read_json(folder / "processor_config.json")
    size, target = (
        f"{value['height']}x{value['width']}"
        for value in (processor["image_processor"][key] for key in ("size", "target_size"))
    )
    data = find_record(checkpoint, "data_report.json")
    sources = [
        (Path(name).name, f"{counts['read']:,}", counts.get("dropped_by_rule", 0)) for name, counts in data.items()
    ]
    state = find_record(checkpoint, "trainer_state.json")
    figures = evaluation_table(metrics)
    measured = "What was measured stands under Evaluation; nothing else was." if metrics else "Nothing was measured."
    metadata = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["deem", "multimodal", "diffusion", "custom_code"],
        base_model=list(base_models) or None,
    )
    card = CARD.format(
        metadata=metadata.to_yaml(),
        name=repo.rpartition("/")[2],
        repo=repo,
        parts=parts_table(folder, config, licences or {}),
        size=size,
        drawn=f" and drawn at {target}" if config.get("image_decoder_config") else "; this model does not draw",
        image_tokens=processor["num_image_tokens"],
        losses=losses_table(config, state),
        settings=settings_table(state, find_record(checkpoint, "parts.json")),
        question=question,
        caption=caption,
        measured=measured,
        data=table(("data set", "samples", "left out by rule"), sources) if sources else "Not recorded.",
        evaluation=figures,
        licences=", as in the table above" if licences else ", which were not recorded here",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
