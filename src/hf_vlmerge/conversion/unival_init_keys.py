"""Where the tensors of BART, ResNet, 3-D ResNeXt and Cnn14 checkpoints go: patterns, in order; the first that fits a
whole key counts. `{\\1+1}` is the number in the first group, plus one. The result is UnIVAL's original name, which
`unival_keys.our_key` translates."""

import re

RULES = {
    "bart": [
        (r"(?:model\.)?shared\.weight", r"encoder.embed_tokens.weight"),
        (r"(?:model\.)?((?:encoder|decoder)\..+)", r"\1"),
        (r"lm_head\.weight", r"decoder.output_projection.weight"),
    ],
    "image": [
        # transformers
        (r"(?:resnet\.)?embedder\.embedder\.convolution\.(.+)", r"encoder.embed_images.conv1.\1"),
        (r"(?:resnet\.)?embedder\.embedder\.normalization\.(.+)", r"encoder.embed_images.bn1.\1"),
        (
            r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.(.+)",
            r"encoder.embed_images.layer{\1+1}.\2.downsample.0.\3",
        ),
        (
            r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.(.+)",
            r"encoder.embed_images.layer{\1+1}.\2.downsample.1.\3",
        ),
        (
            r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.(.+)",
            r"encoder.embed_images.layer{\1+1}.\2.conv{\3+1}.\4",
        ),
        (
            r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.(.+)",
            r"encoder.embed_images.layer{\1+1}.\2.bn{\3+1}.\4",
        ),
        # timm, torchvision
        (r"((?:conv1|bn1|layer\d+)\..+)", r"encoder.embed_images.\1"),
    ],
    "video": [(r"(?:module\.)?((?:conv1|bn1|layer\d+)\..+)", r"encoder.embed_videos.\1")],
    "audio": [
        (r"(?:module\.)?((?:spectrogram_extractor|bn0|conv_block\d+)\..+)", r"encoder.embed_audios.\1"),
    ],
}
UNUSED = {  # pattern -> why
    "bart": {r"final_logits_bias": "UnIVAL's output has no bias"},
    "image": {r"(?:fc|classifier\.1)\.(?:weight|bias)": "classifier"},
    "video": {r"(?:module\.)?fc\.(?:weight|bias)": "classifier"},
    "audio": {
        r"(?:module\.)?(?:fc1|fc_audioset)\.(?:weight|bias)": "classifier",
        r"(?:module\.)?logmel_extractor\.melW": "mel matrix, recomputed for the sample rate of the configuration",
    },
}


def original_name(part: str, key: str) -> str | None:
    """UnIVAL's original name of a tensor of one of the parts; None for a key that no rule fits."""
    for pattern, name in RULES[part]:
        match = re.fullmatch(pattern, key)
        if match:
            return re.sub(r"\{(\d+)\+1\}", lambda number: str(int(number[1]) + 1), match.expand(name))
    return None


def reason_unused(part: str, key: str) -> str | None:
    """Why a tensor has no place in UnIVAL; None for one that nobody knows."""
    return next((why for pattern, why in UNUSED[part].items() if re.fullmatch(pattern, key)), None)
