"""Spherical linear interpolation between two models: Shoemake, 1985."""

from math import acos, sin, sqrt

from torch import Tensor

from .._ops import dots, weighted_sum
from ..registry import Chunk, Program, merge_method


@merge_method(
    "slerp",
    paper="Shoemake 1985",
    members=(2, 2),
    weighted=False,
    cost="O(P)",
    disagreements="mergekit and fusion_bench apply the coefficients to tensors with their own norms, as here.",
)
def slerp(*, ratio: float = 0.5) -> Program:
    """Along the great circle between two members; ratio 0 is the first one, ratio 1 the second.

    ratio: t. The angle is that of the directions, the coefficients apply to the tensors with their own norms (as in
    mergekit). Nearly parallel tensors (|cos| > 0.9995) are interpolated linearly; a zero tensor counts as orthogonal.
    """
    (gram,) = yield dots
    norms = [sqrt(gram[0, 0]), sqrt(gram[1, 1])]
    cosine = float(gram[0, 1]) / (norms[0] * norms[1]) if min(norms) > 1e-8 else 0.0
    weights = [1 - ratio, ratio]
    if abs(cosine) <= 0.9995:
        angle = acos(cosine)
        weights = [sin((1 - ratio) * angle) / sin(angle), sin(ratio * angle) / sin(angle)]

    def merge(c: Chunk) -> Tensor:
        return weighted_sum(c.x, weights)

    return merge
