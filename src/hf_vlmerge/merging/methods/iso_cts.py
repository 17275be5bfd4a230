"""Isotropic merging in common and task-specific subspaces: Marczak et al., 2025 (arXiv 2502.04959), section 4.2."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._matrix import is_matrix, isometry, leading, mean_update, task_matrix, updated
from ..registry import Chunk, MergeError, merge_method


@merge_method(
    "iso_cts",
    paper="2502.04959",
    unit="tensor",
    needs_base=True,
    cost="n + 3 eigendecompositions of the shorter side a matrix",
    disagreements="the common rank grows or shrinks until the rest divides by n, as in the released code",
)
def iso_cts(*, scale: float = 1.0, common_share: float = 0.8) -> Callable[[Chunk], Tensor]:
    """Base plus an isotropic matrix that spans the common directions and the leading ones of every task.

    scale: alpha. common_share: share of the rank that the summed task matrix's leading triplets take; the rest goes to
    the members in equal parts, to the leading triplets of what the common left vectors leave of each task matrix.
    A weight multiplies its task matrix. Singular vectors of value zero are arbitrary and stay out. Everything that is
    not a matrix: mean of task vectors. Embeddings are matrices here; a rule may give them another method.
    """
    if not 0 <= common_share <= 1:
        raise MergeError(f"iso_cts: common_share must lie between 0 and 1, not {common_share}")

    def merge(c: Chunk) -> Tensor:
        if not is_matrix(c):
            return mean_update(c, scale)
        n, rank = len(c.members), min(c.x.shape[1:])
        own = max(0, min(round((rank - int(rank * common_share)) / n), rank // n))  # triplets of each member
        # 1. The common subspace: leading triplets of the sum.
        total = task_matrix(c, 0)
        for i in range(1, n):
            total += task_matrix(c, i)
        common = leading(total, rank - own * n)
        # 2. Task-specific subspaces: leading triplets of what is left of each task matrix.
        parts, size = [common], float(common.s.max()) if len(common.s) else 0.0
        for i in range(n if own else 0):
            task = task_matrix(c, i)
            parts.append(leading(task - common.u @ (common.u.T @ task), own, size))
        # 3. Orthogonalise both sides, and give every direction the mean singular value.
        u, s, v = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
        del parts, common, total
        return updated(c, isometry(u)[0] @ isometry(v)[0].T * (s.sum() / rank), scale)

    return merge
