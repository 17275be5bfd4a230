"""Checked pieces of a recipe: each raises one sentence that says where it was, what was expected and what came."""

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import MergeError, nearest


def text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise MergeError(f"{where} must be a name, not {value!r}")
    return value


def mapping(value: Any, where: str, known: Iterable[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise MergeError(f"{where} must be a mapping, not {value!r}")
    for key in value:
        if known is not None and key not in known:
            raise MergeError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    return value


def sequence(value: Any, where: str) -> list | tuple:
    if value is not None and not isinstance(value, list | tuple):
        raise MergeError(f"{where} must be a list, not {value!r}")
    return value or ()


def texts(value: Any, where: str) -> tuple[str, ...]:
    """One text or a list of them, as a tuple that is not empty."""
    found = (value,) if isinstance(value, str) else tuple(text(v, where) for v in sequence(value, where))
    if not found:
        raise MergeError(f"{where} must name at least one")
    return found


def choice(value: Any, where: str, valid: Iterable[str]) -> str:
    if value not in valid:
        raise MergeError(f"{where} can be {' or '.join(valid)}, not {value!r}{nearest(str(value), valid)}")
    return value
