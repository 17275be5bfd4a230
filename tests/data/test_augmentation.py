import pytest
import torch

from hf_vlmerge.data.augmentation import Augmentation


def square_at(row: int, column: int) -> torch.Tensor:
    """White 32 x 32 with a black square of 8 pixels whose corner is at (row, column); uint8 (1, 3, 32, 32)."""
    image = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    image[:, :, row : row + 8, column : column + 8] = 0
    return image


def test_strength_zero_only_scales():
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    expected = images.float() / 127.5 - 1
    assert torch.allclose(Augmentation(0.0)(images), expected, atol=1e-5)


def test_draws_differ_between_images_and_repeat_with_the_generator():
    images = square_at(4, 4).expand(2, -1, -1, -1)
    first = Augmentation(1.0, torch.Generator().manual_seed(0))(images)
    again = Augmentation(1.0, torch.Generator().manual_seed(0))(images)
    assert torch.equal(first, again) and not torch.equal(first[0], first[1])
    assert first.min() >= -1 and first.max() <= 1


def test_left_stays_left_and_the_outside_is_white():
    left, right = (
        Augmentation(1.0, torch.Generator().manual_seed(1))(square_at(12, x).expand(64, -1, -1, -1)) for x in (2, 22)
    )
    darkness = lambda images: (1 - images).sum((1, 2))  # noqa: E731
    assert (darkness(left)[:, :16].sum(1) > darkness(left)[:, 16:].sum(1)).all()
    assert (darkness(right)[:, :16].sum(1) < darkness(right)[:, 16:].sum(1)).all()
    blank = torch.full((4, 3, 32, 32), 255, dtype=torch.uint8)
    assert torch.allclose(Augmentation(1.0)(blank), torch.ones(4, 3, 32, 32))


def test_a_negative_strength_is_refused():
    with pytest.raises(ValueError, match=r"strength is -1; expected 0 or more"):
        Augmentation(-1)
