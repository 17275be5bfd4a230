"""Checkpoints made by ``torch.save``, read without running anything that is in them.

First torch's own ``weights_only`` reader. Where that refuses (training frameworks pickle configurations, callbacks and
paths beside the weights), a second reader follows: it resolves a short list of harmless names, puts inert stand-ins in
place of every other class or function, and refuses files that ask for Python's own dangerous modules.
"""

import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import MergeError

# Modules whose functions run code, reach files or the network. A checkpoint that names one is hostile.
FORBIDDEN = frozenset(
    """
    os posix nt sys subprocess builtins __builtin__ shutil socket importlib imp runpy pty ctypes code codeop commands
    operator _operator marshal pickle _pickle types pydoc timeit pdb bdb profile cProfile trace webbrowser signal gc
    multiprocessing threading _thread asyncio concurrent urllib http ftplib smtplib tempfile io _io site venv pip
    ensurepip platform atexit inspect linecache pkgutil zipimport distutils setuptools
    """.split()  # noqa: SIM905 - a list of a hundred quoted words reads worse
)
BUILTINS = {
    t.__name__: t for t in (set, frozenset, list, dict, tuple, int, float, complex, bool, str, bytes, bytearray)
}
REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
NESTS = ("state_dict", "model_state_dict", "model", "module", "ema")  # where frameworks keep the weights


class StandIn:
    """Takes the place of a class or function that is not on the list. Whatever is done to it has no effect."""

    def __new__(cls, *_: Any, **__: Any) -> "StandIn":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "StandIn":
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    add = append

    def __hash__(self) -> int:
        return id(self)


class Harmless(StandIn):
    """A function of the list. It can be called, but what a pickle sets on it has no effect.

    A function itself would not do: a pickle may set attributes on it, and torch's reader of old files writes a patch
    file of any name for what has the attribute ``dump_patches`` and a source.
    """

    def __new__(cls, function: Callable[..., Any]) -> "Harmless":
        self = object.__new__(cls)
        self.function = function
        return self

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler for which no name leads to foreign code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in BUILTINS:
            return BUILTINS[name]
        if module.partition(".")[0] in FORBIDDEN:
            raise MergeError(
                f"refused: the checkpoint asks for {module}.{name}, which no weights need and which can run code"
            )
        known = harmless(module, name)
        return type(name, (StandIn,), {"__module__": module}) if known is None else known


def harmless(module: str, name: str) -> Any:
    """What a name on the list stands for, or None. No file can alter it: classes are immutable, functions wrapped."""
    if module == "collections" and name == "OrderedDict":
        return OrderedDict
    if module == "_codecs" and name == "encode":
        return Harmless(lambda text, encoding="latin1": text.encode("latin1"))
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if module == "torch" and name in ("Size", "device"):
        return getattr(torch, name)
    if module == "torch._utils" and name in REBUILD:
        return Harmless(getattr(torch._utils, name))
    if module == "torch._tensor" and name == "_rebuild_from_type_v2":
        return Harmless(lambda rebuild, cls, arguments, state: rebuild(*arguments))
    if module == "torch.nn.parameter" and name == "Parameter":
        return Harmless(lambda data, *_: data)
    return None


def _load(file: Any, **options: Any) -> Any:
    return RestrictedUnpickler(file, **options).load()


# What torch.load needs of a pickle module; it brings the reading of both container formats.
RESTRICTED_PICKLE = SimpleNamespace(__name__="restricted_pickle", Unpickler=RestrictedUnpickler, load=_load)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict in a checkpoint, wherever it is nested, and the paths of all entries beside it."""
    content = load_safely(path)
    found = next(nested_state_dicts(content, ""), None)
    if found is None:
        raise MergeError(f"{path.name} holds no state dict (tensors by name, at the top or under {', '.join(NESTS)})")
    tensors, where, ignored = found
    outside = [key for key in content if key != where.partition(".")[0]] if where else []
    return tensors, [*map(str, outside), *ignored]


def load_safely(path: Path) -> Any:
    """The content of a checkpoint file; nothing in it is executed."""
    with open(path, "rb") as file:
        zipped = zipfile.is_zipfile(file)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise MergeError(f"{path.name} is a TorchScript program, not a checkpoint of weights")
    elif tarfile.is_tarfile(path):  # torch would unpack it, links and all
        raise MergeError(f"{path.name} is a tar archive, as only the first versions of torch wrote")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols
        with suppress(Exception):  # it names classes that torch does not allow, or is damaged: the next reader tells
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        return load_restricted(path)


def load_restricted(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", pickle_module=RESTRICTED_PICKLE, weights_only=False)
    except MergeError as refusal:
        raise MergeError(f"{path.name}: {refusal}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).partition("\n")[0]
        raise MergeError(f"{path.name} is no readable checkpoint ({type(error).__name__}: {reason})") from None


def nested_state_dicts(content: Any, where: str) -> Iterator[tuple[dict[str, Tensor], str, list[str]]]:
    """Yield (tensors, path, other entries) for each mapping with tensors, the usual places first."""
    if not isinstance(content, Mapping):
        return
    tensors = {k: v.detach() for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        inside = f"{where}." if where else ""
        yield tensors, where, [f"{inside}{k}" for k in content if k not in tensors]
        return
    for key in NESTS:
        if key in content:
            yield from nested_state_dicts(content[key], f"{where}.{key}" if where else key)
