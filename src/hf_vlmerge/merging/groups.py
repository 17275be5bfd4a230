"""Groups: which input tensors make each output tensor, by which method, with which parameters.

Two groupings, one result. By name, the members are several sources that hold the same key. By expert, they are the
experts inside one source: keys that differ only in one path component. Rules are applied here, so that whatever walks the
groups (merge, distances, plans) sees resolved settings only. Nothing is read but names, shapes and dtypes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from .errors import MergeError, closest, nearest
from .recipe import ExpertLayout, Recipe, Rule
from .registry import MergeMethod, get_merge_method
from .statistics import statistic_key, token_count
from .tensors.dtypes import is_mergeable, parse_dtype
from .tensors.sources import TensorSource
from .weights import ABSENT, layer_counts, of_member, position, settle

COPY = "copy"  # not a method: the first input is taken as it is
RUNNING_STATISTICS = ("running_mean", "running_var")  # of batch normalisation


class Ref(NamedTuple):
    """One tensor of one source; ``source`` is a role: an alias, "experts", "base", "statistics" or "statistics:alias"."""

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
    note: str = ""  # why it is copied, or what a reader should know


Sources = Mapping[str, TensorSource]  # by role


def group_by_name(sources: Sources, recipe: Recipe) -> Iterator[MergeGroup]:
    """One group for each name in any of the models. A name that a model lacks is an error unless a rule leaves that model
    out. Sources: one for each alias, and "base", "statistics", "statistics:alias" where the recipe gives them."""
    order = recipe.aliases
    names = dict.fromkeys(key for alias in order for key in sources[alias])
    settler = Settler(recipe, order, layer_counts(names))
    for name in names:
        found = {alias: Ref(alias, name) for alias in order if name in sources[alias]}
        yield settler.group(sources, name, found, missing=[a for a in order if a not in found])


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
    if not any(None not in family for family in families.values()):
        raise MergeError(
            f"{sources['experts'].label} has no experts: no key has a component {', '.join(layout.experts.values())}"
        )
    check_complete(families, layout)
    settler = Settler(recipe, order, layer_counts(families))
    for output, family in families.items():
        if None in family:
            yield copied(sources, output, family[None], recipe, "no experts")
        else:
            yield settler.group(sources, output, {a: family[a] for a in order if a in family}, missing=[])


def merged_name(key: str, layout: ExpertLayout) -> tuple[str | None, str]:
    """The expert a key belongs to (None: no expert) and its name in the output."""
    parts = key.split(".")
    found = [
        (i, alias) for i, part in enumerate(parts) for alias, component in layout.experts.items() if part == component
    ]
    if not found:
        return None, key
    if len(found) > 1:
        raise MergeError(f"{key}: more than one path component names an expert")
    (at, alias), merged = found[0], [layout.merged] if layout.merged else []
    return alias, ".".join([*parts[:at], *merged, *parts[at + 1 :]])


def check_complete(families: Mapping[str, Mapping[str | None, Ref]], layout: ExpertLayout) -> None:
    """All experts of one module have the same tensors."""
    modules: dict[str, dict[str, set[str]]] = {}  # module -> expert -> the rest of the names
    for output, family in families.items():
        for alias, ref in family.items():
            if alias is not None:
                before, _, after = f".{ref.key}.".partition(f".{layout.experts[alias]}.")
                modules.setdefault(before, {}).setdefault(alias, set()).add(after.strip("."))
    for experts in modules.values():
        everything = set().union(*experts.values())
        for alias, tensors in experts.items():
            for rest in sorted(everything - tensors):
                raise MergeError(f"the expert {alias!r} lacks the tensor {_full_name(families, rest, alias, layout)}")


def _full_name(families: Mapping[str, Mapping[str | None, Ref]], rest: str, alias: str, layout: ExpertLayout) -> str:
    for family in families.values():
        for other, ref in family.items():
            if other is not None and alias not in family and ref.key.endswith(f".{layout.experts[other]}.{rest}"):
                return ref.key.removesuffix(f"{layout.experts[other]}.{rest}") + f"{layout.experts[alias]}.{rest}"
    return rest


class Settler:
    """Settles what a recipe says for one tensor: rules in order (the first match wins for each setting), then the model's
    own parameters, then the recipe's, then the method's defaults."""

    def __init__(self, recipe: Recipe, order: tuple[str, ...], counts: Mapping[str, int]) -> None:
        self.recipe, self.order, self.counts = recipe, order, counts
        self.used_rules: set[int] = set()
        for rule in recipe.rules:
            for name in (*(rule.members or ()), *((rule.has,) if rule.has else ())):
                if name not in order:
                    raise MergeError(f"a rule names the member {name!r}{nearest(name, order)}")

    def group(self, sources: Sources, name: str, found: Mapping[str, Ref], missing: list[str]) -> MergeGroup:
        rules = [r for r in self.recipe.rules if self.applies(r, name, found)]
        keep = next((r.keep for r in rules if r.keep), None)
        if keep:
            return self.kept(sources, name, found, keep)
        chosen = next((r.members for r in rules if r.members), None)
        members = tuple(a for a in self.order if a in found and (chosen is None or a in chosen))
        if missing and (chosen is None or set(missing) & set(chosen)):
            source = sources[missing[0]]
            raise MergeError(f"{missing[0]!r} lacks the tensor {name}, which others have{closest(name, source)}")
        if not members:
            raise MergeError(f"{name}: a rule chooses {', '.join(chosen or ())}, of which the group has none")
        inputs = tuple(found[a] for a in members)
        base = Ref("base", name) if "base" in sources and name in sources["base"] else None
        self.check_shapes(sources, name, [*inputs, *([base] if base else [])])
        first = inputs[0]
        stored = sources[first.source].dtype(first.key)
        if not is_mergeable(stored):
            note = f"{stored} is copied, never averaged, from {'the base' if base else members[0]}"
            return copied(sources, name, base or first, self.recipe, note)
        method = next((r.method for r in rules if r.method), self.recipe.merge_method)
        if method is None:
            raise MergeError(f"{name}: no rule gives a method, and the recipe has no merge_method")
        return self.merged(sources, name, members, inputs, base, get_merge_method(method), rules)

    def merged(
        self,
        sources: Sources,
        name: str,
        members: tuple[str, ...],
        inputs: tuple[Ref, ...],
        base: Ref | None,
        method: MergeMethod,
        rules: list[Rule],
    ) -> MergeGroup:
        if method.needs_base and base is None:
            raise MergeError(f"{name}: {method.name} needs it in the base{closest(name, sources['base'])}")
        parameters, weights = self.parameters(method, name, members, rules)
        note = ""
        if name.rpartition(".")[2] in RUNNING_STATISTICS and not method.average:
            method, note = get_merge_method("linear"), "running statistics are averaged"
            parameters, _ = method.bind({}, members)
        refs = [self.statistic(sources, member, ref, method) for member, ref in zip(members, inputs, strict=True)]
        anchor = base or inputs[0]
        wanted = self.recipe.out_dtype or self.recipe.dtype
        return MergeGroup(
            output=name,
            shape=sources[inputs[0].source].shape(inputs[0].key),
            dtype=parse_dtype(wanted) if wanted else sources[anchor.source].dtype(anchor.key),
            inputs=inputs,
            members=members,
            base=base,
            statistics=tuple(refs),
            tokens=tuple(None if r is None else token_count(sources[r.source], r.key) for r in refs),
            method=method.name,
            parameters=parameters,
            weights=weights,
            note=note,
        )

    def applies(self, rule: Rule, name: str, found: Mapping[str, Ref]) -> bool:
        applies = any(fnmatchcase(name, glob) for glob in rule.match) and (rule.has is None or rule.has in found)
        if applies:
            self.used_rules.add(next(i for i, r in enumerate(self.recipe.rules, 1) if r is rule))
        return applies

    def kept(self, sources: Sources, name: str, found: Mapping[str, Ref], keep: str) -> MergeGroup:
        if keep == "base":
            if "base" not in sources:
                raise MergeError(f"{name}: a rule keeps the base, but the recipe has no base_model")
            return copied(sources, name, Ref("base", sources["base"].require(name)), self.recipe, "kept: base")
        alias = next(iter(found)) if keep == "first" else keep
        if alias not in self.order:
            raise MergeError(f"keep: {keep!r} is no member{nearest(keep, [*self.order, 'base', 'first'])}")
        if alias not in found:
            raise MergeError(f"{name}: a rule keeps {alias!r}, which does not have it")
        return copied(sources, name, found[alias], self.recipe, f"kept: {alias}")

    def check_shapes(self, sources: Sources, name: str, refs: list[Ref]) -> None:
        shapes = {ref: sources[ref.source].shape(ref.key) for ref in refs}
        for ref, shape in shapes.items():
            if shape != shapes[refs[0]]:
                a, b = describe(refs[0]), describe(ref)
                raise MergeError(f"{name}: shapes differ, {shapes[refs[0]]} in {a} and {shape} in {b}")

    def parameters(
        self, method: MergeMethod, name: str, members: tuple[str, ...], rules: list[Rule]
    ) -> tuple[dict[str, Any], tuple[float, ...]]:
        """Bind the method's parameters for one tensor."""
        t = position(name, self.counts)
        values: dict[str, Any] = {}
        for parameter in [*method.parameters, *(["weights"] if method.weighted else [])]:
            levels = [r.parameters[parameter] for r in rules if parameter in r.parameters][:1]
            top = self.recipe.parameters.get(parameter, ABSENT)
            if method.is_per_member(parameter):
                each = {
                    m: self.per_member(parameter, m, [*levels, self.own(m, parameter), top], name, t) for m in members
                }
                default = 1.0 if parameter == "weights" else method.parameters[parameter].default
                values[parameter] = {m: default if v is ABSENT else v for m, v in each.items()}
                continue
            given = next((v for v in (settle(level, name, t) for level in [*levels, top]) if v is not ABSENT), ABSENT)
            if given is not ABSENT:
                values[parameter] = given
        return method.bind(values, members)

    def per_member(self, parameter: str, member: str, levels: list[Any], name: str, t: float) -> Any:
        gradients = self.recipe.compat == "mergekit"
        for level, value in enumerate(levels):
            if value is ABSENT:
                continue
            own = level == len(levels) - 2  # the model's own parameters hold one value, not one a member
            value = value if own else of_member(value, member, self.order, parameter, gradients)
            value = settle(value, name, t)
            if value is not ABSENT:
                return value
        return ABSENT

    def own(self, member: str, parameter: str) -> Any:
        model = next((m for m in self.recipe.models if m.alias == member), None)
        return ABSENT if model is None else model.parameters.get(parameter, ABSENT)

    def statistic(self, sources: Sources, member: str, ref: Ref, method: MergeMethod) -> Ref | None:
        if method.statistics is None:
            return None
        role = f"statistics:{member}" if f"statistics:{member}" in sources else "statistics"
        key = statistic_key(sources[role], method.statistics, ref.key) if role in sources else None
        return None if key is None else Ref(role, key)


def copied(sources: Sources, output: str, ref: Ref, recipe: Recipe, note: str) -> MergeGroup:
    """A group that takes one tensor as it is; only floating tensors follow the recipe's dtype."""
    source = sources[ref.source]
    dtype, wanted = source.dtype(ref.key), recipe.out_dtype or recipe.dtype
    if wanted and is_mergeable(dtype):
        dtype = parse_dtype(wanted)
    return MergeGroup(output, source.shape(ref.key), dtype, (ref,), (ref.source,), note=note)


def describe(ref: Ref) -> str:
    return f"{ref.source} ({ref.key})" if ref.source == "experts" else repr(ref.source)
