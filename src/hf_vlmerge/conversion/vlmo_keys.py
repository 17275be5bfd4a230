"""Key tables of VLMo checkpoints: names of the released research code and of Microsoft's VLMo beside ours.

`*` in a name stands for `weight` and `bias`. The tables are complete: together with a configuration they give every
tensor of a checkpoint, so a key that is in no table is unknown, and the same table read backwards is the way back.
"""

from collections.abc import Iterable
from typing import NamedTuple

from hf_vlmerge.conversion.specialise import experts_of_layer, has_experts

BASE = {
    "text_embeddings.word_embeddings.weight": "embeddings.text.word_embeddings.weight",
    "text_embeddings.token_type_embeddings.weight": "embeddings.text.token_type_embeddings.weight",
    "text_embeddings.LayerNorm.*": "embeddings.text.layer_norm.*",
    "token_type_embeddings.weight": "embeddings.modality_type_embeddings.weight",
    "transformer.cls_token": "embeddings.image.cls_token",
    "transformer.patch_embed.proj.*": "embeddings.image.patch_projection.*",
    "relative_position_bias_table": "encoder.relative_position_bias_table",
    "transformer.norm.*": "encoder.norm.*",
    "pooler.dense.*": "pooler.dense.*",
}
LAYER_SCALES = {"gamma_1": "layer_scale_1", "gamma_2": "layer_scale_2"}  # one per block in every architecture
LAYER_MODULES = {  # the modules that may have experts
    "norm1": ("norm1", ("*",)),
    "attn": ("attention", ("qkv.weight", "q_bias", "v_bias", "proj.*")),
    "norm2": ("norm2", ("*",)),
    "mlp": ("ffn", ("fc1.*", "fc2.*")),
}


class Naming(NamedTuple):
    """What differs between the two code bases."""

    experts: dict[str, str]  # our expert -> theirs
    separator: str  # between the module and its expert
    itc: str  # prefix of the contrastive head
    index_buffers: bool  # whether index tensors are stored


NAMINGS = {
    "research": Naming({"vision": "v", "language": "l", "vision_language": "vl"}, ".", "ifm", True),
    "microsoft": Naming({"vision": "imag", "language": "text", "vision_language": "vl"}, "_", "itc", False),
}

_CLASSIFIER = {"0.*": "classifier.dense.*", "1.*": "classifier.layer_norm.*", "3.*": "classifier.decoder.*"}
_CONTRAST = {
    "{itc}_image_proj.fc.weight": "itc.image_projection.weight",
    "{itc}_text_proj.fc.weight": "itc.text_projection.weight",
    "logit_scale": "itc.logit_scale",
}
HEADS = {  # in the order in which a checkpoint with several heads is understood
    "pretraining": _CONTRAST
    | {
        "{itc}_vl_image_proj.fc.weight": "itc.image_vl_projection.weight",
        "{itc}_vl_text_proj.fc.weight": "itc.text_vl_projection.weight",
        "logit_vl_scale": "itc.logit_vl_scale",
        "itm_score.fc.*": "itm_head.*",
        "mlm_score.transform.dense.*": "mlm_head.dense.*",
        "mlm_score.transform.LayerNorm.*": "mlm_head.layer_norm.*",
        "mlm_score.decoder.weight": "mlm_head.decoder.weight",
        "mlm_score.bias": "mlm_head.bias",
    },
    "vqa": {f"vqa_classifier.{theirs}": ours for theirs, ours in _CLASSIFIER.items()},
    "nlvr2": {f"nlvr2_classifier.{theirs}": ours for theirs, ours in _CLASSIFIER.items()},
    "retrieval": _CONTRAST,
    "base": {},
}
CLASSES = {
    "pretraining": "VlmoForPreTraining",
    "vqa": "VlmoForQuestionAnswering",
    "nlvr2": "VlmoForImagesAndTextClassification",
    "retrieval": "VlmoForImageAndTextRetrieval",
    "base": "VlmoModel",
}

UNUSED_PARAMETERS = {  # stored by the original, but no output depends on them
    "temporal_relative_position_bias_table": "video table, never read for images",
    "text_embeddings.position_embeddings.weight": "absolute positions, never added",
    "transformer.mask_token": "masked image modelling, not an objective here",
}
INDEX_BUFFERS = (  # computed from the sizes; `vl_*` stand in pre-training checkpoints only
    "relative_position_index",
    "text_relative_position_index",
    "text_imag_relative_position_index",
    "vl_text_imag_relative_position_index",
    "video_relative_position_index",
    "text_video_relative_position_index",
    "vl_text_video_relative_position_index",
    "temporal_relative_position_index",
    "mask_for_combining_temporal",
    "text_embeddings.position_ids",
)


def expand(table: dict[str, str]) -> dict[str, str]:
    """The table with every `*` written out."""
    written = {}
    for theirs, ours in table.items():
        for end in ("weight", "bias") if "*" in theirs else ("",):
            written[theirs.replace("*", end)] = ours.replace("*", end)
    return written


def head_table(head: str, naming: Naming) -> dict[str, str]:
    """Original key -> our key of one head."""
    return {theirs.format(itc=naming.itc): ours for theirs, ours in expand(HEADS[head]).items()}


def key_table(
    head: str, naming: Naming, expert_modules: Iterable[str], num_layers: int, num_fusion_layers: int
) -> dict[str, str]:
    """Original key -> our key for every tensor of a model with that head and these experts."""
    table = expand(BASE)
    for layer in range(num_layers):
        theirs, ours = f"transformer.blocks.{layer}", f"encoder.layers.{layer}"
        table.update({f"{theirs}.{gamma}": f"{ours}.{scale}" for gamma, scale in LAYER_SCALES.items()})
        for module, (our_module, parameters) in LAYER_MODULES.items():
            if has_experts(our_module, expert_modules):
                experts = experts_of_layer(layer, num_layers, num_fusion_layers)
                copies = {f"{naming.separator}{naming.experts[expert]}": expert for expert in experts}
            else:
                copies = {"": "shared"}
            for copy, expert in copies.items():
                for parameter in parameters:
                    names = {f"{theirs}.{module}{copy}.{parameter}": f"{ours}.{our_module}.{expert}.{parameter}"}
                    table.update(expand(names))
    prefix = "" if head == "base" else "vlmo."
    return {theirs: prefix + ours for theirs, ours in table.items()} | head_table(head, naming)
