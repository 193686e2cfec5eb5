# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The tab for drawing: words, and images before them, become one image."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
import torch
from transformers import PreTrainedModel, ProcessorMixin

from modeling_deem.scheduling_deem import fitting_schedulers
from recipes.demo_app.uploads import open_upload
from recipes.demo_app.work import checked_seed, reports_of
from recipes.generation.checkpoint import DRAWING_STEPS, make_scheduler
from recipes.generation.prompt import make_prompt
from recipes.generation.tasks import draw_images, to_pil

PREVIEWS = 8  # at most, of one drawing: each takes a pass of the VAE


def usable_schedulers(model: PreTrainedModel) -> list[str]:
    """Names of the schedulers that draw with this model; some need packages that are not here."""
    usable = []
    for name in fitting_schedulers(model.image_decoder.scheduler):
        try:
            make_scheduler(model, name)
        except ImportError:
            continue
        usable.append(name)
    return usable


def drawing_tab(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Build the tab into the `gradio.Blocks` around it."""
    decoder = model.require_image_decoder()

    def draw(
        words: str, files: list[str] | None, steps: int, guidance: float, scheduler: str, seed: float | None
    ) -> Iterator[tuple[Any, str]]:
        def work(report: Any) -> Any:
            images = [open_upload(path) for path in files or []]
            if not words.strip() and not images:
                raise ValueError("Nothing to draw from: write what the image shows.")
            chosen, number = make_scheduler(model, scheduler), checked_seed(seed)
            passes = len(decoder.sampling_scheduler(chosen, steps, model.device).timesteps)  # some take two in a step

            def after_step(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> None:
                shown = step % max(1, passes // PREVIEWS) == 0
                preview = to_pil(decoder.decode(latents))[0] if shown else gr.skip()
                report((preview, f"step {step + 1} of {passes}"))

            options = {"num_inference_steps": steps, "guidance_scale": guidance, "scheduler": chosen}
            prompt = make_prompt(processor, "plain", words, len(images))
            (image,) = draw_images(
                model, processor, [prompt], [images], number, callback_on_step_end=after_step, **options
            )
            return image, f"drawn in {passes} steps, seed {number}"

        yield from reports_of(work)

    own = type(make_scheduler(model)).__name__
    with gr.Row():
        with gr.Column(min_width=320):
            words = gr.Textbox(label="What the image shows", placeholder="a red circle", lines=2, elem_id="words")
            files = gr.File(
                label="Images before it, in order", file_count="multiple", file_types=["image"], height=140
            )
            with gr.Row():
                start = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop", variant="stop", elem_id="stop-drawing")
            settings = [
                gr.Slider(1, 250, DRAWING_STEPS, step=1, label="Steps"),
                gr.Slider(1, 10, 3.5, label="Guidance"),
                gr.Dropdown(usable_schedulers(model), value=own, label="Scheduler"),
                gr.Number(0, precision=0, label="Seed"),
            ]
        with gr.Column(min_width=320):
            image = gr.Image(
                label="Drawn",
                interactive=False,
                height=420,
                format="png",
                buttons=["download", "fullscreen"],
                elem_id="drawn",
            )
            status = gr.Markdown("", elem_id="progress")
    started = start.click(draw, [words, files, *settings], [image, status], api_name="draw", show_progress="minimal")
    stop.click(None, cancels=[started]).then(lambda: "Stopped.", None, status, api_visibility="private", queue=False)
