"""NuSLERP: spherical interpolation of task vectors about an optional base, as mergekit defines it (2024)."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .._ops import dots_from_base, from_base, products, weighted_sum
from ..registry import Chunk, Program, merge_method


@merge_method(
    "nuslerp",
    paper="mergekit 2024, https://github.com/arcee-ai/mergekit",
    unit="row",
    takes_base=True,
    members=(2, 2),
    cost="O(P)",
)
def nuslerp(*, along: Literal["tensor", "row", "column"] = "tensor") -> Program:
    """Along the great circle between two members, or between their task vectors about a base if there is one.

    along: what is one vector: the whole tensor, each row, or each column of a matrix. The second member's share is
    t = w_2 / (w_1 + w_2); the coefficients sin((1 - t) a) / sin a and sin(t a) / sin a apply to vectors with their own
    norms, parallel ones are interpolated linearly. In mergekit nuslerp_flatten: false means row, with
    nuslerp_row_wise: true column.
    """
    gram = None
    if along == "tensor":
        (gram,) = yield dots_from_base
    if along == "column":
        gram, rows = yield lambda c: (products(from_base(c), dim=0), torch.tensor(c.x.shape[1]))
        gram = gram.sum(-1) if rows == 1 else gram  # a bias or norm is one vector

    def merge(c: Chunk) -> Tensor:
        x = from_base(c)
        first, second = arc(products(x, dim=1) if gram is None else gram, c.weights.tolist(), x.device)
        if along == "row":
            first, second = first[:, None], second[:, None]
        merged = weighted_sum(x, [first, second])
        return merged if c.base is None else merged.add_(c.base)

    return merge


def arc(gram: Tensor, weights: list[float], device: torch.device) -> list[Tensor]:
    """Coefficients of both vectors from their inner products, (2, 2, ...) float64; float32 of shape (...)."""
    (xx, xy), (_, yy) = gram.cpu().numpy()
    t = weights[1] / sum(weights) if abs(sum(weights)) >= 1e-6 else 0.5
    cosine = np.clip(xy / np.maximum(np.sqrt(xx), 1e-7) / np.maximum(np.sqrt(yy), 1e-7), -1, 1)
    parallel = 1 - cosine**2 <= 1e-14
    angle = np.arccos(np.where(parallel, 0.0, cosine))
    pair = [np.where(parallel, s, np.sin(s * angle) / np.sin(angle)) for s in (1 - t, t)]
    return [torch.from_numpy(p).float().to(device) for p in pair]
