"""Initial weights of UnIVAL from trained parts, as its pre-training starts from: BART for the transformer, a ResNet for
images, a 3-D ResNeXt for clips, Cnn14 for sounds. What no part has starts at the model's own initial values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_vlmerge.conversion.convert_unival_to_hf import (
    ARCHITECTURE,
    as_float32,
    checked_settings,
    make_config,
    make_processor,
    sizes,
)
from hf_vlmerge.conversion.report import ConversionReport
from hf_vlmerge.conversion.unival_init_keys import original_name, reason_unused
from hf_vlmerge.conversion.unival_keys import PREFIX, RECOMPUTED, TIED, our_key
from hf_vlmerge.conversion.unival_sizes import infer_sizes
from hf_vlmerge.conversion.write import Finish, make_fresh, write_model
from hf_vlmerge.merging.tensors import open_source
from hf_vlmerge.models.unival.configuration_unival import UnivalConfig

EMBEDDING = "encoder.embed_tokens.weight"
POSITIONS = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")
BART_OFFSET = 2  # BART keeps the position of its first token in row 2, UnIVAL in row 0
NEW_TOKENS = 8192 + 1000  # image codes and location bins


def convert_initial(
    output: str | Path,
    *,
    bart: str | Path,
    image: str | Path | None = None,
    video: str | Path | None = None,
    audio: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    image_size: int = 480,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> ConversionReport:
    """
    A `UnivalForConditionalGeneration` folder in float32 that starts from trained parts.

    Sizes come from the parts. Position p of a text takes BART's row p + 2. The embedding gets 9 192 rows after those of
    BART (or as many as `settings` say), drawn from a normal distribution of deviation d^-1/2.

    Args:
        bart, image, video, audio: whatever `open_source` takes; a tower without a source is not built.
        settings: fields of the configuration that override what was inferred.
        seed: of every value that no part has.
        image_size, tokenizer, finish: see `convert_to_hf` of unival.py.

    Raises:
        ValueError: a key that no table knows, a tensor without a place in the model, or sizes that do not agree.
    """
    parts = {"bart": bart, "image": image, "video": video, "audio": audio}
    tensors: dict[str, torch.Tensor] = {}
    dropped: dict[str, str] = {}
    labels, heads = [], {}
    for part, source in parts.items():
        if source is None:
            continue
        with open_source(source) as opened:
            labels.append(opened.label)
            found, unused = read_part(part, opened)
            if part == "bart" and "encoder_attention_heads" in (opened.config or {}):
                heads = {"num_attention_heads": opened.config["encoder_attention_heads"]}
        tensors |= found
        dropped |= unused
    config = initial_config(tensors, checked_settings(settings), heads)
    model, partly = fill(make_fresh(ARCHITECTURE, config, seed), tensors, seed)
    taken = {PREFIX + our_key(key) for key in tensors}
    processor = make_processor(config, tokenizer, image_size)
    write_model(output, ARCHITECTURE, config, model, processor=processor, overwrite=overwrite, finish=finish)
    return ConversionReport(
        source=" + ".join(labels),
        output=str(output),
        architecture=ARCHITECTURE,
        converted=len(taken),
        dropped=dropped,
        fresh=[*partly, *(key for key in model if key not in taken)],
        config=sizes(config),
    )


def read_part(part: str, source: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Original name -> tensor in float32, and source key -> why it is not used."""
    found: dict[str, torch.Tensor] = {}
    dropped: dict[str, str] = {}
    for key in source:
        name = original_name(part, key)
        if name is None:
            why = reason_unused(part, key)
            if why is None:
                raise ValueError(f"the {part} checkpoint has a tensor {key!r}, which none of the known kinds has.")
            dropped[key] = f"{part}: {why}"
            continue
        name = TIED.get(name, name)
        if name in found:
            if not torch.equal(as_float32(source[key]), found[name]):
                raise ValueError(f"the {part} checkpoint holds two different tensors for {name!r}; one is {key!r}.")
            dropped[key] = f"{part}: second name of one tensor"
            continue
        found[name] = as_float32(source[key])
    return found, dropped


def initial_config(
    tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any], heads: Mapping[str, int]
) -> UnivalConfig:
    """Sizes of the parts, BART's heads, room for codes and bins; settings override."""
    found = infer_sizes({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    if EMBEDDING not in tensors:
        raise ValueError("the BART checkpoint has no embedding (shared.weight).")
    found["vocab_size"] += NEW_TOKENS
    config = make_config({**found, **heads, "grid_size": UnivalConfig.grid_size}, settings)
    if config.vocab_size < len(tensors[EMBEDDING]):
        raise ValueError(f"vocab_size is {config.vocab_size}, but BART has {len(tensors[EMBEDDING])} tokens.")
    return config


def fill(
    model: dict[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], seed: int
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The model's tensors with those of the parts in place, and the names of rows that no part has."""
    model, partly = dict(model), []
    for name, tensor in tensors.items():
        key = place_of(name, model)
        if name == EMBEDDING:
            rows, width = len(tensor), tensor.shape[1]
            new = torch.randn(len(model[key]) - rows, width, generator=torch.Generator().manual_seed(seed))
            tensor = torch.cat([tensor, new * width**-0.5])
            partly.append(f"{key}[{rows}:]")
        elif name in POSITIONS:
            rows = len(tensor) - BART_OFFSET
            tensor = torch.cat([tensor[BART_OFFSET:], model[key][rows : rows + BART_OFFSET]])
            partly.append(f"{key}[{rows}:]")
        if tensor.shape != model[key].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; these sizes need {tuple(model[key].shape)}.")
        model[key] = tensor
    return model, partly


def place_of(name: str, model: Mapping[str, torch.Tensor]) -> str:
    """Our key of an original tensor that the model has."""
    try:
        key = PREFIX + our_key(name) if name not in RECOMPUTED else None
    except KeyError:
        key = None
    if key not in model:
        raise ValueError(f"a part has a tensor for {name!r}, which UnIVAL does not have.")
    return key
