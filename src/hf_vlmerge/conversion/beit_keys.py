"""Key tables of BEiT weights: the original files, the files of `transformers` on the Hub, and its module names.

`*` stands for `weight` and `bias`, `{e}` for an expert of ours. None: known, not needed. `#0`, `#1`, `#2`: rows of
queries, keys and values of our fused matrix.
"""

import re

PREFIX = re.compile(
    r"^(beit|transformer)\."
)  # of transformers' models with a head; of files re-wrapped for VLMo's loader
LAYER = re.compile(r"^(?:blocks|encoder\.layer|layers)\.(\d+)\.(.+)$")

FINAL_NORM = "encoder.norm.*"
POSITION_TABLE = "position table"  # joined and resized, see beit.py

OUTSIDE_LAYERS = {
    # original: `fc_norm` (mean pooling) in finetuned files, `norm` in pretrained ones
    "cls_token": "embeddings.image.cls_token",
    "patch_embed.proj.*": "embeddings.image.patch_projection.*",
    "rel_pos_bias.relative_position_bias_table": POSITION_TABLE,
    "rel_pos_bias.relative_position_index": None,
    "norm.*": FINAL_NORM,
    "fc_norm.*": FINAL_NORM,
    "mask_token": None,
    "head.*": None,
    "lm_head.*": None,
    # transformers
    "embeddings.cls_token": "embeddings.image.cls_token",
    "embeddings.patch_embeddings.projection.*": "embeddings.image.patch_projection.*",
    "encoder.relative_position_bias.relative_position_bias_table": POSITION_TABLE,
    "encoder.relative_position_bias.relative_position_index": None,
    "shared_position_bias.relative_position_bias_table": POSITION_TABLE,
    "layernorm.*": FINAL_NORM,
    "pooler.layernorm.*": FINAL_NORM,
    "embeddings.mask_token": None,
    "classifier.*": None,
}
INSIDE_LAYERS = {
    # original
    "gamma_1": "layer_scale_1",
    "gamma_2": "layer_scale_2",
    "norm1.*": "norm1.{e}.*",
    "norm2.*": "norm2.{e}.*",
    "attn.qkv.weight": "attention.{e}.qkv.weight",
    "attn.q_bias": "attention.{e}.q_bias",
    "attn.v_bias": "attention.{e}.v_bias",
    "attn.proj.*": "attention.{e}.proj.*",
    "attn.relative_position_bias_table": POSITION_TABLE,
    "attn.relative_position_index": None,
    "mlp.fc1.*": "ffn.{e}.fc1.*",
    "mlp.fc2.*": "ffn.{e}.fc2.*",
    # transformers, files and modules
    "lambda_1": "layer_scale_1",
    "lambda_2": "layer_scale_2",
    "layernorm_before.*": "norm1.{e}.*",
    "layernorm_after.*": "norm2.{e}.*",
    # transformers, files
    "attention.attention.query.weight": "attention.{e}.qkv.weight#0",
    "attention.attention.key.weight": "attention.{e}.qkv.weight#1",
    "attention.attention.value.weight": "attention.{e}.qkv.weight#2",
    "attention.attention.query.bias": "attention.{e}.q_bias",
    "attention.attention.value.bias": "attention.{e}.v_bias",
    "attention.attention.relative_position_bias.relative_position_bias_table": POSITION_TABLE,
    "attention.attention.relative_position_bias.relative_position_index": None,
    "attention.output.dense.*": "attention.{e}.proj.*",
    "intermediate.dense.*": "ffn.{e}.fc1.*",
    "output.dense.*": "ffn.{e}.fc2.*",
    # transformers, modules
    "attention.q_proj.weight": "attention.{e}.qkv.weight#0",
    "attention.k_proj.weight": "attention.{e}.qkv.weight#1",
    "attention.v_proj.weight": "attention.{e}.qkv.weight#2",
    "attention.q_proj.bias": "attention.{e}.q_bias",
    "attention.v_proj.bias": "attention.{e}.v_bias",
    "attention.o_proj.*": "attention.{e}.proj.*",
    "relative_position_bias.relative_position_bias_table": POSITION_TABLE,
}
