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
"""What a caller gave, as rows: which media belong to which text, and of what kind each row is."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .media_unival import is_array
from .media_unival import is_pil

MEDIA = ("images", "videos", "audio")  # the place of each is its number in `media_types`


def make_rows(**given: Any) -> dict[str, list | None]:
    """
    A list of one length for each argument that was given: one entry a row, None where the row has nothing.

    Raises:
        ValueError: nothing was given, or the numbers of rows differ.
    """
    makers = {"images": image_rows, "videos": video_rows, "audio": audio_rows, "boxes": box_rows}
    given = {name: _listed(value) for name, value in given.items()}
    rows = {name: None if value is None else makers.get(name, text_rows)(value) for name, value in given.items()}
    lengths = {name: len(value) for name, value in rows.items() if value is not None}
    if not lengths or not max(lengths.values()):
        raise ValueError("expected text, images, videos or audio; got none.")
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{length} in {name}" for name, length in lengths.items())
        raise ValueError(f"expected one entry a row (None for rows without a medium) in every list; got {counts}.")
    return rows


def _listed(value: Any) -> Any:
    """Lists of other kinds, such as a column of the `datasets` library, as lists."""
    others = (str, bytes, bytearray, memoryview, list, tuple)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, others) else value


def media_types(rows: Mapping[str, list | None]) -> Tensor:
    """
    The number of each row's medium: -1 none, 0 image, 1 video, 2 audio.

    Shapes:
        -> (B,) int64

    Raises:
        ValueError: a row has two media.
    """
    length = next(len(value) for value in rows.values() if value is not None)
    types = torch.full((length,), -1)
    for number, name in enumerate(MEDIA):
        for row, value in enumerate(rows[name] or ()):
            if value is None:
                continue
            if types[row] >= 0:
                raise ValueError(f"row {row} has entries in {MEDIA[types[row]]} and {name}; a row takes one medium.")
            types[row] = number
    return types


def image_rows(value: Any) -> list:
    """One picture, a batch of pictures in one array, or a list of pictures (each alone or in a list of its own)."""
    if not isinstance(value, (list, tuple)):
        return list(value) if is_array(value) and value.ndim == 4 else [value]
    rows = []
    for row, each in enumerate(value):
        if isinstance(each, (list, tuple)):
            if len(each) > 1:
                raise ValueError(f"row {row} has {len(each)} images; a row takes one.")
            each = each[0] if each else None
        rows.append(each)
    return rows


def video_rows(value: Any) -> list:
    """One clip (a list of pictures is one), a batch of clips in one array, or a list of clips."""
    if not isinstance(value, (list, tuple)):
        return list(value) if is_array(value) and value.ndim == 5 else [value]
    if any(_is_picture(each) for each in value):
        return [list(value)]
    # Chats give each row as a list of its clips. Otherwise a list of several files is a clip of pictures.
    if any(_holds_one_clip(each) for each in value):
        return [None if isinstance(each, (list, tuple)) and not each else _unpacked(each) for each in value]
    return list(value)


def _unpacked(value: Any) -> Any:
    return value[0] if _holds_one_clip(value) else value


def _holds_one_clip(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 1 and not _is_picture(value[0])


def audio_rows(value: Any) -> list:
    """One sound (a list of numbers is one), or a list of sounds."""
    if not isinstance(value, (list, tuple)) or (value and isinstance(value[0], (int, float))):
        return [value]
    return list(value)


def box_rows(value: Any) -> list:
    """One box, or boxes a row; a box is four numbers."""
    rows = value.tolist() if is_array(value) else list(value)
    rows = [rows] if rows and isinstance(rows[0], (int, float)) else rows
    boxes = [box.tolist() if is_array(box) else box for box in rows]
    for row, box in enumerate(boxes):
        if box is not None and len(box) != 4:
            raise ValueError(f"expected boxes of four numbers x0, y0, x1, y1; row {row} has {len(box)}.")
    return boxes


def text_rows(value: Any) -> list:
    """One text, mapping of texts or list of code numbers, or a list of these."""
    if isinstance(value, (str, Mapping)) or is_array(value):
        return list(value) if is_array(value) and value.ndim == 2 else [value]
    if not isinstance(value, Iterable):
        raise ValueError(f"expected a string, or one for every row; got {type(value).__name__}.")
    rows = list(value)
    return [rows] if rows and isinstance(rows[0], int) else rows


def _is_picture(value: Any) -> bool:
    return is_pil(value) or (is_array(value) and value.ndim in (2, 3))


__all__ = ["make_rows", "media_types"]
