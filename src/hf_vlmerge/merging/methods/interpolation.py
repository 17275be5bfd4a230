"""Interpolation of the experts inside one checkpoint: Sung et al., 2023 (arXiv 2304.14933), section 4."""

from collections.abc import Callable

from torch import Tensor

from .._ops import weighted_sum
from ..registry import Chunk, merge_method


@merge_method("interpolation", paper="2304.14933", members=(1, 3), weighted=False, average=True, cost="O(n P)")
def interpolation(*, ratio: float = 0.5, fusion_share: float = 1 / 3) -> Callable[[Chunk], Tensor]:
    """Vision against language, with a fixed share for the cross-modal expert of fusion layers.

    ratio: vision's share alpha. fusion_share: share of the cross-modal expert where there are three.
    Members come in the order vision, language, cross-modal; a single member (a rule's choice) stays as it is.
    """

    def merge(c: Chunk) -> Tensor:
        share = fusion_share if len(c.members) == 3 else 0.0
        weights = [(1 - share) * ratio, (1 - share) * (1 - ratio), share]  # vision, language, cross-modal
        return c.x[0].clone() if len(c.members) == 1 else weighted_sum(c.x, weights[: len(c.members)])

    return merge
