"""TIES-Merging: Yadav et al., 2023 (arXiv 2306.01708), section 4."""

from torch import Tensor

from .._compiled import Compiled, Election
from .._ops import (
    Elect,
    Mean,
    Trim,
    ZeroSign,
    check_shares,
    elect_and_merge_,
    l1_factors,
    on_base_,
    rescale_,
    sign_of_zero,
)
from .._order import Scope, delta_magnitudes, kth_magnitude
from ..registry import Chunk, PerMember, Program, merge_method


@merge_method(
    "ties",
    paper="2306.01708",
    compiled=True,
    needs_base=True,
    mergekit={"density": 1.0, "scope": "tensor", "elect": "weighted", "mean": "weights", "zero_sign": "positive"},
    cost="O(n P); a pass finds the thresholds, over the whole model one or two",
    disagreements="The paper's code trims over the whole model and gives sums of zero the majority's sign; mergekit "
    "and peft trim tensor by tensor and count zero as positive. mergekit elects on weighted vectors and divides by "
    "weights, peft elects on unweighted ones and divides by counts. Here all entries tied at the threshold are kept, "
    "as in the paper's code.",
)
def ties(
    *,
    density: PerMember = 0.2,
    scale: float = 1.0,
    scope: Scope = "global",
    elect: Elect = "unweighted",
    normalize: bool = True,
    mean: Mean = "counts",
    zero_sign: ZeroSign = "none",
    rescale: bool = False,
) -> Program:
    """Trim, elect signs, merge what agrees: base + scale * mean of the trimmed task vectors that have the elected sign.

    density: share of the largest magnitudes that each member keeps. scale: lambda. scope: whether that share is taken
    of the whole model or of every tensor. elect: whether weights count in the election. normalize: a mean, else a sum.
    mean: divided by the number of agreeing members or by the sum of their weights. zero_sign: the sign of a sum that is
    zero: none as in the formula, positive, or the majority's over the scope. rescale: to the L1 norm before trimming.
    """
    check_shares("density", density)
    trim_ = Trim.to((yield from kth_magnitude(density, scope, delta_magnitudes)))
    zero = yield from sign_of_zero(zero_sign, lambda c: trim_(c.deltas_()), scope)
    factors = yield from l1_factors(lambda c: trim_(c.deltas_()), rescale)

    def merge(c: Chunk) -> Tensor:
        tau = rescale_(trim_(c.deltas_()), factors)  # 1. trim
        weights = c.weights.tolist()
        tau = elect_and_merge_(tau, weights, elect=elect, normalize=normalize, mean=mean, zero=zero)  # 2. and 3.
        return on_base_(c, tau, scale)

    election = Election(elect, mean, zero)
    return Compiled(merge, trim_, factors=factors, normalize=normalize, election=election, scale=scale)
