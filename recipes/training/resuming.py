# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Going on from a checkpoint: which one, whether it is whole, and whether it is one of this run."""

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModel, PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from recipes.whole_files import check_writable, write_whole

COMPLETE = "complete"  # the file that is written when all else of a checkpoint is on disk
SETTINGS = "run_settings.json"
CHECKSUMS = "checksums.json"  # {file: SHA-256} of all files of a checkpoint but itself and COMPLETE
# What the optimizer's state belongs to. A schedule, a batch size or a number of steps may be changed.
FIXED = (
    "optim",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "groups",
    "freeze",
    "lora",
)
DAMAGED = "cannot be read as it was written (damaged, cut or lost)"
MEANT = f" (delete {CHECKSUMS} if it was changed on purpose)"
MEND = "They are damaged, or of another model: copy them anew, or name another folder."
ANEW = "start anew by --resume_from_checkpoint false or in another --output_dir"


def step_of(checkpoint: str | Path) -> int:
    """Return the step of a folder `checkpoint-<step>`."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def complete_checkpoints(output_dir: str | Path) -> list[str]:
    """Return the checkpoints that were saved to the end, the latest step first."""
    folders = [file.parent for file in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return [str(folder) for folder in sorted(folders, key=step_of, reverse=True)]


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the checkpoint of the latest step that was saved to the end, or None."""
    return next(iter(complete_checkpoints(output_dir)), None)


def checksum(file: Path) -> str:
    """Return the SHA-256 of what a file holds."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_checksums(folder: str | Path) -> None:
    """Write down what the files of a checkpoint hold, so that resuming sees where a byte of them changed."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    names = [file.relative_to(folder).as_posix() for file in files]
    sums = {name: checksum(file) for name, file in zip(names, files, strict=True) if name not in (CHECKSUMS, COMPLETE)}
    write_whole(Path(folder, CHECKSUMS), json.dumps(sums, indent=2) + "\n")


def torn_files(folder: str | Path) -> list[str]:
    """Return the files of a checkpoint that are not as they were written: weights, states, positions, settings.

    Where there are checksums every byte counts; else what is shorter than it says, or cannot be read, is found.
    """
    torn = [str(file) for file in sorted(Path(folder).iterdir()) if file.is_file() and not _can_be_read(file)]
    sums = Path(folder, CHECKSUMS)
    if sums.is_file() and str(sums) not in torn:
        for name, expected in json.loads(sums.read_text(encoding="utf-8")).items():
            file = Path(folder, name)  # optimizer and schedule have words of their own, see `check_states`
            lost = not file.is_file() and name not in (OPTIMIZER_NAME, SCHEDULER_NAME)
            if lost or (file.is_file() and str(file) not in torn and checksum(file) != expected):
                torn.append(str(file))
    return torn


def _can_be_read(file: Path) -> bool:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):  # compares the length of the file with what its header says
                pass
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        return file.suffix not in (".pt", ".pth") or zipfile.is_zipfile(file)
    except (SafetensorError, ValueError, OSError):
        return False


class Sound(str):
    """The folder of a checkpoint that was found as it was written: reading all of it takes a while, once is enough."""


def check_weights(folder: str | Path) -> None:
    """Raise ValueError if weights or settings in the folder of a model are torn."""
    if Path(folder).is_dir() and (torn := torn_files(folder)):
        raise ValueError(f"{', '.join(torn)} {DAMAGED}. Copy the file anew{MEANT}, or name another folder.")


def load_sound(folder: str | Path, model_config: dict[str, Any] | None = None) -> PreTrainedModel:
    """Return the model of a folder or Hub id.

    Args:
        model_config: fields of its config to change; parts that they add are initialized.

    Raises:
        ValueError: a file is torn, or weights are missing or of other shapes: transformers would initialize them.
    """
    check_weights(folder)
    try:
        model, found = AutoModel.from_pretrained(folder, output_loading_info=True, **(model_config or {}))
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(f"The weights of {folder} have other shapes than its config.json says. {MEND}") from error
    if not model_config and (missing := sorted(found["missing_keys"])):
        unknown = sorted(found["unexpected_keys"])
        raise ValueError(
            f"The weights of {folder} lack {len(missing)} that its config.json asks for ({', '.join(missing[:3])}), and hold "
            f"{len(unknown)} that are not known ({', '.join(unknown[:3])}). {MEND}"
        )
    return model


def checkpoint_to_resume(output_dir: str | Path, named: str | bool | None) -> str | None:
    """Return the checkpoint that training goes on from, or None to start; a torn one is passed over, and named.

    Args:
        named: a folder, False to start anew, None or True for the last complete checkpoint in `output_dir`.

    Raises:
        ValueError: the named checkpoint is not there or torn, or all are.
    """
    if named is False:
        return None
    if isinstance(named, str) and not Path(named, TRAINER_STATE_NAME).is_file():
        raise ValueError(f"--resume_from_checkpoint {named} is no checkpoint: it holds no {TRAINER_STATE_NAME}.")
    folders = [named] if isinstance(named, str) else complete_checkpoints(output_dir)
    for folder in folders:
        if not (torn := torn_files(folder)):
            return Sound(folder)
        print(f"{', '.join(torn)} {DAMAGED}: {folder} is passed over.")
    if folders:
        raise ValueError(
            f"{', '.join(torn)} {DAMAGED}, and there is no other checkpoint to go on from. Copy the file back{MEANT}, or "
            f"{ANEW}."
        )
    return None


def forget_checkpoints(output_dir: str | Path) -> None:
    """Take the marks from the checkpoints of an earlier run, so that none is gone on from; the folders stay for now."""
    for folder in complete_checkpoints(output_dir):
        print(f"{folder} is of an earlier run: training starts anew.")
        Path(folder, COMPLETE).unlink()


def _same(name: str, before: Any, now: Any) -> bool:
    if name == "started_from" and before and now and before.keys() == now.keys():
        return all(
            one == now[key] or (os.path.exists(one) and os.path.exists(now[key]) and os.path.samefile(one, now[key]))
            for key, one in before.items()
        )
    return before == now


class ResumingTrainer(Trainer):
    """A Trainer whose checkpoints say what they belong to.

    Attributes:
        started_from: `{option: folder}` of what the run began with.
    """

    started_from: dict[str, str] | None = None

    def run_settings(self) -> dict[str, Any]:
        """Return what a run must keep to go on, as JSON gives it back."""
        settings = {name: getattr(self.args, name) for name in FIXED}
        return json.loads(json.dumps({**settings, "started_from": self.started_from}))

    def check_same_run(self, checkpoint: str) -> None:
        """Raise ValueError if the checkpoint is of a run that began or trained otherwise."""
        file = Path(checkpoint, SETTINGS)
        before = json.loads(file.read_text()) if file.is_file() else {}  # older versions wrote none
        for name, now in self.run_settings().items():
            if name not in before or _same(name, before[name], now):
                continue
            if name == "started_from":
                was, this = (" ".join(f"--{k} {v}" for k, v in (one or {}).items()) for one in (before[name], now))
                raise ValueError(
                    f"{checkpoint} is of a run that began from {was}, this one names {this}, which would never be read. "
                    f"Give the same, or {ANEW}."
                )
            raise ValueError(
                f"{checkpoint} was trained with {name} {before[name]}, this run has {now}; the optimizer's state belongs to "
                f"the former. Give the same, or {ANEW}, perhaps with --model {checkpoint}."
            )

    def check_states(self, checkpoint: str) -> None:
        """Raise ValueError if the checkpoint lacks the state of optimizer or schedule."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # they name their files otherwise
            return
        missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not Path(checkpoint, name).is_file()]
        if missing:
            raise ValueError(
                f"{checkpoint} holds no {' and no '.join(missing)}: the schedule would begin anew in the midst of the run. "
                f"Copy the file back, name another checkpoint, or {ANEW}, perhaps with --model {checkpoint}."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As the base class; say where training goes on.

        Raises:
            ValueError: the checkpoint is torn, lacks a state or is of another run.
            OSError: nothing can be written to `output_dir`.
        """
        if self.is_world_process_zero():
            check_writable(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str):
            if not isinstance(resume_from_checkpoint, Sound):
                checkpoint_to_resume(self.args.output_dir, resume_from_checkpoint)
            self.check_same_run(resume_from_checkpoint)
            self.check_states(resume_from_checkpoint)
            if self.is_world_process_zero():
                state = json.loads(Path(resume_from_checkpoint, TRAINER_STATE_NAME).read_text())
                print(f"Going on from {resume_from_checkpoint} at step {state['global_step']}.")
        return super().train(resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the base class. Raises OSError where the disk is full or cannot be written: what still holds, and what to do."""
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes files of its own
            if self.args.should_save:
                folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
                write_whole(folder / SETTINGS, json.dumps(self.run_settings(), indent=2) + "\n")
                write_checksums(folder)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors have errors of their own
            raise self._not_written(f"checkpoint of step {self.state.global_step}", error) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the base class. Raises OSError as `_save_checkpoint`."""
        try:
            super().save_model(output_dir, _internal_call)
        except (OSError, SafetensorError) as error:
            if _internal_call:  # of a checkpoint
                raise
            raise self._not_written("trained model", error) from error

    def _not_written(self, what: str, error: Exception) -> OSError:
        last = last_complete_checkpoint(self.args.output_dir)
        return OSError(
            f"The {what} could not be written to {self.args.output_dir} ({type(error).__name__}: {error}). Make room or "
            f"write access; the same command then goes on from {last or 'the start'}."
        )
