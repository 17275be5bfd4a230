"""Fisher-weighted averaging: Matena & Raffel, 2021 (arXiv 2111.09832), section 2.2."""

from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from .._ops import normalized, weighted_sum
from ..registry import Chunk, MergeError, Program, WholeModel, merge_method


@merge_method(
    "fisher",
    paper="2111.09832",
    unit="element",
    statistics="fisher",
    average=True,
    cost="O(n P), one pass more over the Fisher values",
    disagreements="the paper's code floors the first member only, MergeLM and fusion_bench add the floor to all, as an "
    "absolute number that often exceeds the Fisher values; the default floor is relative to them",
)
def fisher(
    *, normalize: bool = True, floor: float = 1e-6, variant: Literal["relative", "first", "add"] = "relative"
) -> Program:
    """Average of the members, weighted by how sensitive each one's loss is: sum w_i F_i x_i / sum w_i F_i.

    F_i is the diagonal of the Fisher information, E[g^2] of each weight, as `hf-vlmerge statistics --kind fisher`
    collects it. normalize: divide F_i by its L2 norm over all tensors that are merged, so that no member dominates by
    its scale. floor: least F_i. variant: "relative" raises every F_i to at least floor times its root mean square;
    "first" raises the first member's to the floor itself, so that it wins where nobody is sensitive (the paper's code,
    favor_target_model); "add" adds the floor to every F_i and to the norms (MergeLM, fusion_bench). A tensor without
    Fisher values that is not a matrix: weighted mean.
    """
    squares, count = yield WholeModel(magnitude)
    norms = [sqrt(s) for s in squares.tolist()]
    least = [floor * norm / sqrt(max(n, 1)) for norm, n in zip(norms, count.tolist(), strict=True)]

    def sensitivity(f: Tensor, i: int) -> Tensor:
        if variant == "add":
            return (f + floor) * (1 / (norms[i] + floor) if normalize else 1)
        bound = least[i] if variant == "relative" else floor if i == 0 else 0.0
        return f.clamp(min=bound) * (1 / norms[i] if normalize else 1)

    def merge(c: Chunk) -> Tensor:
        weights = c.weights.tolist()
        if not has_fisher(c) or not c.x.numel():
            return weighted_sum(c.x, normalized(weights))
        if normalize and variant != "add" and not all(norms):
            raise MergeError(f"member {c.members[norms.index(0.0)]!r} has Fisher values that are all zero")
        f = torch.stack([sensitivity(expectation(c, i), i) for i in range(len(c.members))])
        total = weighted_sum(f, weights)
        merged = weighted_sum(f.mul_(c.x), weights) / total
        nowhere = total == 0
        return torch.where(nowhere, weighted_sum(c.x, normalized(weights)), merged) if nowhere.any() else merged

    return merge


def has_fisher(c: Chunk) -> bool:
    """Whether all members have Fisher values (or none has)."""
    absent = [m for m, f in zip(c.members, c.statistics, strict=True) if f is None]
    if absent and len(absent) < len(c.members):
        raise MergeError(f"{c.name}: member {absent[0]!r} has no Fisher values, which others have")
    return not absent


def expectation(c: Chunk, i: int) -> Tensor:
    """E[g^2] of a run: the sum over samples by their number; values without a number are taken as they are."""
    return c.statistics[i] / (c.tokens[i] or 1)


def magnitude(c: Chunk) -> tuple[Tensor, Tensor]:
    """Reduction: each member's sum of squared Fisher values, and their number."""
    n = len(c.members)
    if not has_fisher(c):
        return torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
    values = [expectation(c, i).double() for i in range(n)]
    squares = torch.stack([f.square().sum() for f in values])
    for member, f, square in zip(c.members, values, squares, strict=True):
        if not (f.numel() == 0 or (f.min() >= 0 and square.isfinite())):
            raise MergeError(f"{c.name}: member {member!r} has Fisher values that are negative or not finite")
    return squares, torch.full((n,), c.x[0].numel())
