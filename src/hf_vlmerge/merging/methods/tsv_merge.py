"""Task Singular Vectors: Gargiulo et al., 2024 (arXiv 2412.00081), algorithm 1 (TSV-Merge)."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._matrix import Triplets, is_matrix, isometry, leading, mean_update, task_matrix, updated
from ..registry import Chunk, merge_method


@merge_method(
    "tsv_merge",
    paper="2412.00081",
    unit="tensor",
    needs_base=True,
    cost="n + 2 eigendecompositions of the shorter side a matrix",
    disagreements="the released file has lossless variants too; this is the one that its command and fusion_bench run",
)
def tsv_merge(*, scale: float = 1.0) -> Callable[[Chunk], Tensor]:
    """Base plus the leading singular vectors of every task matrix, decorrelated: base + scale * U' S V'^T.

    scale: alpha. A weight multiplies its task matrix before anything else. Of n members each gives its leading r/n
    singular triplets, r being the shorter side; the concatenated U and V are replaced by their nearest isometries.
    Singular vectors of value zero are arbitrary and not taken. Everything that is not a matrix, and a matrix whose
    shorter side is less than n: mean of task vectors. Embeddings are matrices here; a rule may give them another
    method.
    """

    def merge(c: Chunk) -> Tensor:
        n = len(c.members)
        if not is_matrix(c) or min(c.x.shape[1:]) < n:
            return mean_update(c, scale)
        rank = min(c.x.shape[1:]) // n
        # 1. Compress: the leading r/n triplets of each task matrix.
        parts = [leading(task_matrix(c, i), rank) for i in range(n)]
        # 2. Concatenate.
        u, s, v = Triplets(*(torch.cat(each, dim=-1) for each in zip(*parts, strict=True)))
        del parts
        # 3. Whiten (Procrustes) and rebuild.
        return updated(c, (isometry(u)[0] * s) @ isometry(v)[0].T, scale)

    return merge
