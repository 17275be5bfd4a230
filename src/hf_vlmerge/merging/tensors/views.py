"""Views: sources made of another source. Engine and groups see names, shapes and runs of elements as of any other."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .sources import TensorSource


class View(TensorSource):
    """Shows another source as it is. A kind of view overrides what it changes."""

    def __init__(self, source: TensorSource) -> None:
        super().__init__()
        self.source, self.label, self.revision, self.config = source, source.label, source.revision, source.config
        self.ignored, self.tied, self.notes, self.details = source.ignored, source.tied, source.notes, source.details
        self.metadata, self.side_files, self.files = source.metadata, source.side_files, source.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __contains__(self, key: object) -> bool:
        return key in self.source

    def __len__(self) -> int:
        return len(self.source)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.source.shape(self.require(key))

    def dtype(self, key: str) -> torch.dtype:
        return self.source.dtype(self.require(key))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.read(self.require(key), start, stop)

    def extent(self, key: str) -> tuple[int, int] | None:
        return self.source.extent(self.require(key))

    def close(self) -> None:
        self.source.close()


def read_rows(source: TensorSource, key: str, rows: Sequence[int] | np.ndarray) -> Tensor:
    """The rows (first axis) of a tensor in the order given, (len(rows), columns). Neighbours are read in one go."""
    rows = np.asarray(rows, dtype=np.int64)
    columns = source.numel(key) // max(1, source.shape(key)[0])
    if not rows.size:
        return torch.empty(0, columns, dtype=source.dtype(key))
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    firsts, ends = rows[np.r_[0, breaks]], rows[np.r_[breaks - 1, -1]] + 1
    pieces = [source.read(key, a * columns, b * columns) for a, b in zip(firsts.tolist(), ends.tolist(), strict=True)]
    return torch.cat(pieces).reshape(len(rows), columns)
