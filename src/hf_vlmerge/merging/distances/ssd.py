"""Soft sign dissimilarity, after the idea of Sung et al., 2023 (arXiv 2304.14933); the formula is this project's."""

from torch import Tensor

from .._ops import soft_sign_terms, soft_sign_value
from ..registry import Chunk, distance_metric


@distance_metric("ssd", paper="2304.14933")
def ssd():
    """Mean over entries of 1 - |sum_m w_m| / sum_m |w_m|: 0 where signs agree, 1 where they cancel; 0/0 counts as 0."""

    def terms(c: Chunk) -> tuple[Tensor, Tensor]:
        return soft_sign_terms(c.x)

    return terms, soft_sign_value
