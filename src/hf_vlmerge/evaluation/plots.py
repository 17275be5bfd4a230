"""Plots of results. matplotlib is loaded when a plot is drawn, and draws without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

BEFORE, AFTER = "#9db8d2", "#1f5a8f"
DISTANCE_COLOURS = ("#c0562e", "#4c8c6b", "#7d5ba6", "#8a8a8a")


def plot_merge_comparison(
    arms: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    distances: Mapping[str, Mapping[str, float]],
    path: Path | str,
    *,
    measure: str = "retrieval recall",
    chance: float | None = None,
    ceiling: float | None = None,
) -> Path:
    """
    Bars of each arm before and after fine-tuning, and beside them the distances between the experts that were merged.

    Args:
        arms: arm -> scores before and scores after, one a seed, as fractions; bars are means, dots the single runs.
        distances: merge -> metric -> value. Metrics have scales of their own, so each is shown relative to the first
            merge's, with its value written on the bar.
        chance, ceiling: drawn as lines.

    Returns:
        The path of the picture (its suffix chooses the format).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    draw_arms(left, arms, chance, ceiling)
    left.set_ylabel(f"{measure}, %")
    draw_distances(right, distances)
    path = Path(path)
    figure.savefig(path, dpi=120)
    return path


def draw_arms(axes, arms, chance: float | None, ceiling: float | None) -> None:
    for i, (before, after) in enumerate(arms.values()):
        for shift, scores, colour, label in ((-0.2, before, BEFORE, "before"), (0.2, after, AFTER, "after")):
            percent = [100 * score for score in scores]
            mean = sum(percent) / len(percent)
            axes.bar(i + shift, mean, 0.38, color=colour, label=f"{label} fine-tuning" if i == 0 else None)
            if len(percent) > 1:
                axes.plot([i + shift] * len(percent), percent, "o", color="black", markersize=3, alpha=0.6)
            axes.annotate(f"{mean:.1f}", (i + shift, max(percent)), (0, 3), textcoords="offset points", ha="center")
    for value, label, style in ((ceiling, "ceiling", "--"), (chance, "chance", ":")):
        if value is not None:
            axes.axhline(100 * value, color="black", linewidth=1, linestyle=style, label=f"{label} {100 * value:.1f}")
    axes.set_xticks(range(len(arms)), [name.replace(" ", "\n", 1).replace("-", "-\n", 1) for name in arms])
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylim(0, 120)  # room for the legend
    axes.legend(loc="upper left", ncols=4, frameon=False, fontsize=8, columnspacing=1.2)
    axes.spines[["top", "right"]].set_visible(False)


def draw_distances(axes, distances) -> None:
    merges = list(distances)
    metrics = list(distances[merges[0]])
    width = 0.8 / len(merges)
    for i, merge in enumerate(merges):
        for j, metric in enumerate(metrics):
            value, reference = distances[merge][metric], distances[merges[0]][metric] or 1.0
            place = j + (i - (len(merges) - 1) / 2) * width
            colour = DISTANCE_COLOURS[i % len(DISTANCE_COLOURS)]
            axes.bar(place, value / reference, 0.95 * width, color=colour, label=merge if j == 0 else None)
            axes.annotate(
                f"{value:.3g}", (place, value / reference), (0, 3), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_xticks(range(len(metrics)), metrics)
    axes.set_ylabel(f"distance of vision and language experts,\nrelative to {merges[0]}", fontsize=9)
    axes.set_ylim(0, 1.3 * max(1.0, axes.get_ylim()[1]))
    axes.legend(loc="upper left", frameon=False, fontsize=8, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
