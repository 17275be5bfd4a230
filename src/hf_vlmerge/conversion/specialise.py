"""A modality-agnostic seed as initial weights of a modality-specific model: every expert starts as a copy of `shared`.

Seed pre-training of "An Empirical Study of Multimodal Model Merging" (arXiv 2304.14933): experts that start from common
weights stay close enough to be merged. Everything that has no experts (embeddings, layer scales, the table of relative
positions, pooler and heads) carries over as it is.
"""

import re
from collections.abc import Iterable, Mapping

import torch

# A module has experts if any of these stands in `expert_modules`.
EXPERTS_FROM = {
    "norm1": ("attention", "layer_norm"),
    "attention": ("attention",),
    "norm2": ("ffn", "layer_norm"),
    "ffn": ("ffn",),
}
LAYER_KEY = re.compile(
    r"^(?P<head>(?:.*\.)?encoder\.layers\.(?P<layer>\d+)\.)(?P<module>\w+)\.(?P<expert>\w+)\.(?P<rest>.+)$"
)


def has_experts(module: str, expert_modules: Iterable[str]) -> bool:
    """Whether `norm1`, `attention`, `norm2` or `ffn` has one copy a modality under `expert_modules`."""
    return bool(set(EXPERTS_FROM.get(module, ())) & set(expert_modules))


def experts_of_layer(layer: int, num_layers: int, num_fusion_layers: int) -> tuple[str, ...]:
    """Experts of a module in one layer; the top `num_fusion_layers` layers also have the cross-modal one."""
    fusion = layer >= num_layers - num_fusion_layers
    return ("vision", "language", "vision_language") if fusion else ("vision", "language")


def specialise(
    tensors: Mapping[str, torch.Tensor], expert_modules: Iterable[str], num_fusion_layers: int
) -> dict[str, torch.Tensor]:
    """
    The state dict of a modality-specific model from that of a modality-agnostic one of the same sizes.

    Args:
        tensors: state dict of a base model or of one with a head (`vlmo.` prefix), all of whose experts are `shared`.
        expert_modules: subset of `["attention", "ffn", "layer_norm"]` of the new model.
        num_fusion_layers: M, the top layers that get a `vision_language` expert.

    Returns:
        All tensors under the new model's names, shapes unchanged; each copy has memory of its own.

    Raises:
        ValueError: if the source has experts already, names unknown modules or has no layers.
    """
    expert_modules = list(expert_modules)
    unknown = set(expert_modules) - {"attention", "ffn", "layer_norm"}
    if unknown:
        raise ValueError(f"expert_modules has {min(unknown)!r}; expected a subset of attention, ffn, layer_norm.")
    matches = {key: LAYER_KEY.match(key) for key in tensors}
    layers = [int(match["layer"]) for match in matches.values() if match]
    if not layers:
        raise ValueError(
            "the seed has no tensors named `encoder.layers.<i>.<module>.shared.*`; is it a VLMo checkpoint?"
        )

    specialised: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = matches[key]
        if match is None or match["module"] not in EXPERTS_FROM:
            specialised[key] = tensor
            continue
        if match["expert"] != "shared":
            raise ValueError(f"the seed must be modality-agnostic, but it has the expert tensor {key!r}.")
        if not has_experts(match["module"], expert_modules):
            specialised[key] = tensor
            continue
        for expert in experts_of_layer(int(match["layer"]), max(layers) + 1, num_fusion_layers):
            specialised[f"{match['head']}{match['module']}.{expert}.{match['rest']}"] = tensor.clone()
    return specialised
