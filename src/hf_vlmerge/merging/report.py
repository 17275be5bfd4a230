"""What a merge did (or, of a dry run, would do), for people, cards and JSON."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from .recipe import Recipe


class TensorReport(NamedTuple):
    """One output tensor: how it is made."""

    output: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    members: tuple[str, ...]
    parameters: Mapping[str, Any]
    weights: tuple[float, ...]
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

    @property
    def parameters(self) -> int:
        """Number of elements in the output."""
        return sum(prod(t.shape) for t in self.tensors)

    @property
    def counts(self) -> dict[str, int]:
        """Output tensors that were merged, copied, and copied because their inputs were byte-equal."""
        how = self.how or {t.output: "copied" if t.method == "copy" else "merged" for t in self.tensors}
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
            "tensors": [t._asdict() for t in self.tensors],
        }

    def table(self) -> str:
        """The plan as text: one line for each run of tensors that are made alike, with one of their names."""
        alike: dict[tuple, list[TensorReport]] = {}
        for t in self.tensors:
            said = ", ".join(f"{k}={v}" for k, v in t.parameters.items())
            alike.setdefault((t.method, t.members, said, t.note), []).append(t)
        lines = [f"{'tensors':>7}  {'method':<20} {'members':<36} settings; for example"]
        for (method, members, said, note), tensors in alike.items():
            settings = "; ".join(filter(None, (said, note)))
            lines.append(f"{len(tensors):>7}  {method:<20} {', '.join(members):<36} {settings}; {tensors[0].output}")
        return "\n".join(lines)
