# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The model card of a repo folder, from its config and from what training and evaluation left beside the checkpoint."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

CARD = """---
{metadata}
---

# {name}

A [DEEM](https://arxiv.org/abs/2405.15232) model: a language model that reads and draws images, and whose image encoder is
corrected by its own drawings. Its code lies beside the weights, from [modeling_deem.py]({code}) on{source}.

## How to load

```python
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

model = AutoModelForImageTextToText.from_pretrained("{repo}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)

content = [{{"type": "image", "image": "a.png"}}, {{"type": "text", "text": {question}}}]
chat = [{{"role": "user", "content": content}}]
pipe = pipeline("image-text-to-text", model="{repo}", trust_remote_code=True)
pipe(text=chat, max_new_tokens=20, return_full_text=False)

{draw}```

With the package installed, `import modeling_deem` takes the place of `trust_remote_code=True`. It needs
{needs}.

## Parts

{parts}

Images are {fitted} {size} pixels{drawn}. One image takes {image_tokens} image tokens.

## Losses

{losses}

## Training data

Of the last training; what its starting point was trained on is not recorded here. A row counts once, a sample in every
pass over its row.

{data}

## Training settings

{settings}

## Evaluation

{evaluation}

## Limits

The model can repeat what its parts and its training data contain, errors and prejudices included. DEEM trains nothing
against that: do not put its words or images before people without a check. {measured}

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


DRAWING_STEPS = 25
REQUIREMENTS = ("torch>=2.6", "transformers>=5.23,<5.24", "diffusers>=0.42")  # of pyproject.toml
DRAW = """inputs = processor(text={caption}, return_tensors="pt")
model.generate_images(**inputs, num_inference_steps={steps})  # (1, 3, H, H) in [0, 1]
"""
# Names of files and folders that say nothing of what is in them.
NAMELESS = re.compile(r"(data|train|training|val|validation|test|metadata|captions?|images?|annotations?|rows|\d+)\d*")
HUB, HUB_PAGE = "hub:", "https://huggingface.co/datasets/"


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
    return table(("loss", "what it asks", "weight", "last mean logged"), rows)


def evaluation_table(metrics: dict[str, Any]) -> str:
    """Figures of `metrics.json`: either plain numbers, or `{what, value, chance, count}`."""
    rows = []
    for name, figure in metrics.items():
        figure = figure if isinstance(figure, dict) else {"value": figure}
        if isinstance(value := figure.get("value"), int | float):
            rows.append((figure.get("what", name), f"{value:.4g}", figure.get("chance", ""), figure.get("count", "")))
    return table(("figure", "value", "chance", "samples"), rows) if rows else "No figures were recorded."


def limits(metrics: dict[str, Any], benchmarks: bool = False) -> str:
    """What the figures say against the model: how often it was wrong, and what was no better than chance.

    Args:
        benchmarks: whether figures of benchmarks stand under Evaluation, too.
    """
    lines = []
    for name, figure in metrics.items():
        if not isinstance(figure, dict) or not {"value", "chance", "count"} <= figure.keys():
            continue
        wrong = round((1 - figure["value"]) * figure["count"])
        chance = ", no better than chance" * (figure["value"] <= figure["chance"])
        lines.append(f"- {figure.get('what', name)}: not so in {wrong:,} of {figure['count']:,}{chance}.")
    rest = "Measured is what stands under Evaluation; no other figure is recorded."
    if lines:
        return "\n".join([f"{rest} Of it:", "", *lines])
    return rest if metrics or benchmarks else "No figure is recorded."


def settings_table(state: dict[str, Any], parts: dict[str, Any], arguments: dict[str, Any]) -> str:
    """How it was trained, as far as training wrote it down.

    Args:
        state, parts, arguments: of `trainer_state.json`, `parts.json`, `training_args.json`; {} where there is none.
    """
    rows = []
    if state.get("global_step"):
        rows.append(("optimizer steps", f"{state['global_step']:,}"))
    if arguments:
        factors = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
        sizes = [arguments[name] for name in factors]
        division = "{} per micro-batch x {} micro-batches x {} processes".format(*sizes)
        rows.append(("sequences per step", f"{math.prod(sizes):,} ({division})"))
        betas = ", ".join(f"{arguments[name]:g}" for name in ("adam_beta1", "adam_beta2"))
        rows.append(("optimizer", f"{arguments['optim']}, betas {betas}, epsilon {arguments['adam_epsilon']:g}"))
        rows.append(("schedule", f"{arguments['lr_scheduler_type']}, warm-up {arguments['warmup_steps']:g}"))
        rows.append(("seed", arguments["seed"]))
        rows.append(("precision", next((name for name in ("bf16", "fp16") if arguments[name]), "as the weights")))
    elif (size := state.get("train_batch_size")) is not None:
        rows.append(("sequences per process and micro-batch", size))
    rates = [log["learning_rate"] for log in state.get("log_history", []) if "learning_rate" in log]
    if rates:
        rows.append(("highest learning rate logged", f"{max(map(float, rates)):.3g}"))
    for part, row in parts.items():
        if row["trainable"]:
            lr = ", ".join(f"{rate:.3g}" for rate in row["lr"])
            rows.append((f"`{part}` trains", f"{row['trainable']:,} parameters at a rate of at most {lr}"))
    return table(("setting", "value"), rows) if rows else "Not recorded."


def data_set(source: str) -> str:
    """The name of the data set that a source of `--data` is; no path, nor the form in which its captions were used."""
    source = re.sub(r"( \((describe|draw|number \d+)\))+$", "", source)
    if source.startswith(HUB):
        return source.removeprefix(HUB)
    names = list(Path(source).parts)
    pieces = [re.sub(r"\.[A-Za-z]\w*$", "", name) if at == len(names) - 1 else name for at, name in enumerate(names)]
    pieces = [piece for piece in pieces if re.search(r"\w", piece) and not re.search(r"[*?\[{~]", piece)]
    telling = [piece for piece in pieces if not NAMELESS.fullmatch(piece)]
    return (telling or pieces or ["unnamed"])[-1]


def data_table(report: dict[str, Any], names: dict[str, str]) -> str:
    """Data sets with their rows and samples; sources of one data set in several forms are one line.

    Args:
        report: of `data_report.json`.
        names: what to call a source, if not by `data_set`.
    """
    sets: dict[str, list[dict[str, Any]]] = {}
    for source, counts in report.items():
        bare = re.sub(r" \((describe|draw)\)$", "", source)
        name = names.get(bare) or data_set(source)
        if bare.startswith(HUB):
            name = f"[{name}]({HUB_PAGE}{data_set(source).split(':')[0]})"
        sets.setdefault(name, []).append(counts)
    rows = []
    for name, forms in sets.items():
        known = sum(counts["rows"] for counts in forms) if all("rows" in counts for counts in forms) else None
        unusable = sum(fault["count"] for counts in forms for fault in counts["skipped"].values())
        rows.append(
            (
                name,
                "not recorded" if known is None else f"{known:,}",
                f"{sum(counts['read'] for counts in forms):,}",
                f"{sum(counts.get('dropped_by_rule', 0) for counts in forms):,}",
                f"{unusable:,}",
            )
        )
    return table(("data set", "rows", "samples in all passes", "left out by rule", "unusable"), rows)


def examples(report: dict[str, Any]) -> dict[str, str]:
    """A question and a caption that the model was trained on, where there are."""
    found: dict[str, str] = {}
    for counts in report.values():
        found = {**counts.get("example", {}), **found}
    return found


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
    question: str | None = None,
    caption: str | None = None,
    code: str | None = None,
    data_names: dict[str, str] | None = None,
    benchmarks: Sequence[EvalResult] = (),
    benchmark_tables: str = "",
) -> None:
    """Write the model card README.md of a repo folder.

    Args:
        metrics: of `metrics.json`, see `evaluation_table`.
        question, caption: what the example asks and draws; of the training data where it recorded any.
        code: address of the code's own repository.
        data_names: what to call sources of the training data.
        benchmarks, benchmark_tables: of `model_index`.
    """
    config, processor = _read_json(folder / "config.json"), _read_json(folder / "processor_config.json")
    images, decoder = processor["image_processor"], config.get("image_decoder_config")
    size, target = (f"{images[key]['height']}x{images[key]['width']}" for key in ("size", "target_size"))
    report, state = find_record(checkpoint, "data_report.json"), find_record(checkpoint, "trainer_state.json")
    records = [find_record(checkpoint, name) for name in ("parts.json", "training_args.json")]
    own = examples(report)
    caption = caption or own.get("caption") or "an image"
    hub = [source for source in report if source.startswith(HUB)]
    metadata = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["deem", "multimodal", "diffusion", "custom_code"],
        base_model=list(base_models) or None,
        datasets=sorted({data_set(source).split(":")[0] for source in hub}) or None,
        model_name=repo.rpartition("/")[2],
        eval_results=list(benchmarks) or None,
    )
    figures = [evaluation_table(metrics)] * bool(metrics or not benchmark_tables) + [benchmark_tables]
    card = CARD.format(
        metadata=metadata.to_yaml(),
        name=repo.rpartition("/")[2],
        repo=repo,
        code=f"https://huggingface.co/{repo}/blob/main/modeling_deem.py",
        source=f"; it comes from {code}" if code else "",
        needs=", ".join(f"`{one}`" for one in REQUIREMENTS),
        parts=parts_table(folder, config, licences or {}),
        size=size,
        fitted="cropped about the center to" if images.get("do_center_crop") else "squashed to",
        drawn=f" and drawn at {target}" if decoder else "; this model does not draw",
        image_tokens=processor["num_image_tokens"],
        losses=losses_table(config, state),
        settings=settings_table(state, *records),
        question=json.dumps(question or own.get("question") or "What is this?", ensure_ascii=False),
        draw=DRAW.format(caption=json.dumps(caption, ensure_ascii=False), steps=DRAWING_STEPS) if decoder else "",
        measured=limits(metrics, bool(benchmark_tables)),
        data=data_table(report, data_names or {}) if report else "Not recorded.",
        evaluation="\n\n".join(figures).strip(),
        licences=", as in the table above" if licences else ", which were not recorded here",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
