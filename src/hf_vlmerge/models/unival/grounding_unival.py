# Copyright 2026 The hf_vlmerge authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Boxes as location bins, and back.

A picture is resized to a square of `side` pixels, so x is multiplied by side / width and y by side / height. The
result is divided by 512 whatever `side` is (in the models that read and write boxes, it is 512), and rounded to one of
1000 bins.
"""

import torch
from torch import Tensor

SCALE = 512.0  # of coordinates, a constant: not the side of the current picture
TOLERANCE = 1.0  # pixels that an annotation may lie outside its picture


def bins_of_boxes(boxes: Tensor, sizes: Tensor, side: int, num_bins: int = 1000) -> Tensor:
    """
    Args:
        boxes: x0, y0, x1, y1 in pixels of the original pictures.
        sizes: height and width of the original pictures.
        side: pixels of the square that the pictures are resized to.

    Shapes:
        boxes (B, 4), sizes (B, 2) -> (B, 4) int64, from 0 to num_bins - 1

    Raises:
        ValueError: a box lies outside its picture or is turned around, or `side` is more than 512.
    """
    if side > SCALE:
        raise ValueError(f"expected pictures of at most {SCALE:.0f} pixels with boxes (the scale of bins); got {side}.")
    boxes, limits = boxes.float(), _width_height(sizes)
    for row, (box, limit) in enumerate(zip(boxes.tolist(), limits.tolist(), strict=True)):
        x0, y0, x1, y1 = box
        inside = min(x0, y0) >= -TOLERANCE and x1 <= limit[0] + TOLERANCE and y1 <= limit[1] + TOLERANCE
        if not (inside and x0 <= x1 and y0 <= y1):
            raise ValueError(
                f"expected a box x0, y0, x1, y1 inside its picture of {limit[0]:.0f} × {limit[1]:.0f} pixels (width × "
                f"height) with x0 ≤ x1 and y0 ≤ y1; row {row} has {', '.join(f'{value:g}' for value in box)}."
            )
    boxes = boxes.clamp(min=0).minimum(limits)
    return (boxes * _ratios(sizes, side) / SCALE * (num_bins - 1)).round().long()


def boxes_of_bins(bins: Tensor, sizes: Tensor, side: int, num_bins: int = 1000) -> Tensor:
    """
    The inverse, up to rounding: (B, 4) bins and (B, 2) heights and widths -> (B, 4) x0, y0, x1, y1 in pixels.

    Bins below 0 stand for tokens that are none; the row of such a one is not a number throughout.
    """
    boxes = bins.float() / (num_bins - 1) * SCALE / _ratios(sizes, side)
    return boxes.masked_fill((bins < 0).any(dim=-1, keepdim=True), torch.nan)


def _width_height(sizes: Tensor) -> Tensor:
    return sizes.float().flip(-1).repeat(1, 2)  # (B, 4): width, height, width, height


def _ratios(sizes: Tensor, side: int) -> Tensor:
    return side / _width_height(sizes)


__all__ = ["bins_of_boxes", "boxes_of_bins"]
