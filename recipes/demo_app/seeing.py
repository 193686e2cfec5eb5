# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The tab that shows what an encoder sees: images redrawn from their own tokens, and where that fails."""

from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from recipes.demo_app.uploads import image_upload, open_upload
from recipes.demo_app.work import passes_of, reports_of
from recipes.generation.checkpoint import DRAWING_STEPS
from recipes.seeing.maps import overlay
from recipes.seeing.sheets import REDRAWN, TOKENS
from recipes.seeing.views import SEEDS, View, look

SIDE = 320  # pixels of a map on the page
Checkpoints = Mapping[str, tuple[PreTrainedModel, ProcessorMixin]]


def whole_numbers(words: str, what: str) -> list[int]:
    """Numbers from what a user typed, spaces or commas between them.

    Raises:
        ValueError: something else stands there.
    """
    try:
        return [int(word) for word in words.replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"{what}: {words[:80]!r} are not whole numbers with spaces between them.") from error


def maps_of(views: Mapping[str, View], timestep: int, token: int) -> list[Image.Image | None]:
    """Error map and token map of each view, with one scale for all.

    Args:
        timestep: 0 for the mean of those looked at, or the number of one, from 1.
        token: number of the image token that is left out, from 0.
    """
    images: list[Image.Image | None] = []
    most = max((view.most for view in views.values()), default=0.0)
    lost = [view.error.token_error_maps for view in views.values() if view.error.token_error_maps is not None]
    most_lost = max((float(maps.abs().max()) for maps in lost), default=0.0)
    for view in views.values():
        asked = None if timestep == 0 else view.error.timesteps.tolist()[timestep - 1]
        images.append(_large(overlay(view.image, view.error_map(asked), most)))
        without = view.error.token_error_maps is None or token >= view.error.token_error_maps.shape[1]
        images.append(None if without else _large(overlay(view.image, view.token_map(token), most_lost, signed=True)))
    return images


def figures_in_words(views: Mapping[str, View]) -> str:
    """The figures of views as a table in Markdown."""
    timesteps = next(iter(views.values())).error.timesteps.tolist()
    lines = [
        "| | error | " + " | ".join(f"timestep {t}" for t in timesteps) + " |",
        "|---" * (len(timesteps) + 2) + "|",
    ]
    for name, view in views.items():
        figures = view.figures()
        values = [figures["error"], *figures["timesteps"].values()]
        lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    return "\n".join(lines)


def _large(image: Image.Image) -> Image.Image:
    return image.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def seeing_tab(checkpoints: Checkpoints) -> None:
    """Build the tab into the `gradio.Blocks` around it, a column per checkpoint."""

    def see(
        path: str | None, seeds: str, timesteps: str, num_noise: int, per_token: bool, steps: int, guidance: float
    ) -> Iterator[dict]:
        def work(report: Any) -> dict[str, View]:
            image, asked = open_upload(path), whole_numbers(timesteps, "Timesteps") or None
            options = (whole_numbers(seeds, "Seeds"), asked, num_noise, per_token, None, steps, guidance)
            views = {}
            for name, (model, processor) in checkpoints.items():
                with passes_of(model, lambda count, name=name: report(f"{name}: {count} passes of the denoiser")):
                    (views[name],) = look(model, processor, [image], *options)
            if len({tuple(view.error.timesteps.tolist()) for view in views.values()}) > 1:
                raise ValueError(
                    "The loss of the two checkpoints has other timesteps: name those to compare in the settings."
                )
            return views

        for report in reports_of(work):
            if isinstance(report, str):
                yield {status: report}
                continue
            lost = [view.error.token_error_maps for view in report.values()]
            number = 0 if lost[0] is None else max(maps.shape[1] for maps in lost)
            timesteps = next(iter(report.values())).error.timesteps
            galleries = {
                gallery: [(view.image, "the image")]
                + [(image, f"seed {seed}") for image, seed in zip(view.redrawn, view.seeds, strict=True)]
                for gallery, view in zip(redrawn, report.values(), strict=True)
            }
            yield {
                status: "",
                table: figures_in_words(report),
                views: report,
                timestep: gr.Slider(maximum=len(timesteps), value=0),
                token: gr.Slider(maximum=max(1, number - 1), value=0, visible=number > 0),
                **galleries,
                **dict(zip(maps, maps_of(report, 0, 0), strict=True)),
            }

    def show(views: Mapping[str, View], timestep: int, token: int) -> list[Image.Image | None]:
        return maps_of(views, int(timestep), int(token)) if views else [None] * len(maps)

    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = image_upload(label="An image", height=260, elem_id="seen")
            with gr.Row():
                start = gr.Button("Look", variant="primary", elem_id="look")
                stop = gr.Button("Stop", variant="stop")
            with gr.Accordion("Settings", open=False):
                settings = [
                    gr.Textbox(" ".join(map(str, SEEDS)), label="Seeds; the first is that of the error's noise too"),
                    gr.Textbox("", label="Timesteps of the error; empty: 4 spread over those of the loss"),
                    gr.Slider(1, 16, 4, step=1, label="Noises that each error is a mean over"),
                    gr.Checkbox(True, label="Leave out each token too (takes as many times as long)"),
                    gr.Slider(1, 250, DRAWING_STEPS, step=1, label="Steps of redrawing"),
                    gr.Slider(1, 10, 1.0, label="Guidance of redrawing"),
                ]
        with gr.Column(scale=3):
            status = gr.Markdown("Upload an image and look.", elem_id="looking")
            table = gr.Markdown("", elem_id="figures")
            with gr.Row():
                timestep = gr.Slider(
                    0, 4, 0, step=1, label="Timestep of the error map, by its column above; 0: mean of all"
                )
                token = gr.Slider(0, 1, 0, step=1, label="Token that is left out", visible=False)
            redrawn, maps = [], []
            with gr.Row():
                for index, name in enumerate(checkpoints):
                    with gr.Column(min_width=SIDE):
                        gr.Markdown(f"### {name}")
                        redrawn.append(
                            gr.Gallery(
                                label="Redrawn from its own tokens",
                                columns=4,
                                height=200,
                                format="png",
                                buttons=["download", "fullscreen"],
                            )
                        )
                        with gr.Row():
                            for what in ("error", "token"):
                                maps.append(
                                    gr.Image(
                                        label=f"{what.capitalize()} map",
                                        height=SIDE,
                                        interactive=False,
                                        format="png",
                                        buttons=["download", "fullscreen"],
                                        elem_id=f"{what}-map-{index}",
                                    )
                                )
            gr.Markdown(f"{REDRAWN}\n\n{TOKENS}")
    views = gr.State({})
    started = start.click(
        see,
        [image, *settings],
        [status, table, views, timestep, token, *redrawn, *maps],
        api_name="see",
        show_progress="minimal",
    )
    stop.click(None, cancels=[started]).then(lambda: "Stopped.", None, status, api_visibility="private", queue=False)
    for slider in (timestep, token):
        slider.change(show, [views, timestep, token], maps, api_visibility="private", show_progress="hidden")
