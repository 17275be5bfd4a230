"""Writing what a conversion made: our folders, and files that `torch.load` reads."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from hf_vlmerge.merging.tensors import save_checkpoint
from hf_vlmerge.merging.tensors.sinks import explained
from hf_vlmerge.models.vlmo import modeling_vlmo
from hf_vlmerge.models.vlmo.configuration_vlmo import VlmoConfig
from hf_vlmerge.models.vlmo.image_processing_vlmo import VlmoImageProcessor
from hf_vlmerge.models.vlmo.processing_vlmo import VlmoProcessor

Finish = Callable[[Path], None]  # called with the temporary folder before it gets its name


def make_fresh(architecture: str, config: VlmoConfig, seed: int | None) -> dict[str, torch.Tensor]:
    """A model's state dict at initial values; without a seed on the meta device, where nothing is allocated."""
    make = getattr(modeling_vlmo, architecture)
    if seed is None:
        with torch.device("meta"):
            return make(config).state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(config).state_dict()


def check_shapes(config: VlmoConfig, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
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
    config: VlmoConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    tokenizer: str | None = None,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Path:
    """A folder for `from_pretrained`: weights, config.json, processor (without a tokenizer its image part alone)."""
    config.architectures = [architecture]
    config.dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    processor = make_processor(config, tokenizer)

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


def make_processor(config: VlmoConfig, tokenizer: str | None) -> VlmoProcessor | VlmoImageProcessor:
    """The processor that fits a configuration."""
    image_processor = VlmoImageProcessor(size={"height": config.image_size, "width": config.image_size})
    if tokenizer is None:
        return image_processor
    from transformers import BertTokenizer

    words = BertTokenizer.from_pretrained(tokenizer)
    if len(words) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(words)} words, but the model's vocabulary is {config.vocab_size}.")
    return VlmoProcessor(image_processor, words, max_text_length=config.max_text_length)


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
