# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""From one image to the two sizes DEEM works with (PIL backend, the reference), and the rules both backends share.

Shape letters: N images, H and W the height and width of the image as given, h and w the encoder's size.
"""

import os
from typing import Any

import numpy as np
import PIL.Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    is_valid_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .image_reading_deem import as_array, read_image, to_rgb, upright
from .regions_deem import Region, merge_regions

_HALF = (0.5, 0.5, 0.5)  # mean and std that take [0, 1] to [-1, 1]


class DeemImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    target_size (`dict[str, int]` or `int`, *optional*, defaults to `self.target_size`):
        Size of the images the image decoder is trained to draw.
    return_targets (`bool`, *optional*, defaults to `self.return_targets`):
        Whether to return `target_pixel_values` as well. Needed in training only.
    region_masks (*optional*):
        One mask per image (`None` for a whole image), each `(H, W)` like its image; non-zero means inside the region.
    boxes (*optional*):
        Regions as boxes `[x1, y1, x2, y2]`, one per image (`None` for a whole image), in pixels of the upright image.
    points (*optional*):
        Regions as points `[x, y]`, one per image, likewise: the disc around each.
    point_radius (`float`, *optional*, defaults to 0.05):
        Radius of these discs, as a share of the image's shorter side.
    """

    target_size: int | list[int] | tuple[int, ...] | dict[str, int] | None
    return_targets: bool | None
    region_masks: Any
    boxes: Any
    points: Any
    point_radius: float | int | None


def halving_sizes(height: int, width: int, side: int) -> list[tuple[int, int]]:
    """Sizes an image passes through while its short side is at least `2 * side`; empty if it never is."""
    sizes = []
    while min(height, width) >= 2 * side:
        height, width = height // 2, width // 2
        sizes.append((height, width))
    return sizes


def covering_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Size of the same aspect ratio whose short side is `side`."""
    scale = side / min(height, width)
    return round(height * scale), round(width * scale)


class DeemImageProcessorMixin:
    """
    What the two backends share: defaults, the two sizes, region masks, reading of files.

    Args:
        size (`dict` or `int`, defaults to 256): height and width of `pixel_values`, the encoder's input.
        target_size (`dict` or `int`, defaults to 512): height and width of `target_pixel_values`.
        do_center_crop (`bool`, defaults to `False`):
            `False` squashes the image to the size with bicubic resampling. `True` keeps its proportions: it is
            halved with BOX while its short side is at least twice the size, then resized (bicubic) so that the short
            side fits, then cropped about the center. Needs square sizes.
        image_mean, image_std: the encoder's; applied to `pixel_values` and to nothing else.
        return_targets (`bool`, defaults to `False`): whether to return `target_pixel_values`.

    Calling it returns a `BatchFeature` with

    - `pixel_values` (N, 3, h, w) float32, rescaled to [0, 1] and normalized with `image_mean` and `image_std`;
    - `target_pixel_values` (N, 3, target height, target width) float32 in [-1, 1], with `return_targets=True`;
    - `region_masks` (N, 1, h, w) float32 in {0, 1}, if at least one image has a region; ones for the others.

    Images are PIL images, arrays and tensors, paths, URLs, base64 text and the bytes of files. Whatever they are, they
    become RGB by the rules of `to_rgb` (transparency on white) and are turned upright by their EXIF orientation, so a
    region mask is as large as the upright image.

    Raises `ValueError` for a file that cannot be read (named), an image that is too large or that no rule makes RGB, a
    region mask whose size is not its image's, a box or point outside of it, numbers of regions and images that differ, and
    sizes without height and width.
    """

    valid_kwargs = DeemImageProcessorKwargs
    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 256, "width": 256}
    target_size = {"height": 512, "width": 512}
    default_to_square = True
    do_resize = True
    do_center_crop = False
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    return_targets = False

    def __init__(self, **kwargs: Unpack[DeemImageProcessorKwargs]):
        super().__init__(**kwargs)

    def fetch_images(self, image_url_or_urls: ImageInput) -> Any:
        """Read paths, URLs, base64 and bytes, in lists nested as given; images pass, `(H, W)` arrays as `(1, H, W)`."""
        images = image_url_or_urls
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview)):
            return read_image(images)
        if isinstance(images, PIL.Image.Image):
            return images
        valid = is_valid_image(images)
        if (
            not valid
            or images.ndim not in (2, 3, 4)
            or 0 in images.shape
            or as_array(images[:1]).dtype.kind not in "biuf"
        ):
            kind = f"an array of {images.dtype} of shape {tuple(images.shape)}" if valid else type(images).__name__
            raise ValueError(
                f"Got {kind} for an image. Give a PIL image, an array or tensor of one image (height, width, channels) "
                "or of several, a path, URL, base64 text or the bytes of an image file, or lists of these."
            )
        return images[None] if images.ndim == 2 else images

    @staticmethod
    def _upright_rgb(
        image: ImageInput,
        do_convert_rgb: bool | None,
        do_rescale: bool | None,
        input_data_format: str | ChannelDimension | None,
    ) -> Any:
        """One image as `upright` and, with `do_convert_rgb`, `to_rgb` give it."""
        if isinstance(image, PIL.Image.Image):
            image = upright(image)
        elif not do_rescale and "float" in str(image.dtype):
            return image  # in 0 ... 1 by its user's word; stays as fine as it is
        if not do_convert_rgb:
            return image
        first = None if input_data_format is None else ChannelDimension(input_data_format) == ChannelDimension.FIRST
        return to_rgb(image, channels_first=first)

    def _standardize_kwargs(self, target_size: Any = None, **kwargs) -> dict:
        kwargs = super()._standardize_kwargs(**kwargs)
        if target_size is not None and not isinstance(target_size, SizeDict):
            target_size = SizeDict(**get_size_dict(target_size, param_name="target_size"))
        kwargs["target_size"] = target_size
        for name in ("size", "target_size"):
            if kwargs[name] is not None and min(kwargs[name].height or 0, kwargs[name].width or 0) < 1:
                raise ValueError(
                    f"`{name}` needs a height and a width, got {dict(kwargs[name])}. Write for instance "
                    f"`{name}={{'height': 256, 'width': 256}}`."
                )
        if kwargs["crop_size"] is not None and kwargs["crop_size"] != kwargs["size"]:
            raise ValueError(
                f"DEEM crops to `size` itself, got crop_size={dict(kwargs['crop_size'])} and "
                f"size={dict(kwargs['size'])}. Leave `crop_size` out."
            )
        return kwargs

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        if kwargs["do_center_crop"]:
            for name in ("size", "target_size"):
                if kwargs[name].height != kwargs[name].width:
                    raise ValueError(
                        f"`do_center_crop=True` needs a square `{name}`, got {dict(kwargs[name])}. Make it square, or "
                        "set `do_center_crop=False`."
                    )
        super()._validate_preprocess_kwargs(**{**kwargs, "crop_size": kwargs["size"]})

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        region_masks: Any = None,
        boxes: Any = None,
        points: Any = None,
        point_radius: float | None = None,
        **kwargs: Unpack[DeemImageProcessorKwargs],
    ) -> BatchFeature:
        region_masks = merge_regions(region_masks, boxes, points, point_radius)
        images = self._prepare_image_like_inputs(images, **kwargs)
        if not images:
            raise ValueError("Got no image. Give at least one, or call the processor with text alone.")
        masks = self._prepare_region_masks(region_masks, [self._height_width(image) for image in images])
        return self._preprocess(images, region_masks=masks, **kwargs)

    def check_images(self, images: ImageInput, region_masks: Any = None) -> None:
        """Refuse what a call would refuse, without its work: nothing is resized or normalized."""
        options = {"do_convert_rgb": self.do_convert_rgb, "do_rescale": self.do_rescale}
        prepared = self._prepare_image_like_inputs(images, **options)
        self._prepare_region_masks(region_masks, [self._height_width(image) for image in prepared])

    def _prepare_region_masks(
        self, region_masks: Any, image_sizes: list[tuple[int, int]]
    ) -> list[np.ndarray | None] | None:
        """Any nesting of masks and regions -> one `(H, W)` bool array or None per image; None if no image has a region."""
        if region_masks is None:
            return None
        if isinstance(region_masks, PIL.Image.Image) or getattr(region_masks, "ndim", None) == 2:
            region_masks = [region_masks]
        if not isinstance(region_masks, (list, tuple)) and not getattr(region_masks, "ndim", 0):
            raise ValueError(
                f"Got {type(region_masks).__name__} for region masks. Give one mask (height, width) per image, None for a "
                "whole image, in a list."
            )
        flat = []
        for entry in region_masks:
            flat.extend(entry if isinstance(entry, (list, tuple)) else [entry])
        if len(flat) != len(image_sizes):
            raise ValueError(
                f"Got {len(flat)} region masks for {len(image_sizes)} images. Give one per image, None for a whole image."
            )
        masks = []
        for index, (mask, size) in enumerate(zip(flat, image_sizes, strict=True)):
            if isinstance(mask, Region):
                mask = mask.mask(size, index)
            elif mask is not None:
                mask = as_array(mask)
                mask = mask.squeeze() if mask.ndim == 3 and 1 in (mask.shape[0], mask.shape[-1]) else mask
                if mask.shape != size:
                    raise ValueError(
                        f"Region mask {index} is {' x '.join(map(str, mask.shape))} but its image is "
                        f"{size[0]} x {size[1]} (height x width, upright). Draw the mask on the image as given, "
                        "before any resizing."
                    )
                mask = mask != 0
            masks.append(mask)
        return None if all(mask is None for mask in masks) else masks

    def _resized_masks(
        self,
        masks: list[np.ndarray | None],
        images: list[Any],
        size: SizeDict,
        do_resize: bool,
        do_center_crop: bool,
        **kwargs,
    ) -> list[np.ndarray]:
        """(H, W) bool each -> (1, h, w) float32 in {0, 1}: its image's resizing and crop, with nearest sampling."""
        resized = []
        for mask, image in zip(masks, images, strict=True):
            height, width = self._height_width(image)
            new_height, new_width = (size.height, size.width) if do_resize else (height, width)
            full_height, full_width = new_height, new_width
            if do_resize and do_center_crop:
                halved = [(height, width), *halving_sizes(height, width, size.height)][-1]
                full_height, full_width = covering_size(*halved, size.height)
            rows = (np.arange(new_height) + (full_height - new_height) // 2) * height // full_height
            columns = (np.arange(new_width) + (full_width - new_width) // 2) * width // full_width
            mask = np.ones((height, width), dtype=bool) if mask is None else mask
            resized.append(mask[rows[:, None], columns][None].astype(np.float32))
        return resized

    def _fit(
        self,
        image: Any,
        sizes: set[SizeDict],
        do_resize: bool,
        do_center_crop: bool,
        resample: Any,
        **kwargs,
    ) -> dict[SizeDict, Any]:
        """One image, or several of one size, brought to each of `sizes`; gray levels as given."""
        if not do_resize:
            return dict.fromkeys(sizes, image)
        if not do_center_crop:
            return {size: self.resize(image, size, resample=resample) for size in sizes}
        fitted = {}
        # Largest first: the halvings for the larger size are the first halvings for the smaller one.
        for size in sorted(sizes, key=lambda size: -size.height):
            for height, width in halving_sizes(*self._height_width(image), size.height):
                image = self.halve(image, SizeDict(height=height, width=width))
            height, width = covering_size(*self._height_width(image), size.height)
            covering = self.resize(image, SizeDict(height=height, width=width), resample=resample)
            fitted[size] = self.center_crop(covering, size)
        return fitted

    def _normalize_both(
        self,
        fitted: dict[SizeDict, Any],
        size: SizeDict,
        target_size: SizeDict,
        return_targets: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        **kwargs,
    ) -> tuple[Any, Any]:
        """Images by size -> encoder pixels, and target pixels or None."""
        pixel_values = self.rescale_and_normalize(
            fitted[size], do_rescale, rescale_factor, do_normalize, image_mean, image_std
        )
        if not return_targets:
            return pixel_values, None
        return pixel_values, self.rescale_and_normalize(
            fitted[target_size], do_rescale, rescale_factor, True, _HALF, _HALF
        )

    @staticmethod
    def _height_width(image: Any) -> tuple[int, int]:
        return tuple(image.shape[-2:])


class DeemImageProcessorPil(DeemImageProcessorMixin, PilBackend):
    __doc__ = (DeemImageProcessorMixin.__doc__ or "").replace(
        "What the two backends share: defaults, the two sizes, region masks, reading of files.",
        "Both sizes of DEEM's images with PIL and NumPy: the reference, needs no torchvision.",
    )

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        do_rescale: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Unpack[DeemImageProcessorKwargs],
    ) -> PIL.Image.Image | np.ndarray:
        """One image -> upright RGB as a PIL image; without `do_convert_rgb`, or of floats, `(C, H, W)` arrays."""
        image = image if isinstance(image, PIL.Image.Image) else as_array(image)
        image = self._upright_rgb(image, do_convert_rgb, do_rescale, input_data_format)
        if isinstance(image, PIL.Image.Image) and image.mode == "RGB":
            return image  # no way through an array and back: PIL resizes it
        return super().process_image(
            image, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, **kwargs
        )

    @staticmethod
    def _height_width(image: PIL.Image.Image | np.ndarray) -> tuple[int, int]:
        return (image.height, image.width) if isinstance(image, PIL.Image.Image) else tuple(image.shape[-2:])

    def resize(
        self, image: PIL.Image.Image | np.ndarray, size: SizeDict, resample: PILImageResampling | None = None, **kwargs
    ) -> PIL.Image.Image | np.ndarray:
        """An image of `size`, in the kind that was given."""
        if isinstance(image, PIL.Image.Image):
            return image.resize((size.width, size.height), resample=resample)
        return super().resize(image, size, resample=resample, **kwargs)

    def center_crop(
        self, image: PIL.Image.Image | np.ndarray, size: SizeDict, **kwargs
    ) -> PIL.Image.Image | np.ndarray:
        """The middle of an image that is at least of `size`, in the kind that was given."""
        if isinstance(image, PIL.Image.Image):
            left, top = (image.width - size.width) // 2, (image.height - size.height) // 2
            return image.crop((left, top, left + size.width, top + size.height))
        return super().center_crop(image, size, **kwargs)

    def halve(self, image: PIL.Image.Image | np.ndarray, size: SizeDict) -> PIL.Image.Image | np.ndarray:
        """Shrink by two with a box filter, (3, H, W) -> (3, H // 2, W // 2)."""
        return self.resize(image, size, resample=PILImageResampling.BOX)

    def rescale_and_normalize(
        self,
        images: list[PIL.Image.Image | np.ndarray],
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
    ) -> np.ndarray | list[np.ndarray]:
        """`(image * rescale_factor - mean) / std`, each step if asked for.

        Images of one size -> (N, 3, h, w) float32; of several sizes -> one (3, h, w) each.
        """

        def computed(image: np.ndarray) -> np.ndarray:
            image = self.rescale(image, rescale_factor) if do_rescale else image
            return self.normalize(image, image_mean, image_std) if do_normalize else image

        arrays = [np.moveaxis(np.asarray(i), -1, 0) if isinstance(i, PIL.Image.Image) else i for i in images]
        if len({(array.shape, array.dtype.str) for array in arrays}) > 1 or arrays[0].dtype != np.uint8:
            return [computed(array) for array in arrays]
        # The same arithmetic on the 256 values that a pixel can have, looked up: a fraction of the time.
        channels = arrays[0].shape[0]
        table = computed(np.repeat(np.arange(256, dtype=np.uint8)[None, None], channels, axis=0))[:, 0]  # [3, 256]
        looked_up = np.empty((len(arrays), *arrays[0].shape), table.dtype)
        for array, out in zip(arrays, looked_up, strict=True):
            for channel, row, place in zip(array, table, out, strict=True):
                np.take(row, channel, out=place, mode="clip")
        return looked_up

    def _preprocess(
        self,
        images: list[PIL.Image.Image | np.ndarray],
        size: SizeDict,
        target_size: SizeDict,
        return_targets: bool,
        region_masks: list[np.ndarray | None] | None,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        wanted = {size, target_size} if return_targets else {size}
        fitted = [self._fit(image, wanted, **kwargs) for image in images]
        by_size = {one: [sizes[one] for sizes in fitted] for one in wanted}
        pixels, targets = self._normalize_both(by_size, size, target_size, return_targets, **kwargs)
        data = {"pixel_values": pixels} | ({} if targets is None else {"target_pixel_values": targets})
        if return_tensors is None:
            data = {name: list(values) for name, values in data.items()}
        if region_masks is not None:
            data["region_masks"] = self._resized_masks(region_masks, images, size=size, **kwargs)
        return BatchFeature(data=data, tensor_type=return_tensors)


__all__ = ["DeemImageProcessorPil"]
