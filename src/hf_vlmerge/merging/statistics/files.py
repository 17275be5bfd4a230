"""Statistics as a safetensors file that can live on the Hub.

Keys are names of weights with the prefix ``gram.`` or ``fisher.``. Weights with equal sums (they are fed by the same
input, or are one tied tensor) share one entry; the metadata ``aliases`` maps the other names to it. All metadata values
are JSON: ``kind`` ("sum"), ``tokens`` (input rows, or samples, behind each entry), ``samples``, and what the collector
and the caller add (padding, labels, source, revision, data).
"""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MergeError
from ..tensors.sinks import SafetensorsSink, Spec, explained
from ..tensors.sources import TensorSource

WORDS = {"gram": "Gram matrix", "fisher": "sum of squared gradients"}


@dataclass
class Statistics:
    """Sums over data, one for each weight.

    kind: "gram" or "fisher". sums: weight name -> float64; a Gram matrix (in, in), or squared gradients of the weight's
    shape. tokens: weight name -> how many input rows (gram) or samples (fisher) its sum stands for.
    """

    kind: str
    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def shared(self) -> dict[str, str]:
        """Names whose sums equal those of an earlier name, mapped to that name."""
        first: dict[tuple, list[str]] = {}
        aliases = {}
        for name, own in self.sums.items():
            candidates = first.setdefault((tuple(own.shape), self.tokens[name], float(own.sum())), [])
            same = next((o for o in candidates if self.sums[o] is own or torch.equal(self.sums[o], own)), None)
            if same is None:
                candidates.append(name)
            else:
                aliases[name] = same
        return aliases

    def save(self, path: Path | str, *, dtype: torch.dtype = torch.float32) -> Path:
        """Write one ``.safetensors`` file (it appears whole or not at all)."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise MergeError(f"statistics are one .safetensors file, not {path.name!r}")
        if not self.sums:
            nothing = {"gram": "no linear layer received an input", "fisher": "no sample was seen"}
            raise MergeError(nothing[self.kind])
        wrong = next((name for name, own in self.sums.items() if not own.isfinite().all()), None)
        if wrong:
            raise MergeError(f"the {WORDS[self.kind]} of {wrong} is not finite")
        aliases = self.shared()
        kept = {f"{self.kind}.{name}": own for name, own in self.sums.items() if name not in aliases}
        metadata = {
            "kind": "sum",
            "samples": self.samples,
            "tokens": {f"{self.kind}.{name}": self.tokens[name] for name in self.sums if name not in aliases},
            "aliases": {f"{self.kind}.{name}": f"{self.kind}.{other}" for name, other in aliases.items()},
            **self.metadata,
        }
        write_file(path, kept, dtype, {key: json.dumps(value) for key, value in metadata.items()})
        return path


def write_file(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write tensors, one after the other in this dtype, into a file beside its place, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
    folder.mkdir()
    file = folder / "model.safetensors"
    try:
        specs = {key: Spec(dtype, tuple(t.shape)) for key, t in tensors.items()}
        with SafetensorsSink(folder, specs, max_shard_size=1 << 62, metadata=metadata) as sink:
            for key, tensor in tensors.items():
                sink.write(key, 0, tensor.to(dtype))
        os.replace(file, path)
    except OSError as error:
        raise explained(error, path) from error
    finally:
        file.unlink(missing_ok=True)
        folder.rmdir()


def statistic_key(source: TensorSource, kind: str, weight: str) -> str | None:
    """The key of a weight's statistic in a statistics file, through its aliases; None where there is none."""
    key = f"{kind}.{weight}"
    key = parsed(source.metadata.get("aliases", "{}")).get(key, key)
    return key if key in source else None


def token_count(source: TensorSource, key: str) -> int | None:
    return parsed(source.metadata.get("tokens", "{}")).get(key)


@lru_cache(maxsize=8)
def parsed(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise MergeError(f"the statistics' metadata is not JSON: {text[:40]!r}") from None
