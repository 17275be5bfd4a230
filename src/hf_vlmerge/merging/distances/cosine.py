"""Cosine dissimilarity."""

from itertools import combinations

import torch
from torch import Tensor

from .._ops import dots
from ..registry import distance_metric


@distance_metric("cosine")
def cosine():
    """1 - a.b / (|a| |b|), the mean over pairs of more than two members; 0 between zero vectors, 1 to a zero vector."""

    def value(gram: Tensor) -> Tensor:
        return torch.stack([between(gram, i, j) for i, j in combinations(range(len(gram)), 2)]).mean()

    return dots, value


def between(gram: Tensor, i: int, j: int) -> Tensor:
    norms = (gram[i, i] * gram[j, j]).sqrt()
    if norms == 0:
        return (gram[i, i] != gram[j, j]).double()
    return (1 - gram[i, j] / norms).clamp(0, 2)
