"""Statistics of layers' inputs: Gram matrices, collected by hooks, kept as a safetensors file that can live on the Hub.

Keys are names of weights with the prefix ``gram.``. Layers with equal sums (they are fed by the same input) share one
entry; the metadata ``aliases`` maps the other names to it. All metadata values are JSON: ``kind`` ("sum"), ``tokens``
(input rows behind each entry), ``samples``, ``padding``, and what the caller adds (source, revision, data).
"""

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from weakref import ref as weak

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import MergeError, nearest
from .tensors.sinks import SafetensorsSink, Spec, explained
from .tensors.sources import TensorSource

Padding = Literal["include", "exclude"]
TokenMask = Callable[
    [str, Tensor, Any], Tensor | None
]  # (module name, input, batch) -> bool mask over its rows, or None


@dataclass
class GramStatistics:
    """Sums X^T X over layers' inputs. ``grams``: weight name -> (in, in) float64; ``tokens``: rows behind each."""

    grams: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, gram: Tensor, rows: int) -> None:
        self.grams[name] = gram.clone() if name not in self.grams else self.grams[name].add_(gram)
        self.tokens[name] = self.tokens.get(name, 0) + rows

    def shared(self) -> dict[str, str]:
        """Names whose sums equal those of an earlier name, mapped to that name."""
        first: dict[tuple, list[str]] = {}
        aliases = {}
        for name, gram in self.grams.items():
            candidates = first.setdefault((tuple(gram.shape), self.tokens[name], float(gram.trace())), [])
            same = next((other for other in candidates if torch.equal(self.grams[other], gram)), None)
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
        wrong = next((name for name, gram in self.grams.items() if not gram.isfinite().all()), None)
        if wrong or not self.grams:
            raise MergeError(
                f"the Gram matrix of {wrong} is not finite" if wrong else "no linear layer received an input"
            )
        aliases = self.shared()
        kept = {f"gram.{name}": gram.to(dtype) for name, gram in self.grams.items() if name not in aliases}
        metadata = {
            "kind": "sum",
            "samples": self.samples,
            "tokens": {f"gram.{name}": self.tokens[name] for name in self.grams if name not in aliases},
            "aliases": {f"gram.{name}": f"gram.{other}" for name, other in aliases.items()},
            **self.metadata,
        }
        write_file(path, kept, {key: json.dumps(value) for key, value in metadata.items()})
        return path


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file beside its place, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
    folder.mkdir()
    file = folder / "model.safetensors"
    try:
        specs = {key: Spec(t.dtype, tuple(t.shape)) for key, t in tensors.items()}
        with SafetensorsSink(folder, specs, max_shard_size=1 << 62, metadata=metadata) as sink:
            for key, tensor in tensors.items():
                sink.write(key, 0, tensor)
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


@torch.no_grad()
def collect_grams(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    modules: str | Sequence[str] = "*",
    padding: Padding = "include",
    image_tokens: int | None = None,
    token_mask: TokenMask | None = None,
    limit: int | None = None,
    progress: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> GramStatistics:
    """Sum X^T X over the inputs X of every ``nn.Linear`` that is called, in float64, and count the rows of X.

    model: put into eval mode and back. batches: mappings of tensors (moved to the model's device); ``limit`` takes the
    first ones. forward: how a batch is passed (default ``model(**batch)``). modules: globs over module names.

    padding "include" counts every row, as the released code of arXiv 2304.14933 does. "exclude" leaves out padded text
    tokens by the batch's ``attention_mask`` (B, T). What an input's rows are follows from their number: T rows a sample
    are text, ``image_tokens`` = F rows are image, T + F rows are the joint sequence, text first; one row a sample is a
    pooled token. Anything else is an error, for which ``token_mask(module_name, input, batch)`` is the answer: it
    returns a mask of the input's shape without its last axis, or None to count all rows.
    """
    if padding not in ("include", "exclude"):
        raise MergeError(f"padding is 'include' or 'exclude', not {padding!r}")
    globs = [modules] if isinstance(modules, str) else list(modules)
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(fnmatchcase(n, g) for g in globs)
    }
    if not layers:
        raise MergeError(
            f"no linear layer is called {globs}{nearest(globs[0], [n for n, _ in model.named_modules() if n])}"
        )
    if padding == "exclude" and token_mask is None:
        token_mask = partial(mask_by_length, image_tokens=image_tokens)
    device = next(model.parameters()).device
    collector = Collector(token_mask if padding == "exclude" else None)
    collector.statistics.metadata.update({"padding": padding, **(metadata or {})})
    total = limit if limit is not None else (len(batches) if hasattr(batches, "__len__") else None)
    with evaluating(model), collector.hooked(layers):
        for batch in tqdm(islice(batches, limit), total=total, desc="grams", disable=not progress):
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            collector.batch = batch
            model(**batch) if forward is None else forward(model, batch)
            collector.statistics.samples += next(
                (len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), 0
            )
    return collector.statistics


class Collector:
    """Hooks on linear layers that add up the Gram matrices of their inputs."""

    def __init__(self, token_mask: TokenMask | None) -> None:
        self.token_mask = token_mask
        self.statistics = GramStatistics()
        self.batch: Any = None
        self.last: tuple[Any, int, Tensor, int] | None = None  # input, its version, product, rows: q, k, v share them

    @contextmanager
    def hooked(self, layers: Mapping[str, nn.Linear]) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(partial(self.hook, name), with_kwargs=True)
            for name, module in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hook(self, name: str, module: nn.Linear, arguments: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        x = arguments[0] if arguments else named["input"]
        version = 0 if x.is_inference() else x._version  # changes when x is written to
        if self.last is None or self.last[0]() is not x or self.last[1] != version or self.token_mask is not None:
            rows = self.rows(name, x)
            self.last = (weak(x), version, rows.T @ rows, len(rows))
        self.statistics.add(f"{name}.weight".lstrip("."), self.last[2].cpu(), self.last[3])

    def rows(self, name: str, x: Tensor) -> Tensor:
        """The rows of an input that count, (rows, features) float64."""
        mask = None if self.token_mask is None else self.token_mask(name, x, self.batch)
        if mask is not None and mask.shape != x.shape[:-1]:
            raise MergeError(f"{name}: the token mask is {tuple(mask.shape)}, the input {tuple(x.shape)}")
        return (x.reshape(-1, x.shape[-1]) if mask is None else x[mask.bool()]).double()


def mask_by_length(name: str, x: Tensor, batch: Mapping[str, Any], *, image_tokens: int | None) -> Tensor | None:
    """The mask of an input's rows, told from their number: text, image, text then image, or a pooled token a sample."""
    text = batch.get("attention_mask")
    if text is None:
        raise MergeError("padding 'exclude' needs attention_mask in every batch, or token_mask")
    if x.ndim > 2 and len(x) != len(text):
        raise MergeError(f"{name}: the input has {len(x)} samples, attention_mask {len(text)}; give token_mask")
    rows, length = x.shape[:-1].numel() // len(text), text.shape[1]
    if length == image_tokens:
        raise MergeError(f"texts and images both have {length} tokens and cannot be told apart; give token_mask")
    if rows in (1, image_tokens):
        return None
    if rows == length:
        return text.reshape(x.shape[:-1])
    if image_tokens is not None and rows == length + image_tokens:
        return torch.cat([text, text.new_ones(len(text), image_tokens)], dim=1).reshape(x.shape[:-1])
    raise MergeError(
        f"{name}: {rows} tokens a sample are neither text ({length}), image ({image_tokens}) nor both; give token_mask"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and each module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
