"""``base+adapter`` as a dense source: W + scale * B A, computed while it is read."""

from collections import Counter
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MergeError, closest
from .lora import Adapter, LoraModule, open_adapter
from .sources import TensorSource, open_source
from .views import View

ROWS, ELEMENTS = 8, 1 << 15  # rows are computed in blocks of about so many elements, from row 0, whatever is asked for


class Change(NamedTuple):
    """What an adapter does to one tensor of its base."""

    replacement: str | None = None  # key of a whole tensor in the adapter
    module: LoraModule | None = None  # low-rank update of a weight
    transposed: bool = False  # the weight is stored as (in, out)
    bias: LoraModule | None = None  # update of a bias


def adapted(base: Any, adapter: Any) -> "AdaptedSource":
    """Open ``base+adapter``."""
    source = open_source(base)
    try:
        return AdaptedSource(source, open_adapter(adapter))
    except BaseException:
        source.close()
        raise


class AdaptedSource(View):
    """A base with an adapter merged into it. Changed tensors come in float32, under the dtype of the base.

    Byte-identical whatever run is read: rows are computed in blocks that start at fixed places (given one number of
    threads, as BLAS changes with it). Two adapters on one base: ``base+first+second``.
    """

    def __init__(self, base: TensorSource, adapter: Adapter) -> None:
        super().__init__(base)
        self.adapter = adapter
        pinned = f"{base.label}@{base.revision}" if base.revision else base.label
        self.label, self.revision = f"{pinned}+{adapter.pinned}", None
        self.files = (*base.files, *(f._replace(name=f"{adapter.label}/{f.name}") for f in adapter.tensors.files))
        self.found_elsewhere: list[tuple[str, str]] = []
        self.changes: dict[str, Change] = {}
        self.added: dict[str, str] = {}
        self.last: tuple[str | None, tuple[Tensor, Tensor] | None] = (None, None)
        for name, key in adapter.replaced.items():
            self.replace(name, key)
        for module in adapter.modules.values():
            self.update(module)
        self.notes = (*base.notes, *self.describe())

    def replace(self, name: str, key: str) -> None:
        """A whole tensor of the adapter (``modules_to_save``, biases) takes the base's place, or is new."""
        target, shape = self.find(name), self.adapter.tensors.shape(key)
        if target is None:
            self.refuse_tied_head(name, shape)
            self.added[name] = key
            return
        if shape != self.source.shape(target):
            raise MergeError(
                f"{self.label}: {target} has shape {self.source.shape(target)} in the base and {shape} in the adapter"
            )
        self.change(target, replacement=key)

    def update(self, module: LoraModule) -> None:
        target = self.find(f"{module.name}.weight")
        if target is None:
            known = closest(f"{module.name}.weight", self.source)
            raise MergeError(f"{self.label}: the adapter changes {module.name}, which the base does not store{known}")
        self.change(target, module=module, transposed=self.is_transposed(module, target))
        if module.bias:
            bias = self.find(f"{module.name}.bias")
            if bias is None:
                raise MergeError(f"{self.label}: the adapter adds to the bias of {module.name}, which the base lacks")
            self.change(bias, bias=module)

    def change(self, target: str, **what: Any) -> None:
        """Note a change of a tensor, and of all that share its memory."""
        group = next((keys for keys in self.tied if target in keys), (target,))
        for key in group:
            self.changes[key] = self.changes.get(key, Change())._replace(**what)

    def is_transposed(self, module: LoraModule, target: str) -> bool:
        """Whether the product of the factors must be turned to fit; raises where it does not fit at all."""
        a, b, shape = (
            self.adapter.tensors.shape(module.a),
            self.adapter.tensors.shape(module.b),
            self.source.shape(target),
        )
        straight, turned = shape == (b[0], *a[1:]), len(a) == 2 and shape == (a[1], b[0])
        if not (straight or turned) or (module.embedding and not turned):
            raise MergeError(f"{self.label}: {target} has shape {shape}, the adapter's factors {b} and {a} do not fit")
        flag = module.embedding or bool(self.adapter.config.get("fan_in_fan_out"))
        transposed = turned and (flag or not straight)
        if module.magnitude and (transposed or module.embedding or len(shape) != 2):
            raise MergeError(f"{self.label}: DoRA is understood for linear layers only, not for {module.name}")
        return transposed

    def find(self, name: str) -> str | None:
        """The base's name of a tensor of the adapter: the same; without or with a prefix; or, where files and classes
        order the components of a path differently (``language_model.model`` and ``model.language_model``), the one
        name of the same components."""
        if name in self.source:
            return name
        parts = name.split(".")
        shorter = [".".join(parts[i:]) for i in range(1, len(parts) - 1)]
        kinds = (
            [s for s in shorter if s in self.source][:1],
            [k for k in self.source if k.endswith(f".{name}")],
            [k for k in self.source if Counter(k.split(".")) == Counter(parts)],
        )
        found = next((kind[0] for kind in kinds if len(kind) == 1), None)
        if found:
            self.found_elsewhere.append((name, found))
        return found

    def refuse_tied_head(self, name: str, shape: tuple[int, ...]) -> None:
        """A saved output layer has no place in a model that takes the input embeddings for it."""
        config = self.config or {}
        if config.get("tie_word_embeddings") and shape[:1] == (config.get("vocab_size"),) and len(shape) == 2:
            raise MergeError(
                f"{self.label}: the adapter holds {name} of its own, but the base ties it to its embeddings"
            )

    def describe(self) -> list[str]:
        updated = sum(c.module is not None for c in self.changes.values())
        replaced = sum(c.replacement is not None for c in self.changes.values())
        notes = [f"{self.label}: {updated} weights get a low-rank update, {replaced} tensors are replaced"]
        if self.added:
            notes.append(f"{self.label}: the adapter adds {len(self.added)} tensors, such as {next(iter(self.added))}")
        if self.found_elsewhere:
            name, found = self.found_elsewhere[0]
            notes.append(
                f"{self.label}: {len(self.found_elsewhere)} names of the adapter were found under others, such as "
                f"{name} as {found}"
            )
        return notes

    def __iter__(self):
        yield from self.source
        yield from self.added

    def __contains__(self, key: object) -> bool:
        return key in self.source or key in self.added

    def __len__(self) -> int:
        return len(self.source) + len(self.added)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.adapter.tensors.shape(self.added[key]) if key in self.added else super().shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self.adapter.tensors.dtype(self.added[key]) if key in self.added else super().dtype(key)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        if key in self.added:
            return self.adapter.tensors.read(self.added[key], start, stop)
        change = self.changes.get(key)
        if change is None:
            return super().read(key, start, stop)
        stop = self.numel(key) if stop is None else stop
        if change.module:
            return self.updated(key, change, start, stop)
        values = self.plain(key, change, start, stop)
        if change.bias:
            values = values + change.bias.scale * self.adapter.tensors.read(change.bias.bias, start, stop).float()
        return values

    def plain(self, key: str, change: Change, start: int, stop: int) -> Tensor:
        """The base's values, or those that replace them, in float32 (integers as they are)."""
        source, name = (self.adapter.tensors, change.replacement) if change.replacement else (self.source, key)
        values = source.read(name, start, stop)
        return values.float() if values.is_floating_point() else values

    def updated(self, key: str, change: Change, start: int, stop: int) -> Tensor:
        """W + scale * B A in whole blocks of rows around the run, cut to the run."""
        shape = self.shape(key)
        columns = prod(shape[1:])
        if stop <= start:
            return torch.empty(0)
        left, right = self.factors(key, change)
        step = max(ROWS, ELEMENTS // columns)
        first = start // columns // step * step
        pieces = []
        for row in range(first, -(-stop // columns), step):
            end = min(row + step, shape[0])
            weight = self.plain(key, change, row * columns, end * columns).reshape(end - row, columns)
            weight = weight + (left[row:end] @ right) * change.module.scale
            if change.module.magnitude:
                weight *= self.dora_factor(weight, change.module, row, end)
            pieces.append(weight.reshape(-1))
        return torch.cat(pieces)[start - first * columns : stop - first * columns]

    def extent(self, key: str) -> tuple[int, int] | None:
        if key in self.added:
            return self.adapter.tensors.extent(self.added[key])
        return None if key in self.changes else super().extent(key)

    def factors(self, key: str, change: Change) -> tuple[Tensor, Tensor]:
        """The factors of a weight's update, turned as the weight is. Those of the last weight are kept."""
        last, pair = self.last
        if last != key:
            left, right = self.adapter.factors(change.module)
            pair = (right.t().contiguous(), left.t().contiguous()) if change.transposed else (left, right)
            self.last = (key, pair)  # one assignment: threads may read different weights at once
        return pair

    def dora_factor(self, weight: Tensor, module: LoraModule, row: int, end: int) -> Tensor:
        """Stored magnitude over the norm of each row, (rows, 1): section 4 of the paper of DoRA."""
        magnitude = self.adapter.tensors.read(module.magnitude, row, end).double()
        return (magnitude / weight.double().norm(dim=1)).float()[:, None]

    def close(self) -> None:
        super().close()
        self.adapter.close()
