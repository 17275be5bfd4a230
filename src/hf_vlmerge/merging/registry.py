"""Registries of merge methods and distances: one file each, found by scanning the folder, usable on plain tensors.

The signature of a method is its schema: keyword parameters, annotations and defaults are what a recipe may say.
"""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor

from .errors import MergeError, nearest
from .program import (
    Chunk,
    Counts,
    Gather,
    Program,
    Reduce,
    Sample,
    Stored,
    Unit,
    WholeModel,
    begin,
    complete,
    shape_for,
    single_thread,
    total,
)

__all__ = [
    "Chunk",
    "Counts",
    "Gather",
    "MergeError",
    "PerMember",
    "Program",
    "Reduce",
    "Sample",
    "Stored",
    "WholeModel",
    "distance_metric",
    "merge_method",
]

PerMember = Union[float, Sequence[float], Mapping[str, float]]  # noqa: UP007 - compared by identity in schemas
ANY = 1 << 30  # members: more than anybody has
ALIASES = {"lambda": "scale", "weight": "weights", "t": "ratio"}


@dataclass(frozen=True)
class Method:
    """What methods and distances have in common: a program made from keyword parameters."""

    name: str
    function: Callable[..., Any]
    paper: str | None = None
    unit: Unit = "element"
    needs_base: bool = False
    takes_base: bool = False  # uses a base where the recipe gives one
    statistics: str | None = None  # kind of statistics it needs: "gram", "fisher"
    weighted: bool = False  # reads Chunk.weights
    compiled: bool = False  # has a compiled form (`_compiled.Compiled`)
    average: bool = False  # every output value is a weighted average of the members' values
    members: tuple[int, int] = (1, ANY)  # least and greatest number of members
    keeps_equal: Callable[[Mapping[str, Any], Sequence[float]], bool] = lambda parameters, weights: True
    mergekit: Mapping[str, Any] = field(default_factory=dict)  # parameters that select mergekit's variant
    cost: str = ""  # n members, P parameters, d the longer side of a matrix
    disagreements: str = ""  # where reference implementations differ, and which one the default follows

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def streaming(self) -> str:
        """What of a tensor must be seen at once and, with the default parameters, what must be summed up before."""
        if self.unit == "tensor":
            return "whole matrices"
        what, form = "elementwise" if self.unit == "element" else "rows", ", compiled" if self.compiled else ""
        parameters, _ = self.bind({}, [str(i) for i in range(self.members[0])])
        request = begin(self.program(parameters)).request
        if request is None:
            return what + form
        return f"{what} after sums over the {'model' if isinstance(request, WholeModel) else 'tensor'}{form}"

    def is_per_member(self, parameter: str) -> bool:
        return parameter == "weights" or self.parameters[parameter].annotation == PerMember

    def default(self, parameter: str, compat: str | None = None) -> Any:
        """A parameter's default: the formula's own, or that of another tool's variant."""
        own = 1.0 if parameter == "weights" else self.parameters[parameter].default
        return self.mergekit.get(parameter, own) if compat == "mergekit" else own

    def check_name(self, name: str) -> str:
        """Return the parameter's own name for ``name`` or one of its aliases; unknown ones are errors."""
        own = ALIASES.get(name, name)
        if own in self.parameters or (own == "weights" and self.weighted):
            return own
        valid = [*self.parameters, *(["weights"] if self.weighted else [])]
        known = nearest(name, valid) if valid else "; it has no parameters"
        raise MergeError(f"{self.name} has no parameter {name!r}{known}")

    def bind(self, values: Mapping[str, Any], members: Sequence[str]) -> tuple[dict[str, Any], tuple[float, ...]]:
        """Check values against the schema; return all parameters (per-member ones as tuples) and the weights."""
        given = {self.check_name(name): value for name, value in values.items()}
        weights = per_member("weights", given.pop("weights", 1.0), members)
        bound = {}
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default)
            if self.is_per_member(name):
                bound[name] = per_member(name, value, members)
            else:
                bound[name] = checked(f"{self.name}: {name}", value, parameter.annotation)
        return bound, weights

    def check_members(self, name: str, members: Sequence[str]) -> None:
        least, most = self.members
        if not least <= len(members) <= most:
            count = f"exactly {least}" if least == most else f"{least} to {most}" if most < ANY else f"at least {least}"
            given = f"{len(members)} ({', '.join(members)})" if members else "none"
            raise MergeError(f"{name}: {self.name} takes {count} members, not {given}")

    def check_statistics(
        self, name: str, shape: tuple[int, ...], members: Sequence[str], statistics: Sequence[Any]
    ) -> None:
        """Every matrix needs its statistics for each member; biases, norms and other shapes have none."""
        missing = [m for m, s in zip(members, statistics, strict=True) if s is None]
        if self.statistics and len(shape) == 2 and missing:
            cure = "collect it, or give the tensor another method by a rule"
            raise MergeError(f"{name}: no {self.statistics} of member {missing[0]!r} in the statistics; {cure}")

    def check_statistics_shape(self, name: str, shape: Sequence[int], shapes: Iterable[Sequence[int]]) -> None:
        """Methods that see runs of a tensor need statistics shaped like it."""
        wrong = next((tuple(s) for s in shapes if tuple(s) != tuple(shape)), None)
        if self.unit != "tensor" and wrong is not None:
            raise MergeError(f"{name} {tuple(shape)}: the statistics of {self.name} have the shape {wrong}")

    def program(self, parameters: Mapping[str, Any]) -> Any:
        """Make the program (or, of a method without reductions, its result) for bound parameters."""
        return self.function(**parameters)

    def run(
        self,
        tensors: Sequence[Tensor],
        *,
        base: Tensor | None = None,
        weights: PerMember | None = None,
        statistics: Sequence[Tensor | None] | None = None,
        tokens: Sequence[int | None] | None = None,
        members: Sequence[str] | None = None,
        name: str = "",
        seed: int = 0,
        **parameters: Any,
    ) -> tuple[Any, Chunk]:
        """Run the program on whole tensors of one shape; return its result and the one chunk."""
        members = tuple(members or (str(i) for i in range(len(tensors))))
        if weights is not None:
            parameters["weights"] = weights
        bound, resolved = self.bind(parameters, members)
        if self.needs_base and base is None:
            raise MergeError(f"{self.name} needs a base")
        base = base if self.needs_base or self.takes_base else None
        self.check_members(name or "the tensor", members)
        shapes = {tuple(t.shape) for t in [*tensors, *([] if base is None else [base])]}
        if len(shapes) != 1:
            raise MergeError(f"{name or 'the members'}: shapes differ: {', '.join(map(str, sorted(shapes)))}")
        shape = shapes.pop()
        view, nothing = shape_for(self.unit, shape), (None,) * len(tensors)
        self.check_statistics(name or "the tensor", shape, members, statistics or nothing)
        if statistics and self.unit != "tensor":  # runs beside x, of the weight's own shape
            self.check_statistics_shape(name or "the tensor", shape, [s.shape for s in statistics if s is not None])
            statistics = [None if s is None else s.to(torch.float32).reshape(view) for s in statistics]
        chunk = Chunk(
            x=torch.stack([t.detach().to(torch.float32).reshape(view) for t in tensors]),
            base=None if base is None else base.detach().to(torch.float32).reshape(view),
            members=members,
            weights=torch.tensor(resolved, dtype=torch.float64),
            statistics=tuple(statistics or nothing),
            tokens=tuple(tokens or nothing),
            name=name,
            seed=seed,
        )
        program = self.program(bound)
        with single_thread():
            return complete(program, begin(program), lambda: [chunk], self.unit, alone=True), chunk


@dataclass(frozen=True)
class MergeMethod(Method):
    """A merge method; the program's result merges a chunk: (members, n) in, (n,) out."""

    def __call__(self, tensors: Sequence[Tensor], **options: Any) -> Tensor:
        """Merge whole tensors: one chunk through the program. See :meth:`Method.run` for the options.

        The result has the members' shape, and the dtype of the base where there is one, else of the first member.
        """
        base = options.get("base")
        with single_thread():
            merge, chunk = self.run(tensors, **options)
            first = tensors[0] if base is None else base
            return merge(chunk).reshape(first.shape).to(first.dtype)


@dataclass(frozen=True)
class Distance(Method):
    """A distance; the program's result is a pair: what to sum over chunks, and the value of such sums."""

    def __call__(self, tensors: Sequence[Tensor], **options: Any) -> float:
        """Distance between whole tensors. See :meth:`Method.run` for the options."""
        with single_thread():
            (terms, value), chunk = self.run(tensors, **options)
            return float(value(*total(terms, [chunk], self.unit)))


M = TypeVar("M", bound=Method)


class Registry(Generic[M]):
    """Named methods of one package, found by scanning its folder; import errors raise."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package, self.entries = kind, package, {}

    def add(self, method: M) -> M:
        if method.name in self.entries:
            raise ValueError(f"two {self.kind}s are called {method.name!r}")
        self.entries[method.name] = method
        return method

    def names(self) -> list[str]:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        return sorted(self.entries)

    def get(self, name: str) -> M:
        """A method by name. Its file has the same name, so that one method costs one import."""
        if name not in self.entries and name.isidentifier() and find_spec(f"{self.package}.{name}"):
            importlib.import_module(f"{self.package}.{name}")
        if name not in self.entries and name not in self.names():
            raise MergeError(f"unknown {self.kind} {name!r}{nearest(name, self.names())}")
        return self.entries[name]


MERGE_METHODS: Registry[MergeMethod] = Registry("merge method", f"{__package__}.methods")
DISTANCES: Registry[Distance] = Registry("distance", f"{__package__}.distances")


def merge_method(name: str, **traits: Any) -> Callable[[Callable[..., Any]], MergeMethod]:
    """Register a merge method; traits are the fields of :class:`Method` (``weighted`` unless told otherwise)."""
    return lambda function: MERGE_METHODS.add(MergeMethod(name, function, **{"weighted": True, **traits}))


def distance_metric(name: str, **traits: Any) -> Callable[[Callable[..., Any]], Distance]:
    """Register a distance."""
    return lambda function: DISTANCES.add(Distance(name, function, **traits))


def get_merge_method(name: str) -> MergeMethod:
    return MERGE_METHODS.get(name)


def list_merge_methods() -> list[str]:
    return MERGE_METHODS.names()


def get_distance(name: str) -> Distance:
    return DISTANCES.get(name)


def list_distances() -> list[str]:
    return DISTANCES.names()


def per_member(name: str, value: PerMember, members: Sequence[str]) -> tuple[float, ...]:
    """Resolve a scalar, a list in member order or a mapping by alias to one number a member."""
    if isinstance(value, Mapping):
        missing = [m for m in members if m not in value]
        unknown = [k for k in value if k not in members]
        if missing or unknown:
            wrong = f"lacks {missing[0]!r}" if missing else f"names {unknown[0]!r}{nearest(unknown[0], members)}"
            raise MergeError(f"{name}: the mapping {wrong}; the members are {', '.join(members)}")
        value = [value[m] for m in members]
    if isinstance(value, Iterable) and not isinstance(value, str):
        value = value.tolist() if isinstance(value, Tensor) else list(value)
        if len(value) != len(members):
            raise MergeError(f"{name}: {len(value)} values for {len(members)} members ({', '.join(members)})")
    else:
        value = [value] * len(members)
    return tuple(checked(name, v, float) for v in value)


def checked(name: str, value: Any, annotation: Any) -> Any:
    """Check one value against float, int, bool, str or Literal; numbers are converted."""
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise MergeError(f"{name} must be one of {', '.join(map(repr, get_args(annotation)))}, not {value!r}")
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is float and number and math.isfinite(value):
        return float(value)
    if annotation is int and number and value == int(value):
        return int(value)
    if annotation in (bool, str) and isinstance(value, annotation):
        return value
    words = {float: "a finite number", int: "a whole number", bool: "true or false", str: "a text"}
    raise MergeError(f"{name} must be {words[annotation]}, not {value!r}")
