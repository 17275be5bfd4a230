"""Sources: named tensors in memory, in a file, in a folder or on the Hub, behind one interface.

Opening a source reads headers only. Tensors are read whole (``source[key]``) or in runs (``source.read``).
"""

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Set
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MergeError, closest
from . import hub
from .pickles import read_checkpoint
from .safetensors_file import SafetensorsFile

PICKLES = (".pt", ".pth", ".ckpt", ".bin")
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".merges")
SIDE_NAMES = re.compile(r"(LICENSE|LICENCE|NOTICE)(\..*)?$", re.IGNORECASE)
NOT_SIDE = re.compile(
    r"(.*\.index\.json|provenance\.json|trainer_state\.json|(all|train|eval)_results\.json|training_args\..*)$"
)


class FileRecord(NamedTuple):
    """One file a source reads: its name within the source, bytes, sha256 where the Hub reports it, when it was last
    changed (ns; tells an interrupted merge whether it may go on), and where it is."""

    name: str
    size: int
    sha256: str | None = None
    modified: int | None = None
    path: Path | None = None


class TensorSource(Mapping[str, Tensor]):
    """Named tensors. A mapping from key to tensor, whose shapes and dtypes are known without reading."""

    label: str = "memory"  # public name: Hub id or last part of a path, never an absolute path
    revision: str | None = None  # commit hash of a Hub source
    config: dict[str, Any] | None = None  # its config.json
    ignored: tuple[str, ...] = ()  # entries of a checkpoint file that are no tensors of the state dict
    notes: tuple[str, ...] = ()  # what a view changes, in sentences for the report of a merge
    tied: tuple[tuple[str, ...], ...] = ()  # keys that share one memory

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self.details: dict[str, Any] = {}  # what a view has to report beside its notes, as plain data
        self.side_files: dict[str, Path] = {}
        self.files: tuple[FileRecord, ...] = ()

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, key: str) -> torch.dtype: ...

    @abstractmethod
    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) in flat order, in the stored dtype. May be a view, which is not to be written to.

        A source that computes its tensors (base + adapter) may return float32 in place of ``dtype(key)``, so that
        whoever merges rounds once. What it returns for an element never depends on the run that was asked for.
        """

    @abstractmethod
    def __contains__(self, key: object) -> bool: ...

    def __getitem__(self, key: str) -> Tensor:
        if key not in self:
            raise KeyError(key)
        return self.read(key).reshape(self.shape(key))

    def numel(self, key: str) -> int:
        return prod(self.shape(key))

    def require(self, key: str) -> str:
        """Return the key, or raise with the closest keys there are."""
        if key not in self:
            raise MergeError(f"{self.label} has no tensor {key}{closest(key, self)}")
        return key

    def extent(self, key: str) -> tuple[int, int] | None:
        """The open file and the byte at which a tensor lies as it is; None where it must be read to be had."""
        return None

    def close(self) -> None:
        """Let go of open files."""

    def __enter__(self) -> "TensorSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DictSource(TensorSource):
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str = "memory", config: dict | None = None) -> None:
        super().__init__()
        wrong = [k for k, t in tensors.items() if not isinstance(k, str) or not isinstance(t, Tensor)]
        if wrong:
            raise MergeError(f"a source in memory maps names to tensors; {wrong[0]!r} is something else")
        self.tensors = {key: tensor.detach() for key, tensor in tensors.items()}
        self.label, self.config, self.tied = label, config, shared_memory(self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, key: object) -> bool:
        return key in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[self.require(key)].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[self.require(key)].dtype

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.tensors[self.require(key)].reshape(-1)[start:stop].cpu()


class SafetensorsSource(TensorSource):
    """Tensors in one or several safetensors files; ``shards`` maps each file to the keys it must hold (None: all)."""

    def __init__(self, shards: Mapping[Path, set[str] | None], label: str) -> None:
        super().__init__()
        self.label, self.opened = label, []
        self.where: dict[str, SafetensorsFile] = {}
        try:
            for path, keys in shards.items():
                self._add(path, keys)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path, keys: set[str] | None) -> None:
        if not path.is_file():
            raise MergeError(f"{self.label}: the index names {path.name}, which is missing")
        file = SafetensorsFile(path)
        self.opened.append(file)
        check_shard(self.label, path, file.entries.keys(), keys)
        twice = self.where.keys() & file.entries.keys()
        if twice:
            raise MergeError(f"{self.label}: {min(twice)} is in {path.name} and in {self.where[min(twice)].path.name}")
        self.where.update(dict.fromkeys(file.entries, file))
        self.metadata.update(file.metadata)
        self.files += (file_record(path),)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __contains__(self, key: object) -> bool:
        return key in self.where

    def __len__(self) -> int:
        return len(self.where)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.where[self.require(key)].entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self.where[self.require(key)].entries[key].dtype

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.where[self.require(key)].read(key, start, stop)

    def __getitem__(self, key: str) -> Tensor:
        return super().__getitem__(key).clone()  # of its own: whoever takes a whole tensor may write to it

    def extent(self, key: str) -> tuple[int, int] | None:
        file = self.where[self.require(key)]
        return file.descriptor, file.entries[key].offset

    def close(self) -> None:
        for file in self.opened:
            file.close()


def open_source(ref: Any) -> TensorSource:
    """Open a Hub id (``org/name[@revision]``), a folder, a ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` or ``.bin``
    file, a mapping of tensors, a source that is open already, or ``base+adapter``: two of the former, of which the
    second is a folder or Hub id as peft writes it.

    Raises MergeError, in one sentence, where there is nothing of the kind or it is damaged. Nothing in it is executed.
    """
    if isinstance(ref, TensorSource):
        return ref
    if isinstance(ref, Mapping):
        return DictSource(ref)
    path = Path(ref).expanduser()
    if path.is_dir():
        return open_folder(path, path.resolve().name)
    if path.is_file():
        return open_file(path)
    if hub.is_hub_id(str(ref)):
        snapshot = hub.fetch(str(ref))
        source = open_folder(snapshot.folder, snapshot.repo)
        source.revision = snapshot.revision
        source.files = tuple(f._replace(sha256=snapshot.sha256.get(f.name)) for f in source.files)
        return source
    if "+" in str(ref):
        from .adapted import adapted  # here, because views are made of sources

        base, _, adapter = str(ref).rpartition("+")
        return adapted(base.strip(), adapter.strip())
    raise MergeError(f"{str(ref)!r} is neither a file or folder here nor a Hub id (org/name or org/name@revision)")


def open_file(path: Path) -> TensorSource:
    if path.suffix == ".safetensors":
        return SafetensorsSource({path: None}, path.name)
    if path.suffix in PICKLES:
        return pickle_source({path: None}, path.name)
    known = ", ".join([".safetensors", *PICKLES])
    raise MergeError(f"{path.name}: a checkpoint file ends in one of {known}")


def open_folder(folder: Path, label: str) -> TensorSource:
    """A folder as ``save_pretrained`` writes it: weights (safetensors first), config.json, side files."""
    source = folder_weights(folder, label)
    source.side_files = side_files(folder)
    if (folder / "config.json").is_file():
        try:
            source.config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise MergeError(f"{label}: config.json is not a JSON object ({error})") from None
    return source


def folder_weights(folder: Path, label: str) -> TensorSource:
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if not index.is_file() and not single.is_file():
            continue
        shards = {single: None} if single.is_file() else read_index(index, label)  # as transformers prefers it
        return SafetensorsSource(shards, label) if suffix == "safetensors" else pickle_source(shards, label)
    if (folder / "adapter_config.json").is_file():
        raise MergeError(
            f"{label} is an adapter, not a model: write 'base+adapter', or give 'adapters' to merge adapters into one"
        )
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return SafetensorsSource({files[0]: None}, label)
    if files:
        raise MergeError(f"{label} has {len(files)} safetensors files and no model.safetensors.index.json to join them")
    raise MergeError(f"{label} holds no weights (model.safetensors, its index, or pytorch_model.bin)")


def read_index(index: Path, label: str) -> dict[Path, set[str]]:
    """The shards an index names, each with its keys. Shards must lie in the folder (or in its Hub cache)."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, set[str]] = {}
        for key, name in weight_map.items():
            shards.setdefault(str(name), set()).add(key)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise MergeError(f"{label}: {index.name} is no index of shards") from None
    for name in shards:
        if Path(name).name != name or not is_inside(index.parent, index.parent / name):
            raise MergeError(f"{label}: {index.name} points outside its folder ({name})")
    return {index.parent / name: keys for name, keys in shards.items()}


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a file really lies in the folder; the links of the Hub cache to its ``blobs`` are the one exception."""
    real, home = path.resolve(), folder.resolve()
    blobs = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    return real.is_relative_to(home) or real.parent in blobs


def side_files(folder: Path) -> dict[str, Path]:
    """What belongs to a model beside its weights: configurations, tokenizer, processor, templates, code, licence."""
    found = {}
    for path in sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")]):
        wanted = path.suffix in SIDE_SUFFIXES or SIDE_NAMES.match(path.name)
        if wanted and path.is_file() and not NOT_SIDE.match(path.name) and not path.name.startswith("."):
            found[path.relative_to(folder).as_posix()] = path
    return found


def pickle_source(shards: Mapping[Path, set[str] | None], label: str) -> DictSource:
    """Tensors of checkpoint files made by ``torch.save``, each with the keys it must hold (None: all)."""
    tensors: dict[str, Tensor] = {}
    ignored: list[str] = []
    for path, keys in shards.items():
        if not path.is_file():
            raise MergeError(f"{label}: the index names {path.name}, which is missing")
        part, rest = read_checkpoint(path)
        check_shard(label, path, part.keys(), keys)
        twice = part.keys() & tensors.keys()
        if twice:
            raise MergeError(f"{label}: {min(twice)} is in {path.name} and in another shard")
        tensors |= part
        ignored += rest
    source = DictSource(tensors, label)
    source.ignored = tuple(ignored)
    source.files = tuple(map(file_record, shards))
    return source


def check_shard(label: str, path: Path, found: Set[str], keys: set[str] | None) -> None:
    """A shard holds what its index says, no less and no more."""
    for key in sorted((keys or set(found)) ^ set(found))[:1]:
        side = "misses" if key in (keys or ()) else "holds, against the index,"
        raise MergeError(f"{label}: {path.name} {side} the tensor {key}")


def file_record(path: Path) -> FileRecord:
    stat = path.stat()
    return FileRecord(path.name, stat.st_size, modified=stat.st_mtime_ns, path=path)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shared_memory(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Groups of keys whose tensors are one and the same memory."""
    groups: dict[tuple, list[str]] = {}
    for key, t in tensors.items():
        if t.numel() and t.device.type != "meta":
            groups.setdefault((t.data_ptr(), t.dtype, tuple(t.shape), t.stride()), []).append(key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)
