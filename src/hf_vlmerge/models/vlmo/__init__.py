"""VLMo-style vision-language transformer with per-modality experts (Sung et al. 2023, arXiv 2304.14933)."""
