"""The tensors that UnIVAL's original code stores beside its weights, although they all follow from the sizes."""

import torch

from hf_vlmerge.models.unival.configuration_unival import UnivalConfig
from hf_vlmerge.models.unival.encoders_unival import mel_matrix
from hf_vlmerge.models.unival.modeling_unival import code_ids, grid_buckets, text_buckets

MEL_MATRIX = "encoder.embed_audios.logmel_extractor.melW"
UNUSED_CODES, UNUSED_CELL = 769, 1024  # the places after the last code of an image, and what they hold


def recomputed_tensors(config: UnivalConfig) -> dict[str, torch.Tensor]:
    """
    Index tensors under their original names, and the mel matrix where there is an audio tower.

    Shapes:
        with M = text_bucket_distance, G = grid_size and W = code_grid_size: token_rp_bucket (M, M), image_rp_bucket
        (G^2 + 1, G^2 + 1), image_position_idx (W^2 + 770,), all int64; melW (window / 2 + 1, bins) float32
    """
    place, cells = torch.arange(config.text_bucket_distance), torch.arange(config.grid_size**2 + 1)
    text = text_buckets(place, place, config.text_bucket_size, config.text_bucket_distance)
    grid = grid_buckets(cells, cells, config.grid_size)
    codes = code_ids(torch.arange(config.code_grid_size**2 + 1), config.code_grid_size, config.grid_size)
    found = {"decoder.image_position_idx": torch.cat([codes, torch.full((UNUSED_CODES,), UNUSED_CELL)])}
    for stack in ("encoder", "decoder"):
        found |= {f"{stack}.token_rp_bucket": text.clone(), f"{stack}.image_rp_bucket": grid.clone()}
    return found | ({MEL_MATRIX: mel_matrix(config)} if "audio" in config.towers else {})
