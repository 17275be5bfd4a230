"""Truncated soft sign dissimilarity, after the idea of Sung et al., 2023 (arXiv 2304.14933)."""

from torch import Tensor

from .._ops import Trim, soft_sign_terms, soft_sign_value
from .._order import Scope, kth_magnitude
from ..registry import Chunk, PerMember, Program, distance_metric


@distance_metric("tssd", paper="2304.14933")
def tssd(*, keep_fraction: PerMember = 0.2, scope: Scope = "tensor") -> Program:
    """Soft sign dissimilarity after each member's small entries are set to zero.

    keep_fraction: share of the largest magnitudes that each member keeps. scope: whether that share is taken of every
    tensor or of the whole model. An entry that only one member keeps counts as agreement (its term is 0).
    """
    trim_ = Trim.to((yield from kth_magnitude(keep_fraction, scope)))

    def terms(c: Chunk) -> tuple[Tensor, Tensor]:
        return soft_sign_terms(trim_(c.x.clone()))

    return terms, soft_sign_value
