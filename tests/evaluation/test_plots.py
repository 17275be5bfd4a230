"""The first plot: it is written, and shows what it was given."""

from PIL import Image

from hf_vlmerge.evaluation.plots import draw_arms, draw_distances, plot_merge_comparison

ARMS = {
    "modality-agnostic": ([0.75, 0.76], [0.77, 0.78]),
    "naive merge": ([0.2, 0.3], [0.6, 0.62]),
    "seeded merge": ([0.7, 0.71], [0.75, 0.76]),
}
DISTANCES = {"naive": {"L2": 40.0, "SSD": 0.5}, "seeded": {"L2": 10.0, "SSD": 0.1}}


def test_a_picture_is_written(tmp_path):
    path = plot_merge_comparison(ARMS, DISTANCES, tmp_path / "plot.png", chance=0.01, ceiling=0.97)
    with Image.open(path) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_bars_are_means_and_relative_distances():
    from matplotlib.figure import Figure

    left, right = Figure().subplots(1, 2)
    draw_arms(left, ARMS, chance=0.01, ceiling=0.97)
    heights = [round(bar.get_height(), 6) for bar in left.patches]
    assert heights == [75.5, 77.5, 25.0, 61.0, 70.5, 75.5]
    assert {text.get_text() for text in left.get_legend().get_texts()} == {
        "before fine-tuning", "after fine-tuning", "chance 1.0", "ceiling 97.0",
    }  # fmt: skip
    draw_distances(right, DISTANCES)
    assert [round(bar.get_height(), 6) for bar in right.patches] == [1, 1, 0.25, 0.2]
    assert "10" in {text.get_text() for text in right.texts}
