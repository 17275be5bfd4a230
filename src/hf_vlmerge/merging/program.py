"""The protocol between methods and the engine: chunks of tensors, reductions over them, and programs that ask for both.

A method is a function of its parameters. It returns the function that merges one chunk; a method that must first know
something about the whole tensor is a generator, which yields reductions and receives their sums. Because sums are taken
over blocks of fixed size in flat order, neither the chunk size nor the number of threads changes a bit of the result.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from inspect import isgenerator
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

BLOCK = 1 << 15  # elements; sums run over blocks of this size in flat order, whatever the chunk size

Unit = Literal["element", "row", "tensor"]


class Digest(ISeedSequence):
    """A hash as the seed of a generator: its bytes are the state. NumPy's own mixing of seeds costs five times more."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        return np.frombuffer(self.digest, dtype)[:n_words].copy()


def more_bits(identity: bytes, indices: np.ndarray) -> np.ndarray:
    """32 random bits for each index, uint32: a hash of the index (splitmix64)."""
    z = indices.astype(np.uint64) + np.uint64(int.from_bytes(hashlib.sha256(identity).digest()[:8], "little"))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z >> np.uint64(32)).astype(np.uint32)


@dataclass(slots=True, eq=False)  # one is made for every few thousand entries: not frozen, which would cost more
class Chunk:
    """A run of one output tensor in float32, seen in all members at once.

    Shapes: ``x`` is (members, n) for unit "element", (members, rows, columns) for "row", (members, *shape) for
    "tensor"; ``base`` the same without the first axis; ``weights`` (members,) float64. ``statistics`` and ``tokens``
    (the number of input rows behind each statistic) come in member order. ``start`` is the first element's flat index.
    A chunk that is a sample says of how many entries (``stands_for``).

    A chunk is read anew for every request and for the merge, so whoever is given one may use ``x`` up.
    """

    x: Tensor
    base: Tensor | None
    members: tuple[str, ...]
    weights: Tensor
    statistics: tuple[Tensor | None, ...] = ()
    tokens: tuple[int | None, ...] = ()
    name: str = ""
    start: int = 0
    seed: int = 0
    stands_for: int = 0

    def deltas(self) -> Tensor:
        """Task vectors (modality vectors): members minus base, shaped like ``x``."""
        return self.x - self.base

    def deltas_(self) -> Tensor:
        """The same in the place of ``x``, which is used up: less has to stay in the cache."""
        return self.x.sub_(self.base)

    def keep(self, member: str, probability: float | Tensor) -> Tensor:
        """A random choice of entries, bool, shaped like ``x[0]``: each is True with its probability (exact to 2^-32).

        The choice depends on seed, tensor, member and flat index only: the generator is advanced to ``start``.
        """
        if isinstance(probability, Tensor):
            probability = probability.reshape(-1).float().cpu().numpy()
        kept = chosen((self.seed, self.name, member), self.start, self.x[0].numel(), probability)
        return torch.from_numpy(kept).reshape(self.x.shape[1:]).to(self.x.device)


def chosen(identity: tuple[int, str, str], start: int, count: int, probability: float | np.ndarray) -> np.ndarray:
    """The random choice of :meth:`Chunk.keep` for ``count`` entries from ``start`` on, of a (seed, tensor, member)."""
    own = hashlib.sha256("{}\0{}\0{}".format(*identity).encode()).digest()
    draw, skip = divmod(start, 4)  # one draw of 64 bits serves four entries
    draws = np.random.PCG64(Digest(own)).advance(draw).random_raw((skip + count + 3) // 4)
    numbers = draws.astype("<u8", copy=False).view("<u2")[skip : skip + count]
    if isinstance(probability, np.ndarray):
        limits = probability * np.float32(1 << 16)
        limits = limits - numbers  # exact wherever it is near 0 or 1
        kept, open_ = limits >= 1, np.flatnonzero((limits > 0) & (limits < 1))
        shares = limits[open_]
    else:
        whole = int(probability * (1 << 16))
        kept, share = numbers < whole, probability * (1 << 16) - whole
        open_ = np.flatnonzero(numbers == whole) if share else np.empty(0, np.int64)
        shares = np.full(len(open_), share)
    if len(open_):  # one number in 65536 falls between: it is decided by 32 bits more
        kept[open_] = more_bits(own, start + open_) < shares * 2.0**32
    return kept


class NotFinite(ArithmeticError):
    """A compiled form met NaN or Inf: the chunks of the run will tell where."""


class Stored(NamedTuple):
    """A run of an output tensor in all members (n,) and, if any, the base, as they are stored: flat, of one dtype."""

    values: tuple[Tensor, ...]
    base: Tensor | None
    members: tuple[str, ...]
    weights: tuple[float, ...]
    name: str
    start: int
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        return self.values[0].dtype

    @property
    def count(self) -> int:
        return self.values[0].numel()

    def part(self, start: int, stop: int) -> "Stored":
        """Some of its entries."""
        base = None if self.base is None else self.base[start:stop]
        values = tuple(own[start:stop] for own in self.values)
        return self._replace(values=values, base=base, start=self.start + start)

    def keep(self, member: str, probability: float) -> np.ndarray:
        """As :meth:`Chunk.keep`."""
        return chosen((self.seed, self.name, member), self.start, self.count, probability)


class Unread(NamedTuple):
    """The same before it is read: ``read`` gives what lies between two flat indices."""

    read: Callable[[int, int], Stored]
    dtype: torch.dtype
    members: tuple[str, ...]
    weights: tuple[float, ...]
    start: int
    count: int

    def part(self, start: int, stop: int) -> Stored:
        return self.read(self.start + start, self.start + stop)


Reduce = Callable[[Chunk], tuple[Tensor, ...]]  # int64 or float64 of fixed shape; the engine adds them up


class Counts(NamedTuple):
    """A reduction that returns int64 only. Such sums are exact in any order, so it sees several whole chunks at once,
    not blocks. ``stored``: it takes runs as they are stored as well, and raises NotFinite where it must not."""

    reduce: Callable[[Iterable[Chunk | Stored]], tuple[Tensor, ...]]
    stored: bool = False


class Gather(NamedTuple):
    """Not a sum: what a function of several whole chunks returns, a tuple of tensors, each joined over the runs of a
    tensor along its last axis. ``stored``: as of Counts."""

    values: Callable[[Iterable[Chunk | Stored]], tuple[Tensor, ...]]
    stored: bool = False


class Sample(NamedTuple):
    """A request for which some entries of a tensor will do. ``rows``: not without whole rows, so it sees them all."""

    reduce: Counts | Gather
    rows: bool = False


class WholeModel(NamedTuple):
    """A reduction summed over all tensors of the model that share the method and its parameters.

    Each tensor it returns has one row a member; rows are added up by member, since not every tensor has every member.
    A program asks for these before its reductions over one tensor.
    """

    reduce: Reduce | Counts | Sample


Request = Reduce | Counts | Sample | Gather | WholeModel
Program = Generator[Request, tuple[Tensor, ...], Any]  # returns what the method makes of it: a function of a chunk


class Read(NamedTuple):
    """A run of a tensor that is read when it is asked for, so that who computes also reads: its chunks or, if there is
    such a form, the run as it is stored."""

    chunks: Callable[[], Iterable[Chunk]]
    stored: Callable[[], Stored | Unread] | None = None

    def __call__(self) -> Iterable[Chunk]:
        return self.chunks()


class Reads(list[Read]):
    """Runs of a tensor, in flat order; ``sample`` reads some entries from all over it."""

    def __init__(self, runs: Iterable[Read], sample: Callable[[], Chunk]) -> None:
        super().__init__(runs)
        self.sample = sample


class Step(NamedTuple):
    """Where a program stands: its open ``request``, or (request None) its ``result``."""

    request: Request | None
    result: Any = None


def begin(program: Any) -> Step:
    """Start a program. A method without ``yield`` has returned its result already."""
    return resume(program, None) if isgenerator(program) else Step(None, program)


def resume(program: Program, totals: tuple[Tensor, ...] | None) -> Step:
    """Hand the sums to a program that waits for them."""
    try:
        return Step(program.send(totals))
    except StopIteration as end:
        return Step(None, end.value)


def complete(
    program: Any,
    step: Step,
    chunks: Callable[[], Iterable[Chunk | Read]],
    unit: Unit,
    *,
    alone: bool = False,
    run: Callable[..., Iterable] = map,
) -> Any:
    """Serve a program's open requests from the chunks of its tensor, and return its result.

    ``alone`` says that this tensor is the whole model; otherwise requests for the whole model were served before.
    ``run`` is ``map``, or a pool's: then the chunks are reduced side by side.
    """
    while (request := step.request) is not None:
        if isinstance(request, WholeModel):
            if not alone:
                raise RuntimeError("a program must ask for sums over the whole model before sums over its tensor")
            request = request.reduce
        step = resume(program, total(request, chunks(), unit, run=run))
    return step.result


def total(
    request: Reduce | Counts | Sample | Gather,
    chunks: Iterable[Chunk | Read],
    unit: Unit,
    *,
    run: Callable[..., Iterable] = map,
) -> tuple[Tensor, ...]:
    """Sum a reduction over all blocks of all chunks, in flat order. ``run`` must keep the order of its results."""
    if isinstance(request, Sample):
        chunks = [chunks.sample()] if isinstance(chunks, Reads) and not request.rows else chunks
        request = request.reduce
    sums: tuple[Tensor, ...] | None = None
    joined = []
    for parts in run(partial(partial_sums, request, unit), chunks):
        if isinstance(request, Gather):
            joined += parts
            continue
        for part in parts:
            sums = added(request, sums, part)
    return tuple(torch.cat(parts, -1) for parts in zip(*joined, strict=True)) if joined else sums or ()


def added(request: Request, sums: tuple[Tensor, ...] | None, part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sums so far (None: nothing yet) and one part more; of a Gather, what was joined so far."""
    if sums is None:
        return tuple(p.clone() for p in part)
    if isinstance(request, Gather):
        return tuple(torch.cat(both, -1) for both in zip(sums, part, strict=True))
    for value, more in zip(sums, part, strict=True):
        value += more
    return sums


def partial_sums(request: Reduce | Counts | Gather, unit: Unit, read: Chunk | Read) -> list[tuple[Tensor, ...]]:
    """What a reduction makes of a run of chunks: a part a block, or one of all where order does not matter."""
    if isinstance(request, Counts | Gather) and request.stored and isinstance(read, Read) and read.stored:
        with suppress(NotFinite):
            return [request[0]([read.stored()])]
    chunks = [replace(read, x=read.x.clone())] if isinstance(read, Chunk) else read()
    if isinstance(request, Gather):
        return [tuple(value.cpu() for value in request.values(chunks))]
    exact = isinstance(request, Counts)
    parts = [request.reduce(chunks)] if exact else [request(block) for c in chunks for block in blocks(c, unit)]
    allowed = (torch.int64,) if exact else (torch.int64, torch.float64)
    wrong = [str(p.dtype) for part in parts for p in part if p.dtype not in allowed]
    if wrong:
        raise TypeError(f"a reduction returns int64{'' if exact else ' or float64'}, not {wrong[0]}")
    return [tuple(p.cpu() for p in part) for part in parts]


def blocks(chunk: Chunk, unit: Unit) -> Iterator[Chunk]:
    """Cut a chunk into its blocks: BLOCK elements, as many whole rows as fit, or the whole tensor."""
    if unit == "tensor":
        yield chunk
        return
    width = 1 if unit == "element" else max(1, chunk.x.shape[2])
    step = max(1, BLOCK // width)
    for at in range(0, max(1, chunk.x.shape[1]), step):  # a tensor without elements has one block, an empty one
        base = None if chunk.base is None else chunk.base[at : at + step]
        own = tuple(None if s is None else s[at : at + step] for s in chunk.statistics)
        yield replace(chunk, x=chunk.x[:, at : at + step], base=base, statistics=own, start=chunk.start + at * width)


def shape_for(unit: Unit, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a method of this unit sees one whole tensor."""
    if unit == "tensor":
        return shape
    if unit == "element":
        return (prod(shape),)
    rows = shape[0] if len(shape) > 1 else 1
    return (rows, prod(shape) // max(rows, 1))


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch with one thread: its sums and BLAS calls differ in the last bit between thread counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
