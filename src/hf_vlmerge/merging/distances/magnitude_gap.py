"""How different the lengths of members are: where one is much longer, it dominates a plain average."""

import torch
from torch import Tensor

from ..registry import Chunk, distance_metric


@distance_metric("magnitude_gap")
def magnitude_gap():
    """1 - |shortest| / |longest|, of Euclidean norms: 0 for equal lengths, 1 where one member is zero."""

    def terms(c: Chunk) -> tuple[Tensor]:
        return (torch.stack([(x * x).sum() for x in c.x.double()]),)

    def value(squares: Tensor) -> Tensor:
        longest = squares.max()
        return 1 - (squares.min() / longest).sqrt() if longest else longest

    return terms, value
