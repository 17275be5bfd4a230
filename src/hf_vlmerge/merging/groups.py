"""Groups: which input tensors make each output tensor, by which method, with which parameters.

Two groupings, one result. By name, the members are several sources that hold the same key. By expert, they are the
experts inside one source: keys that differ only in one path component. Rules are applied here, so that whatever walks
the groups (merge, distances, plans) sees resolved settings only. Nothing is read but names, shapes and dtypes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

import torch

from .errors import MergeError, closest, nearest
from .recipe import ExpertLayout, Recipe, Rule
from .registry import MergeMethod, get_merge_method
from .statistics import statistic_key, token_count
from .tensors.dtypes import dtype_name, is_mergeable, parse_dtype
from .tensors.sources import TensorSource
from .weights import ABSENT, layer_counts, of_member, position, settle

COPY = "copy"  # not a method: the first input is taken as it is
RUNNING_STATISTICS = ("running_mean", "running_var")  # of batch normalisation


class Ref(NamedTuple):
    """One tensor of one source. ``source`` is a role: an alias, "experts", "base", "statistics", "statistics:alias"."""

    source: str
    key: str


@dataclass(frozen=True)
class MergeGroup:
    """One output tensor and everything that makes it."""

    output: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: tuple[Ref, ...]
    members: tuple[str, ...]
    base: Ref | None = None
    statistics: tuple[Ref | None, ...] = ()
    tokens: tuple[int | None, ...] = ()
    method: str = COPY
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    rules: tuple[int, ...] = ()  # numbers of the recipe's rules that apply, from 1
    note: str = ""  # why it is copied, or what a reader should know

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The members' tensors, then the base's."""
        return self.inputs if self.base is None else (*self.inputs, self.base)


Sources = Mapping[str, TensorSource]  # by role


def group_by_name(sources: Sources, recipe: Recipe) -> Iterator[MergeGroup]:
    """One group for each name in any of the models. A name that a model lacks is an error unless a rule leaves that
    model out. Sources: one for each alias, and "base", "statistics", "statistics:alias" where the recipe gives them."""
    order = recipe.aliases
    names = dict.fromkeys(key for alias in order for key in sources[alias])
    settler = Settler(sources, recipe, order, names)
    for name in names:
        yield settler.group(name, {alias: Ref(alias, name) for alias in order if name in sources[alias]})


def group_by_expert(sources: Sources, layout: ExpertLayout, recipe: Recipe) -> Iterator[MergeGroup]:
    """One group for each name of the source "experts" after the expert's component is replaced by the merged one.
    A tensor without expert copies is copied unchanged."""
    order = tuple(layout.experts)
    families: dict[str, dict[str, Ref]] = {}
    for key in sources["experts"]:
        alias, output = merged_name(key, layout)
        family = families.setdefault(output, {})
        if alias in family or None in family or (family and alias is None):
            raise MergeError(f"{key}: another tensor merges into the same name {output}")
        family[alias] = Ref("experts", key)
    if all(None in family for family in families.values()):
        label, components = sources["experts"].label, ", ".join(layout.experts.values())
        raise MergeError(f"{label} has no experts: no key has a component {components}")
    check_complete(families, layout)
    settler = Settler(sources, recipe, order, families)
    for output, family in families.items():
        if None in family:
            yield settler.single(output, family[None])
        else:
            yield settler.group(output, {a: family[a] for a in order if a in family})


def merged_name(key: str, layout: ExpertLayout) -> tuple[str | None, str]:
    """The expert a key belongs to (None: no expert) and its name in the output."""
    parts = key.split(".")
    aliases = {component: alias for alias, component in layout.experts.items()}
    found = [i for i, part in enumerate(parts) if part in aliases]
    if not found:
        return None, key
    if len(found) > 1:
        raise MergeError(f"{key}: more than one path component names an expert")
    at, merged = found[0], [layout.merged] if layout.merged else []
    return aliases[parts[at]], ".".join([*parts[:at], *merged, *parts[at + 1 :]])


def check_complete(families: Mapping[str, Mapping[str | None, Ref]], layout: ExpertLayout) -> None:
    """All experts of one module have the same tensors."""
    modules: dict[str, dict[str, dict[str, str]]] = {}  # module -> expert -> rest of the name -> key
    for family in families.values():
        for alias, ref in family.items():
            if alias is not None:
                before, _, after = f".{ref.key}.".partition(f".{layout.experts[alias]}.")
                modules.setdefault(before, {}).setdefault(alias, {})[after] = ref.key
    for experts in modules.values():
        for alias, other in permutations(experts, 2):
            for rest in experts[other].keys() - experts[alias].keys():
                raise MergeError(f"the expert {alias!r} lacks the counterpart of {experts[other][rest]}")


class Settler:
    """Settles what a recipe says for one tensor: rules in order (the first match wins for each setting), then the
    model's own parameters, then the recipe's, then the method's defaults."""

    def __init__(self, sources: Sources, recipe: Recipe, order: tuple[str, ...], names: Iterable[str]) -> None:
        self.sources, self.recipe, self.order, self.counts = sources, recipe, order, layer_counts(names)
        self.wanted = parse_dtype(recipe.out_dtype or recipe.dtype) if recipe.out_dtype or recipe.dtype else None
        for rule in recipe.rules:
            for name in (*(rule.members or ()), *((rule.has,) if rule.has else ())):
                if name not in order:
                    raise MergeError(f"a rule names the member {name!r}{nearest(name, order)}")

    def group(self, name: str, found: Mapping[str, Ref]) -> MergeGroup:
        """The group of one output, of the members that have it."""
        numbered = [(i, r) for i, r in enumerate(self.recipe.rules, 1) if applies(r, name, found)]
        group = self.settled(name, found, [rule for _, rule in numbered])
        return replace(group, rules=tuple(i for i, _ in numbered))

    def settled(self, name: str, found: Mapping[str, Ref], rules: list[Rule]) -> MergeGroup:
        keep = next((r.keep for r in rules if r.keep), None)
        if keep:
            return self.kept(name, found, keep)
        inputs = self.chosen(name, found, next((r.members for r in rules if r.members), None))
        base = Ref("base", name) if name in self.sources.get("base", ()) else None
        first = next(iter(inputs.values()))
        for ref in (*inputs.values(), *((base,) if base else ())):
            self.check_shape(name, first, ref)
            self.check_kind(name, first, ref)
        stored = self.sources[first.source].dtype(first.key)
        if not is_mergeable(stored):
            if stored.is_floating_point or stored.is_complex:
                raise MergeError(f"{name}: {dtype_name(stored)} cannot be averaged; say by a rule whose to keep")
            return self.copied(name, base or first, f"integers from {'the base' if base else first.source}")
        method = next((r.method for r in rules if r.method), self.recipe.merge_method)
        if method is None:
            raise MergeError(f"{name}: no rule gives a method, and the recipe has no merge_method")
        return self.merged(name, inputs, base, get_merge_method(method), rules)

    def chosen(self, name: str, found: Mapping[str, Ref], members: tuple[str, ...] | None) -> dict[str, Ref]:
        """The group's inputs in member order, after a rule's choice of members."""
        absent = [a for a in members or self.order if a not in found]
        if absent and not self.recipe.experts_of:  # experts may be absent: not every layer has every one
            source = self.sources[absent[0]]
            raise MergeError(f"{absent[0]!r} lacks the tensor {name}, which others have{closest(name, source)}")
        inputs = {a: found[a] for a in self.order if a in found and (members is None or a in members)}
        if not inputs:
            raise MergeError(f"{name}: a rule chooses {', '.join(members or ())}, of which the group has none")
        if self.recipe.experts_of and len(inputs) == 1 and members is None:
            lone = next(iter(inputs))
            raise MergeError(f"{name}: only the expert {lone!r} has it; if that is meant, a rule says members: {lone}")
        return inputs

    def merged(
        self, name: str, inputs: Mapping[str, Ref], base: Ref | None, method: MergeMethod, rules: list[Rule]
    ) -> MergeGroup:
        members = tuple(inputs)
        first = base or inputs[members[0]]
        if method.needs_base and base is None:
            raise MergeError(f"{name}: {method.name} needs it in the base{closest(name, self.sources['base'])}")
        parameters, weights = self.parameters(method, name, members, rules)
        note = ""
        if name.rpartition(".")[2] in RUNNING_STATISTICS and not method.average:
            method, note = get_merge_method("linear"), "running statistics are averaged"
            parameters, _ = method.bind({}, members)
        shape = self.sources[first.source].shape(first.key)
        statistics = tuple(self.statistic(m, inputs[m], method) for m in members)
        if len(members) > 1 or method.members[0] > 1:
            method.check_members(name, members)
        if len(members) > 1:
            method.check_statistics(name, shape, members, statistics)
            method.check_statistics_shape(name, shape, [self.sources[r.source].shape(r.key) for r in statistics if r])
        return MergeGroup(
            output=name,
            shape=shape,
            dtype=self.wanted or self.sources[first.source].dtype(first.key),
            inputs=tuple(inputs.values()),
            members=members,
            base=base,
            statistics=statistics,
            tokens=tuple(None if r is None else token_count(self.sources[r.source], r.key) for r in statistics),
            method=method.name,
            parameters=parameters,
            weights=weights,
            note=note,
        )

    def kept(self, name: str, found: Mapping[str, Ref], keep: str) -> MergeGroup:
        if keep == "base" and "base" not in self.sources:
            raise MergeError(f"{name}: a rule keeps the base, but the recipe has no base_model")
        if keep not in ("base", "first", *self.order):
            raise MergeError(f"keep: {keep!r} is no member{nearest(keep, [*self.order, 'base', 'first'])}")
        first = next(iter(found.values()))
        ref = {"base": Ref("base", name), "first": first, **found}.get(keep)
        if ref is None or ref.key not in self.sources[ref.source]:
            raise MergeError(f"{name}: a rule keeps {keep!r}, which does not have it")
        self.check_shape(name, first, ref)
        return self.copied(name, ref, f"kept: {keep}")

    def single(self, name: str, ref: Ref) -> MergeGroup:
        """A tensor without expert copies: copied unchanged, unless a rule keeps the base's."""
        rules = [(i, r) for i, r in enumerate(self.recipe.rules, 1) if r.keep == "base" and applies(r, name, ())]
        if rules:
            return replace(self.kept(name, {"experts": ref}, "base"), rules=(rules[0][0],))
        return self.copied(name, ref, "no experts")

    def copied(self, name: str, ref: Ref, note: str) -> MergeGroup:
        """A group that takes one tensor as it is; only floating tensors follow the recipe's dtype."""
        source = self.sources[ref.source]
        dtype = source.dtype(ref.key)
        if self.wanted and is_mergeable(dtype):
            dtype = self.wanted
        return MergeGroup(name, source.shape(ref.key), dtype, (ref,), (ref.source,), note=note)

    def check_shape(self, name: str, first: Ref, ref: Ref) -> None:
        a, b = (self.sources[r.source].shape(r.key) for r in (first, ref))
        if a != b:
            hint = "; if these are rows of tokens, say so by 'vocabulary'" if len(a) == 2 and a[1:] == b[1:] else ""
            raise MergeError(f"{name}: shapes differ, {a} in {describe(first)} and {b} in {describe(ref)}{hint}")

    def check_kind(self, name: str, first: Ref, ref: Ref) -> None:
        """Codes of a quantised model and integers are no numbers that floats can be averaged with."""
        a, b = (self.sources[r.source].dtype(r.key) for r in (first, ref))
        if is_mergeable(a) != is_mergeable(b):
            kinds = f"{dtype_name(a)} in {describe(first)} and {dtype_name(b)} in {describe(ref)}"
            raise MergeError(f"{name}: {kinds} cannot be averaged; say by a rule whose to keep")

    def parameters(
        self, method: MergeMethod, name: str, members: tuple[str, ...], rules: list[Rule]
    ) -> tuple[dict[str, Any], tuple[float, ...]]:
        """The method's parameters and weights for one tensor."""
        t = position(name, self.counts)
        values: dict[str, Any] = {}
        for parameter in [*method.parameters, *(["weights"] if method.weighted else [])]:
            levels = [*(r.parameters[parameter] for r in rules if parameter in r.parameters)][:1]
            default = method.default(parameter, self.recipe.compat)
            if method.is_per_member(parameter):
                values[parameter] = {m: self.per_member(parameter, m, levels, default, name, t) for m in members}
                continue
            levels.append(self.recipe.parameters.get(parameter, ABSENT))
            value = next((v for v in (settle(level, name, t) for level in levels) if v is not ABSENT), ABSENT)
            values[parameter] = default if value is ABSENT else value
        return method.bind(values, members)

    def per_member(self, parameter: str, member: str, levels: list[Any], default: Any, name: str, t: float) -> Any:
        """One member's value: of the rule, else of the model itself, else of the recipe, else the default."""
        split = partial(
            of_member, alias=member, order=self.order, parameter=parameter, gradients=bool(self.recipe.compat)
        )
        own = next((m.parameters for m in self.recipe.models if m.alias == member), {})
        top = self.recipe.parameters
        candidates = [split(level) for level in levels]
        candidates += [own[parameter]] if parameter in own else []
        candidates += [split(top[parameter])] if parameter in top else []
        settled = (settle(value, name, t) for value in candidates)
        return next((value for value in settled if value is not ABSENT), default)

    def statistic(self, member: str, ref: Ref, method: MergeMethod) -> Ref | None:
        if method.statistics is None:
            return None
        role = f"statistics:{member}" if f"statistics:{member}" in self.sources else "statistics"
        source = self.sources.get(role)
        key = None if source is None else statistic_key(source, method.statistics, ref.key)
        return None if key is None else Ref(role, key)


def applies(rule: Rule, name: str, found: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in rule.match) and (rule.has is None or rule.has in found)


def describe(ref: Ref) -> str:
    return ref.key if ref.source == "experts" else repr(ref.source)
