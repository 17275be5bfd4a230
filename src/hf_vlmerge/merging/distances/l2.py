"""Euclidean distance."""

from itertools import combinations

import torch
from torch import Tensor

from ..registry import Chunk, distance_metric


@distance_metric("l2")
def l2():
    """Euclidean norm of the difference; the mean over pairs of more than two members."""

    def terms(c: Chunk) -> tuple[Tensor]:
        differences = (a - b for a, b in combinations(c.x.double(), 2))
        return (torch.stack([(d * d).sum() for d in differences]),)

    def value(squares: Tensor) -> Tensor:
        return squares.sqrt().mean()

    return terms, value
