"""Model Breadcrumbs with the sign election of TIES: Davari and Belilovsky, 2023 (arXiv 2312.06795)."""

from torch import Tensor

from .._compiled import Compiled, Election
from .._ops import (
    Elect,
    Mean,
    RankedOver,
    ZeroSign,
    breadcrumbs_window,
    check_shares,
    elect_and_merge_,
    l1_factors,
    on_base_,
    rescale_,
    sign_of_zero,
)
from ..registry import Chunk, PerMember, Program, merge_method


@merge_method(
    "breadcrumbs_ties",
    paper="2312.06795",
    compiled=True,
    unit="row",
    needs_base=True,
    mergekit={
        "density": 1.0,
        "gamma": 0.01,
        "elect": "weighted",
        "normalize": False,
        "mean": "weights",
        "zero_sign": "positive",
    },
    cost="O(n P); a pass finds the thresholds",
    disagreements="As breadcrumbs and ties; mergekit, where the combination comes from, sums what agrees.",
)
def breadcrumbs_ties(
    *,
    density: PerMember = 0.15,
    gamma: PerMember = 0.006,
    scale: float = 1.0,
    ranked_over: RankedOver = "tensor",
    elect: Elect = "unweighted",
    normalize: bool = True,
    mean: Mean = "counts",
    zero_sign: ZeroSign = "none",
    rescale: bool = False,
) -> Program:
    """Drop the largest and the smallest entries of the task vectors, elect signs, merge what agrees.

    density: share that each member keeps. gamma: share of the largest magnitudes that is dropped first. scale: alpha.
    ranked_over: magnitudes are ranked within each tensor or each row of it. rescale: to the L1 norm before dropping.
    elect: whether weights count in the election. normalize: a mean, else a sum. mean: what a mean is divided by.
    zero_sign: the sign of a sum that is zero.
    """
    check_shares("density", density)
    check_shares("gamma", gamma)
    trim_ = yield from breadcrumbs_window(density, gamma, ranked_over)
    zero = yield from sign_of_zero(zero_sign, lambda c: trim_(c.deltas_()), "tensor")
    factors = yield from l1_factors(lambda c: trim_(c.deltas_()), rescale)

    def merge(c: Chunk) -> Tensor:
        tau = rescale_(trim_(c.deltas_()), factors)
        weights = c.weights.tolist()
        tau = elect_and_merge_(tau, weights, elect=elect, normalize=normalize, mean=mean, zero=zero)
        return on_base_(c, tau, scale)

    if ranked_over == "row":
        return merge
    election = Election(elect, mean, zero)
    return Compiled(merge, trim_, factors=factors, normalize=normalize, election=election, scale=scale)
