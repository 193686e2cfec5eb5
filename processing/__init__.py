# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Text, images and samples -> batches for DEEM. Importing this package or `modeling_deem` registers both."""

from .collating_deem import DeemDataCollator, find_document_starts, make_labels
from .image_processing_deem import DeemImageProcessor
from .image_processing_pil_deem import DeemImageProcessorPil
from .processing_deem import DeemProcessor

__all__ = [
    "DeemDataCollator",
    "DeemImageProcessor",
    "DeemImageProcessorPil",
    "DeemProcessor",
    "find_document_starts",
    "make_labels",
]

import modeling_deem  # noqa: E402, F401  last: it imports the names above and registers them
