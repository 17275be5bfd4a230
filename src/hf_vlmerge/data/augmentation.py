"""Random changes of images that keep what they show: small affine maps, colours, a hidden square; a batch, in torch."""

import torch
from torch import Tensor


class Augmentation:
    """
    Each image gets its own rotation, scale (per axis), shift, contrast, channel gains and white square.

    Nothing is mirrored: captions speak of left and right.

    Args:
        strength: 0 changes nothing; 1 draws up to 9 degrees, a factor of 1.22, a tenth of the side, a factor of 1.8 in
            saturation and 1.28 in each channel.
        generator: of the draws; torch's own if None.
        hidden: the longest side of the square over that of the image; its centre may be anywhere in the image.

    Shapes:
        uint8 (B, 3, H, W) -> float32 (B, 3, H, W) in [-1, 1]; what comes into view from outside is white
    """

    def __init__(self, strength: float = 1.0, generator: torch.Generator | None = None, hidden: float = 0.0):
        for name, value in (("strength", strength), ("hidden", hidden)):
            if value < 0:
                raise ValueError(f"{name} is {value}; expected 0 or more.")
        self.strength, self.hidden, self.generator = strength, hidden, generator

    def __call__(self, pixels: Tensor) -> Tensor:
        darkness = 1 - pixels.float() / 255  # zero padding outside the image then means white
        moved = torch.nn.functional.grid_sample(darkness, self.grid(darkness), align_corners=False)
        moved = moved * self.factors(0.25, len(pixels), 3, 1, 1)
        gray = moved.mean(1, keepdim=True)
        moved = gray + (moved - gray) * self.factors(0.6, len(pixels), 1, 1, 1)
        if self.hidden:
            moved = moved.masked_fill(self.square(moved), 0)
        return 1 - 2 * moved.clamp(0, 1)

    def grid(self, images: Tensor) -> Tensor:
        """Where each output pixel is read from: (B, H, W, 2)"""
        rows = len(images)
        angle, scale = 0.15 * self.spread(rows), self.factors(0.2, rows, 2)
        cosine, sine = angle.cos(), angle.sin()
        maps = torch.empty(rows, 2, 3)
        maps[:, 0, 0], maps[:, 0, 1] = cosine / scale[:, 0], -sine / scale[:, 1]
        maps[:, 1, 0], maps[:, 1, 1] = sine / scale[:, 0], cosine / scale[:, 1]
        maps[:, :, 2] = 0.1 * self.spread(rows, 2)
        return torch.nn.functional.affine_grid(maps, images.shape, align_corners=False)

    def square(self, images: Tensor) -> Tensor:
        """True where an image is hidden: (B, 1, H, W)"""
        half = self.hidden / 2 * self.uniform(len(images), 1)
        rows, columns = (
            ((torch.arange(side) + 0.5) / side - self.uniform(len(images), 1)).abs() < half for side in images.shape[2:]
        )
        return (rows[:, :, None] & columns[:, None, :])[:, None]

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def spread(self, *shape: int) -> Tensor:
        """Uniform in [-strength, strength]."""
        return self.strength * (2 * self.uniform(*shape) - 1)

    def factors(self, width: float, *shape: int) -> Tensor:
        """Log-uniform in [exp(-width strength), exp(width strength)]."""
        return (width * self.spread(*shape)).exp()
