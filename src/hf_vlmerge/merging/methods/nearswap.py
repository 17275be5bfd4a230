"""NearSwap: alchemonaut, 2024, the card of QuartetAnemoi-70B-t0.0001."""

from collections.abc import Callable

from torch import Tensor

from ..registry import Chunk, MergeError, merge_method


@merge_method(
    "nearswap",
    paper="alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    needs_base=True,
    members=(1, 1),
    weighted=False,
    cost="O(P)",
)
def nearswap(*, ratio: float = 0.001) -> Callable[[Chunk], Tensor]:
    """Take the member's value where it is near the base's, and move by at most ratio elsewhere.

    ratio: t, the difference up to which values are swapped. The weight of the member is min(1, t / |x - base|), so the
    step is x - base, cut at t.
    """
    if ratio < 0:
        raise MergeError(f"nearswap: ratio is a difference and not negative, not {ratio:g}")
    return lambda c: c.deltas()[0].clamp_(-ratio, ratio).add_(c.base)
