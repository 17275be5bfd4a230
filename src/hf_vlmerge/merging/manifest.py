"""How a merge goes on after it was interrupted.

The output is written in a folder beside it, whose name tells from which recipe and inputs it is made. A list in that
folder (``.finished-<rank>``, one JSON line a tensor) says which tensors are complete. Killing the process loses nothing
that was handed to the system, so a line is true once it is there; a machine that went down may have lost it, so the
list is believed only within one run of the machine.
"""

import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .errors import MergeError
from .groups import Sources
from .recipe import Recipe
from .tensors.sinks import explained, partial_folder, prepared, publish

try:
    import fcntl
except ImportError:  # a system without it has no locks on files; there nobody is warned of a second merge
    fcntl = None

LISTS = ".finished-"
LOCK = ".lock"


def fingerprint(recipe: Recipe, sources: Sources, settings: Mapping[str, Any]) -> str | None:
    """What an unfinished output must agree on to be continued: recipe, inputs (size, time and names of each file's
    tensors), versions. None if an input is in memory only, and cannot be recognised."""
    if not all(s.files and all(f.modified for f in s.files) for s in sources.values()):
        return None
    inputs = {}
    for role, source in sources.items():
        tensors = [(key, source.shape(key), str(source.dtype(key))) for key in source]
        inputs[role] = (source.files, source.revision, hashlib.sha256(repr(tensors).encode()).hexdigest())
    versions = [(name, version(name)) for name in ("hf_vlmerge", "torch", "numpy")]
    everything = json.dumps([recipe.to_dict(), inputs, dict(settings), versions], sort_keys=True, default=str)
    return hashlib.sha256(everything.encode()).hexdigest()[:16]


def running_since() -> str:
    """A name of this run of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


class Manifest:
    """The tensors of one unfinished folder that are complete, and how each was made (``done``); ``resumed`` is how many
    there were to begin with."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.path = folder / f"{LISTS}{rank}"
        self.done = {name: how for path in sorted(folder.glob(f"{LISTS}*")) for name, how in entries(path)}
        self.resumed = len(self.done)

    def __enter__(self) -> "Manifest":
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(self.descriptor, b"\n")  # whatever was cut short stays a line of its own
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def add(self, name: str, how: str) -> None:
        """Note a complete tensor, in one write."""
        os.write(self.descriptor, (json.dumps([name, how]) + "\n").encode())
        self.done[name] = how


def entries(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a list that are whole."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            name, how = json.loads(line)
        except ValueError:
            continue
        yield name, how


@contextmanager
def unfinished(output: Path | str, key: str | None, *, overwrite: bool, fsync: bool) -> Iterator[Path]:
    """Give the folder in which an output of this fingerprint is written: a new one, or what an interruption left.

    It is renamed to ``output`` when the block ends well, removed after an error, and kept when the process is stopped
    (Ctrl-C, a signal); without a key it is removed then too. What other recipes left of this output is removed. Two
    merges cannot write it at once.
    """
    output = prepared(output, overwrite)
    folder = partial_folder(output, key or secrets.token_hex(8))
    forget_others(output, folder)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise MergeError(f"the output {output.name!r} cannot be made: {error.strerror}") from error
    with locked(folder):
        try:
            if not is_of_this_run(folder):
                forget_lists(folder)
                (folder / LOCK).write_text(running_since(), encoding="ascii")
            yield folder
            forget_lists(folder)
            (folder / LOCK).unlink()
            publish(folder, output, overwrite=overwrite, fsync=fsync)
        except BaseException as error:
            if key is None or isinstance(error, Exception):
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise explained(error, output) from error
            raise


def forget_lists(folder: Path) -> None:
    for path in folder.glob(f"{LISTS}*"):
        path.unlink()


def is_of_this_run(folder: Path) -> bool:
    return (folder / LOCK).read_text(encoding="ascii").strip() == running_since() != "unknown"


def forget_others(output: Path, folder: Path) -> None:
    """Remove what other merges of this output left unfinished, unless one is at work there."""
    for other in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
        if other != folder and (other / LOCK).exists():
            with locked(other):
                shutil.rmtree(other, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an unfinished folder; one sentence if another process holds it."""
    with open(folder / LOCK, "a+", encoding="ascii") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            name = folder.name.removeprefix(".").partition(".partial-")[0]
            raise MergeError(f"another merge is writing {name!r}; wait for it, or choose another output") from None
        yield
