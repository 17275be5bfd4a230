"""RegMean: Jin et al., 2022 (arXiv 2212.09849); for modality experts Sung et al., 2023 (arXiv 2304.14933)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .._ops import mean
from ..registry import Chunk, MergeError, merge_method


@merge_method("regmean", paper="2212.09849", unit="tensor", statistics="gram", weighted=False)
def regmean(*, gamma: float = 0.9, gram: Literal["sum", "mean"] = "sum") -> Callable[[Chunk], Tensor]:
    """Least squares on the layers' inputs: the W whose outputs are nearest to every member's own outputs.

    gamma: factor on the off-diagonal entries of the Gram matrices. gram: sums over tokens as collected (as the released
    code of 2304.14933; the modality with more tokens weighs more) or means per token (as the first paper's code).
    Biases, norms and everything else that is not a matrix: plain mean. A matrix without Gram matrices is an error.
    """

    def merge(c: Chunk) -> Tensor:
        if c.x.ndim != 3:
            return mean(c.x)
        grams = [shrink(g, gamma) for g in checked_grams(c, gram)]
        left = sum(w.double() @ g for w, g in zip(c.x, grams, strict=True))  # (out, in)
        return solve(left, sum(grams), c.x.double().mean(0)).to(c.x.dtype)

    return merge


def checked_grams(c: Chunk, gram: str) -> list[Tensor]:
    """The members' Gram matrices in float64; one that is all zero, not finite or of another size is an error."""
    grams = []
    for member, g, tokens in zip(c.members, c.statistics, c.tokens, strict=True):
        kind = "an all-zero" if not g.any() else "a" if g.isfinite().all() else "a NaN or Inf in its"
        if kind != "a" or g.shape != (c.x.shape[2],) * 2:
            raise MergeError(
                f"{c.name} {tuple(c.x.shape[1:])}: member {member!r} has {kind} Gram matrix {tuple(g.shape)}"
            )
        if gram == "mean" and not tokens:
            raise MergeError(f"{c.name}: gram 'mean' needs the token count of member {member!r} in the statistics")
        grams.append(g.double() / (tokens if gram == "mean" else 1))
    return grams


def shrink(g: Tensor, gamma: float) -> Tensor:
    """gamma G + (1 - gamma) diag G."""
    return gamma * g + (1 - gamma) * torch.diag(g.diagonal())


def solve(left: Tensor, g: Tensor, prior: Tensor) -> Tensor:
    """X with X g = left, by Cholesky. Where g is singular, a growing jitter pulls X towards the prior."""
    scale = g.diagonal().mean()
    for jitter in (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4):
        ridge = jitter * scale
        factor, failed = torch.linalg.cholesky_ex(g + ridge * torch.eye(len(g), dtype=g.dtype))
        if not failed:
            return torch.cholesky_solve((left + ridge * prior).T, factor).T
    raise MergeError("the sum of the Gram matrices is not positive semi-definite")
