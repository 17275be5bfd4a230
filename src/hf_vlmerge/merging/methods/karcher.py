"""Karcher mean of directions: Grove and Karcher, 1973; of model weights (arXiv 2603.04972)."""

import numpy as np
from torch import Tensor

from .._ops import dots, normalized, weighted_sum
from ..registry import Chunk, Program, merge_method


@merge_method(
    "karcher",
    paper="2603.04972",
    cost="O(n^2 P)",
    disagreements="mergekit iterates on vectors in the dtype of the inputs, which loses near-identical bfloat16 "
    "models, and takes no weights; here the iteration runs on the float64 inner products.",
)
def karcher(*, max_iter: int = 10, tol: float = 1e-5) -> Program:
    """Mean on the sphere: the direction m with sum w_i log_m(u_i) = 0, u_i = x_i / |x_i|, with length sum w_i |x_i|.

    max_iter: most steps m <- exp_m(sum w_i log_m(u_i)). tol: a step shorter than this is the last; vectors shorter than
    this have no direction.
    """
    (gram,) = yield dots

    def merge(c: Chunk) -> Tensor:
        weights = np.array(normalized(c.weights.tolist()))
        return weighted_sum(c.x, coefficients(gram.cpu().numpy(), weights, max_iter, tol).tolist())

    return merge


def coefficients(gram: np.ndarray, weights: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """The merge as a weighted sum of the members, from their inner products; directions are sums of the u_i."""
    norms = np.sqrt(gram.diagonal())
    inverse = np.divide(1.0, norms, where=norms > tol, out=np.zeros_like(norms))
    if not inverse.any():
        return np.zeros_like(weights)
    unit = gram * np.outer(inverse, inverse)
    shares = weights * (inverse > 0)
    shares /= shares.sum()
    length = lambda v: np.sqrt(max(0.0, v @ unit @ v))  # noqa: E731
    mean = shares if length(shares) >= tol else (np.arange(len(shares)) == np.argmax(inverse > 0)).astype(float)
    mean = mean / length(mean)
    for _ in range(max_iter):
        cosine = np.clip(unit @ mean, -1, 1)
        angle = np.arccos(cosine)
        lost = (angle < tol) | (angle > np.pi - tol)  # there already, or opposite, where no direction leads
        towards = shares * np.where(lost, 0.0, angle / np.where(lost, 1.0, np.sin(angle)))
        step = towards - (towards @ cosine) * mean  # sum w_i log_m(u_i)
        size = length(step)
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size  # exp_m
        mean = mean / length(mean)
    return (weights @ norms) * mean * inverse
