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


def test_a_white_square_hides_a_part_and_its_centre_is_inside():
    black = torch.zeros((256, 3, 32, 32), dtype=torch.uint8)
    hidden = Augmentation(0.0, hidden=0.5)(black) == 1
    assert torch.equal(hidden[:, 0], hidden[:, 2])
    rows, columns = hidden[:, 0].any(2).sum(1), hidden[:, 0].any(1).sum(1)
    assert torch.equal(hidden[:, 0].sum((1, 2)), rows * columns)  # a rectangle, and nothing else
    assert max(rows.max(), columns.max()) == 16  # half of 32
    inside = (rows > 0) & (columns > 0) & ~hidden[:, 0, [0, -1]].any((1, 2)) & ~hidden[:, 0, :, [0, -1]].any((1, 2))
    assert inside.any() and ((rows - columns).abs() <= 1)[inside].all()  # a square where the edge does not cut it
    assert hidden.float().mean((0, 1)).min() > 0  # every place is hidden at times


@pytest.mark.parametrize("name", ["strength", "hidden"])
def test_a_negative_amount_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} is -1; expected 0 or more"):
        Augmentation(**{name: -1})
