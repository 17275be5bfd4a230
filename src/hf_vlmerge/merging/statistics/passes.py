"""What all collectors do: pass batches through a model that is in eval mode for the time being."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ..errors import MergeError

Forward = Callable[[nn.Module, Any], Any]  # (model, batch) -> the model's output


def call(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The usual forward: the batch's entries are the model's arguments."""
    return model(**batch)


def on_device(batches: Iterable[Any], model: nn.Module, limit: int | None, progress: bool, what: str) -> Iterator[Any]:
    """The first ``limit`` batches, their tensors on the model's device."""
    device = next(model.parameters()).device
    total = limit if limit is not None else (len(batches) if hasattr(batches, "__len__") else None)
    for batch in tqdm(islice(batches, limit), total=total, desc=what, disable=not progress):
        if not isinstance(batch, Mapping):
            raise MergeError(f"a batch is a mapping of a model's arguments, not {type(batch).__name__}")
        yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def count_samples(batch: Mapping[str, Any]) -> int:
    return next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), 0)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode, and each module's own mode again afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
