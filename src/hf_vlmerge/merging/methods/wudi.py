"""WUDI-Merging: Cheng et al., 2025 (arXiv 2503.08099), in closed form, and with SWUDI's spectral filter (2026)."""

from collections.abc import Callable
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from .._matrix import cholesky, is_matrix, leading, mean_update, task_matrix, updated
from ..registry import Chunk, MergeError, merge_method


@merge_method(
    "wudi",
    paper="2503.08099",
    unit="tensor",
    needs_base=True,
    weighted=False,
    cost="3 n products and one Cholesky of the input width a matrix; spectral: one eigendecomposition",
    disagreements="the released code and fusion_bench stop Adam (rate 1e-5) after 300 or 400 steps from the sum; this "
    "is what they descend to",
)
def wudi(
    *,
    scale: float = 1.0,
    spectral: bool = False,
    time: float = 300.0,
    share: float = 0.65,
    start: Literal["sum", "mean"] = "sum",
) -> Callable[[Chunk], Tensor]:
    """Base plus the t that disturbs no task: the least sum of |(t - t_i) t_i^T|^2 / |t_i|^2 over task matrices t_i.

    scale: on t. With G_i = t_i^T t_i / |t_i|^2 the minimiser is RegMean of the task matrices, t = (sum t_i G_i) (sum
    G_i)^-1, which is solved and not descended to. spectral: as SWUDI, go from the start towards it only on the leading
    share of eigenvalues l of sum G_i, by the factor 1 - exp(-time l). time: how far. share: of the input width, 0.65
    for CLIP, 0.85 for language models. start: sum of the task matrices, or mean. Everything that is not a matrix: mean
    of task vectors. Embeddings are matrices here; a rule may give them another method.
    """
    if not 0 < share <= 1:
        raise MergeError(f"wudi: share must lie above 0 and up to 1, not {share}")

    def merge(c: Chunk) -> Tensor:
        if not is_matrix(c):
            return mean_update(c, scale)
        factor = len(c.members) if spectral and start == "sum" else 1
        prior = (c.x.mean(0) - c.base).double() * factor  # outside the span of all t_i nothing is disturbed
        squares = [float(task_matrix(c, i).square().sum()) for i in range(len(c.members))]
        moving = [i for i, square in enumerate(squares) if square]  # a member equal to the base asks for nothing
        if not moving:
            return c.base.clone()
        residual = torch.zeros_like(prior)
        for i in moving:
            residual.add_(disturbance(task_matrix(c, i), prior), alpha=1 / squares[i])
        if not spectral and (factor := factored(c, moving, squares)) is not None:
            return updated(c, prior + torch.cholesky_solve(residual.T, factor).T, scale)
        # By eigenvectors: what no task spans stays at the prior.
        rows = torch.cat([task_matrix(c, i) / squares[i] ** 0.5 for i in moving])  # sum G_i = rows^T rows
        _, s, v = leading(rows, ceil(share * rows.shape[1]) if spectral else None)
        reach = -torch.expm1(-time * s**2) if spectral else 1.0
        return updated(c, prior + residual @ v * (reach / s**2) @ v.T, scale)

    return merge


def factored(c: Chunk, moving: list[int], squares: list[float]) -> Tensor | None:
    """The Cholesky factor of sum G_i; None where the task matrices do not span all inputs."""
    rows, columns = c.x.shape[1:]
    if len(moving) * rows < columns:
        return None
    total = torch.zeros(columns, columns, dtype=torch.float64, device=c.x.device)
    for i in moving:
        task = task_matrix(c, i)
        total.addmm_(task.T, task, alpha=1 / squares[i])
    return cholesky(total)


def disturbance(task: Tensor, prior: Tensor) -> Tensor:
    """(t_i - t) t_i^T t_i, by the cheaper order of products."""
    wide = task.shape[0] < task.shape[1]
    return ((task - prior) @ task.T) @ task if wide else (task - prior) @ (task.T @ task)
