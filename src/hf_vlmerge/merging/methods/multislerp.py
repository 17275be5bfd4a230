"""Multi-SLERP: Goddard, 2024, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea."""

from math import cos, sin, sqrt

from torch import Tensor

from .._ops import dots_from_base, from_base, normalized, weighted_sum
from ..registry import Chunk, MergeError, Program, merge_method


def _is_mean(parameters, weights) -> bool:
    return parameters["normalize_weights"] or abs(sum(weights) - 1) < 1e-6


@merge_method(
    "multislerp",
    paper="Goddard 2024, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    takes_base=True,
    keeps_equal=_is_mean,
    cost="O(n^2 P)",
    disagreements="mergekit computes in the dtype of the inputs; here the coefficients come from float64 products.",
)
def multislerp(*, normalize_weights: bool = True, eps: float = 1e-8) -> Program:
    """Barycentre on a sphere by one step from the normalised weighted mean, of members or of their task vectors.

    normalize_weights: divide the weights by their sum. eps: a mean direction shorter than this has none; two members
    are then interpolated linearly. With u_i = x_i / |x_i| and m the direction of sum w_i u_i, the tangents
    u_i - <u_i, m> m are averaged, the exponential map goes back to the sphere, sum w_i |x_i| is the length. A single
    member is returned as it is.
    """
    (gram,) = yield dots_from_base

    def merge(c: Chunk) -> Tensor:
        if len(c.members) == 1:
            return c.x[0].clone()
        weights = normalized(c.weights.tolist()) if normalize_weights else c.weights.tolist()
        merged = weighted_sum(from_base(c), coefficients(gram.tolist(), weights, eps))
        return merged if c.base is None else merged.add_(c.base)

    return merge


def coefficients(gram: list[list[float]], weights: list[float], eps: float) -> list[float]:
    """The merge as a weighted sum of the members, from their inner products."""
    n = range(len(weights))
    norms = [sqrt(gram[i][i]) for i in n]
    inverse = [1 / norm if norm > 0 else 0.0 for norm in norms]
    unit = [[gram[i][j] * inverse[i] * inverse[j] for j in n] for i in n]
    length = sqrt(max(0.0, sum(weights[i] * weights[j] * unit[i][j] for i in n for j in n)))
    if length < eps:
        if len(weights) == 2 or not any(norms):
            return weights
        raise MergeError(
            "multislerp: the weighted directions cancel, so there is no mean direction; change the weights"
        )
    mean = [w / length for w in weights]  # m, as coefficients of the u_i
    along = [sum(unit[i][j] * mean[j] for j in n) for i in n]  # <u_i, m>
    total = sum(w * a for w, a in zip(weights, along, strict=True))
    tangent = [w - total * m for w, m in zip(weights, mean, strict=True)]
    size = sqrt(max(0.0, sum(tangent[i] * tangent[j] * unit[i][j] for i in n for j in n)))
    step = sin(size) / size if size > eps else 1.0
    scale = sum(w * norm for w, norm in zip(weights, norms, strict=True))
    return [scale * (cos(size) * m + step * t) * v for m, t, v in zip(mean, tangent, inverse, strict=True)]
