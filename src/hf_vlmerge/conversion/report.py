"""What a conversion did with every tensor of its source."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class ConversionReport:
    """Nothing is left out silently: each source tensor is counted as converted or named as dropped."""

    source: str
    output: str
    architecture: str
    converted: int
    dropped: dict[str, str] = field(default_factory=dict)  # source key -> why
    fresh: list[str] = field(default_factory=list)  # our keys that the source does not have
    recomputed: list[str] = field(default_factory=list)  # index buffers written from the sizes alone
    notes: list[str] = field(default_factory=list)
    config: dict = field(default_factory=dict)  # what was inferred

    def to_dict(self) -> dict:
        return dict(vars(self))

    def text(self) -> str:
        """The same for people."""
        lines = [f"{self.output}: {self.architecture}, {self.converted} tensors from {Path(self.source).name}"]
        if self.config:
            lines.append("sizes: " + ", ".join(f"{name} {value}" for name, value in self.config.items()))
        lines += [f"note: {note}" for note in self.notes]
        for why in dict.fromkeys(self.dropped.values()):
            keys = [key for key, reason in self.dropped.items() if reason == why]
            lines.append(f"dropped ({why}): {', '.join(keys)}")
        if self.recomputed:
            lines.append(f"recomputed: {', '.join(self.recomputed)}")
        if self.fresh:
            lines.append(f"fresh values: {', '.join(self.fresh)}")
        return "\n".join(lines)
