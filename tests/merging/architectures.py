"""Tiny models of many classes, as a table: how each is made from its config, and what its forward pass takes.

Everything is random and nothing is fetched. Widths are 16 where the class allows it, two layers, 40 words.
"""

import copy
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.models.unival.tiny import SIZES

REMOTE = "tests.merging.remote_code.modeling_toy"
WORDS, WIDTH, IMAGE, PATCH = 40, 16, 16, 8  # 16 x 16 pixels in patches of 8: 4 patches
IMAGE_TOKEN, VIDEO_TOKEN, START, END = 35, 36, 37, 38
ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TEXT = {**ENCODER, "vocab_size": WORDS, "max_position_embeddings": 32}
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
VISION = {**ENCODER, "image_size": IMAGE, "patch_size": PATCH}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


UNIVAL = {**SIZES, "towers": ["image"]}


class Tiny(NamedTuple):
    """One class of models: its name, its config's, the config's arguments, and what the forward pass takes."""

    model: str
    config: str
    arguments: Mapping[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    module: str = "transformers"

    @property
    def is_remote(self) -> bool:
        return self.module == REMOTE


def text(length: int = 6) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(5, 5 + 2 * length).reshape(2, length) % 30 + 3}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * IMAGE * IMAGE).reshape(2, 3, IMAGE, IMAGE)}


def both() -> dict[str, Tensor]:
    return text() | image()


def seen_and_said() -> dict[str, Tensor]:
    return text_to_text() | {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)}


def text_to_text() -> dict[str, Tensor]:
    return text() | {"decoder_input_ids": text(4)["input_ids"]}


def placed(count: int) -> Callable[[], dict[str, Tensor]]:
    """Text in which ``count`` image tokens stand before the words, and the image."""

    def inputs() -> dict[str, Tensor]:
        ids = torch.cat([torch.full((2, count), IMAGE_TOKEN), text()["input_ids"]], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image()}

    return inputs


def gemma() -> dict[str, Tensor]:
    inputs = placed(4)()
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}


def qwen() -> dict[str, Tensor]:
    """One image of 4 x 4 patches of 4 pixels, which two by two become 4 tokens."""
    ids = torch.tensor([[START, *[IMAGE_TOKEN] * 4, END, 5, 6, 7]])
    pixels = torch.linspace(-1, 1, 16 * 3 * 2 * 4 * 4).reshape(16, -1)
    kinds = (ids == IMAGE_TOKEN).int()
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": kinds,
        "attention_mask": torch.ones_like(ids),
    }


def speech() -> dict[str, Tensor]:
    return {
        "input_features": torch.linspace(-1, 1, 8 * 20).reshape(1, 8, 20),
        "decoder_input_ids": text(4)["input_ids"][:1],
    }


def waveform() -> dict[str, Tensor]:
    return {"input_values": torch.linspace(-3, 3, 400).sin()[None]}


def pretraining() -> dict[str, Tensor]:
    """VLMo's three objectives at once; each pair's negatives are the other pair."""
    ids, other = text()["input_ids"], torch.tensor([1, 0])
    negatives = {"negative_image_index": other, "negative_text_index": other}
    return {**both(), "attention_mask": torch.ones_like(ids), "mlm_input_ids": ids, **negatives}


T5 = {
    "vocab_size": WORDS, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip
WHISPER = {
    **BART, **SPECIAL, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32,
    "decoder_start_token_id": 1, "begin_suppress_tokens": [1],
}  # fmt: skip
del WHISPER["max_position_embeddings"]
LLAMA = {**DECODER, **SPECIAL}
QWEN = {
    "image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN, "vision_start_token_id": START,
    "vision_end_token_id": END, "text_config": {**DECODER, **SPECIAL, "rope_parameters": ROPE},
}  # fmt: skip
QWEN2_VISION = {"depth": 2, "embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4}
QWEN3_VISION = {
    "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": WIDTH,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2],
}  # fmt: skip
INTERN_VISION = {**VISION, "image_size": [IMAGE, IMAGE], "patch_size": [4, 4]}
GEMMA3 = {**DECODER, **SPECIAL, "query_pre_attn_scalar": 8, "sliding_window": 8}
WAV2VEC2 = {
    **ENCODER, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
VLMO = {
    **ENCODER, "vocab_size": WORDS, "num_hidden_layers": 3, "num_fusion_layers": 1, "image_size": IMAGE,
    "patch_size": PATCH, "max_text_length": 6, "num_text_positions": 8,
}  # fmt: skip
PROJECTED = {"projection_dim": 8}
BLIP_TEXT = {**TEXT, **SPECIAL, "encoder_hidden_size": WIDTH, "projection_dim": 8, "sep_token_id": 3}
FLAVA = {
    "hidden_size": WIDTH, "projection_dim": 8, "text_config": TEXT, "image_config": {**VISION, "vocab_size": WORDS},
    "multimodal_config": ENCODER, "image_codebook_config": {"hidden_size": 4, "vocab_size": WORDS, "num_groups": 4},
}  # fmt: skip
BRIDGETOWER = {
    **ENCODER, "hidden_size": 64, "text_config": {**TEXT, "hidden_size": 64, "pad_token_id": 1},
    "vision_config": {"hidden_size": 64, "num_hidden_layers": 2, "image_size": IMAGE, "patch_size": PATCH},
}  # fmt: skip  # its vision part has one head for 64 features
BLIP2 = {
    "vision_config": VISION, "qformer_config": {**TEXT, "encoder_hidden_size": WIDTH}, "num_query_tokens": 3,
    "text_config": {"model_type": "opt", **TEXT, **SPECIAL, "ffn_dim": 24, "word_embed_proj_dim": WIDTH},
    "image_token_index": IMAGE_TOKEN,
}  # fmt: skip

ARCHITECTURES: dict[str, Tiny] = {
    "BERT": Tiny("BertForMaskedLM", "BertConfig", TEXT, text),
    "RoBERTa": Tiny("RobertaForMaskedLM", "RobertaConfig", TEXT, text),
    "BART": Tiny("BartForConditionalGeneration", "BartConfig", BART, text_to_text),
    "T5 v1.0": Tiny("T5ForConditionalGeneration", "T5Config", T5, text_to_text),
    "T5 v1.1": Tiny("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}, text_to_text),
    "Llama untied": Tiny("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": False}, text),
    "Llama tied": Tiny("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, text),
    "Qwen2-VL": Tiny("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", {**QWEN, "vision_config": QWEN2_VISION}, qwen),
    "Qwen3-VL": Tiny("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", {**QWEN, "vision_config": QWEN3_VISION}, qwen),
    "LLaVA": Tiny(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "text_config": {"model_type": "llama", **LLAMA},
            "image_token_index": IMAGE_TOKEN,
            "image_seq_length": 4,
        },
        placed(4),
    ),
    "PaliGemma": Tiny(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "vision_config": {"model_type": "siglip_vision_model", **VISION, "projection_dim": WIDTH},
            "text_config": {"model_type": "gemma", **LLAMA},
            "image_token_index": IMAGE_TOKEN,
            "projection_dim": WIDTH,
            "hidden_size": WIDTH,
        },
        gemma,
    ),
    "InternVL": Tiny(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "vision_config": INTERN_VISION,
            "text_config": {"model_type": "qwen2", **LLAMA},
            "image_token_id": IMAGE_TOKEN,
            "image_seq_length": 4,
        },
        placed(4),
    ),
    "Gemma3": Tiny(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "text_config": GEMMA3,
            "image_token_index": IMAGE_TOKEN,
            "mm_tokens_per_image": 4,
        },
        gemma,
    ),
    "BLIP": Tiny(
        "BlipForConditionalGeneration",
        "BlipConfig",
        {"text_config": BLIP_TEXT, "vision_config": VISION, "projection_dim": 8, "image_text_hidden_size": 8},
        both,
    ),
    "BLIP-2": Tiny("Blip2ForConditionalGeneration", "Blip2Config", BLIP2, placed(3)),
    "CLIP": Tiny(
        "CLIPModel", "CLIPConfig", {"text_config": {**TEXT, **SPECIAL}, "vision_config": VISION, **PROJECTED}, both
    ),
    "SigLIP": Tiny(
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**TEXT, **SPECIAL, "projection_size": WIDTH}, "vision_config": VISION},
        both,
    ),
    "ViLT": Tiny("ViltForMaskedLM", "ViltConfig", {**TEXT, **VISION}, both),
    "ViT": Tiny("ViTForImageClassification", "ViTConfig", VISION, image),
    "BEiT": Tiny("BeitForImageClassification", "BeitConfig", {**VISION, "use_relative_position_bias": True}, image),
    "DINOv2": Tiny("Dinov2Model", "Dinov2Config", VISION, image),
    "Whisper": Tiny("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, speech),
    "Wav2Vec2": Tiny("Wav2Vec2ForCTC", "Wav2Vec2Config", WAV2VEC2, waveform),
    "ResNet": Tiny("ResNetForImageClassification", "ResNetConfig", RESNET, image),
    "FLAVA": Tiny("FlavaModel", "FlavaConfig", FLAVA, both),
    "BridgeTower": Tiny("BridgeTowerForMaskedLM", "BridgeTowerConfig", BRIDGETOWER, both),
    **{
        f"VLMo {name}": Tiny(
            "VlmoForPreTraining", "VlmoConfig", {**VLMO, "expert_modules": modules}, pretraining, "hf_vlmerge"
        )
        for name, modules in {
            "modality-specific": ["attention", "ffn", "layer_norm"],
            "custom attention": ["attention"],
            "custom FFN": ["ffn"],
            "custom layer norm": ["layer_norm"],
            "modality-agnostic": [],
        }.items()
    },
    "UnIVAL": Tiny("UnivalForConditionalGeneration", "UnivalConfig", UNIVAL, seen_and_said, "hf_vlmerge"),
    "remote code": Tiny("ToyModel", "ToyConfig", {}, image, REMOTE),
}


class Layout(NamedTuple):
    """How a member is stored."""

    dtype: torch.dtype = torch.float32
    shard_size: str = "5GB"


PLAIN = Layout()
LAYOUTS = (
    PLAIN,
    Layout(shard_size="8KB"),
    Layout(torch.bfloat16, "6KB"),
    Layout(torch.bfloat16),
    Layout(torch.float16),
)


def build(tiny: Tiny, seed: int = 0) -> nn.Module:
    """A random model of the class."""
    module = import_module(tiny.module)
    torch.manual_seed(seed)
    model = getattr(module, tiny.model)(getattr(module, tiny.config)(**tiny.arguments)).eval()
    if tiny.is_remote:
        type(model).register_for_auto_class("AutoModel")
        type(model.config).register_for_auto_class("AutoConfig")
    return model


@torch.no_grad()
def moved(model: nn.Module, seed: int, size: float = 0.02) -> nn.Module:
    """A copy as if it had been finetuned: every parameter a little elsewhere, every batch normalisation further on."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(torch.randn(buffer.shape, generator=generator) * size)
        elif name.endswith("running_var"):
            buffer.mul_(1 + torch.rand(buffer.shape, generator=generator))
        elif name.endswith("num_batches_tracked"):
            buffer.add_(10 * seed)
    return model


def save(model: nn.Module, folder: Path, layout: Layout = PLAIN) -> Path:
    """Save a copy in this layout, with a chat template and a tokenizer's file beside it."""
    copy.deepcopy(model).to(layout.dtype).save_pretrained(folder, max_shard_size=layout.shard_size)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    return folder


def load(tiny: Tiny, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """The model that ``from_pretrained`` makes of a folder, and its loading report."""
    if tiny.is_remote:
        owner, options = import_module("transformers").AutoModel, {"trust_remote_code": True}
    else:
        owner, options = getattr(import_module(tiny.module), tiny.model), {}
    model, info = owner.from_pretrained(folder, output_loading_info=True, dtype=dtype, **options)
    return model.eval(), info


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's files by its name there, whatever the shards; read by the reference library."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = json.loads(index.read_text())["weight_map"]
        assert named.keys() == found.keys(), "the index names other tensors than the shards hold"
    return found
