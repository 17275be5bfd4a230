import datasets
import pytest
import torch
from PIL import Image

from hf_vlmerge.data.examples import load_examples


@pytest.fixture
def folder(tmp_path):
    images = [Image.new("RGB", (20, 10), color) for color in ("red", "blue", "white")]
    rows = {"image": images, "captions": [["red", "all red"], ["blue"], ["white"]], "label": [0, 1, 2]}
    features = datasets.Features(
        image=datasets.Image(), captions=datasets.List(datasets.Value("string")), label=datasets.Value("int64")
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    return tmp_path


def test_rows_come_with_decoded_square_images(folder):
    examples = load_examples(folder, "train", 8)
    assert [example["label"] for example in examples] == [0, 1, 2]
    assert examples[0]["captions"] == ["red", "all red"] and "image" not in examples[0]
    assert examples[1]["pixel_values"].dtype == torch.uint8
    assert examples[1]["pixel_values"].shape == (3, 8, 8)
    assert examples[1]["pixel_values"].flatten(1).float().mean(1).tolist() == [0, 0, 255]


def test_a_missing_split_and_a_missing_column_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"expected validation.parquet in .*; found train.parquet"):
        load_examples(folder, "validation", 8)
    with pytest.raises(ValueError, match="has no image column 'picture'; it has: image, captions, label"):
        load_examples(folder, "train", 8, image_column="picture")
