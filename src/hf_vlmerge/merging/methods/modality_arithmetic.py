"""Modality arithmetic: Sung et al., 2023 (arXiv 2304.14933), section 4. The base is the seed checkpoint."""

from collections.abc import Callable

from torch import Tensor

from .._ops import on_base_, weighted_sum_
from ..registry import Chunk, merge_method


@merge_method(
    "modality_arithmetic",
    paper="2304.14933",
    needs_base=True,
    weighted=False,
    cost="O(n P)",
    disagreements="The released code moves the base itself while it sums; sequential computes that.",
)
def modality_arithmetic(*, scale: float = 0.5, sequential: bool = False) -> Callable[[Chunk], Tensor]:
    """Seed plus scaled sum of modality vectors: base + scale * sum (x_i - base).

    scale: lambda. sequential: what the released code computes. There the running sum is the base itself, so each next
    difference is taken from the already moved weights, in member order; a single member replaces the base (factor 1).
    """

    def merge(c: Chunk) -> Tensor:
        if not sequential:
            return on_base_(c, weighted_sum_(c.deltas_()), scale)
        if len(c.members) == 1:
            return c.x[0].clone()
        moved = c.base
        for x in c.x:
            moved = moved + (x - moved) * scale
        return moved

    return merge
