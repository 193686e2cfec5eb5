# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""DEEM as a model of lmms-eval 0.7: `lmms-eval --model deem --model_args pretrained=CKPT,protocol=deem --tasks ...`

Answers do not depend on the batch, and are kept on the disk after each: the same command goes on after a kill, and a
checkpoint that has changed is asked anew. Likelihoods are refused: lmms-eval 0.7.3 cannot score them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from PIL import Image
from tqdm import tqdm

from recipes.data.faults import BadSample, printable
from recipes.data.readers.images import open_image
from recipes.data.samples import IMAGE, Piece
from recipes.evaluation.answering import Answerer, Question, load_model
from recipes.evaluation.benchmark import PROTOCOLS
from recipes.evaluation.harnesses.kept_answers import KeptAnswers, key_of
from recipes.evaluation.harnesses.requests import Asked, asked, told
from recipes.evaluation.predictions import library_versions, model_digests
from recipes.evaluation.running import process_state

SHORTEST = 16  # tokens of an answer where neither the task nor the user says how many
TAKEN = ("num_beams", "length_penalty", "repetition_penalty", "min_new_tokens")  # options of tasks, as they are
DRAWN = ("temperature", "top_p", "top_k")  # taken where a task draws answers at random


@dataclass(frozen=True)
class Waiting:
    """A request without an answer yet: its place among all, its key, and what is asked."""

    place: int
    key: str
    question: Question
    about: Asked
    until: tuple[str, ...]
    options: dict[str, Any]
    task: str
    doc_id: Any


class DeemSimple(lmms):
    """DEEM for tasks that give a text and images (`--force_simple`).

    Args:
        pretrained: folder or Hub id of the checkpoint, or of any model that `AutoModelForImageTextToText` loads.
        protocol: "deem", the released prompts and cut of answers, or "standard", the task's.
        dtype: "auto" for that of the weights, or a name of torch's.
        max_new_tokens, num_beams: instead of the task's.
        answers: folder in which answers are kept; "none" keeps none.
        more: options of lmms-eval that no other model here needs; anything else is refused.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "runs/demo/sft",
        protocol: str = "deem",
        dtype: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        answers: str = "outputs/lmms_eval_answers",
        seed: int = 0,
        max_batch_size: int | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        if more:
            raise ValueError(f"Unknown --model_args {', '.join(more)}; see {type(self).__name__} for those it takes.")
        if protocol not in PROTOCOLS:
            raise ValueError(f"Unknown protocol {protocol!r}; give one of {', '.join(PROTOCOLS)}.")
        state = process_state()
        self._rank, self._world_size = state.process_index, state.num_processes
        where = device if device and self._world_size == 1 and device != "cuda" else state.device
        model, processor = load_model(pretrained, dtype, where)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 1
        self.protocol, self.device = protocol, model.device
        self.answerer = Answerer(model, processor, protocol, seed, kept_images=2 * self.batch_size)
        given = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        self.given = {name: int(value) for name, value in given.items() if value is not None}
        about = [model_digests(pretrained), str(model.dtype), protocol, seed, library_versions()]
        self.kept = None if answers == "none" else KeptAnswers(Path(answers), about, self._rank)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return the answers in the order of the requests."""
        texts: list[str | None] = [None] * len(requests)
        batch: list[Waiting] = []
        times: Counter[tuple[Any, Any]] = Counter()  # a task may ask a row several times
        for place, request in enumerate(tqdm(requests, desc="deem", disable=self._rank != 0)):
            try:
                waiting = self._waiting(place, request, times[request.task_name, request.doc_id])
            except BadSample as error:  # its answer stays empty, which no task counts as right
                logger.warning(f"{request.task_name}, row {request.doc_id}: {printable(str(error))}; not asked.")
                continue
            times[request.task_name, request.doc_id] += 1
            if self.kept is not None and waiting.key in self.kept.known:
                texts[place] = self.kept.known[waiting.key]
                continue
            if batch and (len(batch) == self.batch_size or batch[0].options != waiting.options):
                self._answer(batch, texts)
                batch = []
            batch.append(waiting)
        if batch:
            self._answer(batch, texts)
        return [text or "" for text in texts]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refused. Raises NotImplementedError."""
        raise NotImplementedError(
            "lmms-eval 0.7 turns likelihoods into text before it scores them. Rank options with recipes/evaluate.py."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refused. Raises NotImplementedError."""
        raise NotImplementedError("Tasks of several rounds are not supported by the model deem.")

    def _asked_of(self, request: Instance) -> tuple[list[Piece], list[Any], Mapping[str, Any], Mapping[str, Any]]:
        """Return pieces, images, options and the row of a request."""
        context, options, visuals_of, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        images = list(visuals_of(doc) or [])
        return [*[IMAGE] * len(images), context.replace("<image>", "")], images, options, doc

    def _waiting(self, place: int, request: Instance, before: int) -> Waiting:
        """Return what is asked; `before` says how often the row was asked before. Raises BadSample for a broken image."""
        pieces, given, options, doc = self._asked_of(request)
        about = asked(pieces, self.protocol, doc)
        prompt = self.answerer.prompt(about.request)
        images = [_opened(image, request.task_name) for image in given]
        names = tuple(sha256(image.tobytes() + str(image.size).encode()).hexdigest() for image in images)
        until = options.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        chosen = self._options(options)
        asked_as = f"{request.task_name}/{request.doc_id}" + (f"/{before}" if before else "")
        key = key_of(prompt, names, until, chosen, about.cut, asked_as if chosen["do_sample"] else None)
        question = Question(asked_as, prompt, tuple(images), names)
        return Waiting(place, key, question, about, until, chosen, request.task_name, request.doc_id)

    def _options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options of `model.generate` for those of a task and those given over them."""
        chosen = {name: options[name] for name in TAKEN if options.get(name) is not None}
        chosen["max_new_tokens"] = options.get("max_new_tokens") or SHORTEST
        chosen = chosen | self.given
        chosen["do_sample"] = bool(options.get("do_sample")) and bool(options.get("temperature"))
        if chosen["do_sample"]:
            chosen |= {name: options[name] for name in DRAWN if options.get(name)}
        if chosen.get("num_beams", 1) == 1:
            chosen.pop("length_penalty", None)
        return chosen

    def _answer(self, batch: Sequence[Waiting], texts: list[str | None]) -> None:
        """Answer a batch, keep the answers, and put them where they belong."""
        answers = self.answerer.answer([one.question for one in batch], **batch[0].options)
        said = [told(answer.raw, one.about, one.until) for answer, one in zip(answers, batch, strict=True)]
        if self.kept is not None:
            about = [
                {"task": one.task, "doc_id": one.doc_id, "prompt": one.question.prompt, "raw": answer.raw}
                for one, answer in zip(batch, answers, strict=True)
            ]
            self.kept.append([one.key for one in batch], said, about)
        for one, text in zip(batch, said, strict=True):
            texts[one.place] = text


class DeemChat(DeemSimple):
    """DEEM for tasks that give chats; those of lmms-eval that give a text and images become such."""

    is_simple = False

    def _asked_of(self, request: Instance) -> tuple[list[Piece], list[Any], Mapping[str, Any], Mapping[str, Any]]:
        """Return pieces, images, options and the row of a request. Raises ValueError for what DEEM does not read."""
        _, messages_of, options, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        messages = ChatMessages(messages=messages_of(doc)).messages
        if [message.role for message in messages if message.role != "system"] != ["user"]:
            raise ValueError(f"The task {task} gives a chat of several turns; the model deem answers one question.")
        items = [item for message in messages for item in message.content]
        if other := sorted({item.type for item in items} - {"text", "image"}):
            raise ValueError(f"The task {task} gives {', '.join(other)}; DEEM reads text and images.")
        pieces = [item.text if item.type == "text" else IMAGE for item in items]
        return pieces, [item.url for item in items if item.type == "image"], options, doc


def _opened(image: Any, task: str) -> Image.Image:
    """Return an image of a task as RGB."""
    if isinstance(image, str | Path):
        image = Path(image)
    return open_image(image, task)
