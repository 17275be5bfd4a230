"""Which parameters are decayed: all norms and biases exempt, or exactly as the released code has it."""

import json

import pytest
import torch
from torch import nn

from hf_vlmerge.models.vlmo.configuration_vlmo import VlmoConfig
from hf_vlmerge.models.vlmo.modeling_vlmo import VlmoForPreTraining, VlmoForQuestionAnswering
from hf_vlmerge.training.groups import decayed_parameters, head_parameters

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "max_text_length": 12,
    "num_text_positions": 20,
    "num_fusion_layers": 2,
}
# Original name -> ours, in order; what is left of the original's is unused there and has no place in our model.
RENAMED = (
    ("transformer.blocks.", "encoder.layers."),
    ("transformer.patch_embed.proj.", "embeddings.image.patch_projection."),
    ("transformer.cls_token", "embeddings.image.cls_token"),
    ("transformer.norm.", "encoder.norm."),
    ("text_embeddings.word_embeddings.", "embeddings.text.word_embeddings."),
    ("text_embeddings.token_type_embeddings.", "embeddings.text.token_type_embeddings."),
    ("text_embeddings.LayerNorm.", "embeddings.text.layer_norm."),
    ("token_type_embeddings.", "embeddings.modality_type_embeddings."),
    ("relative_position_bias_table", "encoder.relative_position_bias_table"),
    (".attn.", ".attention."),
    (".mlp.", ".ffn."),
    ("gamma_", "layer_scale_"),
    (".vl.", ".vision_language."),
    (".v.", ".vision."),
    (".l.", ".language."),
    ("ifm_vl_text_proj.fc.", "itc.text_vl_projection."),
    ("ifm_vl_image_proj.fc.", "itc.image_vl_projection."),
    ("ifm_text_proj.fc.", "itc.text_projection."),
    ("ifm_image_proj.fc.", "itc.image_projection."),
    ("itm_score.fc.", "itm_head."),
    ("mlm_score.transform.dense.", "mlm_head.dense."),
    ("mlm_score.transform.LayerNorm.", "mlm_head.layer_norm."),
    ("mlm_score.", "mlm_head."),
    ("vqa_classifier.0.", "classifier.dense."),
    ("vqa_classifier.1.", "classifier.layer_norm."),
    ("vqa_classifier.3.", "classifier.decoder."),
)
UNUSED = ("position_embeddings", "mask_token", "temporal_")


def our_name(name: str) -> str:
    done = set()
    for old, new in RENAMED:
        if old in name and not (old == "token_type_embeddings." and "embeddings.text" in name):
            if old.startswith(("text_", "token_")) and not name.startswith(old):
                continue
            name = name.replace(old, new, 1)
            done.add(old)
    if name in ("logit_scale", "logit_vl_scale"):
        return f"itc.{name}"
    parts = name.split(".")
    with_experts = name.startswith("encoder.layers.") and parts[3] in ("norm1", "norm2", "attention", "ffn")
    if with_experts and parts[4] not in ("vision", "language", "vision_language"):
        parts.insert(4, "shared")
    return ".".join(parts)


@pytest.mark.parametrize(
    ("key", "model_class", "experts"),
    [
        ("optimizer.msa.vqa", VlmoForQuestionAnswering, ["attention", "ffn", "layer_norm"]),
        ("optimizer.maa.vqa", VlmoForQuestionAnswering, []),
        ("optimizer.custom_ln.pretrain", VlmoForPreTraining, ["layer_norm"]),
    ],
)
def test_groups_of_the_released_code(shared, key, model_class, experts):
    golden = json.loads((shared / "goldens/vlmo/goldens.json").read_text())["optimizer_and_metrics"][key]
    torch.manual_seed(0)
    model = model_class(VlmoConfig(**TINY, expert_modules=experts, num_labels=13))
    ours = {name.removeprefix("vlmo.") for name, _ in model.named_parameters()}
    decayed = {name.removeprefix("vlmo.") for name in decayed_parameters(model, as_released=True)}
    head = set(head_parameters(model))
    seen = set()
    for group in golden["groups"]:
        for original in group["names"]:
            name = our_name(original)
            if any(word in original for word in UNUSED) or name not in ours:  # heads of the other tasks
                continue
            seen.add(name)
            assert (name in decayed) == (group["weight_decay"] > 0), name
            assert (name in head) == (group["lr"] > golden["groups"][0]["lr"]), name
    assert seen == ours


def test_batch_norms_are_norms():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    assert decayed_parameters(model) == ["0.weight"]


def test_by_default_no_norm_is_decayed():
    model = VlmoForQuestionAnswering(VlmoConfig(**TINY, num_labels=13))
    decayed = decayed_parameters(model)
    assert not [name for name in decayed if "norm" in name or "bias" in name]
    assert "vlmo.encoder.layers.0.attention.vision.qkv.weight" in decayed
    assert "vlmo.encoder.layers.0.layer_scale_1" in decayed
    extra = set(decayed_parameters(model, as_released=True)) - set(decayed)
    assert extra == {
        name
        for name, _ in model.named_parameters()
        if name.endswith(".weight")
        and (".norm1." in name or ".norm2." in name or name == "classifier.layer_norm.weight")
    }
