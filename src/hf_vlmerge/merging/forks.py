"""Workers that are copies of this process.

Threads of Python wait for each other whenever they are not inside an operation, which costs methods of many short
operations half of the second core. Copies do not. They share memory as it was when they were made, agree like the
processes of a launcher (``ranks``), and end with their work.
"""

import ctypes
import gc
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn, TypeVar

from .errors import MergeError

T = TypeVar("T")


def can_fork() -> bool:
    return sys.platform == "linux"  # elsewhere system libraries do not survive it


class Fork(NamedTuple):
    """One of ``count`` processes; 0 is the one that was there before. It holds a line to each other one, they to it.
    ``counter`` is an open file that all of them share."""

    index: int
    count: int
    lines: tuple[Connection, ...]
    counter: int
    machines: int = 1
    takes_turns = True

    @property
    def first(self) -> bool:
        return self.index == 0

    def exchange(self, value: T) -> list[T]:
        """Everybody's value, in the order of the processes."""
        if self.first:
            values = [value, *(received(line) for line in self.lines)]
            for line in self.lines:
                send(line, ("value", values))
            return values
        send(self.lines[0], ("value", value))
        return received(self.lines[0])

    def turns(self, items: Sequence[T]) -> Iterator[T]:
        """Of the same items in all processes, each goes to who asks first. The file's place counts: Linux moves it for
        one process at a time."""
        while (turn := os.lseek(self.counter, 1, os.SEEK_CUR) - 1) < len(items):
            yield items[turn]


def send(line: Connection, message: tuple[str, Any]) -> None:
    line.send_bytes(pickle.dumps(message))  # plain pickles: tensors travel as bytes, not as shared memory


def received(line: Connection) -> Any:
    """What the other end sends; its error is raised here."""
    try:
        kind, value = pickle.loads(line.recv_bytes())
    except EOFError:
        raise MergeError("a worker process ended before its work was done; was it stopped, or out of memory?") from None
    if kind == "error":
        raise value
    return value


@contextmanager
def together(count: int, work: Callable[[Fork], T]) -> Iterator[list[T]]:
    """Do a piece of work in ``count`` processes, this one among them; gives all results, or raises the first error.

    While the block runs, the others give back their memory, which takes a while.
    """
    gc.freeze()  # objects that are not looked at stay shared
    counter = os.memfd_create("turns")
    pairs = [Pipe() for _ in range(count - 1)]
    lines = tuple(mine for mine, _ in pairs)
    children: list[int] = []
    try:
        for i, (_, theirs) in enumerate(pairs, 1):
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                for mine, other in pairs:  # nobody else may hold an end: the parent hears when a process has gone
                    mine.close()
                    if other is not theirs:
                        other.close()
                be_a_copy(Fork(i, count, (theirs,), counter), work, parent)
            children.append(pid)
            theirs.close()
        result = work(Fork(0, count, lines, counter))
        yield [result, *(received(line) for line in lines)]
    except BaseException:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        for pid in children:
            os.waitpid(pid, 0)
        for line in lines:
            line.close()
        os.close(counter)
        gc.unfreeze()


def be_a_copy(fork: Fork, work: Callable[[Fork], Any], parent: int) -> NoReturn:
    """Work, send the result or the error, and end without what a program does when it ends."""
    die_with(parent)
    try:
        try:
            message = ("value", work(fork))
        except Exception as error:
            message = ("error", error if picklable(error) else MergeError(f"{type(error).__name__}: {error}"))
        send(fork.lines[0], message)
    finally:
        os._exit(0)


def picklable(error: Exception) -> bool:
    try:
        return isinstance(pickle.loads(pickle.dumps(error)), type(error))
    except Exception:
        return False


def die_with(parent: int) -> None:
    """Ask Linux to end this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before we could ask
        os._exit(1)
