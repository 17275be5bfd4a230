"""DARE with the sign election of TIES: Yu et al., 2023 (arXiv 2311.03099), section 3; Yadav et al., 2023."""

from torch import Tensor

from .._compiled import Compiled, Election
from .._ops import (
    Elect,
    Mean,
    RescaleBy,
    ZeroSign,
    check_shares,
    drop_,
    elect_and_merge_,
    l1_factors,
    on_base_,
    rescale_,
    sign_of_zero,
)
from ..registry import Chunk, PerMember, Program, merge_method


@merge_method(
    "dare_ties",
    paper="2311.03099",
    compiled=True,
    needs_base=True,
    mergekit={
        "density": 1.0,
        "rescale_by": "l1",
        "elect": "weighted",
        "normalize": False,
        "mean": "weights",
        "zero_sign": "positive",
    },
    cost="O(n P)",
    disagreements="mergekit rescales by the ratio of L1 norms of each tensor, elects on weighted vectors and sums what "
    "agrees; peft divides by the density, elects on unweighted ones and divides by counts, as here. The paper's code "
    "also trims by magnitude after dropping; neither tool does.",
)
def dare_ties(
    *,
    density: PerMember = 0.5,
    scale: float = 1.0,
    elect: Elect = "unweighted",
    normalize: bool = True,
    mean: Mean = "counts",
    zero_sign: ZeroSign = "none",
    rescale: bool = True,
    rescale_by: RescaleBy = "probability",
) -> Program:
    """Drop entries of the task vectors at random, rescale the rest, elect signs, merge what agrees.

    density: probability that an entry is kept (1 - drop rate p). scale: lambda. rescale: make up for what was dropped.
    rescale_by: division by the probability, or the tensor's L1 norm. elect, normalize, mean, zero_sign: as in ties.
    elect: whether weights count in the election. normalize: a mean, else a sum. mean: what a mean is divided by.
    zero_sign: the sign of a sum that is zero.
    """
    check_shares("density", density)
    by_share = rescale and rescale_by == "probability"
    sparse = lambda c: drop_(c.deltas_(), c, density, by_share)  # noqa: E731
    zero = yield from sign_of_zero(zero_sign, sparse, "tensor")
    factors = yield from l1_factors(sparse, rescale and rescale_by == "l1")

    def merge(c: Chunk) -> Tensor:
        tau = rescale_(sparse(c), factors)  # drop and rescale
        weights = c.weights.tolist()
        tau = elect_and_merge_(tau, weights, elect=elect, normalize=normalize, mean=mean, zero=zero)
        return on_base_(c, tau, scale)

    return Compiled(merge, None, density, by_share, factors, normalize, Election(elect, mean, zero), scale)
