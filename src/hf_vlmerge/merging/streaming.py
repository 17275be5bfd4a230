"""Reading groups in chunks, and serving what programs ask for before they can merge."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .errors import MergeError
from .groups import MergeGroup, Ref, Sources
from .program import BLOCK, Chunk, Read, Step, Unit, WholeModel, begin, resume, shape_for, total
from .registry import Method
from .tensors.dtypes import all_finite, is_mergeable

CHUNK_SIZE = 1 << 18  # elements of one member: with its temporaries, what stays in a core's own cache
PROBE = 1 << 12  # elements that are compared first: tensors that differ usually differ at once


@dataclass(frozen=True)
class Reader:
    """Reads groups in chunks of about ``chunk_size`` elements onto ``device``; refuses values that are not finite."""

    sources: Sources
    chunk_size: int = CHUNK_SIZE
    allow_nonfinite: bool = False
    seed: int = 0
    device: str = "cpu"
    held: dict[tuple, Tensor] | None = None  # runs that were read, where they are read again

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise MergeError(f"chunk_size must be positive, not {self.chunk_size}")

    def stored(self, ref: Ref, start: int, stop: int) -> Tensor:
        """A run of one input in its own dtype, as it is."""
        if self.held is None:
            return self.sources[ref.source].read(ref.key, start, stop)
        place = (*ref, start, stop)
        if place not in self.held:
            self.held[place] = self.sources[ref.source].read(ref.key, start, stop)
        return self.held[place]

    def fill(self, place: Tensor, ref: Ref, start: int, stop: int) -> None:
        """Read a run of one input into a float32 place of any shape."""
        place.view(-1).copy_(self.stored(ref, start, stop))
        self.check(ref, place)

    def check(self, ref: Ref, values: Tensor) -> None:
        """Refuse NaN and Inf. The sum of finite values is finite unless it overflows, and far cheaper than a look at
        each of them."""
        if self.allow_nonfinite or math.isfinite(values.sum()) or all_finite(values):
            return
        bad, label = "NaN" if values.isnan().any() else "Inf", self.sources[ref.source].label
        raise MergeError(f"{ref.key} of {label} ({ref.source}) contains {bad}; allow it or mend it")

    def check_copied(self, group: MergeGroup) -> None:
        """The same for a tensor that is copied."""
        ref = group.inputs[0]
        if self.allow_nonfinite or not is_mergeable(self.sources[ref.source].dtype(ref.key)):
            return
        for start, stop in self.spans(group, "element"):
            values = self.stored(ref, start, stop)
            self.check(ref, values.float() if values.dtype.itemsize == 1 else values)

    def spans(self, group: MergeGroup, unit: Unit) -> Iterator[tuple[int, int]]:
        """Flat (start, stop) of each chunk: a number of whole blocks of the unit. A tensor without elements is one."""
        total, width = prod(group.shape), 1
        if unit == "row":
            width = max(1, shape_for(unit, group.shape)[1])
        block = max(1, BLOCK // width) * width
        step = max(1, total) if unit == "tensor" else max(1, self.chunk_size // block) * block
        return ((start, min(start + step, total)) for start in range(0, max(1, total), step))

    def chunk(self, group: MergeGroup, unit: Unit, start: int, stop: int) -> Chunk:
        """One chunk of a group, in float32."""
        view = shape_for(unit, group.shape)
        shape = view if unit == "tensor" or 0 in view else (-1, *view[1:])
        host = torch.empty(len(group.inputs) + (group.base is not None), stop - start, pin_memory=self.device != "cpu")
        for place, ref in zip(host, (*group.inputs, *filter(None, (group.base,))), strict=True):
            self.fill(place, ref, start, stop)
        values = host.to(self.device, non_blocking=True)
        return Chunk(
            x=values[: len(group.inputs)].reshape(len(group.inputs), *shape),
            base=None if group.base is None else values[-1].reshape(shape),
            members=group.members,
            weights=torch.tensor(group.weights, dtype=torch.float64),
            statistics=tuple(self.statistic(r, shape, unit, start, stop) for r in group.statistics),
            tokens=group.tokens,
            name=group.output,
            start=start,
            seed=self.seed,
            size=prod(group.shape),
        )

    def statistic(self, ref: Ref | None, shape: tuple[int, ...], unit: Unit, start: int, stop: int) -> Tensor | None:
        """A statistic as a method of this unit sees it: whole, or in float32 the run that belongs to the chunk."""
        if ref is None:
            return None
        source = self.sources[ref.source]
        values = source[ref.key] if unit == "tensor" else source.read(ref.key, start, stop).float().reshape(shape)
        return values.to(self.device)

    def reads(self, group: MergeGroup, unit: Unit) -> list[Read]:
        """A call for each of the group's chunks, in flat order, that reads it."""
        return [partial(self.chunk, group, unit, *span) for span in self.spans(group, unit)]

    def chunks(self, group: MergeGroup, unit: Unit) -> Iterator[Chunk]:
        """The group's chunks in flat order, in float32."""
        return (read() for read in self.reads(group, unit))

    def all_equal(self, group: MergeGroup, refs: tuple[Ref, ...]) -> bool:
        """Whether these tensors are the same bytes; stops at the first run that differs."""
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
