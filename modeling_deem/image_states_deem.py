# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Which tokens see which images: the one carrier of it, and where documents and drawn images begin.

Letters: B sequences, T tokens, N images of the batch, n images per sequence at most, G images to draw, L context length,
Q image tokens per image, S cells of all levels, E feature width, D language width, H heads, c value channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput, logging

from .sampling_deem import Bags
from .vision_deem import resize_region_masks

logger = logging.get_logger(__name__)

FUSION_EPS = 1e-6  # of the denoiser's feature norms


@dataclass
class DeemImageStates(ModelOutput):
    """What image attention needs of the images of a batch.

    Attributes:
        features: (N, S, E), the attended pyramid levels of every image, flattened, one behind the other, and normalized
            (`normalize_features`): every block that reads them has an affine of its own, which folds into its projection.
        sides: (height, width) of these levels.
        visible: bool (B, T, n), which images each token of the prompt sees, or (G, n) for images to draw. Tokens behind
            the prompt see what its last token sees: a bos that the model writes or proposes begins no document.
        index: int64 (B, n), which of the N images is the k-th of each row (0 where a row has fewer); None where each
            row has one image, its own.
        kept_values: projected values (N, H, S, c) by block, kept from step to step; None where nothing is kept.
        kept_tables: the position tables of each block, kept likewise.
    """

    features: torch.Tensor | None = None
    sides: list[tuple[int, int]] | None = None
    visible: torch.Tensor | None = None
    index: torch.Tensor | None = None
    kept_values: dict[str, torch.Tensor] | None = None
    kept_tables: dict[str, list[torch.Tensor]] | None = None

    def of_tokens(self, start: int | torch.Tensor, length: int, keep: bool) -> "DeemImageStates":
        """Return the states of `length` tokens from column `start` of the sequence on; `keep` the projected values."""
        columns = torch.arange(length, device=self.visible.device) + start
        visible = self.visible[:, columns.clamp(max=self.visible.shape[1] - 1)]
        return replace(self, visible=visible, **({} if keep else {"kept_values": None, "kept_tables": None}))

    def repeat(self, times: int) -> "DeemImageStates":
        """Return the states of a batch of which every row stands `times` times, one behind the other."""
        rows = {name: getattr(self, name).repeat_interleave(times, dim=0) for name in ("visible", "index")}
        return replace(self, **rows, kept_values=dict(self.kept_values or {}))

    @property
    def row_index(self) -> torch.Tensor:
        """`index`, also where each row has one image, its own."""
        if self.index is not None:
            return self.index
        return torch.arange(len(self.visible), device=self.visible.device)[:, None]

    def get_values(self, key: str | None, project: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the projected values (N, H, S, c) of block `key`; `project` makes them of `features`."""
        if self.kept_values is None or key is None:
            return project(self.features)
        if key not in self.kept_values:
            self.kept_values[key] = project(self.features)
        return self.kept_values[key]

    def get_sights(self, length: int) -> "Sights":
        """Return which of `length` queries per row sees which image; found once for all blocks that ask the same."""
        found = self.__dict__.setdefault("_sights", {})
        if length not in found:
            found[length] = Sights.of(self.visible, self.row_index, length)
        return found[length]

    def get_tables(self, key: str) -> list[torch.Tensor] | None:
        """Return the list in which block `key` keeps its position tables; None where nothing is kept."""
        return None if self.kept_tables is None else self.kept_tables.setdefault(key, [])


def image_ranks(visible: torch.Tensor) -> torch.Tensor:
    """bool (..., n) -> int64 (..., n): how many visible images ago each image was seen, nearest 1, invisible 0."""
    seen = visible.long()
    return seen * (seen.sum(-1, keepdim=True) + 1 - seen.cumsum(-1))


@dataclass
class Sights:
    """The pairs of a query and an image that it sees, in the order of images.

    Attributes:
        query: int64 (P,), number of the query among the (G * L) of a batch.
        image: int64 (P,), which of the N images it sees.
        rank: int64 (P,), how many visible images ago that was.
    """

    query: torch.Tensor
    image: torch.Tensor
    rank: torch.Tensor

    def __post_init__(self):
        self._bags: dict[tuple, tuple[torch.Tensor, Bags]] = {}

    @classmethod
    def of(cls, visible: torch.Tensor, index: torch.Tensor, length: int) -> "Sights":
        """Sights of `length` queries in each of G rows, from `visible`, (G, n) or (G, L, n), and `index` (G, n)."""
        each = visible.dim() == 3  # query of its own
        rows, *columns, places = visible.nonzero(as_tuple=True)
        query = rows * length + columns[0] if each else rows * length
        image, order = index[rows, places].sort(stable=True)
        query, rank = query[order], image_ranks(visible)[visible][order]
        if not each:
            steps = torch.arange(length, device=rows.device)
            query = (query[:, None] + steps).flatten()
            image, rank = image.repeat_interleave(length), rank.repeat_interleave(length)
        return cls(query, image, rank)

    def get_bags(self, heads: int, shared: bool, num_images: int) -> tuple[torch.Tensor, Bags]:
        """Return the order in which (pair, head) stand by the maps they look into, int64 (P * heads,), and those maps: one
        per head of each of `num_images`, or one per image that all its heads share."""
        key = (heads, shared, num_images)
        if key not in self._bags:
            head = torch.arange(heads, device=self.image.device)
            maps = self.image[:, None].expand(-1, heads) if shared else self.image[:, None] * heads + head
            maps, order = maps.flatten().sort(stable=True)
            counts = torch.bincount(maps, minlength=num_images * (1 if shared else heads)).tolist()
            self._bags[key] = order, Bags(maps.int(), counts)
        return self._bags[key]


def check_images_are_given(
    images: ModelOutput | None, states: DeemImageStates | None, is_image: torch.Tensor, read: int
) -> None:
    """Refuse what would leave images out of sight: `read` tokens in the cache, image tokens bool (B, T) behind them.

    Image tokens without images are read as plain tokens, as transformers' own tests demand, with a warning.

    Raises:
        ValueError: a cache whose images are not known, or images that the states do not know.
    """
    if states is not None and len(states.visible) != len(is_image):
        raise ValueError(
            f"{len(is_image)} sequences, but image_states of {len(states.visible)}. Give the states of these sequences "
            "(image_states.repeat(times) for several answers to each)."
        )
    if images is None and states is None and read:
        raise ValueError(
            f"The cache holds {read} tokens, but which images they see is not known. Give the image_states of the "
            "output that came with the cache (image_states=outputs.image_states of a call with use_cache=True), or to "
            "generate the whole sequence and all its images."
        )
    if images is None and states is None and is_image.any():
        logger.warning_once("The text holds image tokens, but no images were given: they are read as plain tokens.")
    if images is not None and read and (states is None or is_image[:, max(states.visible.shape[1] - read, 0) :].any()):
        raise ValueError(
            f"Images among tokens behind a cache of {read} tokens need the image_states of the whole sequence: give "
            "generate the whole sequence and all its images, or call get_image_states with them."
        )


def flatten_features(image_features: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """V maps (N, E, side, side) -> (N, S, E), levels one behind the other, each row by row."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in image_features], dim=1)


def normalize_features(features: torch.Tensor, eps: float, center: bool = False) -> torch.Tensor:
    """Features (..., E) of mean square 1, as an RMS norm without weights; with `center` as a layer norm of none."""
    if center:
        return F.layer_norm(features, features.shape[-1:], eps=eps)
    exact = features.float()
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(features.dtype)


def no_features(*shape: int, like: torch.Tensor) -> DeemImageStates:
    """Return the states of a batch (B, T) or of images (G,) that sees no image; features of the kind of `like` (E,)."""
    index = torch.zeros(shape[0], 0, dtype=torch.long, device=like.device)
    visible = torch.zeros(*shape, 0, dtype=torch.bool, device=like.device)
    return DeemImageStates(features=like.new_zeros(0, 0, like.shape[-1]), sides=[], visible=visible, index=index)


def own_features(
    image_features: tuple[torch.Tensor, ...], region_masks: torch.Tensor | None = None, resize: str = "bilinear"
) -> DeemImageStates:
    """Return states in which each of N images sees its own pyramid (N, E, side, side), zero outside its region."""
    if region_masks is not None:
        image_features = [
            level * resize_region_masks(region_masks, level.shape[-2:], resize).to(level.dtype)
            for level in image_features
        ]
    count, device = image_features[0].shape[0], image_features[0].device
    return DeemImageStates(
        features=normalize_features(flatten_features(image_features), FUSION_EPS, center=True),
        sides=[tuple(level.shape[-2:]) for level in image_features],
        visible=torch.ones(count, 1, dtype=torch.bool, device=device),
    )


def locate_images(
    is_image: torch.Tensor, is_bos: torch.Tensor, num_image_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which images each row has, and which of them each token sees (spec section 3, cross-attention mask).

    A token sees an image from the image's first token on, until the next document starts.

    Args:
        is_image: bool (B, T), image tokens; every Q of them in a row are one image.
        is_bos: bool (B, T), document starts.

    Returns:
        index int64 (B, n): flat number of the k-th image of each row, 0 where a row has fewer;
        visible bool (B, T, n).
    """
    batch, length = is_image.shape
    rows, columns = first_image_tokens(is_image, num_image_tokens)
    place = (is_image.cumsum(1)[rows, columns] - 1) // num_image_tokens
    most = int(place.max()) + 1 if len(place) else 0

    index = rows.new_zeros(batch, most)
    first_column = rows.new_full((batch, most), length)  # an absent image never begins
    index[rows, place] = torch.arange(len(rows), device=rows.device)
    first_column[rows, place] = columns

    token = torch.arange(length, device=is_image.device)[None, :, None]
    first_column = first_column[:, None]
    visible = (first_column <= token) & (first_column > last_document_start(is_bos)[..., None])
    return index, visible


def first_image_tokens(is_image: torch.Tensor, num_image_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns, int64 (N,) each, of every image's first token among the image tokens, bool (B, T)."""
    is_first = is_image & (is_image.cumsum(1) % num_image_tokens == 1 % num_image_tokens)
    return is_first.nonzero(as_tuple=True)


def last_document_start(is_bos: torch.Tensor) -> torch.Tensor:
    """bool (B, T) -> int64 (B, T), the column of the latest bos at or before each token, -1 before the first."""
    columns = torch.arange(is_bos.shape[1], device=is_bos.device)
    return torch.where(is_bos, columns, -1).cummax(dim=1).values


@dataclass
class ImagePlaces:
    """Where images are drawn: rows and columns of their start-of-image tokens, and the columns where their documents
    start, int64 (G,) each."""

    rows: torch.Tensor
    columns: torch.Tensor
    document_starts: torch.Tensor

    @classmethod
    def of(
        cls, input_ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, starts: torch.Tensor | None, config
    ) -> "ImagePlaces":
        """Places in a text (B, T); a document starts at the latest bos before the image unless `starts` says."""
        if starts is None:
            latest = last_document_start(input_ids == config.bos_token_id)
            starts = latest[rows, (columns - 1).clamp(min=0)].clamp(min=0)
        return cls(rows, columns, starts)

    @classmethod
    def of_images(cls, input_ids: torch.Tensor, config, document_starts: torch.Tensor | None = None) -> "ImagePlaces":
        """Places of all images that the text (B, T) holds, in the order of the batch."""
        begins_image = input_ids == config.start_of_image_token_id
        begins_image[:, :-1] &= input_ids[:, 1:] == config.image_token_id
        begins_image[:, -1] = False
        rows, columns = begins_image.nonzero(as_tuple=True)
        return cls.of(input_ids, rows, columns, document_starts, config)

    def context_columns(self, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of each image's context, from its start-of-image token back to its document's start.

        Args:
            attention_mask: (B, T), 0 at padding, or None.

        Returns:
            columns int64 (G, L); mask bool (G, L), True where a column counts.
        """
        longest = int((self.columns - self.document_starts).max()) + 1
        columns = self.columns[:, None] - torch.arange(longest, device=self.columns.device)  # [G, L]
        mask = columns >= self.document_starts[:, None]
        columns = columns.clamp(min=0)
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[self.rows[:, None], columns]
        return columns, mask


def gather_contexts(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, places: ImagePlaces
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (B, T, D) before each image, reversed in time (spec section 7).

    Returns:
        contexts (G, L, D), the start-of-image token first; mask bool (G, L).
    """
    columns, mask = places.context_columns(attention_mask)
    return hidden_states[places.rows[:, None], columns] * mask[..., None].to(hidden_states.dtype), mask


def is_supervised(context_mask: torch.Tensor, image_loss_mask: torch.Tensor | None = None) -> torch.Tensor:
    """bool (G,): which images the image loss learns to draw, from the mask (G, L) of their contexts.

    An image whose context is no more than a bos and a start-of-image token has nothing to be drawn from.

    Args:
        image_loss_mask: bool (G,), what the caller wants supervised.
    """
    supervised = context_mask.sum(1) > 2
    return supervised if image_loss_mask is None else supervised & image_loss_mask.bool()


def supervised_images(batch: dict[str, torch.Tensor], config) -> torch.Tensor:
    """bool (N,): the images that the image loss of a batch of `DeemDataCollator` is a mean over.

    All of them where the config's `image_loss_reduction` is "all".
    """
    places = ImagePlaces.of_images(batch["input_ids"], config, batch.get("document_starts"))
    if config.image_decoder_config.image_loss_reduction == "all" or not len(places.rows):
        return torch.ones_like(places.rows, dtype=torch.bool)
    _, mask = places.context_columns(batch.get("attention_mask"))
    return is_supervised(mask, batch.get("image_loss_mask"))


def previous_features(
    image_features: tuple[torch.Tensor, ...], given: ImagePlaces, drawn: ImagePlaces, num_previous_images: int
) -> DeemImageStates:
    """Return states in which each image to draw sees the images just before it in its document (spec section 7).

    Args:
        image_features: V maps (N, E, side, side) of all images given, in the order of their places.
        drawn: places of the G images to draw.
    """
    length = torch.maximum(given.columns.max(), drawn.columns.max()) + 1
    order = given.rows * length + given.columns
    before = torch.searchsorted(order, drawn.rows * length + drawn.columns)  # images before it
    steps = torch.arange(num_previous_images, 0, -1, device=order.device)  # oldest first
    index = before[:, None] - steps  # [G, m]
    visible = index >= 0
    index = index.clamp(min=0)
    visible = visible & (given.rows[index] == drawn.rows[:, None])
    visible = visible & (given.columns[index] >= drawn.document_starts[:, None])
    if not visible.any():
        none = image_features[0].flatten(2).transpose(1, 2)[:0]  # [0, side*side, E], still with the gradient's way
        return DeemImageStates(features=none, sides=[], visible=visible, index=index)
    return DeemImageStates(
        features=normalize_features(flatten_features(image_features), FUSION_EPS, center=True),
        sides=[tuple(level.shape[-2:]) for level in image_features],
        visible=visible,
        index=index,
    )
