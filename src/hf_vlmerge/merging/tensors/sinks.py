"""Sinks: safetensors folders that appear finished or not at all.

Shapes and dtypes are known before the first value, so every header is written first and each chunk goes straight to its
final place. Everything happens in a temporary sibling folder, which is flushed once and renamed at the end.
"""

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MergeError
from .dtypes import TO_SAFETENSORS
from .safetensors_file import nbytes
from .sources import is_inside

CHUNK = 1 << 24  # bytes a write


class Spec(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


@contextmanager
def atomic_folder(output: Path | str, *, overwrite: bool = False, fsync: bool = True) -> Iterator[Path]:
    """Give a temporary sibling of ``output`` to fill; rename it to ``output`` when the block ends well.

    On any error the temporary folder is removed and what stood at ``output`` stays untouched. An existing ``output`` is
    refused unless ``overwrite``; then it is replaced by renaming, after everything is written and flushed. Of a link to
    a folder, the folder is replaced and the link stays.
    """
    output = prepared(output, overwrite)
    temporary = partial_folder(output, secrets.token_hex(4))
    try:
        temporary.mkdir()
        yield temporary
        publish(temporary, output, overwrite=overwrite, fsync=fsync)
    except OSError as error:
        raise explained(error, output) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepared(output: Path | str, overwrite: bool) -> Path:
    """The output's real path, where it may be written; the folders above it exist."""
    output = Path(output).expanduser().resolve()
    refuse_existing(output, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise MergeError(f"the output {output.name!r} cannot be made: a folder above it is a file") from None
    return output


def partial_folder(output: Path, key: str) -> Path:
    """The sibling that an output is written in, before it is renamed."""
    return output.parent / f".{output.name}.partial-{key}"


def publish(temporary: Path, output: Path, *, overwrite: bool, fsync: bool) -> None:
    """Flush a finished folder and give it its name."""
    if fsync:
        flush(temporary)
    refuse_existing(output, overwrite)
    replace_folder(temporary, output)
    if fsync:
        flush_directory(output.parent)


def refuse_existing(output: Path, overwrite: bool) -> None:
    if os.path.lexists(output) and not overwrite:
        raise MergeError(f"the output {output.name!r} exists; choose another name or ask to overwrite it")
    if os.path.lexists(output) and not output.is_dir():
        raise MergeError(f"the output {output.name!r} is a file, not a folder")
    if os.path.lexists(output) and not is_a_model(output):
        raise MergeError(f"the output {output.name!r} is a folder of something else than a model; choose another name")


def is_a_model(folder: Path) -> bool:
    """Whether a folder is empty, or has at its top what a model has: only such a one is replaced."""
    names = os.listdir(folder)
    return not names or any(name == "config.json" or name.endswith((".safetensors", ".bin")) for name in names)


def replace_folder(new: Path, output: Path) -> None:
    """Put ``new`` where ``output`` is, in one step where the system can exchange two names (Linux).

    Elsewhere the old folder moves aside first and comes back if the second rename fails.
    """
    if not output.exists():
        os.rename(new, output)
        return
    if exchange(new, output):
        shutil.rmtree(new, ignore_errors=True)
        return
    aside = output.parent / f".{output.name}.old-{secrets.token_hex(4)}"
    os.rename(output, aside)
    try:
        os.rename(new, output)
    except OSError:
        os.rename(aside, output)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names atomically; False where the system or the file system cannot."""
    current_folder, rename_exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    names = current_folder, os.fsencode(a), current_folder, os.fsencode(b)
    return renameat2 is not None and renameat2(*names, rename_exchange) == 0


def explained(error: OSError, output: Path) -> Exception:
    """One sentence for a full disk; other errors of the system speak for themselves."""
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return MergeError(f"no space left while writing {output.name!r} ({error.strerror}); nothing was changed")
    return error


def flush(folder: Path) -> None:
    """Force every file and folder below to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        flush_directory(Path(root))


def flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SafetensorsSink:
    """Writes named tensors of known shapes into a folder: one file, or shards with an index.

    ``write`` takes runs of elements in any order and may be called from several threads.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, Spec],
        *,
        max_shard_size: int | str = "5GB",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.specs = folder, specs
        self.total = sum(nbytes(*spec) for spec in specs.values())
        shards = split_shards(specs, parse_size(max_shard_size))
        names = shard_names(len(shards))
        there = sum((folder / name).stat().st_blocks * 512 for name in names if (folder / name).exists())
        if self.total - there > (free := shutil.disk_usage(folder).free):
            raise OSError(errno.ENOSPC, f"{self.total - there} bytes needed, {free} free")
        self.places: dict[str, tuple[int, int]] = {}  # key -> (descriptor, byte offset)
        self.descriptors: list[int] = []
        for name, keys in zip(names, shards, strict=True):
            self._create(folder / name, keys, {"format": "pt", **(metadata or {})})
        if len(shards) > 1:
            weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / "model.safetensors.index.json", index)

    def _create(self, path: Path, keys: list[str], metadata: dict[str, str]) -> None:
        """Write the header and reserve the file's whole length. Wide dtypes come first, so that all are aligned."""
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for key in sorted(keys, key=lambda k: (-self.specs[k].dtype.itemsize, k)):
            dtype, shape = self.specs[key]
            size = nbytes(dtype, shape)
            if dtype not in TO_SAFETENSORS:
                raise MergeError(f"{key}: safetensors cannot hold {dtype}")
            logical = (*shape[:-1], shape[-1] * 2) if TO_SAFETENSORS[dtype] == "F4" else shape
            header[key] = {"dtype": TO_SAFETENSORS[dtype], "shape": logical, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # it exists if an interrupted merge goes on
        self.descriptors.append(descriptor)
        os.truncate(descriptor, 8 + len(text) + end)
        write_at(descriptor, len(text).to_bytes(8, "little") + text, 0)
        for key in keys:
            self.places[key] = (descriptor, 8 + len(text) + header[key]["data_offsets"][0])

    def write(self, key: str, start: int, values: Tensor) -> None:
        """Write a run of elements in flat order, beginning at element ``start``, in the tensor's own dtype."""
        dtype = self.specs[key].dtype
        if values.dtype != dtype:
            raise TypeError(f"{key} is {dtype}, the values are {values.dtype}")
        descriptor, offset = self.places[key]
        data = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        write_at(descriptor, memoryview(data), offset + start * dtype.itemsize)

    def copy(self, key: str, source: int, offset: int) -> bool:
        """Copy a whole tensor's bytes from another file's ``offset`` without taking them into memory."""
        descriptor, place = self.places[key]
        copy_bytes(source, offset, descriptor, place, nbytes(*self.specs[key]))
        return True

    def flush(self) -> None:
        """Force what was written to disk."""
        for descriptor in self.descriptors:
            os.fsync(descriptor)

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())

    def __enter__(self) -> "SafetensorsSink":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_at(descriptor: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view[:CHUNK], offset)
        view, offset = view[written:], offset + written


def copy_bytes(source: int, offset: int, target: int, place: int, count: int) -> None:
    """Copy within the kernel, and share the blocks where the file system can; through memory where it cannot."""
    kernel = hasattr(os, "copy_file_range")
    while count:
        done = 0
        if kernel:
            try:
                done = os.copy_file_range(source, target, min(count, 1 << 30), offset, place)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                    raise
                kernel = False
        if not done:
            data = os.pread(source, min(count, CHUNK), offset)
            if not data:
                raise MergeError("an input became shorter while it was copied")
            write_at(target, data, place)
            done = len(data)
        count, offset, place = count - done, offset + done, place + done


def split_shards(specs: Mapping[str, Spec], limit: int) -> list[list[str]]:
    """Fill shards in the order of the names given; a tensor above the limit gets a shard of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, spec in specs.items():
        if shards[-1] and size + nbytes(*spec) > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes(*spec)
    return shards


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def parse_size(size: int | str) -> int:
    """Bytes in ``"5GB"``, ``"200MB"`` (powers of ten) or ``"1GiB"`` (powers of two), or a number of bytes."""
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if not match or not (number := float(match[1])):
        raise MergeError(f"a size reads like 5GB or 200MB, not {size!r}")
    return max(1, int(number * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_checkpoint(
    output: Path | str,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    config: Mapping[str, Any] | None = None,
    side_files: Mapping[str, Path] | None = None,
    finish: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    fsync: bool = True,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint folder atomically: weights, config.json, side files; ``finish`` runs before the rename.

    ``tensors`` may be views of memory-mapped files: they are copied to disk one after the other. Returns the folder.
    """
    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    named = dict(pairs)
    if len(named) != len(pairs):
        raise MergeError(
            "a tensor name occurs twice: " + next(k for k, _ in pairs if sum(k == n for n, _ in pairs) > 1)
        )
    specs = {key: Spec(t.dtype, tuple(t.shape)) for key, t in named.items()}
    with atomic_folder(output, overwrite=overwrite, fsync=fsync) as folder:
        copy_side_files(folder, side_files or {})
        if config is not None:
            write_json(folder / "config.json", config)
        with SafetensorsSink(folder, specs, max_shard_size=max_shard_size, metadata=metadata) as sink:
            for key, tensor in named.items():
                sink.write(key, 0, tensor)
        if finish is not None:
            finish(folder)
    return Path(output)


def copy_side_files(folder: Path, side_files: Mapping[str, Path]) -> None:
    """Copy ``{name in the folder: path}``. A link out of its folder is refused: what it shows would be published."""
    for name, path in side_files.items():
        if not is_inside(path.parent, path):
            raise MergeError(f"{path.parent.name}: {name} is a link that points outside its folder; put the file there")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
