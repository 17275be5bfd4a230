"""BEiT weights as initial weights: vision comes trained, everything else fresh (as in arXiv 2304.14933).

Both flavours are understood: pretrained (one position table for all layers, a norm at the end) and finetuned (a table a
layer, the norm of the pooled mean), under the names of the original files and of `transformers`.
"""

from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path

import torch

from hf_vlmerge.conversion.beit_keys import INSIDE_LAYERS, LAYER, OUTSIDE_LAYERS, POSITION_TABLE, PREFIX
from hf_vlmerge.conversion.convert_vlmo_to_hf import make_processor, sizes
from hf_vlmerge.conversion.report import ConversionReport
from hf_vlmerge.conversion.specialise import experts_of_layer, has_experts
from hf_vlmerge.conversion.vlmo_keys import expand
from hf_vlmerge.conversion.write import Finish, check_shapes, make_fresh, write_model
from hf_vlmerge.merging.tensors import open_source
from hf_vlmerge.models.vlmo.configuration_vlmo import VlmoConfig
from hf_vlmerge.models.vlmo.experts_vlmo import resize_position_table

Tensors = Mapping[str, torch.Tensor]
FRESH = ("embeddings.text.", "embeddings.modality_type_embeddings.", "pooler.")  # what BEiT cannot have


def convert_beit(
    source: str | Path,
    output: str | Path,
    *,
    expert_modules: Iterable[str] = (),
    num_fusion_layers: int = 2,
    image_size: int | None = None,
    vision_weights_for_all: bool = True,
    seed: int = 0,
    tokenizer: str | None = None,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> ConversionReport:
    """
    A `VlmoForPreTraining` folder that starts from BEiT.

    Args:
        image_size: pixels of the new model; by default that of the source. The position table is resized.
        vision_weights_for_all: the other modalities' experts start as copies of vision's, else at random values.
        seed: of the fresh values (text embeddings, modality types, pooler, heads).
        tokenizer, finish: see `convert_to_hf` of vlmo.py.

    Raises:
        ValueError: a source key that no table knows, or a tensor of a block that the source lacks.
    """
    with open_source(source) as tensors:
        parts, dropped = sort_keys(tensors)
        config = infer_config(tensors, parts)
        config = VlmoConfig(
            **config | {"expert_modules": list(expert_modules), "num_fusion_layers": num_fusion_layers},
        )
        config.image_size = image_size or config.image_size
        trained = initial_weights(tensors, config, vision_weights_for_all=vision_weights_for_all)
        label = tensors.label
    model = make_fresh("VlmoForPreTraining", config, seed)
    fresh = [key for key in model if key.removeprefix("vlmo.") not in trained]
    complete = {key: trained.get(key.removeprefix("vlmo."), value) for key, value in model.items()}
    check_shapes(config, "VlmoForPreTraining", {key: tuple(tensor.shape) for key, tensor in complete.items()})
    processor = make_processor(config, tokenizer)
    write_model(output, "VlmoForPreTraining", config, complete, processor=processor, overwrite=overwrite, finish=finish)
    return ConversionReport(
        source=label,
        output=str(output),
        architecture="VlmoForPreTraining",
        converted=len(trained),
        dropped=dropped,
        fresh=fresh,
        config=sizes(config),
    )


def initial_weights(tensors: Tensors, config: VlmoConfig, *, vision_weights_for_all: bool = True) -> dict:
    """
    The tensors of a `VlmoModel` that BEiT gives, under our names; the others keep their fresh values.

    Shapes:
        as in the model; the position table ((2g-1)^2 + 5 + 2S, N * heads) has zeros in its cross and text rows
    """
    parts, _ = sort_keys(tensors)
    result: dict[str, torch.Tensor] = {"encoder.relative_position_bias_table": position_table(tensors, parts, config)}
    for (layer, name), keys in parts.items():
        if name == POSITION_TABLE:
            continue
        value = torch.cat([tensors[key] for key in keys]) if "qkv" in name else tensors[keys[0]]
        if layer is None:
            result[name] = value
            continue
        module = name.split(".")[0]
        experts = ("shared",)
        if has_experts(module, config.expert_modules):
            experts = experts_of_layer(layer, config.num_hidden_layers, config.num_fusion_layers)
            experts = experts if vision_weights_for_all else ("vision",)
        for expert in experts:
            result[f"encoder.layers.{layer}.{name.format(e=expert)}"] = value.clone()
    require_all(result, config, vision_weights_for_all)
    return result


def sort_keys(tensors: Iterable[str]) -> tuple[dict[tuple[int | None, str], list[str]], dict[str, str]]:
    """
    (layer or None, our name with `{e}`) -> source keys in the order of their rows; and source key -> why it is dropped.

    Raises:
        ValueError: a key that no table knows.
    """
    outside, inside = expand_all(OUTSIDE_LAYERS), expand_all(INSIDE_LAYERS)
    parts: dict[tuple[int | None, str], list[tuple[str, str]]] = {}
    dropped: dict[str, str] = {}
    for key in tensors:
        stripped = PREFIX.sub("", key)
        match = LAYER.match(stripped)
        table, name = (inside, match[2]) if match else (outside, stripped)
        if name not in table:
            raise ValueError(f"the source key {key!r} is not one of BEiT's.")
        if table[name] is None:
            dropped[key] = "not part of a VLMo model"
            continue
        ours, _, rows = table[name].partition("#")
        parts.setdefault((int(match[1]) if match else None, ours), []).append((rows, key))
    sorted_parts = {place: [key for _, key in sorted(keys)] for place, keys in parts.items()}
    for place in [place for place, keys in sorted_parts.items() if len(keys) > 1 and place[0] is None]:
        # a masked-image model of transformers: the head's own norm, outside `beit.`, is the one at the end
        first, second = sorted(sorted_parts[place], key=lambda key: bool(PREFIX.match(key)))
        sorted_parts[place] = [first]
        dropped[second] = f"{first} is the last norm"
    return sorted_parts, dropped


def expand_all(table: dict[str, str | None]) -> dict[str, str | None]:
    """`expand` for a table with dropped keys."""
    return {theirs: ours or None for theirs, ours in expand({key: value or "" for key, value in table.items()}).items()}


def position_table(tensors: Tensors, parts: dict, config: VlmoConfig) -> torch.Tensor:
    """Layers side by side, image offsets resized to the new grid, class rows kept, cross and text rows zero."""
    layers = range(config.num_hidden_layers)
    if (None, POSITION_TABLE) in parts:
        table = tensors[parts[None, POSITION_TABLE][0]].repeat(1, len(layers))
    else:
        table = torch.cat([tensors[parts[layer, POSITION_TABLE][0]] for layer in layers], dim=1)
    table = resize_position_table(table, grid_of(len(table)), config.grid_size)
    return torch.cat([table, table.new_zeros(2 + 2 * config.num_text_positions, table.shape[1])])


def grid_of(rows: int) -> int:
    """Grid g of a BEiT table with (2g-1)^2 + 3 rows."""
    span = isqrt(rows - 3)
    if span * span != rows - 3 or span % 2 == 0:
        raise ValueError(f"a BEiT position table has (2g-1)^2 + 3 rows; this one has {rows}.")
    return (span + 1) // 2


def infer_config(tensors, parts: dict) -> dict:
    """Sizes of the source as arguments of `VlmoConfig`; `tensors` is a source with `shape(key)`."""

    def shape(layer: int | None, name: str) -> tuple[int, ...]:
        if (layer, name) not in parts:
            raise ValueError(f"this is not a BEiT checkpoint: it has no {name.format(e='*')}.")
        return tensors.shape(parts[layer, name][0])

    hidden_size, num_channels, patch_size, _ = shape(None, "embeddings.image.patch_projection.weight")
    shared = (None, POSITION_TABLE) in parts
    rows, heads = shape(None if shared else 0, POSITION_TABLE)
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(layer for layer, _ in parts if layer is not None),
        "num_attention_heads": heads,
        "intermediate_size": shape(0, "ffn.{e}.fc1.weight")[0],
        "image_size": grid_of(rows) * patch_size,
        "patch_size": patch_size,
        "num_channels": num_channels,
    }


def require_all(result: dict, config: VlmoConfig, vision_weights_for_all: bool) -> None:
    """Raises ValueError if a tensor that BEiT should have given is not there."""
    for key in make_fresh("VlmoModel", config, seed=None):
        other_modality = ".language." in key or ".vision_language." in key
        left_fresh = key.startswith(FRESH) or (other_modality and not vision_weights_for_all)
        if key not in result and not left_fresh:
            raise ValueError(f"the BEiT checkpoint has nothing for {key!r}.")
