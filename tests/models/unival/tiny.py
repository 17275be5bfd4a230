"""Tiny UnIVAL models with every parameter and BatchNorm statistic away from its initial value."""

import torch

from hf_vlmerge.models.unival.configuration_unival import UnivalConfig

# The sizes of the reference numbers (../shared/goldens/unival). Tokens: 0-3 special, 4-50 text, 51 mask, 52-67 codes,
# 68-91 bins.
SIZES = {
    "vocab_size": 92,
    "hidden_size": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "text_bucket_size": 16,
    "grid_size": 8,
    "code_image_size": 32,
    "image_widths": [8, 16, 32, 64],
    "image_depths": [2, 1, 2, 1],
    "video_widths": [32, 64, 128, 256],
    "video_depths": [2, 1, 1, 1],
    "video_cardinality": 8,
    "audio_widths": [2, 4, 8, 16, 32, 64],
    "audio_sample_rate": 12000,
    "audio_window": 256,
    "audio_hop": 120,
    "audio_min_frequency": 50,
    "audio_max_frequency": 5500,
    "hidden_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "audio_dropout": 0.0,
    "audio_time_stripe": 0,
    "audio_mel_stripe": 0,
}
MEDIA = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_values"}


def tiny_config(**changes) -> UnivalConfig:
    return UnivalConfig(**{**SIZES, **changes})


def tiny_model(model_class, seed: int = 0, **changes):
    """A model in eval mode whose norms, biases, head scales, tables and running statistics are all noisy."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".stft." not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model.eval()


def tiny_media(kind: str, rows: int, seed: int = 0) -> torch.Tensor:
    """Images of 64 x 96 (2 x 3 tokens), clips of 9 frames of 64 x 64 (1 x 2 x 2), sounds of 8000 samples (2 x 2)."""
    shapes = {"image": (3, 64, 96), "video": (9, 3, 64, 64), "audio": (8000,)}
    return torch.randn(rows, *shapes[kind], generator=torch.Generator().manual_seed(seed))


def tiny_batch(rows: int = 4, kind: str | None = "image", seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts of up to 7 tokens, padded on the right; labels of up to 5; media of one kind for all rows, or none."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, 51, (rows, 7), generator=generator)
    input_ids[:, 0], input_ids[:, -1] = 0, 2
    attention_mask = torch.ones_like(input_ids)
    labels = torch.randint(4, 51, (rows, 5), generator=generator)
    for row in range(1, rows):
        length = 7 - row % 5
        attention_mask[row, length:] = 0
        input_ids[row, length:] = 1
        labels[row, 5 - row % 4 :] = -100
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return batch if kind is None else batch | {MEDIA[kind]: tiny_media(kind, rows, seed)}


def mixed_batch(media_types: tuple[int, ...] = (0, 1, 2, -1, 2, 0, -1, 1), seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch whose rows hold an image (0), a clip (1), a sound (2) or text only (-1)."""
    batch = tiny_batch(len(media_types), None, seed) | {"media_types": torch.tensor(media_types)}
    for index, (kind, name) in enumerate(MEDIA.items()):
        if media_types.count(index):
            batch[name] = tiny_media(kind, media_types.count(index), seed + index)
    return batch


def single_row(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch, without its padding."""
    length = int(batch["attention_mask"][row].sum())
    alone = {name: batch[name][row : row + 1, :length] for name in ("input_ids", "attention_mask")}
    alone["labels"] = batch["labels"][row : row + 1]
    types = batch.get("media_types")
    for index, name in enumerate(MEDIA.values()):
        if name in batch and (types is None or types[row] == index):
            place = row if types is None else int((types[:row] == index).sum())
            alone[name] = batch[name][place : place + 1]
    return alone
