"""UnIVAL: one encoder-decoder for text, image, video and audio (Shukor et al. 2023, arXiv 2307.16184)."""
