"""The picture of a search: a curve over one varied value, a heat map over two, bars of soups, else its progress."""

from itertools import accumulate
from numbers import Real
from pathlib import Path
from typing import Any

CURVE, BEST, FAILED = "#1f5a8f", "#c0562e", "#8a8a8a"


def plot_sweep(report: Any, path: Path | str, *, measure: str = "score") -> Path:
    """
    Draw the candidates of a sweep with the best one marked; candidates without a score are crosses at the lower edge.

    Args:
        report: a `SweepReport`.
        measure: the name of the score, for the axis.

    Returns:
        The path of the picture (its suffix chooses the format).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    draw = chosen(report)
    height = 0.32 * len(report.trials) + 1.2 if draw is bars else 4.2
    figure = Figure(figsize=(7.5, max(2.5, height)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw(axes, report, measure)
    better = "lower" if report.minimise else "higher"
    axes.set_title(f"{report.kind}: best {measure} {report.best.score:.4g} ({better} is better)", fontsize=10)
    path = Path(path)
    figure.savefig(path, dpi=120)
    return path


def chosen(report: Any):
    """The kind of picture that shows this search."""
    numbers = all(isinstance(v, Real) and not isinstance(v, bool) for t in report.trials for v in t.settings.values())
    if len(report.varied) == 1 and numbers:
        return curve
    if len(report.varied) == 2 and report.kind == "grid":
        return heat_map
    return bars if report.kind in ("soups", "grid") else progress


def curve(axes, report, measure: str) -> None:
    """The score over the one varied value."""
    (name,) = report.varied
    points = sorted((t.settings[name], t.score) for t in report.trials if t.score is not None)
    axes.plot(*zip(*points, strict=True), "o-", color=CURVE, markersize=4, linewidth=1.5)
    failed = [t.settings[name] for t in report.trials if t.score is None]
    if failed:
        edge = axes.get_ylim()[0]
        axes.plot(failed, [edge] * len(failed), "x", color=FAILED, label="no score", clip_on=False)
    best = report.best
    axes.plot(
        [best.settings[name]], [best.score], "o", color=BEST, markersize=9, label=f"best: {best.settings[name]:g}"
    )
    axes.set(xlabel=name, ylabel=measure)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def heat_map(axes, report, measure: str) -> None:
    """The score over two varied values, each cell with its number where there is room."""
    x_name, y_name = report.varied
    xs, ys = (list(dict.fromkeys(t.settings[name] for t in report.trials)) for name in (x_name, y_name))
    scores = {(t.settings[x_name], t.settings[y_name]): t.score for t in report.trials}
    cells = [[float("nan") if scores[x, y] is None else scores[x, y] for x in xs] for y in ys]
    colours = "Blues_r" if report.minimise else "Blues"
    image = axes.imshow(cells, origin="lower", aspect="auto", cmap=colours)
    axes.figure.colorbar(image, label=measure)
    for i, y in enumerate(ys if len(xs) * len(ys) <= 120 else ()):
        for j, x in enumerate(xs):
            text = "–" if scores[x, y] is None else f"{scores[x, y]:.3g}"
            shade = 0.0 if scores[x, y] is None else image.norm(scores[x, y])
            dark = (shade < 0.5) if report.minimise else (shade > 0.5)
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    at = xs.index(report.best.settings[x_name]), ys.index(report.best.settings[y_name])
    axes.add_patch(frame(at))
    axes.set_xticks(range(len(xs)), [label(x) for x in xs], rotation=45 if len(xs) > 10 else 0)
    axes.set_yticks(range(len(ys)), [label(y) for y in ys])
    axes.set(xlabel=x_name, ylabel=y_name)


def frame(at: tuple[int, int]):
    from matplotlib.patches import Rectangle

    return Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, fill=False, edgecolor=BEST, linewidth=2.5)


def bars(axes, report, measure: str) -> None:
    """One bar a candidate, in the order in which they were tried."""
    trials = report.trials
    for i, t in enumerate(trials):
        if t.score is not None:
            axes.barh(i, t.score, color=BEST if t is report.best else CURVE, height=0.7)
        axes.annotate(
            "no score" if t.score is None else f" {t.score:.4g}", (t.score or 0, i), va="center", fontsize=8,
            color=FAILED if t.score is None else "black", annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(trials)), [describe(t) for t in trials], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(measure)
    axes.margins(x=0.12)  # room for the numbers
    axes.spines[["top", "right"]].set_visible(False)


def describe(trial: Any) -> str:
    """A candidate in a few words."""
    values = ", ".join(
        f"{name.rpartition('.')[2]} {label(v)}" for name, v in trial.settings.items() if name != "members"
    )
    members = " + ".join(trial.settings.get("members", ()))
    return ": ".join(filter(None, (trial.note, members or values)))


def label(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def progress(axes, report, measure: str) -> None:
    """Scores in the order in which they were tried, and the best so far."""
    scored = [(i, t.score) for i, t in enumerate(report.trials, 1) if t.score is not None]
    steps, scores = zip(*scored, strict=True)
    axes.plot(steps, scores, "o", color=CURVE, markersize=4, label="candidate")
    axes.step(
        steps, list(accumulate(scores, min if report.minimise else max)), where="post", color=BEST, label="best so far"
    )
    best = ", ".join(f"{name} {label(value)}" for name, value in report.best.settings.items())
    axes.set(xlabel=f"candidates tried (best: {best})", ylabel=measure)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
