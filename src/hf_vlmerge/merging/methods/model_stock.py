"""Model Stock: Jang et al., 2024 (arXiv 2403.19522), section 4."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .._ops import dots_from_base, mean, products
from ..registry import Chunk, Program, merge_method


@merge_method(
    "model_stock",
    paper="2403.19522",
    unit="row",
    needs_base=True,
    weighted=False,
    members=(2, 1 << 30),
    cost="O(n^2 P)",
    disagreements="mergekit averages the pairs' cosines, fusion_bench their angles; they agree for two members. The "
    "official repository has no code.",
)
def model_stock(*, filter_wise: bool = False, average: Literal["cosine", "angle"] = "cosine") -> Program:
    """Between the base and the mean of the members, by the angle between task vectors: t mean + (1 - t) base.

    t = n c / (1 + (n - 1) c), c the mean cosine over pairs of task vectors of the tensor; where the divisor vanishes,
    t is 0. filter_wise: one c a row, not one a tensor. average: mean of the cosines or of the angles.
    """
    gram = None
    if not filter_wise:
        (gram,) = yield dots_from_base

    def merge(c: Chunk) -> Tensor:
        t = ratios(products(c.deltas(), dim=1) if gram is None else gram, average).to(c.x.device)
        return mean(c.deltas()).mul_(t[:, None] if filter_wise else t).add_(c.base)

    return merge


def ratios(gram: Tensor, average: str) -> Tensor:
    """t from the inner products of task vectors, (n, n, ...) float64; float32 of shape (...)."""
    g, n = gram.cpu().numpy(), len(gram)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    cosines = [np.clip(g[i, j] / np.maximum(np.sqrt(g[i, i]) * np.sqrt(g[j, j]), 1e-6), -1, 1) for i, j in pairs]
    c = sum(cosines) / len(pairs) if average == "cosine" else np.cos(sum(map(np.arccos, cosines)) / len(pairs))
    divisor = 1 + (n - 1) * c
    lost = np.abs(divisor) < 1e-6
    return torch.from_numpy(np.asarray(np.where(lost, 0.0, n * c / np.where(lost, 1.0, divisor)))).float()
