"""Plots of searches: each kind of search gets its picture, and no candidate is left out without a word."""

import pytest
from PIL import Image

from hf_vlmerge.evaluation.sweep_plot import bars, chosen, curve, heat_map, plot_sweep, progress
from hf_vlmerge.merging.recipe import Recipe
from hf_vlmerge.merging.search import SweepReport, Trial

RECIPE = Recipe.load({"merge_method": "linear", "models": ["a", "b"]})


def report(kind, settings, scores, notes=(), minimise=False):
    trials = [
        Trial(s, RECIPE, score, "" if score is not None else "failed", note)
        for s, score, note in zip(settings, scores, notes or [""] * len(scores), strict=True)
    ]
    return SweepReport(kind, list(settings[0]), minimise, trials)


ONE = report("grid", [{"parameters.scale": x / 4} for x in range(5)], [0.1, 0.4, None, 0.5, 0.2])
TWO = report(
    "grid", [{"x": x, "y": y} for x in (0.5, 1) for y in ("sum", "mean")], [0.1, None, 3.0, 0.2], minimise=True
)
SOUPS = report("soups", [{"members": ["a", "b"]}, {"members": ["a"]}], [0.7, None], ["uniform soup", "alone"])
TEXTS = report("grid", [{"merge_method": "linear"}, {"merge_method": "slerp"}], [0.2, 0.3])
OPTIMISED = report("nelder-mead", [{"x": 0.1, "y": 0.2}, {"x": 0.3, "y": 0.1}, {"x": 0.2, "y": 0.2}], [0.2, None, 0.6])


@pytest.mark.parametrize(
    ("found", "kind"), [(ONE, curve), (TWO, heat_map), (SOUPS, bars), (TEXTS, bars), (OPTIMISED, progress)]
)
def test_every_search_has_its_picture(found, kind, tmp_path):
    assert chosen(found) is kind
    picture = plot_sweep(found, tmp_path / "sweep.png", measure="accuracy")
    with Image.open(picture) as image:
        assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 20)) > 20


def drawn(found):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    chosen(found)(axes, found, "accuracy")
    return axes


def test_the_best_is_marked_and_failures_are_shown():
    axes = drawn(ONE)
    line, failed, best = axes.get_lines()
    assert list(line.get_xdata()) == [0, 0.25, 0.75, 1] and list(failed.get_xdata()) == [0.5]
    assert list(best.get_xdata()) == [0.75] and list(best.get_ydata()) == [0.5]
    axes = drawn(TWO)
    (frame,) = axes.patches
    assert (frame.get_x(), frame.get_y()) == (-0.5, -0.5), "the lowest score, when lower is better"
    assert sorted(text.get_text() for text in axes.texts) == ["0.1", "0.2", "3", "–"]
    assert [label.get_text() for label in drawn(SOUPS).get_yticklabels()] == ["uniform soup: a + b", "alone: a"]
    steps = drawn(OPTIMISED).get_lines()[1]
    assert list(steps.get_xdata()) == [1, 3] and list(steps.get_ydata()) == [0.2, 0.6]
