"""Measuring distances between members, over the same groups and chunks that a merge walks.

All distances and pairs are taken in one pass: a chunk is read once, and every distance of every pair gets its part of
it. A distance that first needs thresholds sees the tensor again; tensors up to HELD are kept for that in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import MergeError
from .groups import COPY, MergeGroup
from .planning import open_sources, plan
from .program import Chunk, Request, Sample, Unit, added, partial_sums, resume, single_thread
from .recipe import Member, Recipe
from .registry import Distance, get_distance
from .streaming import Job, Reader, settle_whole_model
from .tensors.sources import TensorSource
from .weights import layer_of
from .workers import Workers, available_threads

Pairs = Literal["each", "all"] | Sequence[tuple[str, str]]
Reference = Literal["none", "base"]
CHUNK_SIZE = 1 << 18  # many pairs look at a chunk: fewer, larger ones than a merge takes
HELD = 1 << 25  # elements of all members of one tensor that a thread keeps in memory between the passes over it


class DistanceRow(NamedTuple):
    """One cell of the table: a module of a layer ("" outside layers), a pair of members, and the number of entries."""

    layer: str
    module: str
    pair: str
    value: float
    parameters: int


@dataclass
class DistanceReport:
    """One distance per layer and module, per layer, per module over all layers, and in total. A pair is written
    ``vision-language``."""

    metric: str
    parameters: dict[str, Any]
    reference: str
    rows: list[DistanceRow] = field(default_factory=list)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    modules: dict[str, dict[str, float]] = field(default_factory=dict)  # of the layers only
    total: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "parameters": self.parameters,
            "reference": self.reference,
            "total": self.total,
            "layers": self.layers,
            "modules": self.modules,
            "rows": [row._asdict() for row in self.rows],
        }

    def table(self) -> str:
        """Layers down, modules across, one block a pair; then each pair's total."""
        lines = []
        for pair, overall in self.total.items():
            cells = {(r.layer, r.module): r.value for r in self.rows if r.pair == pair}
            modules = list(dict.fromkeys(module for _, module in cells))
            lines.append(f"{pair} ({self.metric}): {overall:.6g}")
            lines.append("  " + f"{'layer':<24}" + "".join(f"{m:>14}" for m in modules) + f"{'all':>14}")
            for layer in dict.fromkeys(layer for layer, _ in cells):
                values = [f"{cells[layer, m]:>14.6g}" if (layer, m) in cells else " " * 14 for m in modules]
                lines.append("  " + f"{layer or '-':<24}" + "".join(values) + f"{self.layers[layer][pair]:>14.6g}")
        return "\n".join(lines)


def distance(
    what: Any,
    *,
    metric: str = "ssd",
    base: str | None = None,
    reference: Reference = "none",
    pairs: Pairs = "each",
    sources: Mapping[str, Any] | None = None,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = True,
    **parameters: Any,
) -> DistanceReport:
    """Measure how far members are apart by one metric.

    what: a recipe (path to ``.yaml``, mapping, :class:`Recipe`), one source whose experts are compared, or a list (or a
    mapping by alias) of sources that are compared by name. metric: a registered distance, with its ``parameters``.
    reference "none" measures the weights themselves, "base" the task (modality) vectors: members minus ``base``.
    pairs "each" takes every pair of members, "all" all members of a group at once, a list the pairs it names.

    Values of a layer and in total are those of all its entries taken as one vector, not means over tensors. Tensors
    that are not merged (no experts, kept by a rule, integers) do not count.
    """
    recipe, given = as_recipe(what, base)
    with open_sources(recipe, {**given, **(sources or {})}) as opened, single_thread():
        groups = plan(recipe, opened)
        reader = Reader(opened, chunk_size, seed=recipe.seed)
        (report,) = measure(groups, reader, [Asked(metric, parameters, reference)], pairs=pairs, progress=progress)
    return report


class Asked(NamedTuple):
    """One distance that is wanted: its name and parameters, and whether of weights ("none") or task vectors."""

    metric: str
    parameters: Mapping[str, Any]
    reference: Reference = "none"


def measure(
    groups: Iterable[MergeGroup],
    reader: Reader,
    asked: Sequence[Asked],
    *,
    pairs: Pairs = "each",
    progress: bool = True,
) -> list[DistanceReport]:
    """Measure groups by several distances in one pass over the inputs; one report for each that is asked."""
    groups, methods = list(groups), [get_distance(each.metric) for each in asked]
    check_references(groups, asked)
    work = []
    for group in groups:
        chosen = chosen_pairs(group, pairs)
        of_deltas = any(each.reference == "base" for each in asked)
        if chosen and of_deltas and group.base is None:
            raise MergeError(f"the base has no tensor {group.output}; of task vectors, every tensor needs it")
        whole = replace(group, base=group.base if of_deltas else None, statistics=(), tokens=(), weights=())
        numbered = list(enumerate(zip(asked, methods, strict=True)))
        work.append([Pair.of(whole, members, n, each, m) for members in chosen for n, (each, m) in numbered])
    jobs = [pair for pairs_of_group in work for pair in pairs_of_group]
    if not jobs:
        raise MergeError("nothing to compare: no tensor has the members that are to be compared")
    settle_whole_model(
        jobs, lambda p: map(p.part, reader.chunks(p.whole, p.method.unit)), lambda p: (p.number, p.members)
    )
    sums: list[list[Sums]] = [[] for _ in asked]
    with Workers(available_threads()) as workers, tqdm(total=len(jobs), desc="distances", disable=not progress) as bar:
        for found in workers.map(lambda pairs: list(measured(pairs, reader)), filter(None, work)):
            for pair, totals in found:
                sums[pair.number].append(Sums(pair.group, totals, pair.step.result[1]))
                bar.update()
    return [summarise(m, each, found) for m, each, found in zip(methods, asked, sums, strict=True)]


def check_references(groups: Sequence[MergeGroup], asked: Sequence[Asked]) -> None:
    for each in asked:
        if each.reference not in ("none", "base"):
            raise MergeError(f"reference is 'none' or 'base', not {each.reference!r}")
        if each.reference == "base" and not any(group.base for group in groups):
            raise MergeError("reference 'base' needs a base: give 'base' or a recipe with base_model")


@dataclass
class Pair(Job):
    """One distance (the ``number``-th that is asked) between chosen members of one group. ``whole``: the group with all
    its members, as it is read."""

    whole: MergeGroup
    number: int
    reference: Reference

    @classmethod
    def of(cls, whole: MergeGroup, members: tuple[str, ...], number: int, asked: Asked, method: Distance) -> "Pair":
        bound, _ = method.bind(asked.parameters, members)
        inputs = tuple(whole.inputs[whole.members.index(m)] for m in members)
        own = replace(whole, members=members, inputs=inputs, parameters=bound, base=None)
        return cls(own, method, whole, number, asked.reference)

    @property
    def members(self) -> tuple[str, ...]:
        return self.group.members

    def part(self, chunk: Chunk) -> Chunk:
        """These members' part of a chunk of all members; of two members' weights it is a view."""
        at = [self.whole.members.index(m) for m in self.members]
        x = chunk.x[at[0] : at[1] + 1 : at[1] - at[0]] if len(at) == 2 and at[0] < at[1] else chunk.x[at]
        return replace(chunk, x=x - chunk.base if self.reference == "base" else x, base=None, members=self.members)


def measured(pairs: list[Pair], reader: Reader) -> Iterator[tuple[Pair, tuple[Tensor, ...]]]:
    """The sums of every distance of one group. Whatever the pairs ask for next is answered for all of them at once."""
    held: dict[Unit, list[Chunk]] = {}
    if prod(pairs[0].whole.shape) * len(pairs[0].whole.members) <= HELD:
        units = {p.method.unit for p in pairs}
        held = {unit: list(map(lasting, reader.chunks(pairs[0].whole, unit))) for unit in units}
    while pairs:
        sums: dict[int, tuple[Tensor, ...]] = {}
        for unit in sorted({p.method.unit for p in pairs}):
            for chunk in held[unit] if held else reader.chunks(pairs[0].whole, unit):
                for i, pair in enumerate(pairs):
                    if pair.method.unit == unit:
                        for part in partial_sums(wanted(pair), unit, pair.part(chunk)):
                            sums[i] = added(wanted(pair), sums.get(i), part)
        waiting = []
        for i, pair in enumerate(pairs):
            if pair.step.request is None:
                yield pair, sums[i]
            else:
                pair.step = resume(pair.program, sums[i])
                waiting.append(pair)
        pairs = waiting


def lasting(chunk: Chunk) -> Chunk:
    """A chunk in memory of its own."""
    return replace(chunk, x=chunk.x.clone(), base=None if chunk.base is None else chunk.base.clone())


def wanted(pair: Pair) -> Request:
    """What a distance wants summed next: what its program asks for (all chunks are the sample), at last its terms."""
    request = pair.step.result[0] if pair.step.request is None else pair.step.request
    return request.reduce if isinstance(request, Sample) else request


def as_recipe(what: Any, base: str | None) -> tuple[Recipe, dict[str, Any]]:
    """A recipe for comparing (of sources: one that would merge them linearly), and the sources given in memory."""
    is_mapping = isinstance(what, Mapping) and not isinstance(what, TensorSource)
    is_recipe = isinstance(what, Recipe) or (is_mapping and not {"models", "experts_of", "slices"}.isdisjoint(what))
    if is_recipe or (isinstance(what, str | Path) and str(what).endswith((".yaml", ".yml"))):
        recipe = Recipe.load(what)
        return (replace(recipe, base_model=base) if base else recipe), {}
    if isinstance(what, str | Path):
        return Recipe(merge_method="linear", experts_of=str(what), base_model=base), {}
    if isinstance(what, TensorSource):
        return Recipe(merge_method="linear", experts_of="memory", base_model=base), {"memory": what}
    named = dict(what) if is_mapping else {Path(str(ref).partition("@")[0]).name: ref for ref in what}
    if len(named) < max(2, len(what)):
        raise MergeError("a distance needs at least two sources with different names; give them as {alias: source}")
    given = {alias: ref for alias, ref in named.items() if not isinstance(ref, str | Path)}
    models = tuple(Member(alias, alias if alias in given else str(ref)) for alias, ref in named.items())
    return Recipe(merge_method="linear", models=models, base_model=base), given


def chosen_pairs(group: MergeGroup, pairs: Pairs) -> list[tuple[str, ...]]:
    """The sets of members that are compared in one group; none in a group that is copied or has no elements."""
    if group.method == COPY or 0 in group.shape:
        return []
    if pairs == "all":
        return [group.members] if len(group.members) > 1 else []
    each = list(combinations(group.members, 2))
    if pairs == "each":
        return each
    if isinstance(pairs, str):
        raise MergeError(f"pairs is 'each', 'all' or a list of pairs, not {pairs!r}")
    return [tuple(pair) for pair in pairs if set(pair) <= set(group.members)]


def place(name: str) -> tuple[str, str]:
    """(layer, module) of a tensor: what follows the layer's index; outside layers the name without its last part."""
    layer = layer_of(name)
    if layer is None:
        return "", name.rpartition(".")[0] or name
    rest = name.removeprefix(f"{layer.prefix}.{layer.index}.".lstrip("."))
    return f"{layer.prefix}.{layer.index}".lstrip("."), rest.partition(".")[0]


class Sums(NamedTuple):
    """What was summed for one distance of one group, and what turns such sums into a value."""

    group: MergeGroup
    totals: tuple[Tensor, ...]
    value: Callable[..., Tensor]


def summarise(method: Distance, asked: Asked, found: list[Sums]) -> DistanceReport:
    """Add sums up over modules, layers and everything, and turn each into its value."""
    shown = {name: asked.parameters.get(name, p.default) for name, p in method.parameters.items()}
    report = DistanceReport(method.name, shown, asked.reference)
    added: dict[tuple[str, ...], Sums] = {}
    counts: dict[tuple[str, ...], int] = {}
    for each in found:
        pair, (layer, module) = "-".join(each.group.members), place(each.group.output)
        for key in (("row", layer, module, pair), ("layer", layer, pair), ("module", module, pair), ("total", pair)):
            if key[0] == "module" and not layer:
                continue
            before = added.get(key)
            totals = each.totals if before is None else tuple(map(torch.add, before.totals, each.totals))
            added[key] = each._replace(totals=totals)
            counts[key] = counts.get(key, 0) + prod(each.group.shape)
    for (kind, *where, pair), sums in added.items():
        number = float(sums.value(*sums.totals))
        if kind == "row":
            report.rows.append(DistanceRow(*where, pair, number, counts[kind, *where, pair]))
        elif kind == "total":
            report.total[pair] = number
        else:
            (report.layers if kind == "layer" else report.modules).setdefault(where[0], {})[pair] = number
    return report
