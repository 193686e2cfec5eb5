# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What is asked: the model of `--model`, loaded as the kind that a benchmark asks for."""

from typing import TYPE_CHECKING, Any

import torch

from modeling_deem import DeemForConditionalGeneration
from recipes.evaluation.answering import Answerer, load_model
from recipes.evaluation.benchmark import PROTOCOLS
from recipes.evaluation.drawing import DeemPainter, Drawer, load_painter
from recipes.evaluation.predictions import model_digests
from recipes.evaluation.two_towers import TwoTowers, load_two_towers

if TYPE_CHECKING:
    from recipes.evaluation.suite import SuiteArguments


class Subjects:
    """Loads the model once for each kind of benchmark (`Benchmark.asks`).

    Args:
        device: of the model.
        names_files: whether to hash the model's files, for the manifest; one process does it.
    """

    def __init__(self, arguments: "SuiteArguments", device: torch.device, names_files: bool) -> None:
        self.arguments, self.device = arguments, device
        self.names_files = names_files
        self._loaded: dict[str, tuple[Any, str, dict[str, Any]]] = {}

    def of(self, kind: str) -> tuple[Any, str, dict[str, Any]]:
        """Return what answers, the protocol, and what the manifest says of the model.

        Raises:
            ValueError: the model is of another kind, or there is none.
        """
        if kind not in self._loaded:
            self._loaded[kind] = {
                "language": self._language,
                "towers": self._towers,
                "drawing": self._drawing,
            }[kind]()
        return self._loaded[kind]

    def _language(self) -> tuple[Answerer, str, dict[str, Any]]:
        given = self.arguments
        if given.encoder:
            raise ValueError("--encoder replaces the vision tower of two-tower models alone, as mmvp_vlm asks them.")
        model, processor = load_model(given.model, given.dtype, self.device)
        protocol = self._protocol("deem" if isinstance(model, DeemForConditionalGeneration) else "standard")
        kept, size = 2 * given.batch_size, given.batch_size
        answerer = Answerer(model, processor, protocol, given.seed, given.encode_once, kept, size)
        return answerer, protocol, self._about(model)

    def _towers(self) -> tuple[TwoTowers, str, dict[str, Any]]:
        given = self.arguments
        model, processor = load_two_towers(given.model, given.encoder, given.dtype, self.device)
        about = self._about(model)
        if given.encoder and self.names_files:
            about["encoder"] = model_digests(given.encoder)
        return TwoTowers(model, processor, 2 * given.batch_size), self._protocol("standard"), about

    def _drawing(self) -> tuple[Drawer, str, dict[str, Any]]:
        given = self.arguments
        if given.drawings_per_caption > 1 and not given.rank_by:
            raise ValueError(
                "--drawings_per_caption above 1 needs --rank_by, a two-tower model that chooses among them."
            )
        painter, folder = load_painter(given.model, given.protocol, given.dtype, self.device)
        protocol = self._protocol("deem" if isinstance(painter, DeemPainter) else "standard")
        ranker = TwoTowers(*load_two_towers(given.rank_by, device=self.device)) if given.rank_by else None
        about = {"dtype": given.dtype, "device": self.device.type}
        if self.names_files:
            about |= model_digests(folder)
            about |= {"rank_by": model_digests(given.rank_by)} if given.rank_by else {}
        return Drawer(painter, given.seed, ranker), protocol, about

    def _protocol(self, default: str) -> str:
        protocol = self.arguments.protocol or default
        if protocol not in PROTOCOLS:
            raise ValueError(f"Unknown protocol {protocol!r}; give one of {', '.join(PROTOCOLS)}.")
        return protocol

    def _about(self, model: Any) -> dict[str, Any]:
        about = {"dtype": str(model.dtype), "device": model.device.type}
        return about | (model_digests(self.arguments.model) if self.names_files else {})
