# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The image processor on tensors (torchvision backend): same names and rules as the PIL one, batched, on any device."""

import numpy as np
import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import ChannelDimension, ImageInput, SizeDict
from transformers.processing_utils import Unpack
from transformers.utils import TensorType

from .image_processing_pil_deem import DeemImageProcessorKwargs, DeemImageProcessorMixin
from .image_reading_deem import check_size


class DeemImageProcessor(DeemImageProcessorMixin, TorchvisionBackend):
    __doc__ = (DeemImageProcessorMixin.__doc__ or "").replace(
        "What the two backends share: defaults, the two sizes, region masks, reading of files.",
        "Both sizes of DEEM's images on tensors. Needs torchvision; its bicubic filter differs from PIL's in the last "
        "gray level.",
    )
    valid_kwargs = DeemImageProcessorKwargs

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        do_rescale: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: torch.device | str | None = None,
        **kwargs: Unpack[DeemImageProcessorKwargs],
    ) -> torch.Tensor:
        """One image -> upright RGB, `(3, H, W)`, on `device`; a tensor stays on its own without one."""
        form = {"do_convert_rgb": do_convert_rgb, "input_data_format": input_data_format}
        if isinstance(image, torch.Tensor):
            device = image.device if device is None else device
            if image.dtype == torch.uint8 and {*image.shape[::2]} & {1, 2, 3, 4} == {3}:  # nothing to convert
                image = super().process_image(image, **form, device=device)
                check_size(image.shape[2], image.shape[1])
                return image
        image = self._upright_rgb(image, do_rescale=do_rescale, **form)
        return super().process_image(image, **form, device=device, **kwargs)

    def halve(self, image: torch.Tensor, size: SizeDict) -> torch.Tensor:
        """Shrink by two with a box filter. (..., 3, H, W) -> (..., 3, H // 2, W // 2)."""
        # torchvision has no box filter for tensors. PIL's averages whole pixels, rows first, and rounds in between.
        for dim, new in ((-1, size.width), (-2, size.height)):
            old = image.shape[dim]
            edges = ((torch.arange(new + 1, device=image.device) * old * 2 + new) // (2 * new)).clamp(max=old)
            sums = torch.nn.functional.pad(image.movedim(dim, -1).double().cumsum(dim=-1), (1, 0))
            means = (sums[..., edges[1:]] - sums[..., edges[:-1]]) / (edges[1:] - edges[:-1])
            means = means if image.is_floating_point() else (means + 0.5).floor()
            image = means.to(image.dtype).movedim(-1, dim)
        return image

    def _preprocess(
        self,
        images: list[torch.Tensor],
        size: SizeDict,
        target_size: SizeDict,
        return_targets: bool,
        region_masks: list[np.ndarray | None] | None,
        disable_grouping: bool | None,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        groups, index = group_images_by_shape(images, disable_grouping=disable_grouping)
        wanted = {size, target_size} if return_targets else {size}
        pixels, targets = {}, {}
        for shape, stack in groups.items():
            fitted = self._fit(stack, wanted, **kwargs)
            pixels[shape], targets[shape] = self._normalize_both(fitted, size, target_size, return_targets, **kwargs)
        data = {"pixel_values": reorder_images(pixels, index)}
        if return_targets:
            data["target_pixel_values"] = reorder_images(targets, index)
        if region_masks is not None:
            masks = self._resized_masks(region_masks, images, size=size, **kwargs)
            data["region_masks"] = [torch.from_numpy(mask).to(images[0].device) for mask in masks]
        return BatchFeature(data=data, tensor_type=return_tensors)


__all__ = ["DeemImageProcessor"]
