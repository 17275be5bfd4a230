"""The mergeability report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

Colours follow the reader's light or dark setting; every coloured cell also shows its number.
"""

from html import escape
from pathlib import Path
from typing import Any

MEANING = {
    "cosine (weights)": "the same of the weights themselves; the verdict follows from it",
    "cosine": "1 − cosine of the angle: 0 same direction, 1 unrelated, 2 opposite",
    "l2": "Euclidean length of the difference; depends on the number of entries",
    "magnitude_gap": "1 − shorter length / longer length: 0 equal lengths",
    "sign_conflict": "share of the entries that both move whose signs differ; 0.5 is chance",
    "ssd": "soft sign dissimilarity: mean of 1 − |a + b| / (|a| + |b|), 0 where signs agree",
    "tssd": "the same after each member keeps its largest entries only",
}
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c1f24; --soft: #666d76; --line: #dde1e6;
  --well: #2f7d4f; --care: #8a6100; --badly: #b3352b; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181c; --text: #e4e6ea; --soft: #9aa1ab; --line: #343a42;
    --well: #6fcf97; --care: #e8b84a; --badly: #ff8a7a; } }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.summary { font-size: 1.1rem; border-left: 4px solid rgb(224 138 79); padding-left: .8rem; }
.soft, caption, summary span { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .15rem .6rem; text-align: right; border: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; } caption { text-align: left; }
.well { color: var(--well); } .with-care { color: var(--care); } .badly { color: var(--badly); }
tr.sum th, tr.sum td { border-top: 2px solid var(--line); }
details { margin: .4rem 0; } summary { cursor: pointer; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
svg .axis { stroke: var(--line); } svg .bound { stroke: var(--soft); stroke-dasharray: 3 4; }
"""
STROKES = ("#3d84c6", "#d0683a", "#4c9c6b", "#9067bd", "#b5a12b", "#c2588f")


def mergeability_page(report: Any, path: Path | str, *, title: str = "Mergeability report") -> Path:
    """Write a `MergeabilityReport` as one self-contained page; it opens with its summary. Returns the path."""
    what = "task vectors (members minus base)" if report.reference == "base" else "the weights themselves"
    facts = (
        f"Members: {', '.join(report.members)}. Compared: {what}, {report.compared:,} entries of each member; "
        f"{report.copied} tensors are not compared (one copy only, kept by a rule, or integers)."
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="summary">{escape(report.summary())}</p>',
        f'<p class="soft">{escape(facts)}</p>',
        profile(report),
        *(overview(report, pair) for pair in report.pairs),
        "<h2>Layers and module kinds</h2>",
        *(heat(report, metric, is_open=i == 0) for i, metric in enumerate(report.distances)),
        gram_table(report),
        how_to_read(report),
    ]
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body>\n</html>\n"
    )
    path = Path(path)
    path.write_text(text, encoding="utf-8")
    return path


def profile(report: Any) -> str:
    """An inline drawing: how far the weights of each pair are apart over the layers, with the verdicts' bounds."""
    layers = [layer for layer in report.layers if layer]
    if len(layers) < 2:
        return ""
    from hf_vlmerge.merging.survey import BOUNDS as bounds

    values = report.closeness.layers
    top = 1.08 * max(*(v for layer in layers for v in values[layer].values()), bounds[0])
    left, width, height = 46, 640, 170
    x = lambda i: left + i * (width - left - 8) / (len(layers) - 1)  # noqa: E731
    y = lambda v: 10 + (1 - v / top) * (height - 40)  # noqa: E731
    parts = [f'<line class="axis" x1="{left}" x2="{width}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>']
    for bound in (b for b in bounds if b <= top):
        parts.append(f'<line class="bound" x1="{left}" x2="{width}" y1="{y(bound):.1f}" y2="{y(bound):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(bound) + 4:.1f}" text-anchor="end">{bound:g}</text>')
    for i in sorted({0, len(layers) // 2, len(layers) - 1}):
        anchor = "start" if i == 0 else "end" if i == len(layers) - 1 else "middle"
        parts.append(f'<text x="{x(i):.1f}" y="{height - 10}" text-anchor="{anchor}">{escape(layers[i])}</text>')
    for number, pair in enumerate(report.pairs):
        points = [(x(i), y(values[layer][pair])) for i, layer in enumerate(layers) if pair in values[layer]]
        stroke = STROKES[number % len(STROKES)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{stroke}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{stroke}"/>' for a, b in points]
    legend = ", ".join(
        f'<span style="color:{STROKES[i % len(STROKES)]}">&#9679;</span> {escape(pair)}'
        for i, pair in enumerate(report.pairs)
    )
    name = "Cosine dissimilarity of the weights over the layers"
    opening = f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{name}">'
    return f'<p class="soft">{name}: {legend}</p>\n{opening}{"".join(parts)}</svg>'


def overview(report: Any, pair: str) -> str:
    """A pair's layers, module kinds and total, with every distance and the verdict."""
    head = "".join(f"<th>{escape(name)}</th>" for name in report.distances)
    rows = []
    for line in report.sheet(pair):
        cells = "".join(f"<td>{line.values[name]:.4g}</td>" for name in report.distances)
        is_layer = bool(line.verdict)
        kind = f'<td class="{line.verdict.replace(" ", "-")}">{escape(line.verdict)}</td>'
        rows.append(f"<tr{'' if is_layer else ' class=sum'}><th>{escape(line.label)}</th>{cells}{kind}</tr>")
    table = f"<table><tr><th></th>{head}<th>will merge</th></tr>{''.join(rows)}</table>"
    return f'<h2>{escape(pair)}</h2>\n<div class="wide">{table}</div>'


def heat(report: Any, metric: str, *, is_open: bool) -> str:
    """One distance: layers down, module kinds across, a table a pair. Full colour: as far as unrelated ones."""
    one, modules, top = report.distances[metric], list(report.first.modules), report.full_scale(metric)
    tables = []
    for pair in report.pairs:
        found = {(r.layer, r.module): r.value for r in one.rows if r.pair == pair}
        rows = []
        for layer in (name for name in report.layers if name and pair in one.layers[name]):
            cells = [found.get((layer, module)) for module in modules]
            cells.append(one.layers[layer][pair])
            rows.append(f"<tr><th>{escape(layer)}</th>{''.join(coloured(value, top) for value in cells)}</tr>")
        head = "".join(f"<th>{escape(module)}</th>" for module in [*modules, "all"])
        table = f"<table><caption>{escape(pair)}</caption><tr><th></th>{head}</tr>{''.join(rows)}</table>"
        tables.append(f'<div class="wide">{table}</div>' if rows else "")
    meaning = escape(MEANING.get(metric, ""))
    opening = f"<summary><b>{escape(metric)}</b> <span>{meaning}</span></summary>"
    return f"<details{' open' if is_open else ''}>{opening}{''.join(tables)}</details>"


def coloured(value: float | None, top: float) -> str:
    if value is None:
        return "<td></td>"
    share = round(80 * min(value / top, 1))  # percent of the colour; the text stays readable on it
    return f'<td style="background:rgb(224 138 79 / {share}%)">{value:.4g}</td>'


def gram_table(report: Any) -> str:
    """Conditioning of the Gram matrices: of each layer and member the hardest to invert."""
    if not report.grams:
        return ""
    rows = "".join(
        f"<tr><th>{escape(row.layer or 'outside layers')}</th>"
        + "".join(f"<td>{escape(t)}</td>" for t in gram_cells(row))
        + "</tr>"
        for row in report.worst_grams()
    )
    head = "".join(f"<th>{name}</th>" for name in ("", "member", "weight", "condition", "effective rank", "tokens"))
    note = (
        "Of each layer and member the matrix that is hardest to invert; RegMean inverts the members' sum. A matrix of "
        "fewer tokens than its size is singular; gamma below 1 mends that."
    )
    table = f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
    return f'<h2>Gram matrices</h2>\n<p class="soft">{note}</p>\n{table}'


def gram_cells(row: Any) -> tuple[str, ...]:
    condition = "singular" if row.condition is None else f"{row.condition:.3g}"
    tokens = "" if row.tokens is None else f"{row.tokens:,}"
    return row.member, row.weight, condition, f"{row.rank:.1f} of {row.size}", tokens


def how_to_read(report: Any) -> str:
    """What the words of the verdict mean."""
    from hf_vlmerge.merging.survey import BOUNDS

    text = (
        "The verdict on a layer is about a plain average, and follows from the cosine dissimilarity of the members' "
        f"weights: well up to {BOUNDS[0]:g}, badly above {BOUNDS[1]:g}, with care between. The bounds were set on "
        "a few merges of small models and are a rule of thumb: only an evaluation of the merged model decides. Values "
        "of a layer are those of all its entries taken as one vector."
    )
    if report.reference == "base":
        text += (
            " The other distances are of task vectors. Of unrelated ones the cosine dissimilarity is near 1 and half "
            "of the signs differ; more than that says that they pull against each other."
        )
    return f'<h2>How to read this</h2>\n<p class="soft">{text}</p>'
