# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Long work that says how far it is and can be stopped, one at a time for all users."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from transformers import PreTrainedModel

Report = Callable[[Any], None]
_MODEL = threading.Lock()  # of all users, tabs and checkpoints: they share processor cores or a GPU


class Stopped(Exception):
    """Raised in work that nobody waits for any more."""


def reports_of(work: Callable[[Report], Any]) -> Iterator[Any]:
    """What work reports, as it comes, and what it returns at last; work runs in a thread of its own.

    Closing the iterator, as Gradio does when a user stops an event, ends the work at its next report and does not wait for
    that: Gradio closes it in the loop that serves all users.

    Args:
        work: called with `report`, to be called often.

    Raises:
        gradio.Error: the work raised a ValueError, or a package is missing; it shows the sentence.
    """
    reports: queue.Queue = queue.Queue()
    stopped = threading.Event()

    def report(item: Any) -> None:
        if stopped.is_set():
            raise Stopped
        reports.put(("report", item))

    def run() -> None:
        while not _MODEL.acquire(timeout=0.1):
            if stopped.is_set():
                return
        try:
            reports.put(("result", work(report)))
        except Stopped:
            pass
        except BaseException as error:  # of a thread: it is raised where the reports are read
            reports.put(("error", error))
        finally:
            _MODEL.release()

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            kind, item = reports.get()
            if kind == "error":
                raise item
            yield item
            if kind == "result":
                return
    except (ValueError, ImportError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    finally:
        stopped.set()


def checked_seed(seed: float | None) -> int:
    """A seed from a field of numbers.

    Raises:
        ValueError: it is empty, below 0 or too large for a generator.
    """
    if seed is None or not 0 <= seed < 2**63:
        raise ValueError(f"The seed is {'empty' if seed is None else seed}: give a whole number from 0 to 2^63 - 1.")
    return int(seed)


@contextmanager
def passes_of(model: PreTrainedModel, report: Report) -> Iterator[None]:
    """Report after each pass of a model's denoiser, with their number so far."""
    count = 0

    def passed(*_: Any) -> None:
        nonlocal count
        count += 1
        report(count)

    handle = model.require_image_decoder().denoiser.register_forward_hook(passed)
    try:
        yield
    finally:
        handle.remove()
