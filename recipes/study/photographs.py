# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The same question on real photographs: an encoder that is told coarse labels, with and without feedback, and probes of
what the labels omit.

The labels are groups of ImageNet's classes, by their number. The feedback is a `DeemFeedback` of a small denoiser from
scratch, since the world's denoiser has never seen a photograph; with exchanged targets it is the control. Probes read the
encoder's last map (2 x 2 vectors): what can be measured in a photograph without labels, the group, and its finer kind.

seed<k>/photographs/result.json    for each arm, scores as an arm of the world has them
"""

import copy
import io
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ConvNextModel, set_seed

from modeling_deem import DeemFeedback
from modeling_deem.feedback_images_deem import FeedbackImageProcessor
from recipes.evaluation.building import labelled_images
from recipes.real.photographs import class_names
from recipes.study.probes import Probe
from recipes.study.settings import EvidenceArguments
from recipes.synthetic.parts.vision_encoder import encoder_config
from recipes.whole_files import write_whole

SIDE = 64  # pixels
PHOTOGRAPH_ARMS = ("text", "consistency", "exchanged")
SMALL = {"width": 128, "num_layers": 4}  # of the denoiser
BLUR = 1.0  # pixels
# First class of each run of ImageNet's numbers, its group (said in training) and its finer kind (not said).
RUNS = (
    (0, "water or insect", "fish"),
    (7, "bird", "bird on land"),
    (25, "reptile", "amphibian"),
    (33, "reptile", "reptile"),
    (69, "water or insect", "spider"),
    (80, "bird", "bird on land"),
    (97, "bird", "bird on water"),
    (101, "mammal", "other mammal"),
    (107, "water or insect", "sea animal"),
    (127, "bird", "bird on water"),
    (147, "mammal", "other mammal"),
    (151, "mammal", "dog"),
    (269, "mammal", "other carnivore"),
    (300, "water or insect", "insect"),
    (327, "water or insect", "sea animal"),
    (330, "mammal", "other mammal"),
    (389, "water or insect", "fish"),
    (398, "thing", "thing"),
    (924, "food or plant", "food"),
    (970, "thing", "landscape"),
    (981, "thing", "thing"),
    (984, "food or plant", "plant"),
    (999, "thing", "thing"),
)
OMITTED = ("hue", "brightness", "brighter half", "blur")
TOLD = ("group", "finer kind")
PHOTOGRAPH_MEASURES = {
    "photographs, what labels omit": tuple(f"photograph {name}" for name in OMITTED),
    **{f"photograph {name}": (f"photograph {name}",) for name in (*OMITTED, *TOLD)},
}
HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
GRAY = 0.15  # least mean saturation of an image that has a dominant hue


def group_of(number: int) -> tuple[str, str]:
    """Return the group and the finer kind of an ImageNet class."""
    return next((group, kind) for first, group, kind in reversed(RUNS) if number >= first)


def dominant_hue(image: Image.Image) -> str:
    """Return which of six hues has the most saturation in an image, "gray" where its mean saturation is under 0.15."""
    hue, saturation, value = np.moveaxis(np.asarray(image.convert("HSV"), np.float64) / 255, 2, 0)
    weight = saturation * value
    if weight.mean() < GRAY:
        return "gray"
    sixth = ((hue * 6 + 0.5) % 6).astype(int).clip(0, 5)
    return HUES[int(np.bincount(sixth.ravel(), weight.ravel(), 6).argmax())]


def brighter_half(image: Image.Image) -> str:
    """Return "left" or "right"; a mirrored image has the other one."""
    gray = np.asarray(image.convert("L"), np.float64)
    return "left" if gray[:, : SIDE // 2].mean() > gray[:, SIDE // 2 :].mean() else "right"


def read_photographs(folder: Path) -> tuple[list[Image.Image], list[int]]:
    """Return labelled photographs as squares of 64 pixels, and the numbers of their classes.

    Raises:
        ValueError: the folder holds none.
    """
    numbers = {name: number for number, name in class_names(folder).items()}
    found = labelled_images(folder, {})
    images = []
    for one in tqdm(found, "photographs"):
        with Image.open(io.BytesIO(one.read())) as image:
            images.append(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return images, [numbers[one.label] for one in found]


def labels_of(images: Sequence[Image.Image], numbers: Sequence[int]) -> dict[str, list[str]]:
    """Return the label of each image by what is asked, "blur" excepted."""
    light = np.array([np.asarray(image.convert("L"), np.float64).mean() for image in images])
    quarters = np.searchsorted(np.quantile(light, (0.25, 0.5, 0.75)), light)
    groups, kinds = zip(*map(group_of, numbers), strict=True)
    return {
        "hue": [dominant_hue(image) for image in images],
        "brightness": [str(quarter) for quarter in quarters],
        "brighter half": [brighter_half(image) for image in images],
        "group": list(groups),
        "finer kind": list(kinds),
    }


class Classifier(nn.Module):
    """An encoder and a linear layer onto groups, from its pooled vector."""

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        config = encoder_config()
        self.encoder = ConvNextModel(config)
        self.head = nn.Sequential(
            nn.BatchNorm1d(config.hidden_sizes[-1]), nn.Linear(config.hidden_sizes[-1], num_groups)
        )


class Trainings:
    """Batches of photographs, mirrored and cut at random, and the steps on them.

    Args:
        images, groups: that are trained on, and the index of each one's group.
    """

    def __init__(self, images: Sequence[Image.Image], groups: Tensor, batch_size: int) -> None:
        self.processor = FeedbackImageProcessor(SIDE)
        self.images, self.groups, self.batch_size = images, groups, batch_size

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, 3, 64, 64) in [-1, 1], what the encoder sees and what is redrawn."""
        return self.processor(list(images))["target_pixel_values"]

    def run(
        self,
        model: Classifier,
        steps: int,
        learning_rate: float,
        seed: int,
        feedback: DeemFeedback | None = None,
        weight: float = 0.0,
        exchanged: bool = False,
    ) -> dict[str, float]:
        """Train on the groups and, with a feedback, on redrawing; return the means of the last tenth of the steps.

        Args:
            exchanged: the image to be redrawn is another one of the batch.
        """
        set_seed(seed)
        draws = torch.Generator().manual_seed(seed)  # the same batches in every arm
        parameters = (
            [*model.parameters(), *(p for p in feedback.parameters() if p.requires_grad)] if feedback else None
        )
        optimizer = torch.optim.AdamW(parameters or model.parameters(), lr=learning_rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(1, steps))
        losses: list[dict[str, float]] = []
        for _ in range(steps):
            chosen = torch.randint(len(self.images), (self.batch_size,), generator=draws)
            pixels = self.pixels(self.processor.flip_and_crop([self.images[index] for index in chosen], draws))
            outputs = model.encoder(pixels)
            losses.append({})
            total = loss = F.cross_entropy(model.head(outputs.pooler_output), self.groups[chosen])
            losses[-1]["group_loss"] = loss.item()
            if feedback is not None:
                redrawn = feedback(outputs, pixels.roll(1, 0) if exchanged else pixels).loss
                total = loss + weight * redrawn
                losses[-1]["feedback_loss"] = redrawn.item()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
        last = losses[-max(1, steps // 10) :]
        return {name: sum(one[name] for one in last) / len(last) for name in last[-1]} if last else {}

    @torch.no_grad()
    def vectors(self, model: Classifier, images: Sequence[Image.Image]) -> Tensor:
        """(N, 2 * 2 * 192): the encoder's last map."""
        model.eval()
        parts = [self.pixels(images[start : start + 100]) for start in range(0, len(images), 100)]
        found = torch.cat([model.encoder(part).last_hidden_state.flatten(1) for part in parts])
        model.train()
        return found


def probe_photographs(
    trainings: Trainings,
    model: Classifier,
    known: Sequence[int],
    tested: Sequence[int],
    images: Sequence[Image.Image],
    labels: dict[str, list[str]],
) -> dict[str, Any]:
    """Return the scores of all probes on the tested images, as `summary.py` reads them (grade "0")."""
    vectors = trainings.vectors(model, images)
    blurred = trainings.vectors(model, [image.filter(ImageFilter.GaussianBlur(BLUR)) for image in images])
    found = {}
    for name in (*OMITTED, *TOLD):
        if name == "blur":
            probe = Probe(
                torch.cat([vectors[known], blurred[known]]), ["sharp"] * len(known) + ["blurred"] * len(known)
            )
            scores = probe.scores(
                torch.cat([vectors[tested], blurred[tested]]), ["sharp"] * len(tested) + ["blurred"] * len(tested)
            )
            units = [str(number) for number in (*tested, *tested)]
        else:
            own = labels[name]
            probe = Probe(vectors[known], [own[number] for number in known])
            right = [own[number] if own[number] in probe.classes else None for number in tested]
            scores = probe.scores(vectors[tested], right)
            units = [str(number) for number, one in zip(tested, right, strict=True) if one is not None]
        found[f"photograph {name}"] = {"0": {"scores": scores, "units": units}}
    return found


def run_photographs(arguments: EvidenceArguments, seed: int) -> None:
    """Train the encoder of a seed on groups, go on in each arm, probe it; write the result unless it is there."""
    file = arguments.folder(seed, "photographs") / "result.json"
    if file.is_file():
        return
    torch.set_num_threads(1)
    begun = time.process_time()
    images, numbers = read_photographs(Path(arguments.photos))
    labels = labels_of(images, numbers)
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    known, tested = order[: 3 * len(order) // 4], order[3 * len(order) // 4 :]
    names = sorted(set(labels["group"]))
    groups = torch.tensor([names.index(labels["group"][number]) for number in known])
    trainings = Trainings([images[number] for number in known], groups, arguments.batch_size)
    set_seed(seed)
    start = Classifier(len(names))
    told = {"before": trainings.run(start, arguments.vision_steps, 2e-3, seed)}
    probes = (known, tested, images, labels)
    scores = {"before": probe_photographs(trainings, start, *probes)}
    for arm in PHOTOGRAPH_ARMS:
        model = copy.deepcopy(start)
        set_seed(seed)
        feedback = None if arm == "text" else DeemFeedback.from_scratch(start.encoder, SIDE, source="encoder", **SMALL)
        options = {"feedback": feedback, "weight": arguments.weight, "exchanged": arm == "exchanged"}
        told[arm] = trainings.run(model, arguments.steps, arguments.learning_rate, seed, **options)
        scores[arm] = probe_photographs(trainings, model, *probes)
        print(f"seed {seed} photographs {arm}: {time.process_time() - begun:.0f} s", flush=True)
    about = {"photos": str(Path(arguments.photos).resolve()), "scores": scores, "losses": told}
    about |= {"counts": {name: dict(Counter(own)) for name, own in labels.items()}}
    write_whole(file, json.dumps(about | {"seconds": time.process_time() - begun}))


def read_photograph_results(arguments: EvidenceArguments) -> dict[str, dict[int, dict[str, Any]]]:
    """Return results by arm and seed, as those of the world; nothing where photographs were not part of the run."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in arguments.seeds:
        file = arguments.folder(seed, "photographs") / "result.json"
        if file.is_file():
            for arm, scores in json.loads(file.read_text(encoding="utf-8"))["scores"].items():
                found.setdefault(arm, {})[seed] = {"scores": scores}
    return found
