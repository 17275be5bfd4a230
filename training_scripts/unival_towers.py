"""One run of a tower for several texts about one medium. Used by `train_unival.py`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def towers_run_once(model: nn.Module) -> Iterator[None]:
    """
    Rows that stand side by side with the same medium share one run of its tower, whose features are repeated.

    In evaluation no number changes; in training each medium counts once, in the statistics of BatchNorm and in what is
    drawn at random.
    """
    handles = []
    for kind in model.config.towers:
        rows, tower = Repeats(), model.get_submodule(f"model.encoder.{kind}_tower")
        handles += [tower.register_forward_pre_hook(rows.fold), tower.register_forward_hook(rows.unfold)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Repeats:
    """Which rows of a batch repeat the row before them."""

    def fold(self, tower: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """(B, ...) -> (media, ...)"""
        (media,) = inputs
        new = torch.ones(len(media), dtype=torch.bool, device=media.device)
        new[1:] = (media[1:] != media[:-1]).flatten(1).any(dim=1)
        self.medium = new.cumsum(dim=0) - 1  # (B,)
        return (media[new],)

    def unfold(self, tower: nn.Module, inputs: tuple[torch.Tensor], features: torch.Tensor) -> torch.Tensor:
        """(media, ...) -> (B, ...)"""
        return features[self.medium]
