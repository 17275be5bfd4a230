"""Git re-basin (Ainsworth et al., 2022, arXiv 2209.04836): renumber one model's units to match another's.

Weight matching, Algorithm 1: each block of units gets the order that makes the weights around it most similar to the
reference (a linear sum assignment), block after block, until no block changes. Blocks that share no tensor are settled
by one pass; only the residual stream ties blocks together. The paper takes the blocks in random order; here the order
is fixed, so the result is the same on every run. What a renumbered model computes does not change (with the residual
stream, the hidden states that a model without a head returns come in the reference's order).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .errors import MergeError, nearest
from .matching import HeadMatcher, HeadSimilarity, Matrix, Order, best
from .permutations import Block, Blocks, Heads, Module, Slot, Units, attention_blocks, ffn_blocks, residual_block
from .program import single_thread
from .recipe import ExpertLayout, Recipe
from .tensors.permuted import Permutation, PermutedSource
from .tensors.sources import TensorSource, open_source

PASSES = 100  # of coordinate ascent; it stops earlier, since every pass that changes something gains
Orders = dict[Slot, Order]
Counterpart = Callable[[str], str]  # a key of the model that moves -> the key of the reference it is matched with


class BlockReport(NamedTuple):
    """What matching did to one block. Distances are ||reference - other|| / ||reference|| over the block's tensors."""

    label: str
    kind: str  # ffn, attention or residual
    units: int
    moved: int  # units (rows, for attention) that changed their place
    before: float
    after: float


@dataclass
class Alignment:
    """Permutations by key, what each block gained, and what was left alone, in sentences."""

    permutations: dict[str, tuple[Permutation, ...]]
    blocks: list[BlockReport]
    left: list[str] = field(default_factory=list)
    passes: int = 1

    def view(self, source: TensorSource) -> PermutedSource:
        """The source with its units in the new order."""
        return PermutedSource(source, self.permutations)

    def to_dict(self) -> dict[str, Any]:
        """Distances and counts as plain data."""
        return {"blocks": [b._asdict() for b in self.blocks], "left": self.left, "passes": self.passes}

    def summary(self) -> list[str]:
        """One sentence for each kind of block, and one on what was left alone."""
        lines = []
        for kind in dict.fromkeys(b.kind for b in self.blocks):
            own = [b for b in self.blocks if b.kind == kind]
            before, after = (float(np.mean([getattr(b, side) for b in own])) for side in ("before", "after"))
            lines.append(
                f"{kind}: {sum(b.moved > 0 for b in own)} of {len(own)} blocks renumbered; mean distance from "
                f"{before:.4g} to {after:.4g}"
            )
        if self.left:
            lines.append(f"{len(self.left)} modules were left alone; the first: {self.left[0]}")
        return lines

    def table(self) -> str:
        """Every block as a line of text."""
        width = max((len(b.label) for b in self.blocks), default=5)
        lines = [f"{'block':<{width}}  {'kind':<9}  {'units':>6}  {'moved':>6}  {'before':>8}  {'after':>8}"]
        for b in self.blocks:
            lines.append(
                f"{b.label:<{width}}  {b.kind:<9}  {b.units:>6}  {b.moved:>6}  {b.before:>8.4f}  {b.after:>8.4f}"
            )
        return "\n".join([*lines, *self.left])


def align(source: Any, to: Any, *, blocks: Iterable[str] = ("ffn", "attention"), heads: int | None = None) -> Alignment:
    """Match one checkpoint's units to another's of the same architecture.

    source, to: what ``open_source`` takes. blocks: of "ffn", "attention" and "residual" (the residual stream of the
    whole model, where a table covers all of its tensors). heads: the number of attention heads, where config.json does
    not tell. Raises MergeError where the names or shapes of the two differ.
    """
    source, to = open_source(source), open_source(to)
    blocks = tuple(blocks)
    found = Blocks([], [])
    for kind, find in (("ffn", ffn_blocks), ("attention", lambda s: attention_blocks(s, heads))):
        if kind in blocks:
            own = find(source)
            found.found.extend(own.found)
            found.left.extend(own.left)
    if "residual" in blocks:
        found.found.append(residual_block(source))
    return Matching(source, to, found, lambda key: key).solve()


def align_experts(
    source: Any,
    layout: ExpertLayout,
    to: str,
    *,
    base: Any = None,
    blocks: Iterable[str] = ("ffn", "attention"),
    heads: int | None = None,
) -> Alignment:
    """Match the experts inside one checkpoint to one of them, or to a base whose names have the merged component.

    FFNs move freely. Attention heads move where an expert shares nothing by head with another (VLMo's lower layers,
    with their rows of the table of positions); elsewhere the dimensions within heads do. The residual stream is common
    to all experts, so it stays.
    """
    source = open_source(source)
    if "residual" in blocks:
        raise MergeError("align: experts of one model share the residual stream; leave 'residual' out of blocks")
    reference = source if base is None else open_source(base)
    component = layout.merged if base is not None else layout.experts.get(to)
    if component is None:
        raise MergeError(f"align: to: there is no expert {to!r}{nearest(to, [*layout.experts, 'base'])}")
    moving = {c for alias, c in layout.experts.items() if base is not None or alias != to}

    def counterpart(key: str) -> str:
        return ".".join(component if part in moving else part for part in key.split("."))

    found = Blocks([], [])
    for kind, find in (("ffn", ffn_blocks), ("attention", lambda s: attention_blocks(s, heads, between_experts=True))):
        own = find(source) if kind in blocks else Blocks([], [])
        found.left.extend(own.left)
        for block in own.found:
            if moving & set(block.label.split(".")):
                found.found.append(block)
    return Matching(source, reference, found, counterpart).solve()


def aligned(recipe: Recipe, sources: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """The views that a recipe's ``align`` asks for, by role, with what matching gained in their notes."""
    wanted = recipe.align
    options = {"blocks": wanted.blocks, "heads": wanted.heads}
    views: dict[str, TensorSource] = {}
    if recipe.experts_of:
        from .planning import layout_of  # which reads this module's views

        if wanted.to == "base" and "base" not in sources:
            raise MergeError("align: to: base, but the recipe has no base_model")
        base = sources["base"] if wanted.to == "base" else None
        layout = layout_of(recipe, sources["experts"])
        found = {"experts": align_experts(sources["experts"], layout, wanted.to, base=base, **options)}
    else:
        roles = [role for role in ("base", *recipe.aliases) if role in sources and role != wanted.to]
        found = {role: align(sources[role], sources[wanted.to], **options) for role in roles}
    for role, alignment in found.items():
        views[role] = alignment.view(sources[role])
        lines = (f"{role} aligned to {wanted.to}: {line}" for line in alignment.summary())
        views[role].notes = (*views[role].notes, *lines)
        views[role].details = {**views[role].details, "alignment": alignment.to_dict()}
    return views


class Matching:
    """Coordinate ascent over the blocks of one pair of models."""

    def __init__(self, source: TensorSource, to: TensorSource, blocks: Blocks, counterpart: Counterpart) -> None:
        self.source, self.to, self.counterpart, self.left = source, to, counterpart, list(blocks.left)
        self.blocks = [block for block in blocks.found if self.has_counterpart(block)]
        if not self.blocks:
            why = f" ({self.left[0]})" if self.left else ""
            raise MergeError(f"align: nothing of {source.label} is described by a table{why}")
        for slot in (slot for block in self.blocks for slot in block.slots):
            own, theirs = source.shape(slot.key), to.shape(counterpart(slot.key))
            if own != theirs:
                raise MergeError(f"align: {slot.key} has shape {own}, and {theirs} in {to.label}")
        self.orders: Orders = {s: np.arange(s.length) for block in self.blocks for s in block.slots}
        self.by_key: dict[str, list[Slot]] = {}
        for slot in self.orders:
            self.by_key.setdefault(slot.key, []).append(slot)
        self.tied_together = any(len({s.axis for s in own}) > 1 for own in self.by_key.values())

    def has_counterpart(self, block: Block) -> bool:
        """Whether the reference has all tensors of a block; a model may be matched with a part of a larger one."""
        missing = next((slot.key for slot in block.slots if self.counterpart(slot.key) not in self.to), None)
        if missing is not None:
            self.left.append(f"{block.label}: {self.to.label} has no {self.counterpart(missing)}; it keeps its order")
        return missing is None

    def solve(self) -> Alignment:
        with single_thread():
            before = [self.distance(block) for block in self.blocks]
            passes = self.ascend()
            reports = [
                BlockReport(b.label, b.kind, b.size, self.moved(b), first, self.distance(b))
                for b, first in zip(self.blocks, before, strict=True)
            ]
        return Alignment(self.permutations(), reports, self.left, passes)

    def ascend(self) -> int:
        """Settle every block until none changes; returns the number of passes. Where the residual stream moves too, it
        is first matched on tensors that depend on nothing else (embeddings, norms): a good place to start from."""
        if not self.tied_together:
            for block in self.blocks:
                self.settle(block)
            return 1
        for block in self.blocks:
            if block.kind == "residual":
                self.settle(block, tuple(s for s in block.slots if len({o.axis for o in self.by_key[s.key]}) == 1))
        for number in range(1, PASSES + 1):
            changed = [self.settle(block) for block in self.blocks]
            if not any(changed):
                return number
        return PASSES

    def settle(self, block: Block, slots: tuple[Slot, ...] | None = None) -> bool:
        """Give a block its best order, the others as they are; whether that changed anything."""
        found = (
            self.ordered_heads(block) if isinstance(block, Heads) else self.ordered_units(block, slots or block.slots)
        )
        different = any(not np.array_equal(self.orders[s], order) for s, order in found.items())
        if different and self.gain(block, found, slots) <= 0:
            return False  # another order that is as good: keep this one, or ascent would not end
        self.orders |= found
        return different

    def gain(self, block: Block, found: Orders, slots: tuple[Slot, ...] | None) -> float:
        """What new orders add to the similarity of a block, relative to its size."""
        old = new = size = 0.0
        for slot in filter(self.is_compared, slots or block.slots):
            a, b = self.rows(slot)
            old += float((a * b[self.orders[slot]]).sum())
            new += float((a * b[found[slot]]).sum())
            size += float((a * a).sum() + (b * b).sum())
        return (new - old) / size - 1e-12 if size else 0.0

    def ordered_units(self, block: Units, slots: tuple[Slot, ...]) -> Orders:
        order = best(self.similarity(slots, block.size))
        return dict.fromkeys(block.slots, order)

    def ordered_heads(self, block: Heads) -> Orders:
        size = lambda slots: slots[0].length  # noqa: E731
        modules = [HeadSimilarity(*(self.similarity(part, size(part)) for part in module)) for module in block.modules]
        per_head = self.similarity(block.per_head, block.heads)
        free = {"heads_free": block.free_heads, "qk": block.free_qk, "vo": block.free_vo}
        orders, heads = HeadMatcher(block.heads, block.groups, modules, per_head, **free).solve()
        found: Orders = dict.fromkeys(block.per_head, heads)
        for module, order in zip(block.modules, orders, strict=True):
            found |= spread(module, order)
        return found

    def similarity(self, slots: tuple[Slot, ...], size: int) -> Matrix:
        """Inner products of the reference's units and the other's, added up over slots: (size, size), float64."""
        total = np.zeros((size, size))
        for slot in filter(self.is_compared, slots):
            a, b = self.rows(slot)
            total += a @ b.T
        return total

    def is_compared(self, slot: Slot) -> bool:
        """Whether the reference has a tensor of its own to compare with: experts share the table of positions."""
        return self.to is not self.source or self.counterpart(slot.key) != slot.key

    def rows(self, slot: Slot) -> tuple[Matrix, Matrix]:
        """The units of a slot as rows, of the reference and of the other; other axes in the order found so far."""
        own = self.current(slot.key, without=slot.axis)
        return unit_rows(self.to[self.counterpart(slot.key)].double().numpy(), slot), unit_rows(own, slot)

    def current(self, key: str, without: int | None = None) -> np.ndarray:
        """A tensor of the other model as it stands, but for one axis."""
        values = self.source[key].double().numpy()
        for step in self.steps(key):
            if step.axis != without:
                values = permuted(values, step)
        return values

    def steps(self, key: str) -> list[Permutation]:
        """The permutations of one tensor: one for each axis, or for each run of rows."""
        shape = self.source.shape(key)
        indices: dict[tuple[int, tuple[int, int] | None], Order] = {}
        for slot in self.by_key.get(key, ()):
            index = indices.setdefault((slot.axis, slot.rows), np.arange(shape[slot.axis]))
            index[slot.start : slot.start + slot.length] = slot.start + self.orders[slot]
        moved = ((axis, rows, index) for (axis, rows), index in indices.items())
        return [Permutation(axis, i, rows) for axis, rows, i in moved if not np.array_equal(i, np.arange(len(i)))]

    def permutations(self) -> dict[str, tuple[Permutation, ...]]:
        steps = {key: tuple(self.steps(key)) for key in self.by_key}
        return {key: own for key, own in steps.items() if own}

    def moved(self, block: Block) -> int:
        return max(int((self.orders[s] != np.arange(s.length)).sum()) for s in block.slots)

    def distance(self, block: Block) -> float:
        """||reference - other|| / ||reference|| over the block's slots."""
        lost = total = 0.0
        for slot in filter(self.is_compared, block.slots):
            reference = unit_rows(self.to[self.counterpart(slot.key)].double().numpy(), slot)
            other = unit_rows(self.current(slot.key), slot)
            lost, total = lost + float(((reference - other) ** 2).sum()), total + float((reference**2).sum())
        return (lost / total) ** 0.5 if total else float(lost > 0)


def spread(module: Module, order: Any) -> Orders:
    return {slot: own for slots, own in zip(module, order, strict=True) for slot in slots}


def unit_rows(values: np.ndarray, slot: Slot) -> Matrix:
    """The units of a slot as rows of a matrix."""
    if slot.rows is not None:
        values = values[slot.rows[0] : slot.rows[1]]
    values = np.moveaxis(values, slot.axis, 0)[slot.start : slot.start + slot.length]
    return np.ascontiguousarray(values).reshape(slot.length, -1)


def permuted(values: np.ndarray, step: Permutation) -> np.ndarray:
    if step.rows is None:
        return values.take(step.index, step.axis)
    values = values.copy()
    first, last = step.rows
    values[first:last] = values[first:last].take(step.index, step.axis)
    return values
