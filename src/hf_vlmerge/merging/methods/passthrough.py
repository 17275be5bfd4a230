"""Passthrough: one model as it is, or scaled."""

from collections.abc import Callable

from torch import Tensor

from ..registry import Chunk, PerMember, merge_method


def _is_unscaled(parameters, weights) -> bool:
    return set(parameters["scale"]) == {1.0}


@merge_method(
    "passthrough",
    members=(1, 1),
    weighted=False,
    keeps_equal=_is_unscaled,
    paper="mergekit 2023, https://github.com/arcee-ai/mergekit",
    cost="O(P)",
)
def passthrough(*, scale: PerMember = 1.0) -> Callable[[Chunk], Tensor]:
    """The one member, times a factor.

    scale: the factor.
    """
    return lambda c: c.x[0] * scale[0]
