"""Measuring distances between members, over the same groups and chunks that a merge walks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import MergeError
from .groups import COPY, MergeGroup
from .planning import open_sources, plan
from .program import Chunk, complete, single_thread, total
from .recipe import Member, Recipe
from .registry import get_distance
from .streaming import CHUNK_SIZE, Job, Reader, settle_whole_model
from .tensors.sources import TensorSource
from .weights import layer_of

Pairs = Literal["each", "all"] | Sequence[tuple[str, str]]


class DistanceRow(NamedTuple):
    """One cell of the table: a module of a layer ("" outside layers), a pair of members, and the number of entries."""

    layer: str
    module: str
    pair: str
    value: float
    parameters: int


@dataclass
class DistanceReport:
    """Distances per layer and module, per layer, and in total. A pair is written ``vision-language``."""

    metric: str
    parameters: dict[str, Any]
    reference: str
    rows: list[DistanceRow] = field(default_factory=list)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "parameters": self.parameters,
            "reference": self.reference,
            "total": self.total,
            "layers": self.layers,
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
    reference: Literal["none", "base"] = "none",
    pairs: Pairs = "each",
    sources: Mapping[str, Any] | None = None,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = True,
    **parameters: Any,
) -> DistanceReport:
    """Measure how far members are apart.

    what: a recipe (path to ``.yaml``, mapping, :class:`Recipe`), one source whose experts are compared, or a list (or a
    mapping by alias) of sources that are compared by name. metric: l2, cosine, ssd or tssd, with its ``parameters``.
    reference "none" measures the weights themselves, "base" the task (modality) vectors: members minus ``base``.
    pairs "each" takes every pair of members, "all" all members of a group at once, a list the pairs it names.

    Values of a layer and in total are those of all its entries taken as one vector, not means over tensors. Tensors
    that are not merged (no experts, kept by a rule, integers) do not count.
    """
    method = get_distance(metric)
    recipe, given = as_recipe(what, base)
    if reference not in ("none", "base"):
        raise MergeError(f"reference is 'none' or 'base', not {reference!r}")
    if reference == "base" and recipe.base_model is None:
        raise MergeError("reference 'base' needs a base: give 'base' or a recipe with base_model")
    with open_sources(recipe, {**given, **(sources or {})}) as opened, single_thread():
        reader = Reader(opened, chunk_size, seed=recipe.seed)
        jobs = []
        for group in plan(recipe, opened):
            for members in chosen_pairs(group, pairs):
                if reference == "base" and group.base is None:
                    raise MergeError(f"the base has no tensor {group.output}")
                group = group if reference == "base" else replace(group, base=None)
                jobs.append(Job(measured(group, members, method.bind(parameters, members)[0]), method))
        if not jobs:
            raise MergeError("nothing to compare: no tensor has the members that are to be compared")
        chunks = lambda job: measured_chunks(job, reader, reference)  # noqa: E731
        settle_whole_model(jobs, chunks, lambda job: job.group.members)
        sums = []
        for job in tqdm(jobs, desc=metric, disable=not progress):
            terms, value = complete(job.program, job.step, lambda job=job: chunks(job), method.unit)
            sums.append((job.group, total(terms, chunks(job), method.unit), value))
    shown = {name: parameters.get(name, p.default) for name, p in method.parameters.items()}
    return summarise(DistanceReport(metric, shown, reference), sums)


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


def measured(group: MergeGroup, members: tuple[str, ...], parameters: Mapping[str, Any]) -> MergeGroup:
    """The group as a distance sees it: the chosen members alone, and the distance's parameters."""
    inputs = dict(zip(group.members, group.inputs, strict=True))
    chosen = tuple(inputs[m] for m in members)
    return replace(group, members=members, inputs=chosen, parameters=parameters, statistics=(), tokens=(), weights=())


def measured_chunks(job: Job, reader: Reader, reference: str) -> Iterator[Chunk]:
    for chunk in reader.chunks(job.group, job.method.unit):
        yield replace(chunk, x=chunk.deltas()) if reference == "base" else chunk


def place(name: str) -> tuple[str, str]:
    """(layer, module) of a tensor: what follows the layer's index; outside layers the name without its last part."""
    layer = layer_of(name)
    if layer is None:
        return "", name.rpartition(".")[0] or name
    rest = name.removeprefix(f"{layer.prefix}.{layer.index}.".lstrip("."))
    return f"{layer.prefix}.{layer.index}".lstrip("."), rest.partition(".")[0]


def summarise(report: DistanceReport, sums: list[tuple[MergeGroup, tuple[Tensor, ...], Any]]) -> DistanceReport:
    """Add sums up over modules, layers and everything, and turn each into its value."""
    added: dict[tuple, tuple[tuple[Tensor, ...], Any, int]] = {}
    for group, parts, value in sums:
        pair, (layer, module) = "-".join(group.members), place(group.output)
        for key in (("row", layer, module, pair), ("layer", layer, pair), ("total", pair)):
            before, _, count = added.get(key, (None, value, 0))
            now = parts if before is None else tuple(a + b for a, b in zip(before, parts, strict=True))
            added[key] = (now, value, count + torch.Size(group.shape).numel())
    for key, (parts, value, count) in added.items():
        number = float(value(*parts))
        if key[0] == "row":
            report.rows.append(DistanceRow(*key[1:], number, count))
        elif key[0] == "layer":
            report.layers.setdefault(key[1], {})[key[2]] = number
        else:
            report.total[key[1]] = number
    return report
