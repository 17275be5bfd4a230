"""Linear algebra shared by the matrix methods: singular triplets, nearest isometries, and solves with Gram matrices.

All of it runs in float64. Whitening and equalising spectra divide by singular values: an SVD in float32 would leave
errors of 1e-7 times the condition number of a task vector, which is 1e3 to 1e5. In float64 the eigenvectors of the Gram
matrix of the shorter side are exact enough, and they cost what an SVD in float32 costs (2048 x 2048, one thread: Gram
and eigenvectors 2.0 s; SVD 2.3 s in float32, 4.1 s in float64). Singular values
below 1e-6 of the largest are zero: they are what rounding to float32 leaves of a matrix of low rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._ops import weighted_sum
from .registry import Chunk, MergeError

ZERO = 1e-6  # of the largest singular value
SINGULAR = 1e-7  # least square of a pivot, of the diagonal entry: Grams are stored in float32
RIDGES = (0.0, 1e-6, 1e-4)  # shares of the diagonal that are tried in turn


class Triplets(NamedTuple):
    """Singular triplets, largest first: ``u`` (rows, k), ``s`` (k,), ``v`` (columns, k), float64."""

    u: Tensor
    s: Tensor
    v: Tensor


def leading(matrix: Tensor, count: int | None = None, size: float = 0.0) -> Triplets:
    """The ``count`` (default: all) leading singular triplets of a float64 matrix that are not zero.

    size: zero is measured against this where it exceeds the matrix's own largest singular value.
    """
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u = leading(matrix.T, count, size)
        return Triplets(u, s, v)
    squares, u = torch.linalg.eigh(matrix @ matrix.T)
    kept = int((squares > ZERO**2 * squares[-1:].clamp(min=size**2)).sum()) if squares.numel() else 0
    kept = min(kept, kept if count is None else count)
    u = u[:, u.shape[1] - kept :].flip(1)
    v = matrix.T @ u
    s = v.norm(dim=0)  # more exact than the root of the eigenvalue
    return Triplets(u, s, v / s)


def isometry(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest isometry U V^T of a float64 matrix U S V^T (Procrustes), and the sum of S.

    Directions whose singular value is zero are left out: there the isometry would be arbitrary.
    """
    if matrix.shape[0] < matrix.shape[1]:
        nearest, total = isometry(matrix.T)
        return nearest.T, total
    squares, v = torch.linalg.eigh(matrix.T @ matrix)
    kept = squares > ZERO**2 * squares[-1:].clamp(min=0)
    s, v = squares[kept].sqrt(), v[:, kept]
    nearest = matrix @ (v / s) @ v.T
    del v  # memory of a few matrices is all there is
    return torch.addmm(nearest, nearest, nearest.T @ nearest, beta=1.5, alpha=-0.5), s.sum()  # Newton: lost digits


def cholesky(gram: Tensor) -> Tensor | None:
    """The Cholesky factor of a float64 Gram matrix, None where it is singular or nearly so."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    regular = not failed and bool((factor.diagonal().square() > SINGULAR * gram.diagonal()).all())
    return factor if regular else None


def gram_solve(residual: Tensor, gram: Tensor, name: str) -> Tensor:
    """X (out, in) with X gram = residual, by Cholesky; ``gram`` (in, in) is overwritten.

    Where ``gram`` is singular, a small share of its diagonal is added: X then is the least solution, each input
    measured in units of its own size. An input that was always zero has a residual of zero, and so its X is zero.
    """
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1.0
    exact = diagonal.clone()
    for ridge in RIDGES:
        diagonal.copy_(exact * (1 + ridge))
        if (factor := cholesky(gram)) is not None:
            return torch.cholesky_solve(residual.T, factor).T
    raise MergeError(f"{name}: the sum of the Gram matrices is not positive semi-definite")


def is_matrix(c: Chunk) -> bool:
    return c.x.ndim == 3


def mean_update(c: Chunk, scale: float) -> Tensor:
    """What matrix methods do to biases, norms and convolutions: base + scale * mean of the weighted task vectors."""
    weights = [w / len(c.members) for w in c.weights.tolist()]
    return c.base + weighted_sum(c.deltas(), weights) * scale


def task_matrix(c: Chunk, member: int) -> Tensor:
    """One member's weighted task vector in float64; the others are not copied."""
    task = (c.x[member] - c.base).double() * float(c.weights[member])
    if not task.sum().isfinite():
        raise MergeError(f"{c.name}: a matrix method cannot take the NaN or Inf of member {c.members[member]!r}")
    return task


def updated(c: Chunk, update: Tensor, scale: float) -> Tensor:
    """base + scale * update, rounded to the dtype of the members once."""
    return (c.base.double() + scale * update).to(c.x.dtype)
