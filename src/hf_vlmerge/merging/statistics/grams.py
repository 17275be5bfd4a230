"""Gram matrices of layers' inputs, collected by hooks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal
from weakref import ref as weak

import torch
from torch import Tensor, nn

from ..errors import MergeError, nearest
from .files import Statistics
from .passes import Forward, call, count_samples, evaluating, on_device

Padding = Literal["include", "exclude"]
TokenMask = Callable[
    [str, Tensor, Any], Tensor | None
]  # (module name, input, batch) -> bool mask over its rows, or None
ROWS = 4096  # input rows of one product in float32
COLUMNS = 256  # of one block of a product: blocks below the diagonal are not computed


@torch.no_grad()
def collect_grams(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward = call,
    modules: str | Sequence[str] = "*",
    padding: Padding = "include",
    image_tokens: int | None = None,
    token_mask: TokenMask | None = None,
    sample_tokens: float | int | None = None,
    seed: int = 0,
    limit: int | None = None,
    progress: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> Statistics:
    """Sum X^T X over the inputs X (rows, in) of every ``nn.Linear`` that is called, and count the rows of X.

    model: put into eval mode and back. batches: mappings of tensors (moved to the model's device); ``limit`` takes the
    first ones. forward: how a batch is passed (default ``model(**batch)``). modules: globs over module names; leaving
    out the second layer of feed-forward blocks, four times as wide as the others, saves most of the work.

    Products of at most 4096 rows are taken in float32 and added up in float64, the upper triangle only. Layers that are
    fed by one tensor (q, k and v) share one product and one sum.

    padding "include" counts every row, as the released code of arXiv 2304.14933 does. "exclude" leaves out padded text
    tokens by the batch's ``attention_mask`` (B, T). What an input's rows are follows from their number: T rows a sample
    are text, ``image_tokens`` = F rows are image, T + F rows are the joint sequence, text first; one row a sample is a
    pooled token. Anything else is an error, for which ``token_mask(module_name, input, batch)`` is the answer: it
    returns a mask of the input's shape without its last axis, or None to count all rows.

    sample_tokens: take only some rows of each input in each batch, drawn without replacement by ``seed``: a share (a
    float up to 1) or a number of rows (an int). Sums are scaled up to all N rows, so their expectation and the token
    counts are the same. Where rows are like independent Gaussian draws, the relative error of a Gram G from m rows in
    all is, in Frobenius norm, about sqrt((1 - m / N) (1 + r) / m) with r = tr(G)^2 / |G|^2, its effective rank (1 to
    the width). Rows of one sample resemble each other, so a share of many samples beats all rows of few.
    """
    if padding not in ("include", "exclude"):
        raise MergeError(f"padding is 'include' or 'exclude', not {padding!r}")
    if padding == "exclude" and token_mask is None:
        token_mask = partial(mask_by_length, image_tokens=image_tokens)
    collector = Collector(token_mask if padding == "exclude" else None, Sampling(sample_tokens, seed))
    samples = 0
    with evaluating(model), collector.hooked(linear_layers(model, modules)):
        for batch in on_device(batches, model, limit, progress, "grams"):
            with collector.over(batch):
                forward(model, batch)
            samples += count_samples(batch)
    noted = {"padding": padding} | ({} if sample_tokens is None else {"sample_tokens": sample_tokens, "seed": seed})
    return Statistics("gram", *collector.sums(), samples, {**noted, **(metadata or {})})


def linear_layers(model: nn.Module, modules: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose names match one of the globs."""
    globs = [modules] if isinstance(modules, str) else list(modules)
    named = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = {n: m for n, m in named.items() if any(fnmatchcase(n, g) for g in globs)}
    if not chosen:
        names = [n for n, _ in model.named_modules() if n]
        raise MergeError(f"no linear layer is called {globs}{nearest(globs[0], names)}")
    return chosen


class Sampling:
    """A reproducible choice of an input's rows: ``amount`` is a share, a number, or None for all."""

    def __init__(self, amount: float | int | None, seed: int) -> None:
        right = amount is None or (amount >= 1 if isinstance(amount, int) else 0 < amount <= 1)
        if isinstance(amount, bool) or not right:
            raise MergeError(f"sample_tokens is a share up to 1.0 or a whole number of rows, not {amount!r}")
        self.amount, self.random = amount, torch.Generator().manual_seed(seed)

    def __call__(self, rows: Tensor) -> tuple[Tensor, float]:
        """Some of the rows, and the factor that makes their sum stand for all of them."""
        count = len(rows)
        wanted = self.amount if isinstance(self.amount, int) else round(count * (self.amount or 1.0))
        wanted = min(count, max(1, wanted))
        if wanted == count or self.amount is None:
            return rows, 1.0
        chosen = torch.randperm(count, generator=self.random)[:wanted].sort().values
        return rows[chosen.to(rows.device)], count / wanted


@dataclass
class Feed:
    """One input of one batch: the layers that it feeds, what it was, and its product."""

    names: list[str]
    x: Callable[[], Tensor | None]
    version: int
    mask: Tensor | None
    product: Tensor  # (in, in) float32, blocks on and above the diagonal
    factor: float
    rows: int

    def is_fed_by(self, x: Tensor, mask: Tensor | None) -> bool:
        own = self.x()
        same = own is x or (own is not None and is_view_of_all(own, x))
        if not same or self.version != version(x) or (mask is None) != (self.mask is None):
            return False
        return mask is None or torch.equal(mask, self.mask)


def is_view_of_all(x: Tensor, other: Tensor) -> bool:
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) == (other.data_ptr(), other.shape, other.stride(), other.dtype)


def version(x: Tensor) -> int:
    """A number that changes when x is written to."""
    return 0 if x.is_inference() else x._version


class Collector:
    """Hooks on linear layers that add up the Gram matrices of their inputs.

    Sums are kept for each group of layers that one input fed, so what is fed together is added up once.
    """

    def __init__(self, token_mask: TokenMask | None = None, sampling: Sampling | None = None) -> None:
        self.token_mask, self.sampling = token_mask, sampling or Sampling(None, 0)
        self.totals: dict[tuple[str, ...], Tensor] = {}
        self.rows: dict[tuple[str, ...], int] = {}
        self.batch: Any = None
        self.last: Feed | None = None

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

    @contextmanager
    def over(self, batch: Any) -> Iterator[None]:
        """While this batch is passed through the model."""
        self.batch = batch
        yield
        self.close()

    def hook(self, name: str, module: nn.Linear, arguments: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        x = arguments[0] if arguments else named["input"]
        mask = None if self.token_mask is None else self.token_mask(name, x, self.batch)
        if mask is not None and mask.shape != x.shape[:-1]:
            raise MergeError(f"{name}: the token mask is {tuple(mask.shape)}, the input {tuple(x.shape)}")
        if self.last is not None and self.last.is_fed_by(x, mask):
            self.last.names.append(name)
            return
        self.close()
        rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask.bool()]
        chosen, factor = self.sampling(rows)
        self.last = Feed([name], weak(x), version(x), mask, upper_gram(chosen), factor, len(rows))

    def close(self) -> None:
        """Add the last input's product to the sum of the layers that it fed."""
        feed, self.last = self.last, None
        if feed is None:
            return
        key = tuple(f"{name}.weight".lstrip(".") for name in feed.names)
        self.rows[key] = self.rows.get(key, 0) + feed.rows
        if key not in self.totals:
            self.totals[key] = torch.zeros(feed.product.shape, dtype=torch.float64, device=feed.product.device)
        for a, b in column_blocks(len(feed.product)):
            self.totals[key][a:b, a:].add_(feed.product[a:b, a:], alpha=feed.factor)

    def sums(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The whole Gram matrix and the number of rows of each weight; weights that were always fed together share."""
        groups: dict[str, list[tuple[str, ...]]] = {}
        for key in self.totals:
            for name in key:
                groups.setdefault(name, []).append(key)
        parts = {key: mirrored(total).cpu() for key, total in self.totals.items()}
        whole: dict[tuple, Tensor] = {}  # a name's sum may have several parts, where batches feed layers differently
        for keys in groups.values():
            if tuple(keys) not in whole:
                whole[tuple(keys)] = parts[keys[0]] if len(keys) == 1 else sum(parts[k] for k in keys)
        sums = {name: whole[tuple(keys)] for name, keys in groups.items()}
        return sums, {name: sum(self.rows[k] for k in keys) for name, keys in groups.items()}


def column_blocks(width: int) -> list[tuple[int, int]]:
    return [(a, min(a + COLUMNS, width)) for a in range(0, width, COLUMNS)]


def upper_gram(rows: Tensor) -> Tensor:
    """X^T X in float32 of the rows X (n, in); of blocks below the diagonal nothing is computed."""
    width = rows.shape[1]
    product = torch.zeros(width, width, dtype=torch.float32, device=rows.device)
    for part in rows.split(ROWS):
        part = part.float()
        for a, b in column_blocks(width):
            product[a:b, a:].addmm_(part[:, a:b].T, part[:, a:])
    return product


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle, in place."""
    for a, b in column_blocks(len(upper)):
        diagonal = upper[a:b, a:b].triu()
        upper[a:b, a:b] = diagonal + diagonal.triu(1).T
        upper[b:, a:b] = upper[a:b, b:].T
    return upper


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
