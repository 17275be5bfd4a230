"""One safetensors file: its header is parsed and checked here, its tensors are mapped into memory.

What is read is a view of the file's pages, which are private: whoever writes to it changes no file. A file that becomes
shorter is told from its length at every read. (One that shrinks within a read ends the process; a merge goes on from
there when it is called again.)
"""

import json
import mmap
import os
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import MergeError
from .dtypes import SAFETENSORS

POPULATE_READ = 22  # Linux: all pages at once, not one by one as they are touched
POPULATED = 20  # bits: pages are asked for by the MiB, and once
MAX_HEADER = 100 * 1000 * 1000  # bytes; the limit of the reference implementation


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class SafetensorsFile:
    """Named tensors of one ``.safetensors`` file. Raises MergeError where the file breaks the format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        try:
            self.entries, self.metadata = self._read_header()
            # the map lives as long as a tensor that shows some of it
            self.map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_COPY)
            self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
            self.populated = bytearray((len(self.map) >> POPULATED) + 1)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        size = os.fstat(self.descriptor).st_size
        length = int.from_bytes(os.pread(self.descriptor, 8, 0), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise MergeError(f"{self.path.name} is truncated or no safetensors file: {size} bytes, header of {length}")
        try:
            header = json.loads(os.pread(self.descriptor, length, 8))
            metadata = header.pop("__metadata__", {})
            described = {key: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for key, e in header.items()}
            if not all(type(n) is int and n >= 0 for _, shape, *ends in described.values() for n in (*shape, *ends)):
                raise ValueError("sizes must be whole numbers")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MergeError(f"{self.path.name}: the safetensors header is damaged ({error})") from None
        start, end, entries = 8 + length, 0, {}
        for key, (dtype, shape, first, last) in sorted(described.items(), key=lambda item: item[1][2:]):
            if dtype not in SAFETENSORS:
                raise MergeError(f"{self.path.name}: {key} has dtype {dtype}, which torch cannot hold")
            entry = Entry(SAFETENSORS[dtype], packed(dtype, shape), start + first)
            if first != end or last - first != nbytes(entry.dtype, entry.shape):
                raise MergeError(
                    f"{self.path.name}: {key} does not lie where its shape {shape} and its neighbours put it"
                )
            entries[key], end = entry, last
        if start + end != size:
            what = "truncated" if start + end > size else "longer than its header says"
            raise MergeError(f"{self.path.name} is {what}: expected {start + end} bytes, found {size}")
        return {key: entries[key] for key in header}, dict(metadata or {})

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a tensor in flat order, as a view."""
        entry = self.entries[key]
        size, count = entry.dtype.itemsize, prod(entry.shape)
        first, last = (entry.offset + min(at, count) * size for at in (start, count if stop is None else stop))
        if os.fstat(self.descriptor).st_size < last:
            raise MergeError(f"{self.path.name} became shorter while it was read ({key})")
        if last > first:
            self._populate(first >> POPULATED, ((last - 1) >> POPULATED) + 1)
        data = self.bytes[first : max(first, last)]
        return (data if first % size == 0 else data.clone()).view(entry.dtype)

    def _populate(self, start: int, stop: int) -> None:
        """Map the pages of some MiB that were not asked for before: to ask again takes a fifth of the time."""
        parts = self.populated[start:stop]
        if all(parts):
            return
        self.populated[start:stop] = bytes([1]) * len(parts)
        at, end = start << POPULATED, min(stop << POPULATED, len(self.map))
        with suppress(AttributeError, OSError):  # not everywhere, and no harm done if it cannot
            self.map.madvise(POPULATE_READ, at, end - at)


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return prod(shape) * dtype.itemsize


def packed(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape torch gives a tensor that the header describes."""
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" and shape else shape
