# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A vision encoder alone under the feedback: unlabelled images, the loss, and what zero-shot labels drift (recipes/refine_encoder.py)."""

import copy
import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, Value, concatenate_datasets, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoTokenizer, BaseImageProcessor, PreTrainedModel

from modeling_deem import DeemFeedback
from modeling_deem.feedback_images_deem import FeedbackImageProcessor
from modeling_deem.vision_deem import is_staged
from recipes.data.faults import BadSample
from recipes.data.readers.images import IMAGE_SUFFIXES, open_image

NAFLEX = "siglip2_vision_model"


def load_towers(folder: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model and its part that sees, which is the model itself where it has no text tower.

    Raises:
        ValueError: the encoder is of no supported family.
    """
    whole = AutoModel.from_pretrained(folder)
    vision = whole.vision_model if hasattr(whole.config, "text_config") else whole
    is_staged(vision.config)  # raises for families that do not fit
    if vision.config.model_type == NAFLEX:
        raise ValueError(
            f"{folder} is a SigLIP 2 of any size (NaFlex), which takes patches: give one of a fixed size."
        )
    return whole, vision


class Images(torch.utils.data.Dataset):
    """Images of tars, folders and parquet files, decoded when read; what cannot be read gives way to the next, and is counted.

    Args:
        sources: globs of tars or parquet files, or folders of images.

    Raises:
        ValueError: a source does not exist, or holds no images.
    """

    def __init__(self, sources: Sequence[str], limit: int | None = None) -> None:
        tables = [self.load(source) for source in sources]
        self.table: Dataset = concatenate_datasets(tables)
        if limit is not None:
            self.table = self.table.select(range(min(limit, len(self.table))))
        self.skipped: Counter[str] = Counter()

    @staticmethod
    def load(source: str) -> Dataset:
        """One source as a table of `image`, not decoded, and `label`, a name or None."""
        files = sorted(glob.glob(source)) if not Path(source).is_dir() else []
        if not files and not Path(source).is_dir():
            raise ValueError(f"{source} does not exist: give a folder of images, or tars or parquet files.")
        kind = Path(files[0]).suffix if files else ""
        if kind == "" and (tars := sorted(map(str, Path(source).glob("*.tar")))):
            files, kind = tars, ".tar"
        if kind == "":
            table = load_dataset("imagefolder", data_dir=source, split="train", drop_labels=True)
        else:
            builder = {".tar": "webdataset", ".parquet": "parquet"}.get(kind)
            if builder is None:
                raise ValueError(
                    f"{source} is of no kind that is read: give a folder of images, or tars or parquet files."
                )
            table = load_dataset(builder, data_files=files, split="train")
        names = [name for name, feature in table.features.items() if isinstance(feature, ImageFeature)]
        names += [name for name in table.column_names if name in IMAGE_SUFFIXES and name not in names]
        if not names:
            raise ValueError(f"{source} has the columns {table.column_names}, none of images.")
        labels = [row.get("label") for row in table["json"]] if "json" in table.column_names else [None] * len(table)
        table = table.select_columns(names[:1]).rename_columns({names[0]: "image"} if names[0] != "image" else {})
        table = table.cast_column("image", ImageFeature(decode=False))
        labels = [label if isinstance(label, str) else None for label in labels]
        return table.add_column("label", labels, feature=Value("string"))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for step in range(len(self)):
            row = self.table[(index + step) % len(self)]
            held = row["image"]
            try:
                if held["bytes"] is None and not held["path"]:
                    raise BadSample("missing image", str(index))
                source = held["bytes"] if held["bytes"] is not None else Path(held["path"])
                return {"image": open_image(source, str(index)), "label": row["label"]}
            except BadSample as bad:
                self.skipped[bad.reason] += 1
        raise ValueError(f"No image can be read: {dict(self.skipped)}.")


class Collator:
    """Images -> the encoder's pixels and the targets, both of one random flip and crop; with `views`, of another one too."""

    def __init__(self, processor: BaseImageProcessor, feedback: DeemFeedback, views: bool) -> None:
        self.processor, self.views = processor, views
        self.targets = FeedbackImageProcessor(feedback.config.target_size, like=processor)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row["image"] for row in rows]
        first = self.targets.flip_and_crop(images)
        batch = {"pixel_values": self.pixels(first), **self.targets(first)}
        if self.views:
            batch["view_pixel_values"] = self.pixels(self.targets.flip_and_crop(images))
        return batch

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]


def pooled(outputs: Any) -> torch.Tensor:
    """The one vector (N, W) of each image: the encoder's own, else the mean of its tokens."""
    vector = getattr(outputs, "pooler_output", None)
    if vector is not None:
        return vector.flatten(1)
    states = outputs.last_hidden_state
    return states.mean(1) if states.dim() == 3 else states.mean((2, 3))


class Refining(nn.Module):
    """The encoder under the feedback, kept near its start.

    Args:
        keep: weight of 1 - cosine between an image's pooled features now and at the start.
    """

    def __init__(self, encoder: PreTrainedModel, feedback: DeemFeedback, keep: float) -> None:
        super().__init__()
        self.encoder, self.feedback, self.keep = encoder, feedback, keep
        self.start = copy.deepcopy(encoder).requires_grad_(False) if keep else None

    def forward(
        self,
        pixel_values: torch.Tensor,
        target_pixel_values: torch.Tensor,
        view_pixel_values: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Pixels (N, 3, h, w) and targets (N, 3, H, H) -> loss, feedback_loss, and distance where the start is kept."""
        outputs = self.encoder(pixel_values, return_dict=True)
        views = None if view_pixel_values is None else self.encoder(view_pixel_values, return_dict=True)
        losses = {"feedback_loss": self.feedback(outputs, target_pixel_values, views=views).loss}
        total = losses["feedback_loss"]
        if self.start is not None:
            before = pooled(self.start(pixel_values, return_dict=True))
            losses["distance"] = (1 - F.cosine_similarity(pooled(outputs), before)).mean()
            total = total + self.keep * losses["distance"]
        return {"loss": total, **{name: loss.detach() for name, loss in losses.items()}}


@torch.no_grad()
def zero_shot(
    whole: PreTrainedModel, folder: str, processor: BaseImageProcessor, images: Images, names: Sequence[str]
) -> torch.Tensor:
    """int64 (N,): the class whose name the text tower takes for each image's.

    Args:
        folder: of the tokenizer; names: of the classes, said as "a photo of a ...".
    """
    whole.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = whole.config.text_config.max_position_embeddings
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    texts = []
    for start in range(0, len(names), 64):
        words = tokenizer([f"a photo of a {name}" for name in names[start : start + 64]], **options)
        texts.append(F.normalize(whole.get_text_features(**words, return_dict=True).pooler_output, dim=-1))
    chosen = []
    for start in range(0, len(images), 32):
        batch = [images[index]["image"] for index in range(start, min(start + 32, len(images)))]
        pixels = processor(images=batch, return_tensors="pt")["pixel_values"].to(whole.device)
        seen = F.normalize(whole.get_image_features(pixel_values=pixels, return_dict=True).pooler_output, dim=-1)
        chosen.append((seen @ torch.cat(texts).T.to(seen)).argmax(1).cpu())
    return torch.cat(chosen)


def drift(
    before: torch.Tensor, after: torch.Tensor, labels: Sequence[str | None], names: Sequence[str]
) -> dict[str, float]:
    """Share of images whose zero-shot class stayed, and accuracy before and after where labels are known."""
    found = {"zero_shot_agreement": float((before == after).float().mean())}
    known = [(index, list(names).index(label)) for index, label in enumerate(labels) if label in names]
    if known:
        index, truth = map(torch.tensor, zip(*known, strict=True))
        found["zero_shot_before"] = float((before[index] == truth).float().mean())
        found["zero_shot_after"] = float((after[index] == truth).float().mean())
    return found
