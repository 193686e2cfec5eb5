# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Stage 2: a pretrained DEEM learns to answer questions about pictures, without forgetting to describe and to draw.

    python recipes/sft.py                                                    # after recipes/pretrain.py, on a CPU
    python recipes/sft.py --model runs/pretrain --data vqa/ 'captions/*.tar' --data_probs 3 1

Without `--config`, recipes/configs/sft_vqa_cpu.yaml holds; flags override it. Questions become dialogues; caption tars
are used three ways in equal parts: as dialogues that ask for a description, as dialogues that ask for a picture, and as
in pretraining. Resuming and the files written are those of recipes/pretrain.py.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoModel, AutoProcessor, set_seed

import modeling_deem  # noqa: F401  (registers the classes with AutoModel and AutoProcessor)
from processing import DeemDataCollator
from recipes.data.captions import FORMS
from recipes.data.sources import DataArguments, build_dataset
from recipes.defaults import default_data, parse_recipe
from recipes.trainer import DeemTrainer, DeemTrainingArguments

CONFIG = Path(__file__).parent / "configs" / "sft_vqa_cpu.yaml"


@dataclass
class ModelArguments:
    """What to start from."""

    model: str = field(default="runs/pretrain", metadata={"help": "Pretrained DEEM checkpoint, model and processor."})


def main() -> None:
    model_args, data_args, training_args = parse_recipe((ModelArguments, DataArguments, DeemTrainingArguments), CONFIG)
    set_seed(training_args.seed)
    if model_args.model == ModelArguments.model and not Path(model_args.model).is_dir():
        raise ValueError(
            f"No checkpoint at {model_args.model}: run recipes/pretrain.py first, or name one by --model."
        )
    model = AutoModel.from_pretrained(model_args.model)
    processor = AutoProcessor.from_pretrained(model_args.model)
    data_args.data = data_args.data or default_data("vqa", "captions")
    dataset, report = build_dataset(
        data_args, processor, training_args.per_device_train_batch_size, training_args.seed, caption_forms=FORMS
    )
    trainer = DeemTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        data_collator=DeemDataCollator(processor),
        processing_class=processor,
        data_report=report,
    )
    trainer.train(training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
