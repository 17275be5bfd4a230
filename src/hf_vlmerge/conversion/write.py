"""Writing what a conversion made: our folders, and files that `torch.load` reads."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_vlmerge.merging.tensors import save_checkpoint
from hf_vlmerge.merging.tensors.sinks import explained
from hf_vlmerge.models.unival import modeling_unival
from hf_vlmerge.models.vlmo import modeling_vlmo

Finish = Callable[[Path], None]  # called with the temporary folder before it gets its name
MODULES = {"vlmo": modeling_vlmo, "unival": modeling_unival}  # model_type -> where its classes are


def make_fresh(architecture: str, config: Any, seed: int | None) -> dict[str, torch.Tensor]:
    """
    A model's tensors at initial values, tied ones under their first name only; without a seed on the meta device,
    where nothing is allocated.
    """
    make = getattr(MODULES[config.model_type], architecture)
    if seed is None:
        with torch.device("meta"):
            model = make(config)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make(config)
    return {key: tensor for key, tensor in model.state_dict().items() if key not in model.all_tied_weights_keys}


def check_shapes(config: Any, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the tensors are exactly those of the model."""
    expected = {key: tuple(tensor.shape) for key, tensor in make_fresh(architecture, config, seed=None).items()}
    if set(shapes) != set(expected):
        raise ValueError(
            f"{architecture} does not have the tensor {min(set(shapes) ^ set(expected))!r}, or has it alone."
        )
    for key, shape in expected.items():
        if tuple(shapes[key]) != shape:
            raise ValueError(f"{key} has shape {tuple(shapes[key])}; these sizes need {shape}.")


def write_model(
    output: str | Path,
    architecture: str,
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    *,
    processor: Any,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Path:
    """A folder for `from_pretrained`: weights, config.json, and a processor or what there is of one."""
    config.architectures = [architecture]
    config.dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())

    def complete(folder: Path) -> None:
        processor.save_pretrained(folder)
        if finish is not None:
            finish(folder)

    return save_checkpoint(
        output,
        tensors,
        config=json.loads(config.to_json_string()),
        finish=complete,
        overwrite=overwrite,
    )


def write_torch(output: str | Path, content: dict, *, overwrite: bool = False) -> Path:
    """`torch.save` to a temporary sibling, then rename: the file is there whole or not at all."""
    output = Path(output).expanduser()
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; choose another name or say --overwrite.")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.partial")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
        os.replace(temporary, output)
    except RuntimeError as error:  # torch's writer hides what the system said
        if isinstance(error.__context__, OSError):
            raise explained(error.__context__, output) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return output
