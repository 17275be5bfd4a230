"""Reading groups in chunks, and serving what programs ask for before they can merge."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from .errors import MergeError
from .groups import MergeGroup, Ref, Sources
from .program import BLOCK, Chunk, Step, Unit, WholeModel, begin, blocks, resume, shape_for
from .registry import Method
from .tensors.dtypes import all_finite, is_mergeable

CHUNK_SIZE = 1 << 20  # elements of one member


@dataclass(frozen=True)
class Reader:
    """Reads groups in chunks of about ``chunk_size`` elements, and refuses values that are not finite."""

    sources: Sources
    chunk_size: int = CHUNK_SIZE
    allow_nonfinite: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise MergeError(f"chunk_size must be positive, not {self.chunk_size}")

    def stored(self, ref: Ref, start: int, stop: int) -> Tensor:
        """A run of one input in its own dtype."""
        values = self.sources[ref.source].read(ref.key, start, stop)
        if is_mergeable(values.dtype):
            self.check(ref, values)
        return values

    def floats(self, ref: Ref, start: int, stop: int) -> Tensor:
        """A run of one input in float32."""
        values = self.sources[ref.source].read(ref.key, start, stop).to(torch.float32)
        self.check(ref, values)
        return values

    def check(self, ref: Ref, values: Tensor) -> None:
        if not self.allow_nonfinite and not all_finite(values):
            bad, label = "NaN" if values.float().isnan().any() else "Inf", self.sources[ref.source].label
            raise MergeError(f"{ref.key} of {label} ({ref.source}) contains {bad}; allow it or mend it")

    def spans(self, group: MergeGroup, unit: Unit) -> Iterator[tuple[int, int]]:
        """Flat (start, stop) of each chunk: a number of whole blocks of the unit. A tensor without elements is one."""
        total, width = prod(group.shape), 1
        if unit == "row":
            width = max(1, shape_for(unit, group.shape)[1])
        block = max(1, BLOCK // width) * width
        step = max(1, total) if unit == "tensor" else max(1, self.chunk_size // block) * block
        return ((start, min(start + step, total)) for start in range(0, max(1, total), step))

    def chunks(self, group: MergeGroup, unit: Unit) -> Iterator[Chunk]:
        """The group's chunks in flat order, in float32."""
        view = shape_for(unit, group.shape)
        shape = view if unit == "tensor" or 0 in view else (-1, *view[1:])
        statistics = tuple(None if r is None else self.sources[r.source][r.key] for r in group.statistics)
        weights = torch.tensor(group.weights, dtype=torch.float64)
        for start, stop in self.spans(group, unit):
            yield Chunk(
                x=torch.stack([self.floats(ref, start, stop).reshape(shape) for ref in group.inputs]),
                base=None if group.base is None else self.floats(group.base, start, stop).reshape(shape),
                members=group.members,
                weights=weights,
                statistics=statistics,
                tokens=group.tokens,
                name=group.output,
                start=start,
                seed=self.seed,
            )

    def all_equal(self, group: MergeGroup, refs: tuple[Ref, ...]) -> bool:
        """Whether these tensors are the same bytes; stops at the first chunk that differs."""
        if len(refs) == 1:
            return True
        if len({self.sources[r.source].dtype(r.key) for r in refs}) > 1:
            return False
        for start, stop in self.spans(group, "element"):
            first, *others = (self.sources[r.source].read(r.key, start, stop).view(torch.uint8) for r in refs)
            if not all(torch.equal(first, other) for other in others):
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


Chunks = Callable[[Job], Iterator[Chunk]]


def settle_whole_model(jobs: list[Job], chunks: Chunks, kin: Callable[[Job], Any]) -> None:
    """Serve all requests for sums over the whole model: sums are taken over all jobs of one kin, member by member."""
    while waiting := [j for j in jobs if isinstance(j.step.request, WholeModel)]:
        sums: dict[Any, dict[str, list[Tensor]]] = {}
        for job in waiting:
            rows = sums.setdefault(kin(job), {})
            for chunk in chunks(job):
                for block in blocks(chunk, job.method.unit):
                    add_by_member(rows, block.members, job.step.request.reduce(block))
        for job in waiting:
            rows = sums[kin(job)]
            totals = zip(*(rows[m] for m in job.group.members), strict=True)
            job.step = resume(job.program, tuple(map(torch.stack, totals)))


def add_by_member(rows: dict[str, list[Tensor]], members: tuple[str, ...], parts: tuple[Tensor, ...]) -> None:
    for i, member in enumerate(members):
        own = [part[i] for part in parts]
        rows[member] = own if member not in rows else [a + b for a, b in zip(rows[member], own, strict=True)]
