"""The index tensors that the released research code stores beside its weights; all follow from the sizes."""

import torch

from hf_vlmerge.models.vlmo.configuration_vlmo import VlmoConfig
from hf_vlmerge.models.vlmo.experts_vlmo import image_position_index, text_position_index


def index_buffers(config: VlmoConfig, pretraining: bool) -> dict[str, torch.Tensor]:
    """
    All index buffers of the original, equal to the stored ones in value and dtype.

    The video ones of a single frame repeat those of an image; the joint ones are float32 in the original.

    Args:
        pretraining: also the `vl_*` buffers, which only pre-training checkpoints have.

    Shapes:
        with T = max_text_length and F = grid^2 + 1: image and video (F, F), text (T, T), joint (T + F, T + F),
        mask_for_combining_temporal (1, F, F), position_ids (1, T)
    """
    grid, text = config.grid_size, config.max_text_length
    device = torch.device("cpu")
    image_index = image_position_index(grid, device)
    text_index = text_position_index(text, grid, config.num_text_positions, device)
    tokens = len(image_index)
    joint = torch.empty(text + tokens, text + tokens)
    joint[:text, :text], joint[text:, text:] = text_index, image_index
    joint[:text, text:] = (2 * grid - 1) ** 2 + 3
    joint[text:, :text] = (2 * grid - 1) ** 2 + 4
    buffers = {
        "relative_position_index": image_index,
        "text_relative_position_index": text_index,
        "text_imag_relative_position_index": joint,
        "video_relative_position_index": image_index.clone(),
        "text_video_relative_position_index": joint.clone(),
        "temporal_relative_position_index": torch.zeros(tokens, tokens, dtype=torch.int64),
        "mask_for_combining_temporal": torch.ones(1, tokens, tokens),
        "text_embeddings.position_ids": torch.arange(text)[None],
    }
    if pretraining:
        buffers["vl_text_imag_relative_position_index"] = joint.clone()
        buffers["vl_text_video_relative_position_index"] = joint.clone()
    return buffers
