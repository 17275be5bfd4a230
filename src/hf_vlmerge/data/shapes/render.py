"""Pixels of a scene: flat shapes on a light background, with noise.

Shapes are stamped from masks that integer inequalities define, so no version of a drawing library can change a pixel.
"""

from functools import lru_cache

import numpy as np

from hf_vlmerge.data.shapes.world import SHAPES, Scene, Thing

RGB = np.array(
    [
        (220, 40, 40),  # red
        (40, 160, 60),  # green
        (40, 80, 220),  # blue
        (235, 205, 40),  # yellow
        (140, 50, 170),  # purple
        (240, 130, 30),  # orange
        (40, 200, 210),  # cyan
        (120, 120, 120),  # gray
    ],
    dtype=np.uint8,
)
LIGHTEST, DARKEST = 250, 215  # of a background channel
RADII = (4, 6)  # small, large, in pixels at 48 x 48
REFERENCE = 48


@lru_cache(maxsize=256)
def mask(shape: int, radius: int) -> np.ndarray:
    """True where the shape is: (2 radius + 1, 2 radius + 1)."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    match SHAPES[shape]:
        case "circle":
            return x * x + y * y <= radius * radius + radius // 2
        case "square":
            return np.maximum(abs(x), abs(y)) * 8 <= radius * 7
        case "triangle":  # apex at the top
            return 2 * abs(x) <= y + radius
        case "cross":
            return np.minimum(abs(x), abs(y)) * 3 <= radius
        case "diamond":
            return abs(x) + abs(y) <= radius


def centre_and_radius(thing: Thing, image_size: int) -> tuple[int, int, int]:
    """Pixel (x, y) of a thing's centre, and its radius."""
    x = ((2 * thing.column + 1) * image_size) // 6 + (thing.dx * image_size) // REFERENCE
    y = ((2 * thing.row + 1) * image_size) // 6 + (thing.dy * image_size) // REFERENCE
    return x, y, max(2, (RADII[thing.size] * image_size) // REFERENCE)


def render(scene: Scene, random: np.random.Generator, image_size: int = REFERENCE, noise: float = 10.0) -> np.ndarray:
    """
    Shapes:
        -> (image_size, image_size, 3), uint8
    """
    image = np.empty((image_size, image_size, 3), dtype=np.uint8)
    image[:] = random.integers(DARKEST, LIGHTEST, size=3, endpoint=True)
    for thing in scene:
        x, y, radius = centre_and_radius(thing, image_size)
        top, left = max(0, y - radius), max(0, x - radius)
        bottom, right = min(image_size, y + radius + 1), min(image_size, x + radius + 1)
        part = mask(thing.shape, radius)[top - y + radius : bottom - y + radius, left - x + radius : right - x + radius]
        image[top:bottom, left:right][part] = RGB[thing.colour]
    if noise <= 0:
        return image
    noisy = random.standard_normal(image.shape, dtype=np.float32)
    noisy *= np.float32(noise)
    noisy += image
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)
