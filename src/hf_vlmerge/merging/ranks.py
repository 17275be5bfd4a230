"""Several processes that make one output: who makes what, and what they tell each other.

``accelerate launch`` and ``torchrun`` start the same command several times and say by the environment who is who.
Results travel as Python objects over gloo between processes of one job.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from .errors import MergeError

T = TypeVar("T")


class Team(Protocol):
    """This process among ``count`` on ``machines`` machines, that share one piece of work. Where they take turns, each
    works on what nobody else has begun; otherwise everybody knows beforehand what is whose."""

    index: int
    count: int
    machines: int
    takes_turns: bool

    @property
    def first(self) -> bool: ...

    def exchange(self, value: T) -> list[T]:
        """Everybody's value, in the order of the processes."""

    def turns(self, items: Sequence[T]) -> Iterable[T]:
        """Those of the items that come to this process, while it works on them."""


class Ranks(NamedTuple):
    """This process among ``count``; ``group`` is their gloo group. ``machines`` is the number of machines."""

    index: int = 0
    count: int = 1
    machines: int = 1
    group: Any = None
    takes_turns = False

    @classmethod
    def launched(cls) -> "Ranks":
        """As the launcher's environment says; a single process where there is none."""
        count = int(os.environ.get("WORLD_SIZE", 1))
        if count == 1:
            return cls()
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo")
            atexit.register(dist.destroy_process_group)  # its threads must not outlive the interpreter
        group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        return cls(dist.get_rank(), count, -(-count // local), group)

    @property
    def first(self) -> bool:
        return self.index == 0

    def exchange(self, value: T) -> list[T]:
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def turns(self, items: Sequence[T]) -> Sequence[T]:
        return items

    def together(self, work: Callable[[], T]) -> list[T]:
        """Everybody works; all results, or on every rank the first error of any."""
        if self.count == 1:
            return [work()]
        error: BaseException | None = None
        result = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        outcomes = self.exchange((result, None if error is None else f"{error}"))
        if error is not None:
            raise error
        for rank, (_, failed) in enumerate(outcomes):
            if failed is not None:
                raise MergeError(f"process {rank}: {failed}")
        return [result for result, _ in outcomes]

    def on_first(self, work: Callable[[], T]) -> T:
        """The first process works; everybody gets its result or its error."""
        return self.together(lambda: work() if self.first else None)[0]


ALONE = Ranks()


def shares(units: Iterable[Sequence[T]], size: Callable[[T], int], count: int) -> list[list[T]]:
    """Deal units (which stay whole) to ``count`` processes: the largest first, each to whom has least."""
    dealt: list[list[T]] = [[] for _ in range(count)]
    loads = [0] * count
    for unit in sorted(units, key=lambda unit: -sum(map(size, unit))):
        to = loads.index(min(loads))
        dealt[to].extend(unit)
        loads[to] += sum(map(size, unit))
    return dealt
