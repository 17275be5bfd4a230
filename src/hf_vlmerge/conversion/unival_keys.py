"""Key tables of UnIVAL checkpoints: names of the original code beside ours.

A path in a table stands for everything below it, and `#` for the index of a layer. The longest path that fits a key
counts. Read backwards, the same table is the way back. Our names are those of `UnivalModel`; a checkpoint with the
output projection has `PREFIX` before them.
"""

import re

PREFIX = "model."

_BOTH = {  # under `encoder` and `decoder`, on both sides
    "layernorm_embedding": "text_norm",
    "embed_positions": "text_positions",
    "embed_image_positions": "image_positions",
    "pos_ln": "text_position_norm",
    "image_pos_ln": "media_position_norm",
    "token_rel_pos_table_list.#": "text_relative.#",
    "image_rel_pos_table_list.#": "media_relative.#",
    "layer_norm": "norm",
    "layers.#.self_attn.c_attn": "layers.#.self_attn.head_scale",
    "layers.#.self_attn": "layers.#.self_attn",
    "layers.#.self_attn_layer_norm": "layers.#.self_attn_norm",
    "layers.#.final_layer_norm": "layers.#.ffn_norm",
    "layers.#.fc1": "layers.#.fc1",
    "layers.#.ffn_layernorm": "layers.#.ffn_mid_norm",
    "layers.#.fc2": "layers.#.fc2",
}
_ENCODER = {
    "type_embedding": "type_embedding",
    "patch_layernorm_embedding": "media_norm",
    "embed_video_positions": "video_positions",
    "embed_audio_positions": "audio_positions",
    "pos_q_linear": "position_q_proj",
    "pos_k_linear": "position_k_proj",
    "layers.#.attn_ln": "layers.#.self_attn_post_norm",
    "image_proj": "image_connector",
    "video_proj": "video_connector",
    "audio_proj": "audio_connector",
    "embed_images": "image_tower",
    "embed_videos": "video_tower",
    "embed_audios": "audio_tower",
    "embed_audios.spectrogram_extractor.stft": "audio_tower.stft",
}
_DECODER = {
    "code_layernorm_embedding": "code_norm",
    "self_pos_q_linear": "self_position_q_proj",
    "self_pos_k_linear": "self_position_k_proj",
    "cross_pos_q_linear": "cross_position_q_proj",
    "cross_pos_k_linear": "cross_position_k_proj",
    "layers.#.self_attn_ln": "layers.#.self_attn_post_norm",
    "layers.#.encoder_attn.c_attn": "layers.#.cross_attn.head_scale",
    "layers.#.encoder_attn": "layers.#.cross_attn",
    "layers.#.encoder_attn_layer_norm": "layers.#.cross_attn_norm",
    "layers.#.cross_attn_ln": "layers.#.cross_attn_post_norm",
}
OURS = {"encoder.embed_tokens": "shared"}
OURS |= {f"encoder.{theirs}": f"encoder.{ours}" for theirs, ours in (_BOTH | _ENCODER).items()}
OURS |= {f"decoder.{theirs}": f"decoder.{ours}" for theirs, ours in (_BOTH | _DECODER).items()}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}

TIED = {  # second names of one tensor
    "decoder.embed_tokens.weight": "encoder.embed_tokens.weight",
    "decoder.output_projection.weight": "encoder.embed_tokens.weight",
}
RECOMPUTED = {  # functions of the configuration
    "encoder.token_rp_bucket": "buckets of relative text positions",
    "encoder.image_rp_bucket": "buckets of relative grid positions",
    "decoder.token_rp_bucket": "buckets of relative text positions",
    "decoder.image_rp_bucket": "buckets of relative grid positions",
    "decoder.image_position_idx": "grid cells of image codes",
    "encoder.embed_audios.logmel_extractor.melW": "mel matrix; what is stored may be rounded to half precision",
}
DROPPED = {  # no output depends on them
    "encoder.version": "a constant of the training library",
    "decoder.version": "a constant of the training library",
    "encoder.embed_images.fc.weight": "ResNet classifier, never called",
    "encoder.embed_images.fc.bias": "ResNet classifier, never called",
}


def our_key(original: str) -> str | None:
    """Our name of an original tensor; None where it is a second name, recomputed or dropped. Unknown: KeyError."""
    if original in TIED or original in RECOMPUTED or original in DROPPED:
        return None
    return _translate(original, OURS)


def original_key(ours: str) -> str:
    """The original name of one of our tensors (without `PREFIX`). Unknown: KeyError."""
    return _translate(ours, THEIRS)


def _translate(key: str, table: dict[str, str]) -> str:
    index = re.match(r"(?:en|de)coder\.\w+\.(\d+)(?=\.)", key)
    pattern = key if index is None else f"{key[: index.start(1)]}#{key[index.end(1) :]}"
    parts = pattern.split(".")
    for length in range(len(parts), 0, -1):
        path = ".".join(parts[:length])
        if path in table:
            name = ".".join([table[path], *parts[length:]])
            return name if index is None else name.replace("#", index[1], 1)
    raise KeyError(key)
