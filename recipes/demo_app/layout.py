# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The page: its tabs around the checkpoints."""

import gradio as gr

from recipes.demo_app.chat import chat_tab
from recipes.demo_app.drawing import drawing_tab
from recipes.demo_app.seeing import Checkpoints, seeing_tab

KEPT = (600, 24 * 3600)  # every ten minutes, files that nobody has used for a day are deleted
WAITING = 32  # requests in the queue at most
# A drawing of 64 pixels is shown as large as one of 512.
STYLE = "#drawn img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}"


def build_app(checkpoints: Checkpoints) -> gr.Blocks:
    """The page for one or more checkpoints, by the names that are shown; all talk and draw with the first.

    What a user says and gives lies in that user's session; requests wait in one queue.
    """
    (name, (model, processor)), *_ = checkpoints.items()
    with gr.Blocks(title="DEEM", analytics_enabled=False, delete_cache=KEPT, fill_width=True) as app:
        gr.Markdown(f"# DEEM: {name}")
        with gr.Tab("Chat"):
            chat_tab(model, processor)
        if model.image_decoder is not None:
            with gr.Tab("What the encoder sees"):
                seeing_tab(checkpoints)
            with gr.Tab("Draw"):
                drawing_tab(model, processor)
        else:
            gr.Markdown("This checkpoint has no image decoder: it can neither redraw nor draw.")
    for function in app.fns.values():
        if (
            function.types_generator
        ):  # those that compute: one at a time, whatever the tab, so that others see their place
            function.concurrency_id = "model"
    return app.queue(max_size=WAITING, default_concurrency_limit=1)
