"""The diagonal of the Fisher information, E[g^2] of every weight: Matena & Raffel, 2021 (arXiv 2111.09832), eq. 3."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import MergeError, nearest
from .files import Statistics
from .passes import Forward, call, count_samples, evaluating, on_device

Labels = Literal["data", "sampled", "expected"]


def collect_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    labels: Labels = "sampled",
    forward: Forward = call,
    weights: str | Sequence[str] = "*",
    seed: int = 0,
    limit: int | None = None,
    progress: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> Statistics:
    """Sum the squared gradients of log p(y | x) over samples, for every parameter, in float64.

    Gradients are squared sample by sample. The square of a batch's mean gradient is another quantity: over B samples,
    opposite gradients cancel and independent ones shrink to E[g^2] / B. So each sample is passed alone, at the cost of
    one backward pass a sample.

    model: put into eval mode and back. batches: mappings of tensors with the samples along the first axis (moved to the
    model's device); where tensors differ in length, give batches of one sample. ``limit`` takes the first batches.
    labels: "sampled" draws y from the model's own prediction by ``seed`` (Fisher information proper, no labels needed);
    "expected" sums over all classes, one backward pass each, for one prediction a sample; "data" takes the gradient of
    the model's own loss at the labels of the batch (empirical Fisher; a token loss is the mean over a sample's tokens).
    forward: how a sample is passed (default ``model(**sample)``); it returns the model's output, or the logits
    (1, classes) or (1, T, vocabulary), or for "data" the loss. Of T predictions those count whose ``labels`` in the
    batch are not -100, else those of the ``attention_mask``, else all. A loss that compares the samples of a batch has
    no gradient of one sample: score one image against a fixed list of texts instead, by ``forward``. weights: globs
    over names of parameters.

    The sums come with the number of samples; ``fisher`` divides by it.
    """
    if labels not in get_args(Labels):
        raise MergeError(f"labels is 'data', 'sampled' or 'expected', not {labels!r}")
    names = chosen_weights(model, weights)
    sums = {p: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in names}
    random, samples = torch.Generator().manual_seed(seed), 0
    with evaluating(model), requiring_gradients(sums), torch.enable_grad():
        for batch in on_device(batches, model, limit, progress, "fisher"):
            for sample in single_samples(batch):
                for weight, score in scores(forward(model, sample), sample, labels, random):
                    add_squares(sums, weight, score)
                samples += 1
    noted = {"labels": labels} | ({"seed": seed} if labels == "sampled" else {})
    named = {name: sums[p].cpu() for p, own in names.items() for name in own} if samples else {}
    return Statistics("fisher", named, dict.fromkeys(named, samples), samples, {**noted, **(metadata or {})})


def chosen_weights(model: nn.Module, weights: str | Sequence[str]) -> dict[nn.Parameter, list[str]]:
    """Parameters and their names (several where they are tied), of those that one of the globs matches."""
    globs = [weights] if isinstance(weights, str) else list(weights)
    chosen: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() and any(fnmatchcase(name, g) for g in globs):
            chosen.setdefault(parameter, []).append(name)
    if not chosen:
        raise MergeError(f"no weight is called {globs}{nearest(globs[0], [n for n, _ in model.named_parameters()])}")
    return chosen


@contextmanager
def requiring_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters, frozen or not, and each one's own setting again afterwards."""
    before = {p: p.requires_grad for p in parameters}
    for p in before:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, required in before.items():
            p.requires_grad_(required)


def single_samples(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The samples of a batch as batches of one."""
    count = count_samples(batch)
    for key, value in batch.items():
        if isinstance(value, Tensor) and count != 1 and (value.ndim == 0 or len(value) != count):
            raise MergeError(
                f"{key} {tuple(value.shape)} has no axis of {count} samples; give batches of one sample, or a forward"
            )
    for i in range(count):
        yield {k: v[i : i + 1] if isinstance(v, Tensor) and count != 1 else v for k, v in batch.items()}


def scores(
    output: Any, sample: Mapping[str, Any], labels: Labels, random: torch.Generator
) -> Iterator[tuple[float, Tensor]]:
    """What to differentiate for one sample, each with the weight of its squared gradient."""
    if labels == "data":
        loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
        if loss is None or loss.numel() != 1:
            raise MergeError("labels 'data' needs a loss: give labels in the batches, or a forward that returns it")
        yield 1.0, loss
        return
    log_p = log_probabilities(output, sample)  # (predictions, classes)
    if labels == "sampled":
        drawn = torch.multinomial(log_p.detach().float().exp().cpu(), 1, generator=random).to(log_p.device)
        yield 1.0, log_p.gather(1, drawn).sum()
        return
    if len(log_p) != 1:
        raise MergeError(f"labels 'expected' takes one prediction a sample, not {len(log_p)}; use 'sampled'")
    for score in log_p[0]:
        yield float(score.detach().exp()), score


def log_probabilities(output: Any, sample: Mapping[str, Any]) -> Tensor:
    """log p of every class for each prediction of a sample that counts, (predictions, classes)."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None or logits.ndim not in (2, 3) or len(logits) != 1:
        what = "none" if logits is None else str(tuple(logits.shape))
        raise MergeError(f"one sample gives logits (1, classes) or (1, T, vocabulary), not {what}; give a forward")
    if logits.shape[-1] == 1:
        raise MergeError("one logit is no distribution over classes; use labels 'data'")
    log_p = logits[0].log_softmax(-1)
    if log_p.ndim == 1:
        return log_p[None]
    given, mask = sample.get("labels"), sample.get("attention_mask")
    fits = lambda t: isinstance(t, Tensor) and t.shape == logits.shape[:2]  # noqa: E731
    counted = given[0] != -100 if fits(given) else mask[0].bool() if fits(mask) else None
    return log_p if counted is None else log_p[counted]


def add_squares(sums: Mapping[nn.Parameter, Tensor], weight: float, score: Tensor) -> None:
    gradients = torch.autograd.grad(score, list(sums), retain_graph=True, allow_unused=True)
    for total, g in zip(sums.values(), gradients, strict=True):
        if g is not None:
            g = g.double()
            total.addcmul_(g, g, value=weight)
