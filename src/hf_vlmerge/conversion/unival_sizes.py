"""What names and shapes of a UnIVAL checkpoint tell of its configuration, as tables."""

import re
from collections.abc import Callable, Mapping
from math import isqrt
from typing import NamedTuple

Shapes = Mapping[str, tuple[int, ...]]


class Size(NamedTuple):
    """A field of the configuration, read from one axis of one tensor."""

    key: str
    axis: int = 0
    field_of: Callable[[int], int] = int


SIZES = {
    "vocab_size": Size("encoder.embed_tokens.weight"),
    "hidden_size": Size("encoder.embed_tokens.weight", 1),
    "num_attention_heads": Size("encoder.layers.0.self_attn.c_attn"),
    "intermediate_size": Size("encoder.layers.0.fc1.weight"),
    "max_position_embeddings": Size("encoder.embed_positions.weight", 0, lambda rows: rows - 2),
    "text_bucket_size": Size("encoder.token_rel_pos_table_list.0.weight", 0, lambda rows: (rows + 1) // 2),
    "grid_size": Size("encoder.image_rel_pos_table_list.0.weight", 0, lambda rows: (isqrt(rows - 3) + 1) // 2),
    "image_stem_width": Size("encoder.embed_images.conv1.weight"),
    "video_stem_width": Size("encoder.embed_videos.conv1.weight"),
    "audio_window": Size("encoder.embed_audios.spectrogram_extractor.stft.conv_real.weight", 2),
    "audio_mel_bins": Size("encoder.embed_audios.bn0.weight"),
}
WIDTHS = {  # one number a stage
    "image_widths": Size(r"encoder\.embed_images\.layer(\d+)\.0\.conv1\.weight"),
    "video_widths": Size(r"encoder\.embed_videos\.layer(\d+)\.0\.conv3\.weight", 0, lambda channels: channels // 2),
    "audio_widths": Size(r"encoder\.embed_audios\.conv_block(\d+)\.conv1\.weight"),
}
LAYERS = {
    "encoder_layers": r"encoder\.layers\.(\d+)\.",
    "decoder_layers": r"decoder\.layers\.(\d+)\.",
}
DEPTHS = {
    "image_depths": r"encoder\.embed_images\.layer(\d+)\.(\d+)\.conv1\.weight",
    "video_depths": r"encoder\.embed_videos\.layer(\d+)\.(\d+)\.conv1\.weight",
}
GROUPED = "encoder.embed_videos.layer1.0.conv2.weight"  # (channels, channels / groups, 3, 3, 3)
TOWERS = {  # a tensor that a tower cannot be without
    "image": "encoder.embed_images.conv1.weight",
    "video": "encoder.embed_videos.conv1.weight",
    "audio": "encoder.embed_audios.bn0.weight",
}


def infer_sizes(shapes: Shapes) -> dict:
    """
    Fields of `UnivalConfig`, as far as the tensors that are there tell them.

    Raises:
        ValueError: a tensor has too few axes.
    """
    fields: dict = {"towers": [tower for tower, key in TOWERS.items() if key in shapes]}
    for field, size in SIZES.items():
        if size.key in shapes:
            fields[field] = read_size(shapes, size.key, size)
    for field, size in WIDTHS.items():
        found = {int(m[1]): read_size(shapes, key, size) for key in shapes if (m := re.fullmatch(size.key, key))}
        if found:
            fields[field] = [found[stage] for stage in sorted(found)]
    for field, pattern in LAYERS.items():
        found = {int(m[1]) for key in shapes if (m := re.match(pattern, key))}
        if found:
            fields[field] = len(found)
    for field, pattern in DEPTHS.items():
        blocks = [(int(m[1]), int(m[2])) for key in shapes if (m := re.fullmatch(pattern, key))]
        if blocks:
            fields[field] = [sum(s == stage for s, _ in blocks) for stage in sorted({s for s, _ in blocks})]
    if GROUPED in shapes:
        channels, share = (read_size(shapes, GROUPED, Size(GROUPED, axis)) for axis in (0, 1))
        fields["video_cardinality"] = channels // max(share, 1)
    return fields


def read_size(shapes: Shapes, key: str, size: Size) -> int:
    if len(shapes[key]) <= size.axis:
        raise ValueError(f"this is not a UnIVAL checkpoint: {key!r} has shape {tuple(shapes[key])}.")
    return size.field_of(shapes[key][size.axis])
