"""DELLA-Merging: Deep et al., 2024 (arXiv 2406.11617), section 3: drop by magnitude (MAGPRUNE), elect, fuse."""

from torch import Tensor

from .._ops import (
    Elect,
    Mean,
    RescaleBy,
    ZeroSign,
    check_window,
    elect_and_merge_,
    l1_factors,
    magprune_,
    on_base_,
    rescale_,
    sign_of_zero,
)
from ..registry import Chunk, PerMember, Program, merge_method


@merge_method(
    "della",
    paper="2406.11617",
    unit="row",
    needs_base=True,
    mergekit={"density": 1.0, "rescale_by": "l1", "elect": "weighted", "mean": "weights", "zero_sign": "positive"},
    cost="O(n P log d): every row is sorted",
    disagreements="mergekit multiplies all survivors of a tensor by one ratio of L1 norms, the paper's code divides "
    "each by its own probability. mergekit refuses rows of one entry; here such a row has the probability of the "
    "middle rank. The paper's epsilon is the whole window, mergekit's, and the one here, the half of it.",
)
def della(
    *,
    density: PerMember = 0.5,
    epsilon: PerMember = 0.15,
    scale: float = 1.0,
    elect: Elect = "unweighted",
    normalize: bool = True,
    mean: Mean = "counts",
    zero_sign: ZeroSign = "none",
    rescale: bool = True,
    rescale_by: RescaleBy = "probability",
) -> Program:
    """Drop small entries of the task vectors more often than large ones, rescale, elect signs, merge what agrees.

    density: mean probability that an entry is kept. epsilon: from density - epsilon for the smallest magnitude of a row
    to density + epsilon for the largest, linear in the rank. scale: lambda. rescale: make up for what was dropped.
    rescale_by: division by the entry's probability, or the tensor's L1 norm. elect: whether weights count in the
    election. normalize: a mean, else a sum. mean: what a mean is divided by. zero_sign: the sign of a sum that is zero.
    """
    check_window(density, epsilon)
    sparse = lambda c: magprune_(c.deltas_(), c, density, epsilon, rescale and rescale_by == "probability")  # noqa: E731
    zero = yield from sign_of_zero(zero_sign, sparse, "tensor")
    factors = yield from l1_factors(sparse, rescale and rescale_by == "l1")

    def merge(c: Chunk) -> Tensor:
        tau = rescale_(sparse(c), factors)  # 1. drop
        weights = c.weights.tolist()
        tau = elect_and_merge_(
            tau, weights, elect=elect, normalize=normalize, mean=mean, zero=zero
        )  # 2. elect, 3. fuse
        return on_base_(c, tau, scale)

    return merge
