"""What a merge did (or, of a dry run, would do), for people, cards and JSON."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from .errors import MergeError
from .estimate import Estimate
from .groups import COPY, MergeGroup, Sources
from .planning import references
from .recipe import Recipe
from .tensors.dtypes import dtype_name
from .tensors.sources import FileRecord, sha256_of


class TensorReport(NamedTuple):
    """One output tensor: how it is made."""

    output: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    members: tuple[str, ...]
    parameters: Mapping[str, Any]
    weights: tuple[float, ...]
    rules: tuple[int, ...]
    note: str


@dataclass
class MergeReport:
    """The plan of a merge and, once it ran, its outcome. ``recipe`` and ``sources`` hold public names only."""

    recipe: Recipe
    tensors: list[TensorReport]
    sources: list[dict[str, Any]]
    notes: list[str]
    config: dict[str, Any] | None = None
    input_parameters: int = 0
    output: Path | None = None
    seconds: float = 0.0
    bytes_written: int = 0
    how: dict[str, str] = field(default_factory=dict)  # output -> merged, copied or equal
    resumed: int = 0  # tensors that an interrupted merge had finished
    estimate: Estimate | None = None

    @property
    def parameters(self) -> int:
        """Number of elements in the output."""
        return sum(prod(t.shape) for t in self.tensors)

    @property
    def counts(self) -> dict[str, int]:
        """Output tensors that were merged, copied, and copied because their inputs were byte-equal."""
        how = self.how or {t.output: "copied" if t.method == COPY else "merged" for t in self.tensors}
        found = Counter(how.values())
        return {kind: found[kind] for kind in ("merged", "copied", "equal")}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "recipe": self.recipe.to_dict(),
            "sources": self.sources,
            "notes": self.notes,
            "counts": self.counts,
            "parameters": self.parameters,
            "input_parameters": self.input_parameters,
            "seconds": self.seconds,
            "bytes_written": self.bytes_written,
            "resumed": self.resumed,
            "estimate": None if self.estimate is None else self.estimate.to_dict(),
            "tensors": [t._asdict() for t in self.tensors],
        }

    def table(self) -> str:
        """The plan as text: one line for each run of tensors that are made alike, with one of their names."""
        alike: dict[tuple, list[TensorReport]] = {}
        for t in self.tensors:
            weights = {} if set(t.weights) <= {1.0} else {"weights": t.weights}
            said = ", ".join(f"{k}={v}" for k, v in {**t.parameters, **weights}.items())
            said += "; rules " + ", ".join(map(str, t.rules)) if t.rules else ""
            alike.setdefault((t.method, t.members, said, t.note), []).append(t)
        lines = [f"{'tensors':>7}  {'method':<20} {'members':<36} settings; for example"]
        for (method, members, said, note), tensors in alike.items():
            settings = "; ".join(filter(None, (said, note)))
            lines.append(f"{len(tensors):>7}  {method:<20} {', '.join(members):<36} {settings}; {tensors[0].output}")
        for i, rule in enumerate(self.recipe.rules, 1):
            matched = [t.output for t in self.tensors if i in t.rules]
            example = f", such as {matched[0]}" if matched else ""
            lines.append(f"rule {i} ({' '.join(rule.match)}): {len(matched)} tensors{example}")
        if self.estimate is not None:
            lines.append(f"{len(self.tensors)} tensors: {self.estimate}")
        return "\n".join(lines)


def describe(
    recipe: Recipe,
    sources: Sources,
    groups: list[MergeGroup],
    config: dict[str, Any] | None,
    hash_inputs: bool = False,
) -> MergeReport:
    """The report before anything is computed: the plan, where everything comes from, what a reader should know."""
    members = [s for role, s in sources.items() if role != "base" and not role.startswith("statistics")]
    return MergeReport(
        recipe=public_recipe(recipe, sources),
        tensors=[
            TensorReport(
                g.output, g.shape, dtype_name(g.dtype), g.method, g.members, g.parameters, g.weights, g.rules, g.note
            )
            for g in groups
        ],
        sources=[
            {
                "role": role,
                "label": s.label,
                "revision": s.revision,
                "files": [published(f, hash_inputs) for f in s.files],
                **s.details,
            }
            for role, s in sources.items()
        ],
        notes=[*recipe.notes, *observations(recipe, sources, groups)],
        config=config,
        input_parameters=sum(s.numel(key) for s in members for key in s),
    )


def published(file: FileRecord, hashed: bool = False) -> dict[str, Any]:
    """What others may know of an input file: the sha256 that the Hub reports, or that of the file as it lies here."""
    sha256 = sha256_of(file.path) if hashed and file.path else file.sha256
    if file.sha256 not in (None, sha256):
        raise MergeError(f"{file.name} is not the file that the Hub has (sha256 {file.sha256}); fetch it once more")
    return {"name": file.name, "size": file.size, "sha256": sha256}


def observations(recipe: Recipe, sources: Sources, groups: list[MergeGroup]) -> list[str]:
    """What is no error but should not go unsaid."""
    notes = []
    stored = sorted({dtype_name(sources[r.source].dtype(r.key)) for g in groups if g.method != COPY for r in g.inputs})
    if len(stored) > 1:
        notes.append(f"the inputs have different dtypes ({', '.join(stored)})")
    if "float64" in stored:
        notes.append("float64 inputs are merged in float32 precision")
    integers = [g.output for g in groups if g.note.startswith("integers")]
    if integers:
        notes.append(f"{len(integers)} integer tensors are copied, not averaged, such as {integers[0]}")
    for role, source in sources.items():
        notes += source.notes
        if source.ignored:
            notes.append(
                f"{source.label} ({role}): beside the state dict and left out: {', '.join(source.ignored[:8])}"
            )
    rest = sorted(set(sources.get("base", ())) - {g.output for g in groups})
    if rest:
        notes.append(f"{len(rest)} tensors of the base are in no member and are not used, such as {rest[0]}")
    used = {i for g in groups for i in g.rules}
    notes += [f"rule {i} applies to no tensor" for i in range(1, len(recipe.rules) + 1) if i not in used]
    return notes


def public_recipe(recipe: Recipe, sources: Sources) -> Recipe:
    """The recipe with Hub revisions pinned and paths of this machine reduced to their last part."""
    names = {}
    for role, ref in references(recipe).items():
        source = sources[role]
        pinned = f"{source.label}@{source.revision}" if source.revision else source.label
        names[ref] = Path(ref).name if pinned == "memory" else pinned
    files_from = names.get(recipe.files_from, recipe.files_from)
    return replace(recipe.map_sources(names.__getitem__), files_from=files_from, notes=recipe.notes)
