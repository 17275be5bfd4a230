"""Threads that make tensors side by side, within a limit of memory.

A worker runs torch with one thread, since sums and BLAS calls differ in the last bit between thread counts; torch lets
other threads run while it computes, reads or writes, so several workers use several cores.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Condition
from typing import Any, TypeVar

import torch

from .allocator import keep_freed_memory
from .devices import CPU

T = TypeVar("T")


def available_threads() -> int:
    """The cores this process may use, or fewer where OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(wanted)) if wanted.isdigit() and int(wanted) else cores


class Memory:
    """Bytes that may be in use at once; None is no limit. Whoever asks for more than there is waits for the others."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.used, self.changed = limit, 0, Condition()

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.limit is None or not self.used or self.used + count <= self.limit)
            self.used += count
        try:
            yield
        finally:
            with self.changed:
                self.used -= count
                self.changed.notify_all()


class Workers:
    """A pool of threads. With one thread everything runs where it is called."""

    def __init__(self, threads: int, memory: int | None = None, device: torch.device = CPU) -> None:
        keep_freed_memory()
        self.threads, self.memory, self.device = threads, Memory(memory), device
        self.pool = ThreadPoolExecutor(threads, "merge", self.begin) if threads > 1 else None

    def begin(self) -> None:
        """What a thread sets for itself: one thread of torch; on a GPU a stream, so that copies and sums overlap."""
        torch.set_num_threads(1)
        if self.device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(self.device))

    def map(self, function: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
        """Results in the order of the items."""
        return map(function, items) if self.pool is None else self.pool.map(function, items)

    def each(self, function: Callable[[Any], Any], items: Iterable[Any], need: Callable[[Any], int]) -> None:
        """Call a function for every item, begun in their order; each waits until the bytes it needs are free.

        The first error stops what has not begun, and is raised.
        """

        def held(item: Any) -> None:
            with self.memory.hold(need(item)):
                function(item)

        if self.pool is None:
            for item in items:
                held(item)
            return
        futures = [self.pool.submit(held, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            for future in futures:
                future.cancel()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
