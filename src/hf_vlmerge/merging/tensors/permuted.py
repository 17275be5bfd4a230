"""A source whose units are numbered differently: indices permuted along axes of its tensors."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .sources import TensorSource
from .views import View, read_rows


class Permutation(NamedTuple):
    """Entry i along ``axis`` of the result is entry ``index[i]`` of the source; for ``rows`` (first, last) of the first
    axis only, where given."""

    axis: int
    index: np.ndarray
    rows: tuple[int, int] | None = None


class PermutedSource(View):
    """Shows tensors with permuted axes; nothing is computed, every value keeps its bits."""

    def __init__(self, source: TensorSource, permutations: Mapping[str, Sequence[Permutation]]) -> None:
        super().__init__(source)
        self.permutations = {key: tuple(own) for key, own in permutations.items() if own}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        own = self.permutations.get(key)
        if own is None:
            return super().read(key, start, stop)
        shape = self.shape(key)
        columns = self.numel(key) // shape[0]
        stop = self.numel(key) if stop is None else stop
        first, last = start // columns, -(-stop // columns)
        rows = np.arange(first, last)
        for step in reversed(own):
            rows = step.index[rows] if step.axis == 0 else rows
        values = read_rows(self.source, key, rows).reshape(last - first, *shape[1:])
        for step in own:
            if step.axis != 0:
                values = along_axis(values, step, first)
        return values.reshape(-1)[start - first * columns : stop - first * columns]

    def extent(self, key: str) -> tuple[int, int] | None:
        return None if key in self.permutations else super().extent(key)


def along_axis(values: Tensor, step: Permutation, first: int) -> Tensor:
    """Permute an axis other than the first of a run of rows that begins at row ``first``."""
    index = torch.from_numpy(step.index)
    if step.rows is None:
        return values.index_select(step.axis, index)
    low, high = (min(max(row - first, 0), len(values)) for row in step.rows)
    return torch.cat([values[:low], values[low:high].index_select(step.axis, index), values[high:]])
