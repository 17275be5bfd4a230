"""Arcee Fusion: Arcee AI, 2025, as mergekit defines it."""

import torch
from torch import Tensor

from .._order import kth_largest
from ..registry import Chunk, Program, merge_method


@merge_method(
    "arcee_fusion",
    paper="Arcee AI 2025, https://github.com/arcee-ai/mergekit",
    unit="row",
    needs_base=True,
    weighted=False,
    members=(1, 1),
    cost="O(P); two passes for the quartiles",
    disagreements="mergekit takes the quartiles of tensors with more than a million entries from a random sample; here "
    "they are exact. The softmax of weights makes the result depend on their scale.",
)
def arcee_fusion() -> Program:
    """Take the member's values where they matter: base + m (x - base), m = [importance >= median + 1.5 (q3 - q1)].

    The importance of an entry is |x - base| times the divergence KL(softmax x || softmax base) of its row; median and
    quartiles are those of the tensor's importances.
    """

    def quartiles(row: int, n: int) -> list[int]:
        return [n - int(share * (n - 1)) for share in (0.25, 0.5, 0.75)]  # ranks; 1 is the largest

    lower, median, upper = (yield from kth_largest(importance, quartiles, rows=True))[0].tolist()
    least = median + 1.5 * (upper - lower)

    def merge(c: Chunk) -> Tensor:
        return c.deltas()[0].mul_(importance(c)[0].ge_(least).view(c.base.shape)).add_(c.base)

    return merge


def importance(c: Chunk) -> Tensor:
    """|x - base| times its row's divergence, (1, entries)."""
    p, q = (softmax(values.double()).add_(1e-8) for values in (c.x[0], c.base))
    divergence = (p * (p / q).log_()).sum(1, keepdim=True).clamp_(min=0)
    return c.deltas()[0].abs_().mul_(divergence.float()).view(1, -1)


def softmax(rows: Tensor) -> Tensor:
    if not rows.numel():
        return rows.clone()
    powers = torch.exp(rows - rows.amax(1, keepdim=True))
    return powers / powers.sum(1, keepdim=True)
