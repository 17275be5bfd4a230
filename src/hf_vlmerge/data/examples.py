"""Small image-text sets in memory: rows of Parquet files (a folder or a Hub data set), images as uint8 tensors."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from hf_vlmerge.data.streaming import open_split


def load_examples(source: str | Path, split: str, image_size: int, image_column: str = "image") -> list[dict]:
    """
    All rows of a split, images decoded and resized once.

    Args:
        source: a folder with `<split>.parquet` (or `<split>-*.parquet`), or the id of a data set on the Hub.
        split: train, validation, ...
        image_size: pixels a side; the aspect ratio is not kept, as at evaluation in the papers.

    Returns:
        one dict a row: `pixel_values` uint8 (3, image_size, image_size), and every other column as it is.

    Raises:
        FileNotFoundError: the folder has no file of that split. ValueError: there is no such image column.
    """
    rows = open_split(source, split)
    if image_column not in rows.column_names:
        raise ValueError(f"{source} has no image column {image_column!r}; it has: {', '.join(rows.column_names)}.")
    progress = tqdm(rows, desc=f"decoding {split}", unit="image", leave=False)
    return [{"pixel_values": to_square(row.pop(image_column), image_size), **row} for row in progress]


def to_square(image: Image.Image, image_size: int) -> torch.Tensor:
    """RGB, bicubic: uint8 (3, image_size, image_size)"""
    resized = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
