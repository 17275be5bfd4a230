"""Arithmetic shared by methods and distances. Every function gives the same bits for every chunk size.

Sums over members are written as loops of ``*`` and ``+``: matrix products and fused multiply-adds may differ in the
last bit with the length of a chunk.
"""

from collections.abc import Generator, Sequence
from itertools import combinations_with_replacement
from typing import Literal

import torch
from torch import Tensor

from .registry import Chunk, MergeError, Reduce, WholeModel

Scope = Literal["tensor", "global"]


def weighted_sum(x: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum of ``weights[i] * x[i]`` in member order; x (members, ...)."""
    result = x[0] * weights[0]
    for member, weight in zip(x[1:], weights[1:], strict=True):
        result += member * weight
    return result


def mean(x: Tensor) -> Tensor:
    """Plain mean over members."""
    return weighted_sum(x, [1 / len(x)] * len(x))


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, which must not vanish."""
    total = sum(weights)
    if abs(total) < 1e-8:
        raise MergeError(f"weights {list(weights)} sum to zero and cannot be normalised")
    return [w / total for w in weights]


def dots(c: Chunk) -> tuple[Tensor]:
    """Reduction: inner products of all members, (members, members) float64."""
    x, count = c.x.double(), len(c.members)
    gram = torch.empty(count, count, dtype=torch.float64)
    for i, j in combinations_with_replacement(range(count), 2):
        gram[i, j] = gram[j, i] = (x[i] * x[j]).sum()
    return (gram,)


def kth_magnitude(keep: Sequence[float], scope: Scope) -> Generator[Reduce | WholeModel, tuple[Tensor, ...], Tensor]:
    """Program: the smallest magnitude among the ``keep`` share of largest ones, exactly, (members,) float32.

    The bits of a non-negative float32 are ordered like its value, so two histograms find the k-th largest one:
    of the upper 16 bits, then of the lower 15 bits within the bin that holds it. k = max(1, int(keep * entries)).
    """
    ask = WholeModel if scope == "global" else (lambda reduce: reduce)
    (counts,) = yield ask(lambda c: (_histogram(_bits(c) >> 15, 1 << 16),))
    ranks = [max(1, int(share * count)) for share, count in zip(keep, counts.sum(1).tolist(), strict=True)]
    upper, rest = _descend(counts, ranks)

    def within(c: Chunk) -> tuple[Tensor]:
        bits = _bits(c)
        return (_histogram([b[b >> 15 == u] & 0x7FFF for b, u in zip(bits, upper, strict=True)], 1 << 15),)

    (counts,) = yield ask(within)
    lower, _ = _descend(counts, rest)
    bits = [(u << 15) | low for u, low in zip(upper, lower, strict=True)]
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def _bits(c: Chunk) -> Tensor:
    return c.x.abs().contiguous().view(torch.int32).flatten(1)


def _histogram(values: Sequence[Tensor], bins: int) -> Tensor:
    return torch.stack([torch.bincount(v, minlength=bins) for v in values])


def _descend(counts: Tensor, ranks: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each row: the bin that holds the rank-th largest value, and its rank within that bin."""
    above = counts.flip(1).cumsum(1).flip(1)  # values in this bin or a higher one
    found = [int((row >= rank).nonzero().max()) for row, rank in zip(above, ranks, strict=True)]
    rest = [rank - int(row[b] - n[b]) for row, n, b, rank in zip(above, counts, found, ranks, strict=True)]
    return found, rest


def soft_sign_terms(x: Tensor) -> tuple[Tensor, Tensor]:
    """Reduction: the sum of 1 - |sum_m x_m| / sum_m |x_m| over entries (0/0 counts as 0), and the number of entries."""
    x = x.double()
    magnitude = x.abs().sum(0)
    agreement = x.sum(0).abs() / magnitude
    return (1 - agreement.where(magnitude > 0, 1.0)).sum(), torch.tensor(magnitude.numel())


def soft_sign_value(sums: Tensor, entries: Tensor) -> Tensor:
    """The mean of the soft sign terms."""
    return sums / entries
