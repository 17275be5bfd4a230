"""Reading groups in chunks, and serving what programs ask for before they can merge."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ._compiled import SHIFTS
from .devices import CHUNK_SIZE, CPU, place_in
from .errors import MergeError
from .groups import MergeGroup, Ref, Sources
from .program import BLOCK, Chunk, Read, Reads, Step, Stored, Unit, Unread, WholeModel, begin, resume, shape_for, total
from .registry import Method
from .tensors.dtypes import all_finite, is_mergeable

SAMPLED_RUN = 256  # elements of a sample that lie side by side
SAMPLED_PART = 1 << 14  # there is one for every so many elements of a tensor,
LEAST_RUNS, MOST_RUNS = 64, 2048  # but not fewer, and not more, so that memory does not grow with the largest tensor
RUN = 1 << 20  # elements of one member whose chunks are handed out together
CAN_COPY = hasattr(os, "preadv")
PROBE = 1 << 12  # elements that are compared first: tensors that differ usually differ at once


@cache
def weights_of(numbers: tuple[float, ...]) -> Tensor:
    """A group's weights as chunks hold them; the same for all of its chunks."""
    return torch.tensor(numbers, dtype=torch.float64)


@dataclass(frozen=True)
class Reader:
    """Reads groups in chunks of about ``chunk_size`` elements onto ``device``; refuses values that are not finite."""

    sources: Sources
    chunk_size: int = CHUNK_SIZE
    allow_nonfinite: bool = False
    seed: int = 0
    device: torch.device = CPU
    compiled: bool = False  # offer runs as they are stored to what has a compiled form

    def __post_init__(self) -> None:
        if not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise MergeError(f"chunk_size must be positive, not {self.chunk_size!r}")

    def stored(self, ref: Ref, start: int, stop: int) -> Tensor:
        """A run of one input in its own dtype, as it is."""
        return self.sources[ref.source].read(ref.key, start, stop)

    def check(self, refs: Sequence[Ref], values: Tensor) -> None:
        """Refuse NaN and Inf; values (inputs, entries). The sum of finite values is finite unless it overflows, and far
        cheaper than a look at each of them."""
        if self.allow_nonfinite or math.isfinite(values.sum()):
            return
        for ref, own in zip(refs, values, strict=True):
            if not all_finite(own):
                bad, label = "NaN" if own.isnan().any() else "Inf", self.sources[ref.source].label
                raise MergeError(f"{ref.key} of {label} ({ref.source}) contains {bad}; allow it or mend it")

    def check_copied(self, group: MergeGroup) -> None:
        """The same for a tensor that is copied."""
        ref = group.inputs[0]
        if self.allow_nonfinite or not is_mergeable(self.sources[ref.source].dtype(ref.key)):
            return
        for start, stop in self.spans(group, "element"):
            values = self.stored(ref, start, stop)
            self.check([ref], (values.float() if values.dtype.itemsize == 1 else values)[None])

    def step(self, group: MergeGroup, unit: Unit) -> int:
        """Elements of a chunk: a number of whole blocks of the unit."""
        if unit == "tensor":
            return max(1, prod(group.shape))
        width = max(1, shape_for(unit, group.shape)[1]) if unit == "row" else 1
        block = max(1, BLOCK // width) * width
        return max(1, self.chunk_size // block) * block

    def spans(self, group: MergeGroup, unit: Unit) -> Iterator[tuple[int, int]]:
        """Flat (start, stop) of each run of chunks. A tensor without elements has one, too."""
        size, step = prod(group.shape), self.step(group, unit)
        length = max(1, RUN // step) * step
        return ((start, min(start + length, size)) for start in range(0, max(1, size), length))

    def chunks_of(self, group: MergeGroup, unit: Unit, checked: set[int], start: int, stop: int) -> Iterator[Chunk]:
        """The chunks of a run, in float32; each lasts until the next one is asked for. ``checked``: chunks known to be
        finite, by their starts."""
        view, step = shape_for(unit, group.shape), self.step(group, unit)
        shape = view if unit == "tensor" or 0 in view else (-1, *view[1:])
        stored = [self.stored(ref, start, stop) for ref in group.refs]
        for i, parts in enumerate(zip(*(run.split(step) for run in stored), strict=True)):
            count, at = parts[0].numel(), start + i * step
            again = i and count == step  # one place for all of them stays in the cache
            if not again:
                values = self.empty(group, count)
                places = values.unbind()
            for place, part in zip(places, parts, strict=True):
                place_in(place, part)
            if at not in checked:
                self.check(group.refs, values)
                checked.add(at)
            if not again:
                chunk = self.chunk(group, values, shape)
            chunk.start = at
            if any(group.statistics):
                chunk.statistics = tuple(self.statistic(r, shape, unit, at, at + count) for r in group.statistics)
            yield chunk

    def sample(self, group: MergeGroup) -> Chunk:
        """Some entries of a group as one chunk of unit "element": short runs from all over it, or all there is."""
        size = prod(group.shape)
        count = min(max(LEAST_RUNS, size // SAMPLED_PART), MOST_RUNS)
        length, step = SAMPLED_RUN, size // count - SAMPLED_RUN - 1  # not in step with the rows
        if size < 4 * SAMPLED_RUN * count:
            count, length, step = 1, size, size
        values, at_once = self.empty(group, count * length), max(1, RUN // max(1, step))
        for ref, place in zip(group.refs, values.view(len(group.refs), count, length).unbind(), strict=True):
            for i in range(0, count, at_once):
                runs = place[i : i + at_once]
                runs.copy_(self.stored(ref, i * step, (i + len(runs)) * step).view(len(runs), step)[:, :length])
        self.check(group.refs, values)
        return replace(self.chunk(group, values, (-1,)), stands_for=size)

    def empty(self, group: MergeGroup, count: int) -> Tensor:
        """A place for ``count`` entries of each input, on the device."""
        return torch.empty(len(group.refs), count, device=self.device)

    def chunk(self, group: MergeGroup, values: Tensor, shape: Sequence[int]) -> Chunk:
        """A chunk of these values (inputs, entries)."""
        members = len(group.inputs)
        return Chunk(
            x=values[:members].view(members, *shape),
            base=None if group.base is None else values[-1].view(shape),
            members=group.members,
            weights=weights_of(group.weights),
            statistics=(None,) * members,
            tokens=group.tokens,
            name=group.output,
            seed=self.seed,
        )

    def statistic(self, ref: Ref | None, shape: tuple[int, ...], unit: Unit, start: int, stop: int) -> Tensor | None:
        """A statistic as a method of this unit sees it: whole, or in float32 the run that belongs to the chunk."""
        if ref is None:
            return None
        source = self.sources[ref.source]
        values = source[ref.key] if unit == "tensor" else source.read(ref.key, start, stop).float().reshape(shape)
        return values.to(self.device)

    def reads(self, group: MergeGroup, unit: Unit, once: bool = False) -> Reads:
        """A call for each run of the group's chunks, in flat order, that reads it. ``once``: it will be read once."""
        chunks, stored = partial(self.chunks_of, group, unit, set()), partial(self.run_of, group, once)
        compiled = self.has_compiled_form(group, unit)
        spans = self.spans(group, unit)
        runs = (Read(partial(chunks, *span), partial(stored, *span) if compiled else None) for span in spans)
        return Reads(runs, partial(self.sample, group))

    def has_compiled_form(self, group: MergeGroup, unit: Unit) -> bool:
        """Whether runs of the group's inputs can be taken as they are stored."""
        if not self.compiled or unit == "tensor" or self.allow_nonfinite or 0 in group.shape:
            return False
        dtypes = {self.stored(ref, 0, 0).dtype for ref in group.refs}  # a view may give others than it says
        return len(dtypes) == 1 and dtypes <= SHIFTS.keys()

    def run_of(self, group: MergeGroup, once: bool, start: int, stop: int) -> Stored | Unread:
        """A run as it is stored. What is read ``once`` is read by parts, since to map pages costs more than to copy
        them; otherwise it is mapped."""
        sources = [self.sources[ref.source] for ref in group.refs]
        extents = [source.extent(ref.key) for ref, source in zip(group.refs, sources, strict=True)]
        if not (once and CAN_COPY and all(extents)):
            return self.as_stored(group, [self.stored(ref, start, stop) for ref in group.refs], start)
        dtype = sources[0].dtype(group.refs[0].key)

        def read(start: int, stop: int) -> Stored:
            values = [torch.empty(stop - start, dtype=dtype) for _ in extents]
            for (descriptor, offset), place, ref in zip(extents, values, group.refs, strict=True):
                if not read_at(descriptor, place, offset + start * dtype.itemsize):
                    label = self.sources[ref.source].label
                    raise MergeError(f"{ref.key} of {label} ({ref.source}) became shorter while it was read")
            return self.as_stored(group, values, start)

        return Unread(read, dtype, group.members, group.weights, start, stop - start)

    def as_stored(self, group: MergeGroup, values: list[Tensor], start: int) -> Stored:
        """Values of all inputs, and last those of the base if there is one."""
        members = tuple(values[: len(group.inputs)])
        base = None if group.base is None else values[-1]
        return Stored(members, base, group.members, group.weights, group.output, start, self.seed)

    def chunks(self, group: MergeGroup, unit: Unit) -> Iterator[Chunk]:
        """The group's chunks in flat order, in float32; each lasts until the next one is asked for."""
        return (chunk for read in self.reads(group, unit) for chunk in read())

    def all_equal(self, group: MergeGroup) -> bool:
        """Whether all inputs are the same bytes; stops at the first run that differs."""
        refs = group.refs
        if len(refs) == 1:
            return True
        if len({self.sources[r.source].dtype(r.key) for r in refs}) > 1:
            return False
        size = prod(group.shape)
        for start, stop in ((0, min(PROBE, size)), *self.spans(group, "element")):
            first, *others = (self.stored(r, start, stop) for r in refs)
            same = (
                o.dtype == first.dtype and torch.equal(o.view(torch.uint8), first.view(torch.uint8)) for o in others
            )
            if not all(same):
                return False
        return True


def read_at(descriptor: int, place: Tensor, offset: int) -> bool:
    """Fill a flat tensor from a file; says whether there was enough."""
    left = memoryview(place.view(torch.uint8).numpy())
    while left:
        count = os.preadv(descriptor, [left], offset)
        if not count:
            return False
        left, offset = left[count:], offset + count
    return True


@dataclass
class Job:
    """A group on its way through a method: the program and where it stands."""

    group: MergeGroup
    method: Method
    program: Any = field(init=False)
    step: Step = field(init=False)

    def __post_init__(self) -> None:
        self.program = self.method.program(self.group.parameters)
        self.step = begin(self.program)


Chunks = Callable[[Job], Iterable[Chunk | Read]]
Exchange = Callable[[Any], list[Any]]  # hands a value to all processes, returns everybody's


def settle_whole_model(
    jobs: list[Job],
    chunks: Chunks,
    kin: Callable[[Job], Any],
    *,
    mine: Callable[[Job], bool] = lambda job: True,
    run: Callable[..., Iterable] = map,
    exchange: Exchange = lambda value: [value],
) -> None:
    """Serve all requests for sums over the whole model: sums are taken over all jobs of one kin, member by member.

    Of several processes each reads the jobs that are its own (``mine``). Integers are added up at once; float totals
    are kept tensor by tensor and added in the order of the jobs, so that no share of the work changes a bit.
    """
    while waiting := [j for j in jobs if isinstance(j.step.request, WholeModel)]:
        own = [(i, job) for i, job in enumerate(waiting) if mine(job)]
        sums = ModelSums()

        for _ in run(partial(sums.add_job, kin, chunks), own):
            pass
        merged = ModelSums.joined(exchange(sums.rows))
        totals = cache(merged.of)  # one memory for all who are told the same
        for job in waiting:
            job.step = resume(job.program, totals(kin(job), job.group.members))


def job_total(job: Job, chunks: Chunks) -> tuple[Tensor, ...]:
    """One tensor's part of a sum over the whole model."""
    return total(job.step.request.reduce, chunks(job), job.method.unit)


def sum_in_order(values: Iterable[Tensor]) -> Tensor:
    first, *others = values
    for other in others:
        first = first + other
    return first


class ModelSums:
    """Sums over tensors by kin and member: one row a member of each total."""

    def __init__(self) -> None:
        self.rows: dict[Any, dict[str, list[dict[int, Tensor]]]] = {}  # kin -> member -> part -> {order: value}
        self.lock = Lock()

    def add_job(self, kin: Callable[[Job], Any], chunks: Chunks, numbered: tuple[int, Job]) -> None:
        """Add one tensor's total. The order of integers does not matter: they share the place -1."""
        order, job = numbered
        parts = job_total(job, chunks)
        with self.lock:
            for i, member in enumerate(job.group.members):
                rows = self.rows.setdefault(kin(job), {}).setdefault(member, [{} for _ in parts])
                for row, part in zip(rows, parts, strict=True):
                    at = order if part.is_floating_point() else -1
                    row[at] = row[at] + part[i] if at in row else part[i].clone()

    @classmethod
    def joined(cls, several: list[dict]) -> "ModelSums":
        """The sums of all processes together."""
        result = cls()
        result.rows, *others = several
        for other in others:
            for kin, members in other.items():
                for member, rows in members.items():
                    own = result.rows.setdefault(kin, {}).setdefault(member, [{} for _ in rows])
                    for mine, theirs in zip(own, rows, strict=True):
                        for at, value in theirs.items():
                            mine[at] = mine[at] + value if at in mine else value
        return result

    def of(self, kin: Any, members: Iterable[str]) -> tuple[Tensor, ...]:
        """The totals for these members, stacked."""
        rows = zip(*(self.rows[kin][m] for m in members), strict=True)
        return tuple(torch.stack([sum_in_order(row[at] for at in sorted(row)) for row in part]) for part in rows)
