"""Euclidean distance."""

from itertools import combinations

import torch
from torch import Tensor

from ..registry import Chunk, distance_metric


@distance_metric("l2")
def l2():
    """Euclidean norm of the difference; the mean over pairs of more than two members."""

    def terms(c: Chunk) -> tuple[Tensor]:
        return (torch.stack([((a - b) ** 2).sum() for a, b in combinations(c.x.double(), 2)]),)

    def value(squares: Tensor) -> Tensor:
        return squares.sqrt().mean()

    return terms, value
