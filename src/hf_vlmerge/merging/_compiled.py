"""Compiled forms of what the commonest methods do with task vectors, used where numba is installed and a merge is large
enough to be worth its start. The torch programs define the result; a compiled form gives the same, bit for bit.
"""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .program import Chunk, NotFinite, Stored, Unread

if TYPE_CHECKING:
    from ._ops import Trim

SHIFTS = {torch.bfloat16: 16, torch.float32: 0}  # from the bits as stored to those of float32
WORTH_IT = 1 << 28  # input entries of a merge
COPIED = 1 << 18  # entries of each input that are read at once, into memory that stays in the cache
MASKED = 1 << 17  # entries whose random choice is held at once
WIDE = 1 << 8  # a row of so many columns is worth counting
NOTHING = np.empty(0, np.float32)


def is_worth_it(entries: int) -> bool:
    """Whether a merge of so many input entries takes longer than numba, where it is installed, takes to start."""
    return entries >= WORTH_IT and find_spec("numba") is not None


def load(alone: bool = False) -> bool:
    """Load numba and the kernels, for all copies that this process will make of itself; says whether they can be used.

    Numba loads most of itself when the first compiled function is called. Half of that is for SciPy's linear algebra
    and for cffi, which it does without where nobody else in this process asks numba for them (``alone``).
    """
    try:
        with absent("scipy", "cffi") if alone else nullcontext(), uncollected():
            kernels = import_module("._kernels", __package__)
            kernels.multiply(NOTHING.copy(), np.float32(1))
    except (ImportError, RuntimeError):  # numba does not fit to NumPy, or finds no place for what it compiles
        return False
    return True


def is_loaded() -> bool:
    return sys.modules.get(f"{__package__}._kernels") is not None


@contextmanager
def uncollected() -> Iterator[None]:
    """Nobody looks for garbage: numba makes objects by the hundred thousand, and they stay."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def absent(*names: str) -> Iterator[None]:
    """Packages that were not imported before cannot be."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


class Election(NamedTuple):
    """How `_ops.elect_and_merge_` elects signs and divides, and the sign of a sum that is zero."""

    elect: str
    mean: str
    zero: float


@dataclass(frozen=True)
class Compiled:
    """A merge of chunks that runs of stored numbers can be given to as well."""

    merge: Callable[[Chunk], Tensor]
    trim: "Trim | None" = None
    density: Sequence[float] = ()  # the probability of an entry to stay
    rescale: bool = False  # what stays is divided by it
    factors: Sequence[float] | None = None
    normalize: bool = False  # a mean, not a sum
    election: Election | None = None  # without one, the mean is that of the weights
    scale: float = 1.0

    def __call__(self, c: Chunk) -> Tensor:
        return self.merge(c)

    def of_stored(self, run: Stored | Unread, dtype: torch.dtype) -> Tensor:
        """The merged run, rounded to ``dtype``. Raises NotFinite where an input or the result is not finite."""
        from ._kernels import NEVER, merge

        count, members = run.count, len(run.members)
        out = torch.empty(count, dtype=dtype)
        bits = as_bits(out)
        ones = [1.0] * members
        divisors = [d if self.rescale and 0 < d < 1 else 1.0 for d in self.density]
        below, upto = self.trim or ([NEVER] * members, [inf] * members)
        numbers = tuple(map(as_numbers, (below, upto, divisors or ones, self.factors or ones)))
        weights, (scale,) = self.weights(list(run.weights)), as_numbers([self.scale])
        shifts = np.uint32(SHIFTS[run.dtype]), np.uint32(SHIFTS[dtype])
        chosen = any(share < 1 for share in self.density)
        step = MASKED if chosen else COPIED if isinstance(run, Unread) else max(1, count)
        for start in range(0, count, step):
            own = run.part(start, min(start + step, count))
            kept = self.choice(own) if chosen else np.empty((0, 0), np.uint8)
            place = bits[start : start + own.count]
            if merge(bits_of(own), base_bits(own), kept, *numbers, weights, scale, place, *shifts):
                raise NotFinite
        return out

    def weights(self, weights: list[float]) -> tuple:
        """Whether signs are elected, weights before that and in the sum, what it is divided by, whether that counts
        members, and the sign of zero."""
        from ._ops import normalized

        if self.election is None:
            weights = normalized(weights) if self.normalize else weights
            return False, NOTHING, as_numbers(weights), NOTHING, False, np.float32(0)
        elect, mean, zero = self.election
        ones = [1.0] * len(weights)
        before, after = (weights, ones) if elect == "weighted" else ([], weights)
        divide_by = (ones if mean == "counts" else weights) if self.normalize else []
        counted = all(share == 1 for share in divide_by)
        return True, as_numbers(before), as_numbers(after), as_numbers(divide_by), counted, np.float32(zero)

    def choice(self, run: Stored) -> np.ndarray:
        """What stays by chance, (members, n) uint8."""
        kept = np.ones((len(run.members), run.count), np.uint8)
        for row, member, share in zip(kept, run.members, self.density, strict=True):
            if share < 1:
                row[:] = run.keep(member, share)
        return kept


def bits_of(run: Stored) -> tuple[np.ndarray, ...]:
    return tuple(as_bits(values) for values in run.values)


def base_bits(run: Stored) -> np.ndarray:
    """Of the base; without one, nothing."""
    return bits_of(run)[0][:0] if run.base is None else as_bits(run.base)


def as_numbers(values: Sequence[float]) -> np.ndarray:
    """As float32; beyond its range, infinity, as torch has it."""
    with np.errstate(over="ignore"):
        return np.array(values, np.float64).astype(np.float32)


def as_bits(values: Tensor) -> np.ndarray:
    """A view of a tensor of bfloat16 or float32 as unsigned integers."""
    narrow = values.dtype.itemsize == 2
    return values.view(torch.int16 if narrow else torch.int32).numpy().view(np.uint16 if narrow else np.uint32)


def by_rank(rows: Tensor, steps: Tensor) -> Tensor:
    """What `_ops.by_rank` makes of these float32 rows on the CPU, once the kernels are loaded."""
    from ._kernels import by_rank as rank

    out = torch.empty(rows.shape)
    rank(as_bits(rows.contiguous()), steps.numpy(), out.numpy())
    return out


def split_stored(run: Stored, deltas: bool, limits: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """What `_order.split_run` says of a run: magnitudes of its task vectors (``deltas``) or of its members."""
    from ._kernels import split

    members, base = bits_of(run), base_bits(run)
    counts = np.empty(limits.shape, np.int64)
    found = np.empty((*limits.shape[:2], run.count + 1), np.float32)  # what is looked at last may go there
    if split(members, base if deltas else base[:0], np.uint32(SHIFTS[run.dtype]), limits, counts, found):
        raise NotFinite
    each = zip(counts.reshape(-1, 3).tolist(), found.reshape(-1, run.count + 1), strict=True)
    return [(above, ties, values[:count].copy()) for (above, ties, count), values in each]
