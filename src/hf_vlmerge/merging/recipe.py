"""Recipes: a YAML file, or the same as a mapping, as a frozen dataclass that is checked when it is made.

A recipe names members in one of two ways: ``experts_of`` (the experts inside one checkpoint) or ``models`` (several
checkpoints). What mergekit's ``models:`` form says is translated by ``mergekit.py`` and then read the same way.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from .errors import MergeError, nearest
from .mergekit import translate
from .options import AdapterForm, Align, Vocabulary, check_options, renaming
from .reading import mapping, sequence, text
from .registry import ALIASES, get_merge_method
from .tensors.dtypes import parse_dtype

KEEPS = ("base", "first")  # words with a meaning of their own in `keep`
RESERVED = (*KEEPS, "experts", "statistics")  # roles of sources


@dataclass(frozen=True)
class Member:
    """One checkpoint among several: its alias, where it is, its own parameters and statistics, and under which other
    names its tensors are seen (patterns in order, see ``tensors.renamed``)."""

    alias: str
    model: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    statistics: str | None = None
    rename: Mapping[str, str | None] | None = None


@dataclass(frozen=True)
class Rule:
    """What applies to some tensors only. ``match`` globs over output names, ``has`` names a member of the group."""

    match: tuple[str, ...] = ("*",)
    has: str | None = None
    keep: str | None = None
    members: tuple[str, ...] | None = None
    method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertLayout:
    """How experts appear in names: an expert is a path component. ``experts`` maps alias to component, in member
    order; in a recipe it is a list (``[vision, language]``, or with other components ``[vision: v, language: l]``).

    ``merged`` is the component in the output (empty: it is left out), ``config`` what the written config.json changes.
    """

    experts: Mapping[str, str]
    merged: str = "shared"
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, layout: Any, where: str) -> "ExpertLayout":
        layout = mapping(layout, where, ("experts", "merged", "config"))
        experts: dict[str, str] = {}
        for entry in sequence(layout.get("experts"), f"{where}: experts"):
            named = entry if isinstance(entry, Mapping) else {text(entry, f"{where}: an expert"): entry}
            experts.update((str(alias), str(component)) for alias, component in named.items())
        if not experts:
            raise MergeError(
                f"{where}: 'experts' must list the experts, as [vision, language] or [vision: v, language: l]"
            )
        config = mapping(layout.get("config") or {}, f"{where}: config")
        return cls(experts, str(layout.get("merged", "shared") or ""), dict(config))

    def to_dict(self) -> dict[str, Any]:
        experts = [alias if alias == component else {alias: component} for alias, component in self.experts.items()]
        return {"experts": experts, "merged": self.merged, "config": dict(self.config)}


@dataclass(frozen=True)
class Recipe:
    """What is merged, and how. See the README of this room for every key."""

    merge_method: str | None = None
    models: tuple[Member, ...] = ()
    experts_of: str | None = None
    base_model: str | None = None
    statistics: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    experts: ExpertLayout | None = None
    base_rename: Mapping[str, str | None] | None = None  # in a recipe: base_model: {model: ..., rename: {...}}
    vocabulary: Vocabulary | None = None
    align: Align | None = None
    adapters: AdapterForm | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    files_from: str | None = None  # whose config, tokenizer, ... are carried along: "base" or a member's alias
    seed: int = 0
    compat: str | None = None
    layers: int | None = None  # the full depth that mergekit's `slices` claim; checked against the names
    notes: tuple[str, ...] = field(default=(), compare=False)  # what was ignored or reread, for the report

    def __post_init__(self) -> None:
        _check(self)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Aliases of the models, in order; of an expert merge the layout gives them."""
        return tuple(m.alias for m in self.models)

    @classmethod
    def load(cls, recipe: Any) -> "Recipe":
        """Read a path to a YAML file, YAML text, a mapping, or return a Recipe as it is."""
        if isinstance(recipe, cls):
            return recipe
        if not isinstance(recipe, str | Path):
            return cls.from_dict(recipe)
        is_text = isinstance(recipe, str) and ("\n" in recipe or ": " in recipe)
        if not is_text and not Path(recipe).expanduser().is_file():
            raise MergeError(f"there is no recipe file {str(recipe)!r}")
        try:
            written = recipe if is_text else Path(recipe).expanduser().read_text(encoding="utf-8")
            content = yaml.safe_load(written)
        except UnicodeDecodeError:
            raise MergeError(f"the recipe file {str(recipe)!r} is not a text in UTF-8") from None
        except yaml.YAMLError as error:
            raise MergeError(f"the recipe is not valid YAML: {' '.join(str(error).split())}") from None
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: Any) -> "Recipe":
        content, notes = translate(mapping(content, "the recipe"))
        known = [f.name for f in fields(cls) if f.name not in ("notes", "base_rename")]
        values = dict(mapping(content, "the recipe", known))
        if isinstance(values.get("base_model"), Mapping):
            base = mapping(values["base_model"], "base_model", ("model", "rename"))
            values |= {"base_model": base.get("model"), "base_rename": renaming(base.get("rename"), "base_model")}
        for key in ("experts_of", "base_model", "statistics", "merge_method", "dtype", "out_dtype", "files_from"):
            if values.get(key) is not None:
                values[key] = str(values[key]) or None
        values["models"] = _members(values.get("models") or ())
        values["rules"] = tuple(_rule(r, f"rule {i}") for i, r in enumerate(sequence(values.get("rules"), "rules"), 1))
        values["parameters"] = _parameters(values.get("parameters"), "parameters")
        if values.get("experts") is not None:
            values["experts"] = ExpertLayout.from_dict(values["experts"], "experts")
        values["vocabulary"] = Vocabulary.from_dict(values.get("vocabulary"))
        values["align"] = Align.from_dict(values.get("align"))
        values["adapters"] = AdapterForm.from_dict(values.get("adapters"))
        if values["vocabulary"] and values.get("files_from") is None:
            values["files_from"] = values["vocabulary"].reference  # its tokenizer numbers the rows
        return cls(**values, notes=tuple(notes))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, without what is empty; ``Recipe.load`` reads it back."""
        result: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "notes" or value in (None, (), {}) or (f.name == "seed" and value == 0):
                continue
            result[f.name] = _plain(value)
        if "base_rename" in result:
            result["base_model"] = {"model": self.base_model, "rename": result.pop("base_rename")}
        return result

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def map_sources(self, change: Any) -> "Recipe":
        """A copy with every source reference replaced by ``change(reference)``."""
        swap = lambda ref: None if ref is None else change(ref)  # noqa: E731
        models = tuple(replace(m, model=change(m.model), statistics=swap(m.statistics)) for m in self.models)
        top = {name: swap(getattr(self, name)) for name in ("experts_of", "base_model", "statistics")}
        return replace(self, models=models, **top)


def _check(recipe: Recipe) -> None:
    """Everything that can be said about a recipe without opening a source."""
    if bool(recipe.models) == bool(recipe.experts_of):
        raise MergeError(
            "a recipe has either 'experts_of' (experts inside one checkpoint) or 'models' (several checkpoints)"
        )
    if recipe.merge_method is None and not any(r.method for r in recipe.rules):
        raise MergeError("the recipe names no merge_method")
    for alias in recipe.aliases:
        if recipe.aliases.count(alias) > 1 or alias in RESERVED:
            reason = "is reserved" if alias in RESERVED else "is used twice; give one model another 'alias'"
            raise MergeError(f"the alias {alias!r} {reason}")
    if recipe.compat not in (None, "mergekit"):
        raise MergeError(f"compat can be 'mergekit', not {recipe.compat!r}")
    for dtype in filter(None, (recipe.dtype, recipe.out_dtype)):
        parse_dtype(dtype)
    used = {m for m in (recipe.merge_method, *(r.method for r in recipe.rules)) if m}
    methods = [get_merge_method(m) for m in sorted(used)]
    for method in methods:
        if method.needs_base and recipe.base_model is None and recipe.adapters is None:
            raise MergeError(f"{method.name} needs a base: give 'base_model'")
        has = recipe.statistics or any(m.statistics for m in recipe.models)
        if method.statistics and not has:
            raise MergeError(f"{method.name} needs statistics ({method.statistics}): give 'statistics'")
    for where, names in _parameter_uses(recipe):
        for name in names:
            _known_parameter(name, methods, where)
    for rule in recipe.rules:
        if recipe.models:
            _known_members(rule, recipe.aliases)
    check_options(recipe)


def _known_parameter(name: str, methods: list, where: str) -> None:
    """A parameter must belong to one of the recipe's methods."""
    own = ALIASES.get(name, name)
    valid = {p for m in methods for p in (*m.parameters, *(("weights",) if m.weighted else ()))}
    if own not in valid:
        who = " and ".join(m.name for m in methods)
        raise MergeError(
            f"{where}: {who} {'have' if len(methods) > 1 else 'has'} no parameter {name!r}{nearest(name, valid)}"
        )


def _parameter_uses(recipe: Recipe) -> Iterable[tuple[str, Mapping[str, Any]]]:
    yield "parameters", recipe.parameters
    yield from ((f"model {m.alias!r}", m.parameters) for m in recipe.models)
    yield from ((f"rule {i}", r.parameters) for i, r in enumerate(recipe.rules, 1))


def _known_members(rule: Rule, aliases: tuple[str, ...]) -> None:
    keep = (rule.keep,) if rule.keep and rule.keep not in KEEPS else ()
    for alias in (*(rule.members or ()), *keep, *((rule.has,) if rule.has else ())):
        if alias not in aliases:
            raise MergeError(f"a rule names the member {alias!r}{nearest(alias, aliases)}")


def _members(models: Any) -> tuple[Member, ...]:
    members = []
    for i, entry in enumerate(sequence(models, "models"), 1):
        if isinstance(entry, str | Path):
            entry = {"model": str(entry)}
        entry = mapping(entry, f"model {i}", ("model", "alias", "parameters", "statistics", "rename"))
        if not isinstance(entry.get("model"), str | Path) or entry["model"] == "":
            raise MergeError(f"model {i} needs 'model': a Hub id, folder or file")
        alias = str(entry.get("alias") or _last_part(str(entry["model"])))
        if "alias" not in entry and (alias in RESERVED or any(m.alias == alias for m in members)):
            alias = f"{alias}-{i}"
        own = _parameters(entry.get("parameters"), f"model {alias!r}")
        statistics = entry.get("statistics")
        rename = renaming(entry.get("rename"), f"model {alias!r}")
        members.append(Member(alias, str(entry["model"]), own, str(statistics) if statistics else None, rename))
    return tuple(members)


def _last_part(model: str) -> str:
    """The name of a model without its folders and revision; of ``base+adapter`` the adapter's."""
    last = model if Path(model).expanduser().exists() else model.rpartition("+")[2]
    return Path(last.strip().partition("@")[0]).name


def _rule(rule: Any, where: str) -> Rule:
    rule = dict(mapping(rule, where, [f.name for f in fields(Rule)]))
    match = rule.get("match", "*")
    rule["match"] = (match,) if isinstance(match, str) else tuple(map(str, sequence(match, f"{where}: match")))
    if rule.get("members") is not None:
        members = rule["members"]
        rule["members"] = (
            (members,) if isinstance(members, str) else tuple(map(str, sequence(members, f"{where}: members")))
        )
        if not rule["members"]:
            raise MergeError(f"{where}: members is empty")
    for key in ("has", "keep", "method"):
        if rule.get(key) is not None:
            text(rule[key], f"{where}: {key}")
    rule["parameters"] = _parameters(rule.get("parameters"), where)
    if rule.keys() <= {"match", "has", "parameters"} and not rule["parameters"]:
        raise MergeError(f"{where} says what it matches but not what to do (keep, members, method or parameters)")
    return Rule(**rule)


def _parameters(values: Any, where: str) -> dict[str, Any]:
    """Parameters under their own names (lambda, weight, t are aliases)."""
    result: dict[str, Any] = {}
    for name, value in mapping(values or {}, where).items():
        own = ALIASES.get(str(name), str(name))
        if own in result:
            raise MergeError(f"{where}: {own!r} is given twice, once as {name!r}")
        result[own] = value
    return result


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as mappings and lists that YAML can hold, without their empty parts."""
    if isinstance(value, ExpertLayout | Vocabulary | Align | AdapterForm):
        return value.to_dict()
    if isinstance(value, Member | Rule):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        return {k: _plain(v) for k, v in parts.items() if v not in (None, (), {}, ("*",))}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
