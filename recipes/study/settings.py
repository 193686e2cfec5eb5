# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What the experiment is: its options, its arms, and where the files of each lie."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recipes.synthetic.scenes import SHIFTS, World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.whole_files import write_whole

LABELLED = HELD_OUT + 500_000  # the first scene of those that are labelled; those from HELD_OUT on are tested
MOST_OBJECTS = 3
SETTINGS = "settings.json"
OF_PARTS = ("reading_steps", "parts_scale", "parts_images")  # what decides the frozen parts


@dataclass(frozen=True)
class Arm:
    """What one arm trains on, besides the text loss that all have.

    Attributes:
        says: what it is, for the report.
        objective: "none", "denoise" (the consistency loss), "contrastive" (DCR's), "pixels" (regression by a head of the
            denoiser's size) or "align" (cosine to the features of another, frozen encoder).
        exchanged: the image to be redrawn is another one of the batch.
        condition: of the consistency loss.
        freeze: parts that do not train.
        draws: captions stand before images too, and the image loss, of the same weight, trains the denoiser.
        anchored: the encoder is pulled back to where it started, by the squared distance of its weights.
    """

    says: str
    objective: str = "denoise"
    exchanged: bool = False
    condition: str = "tokens"
    freeze: tuple[str, ...] = ("model.language_model", "lm_head", "image_decoder.denoiser", "image_decoder.vae")
    draws: bool = False
    anchored: bool = False


_OPEN = ("model.language_model", "lm_head", "image_decoder.vae")
ARMS = {
    "text": Arm("text loss alone", objective="none"),
    "consistency": Arm("text loss and consistency loss: the image is redrawn from its own tokens"),
    "exchanged": Arm("as consistency, but the image to be redrawn is another one: nothing to gain", exchanged=True),
    "pixels": Arm(
        "text loss and plain regression of the pixels from the tokens, by a head of the denoiser's size", "pixels"
    ),
    "leak": Arm("as consistency, but the denoiser sees the encoder's features too", condition="tokens+features"),
    "confounded_a": Arm(
        "the paper's arm without feedback: encoder frozen, denoiser trained by the image loss",
        "none",
        freeze=(*_OPEN, "model.vision_tower.encoder"),
        draws=True,
    ),
    "confounded_b": Arm("the paper's arm with feedback: encoder trained, denoiser frozen, image loss too", draws=True),
    "contrastive": Arm("text loss and the contrastive objective: whose tokens were given?", "contrastive"),
    "align": Arm("text loss and alignment to another encoder's features, no diffusion", "align"),
    "anchor": Arm("text loss, and the encoder's weights pulled back to where they started", "none", anchored=True),
}
HEADLINE = ("text", "consistency", "exchanged")


@dataclass
class EvidenceArguments:
    """Options of `recipes/evidence.py`."""

    out: str = field(default="runs/evidence", metadata={"help": "Folder of all that is made."})
    parts: str = field(
        default="runs/evidence/parts", metadata={"help": "Folder of the frozen parts, made if missing."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Each is a world and a start."})
    arms: list[str] = field(default_factory=lambda: list(HEADLINE), metadata={"help": f"Of {', '.join(ARMS)}."})
    full: bool = field(default=False, metadata={"help": "All arms."})
    asked_arms: list[str] = field(
        default_factory=lambda: list(HEADLINE),
        metadata={"help": "Arms whose language side is tuned and asked; of the others tokens are probed and redrawn."},
    )
    device: str = field(default="cpu", metadata={"help": "Of all training but the parts': cpu or cuda."})
    processes: int = field(default=2, metadata={"help": "At once, of one thread each."})
    num_images: int = field(default=2400, metadata={"help": "Images to train on, of each seed."})
    vision_steps: int = field(
        default=800, metadata={"help": "Steps of the encoder against coarse captions, before all."}
    )
    steps: int = field(default=600, metadata={"help": "Training steps of an arm."})
    batch_size: int = field(default=32, metadata={"help": "Images or questions of a step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of all that trains."})
    weight: float = field(default=5.0, metadata={"help": "Of what is added to the text loss."})
    num_labelled: int = field(
        default=2400, metadata={"help": "Labelled images that probes and answers are learned from."}
    )
    num_tested: int = field(default=1000, metadata={"help": "Images of each grade that probes are tested on."})
    num_asked: int = field(default=100, metadata={"help": "Images of each grade that questions are asked about."})
    grades: list[int] = field(default_factory=lambda: list(range(len(SHIFTS))), metadata={"help": "Of the shift."})
    describe_steps: int = field(
        default=150, metadata={"help": "Steps of the language side on full captions of the labelled images."}
    )
    describe_learning_rate: float = field(default=3e-3, metadata={"help": "In these steps."})
    answer_steps: int = field(default=120, metadata={"help": "Steps of the language side on questions, after that."})
    answer_batch_size: int = field(default=16, metadata={"help": "Dialogues of such a step."})
    answer_learning_rate: float = field(default=2e-3, metadata={"help": "In these steps."})
    num_redrawn: int = field(default=12, metadata={"help": "Images of the sheets of redrawn ones."})
    redraw_steps: int = field(
        default=150, metadata={"help": "Steps of the connector that frozen tokens are redrawn by."}
    )
    reading_steps: int = field(
        default=1300, metadata={"help": "Steps of the language model on text, one of the frozen parts."}
    )
    parts_scale: float = field(default=1.0, metadata={"help": "Multiplies the steps of the frozen parts."})
    parts_images: int = field(
        default=6000, metadata={"help": "Images and texts that the frozen parts are trained on."}
    )
    photos: str = field(
        default="", metadata={"help": "Folder of labelled photographs in tars: asks the same question of them too."}
    )
    job: str = field(
        default="",
        metadata={
            "help": "One piece of the work: part:NAME, or SEED and encoder, start, photographs or an arm; for the recipe itself."
        },
    )

    def __post_init__(self) -> None:
        self.arms = list(ARMS) if self.full else list(self.arms)
        for option, names in (("arms", self.arms), ("asked_arms", self.asked_arms)):
            if unknown := sorted(set(names) - set(ARMS)):
                raise ValueError(f"--{option} {' '.join(unknown)}: no such arm. Give any of {', '.join(ARMS)}.")
        if unknown := sorted(set(self.grades) - set(range(len(SHIFTS)))):
            raise ValueError(f"--grades {unknown}: expected numbers from 0 to {len(SHIFTS) - 1}.")
        if 0 not in self.grades:
            raise ValueError(f"--grades {self.grades} lack 0, the images that are trained on. Add it.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"--seeds {self.seeds}: expected different numbers from 0 on, at least one.")
        for name in ("processes", "num_images", "steps", "batch_size", "num_labelled", "num_tested", "num_asked"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least 1.")
        if self.num_images < self.batch_size:
            raise ValueError(f"--num_images {self.num_images} make no batch of --batch_size {self.batch_size}.")
        self.num_asked = min(self.num_asked, self.num_tested)

    def folder(self, seed: int, name: str = "") -> Path:
        """Folder of a seed, or of its start or of one of its arms."""
        return Path(self.out, f"seed{seed}", name)

    def world(self, seed: int, grade: int = 0) -> World:
        """The images of a seed at a grade of shift."""
        return World(seed, grade=grade, max_objects=MOST_OBJECTS)

    def fixed(self) -> dict[str, Any]:
        """What decides the figures; results made with other values cannot stand beside each other."""
        free = ("out", "parts", "seeds", "arms", "full", "asked_arms", "processes", "photos", "job")
        return {name: value for name, value in asdict(self).items() if name not in free}

    def finished(self, seed: int, name: str) -> bool:
        """Whether the result of an arm, or of the photographs, is there, with the answers if it is to be asked."""
        file = self.folder(seed, name) / "result.json"
        if not file.is_file():
            return False
        return name not in self.asked_arms or "ask" in json.loads(file.read_text(encoding="utf-8"))["seconds"]

    def check_same(self) -> None:
        """Write the settings into `--out` and `--parts`, or compare with those that are there.

        Raises:
            ValueError: a folder holds what was made with other settings or of other photographs, or parts of which the
                settings are not known.
        """
        own = self.fixed()
        _keep_or_compare("--out", Path(self.out), own)
        for seed in self.seeds if self.photos else ():
            file, asked = self.folder(seed, "photographs") / "result.json", str(Path(self.photos).resolve())
            kept = json.loads(file.read_text(encoding="utf-8")).get("photos") if file.is_file() else asked
            if kept != asked:
                raise ValueError(
                    f"{file} was made of the photographs in {kept}, now --photos {asked}. Remove it first."
                )
        parts = Path(self.parts)
        if any((parts / name).exists() for name in ("text", "diffusion")) and not (parts / SETTINGS).is_file():
            raise ValueError(
                f"--parts {parts} holds parts of an earlier version, which read with another tokenizer. Name another "
                "--parts, or remove it."
            )
        _keep_or_compare("--parts", parts, {name: own[name] for name in OF_PARTS})


def _keep_or_compare(option: str, folder: Path, settings: dict[str, Any]) -> None:
    file = folder / SETTINGS
    if not file.is_file():
        write_whole(file, json.dumps(settings, indent=1))
    kept = json.loads(file.read_text(encoding="utf-8"))
    if odd := {name: (kept.get(name), value) for name, value in settings.items() if kept.get(name) != value}:
        told = "; ".join(f"{name} {before}, now {now}" for name, (before, now) in odd.items())
        raise ValueError(
            f"{option} {folder} holds results of other settings: {told}. Name another {option}, or remove it."
        )
