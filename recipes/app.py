# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A DEEM in the browser: talk with it, see what its encoder sees, draw.

    python recipes/app.py                                    # the demo's checkpoint, on http://127.0.0.1:7860
    python recipes/app.py --model CKPT --against OTHER       # what two encoders see, on the same noise
    python recipes/app.py --tiny                             # without any checkpoint: tiny parts that have learned little

Only this machine reaches it unless `--host` says otherwise. Uploaded files are deleted when the app ends.
Needs `pip install -e ".[demo]"`. The tabs lie in recipes/demo_app/.
"""

import os
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin
from trl import TrlParser

from modeling_deem import DeemForConditionalGeneration
from recipes import pretrain
from recipes.generation.checkpoint import load_for_inference
from recipes.parts import PartsArguments, make_parts

LARGEST_FILE = "50mb"


@dataclass
class AppArguments:
    """Options of `recipes/app.py`."""

    model: str = field(default="runs/demo/sft", metadata={"help": "Checkpoint folder or Hub id."})
    against: str | None = field(
        default=None, metadata={"help": "A second checkpoint, whose encoder is shown beside the first one's."}
    )
    tiny: bool = field(
        default=False, metadata={"help": "Compose a model of tiny parts, made in runs/app, in place of a checkpoint."}
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 lets other machines reach it."}
    )
    port: int = field(default=7860, metadata={"help": "Port to listen on; 0: the first free one from 7860."})


def compose_tiny(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A DEEM of parts that were trained for a few steps, made in `folder` if they are not there."""
    made = PartsArguments(out=str(folder), num_pictures=64, num_texts=64, num_held_out=8, steps_scale=0.005)
    vision, text, diffusion = make_parts(made)
    model, processor = pretrain.compose_small(vision, text, diffusion)
    return model.eval(), processor


def load_checkpoints(arguments: AppArguments) -> dict[str, tuple[PreTrainedModel, ProcessorMixin]]:
    """Models and processors by the names that are shown.

    Raises:
        ValueError: there is no such checkpoint, or it is no DEEM.
    """
    if arguments.tiny:
        return {"tiny parts": compose_tiny(Path("runs/app/parts"))}
    loaded = {}
    for checkpoint in filter(None, (arguments.model, arguments.against)):
        try:
            model, processor = load_for_inference(checkpoint)
        except ValueError as error:
            raise ValueError(f"{error} Or try the page on tiny parts: --tiny.") from error
        if not isinstance(model, DeemForConditionalGeneration):
            raise ValueError(f"{checkpoint} is a {type(model).__name__}; the app is for a DEEM.")
        name = Path(checkpoint).name if Path(checkpoint).is_dir() else checkpoint
        loaded[name if name not in loaded else f"{name}, against"] = model, processor
    return loaded


def main(arguments: AppArguments) -> None:
    """Serve the page until it is interrupted."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would ask a server for versions
    with tempfile.TemporaryDirectory(prefix="deem-app-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        try:
            from recipes.demo_app.layout import STYLE, build_app
        except ImportError as error:
            raise ImportError(f'The app needs Gradio ({error}): pip install -e ".[demo]"') from error
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the uploads are deleted
        build_app(load_checkpoints(arguments)).launch(
            server_name=arguments.host,
            server_port=arguments.port or None,
            share=False,
            max_file_size=LARGEST_FILE,
            footer_links=["api"],
            css=STYLE,
        )


if __name__ == "__main__":
    main(*TrlParser(AppArguments, allow_abbrev=False).parse_args_and_config())
