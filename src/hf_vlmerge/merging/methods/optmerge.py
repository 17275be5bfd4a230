"""OptMerge: Wei et al., 2025 (arXiv 2505.19892), the form for low-rank task vectors ("WUDI v2")."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .._matrix import is_matrix, leading, mean_update, task_matrix, updated
from ..registry import Chunk, merge_method


@merge_method(
    "optmerge",
    paper="2505.19892",
    unit="tensor",
    needs_base=True,
    weighted=False,
    cost="n + 1 eigendecompositions of the shorter side a matrix, whatever the number of steps",
    disagreements="the released script for fully trained models truncates t_i minus the mean, starts from the sum and "
    "uses Adam (rate 1e-5)",
)
def optmerge(
    *,
    scale: float = 1.0,
    steps: int = 300,
    rate: float = 1e-4,
    momentum: float = 0.9,
    start: Literal["mean", "sum"] = "mean",
) -> Callable[[Chunk], Tensor]:
    """Base plus the t that a few steps of gradient descent on the truncated WUDI loss reach from the mean.

    The loss is the sum of |(t - U_i S_i V_i^T) (S_i V_i^T)^T|^2 / |t_i|^2 over the leading r/n singular triplets of
    each of the n task matrices t_i, r being the shorter side. scale: on t. steps: of gradient descent,
    rate: of a step, momentum: from step to step. Steps are linear in t, so all are taken at once, eigenvalue by
    eigenvalue, with the result of the loop. start: mean or sum of the task matrices. Everything that is not a matrix,
    and a matrix whose shorter side is less than n: mean of task vectors. Embeddings are matrices here; a rule may give
    them another method.
    """

    def merge(c: Chunk) -> Tensor:
        n = len(c.members)
        if not is_matrix(c) or min(c.x.shape[1:]) < n:
            return mean_update(c, scale)
        # 1. Truncate each task matrix; |t_i| is that of the whole one.
        parts, norms = [], []
        for i in range(n):
            task = task_matrix(c, i)
            if norm := float(task.norm()):  # a member equal to the base asks for nothing
                parts.append(leading(task, min(c.x.shape[1:]) // n))
                norms.append(norm)
        if not parts:
            return c.base.clone()
        # 2. The gradient is 2 (t C - D) with C = sum V S^2 V^T / |t_i|^2 and D = sum U S^3 V^T / |t_i|^2.
        _, s, v = leading(torch.cat([p.v.T * (p.s / norm)[:, None] for p, norm in zip(parts, norms, strict=True)]))
        towards = sum(p.u * (p.s**3 / norm**2) @ (p.v.T @ v) for p, norm in zip(parts, norms, strict=True))
        # 3. Descend: in the eigenvectors v of C, t = kept * first + gained * D.
        kept, gained = descend(s**2, steps, rate, momentum)
        first = (c.x.mean(0) - c.base).double() * (n if start == "sum" else 1)
        return updated(c, first + (first @ v * (kept - 1) + towards * gained) @ v.T, scale)

    return merge


def descend(eigenvalues: Tensor, steps: int, rate: float, momentum: float) -> tuple[Tensor, Tensor]:
    """What SGD leaves of the start, and what it takes up of D, for each eigenvalue."""
    kept, gained = torch.ones_like(eigenvalues), torch.zeros_like(eigenvalues)
    kept_speed, gained_speed = torch.zeros_like(eigenvalues), torch.zeros_like(eigenvalues)
    for _ in range(steps):
        kept_speed = momentum * kept_speed + 2 * eigenvalues * kept
        gained_speed = momentum * gained_speed + 2 * (eigenvalues * gained - 1)
        kept, gained = kept - rate * kept_speed, gained - rate * gained_speed
    return kept, gained
