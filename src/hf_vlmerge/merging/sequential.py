"""RegMean++: Nguyen et al., 2025 (arXiv 2508.03121), and the forward passes through a half-merged network it needs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import MergeError, closest, nearest
from .registry import get_merge_method
from .statistics import Statistics
from .statistics.grams import Collector, TokenMask, linear_layers
from .statistics.passes import Forward, call, evaluating, on_device
from .weights import layer_of


@torch.no_grad()
def regmean_plus_plus(
    models: Sequence[nn.Module],
    batches: Sequence[Iterable[Any]],
    *,
    gamma: float = 0.95,
    gram: Literal["mean", "sum"] = "mean",
    blocks: str | Sequence[str] = "*",
    modules: str | Sequence[str] = "*",
    forward: Forward = call,
    token_mask: TokenMask | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Merge models block after block by RegMean on the activations of the already merged blocks; return a new model.

    For each linear layer of block l, W = (sum W_i G_i) (sum G_i)^-1 with G_i = X_i^T X_i: X_i (tokens, in) is what the
    layer receives in member i's own block l when member i's data have passed the merged blocks before l (section 3).
    RegMean takes X_i from member i alone, which is not what the merged layer will see. Everything that is not a linear
    layer of a block is the plain mean: embeddings, norms, biases, heads.

    models: of one architecture; they stay as they are. batches: for each member an iterable of its own data, mappings
    of a model's arguments, of which the first ``limit`` are kept in memory. gamma: factor on off-diagonal entries (0.95
    in the paper for CLIP, 0.1 for Llama). gram: per-token means (the paper's code) or sums. blocks: globs over the
    names of blocks, which are the modules whose name ends at its first all-digits component (``encoder.layers.3``).
    modules: globs over names of linear layers. forward: how a batch is passed (default ``model(**batch)``); each block
    may be called once. token_mask: as for ``collect_grams``, to leave out padding.

    Memory: the models, the batches, and the inputs of one block. Blocks that are merged are not run again where giving
    back their last output leads to the very same input of the next block, which is tried out on each member's first
    batch; where it does not (skip connections), the merged blocks are run for every block that follows.
    """
    check_alike(models)
    if len(batches) != len(models):
        raise MergeError(f"{len(models)} models need as many iterables of batches, not {len(batches)}")
    linear_layers(models[0], modules)  # a glob that matches nothing is an error
    merged = averaged(models)
    data = [list(on_device(own, merged, limit, False, "batches")) for own in batches]
    if not all(data):
        raise MergeError("every member needs at least one batch")
    with evaluating(merged, *models), without_caches(merged, *models):
        replay = Replay(merged, forward, data)
        for name in tqdm(execution_order(replay, blocks), desc="blocks", disable=not progress):
            inputs = replay.inputs(name)
            grams = [
                block_grams(model, name, zip(own, given, strict=True), modules, token_mask)
                for model, own, given in zip(models, data, inputs, strict=True)
            ]
            merge_block(merged, models, grams, gamma=gamma, gram=gram)
            replay.advance(name, inputs)
    return merged


def check_alike(models: Sequence[nn.Module]) -> None:
    """All models have the same tensors."""
    if not models:
        raise MergeError("RegMean++ needs at least one model")
    first, *others = ({k: v.shape for k, v in model.state_dict().items()} for model in models)
    for number, other in enumerate(others, 1):
        for name in first.keys() ^ other.keys():
            lacking = other if name in first else first
            raise MergeError(f"{name} is not in all models{closest(name, lacking)}")
        for name, shape in first.items():
            if other[name] != shape:
                raise MergeError(f"{name}: {tuple(shape)} in the first model, {tuple(other[name])} in model {number}")


def averaged(models: Sequence[nn.Module]) -> nn.Module:
    """A copy of the first model with the mean of all floating tensors."""
    result, states = deepcopy(models[0]), [model.state_dict() for model in models]
    for name, tensor in result.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(sum(state[name].double() for state in states) / len(states))
    return result


@contextmanager
def without_caches(*models: nn.Module) -> Iterator[None]:
    """No cache of keys and values, which a block would extend at every call."""
    configs = {id(c): c for model in models for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    used = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in used:
        config.use_cache = False
    try:
        yield
    finally:
        for config in used:
            config.use_cache = True


def execution_order(replay: "Replay", blocks: str | Sequence[str]) -> list[str]:
    """Names of the blocks with linear layers, in the order in which a forward pass calls them."""
    globs = [blocks] if isinstance(blocks, str) else list(blocks)
    found = [
        name
        for name, module in replay.model.named_modules()
        if (layer := layer_of(name)) and name == f"{layer.prefix}.{layer.index}".lstrip(".")
        if any(isinstance(m, nn.Linear) for m in module.modules())
    ]
    chosen = [name for name in found if any(fnmatchcase(name, glob) for glob in globs)]
    if not chosen:
        raise MergeError(f"no block is called {globs}{nearest(globs[0], found)}")
    orders = [replay.calls(own[0], chosen) for own in replay.data]
    twice = next((n for order in orders for n in order if order.count(n) > 1), None)
    if twice:
        raise MergeError(f"the block {twice} is called more than once a batch; choose one pass by forward")
    if any(order != orders[0] for order in orders) or not orders[0]:
        raise MergeError("the members' batches do not call the same blocks in the same order")
    return orders[0]


Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # what a block was called with


class Reached(Exception):
    """Stops a forward pass at a block, and carries what the block was called with."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs


class Replay:
    """Forward passes of each member's batches through the merged model up to a block.

    ``outputs``: for each stack of blocks what its last merged block gave back, by member and batch.
    """

    def __init__(self, model: nn.Module, forward: Forward, data: list[list[Any]]) -> None:
        self.model, self.forward, self.data = model, forward, data
        self.merged: list[str] = []
        self.outputs: dict[str, list[list[Any]]] = {}

    def calls(self, batch: Any, names: Sequence[str]) -> list[str]:
        """Which of the blocks a whole forward pass calls, in order."""
        called: list[str] = []
        with ExitStack() as hooks:
            for name in names:
                note = lambda *_, name=name: called.append(name)  # noqa: E731
                hooks.callback(self.model.get_submodule(name).register_forward_pre_hook(note).remove)
            self.forward(self.model, batch)
        return called

    def inputs(self, name: str) -> list[list[Inputs]]:
        """What a block is called with, by member and batch."""
        skipped = self.skippable(name)
        return [
            [self.reach(name, batch, self.stubs(skipped, m, b)) for b, batch in enumerate(own)]
            for m, own in enumerate(self.data)
        ]

    def skippable(self, name: str) -> list[str]:
        """Merged blocks that need not run again: all, those of the block's own stack, or none."""
        if not self.merged:
            return []
        exact = [self.reach(name, own[0], {}) for own in self.data]
        own_stack = [other for other in self.merged if stack_of(other) == stack_of(name)]
        for candidate in filter(None, (self.merged, own_stack)):
            try:
                tried = [self.reach(name, own[0], self.stubs(candidate, m, 0)) for m, own in enumerate(self.data)]
            except Exception:  # whatever a model makes of an output that is not the block's own
                continue
            if all(same(a, b) for a, b in zip(exact, tried, strict=True)):
                return list(candidate)
        return []

    def stubs(self, names: Sequence[str], member: int, batch: int) -> dict[nn.Module, Any]:
        return {self.model.get_submodule(name): self.outputs[stack_of(name)][member][batch] for name in names}

    def reach(self, name: str, batch: Any, stubs: Mapping[nn.Module, Any]) -> Inputs:
        """Run the model until it calls the block; blocks with a stub give that back at once."""

        def stop(module: nn.Module, arguments: tuple, named: dict) -> None:
            raise Reached((arguments, named))

        with ExitStack() as undo:
            undo.callback(self.model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True).remove)
            for module, output in stubs.items():
                undo.callback(restore_forward, module, module.__dict__.get("forward"))
                module.forward = lambda *_, output=output, **__: output
            try:
                self.forward(self.model, batch)
            except Reached as reached:
                return reached.inputs
        raise MergeError(f"the block {name} is called for the first batch of its member, but not for another one")

    def advance(self, name: str, inputs: list[list[Inputs]]) -> None:
        """Pass the block's inputs through it, now that it is merged; they are given up one by one."""
        block = self.model.get_submodule(name)
        outputs: list[list[Any]] = []
        for own in inputs:
            outputs.append([])
            while own:
                arguments, named = own.pop(0)
                outputs[-1].append(block(*arguments, **named))
        self.merged.append(name)
        self.outputs[stack_of(name)] = outputs


def restore_forward(module: nn.Module, own: Any) -> None:
    """Take a stub away; ``own`` is what stood in its place, None for the class's forward."""
    if own is None:
        del module.forward
    else:
        module.forward = own


def stack_of(name: str) -> str:
    return layer_of(name).prefix


def same(a: Any, b: Any) -> bool:
    """Whether two arguments of a block are equal to the bit; of other objects than tensors only the type counts."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b)


def copied(value: Any) -> Any:
    """Tensors of its own for a block that might write to its inputs."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value


def block_grams(
    model: nn.Module,
    name: str,
    inputs: Iterable[tuple[Any, Inputs]],
    modules: str | Sequence[str],
    token_mask: TokenMask | None,
) -> Statistics:
    """Grams of the linear layers in a member's own block. inputs: each batch, and what the block is called with."""
    block, globs = model.get_submodule(name), [modules] if isinstance(modules, str) else modules
    layers = {f"{name}.{n}".rstrip("."): m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    collector = Collector(token_mask)
    with collector.hooked({n: m for n, m in layers.items() if any(fnmatchcase(n, g) for g in globs)}):
        for batch, (arguments, named) in inputs:
            with collector.over(batch):
                block(*copied(arguments), **copied(named))
    return Statistics("gram", *collector.sums())


def merge_block(merged: nn.Module, models: Sequence[nn.Module], grams: Sequence[Statistics], **parameters: Any) -> None:
    """RegMean of the weights that have a Gram of every member; the others stay as they are."""
    regmean = get_merge_method("regmean")
    for weight in grams[0].sums:
        if all(weight in own.sums for own in grams):
            tensors = [model.get_parameter(weight).cpu() for model in models]
            sums, tokens = zip(*((own.sums[weight], own.tokens[weight]) for own in grams), strict=True)
            result = regmean(tensors, statistics=sums, tokens=tokens, name=weight, **parameters)
            merged.get_parameter(weight).copy_(result)
