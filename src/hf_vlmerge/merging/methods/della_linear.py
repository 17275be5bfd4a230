"""DELLA's dropping with task arithmetic: Deep et al., 2024 (arXiv 2406.11617), section 3, without the election."""

from torch import Tensor

from .._ops import RescaleBy, check_window, l1_factors, magprune_, normalized, on_base_, rescale_, weighted_sum_
from ..registry import Chunk, PerMember, Program, merge_method


@merge_method(
    "della_linear",
    paper="2406.11617",
    unit="row",
    needs_base=True,
    mergekit={"density": 1.0, "rescale_by": "l1"},
    cost="O(n P log d): every row is sorted",
    disagreements="As della.",
)
def della_linear(
    *,
    density: PerMember = 0.5,
    epsilon: PerMember = 0.15,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: RescaleBy = "probability",
) -> Program:
    """Drop small entries of the task vectors more often than large ones, rescale the rest, add a weighted sum.

    density: mean probability that an entry is kept. epsilon: from density - epsilon for the smallest magnitude of a row
    to density + epsilon for the largest, linear in the rank. scale: lambda. normalize: divide by the sum of the
    weights. rescale: make up for what was dropped. rescale_by: division by the entry's probability, or the tensor's
    L1 norm.
    """
    check_window(density, epsilon)
    sparse = lambda c: magprune_(c.deltas_(), c, density, epsilon, rescale and rescale_by == "probability")  # noqa: E731
    factors = yield from l1_factors(sparse, rescale and rescale_by == "l1")

    def merge(c: Chunk) -> Tensor:
        tau = rescale_(sparse(c), factors)
        weights = c.weights.tolist()
        return on_base_(c, weighted_sum_(tau, normalized(weights) if normalize else weights), scale)

    return merge
