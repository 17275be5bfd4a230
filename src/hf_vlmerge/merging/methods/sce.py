"""SCE (select, calculate, erase): Wan et al., 2024, FuseChat (arXiv 2408.07990), section 3."""

from typing import Literal

import torch
from torch import Tensor

from .._ops import ZeroSign, check_shares, disjoint_sum_, elected_signs, mean, sign_of_zero
from .._order import kth_largest
from ..registry import Chunk, Counts, Program, merge_method


@merge_method(
    "sce",
    paper="2408.07990",
    needs_base=True,
    weighted=False,
    mergekit={"select_topk": 1.0, "zero_sign": "positive", "floor": 1e-6},
    cost="O(n P); up to five passes for variances and weights",
    disagreements="mergekit merges the selected entries, as the paper's formula does; FuseAI's code selects for the "
    "weights only and merges all entries. mergekit takes equal weights where the mean squares sum to less than 1e-6, "
    "which depends on the scale of the weights.",
)
def sce(
    *,
    select_topk: float = 0.1,
    selection: Literal["merge", "weights"] = "merge",
    zero_sign: ZeroSign = "none",
    floor: float = 0.0,
) -> Program:
    """Select entries by variance over members, weigh members by their energy there, erase minority signs, average.

    select_topk: share of the entries with non-zero variance that is kept, the largest ones. selection: whether all
    other entries are left out of the merge too, or of the weights only. zero_sign: the sign of a sum that is zero.
    floor: sums of mean squares below it give equal weights; divisors below it count as it.
    """
    check_shares("select_topk", [select_topk])
    least = 0.0
    if select_topk < 1:
        (differing,) = yield Counts(lambda chunks: (sum(torch.count_nonzero(variance(c)) for c in chunks),))
        rank = int(select_topk * int(differing))
        least = float((yield from kth_largest(variance, lambda row, entries: [rank])))

    def select(c: Chunk) -> Tensor:
        return c.deltas().mul_(variance(c)[0].ge_(least)) if least else c.deltas()

    squares, entries = yield lambda c: (select(c).double().square_().sum(1), torch.tensor(c.x.shape[1]))
    energy = (squares / max(1, int(entries))).tolist()  # mean squares
    total = sum(energy)
    weights = [e / total if total > floor else 1 / len(energy) for e in energy]
    merged = select if selection == "merge" else Chunk.deltas
    zero = yield from sign_of_zero(zero_sign, merged, "tensor")

    def merge(c: Chunk) -> Tensor:
        tau = merged(c)  # 1. select; the weights are 2. calculate
        return disjoint_sum_(tau, elected_signs(tau, zero), weights, weights, floor).add_(c.base)  # 3. erase

    return merge


def variance(c: Chunk) -> Tensor:
    """Population variance over members of each entry, (1, n)."""
    tau = c.deltas()
    return mean(tau.sub_(mean(tau)).square_())[None]
