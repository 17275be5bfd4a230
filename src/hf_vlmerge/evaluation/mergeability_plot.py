"""The mergeability report as a picture: layers down, module kinds across, one panel a pair and distance."""

from pathlib import Path
from typing import Any

MOST_PAIRS = 6  # that still make a readable picture; all are in the JSON and on the page


def plot_mergeability(report: Any, path: Path | str) -> Path:
    """
    Draw heat maps of a `MergeabilityReport`. Of one distance all pairs share the colours, whose scale ends no
    earlier than the report says (so that small differences do not shine).

    Returns:
        The path of the picture (its suffix chooses the format).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs, metrics, layers = report.pairs[:MOST_PAIRS], list(report.distances), report.layers
    modules = [*report.first.modules, "all"]
    width = 0.36 * len(modules) + 1.5
    labels = 0.075 * max(len(layer) for layer in [*layers, "outside layers"])
    height = 0.2 * len(layers) + 1.5
    size = labels + width * len(metrics), height * len(pairs) + 0.4
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(pairs), len(metrics), squeeze=False, sharey=True, sharex=True)
    for column, metric in enumerate(metrics):
        values = [cells(report, metric, pair, layers, modules) for pair in pairs]
        top = report.full_scale(metric)
        for row, pair in enumerate(pairs):
            axes = grid[row][column]
            image = axes.imshow(values[row], aspect="auto", cmap="viridis", vmin=0, vmax=top)
            axes.set_facecolor("0.92")  # where there is nothing to compare
            axes.set_title(metric if len(pairs) == 1 else f"{metric}\n{pair}", fontsize=8)
            axes.set_xticks(range(len(modules)), modules, rotation=60, ha="right", fontsize=7)
            axes.set_yticks(range(len(layers)), [layer or "outside layers" for layer in layers], fontsize=7)
            axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=[axes[column] for axes in grid], shrink=min(1.0, 2.0 / height + 0.3), pad=0.02)
        bar.ax.tick_params(labelsize=7)
    what = "task vectors" if report.reference == "base" else "weights"
    left_out = len(report.pairs) - len(pairs)
    title = f"Distances of the {what} of {report.pairs[0] if len(pairs) == 1 else ', '.join(report.members)}"
    figure.suptitle(title + (f" ({left_out} further pairs are not drawn)" if left_out else ""), fontsize=10)
    path = Path(path)
    figure.savefig(path, dpi=130)
    return path


def cells(report: Any, metric: str, pair: str, layers: list[str], modules: list[str]) -> list[list[float]]:
    """Rows of values; NaN where a layer has no such module. The last column is the whole layer."""
    one = report.distances[metric]
    found = {(r.layer, r.module): r.value for r in one.rows if r.pair == pair and r.layer}
    found |= {(layer, "all"): values[pair] for layer, values in one.layers.items() if pair in values}
    return [[found.get((layer, module), float("nan")) for module in modules] for layer in layers]
