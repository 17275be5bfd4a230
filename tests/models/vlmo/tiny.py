"""Tiny VLMo models of all five architectures, with every parameter away from its initial value."""

import torch

from hf_vlmerge.models.vlmo.configuration_vlmo import VlmoConfig

ARCHITECTURES = {
    "modality_specific": ["attention", "ffn", "layer_norm"],
    "custom_attention": ["attention"],
    "custom_ffn": ["ffn"],
    "custom_layer_norm": ["layer_norm"],
    "modality_agnostic": [],
}


def tiny_config(architecture: str = "modality_specific", **changes) -> VlmoConfig:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_fusion_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "max_text_length": 12,
        "num_text_positions": 20,
        "hidden_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "num_labels": 13,
        "expert_modules": ARCHITECTURES[architecture],
    }
    return VlmoConfig(**{**sizes, **changes})


def tiny_model(model_class, architecture: str = "modality_specific", seed: int = 0, **changes):
    """A model in eval mode whose norms, biases, scales and position table are all noisy: none is zero or one."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(architecture, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_batch(rows: int = 4, seed: int = 0, image_size: int = 32) -> dict[str, torch.Tensor]:
    """Texts of 12 tokens, padded on the right except the first; (rows, 3, image_size, image_size) pixels."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 97, (rows, 12), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, rows):
        attention_mask[row, 12 - row :] = 0
    pixel_values = torch.randn(rows, 3, image_size, image_size, generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}


def training_batch(rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """`tiny_batch` with every third word masked (id 4) and negatives chosen."""
    batch = tiny_batch(rows, seed)
    masked, labels = batch["input_ids"].clone(), torch.full_like(batch["input_ids"], -100)
    labels[:, 1::3] = masked[:, 1::3]
    masked[:, 1::3] = 4
    shifted = torch.arange(1, rows + 1) % rows
    return {
        **batch,
        "mlm_input_ids": masked,
        "labels": labels,
        "negative_image_index": shifted,
        "negative_text_index": shifted.flip(0),
    }
