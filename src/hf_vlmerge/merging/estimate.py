"""What a merge will cost: bytes, time and memory, told before it begins."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

import torch

from .devices import CPU
from .errors import MergeError
from .groups import MergeGroup, Sources
from .making import bytes_of, has_passes, input_count, memory_of, output_of
from .program import BLOCK, shape_for
from .streaming import Job


class Speed(NamedTuple):
    """Seconds an input element that is read, added up, its part of the output written (``plain``), and the same of a
    method that looks at the tensor first (``passes``); float64 operations a second of products and decompositions."""

    plain: float
    passes: float
    flops: float


# Measured with three bfloat16 inputs in the page cache; meant to be right within a factor of two.
ONE_THREAD = Speed(1.5e-9, 4e-9, 2e10)
GPU = Speed(3e-10, 7e-10, 2e13)  # an H200, with any number of threads
COMPILED = 0.4  # of a thread's time, where a method has a compiled form
DECOMPOSED = 20  # products a matrix method costs, about


@dataclass(frozen=True)
class Estimate:
    """Bytes that are read (once more in each pass over a tensor) and written, seconds from a warm page cache, bytes in
    use at once beside the interpreter's own, and the settings they hold for."""

    bytes_read: int
    bytes_written: int
    seconds: float
    memory: int
    threads: int
    chunk_size: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"reads {size(self.bytes_read)}, writes {size(self.bytes_written)}, about {self.seconds:.1f} s on "
            f"{self.threads} threads once the inputs are in memory, about {size(self.memory)} of working memory"
        )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def estimate(
    jobs: Sequence[Job | MergeGroup],
    sources: Sources,
    threads: int,
    chunk_size: int,
    device: torch.device = CPU,
    compiled: bool = False,
) -> Estimate:
    """The cost of making these tensors."""
    read = written = 0
    seconds = []
    speed, side_by_side = (ONE_THREAD, threads) if device.type == "cpu" else (GPU, 1)
    for job in jobs:
        group, numel = output_of(job), prod(output_of(job).shape)
        read += bytes_of(group, sources)
        written += numel * group.dtype.itemsize
        seconds.append(seconds_of(job, speed, compiled))
    memory = sum(sorted((memory_of(job, chunk_size) for job in jobs), reverse=True)[:threads])
    longest = max((s for s, job in zip(seconds, jobs, strict=True) if is_whole(job)), default=0.0)
    return Estimate(read, written, max(sum(seconds) / side_by_side, longest), memory, threads, chunk_size)


def is_whole(job: Job | MergeGroup) -> bool:
    """Whether a tensor is made in one piece, by one worker."""
    return isinstance(job, Job) and job.method.unit == "tensor"


def seconds_of(job: Job | MergeGroup, speed: Speed, compiled: bool) -> float:
    """One tensor's time."""
    group = output_of(job)
    inputs = prod(group.shape) * input_count(group)
    if is_whole(job) and len(group.shape) > 1:
        rows, columns = shape_for("row", group.shape)
        return 2 * DECOMPOSED * inputs * min(rows, columns) / speed.flops
    faster = COMPILED if compiled and isinstance(job, Job) and job.method.compiled else 1.0
    return inputs * faster * (speed.passes if has_passes(job) else speed.plain)


def fit(jobs: Sequence[Job | MergeGroup], threads: int, chunk_size: int, limit: int | None) -> tuple[int, int]:
    """Threads and chunk size that stay within a limit of memory: smaller chunks first, then fewer threads.

    Raises MergeError if one tensor alone needs more.
    """
    if not isinstance(threads, int) or threads < 1:
        raise MergeError(f"threads must be positive, not {threads!r}")
    if limit is None or not jobs:
        return threads, chunk_size
    while True:
        worst = max(jobs, key=lambda job: memory_of(job, chunk_size))
        need = memory_of(worst, chunk_size)
        if need * threads <= limit:
            return threads, chunk_size
        if chunk_size > BLOCK and memory_of(worst, BLOCK) < need:  # of a method over whole matrices it is not
            chunk_size = max(BLOCK, chunk_size // 2)
        elif need <= limit:
            return max(1, limit // need), chunk_size
        else:
            name = output_of(worst).output
            raise MergeError(f"{name} needs about {size(need)} of memory at once, more than the limit of {size(limit)}")
