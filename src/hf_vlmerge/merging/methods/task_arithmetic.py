"""Task arithmetic: Ilharco et al., 2022 (arXiv 2212.04089)."""

from collections.abc import Callable

from torch import Tensor

from .._compiled import Compiled
from .._ops import normalized, on_base_, weighted_sum_
from ..registry import Chunk, merge_method


@merge_method(
    "task_arithmetic",
    paper="2212.04089",
    compiled=True,
    needs_base=True,
    cost="O(n P)",
    disagreements="mergekit forms task vectors and their sum in the dtype of the inputs; here both are float32.",
)
def task_arithmetic(*, scale: float = 1.0, normalize: bool = False) -> Callable[[Chunk], Tensor]:
    """Base plus scaled sum of task vectors: base + scale * sum w_i (x_i - base).

    scale: lambda. normalize: divide the sum by the sum of the weights, which makes it a mean of task vectors.
    """

    def merge(c: Chunk) -> Tensor:
        weights = c.weights.tolist()
        return on_base_(c, weighted_sum_(c.deltas_(), normalized(weights) if normalize else weights), scale)

    return Compiled(merge, normalize=normalize, scale=scale)
