"""What scores a merged candidate: a metric of a model that its tensors are loaded into, or a command."""

import math
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import MergeError, closest

Objective = Callable[[dict[str, Tensor]], float]
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\b(?:nan|inf)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Command:
    """An evaluation command: ``{folder}`` stands for a merged candidate, the last number it prints is the score."""

    text: str
    timeout: float | None = None  # seconds

    def __post_init__(self) -> None:
        if "{folder}" not in self.text:
            raise MergeError(f"the command says by {{folder}} where the candidate stands; {self.text!r} does not")

    def __call__(self, folder: Path) -> float:
        words = [word.replace("{folder}", str(folder)) for word in shlex.split(self.text)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=self.timeout)
        except subprocess.TimeoutExpired:
            raise MergeError(f"the command still ran after {self.timeout:g} s") from None
        except OSError as error:
            raise MergeError(f"the command {words[0]!r} cannot be run ({error.strerror})") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise MergeError(f"the command ended with status {done.returncode} and said: {said}")
        numbers = NUMBER.findall(done.stdout)
        if not numbers:
            raise MergeError("the command printed no number")
        return float(numbers[-1])


def load_into(model: nn.Module, metric: Callable[[nn.Module], float]) -> Objective:
    """An objective that loads each candidate into ``model`` and asks ``metric(model)``, in eval mode.

    The model must have exactly the merged tensors (tied ones once). Where a class of transformers stores its tensors
    under other names than it has them, its own loading renames them. Afterwards the model holds the last candidate.
    """
    own = model.state_dict(keep_vars=True)

    def objective(tensors: Mapping[str, Tensor]) -> float:
        if tensors.keys() - own.keys() and hasattr(model, "from_pretrained"):
            tensors = renamed(model, tensors)
        for name, value in tensors.items():
            if name not in own or own[name].shape != value.shape:
                shape = f" of shape {tuple(own[name].shape)}" if name in own else closest(name, own)
                raise MergeError(f"{name} {tuple(value.shape)} is merged, but the model has no such tensor{shape}")
        filled = {own[name].data_ptr() for name in tensors}
        lacking = [name for name, value in own.items() if value.data_ptr() not in filled and value.numel()]
        if lacking:
            raise MergeError(f"the merged tensors lack {lacking[0]}{closest(lacking[0], tensors)}")
        model.load_state_dict(tensors, strict=False)
        was_training = model.training
        model.eval()
        try:
            return metric(model)
        finally:
            model.train(was_training)

    return objective


def renamed(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that a model of transformers has for them, by way of its own loading."""
    options = {"config": model.config, "state_dict": dict(tensors), "dtype": model.dtype}
    fresh, info = type(model).from_pretrained(None, output_loading_info=True, **options)
    for kind, said in (
        ("unexpected_keys", "is merged, but the model has no such tensor"),
        ("missing_keys", "is missing"),
    ):
        if info[kind]:
            name = min(info[kind])
            raise MergeError(f"{name} {said}{closest(name, fresh.state_dict())}")
    return fresh.state_dict()


def number(value: Any) -> float:
    """A score; anything that cannot be compared is refused."""
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise MergeError(f"the objective returned {value!r}, not a number") from None
    if not math.isfinite(score):
        raise MergeError(f"the objective returned {score}")
    return score
