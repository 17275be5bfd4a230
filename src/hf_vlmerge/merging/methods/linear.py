"""Weighted average of models: Model Soups (Wortsman et al., 2022), and the weight averaging of UnIVAL (2023)."""

from collections.abc import Callable

from torch import Tensor

from .._compiled import Compiled
from .._ops import normalized, weighted_sum_
from ..registry import Chunk, merge_method


def _is_mean(parameters, weights) -> bool:
    return parameters["normalize"] or abs(sum(weights) - 1) < 1e-6


@merge_method(
    "linear",
    paper="2203.05482",
    compiled=True,
    average=True,
    keeps_equal=_is_mean,
    cost="O(n P)",
    disagreements="mergekit and Model Soups divide by the sum of the weights, UnIVAL takes them as they are.",
)
def linear(*, normalize: bool = True) -> Callable[[Chunk], Tensor]:
    """Weighted average of the members: sum w_i x_i / sum w_i.

    normalize: divide by the sum of the weights; without it the weights are taken as they are, as UnIVAL does.
    """

    def merge(c: Chunk) -> Tensor:
        weights = c.weights.tolist()
        return weighted_sum_(c.x, normalized(weights) if normalize else weights)

    return Compiled(merge, normalize=normalize)
