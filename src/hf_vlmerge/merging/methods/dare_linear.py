"""DARE with task arithmetic: Yu et al., 2023 (arXiv 2311.03099), section 3."""

from torch import Tensor

from .._compiled import Compiled
from .._ops import RescaleBy, check_shares, drop_, l1_factors, normalized, on_base_, rescale_, weighted_sum_
from ..registry import Chunk, PerMember, Program, merge_method


@merge_method(
    "dare_linear",
    paper="2311.03099",
    compiled=True,
    needs_base=True,
    mergekit={"density": 1.0, "rescale_by": "l1"},
    cost="O(n P)",
    disagreements="mergekit rescales by the ratio of L1 norms of each tensor in place of 1 / density.",
)
def dare_linear(
    *,
    density: PerMember = 0.5,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: RescaleBy = "probability",
) -> Program:
    """Drop entries of task vectors at random, rescale the rest: base + scale * sum w_i m_i (x_i - base) / density.

    density: probability that an entry is kept (1 - drop rate p). scale: lambda. normalize: divide by the sum of the
    weights. rescale: make up for what was dropped. rescale_by: division by the probability, or the tensor's L1 norm.
    """
    check_shares("density", density)
    by_share = rescale and rescale_by == "probability"
    sparse = lambda c: drop_(c.deltas_(), c, density, by_share)  # noqa: E731
    factors = yield from l1_factors(sparse, rescale and rescale_by == "l1")

    def merge(c: Chunk) -> Tensor:
        tau = rescale_(sparse(c), factors)  # drop and rescale
        weights = c.weights.tolist()
        return on_base_(c, weighted_sum_(tau, normalized(weights) if normalize else weights), scale)

    return Compiled(merge, density=density, rescale=by_share, factors=factors, normalize=normalize, scale=scale)
