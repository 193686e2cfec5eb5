# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""See what an image encoder sees: images redrawn from their own tokens, and where that fails.

    python recipes/inspect_image.py --images a.jpg b.jpg                        # with the demo's checkpoint
    python recipes/inspect_image.py --model CKPT --against OTHER --images a.jpg  # two checkpoints on the same noise
    python recipes/inspect_image.py --images a.jpg --box 10 20 90 120           # of a region: error within it alone

Writes `inspection.html`, one page that needs no other file, its sheets as PNG files (`<i>_redrawn.png`, `<i>_tokens.png`)
and the numbers, `inspection.json`. For one image and seed they are those of `recipes.seeing.views.look` and of the app.
`recipes/report.py` shows what lies in the folder `seen` of a run.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from processing.regions_deem import POINT_RADIUS, merge_regions
from recipes.evaluation.page import write_html
from recipes.generation.checkpoint import DRAWING_STEPS, load_for_inference
from recipes.seeing.sheets import inspection_sections, write_inspection
from recipes.seeing.views import SEEDS, View, look
from recipes.whole_files import check_writable


@dataclass
class InspectArguments:
    """Options of `recipes/inspect_image.py`."""

    model: str = field(default="runs/demo/sft", metadata={"help": "Checkpoint folder or Hub id."})
    against: str | None = field(default=None, metadata={"help": "A second checkpoint, shown beneath the first."})
    images: list[str] = field(default_factory=list, metadata={"help": "Image files."})
    out: str = field(default="outputs/inspect", metadata={"help": "Folder for the files written."})
    box: list[float] = field(
        default_factory=list, metadata={"help": "Region of every image: x1 y1 x2 y2 in its pixels."}
    )
    point: list[float] = field(
        default_factory=list, metadata={"help": "Region of every image: the disc around x y, in its pixels."}
    )
    point_radius: float = field(
        default=POINT_RADIUS, metadata={"help": "Of the disc, as a share of the image's shorter side."}
    )
    seeds: list[int] = field(
        default_factory=lambda: list(SEEDS), metadata={"help": "Of redrawing; the first of the error's noise too."}
    )
    timesteps: list[int] | None = field(
        default=None, metadata={"help": "Timesteps of the error maps; 4 spread over those of the loss by default."}
    )
    num_noise: int = field(default=4, metadata={"help": "Noises that each error is a mean over."})
    per_token: bool = field(
        default=True, metadata={"help": "Also leave out each token; takes as many times as long as there are tokens."}
    )
    num_inference_steps: int = field(default=DRAWING_STEPS, metadata={"help": "Denoising steps of redrawing."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance of redrawing."})
    scheduler: str | None = field(
        default=None,
        metadata={"help": "Class name of a diffusers scheduler; DDIM, or the model's own for flow matching."},
    )


def regions_of(arguments: InspectArguments, count: int) -> list[Any] | None:
    """The region of every image, if one is asked for.

    Raises:
        ValueError: both a box and a point, or values that are neither.
    """
    boxes = [arguments.box] * count if arguments.box else None
    points = [arguments.point] * count if arguments.point else None
    return merge_regions(None, boxes, points, arguments.point_radius)


def inspect(arguments: InspectArguments, checkpoint: str) -> list[View]:
    """Look at the images with one checkpoint."""
    model, processor = load_for_inference(checkpoint)
    return look(
        model,
        processor,
        arguments.images,
        arguments.seeds,
        arguments.timesteps,
        arguments.num_noise,
        arguments.per_token,
        regions_of(arguments, len(arguments.images)),
        arguments.num_inference_steps,
        arguments.guidance_scale,
        arguments.scheduler,
    )


def main(arguments: InspectArguments) -> Path:
    """Write sheets, figures and the page; return the page's path.

    Raises:
        ValueError: no image is given, or one that cannot be opened.
    """
    if not arguments.images:
        raise ValueError("Nothing to look at: give --images FILE ...")
    out = Path(arguments.out)
    check_writable(out)
    checkpoints = [arguments.model, *([arguments.against] if arguments.against else [])]
    views = {checkpoint: inspect(arguments, checkpoint) for checkpoint in checkpoints}
    write_inspection(out, views, [Path(name).name for name in arguments.images])
    for model, of_model in views.items():
        for name, view in zip(arguments.images, of_model, strict=True):
            print(f"{model}: {Path(name).name}: error of redrawing {view.figures()['error']:.4f}")
    title, blocks = " and ".join(checkpoints), inspection_sections(out)
    page = write_html(out / "inspection.html", "What the encoder sees", title, blocks, "recipes/inspect_image.py")
    print(f"page: {page}")
    return page


if __name__ == "__main__":
    main(*TrlParser(InspectArguments, allow_abbrev=False).parse_args_and_config())
