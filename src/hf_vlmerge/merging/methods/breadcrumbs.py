"""Model Breadcrumbs: Davari and Belilovsky, 2023 (arXiv 2312.06795), section 3."""

from torch import Tensor

from .._compiled import Compiled
from .._ops import (
    RankedOver,
    breadcrumbs_window,
    check_shares,
    l1_factors,
    normalized,
    on_base_,
    rescale_,
    weighted_sum_,
)
from ..registry import Chunk, PerMember, Program, merge_method


@merge_method(
    "breadcrumbs",
    paper="2312.06795",
    compiled=True,
    unit="row",
    needs_base=True,
    mergekit={"density": 1.0, "gamma": 0.01},
    cost="O(n P); a pass finds the thresholds",
    disagreements="mergekit ranks magnitudes over each tensor, as the paper's text does; the paper's code ranks them "
    "within each row.",
)
def breadcrumbs(
    *,
    density: PerMember = 0.15,
    gamma: PerMember = 0.006,
    scale: float = 1.0,
    ranked_over: RankedOver = "tensor",
    normalize: bool = False,
    rescale: bool = False,
) -> Program:
    """Drop the largest and the smallest entries of the task vectors: base + scale * sum w_i m_i (x_i - base).

    density: share that each member keeps. gamma: share of the largest magnitudes that is dropped first, less where the
    density asks for them. scale: alpha. ranked_over: magnitudes are ranked within each tensor or each row of it.
    normalize: divide by the sum of the weights. rescale: to the L1 norm before dropping.
    """
    check_shares("density", density)
    check_shares("gamma", gamma)
    trim_ = yield from breadcrumbs_window(density, gamma, ranked_over)
    factors = yield from l1_factors(lambda c: trim_(c.deltas_()), rescale)

    def merge(c: Chunk) -> Tensor:
        tau = rescale_(trim_(c.deltas_()), factors)
        weights = c.weights.tolist()
        return on_base_(c, weighted_sum_(tau, normalized(weights) if normalize else weights), scale)

    if ranked_over == "row":
        return merge
    return Compiled(merge, trim_, factors=factors, normalize=normalize, scale=scale)
