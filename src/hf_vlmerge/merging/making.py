"""Making one output tensor from its group: copied, or read in chunks, merged in float32, rounded once."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from inspect import isgenerator
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from ._compiled import SHIFTS, Compiled
from ._order import GATHERED
from .devices import on_host
from .errors import MergeError
from .groups import COPY, MergeGroup, Ref, Sources
from .program import BLOCK, Chunk, NotFinite, Read, complete, shape_for
from .registry import get_merge_method
from .streaming import Job, Reader
from .tensors.dtypes import all_finite, dtype_name

FLOAT = 4  # bytes


class Sink(Protocol):
    """Where outputs go. ``copy`` takes a tensor's bytes from an open file, and says whether it can."""

    def write(self, key: str, start: int, values: Tensor) -> None: ...

    def copy(self, key: str, source: int, offset: int) -> bool: ...


@dataclass(frozen=True)
class Maker:
    """Makes output tensors. ``written`` hears of every run of elements that is done."""

    reader: Reader
    sink: Sink
    written: Callable[[int], Any] = lambda count: None

    def make(self, job: Job | MergeGroup, run: Callable[..., Iterable] = map) -> str:
        """Make one output tensor and say how: merged, copied, or equal (copied, since all inputs were byte-equal).

        ``run`` is ``map``, or a pool's for a tensor large enough to be cut among its threads.
        """
        if isinstance(job, MergeGroup):
            self.copy(job)
            return "copied"
        group, unit = job.group, job.method.unit
        if self.keeps_equal(job):
            self.copy(group)
            return "equal"
        reads = self.reader.reads(group, unit, once=not has_passes(job))
        merge = complete(job.program, job.step, lambda: reads, unit, run=run)
        for _ in run(partial(self.merge_run, group, merge), reads):
            pass
        return "merged"

    def merge_run(self, group: MergeGroup, merge: Callable[[Chunk], Tensor], read: Read) -> None:
        if isinstance(merge, Compiled) and read.stored and group.dtype in SHIFTS:
            with suppress(NotFinite):  # what is not, and where, the chunks will say
                run = read.stored()
                values = merge.of_stored(run, group.dtype)
                self.sink.write(group.output, run.start, values)
                self.written(run.count)
                return
        for chunk in read():
            shape = tuple(chunk.x.shape[1:])
            values = merge(chunk)
            if values.shape != shape:
                raise RuntimeError(f"{group.method} returned {tuple(values.shape)} for {shape}")
            self.put(group, chunk.start, values.reshape(-1))

    def keeps_equal(self, job: Job) -> bool:
        """Whether all inputs, and the base if the method uses one, are the same bytes and the method keeps those."""
        group = job.group
        return job.method.keeps_equal(group.parameters, group.weights) and self.reader.all_equal(group)

    def copy(self, group: MergeGroup) -> None:
        """Take the first input as it is, within the kernel where the dtype stays."""
        ref: Ref = group.inputs[0]
        self.reader.check_copied(group)
        source = self.reader.sources[ref.source]
        extent = source.extent(ref.key) if source.dtype(ref.key) == group.dtype else None
        if extent is not None and self.sink.copy(group.output, *extent):
            self.written(prod(group.shape))
            return
        for start, stop in self.reader.spans(group, "element"):
            self.put(group, start, self.reader.stored(ref, start, stop), copied=True)

    def put(self, group: MergeGroup, start: int, values: Tensor, copied: bool = False) -> None:
        """The one rounding, to the output dtype, and the way out."""
        result = on_host(values.to(group.dtype))
        cast = values.dtype != group.dtype
        if (cast or not copied) and group.dtype.is_floating_point and not self.reader.allow_nonfinite:
            self.check_fit(group, values, result)
        self.sink.write(group.output, start, result)
        self.written(result.numel())

    def check_fit(self, group: MergeGroup, values: Tensor, result: Tensor) -> None:
        """Values beyond the largest number of the output dtype are an error. None is if their squares sum to less than
        that number's, which is far cheaper than a look at each."""
        values = values.float() if values.dtype.itemsize == 1 else values
        largest = min(torch.finfo(group.dtype).max, torch.finfo(torch.float32).max)
        if not float(values.dot(values)) < largest**2 and not all_finite(result):
            name = dtype_name(group.dtype)
            raise MergeError(f"{group.output}: values up to {values.abs().max():.4g} do not fit into {name}")


def job_of(group: MergeGroup) -> Job | MergeGroup:
    """The group as its method sees it, with a base only where the method uses one; a copy has no method."""
    if group.method == COPY:
        return group
    method = get_merge_method(group.method)
    return Job(group if method.needs_base or method.takes_base else replace(group, base=None), method)


def output_of(job: Job | MergeGroup) -> MergeGroup:
    return job if isinstance(job, MergeGroup) else job.group


def input_count(group: MergeGroup) -> int:
    return len(group.inputs) + (group.base is not None)


def has_passes(job: Job | MergeGroup) -> bool:
    """Whether a method reads the tensor before it merges it."""
    return isinstance(job, Job) and isgenerator(job.program)


def bytes_of(group: MergeGroup, sources: Sources) -> int:
    """Bytes of a group's inputs as they are stored."""
    return prod(group.shape) * sum(sources[r.source].dtype(r.key).itemsize for r in group.refs)


def memory_of(job: Job | MergeGroup, chunk_size: int) -> int:
    """Bytes that making a tensor needs at once, by a generous estimate: inputs in float32 and as many temporaries; of a
    method over whole matrices their float64 products and factors."""
    if isinstance(job, MergeGroup):
        return 8 * chunk_size
    group, unit = job.group, job.method.unit
    numel, inputs = prod(group.shape), input_count(group)
    if unit == "tensor":
        columns = group.shape[1] if len(group.shape) == 2 else 0  # nothing else is factored
        return FLOAT * numel * (2 * inputs + 1) + 2 * FLOAT * (5 * numel + 4 * columns * columns)
    block = max(BLOCK, chunk_size, shape_for(unit, group.shape)[-1] if unit == "row" else 0)
    chunks = FLOAT * min(block, numel) * (3 * inputs + 2)
    return chunks + (FLOAT * min(GATHERED, numel * inputs) if has_passes(job) else 0)
