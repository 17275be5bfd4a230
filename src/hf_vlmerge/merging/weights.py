"""Values that depend on the layer or the name of a tensor: gradients, filter lists, one value a member.

A gradient is a list of numbers, linear over t = layer / (layers - 1); t = 1 for a single layer, t = 0 outside layers. A
filter list (``[{filter: mlp, value: 0.5}, {value: 1.0}]``) takes the first entry whose filter is part of the name.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .errors import MergeError, nearest

ABSENT = object()  # no value given here; the next level decides


class Layer(NamedTuple):
    """Where a tensor lies: the prefix of its layer stack and its index there."""

    prefix: str
    index: int


def layer_of(name: str) -> Layer | None:
    """The layer of a name: its first all-digits component, counted per prefix. None outside layers."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else Layer(".".join(parts[:at]), int(parts[at]))


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Number of layers of each prefix."""
    counts: dict[str, int] = {}
    for layer in filter(None, map(layer_of, names)):
        counts[layer.prefix] = max(counts.get(layer.prefix, 0), layer.index + 1)
    return counts


def position(name: str, counts: Mapping[str, int]) -> float:
    """t of a tensor, in [0, 1]."""
    layer = layer_of(name)
    if layer is None:
        return 0.0
    return 1.0 if counts[layer.prefix] == 1 else layer.index / (counts[layer.prefix] - 1)


def at_position(values: Sequence[float], t: float) -> float:
    """Piecewise linear interpolation of equally spaced values."""
    if len(values) == 1:
        return float(values[0])
    low = min(int(t * (len(values) - 1)), len(values) - 2)
    share = t * (len(values) - 1) - low
    return (1 - share) * values[low] + share * values[low + 1]


def settle(value: Any, name: str, t: float) -> Any:
    """Resolve a gradient or a filter list for one tensor; ABSENT where no filter applies."""
    if not isinstance(value, list | tuple) or not value:
        return value
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        return at_position(value, t)
    for entry in value:
        if not isinstance(entry, Mapping) or "value" not in entry or entry.keys() - {"filter", "value"}:
            raise MergeError(
                f"a list is a gradient of numbers or has entries {{filter: text, value: number}}, not {entry!r}"
            )
        if entry.get("filter") in (None, "*") or str(entry["filter"]) in name:
            return settle(entry["value"], name, t)
    return ABSENT


def is_filter_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def of_member(value: Any, alias: str, order: Sequence[str], parameter: str, gradients: bool = False) -> Any:
    """One member's part of a per-member value: of a mapping by alias, of a list in member order, or the value itself.

    With ``gradients`` a list of numbers is a layer gradient for every member (mergekit's reading) and is left as it is.
    """
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in order]
        if unknown:
            raise MergeError(f"{parameter}: no member is called {unknown[0]!r}{nearest(unknown[0], order)}")
        if alias not in value:
            raise MergeError(f"{parameter}: the mapping gives no value for member {alias!r}")
        return value[alias]
    if isinstance(value, list | tuple) and not is_filter_list(value) and not gradients:
        if len(value) != len(order):
            raise MergeError(
                f"{parameter}: {len(value)} values for {len(order)} members ({', '.join(order)}); "
                "a layer gradient of a per-member parameter is given by alias: {alias: [first, ..., last]}"
            )
        return value[list(order).index(alias)]
    return value
