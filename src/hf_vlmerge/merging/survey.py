"""The mergeability report: every distance between members, layer by layer, and what it says about merging them.

The verdict on a layer is about a plain average of two members, and comes from the cosine dissimilarity of their
weights. Its bounds were set on six merges of small models of this project (experts of one checkpoint, retrieval recall
before fine-tuning): below 0.01 one merge kept 95 % of its members' recall, from 0.01 to 0.03 two kept 57 and 90 %,
above 0.03 three kept 16, 31 and 69 %. They are a rule of thumb.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import MergeError
from .groups import COPY, MergeGroup, Ref, Sources
from .measurement import CHUNK_SIZE, Asked, DistanceReport, Pairs, Reference, as_recipe, measure, place
from .planning import open_sources, plan
from .program import single_thread
from .registry import list_distances
from .statistics import statistic_key, token_count
from .streaming import Reader

VERDICTS = ("well", "with care", "badly")
BOUNDS = (0.01, 0.03)  # of the cosine dissimilarity of weights: up to "well", above "badly"
CLOSENESS = "cosine (weights)"  # measured beside task vectors
# The least full scale of colours. Of task vectors: what two unrelated ones have (of magnitude_gap its limit).
SCALES = {
    "none": {"cosine": BOUNDS[1], "magnitude_gap": 0.1},
    "base": {
        CLOSENESS: BOUNDS[1], "cosine": 1.0, "magnitude_gap": 1.0, "sign_conflict": 0.5, "ssd": 0.28, "tssd": 0.02,
    },
}  # fmt: skip
OUTSIDE, ALL = "outside layers", "all layers"


class Conditioning(NamedTuple):
    """How well a Gram matrix can be inverted. ``member`` "sum": of all members' matrices, which RegMean inverts.

    ``condition`` is the largest eigenvalue over the smallest, None where the matrix is singular in float64;
    ``rank`` the effective one, (sum of eigenvalues)^2 / sum of their squares; ``tokens`` the rows behind the matrix.
    """

    layer: str
    module: str
    weight: str
    member: str
    size: int
    condition: float | None
    rank: float
    tokens: int | None

    @property
    def severity(self) -> float:
        return float("inf") if self.condition is None else self.condition

    def describe(self) -> str:
        condition = "singular" if self.condition is None else f"condition {self.condition:.3g}"
        return f"{self.weight}, {condition}, effective rank {self.rank:.1f} of {self.size}"


class Line(NamedTuple):
    """One line of a pair's sheet: a layer, a module of it, a module kind over all layers, or the total.

    ``values``: metric -> distance. Only layers have a ``verdict``.
    """

    layer: str
    module: str
    values: dict[str, float]
    verdict: str = ""

    @property
    def label(self) -> str:
        return " / ".join(filter(None, (self.layer or OUTSIDE, self.module)))


@dataclass
class MergeabilityReport:
    """All distances of some members (metric -> :class:`DistanceReport`), and the conditioning of their Grams."""

    members: tuple[str, ...]
    reference: str
    distances: dict[str, DistanceReport]
    grams: list[Conditioning] = field(default_factory=list)
    compared: int = 0  # entries of one member
    copied: int = 0  # tensors that are not compared: no two members have them, or a rule keeps one

    @property
    def first(self) -> DistanceReport:
        """Any of the distances: all have the same pairs, layers and rows."""
        return next(iter(self.distances.values()))

    @property
    def pairs(self) -> list[str]:
        return list(self.first.total)

    @property
    def layers(self) -> list[str]:
        """Layers in natural order; what lies outside layers ("") comes last."""
        return sorted(self.first.layers, key=lambda name: (not name, natural(name)))

    @property
    def closeness(self) -> DistanceReport:
        """The cosine dissimilarity of the weights themselves."""
        return self.distances["cosine" if self.reference == "none" else CLOSENESS]

    def verdict(self, layer: str, pair: str | None = None) -> str:
        """How well an average will do, by the closeness of a pair (or of the farthest one); empty outside layers."""
        farthest = max(value for name, value in self.closeness.layers[layer].items() if pair in (None, name))
        if not layer:
            return ""
        return VERDICTS[0] if farthest <= BOUNDS[0] else VERDICTS[1] if farthest <= BOUNDS[1] else VERDICTS[2]

    def summary(self) -> str:
        """Two sentences: which layers will merge well and which not, and how far the farthest pair is apart."""
        judged = {layer: self.verdict(layer) for layer in self.layers if layer}
        parts = []
        for verdict in VERDICTS:
            names = [layer for layer, found in judged.items() if found == verdict]
            if names:
                parts.append(f"{spans(names)} ({len(names)} of {len(judged)} layers) will merge {verdict}")
        farthest, value = max(self.closeness.total.items(), key=lambda item: item[1])
        closing = f"Over all entries the farthest pair is {farthest}, with a cosine dissimilarity of {value:.3g}"
        if self.reference == "base" and "sign_conflict" in self.distances:
            share = 100 * self.distances["sign_conflict"].total[farthest]
            closing += f"; its task vectors differ in sign in {share:.0f} % of the entries that both move (chance: 50)"
        opening = f"By the distance of their weights, {'; '.join(parts)}" if parts else "No tensor lies in a layer"
        return f"{opening}. {closing}."

    def full_scale(self, metric: str) -> float:
        """The value at which a picture's colours are full: the largest of a layer, or what unrelated members have."""
        report = self.distances[metric]
        found = [row.value for row in report.rows if row.layer]
        found += [value for values in report.layers.values() for value in values.values()]
        return max(SCALES[self.reference].get(metric, 0.0), *found) or 1.0

    def sheet(self, pair: str, *, modules: bool = False) -> list[Line]:
        """A pair's lines: its layers (with their modules, if asked), module kinds over all layers, the total."""
        lines = []
        for layer in self.layers:
            if pair in self.first.layers[layer]:
                values = {name: report.layers[layer][pair] for name, report in self.distances.items()}
                lines.append(Line(layer, "", values, self.verdict(layer, pair)))
                lines += self.module_lines(layer, pair) if modules else []
        for module in self.first.modules:
            if pair in self.first.modules[module]:
                values = {name: report.modules[module][pair] for name, report in self.distances.items()}
                lines.append(Line(ALL, module, values))
        return [*lines, Line("total", "", {name: report.total[pair] for name, report in self.distances.items()})]

    def module_lines(self, layer: str, pair: str) -> list[Line]:
        """A layer's modules, in the order of the checkpoint."""
        cells: dict[str, dict[str, float]] = {}
        for name, report in self.distances.items():
            for row in report.rows:
                if (row.layer, row.pair) == (layer, pair):
                    cells.setdefault(row.module, {})[name] = row.value
        return [Line(layer, module, values) for module, values in cells.items()]

    def worst_grams(self) -> list[Conditioning]:
        """Of each layer and member, the Gram matrix that is hardest to invert."""
        worst: dict[tuple[str, str], Conditioning] = {}
        for row in self.grams:
            if row.severity > worst.setdefault((row.layer, row.member), row).severity:
                worst[row.layer, row.member] = row
        return sorted(worst.values(), key=lambda row: (not row.layer, natural(row.layer)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "summary": self.summary(),
            "members": list(self.members),
            "reference": self.reference,
            "compared": self.compared,
            "copied": self.copied,
            "verdicts": {layer: self.verdict(layer) for layer in self.layers if layer},
            "distances": {name: report.to_dict() for name, report in self.distances.items()},
            "grams": [row._asdict() for row in self.grams],
        }

    def table(self, *, modules: bool = False) -> str:
        """Lines of the sheets down, distances across, one block a pair; then the Grams' conditioning."""
        text = [self.summary()]
        for pair in self.pairs:
            lines = self.sheet(pair, modules=modules)
            width = max(len(pair), *(len(line.label) for line in lines))
            text += ["", f"{pair:<{width}}" + "".join(f"{name:>18}" for name in self.distances) + "  merges"]
            for line in lines:
                values = "".join(f"{line.values[name]:>18.4g}" for name in self.distances)
                text.append(f"{line.label:<{width}}{values}  {line.verdict}".rstrip())
        if self.grams:
            text += ["", "Gram matrices: of each layer and member the hardest to invert"]
            text += [f"{row.layer or OUTSIDE}, {row.member}: {row.describe()}" for row in self.worst_grams()]
        return "\n".join(text)


def mergeability(
    what: Any,
    *,
    base: str | None = None,
    reference: Reference | None = None,
    statistics: str | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    pairs: Pairs = "each",
    sources: Mapping[str, Any] | None = None,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = True,
) -> MergeabilityReport:
    """Measure every registered distance between members in one pass over them, and judge which layers merge well.

    what, base, pairs, sources: as for :func:`distance`. reference: "base" measures task vectors, "none" the weights
    themselves; the default is the base where there is one, and then the cosine of the weights is added. statistics: a
    file of Gram matrices (as of ``hf-vlmerge statistics``), whose conditioning is then reported. metrics: distances
    with their parameters, in place of all.

    Raises MergeError for members that cannot be compared.
    """
    recipe, given = as_recipe(what, base)
    if statistics is not None:
        recipe = replace(recipe, statistics=statistics)
    reference = reference or ("base" if recipe.base_model else "none")
    metrics = {name: {} for name in list_distances()} if metrics is None else metrics
    with open_sources(recipe, {**given, **(sources or {})}) as opened, single_thread():
        groups = plan(recipe, opened)
        reader = Reader(opened, chunk_size, seed=recipe.seed)
        asked = {name: Asked(name, metrics[name], reference) for name in metrics}
        asked |= {"cosine" if reference == "none" else CLOSENESS: Asked("cosine", {})}
        measured = measure(groups, reader, list(asked.values()), pairs=pairs, progress=progress)
        compared = [g for g in groups if g.method != COPY and len(g.members) > 1]
        return MergeabilityReport(
            members=tuple(dict.fromkeys(m for g in compared for m in g.members)),
            reference=reference,
            distances=dict(zip(asked, measured, strict=True)),
            grams=conditioning(compared, opened, progress),
            compared=sum(prod(g.shape) for g in compared),
            copied=len(groups) - len(compared),
        )


def conditioning(groups: list[MergeGroup], sources: Sources, progress: bool) -> list[Conditioning]:
    """The conditioning of every Gram matrix that belongs to a compared weight, and of the members' sum."""
    found = [(group, grams) for group in groups if (grams := gram_refs(group, sources))]
    if not found and any(role.startswith("statistics") for role in sources):
        raise MergeError("the statistics hold no Gram matrix of a compared weight")
    rows: list[Conditioning] = []
    known: dict[tuple[Ref, ...], tuple[int, float | None, float]] = {}  # q, k and v share their input's matrix
    for group, grams in tqdm(found, desc="grams", disable=not (progress and found)):
        layer, module = place(group.output)
        tokens = {member: token_count(sources[r.source], r.key) for member, r in grams.items()}
        wanted = {member: (ref,) for member, ref in grams.items()}
        if len(grams) > 1:
            wanted["sum"] = tuple(grams.values())
            tokens["sum"] = None if None in tokens.values() else sum(tokens.values())
        for member, refs in wanted.items():
            if refs not in known:
                known[refs] = spectrum(sum(sources[r.source][r.key].double() for r in refs))
            rows.append(Conditioning(layer, module, group.output, member, *known[refs], tokens[member]))
    return rows


def gram_refs(group: MergeGroup, sources: Sources) -> dict[str, Ref]:
    """The Gram matrix of each member that has one."""
    found = {}
    for member, ref in zip(group.members, group.inputs, strict=True):
        role = f"statistics:{member}" if f"statistics:{member}" in sources else "statistics"
        key = statistic_key(sources[role], "gram", ref.key) if role in sources else None
        if key is not None:
            found[member] = Ref(role, key)
    return found


def spectrum(gram: Tensor) -> tuple[int, float | None, float]:
    """Size, condition number (None: singular in float64) and effective rank of a symmetric matrix."""
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    least, most = float(values[0]), float(values[-1])
    singular = least <= most * len(values) * torch.finfo(torch.float64).eps
    rank = float(values.sum() ** 2 / (values @ values)) if most > 0 else 0.0
    return len(values), None if singular else most / least, rank


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort numbers in names by value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def spans(names: list[str]) -> str:
    """Names of layers with runs joined: ``encoder.layers.0–3, 5``."""
    runs: dict[str, list[list[int]]] = {}
    for name in names:
        prefix, _, index = name.rpartition(".")
        own = runs.setdefault(prefix, [])
        if own and own[-1][1] == int(index) - 1:
            own[-1][1] = int(index)
        else:
            own.append([int(index), int(index)])
    joined = {p: ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in own) for p, own in runs.items()}
    return "; ".join(f"{prefix}.{numbers}".lstrip(".") for prefix, numbers in joined.items())
