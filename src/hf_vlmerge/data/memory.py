"""Image-text pairs held in memory, read a batch at a time: for small models, whose step costs less than a loader's."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


class PairsInMemory(torch.utils.data.Dataset):
    """
    Pairs as tensors; a data loader gets its whole batch by indexing once, and `VlmoCollator` passes it on.

    Args:
        images: uint8, as Pillow has them.
        texts: one an image; padded to the longest of all, `[PAD]` masked.
        max_length: tokens that a text is cut to.

    Shapes:
        images (N, H, W, 3) -> `pixel_values` (N, 3, H, W), uint8; `input_ids`, `attention_mask` (N, T)
    """

    def __init__(
        self, images: np.ndarray, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int = 40
    ):
        if len(images) != len(texts):
            raise ValueError(f"expected one text an image; got {len(images)} images and {len(texts)} texts.")
        encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        self.columns = {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2),
        }

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A ready batch."""
        return self[torch.as_tensor(indices)]
