"""RegMean: Jin et al., 2022 (arXiv 2212.09849); for modality experts Sung et al., 2023 (arXiv 2304.14933)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .._matrix import gram_solve, is_matrix
from .._ops import mean
from ..registry import Chunk, MergeError, merge_method


@merge_method(
    "regmean",
    paper="2212.09849",
    unit="tensor",
    statistics="gram",
    weighted=False,
    cost="n products and one Cholesky of the input width a matrix",
    disagreements="Sung et al. sum over tokens (the default), the others take means; all invert without damping",
)
def regmean(*, gamma: float = 0.9, gram: Literal["sum", "mean"] = "sum") -> Callable[[Chunk], Tensor]:
    """Least squares on the layers' inputs: W = (sum W_i G_i) (sum G_i)^-1, nearest to every member's own outputs.

    gamma: factor on the off-diagonal entries of the Gram matrices G_i = X_i^T X_i (section 3). gram: sums over tokens
    as collected (as the released code of 2304.14933; the modality with more tokens weighs more) or means per token (as
    the first paper's code). An input that no member ever saw takes the plain mean of the weights. Biases, norms and
    everything else that is not a matrix: plain mean. A matrix without Gram matrices is an error.
    """

    def merge(c: Chunk) -> Tensor:
        if not is_matrix(c):
            return mean(c.x)
        prior = mean(c.x).double()
        residual, total = torch.zeros_like(prior), 0
        for i in range(len(c.members)):
            g = shrink(checked_gram(c, i, gram), gamma)
            residual += (c.x[i].double() - prior) @ g
            total = g if i == 0 else total.add_(g)
            del g  # before the next one is made
        return (prior + gram_solve(residual, total, c.name)).to(c.x.dtype)  # (out, in)

    return merge


def checked_gram(c: Chunk, i: int, gram: str) -> Tensor:
    """A member's Gram matrix, a float64 copy; one that is all zero, not finite or of another size is an error."""
    member, g, tokens = c.members[i], c.statistics[i], c.tokens[i]
    kind = "an all-zero" if not g.any() else "a" if g.sum().isfinite() else "a NaN or Inf in its"
    if kind != "a" or g.shape != (c.x.shape[2],) * 2:
        raise MergeError(f"{c.name} {tuple(c.x.shape[1:])}: member {member!r} has {kind} Gram matrix {tuple(g.shape)}")
    if gram == "mean" and not tokens:
        raise MergeError(f"{c.name}: gram 'mean' needs the token count of member {member!r} in the statistics")
    g = g.to(torch.float64, copy=True)
    return g.div_(tokens) if gram == "mean" else g


def shrink(g: Tensor, gamma: float) -> Tensor:
    """gamma G + (1 - gamma) diag G, in place."""
    diagonal = g.diagonal().clone()
    g.mul_(gamma).diagonal().copy_(diagonal)
    return g
