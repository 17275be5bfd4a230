"""Isotropic merging in the common subspace: Marczak et al., 2025 (arXiv 2502.04959), section 4.1."""

from collections.abc import Callable

from torch import Tensor

from .._matrix import is_matrix, isometry, mean_update, task_matrix, updated
from ..registry import Chunk, merge_method


@merge_method(
    "iso_c",
    paper="2502.04959",
    unit="tensor",
    needs_base=True,
    cost="one eigendecomposition of the shorter side a matrix",
    disagreements="the scale is tuned on validation data in the paper (0 to 3); the default here is 1",
)
def iso_c(*, scale: float = 1.0) -> Callable[[Chunk], Tensor]:
    """Base plus the summed task matrix with all singular values replaced by their mean: base + scale * s U V^T.

    scale: alpha. A weight multiplies its task matrix. Singular vectors of value zero are arbitrary and stay out, while
    the mean s counts the shorter side's number of values. Everything that is not a matrix: mean of task vectors.
    Embeddings are matrices here; a rule may give them another method.
    """

    def merge(c: Chunk) -> Tensor:
        if not is_matrix(c):
            return mean_update(c, scale)
        total = task_matrix(c, 0)
        for i in range(1, len(c.members)):
            total += task_matrix(c, i)
        direction, values = isometry(total)
        return updated(c, direction * (values / min(total.shape)), scale)

    return merge
