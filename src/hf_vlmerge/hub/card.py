"""Model cards: metadata for the Hub, and how to load, remake and judge a model.

A card names local inputs by their last path component and Hub inputs by id and commit, so no path of the author's
machine ends up on a public page. It says what was measured and recorded, and that nothing is known where nothing is.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_vlmerge.merging import MergeReport

from . import merges, provenance
from .facts import PAPERS_OF, PIPELINE_TAGS, architecture_of, config_facts, loading, reference, weight_facts

TEMPLATES = Path(__file__).parent
START = "start"  # role of a model that training began from


def write_merge_card(
    folder: Path | str,
    report: MergeReport,
    *,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    distances: Mapping[str, float] | None = None,
    license: str | None = None,
    hashes: bool = False,
) -> Path:
    """
    Write README.md and provenance.json into the folder of a merge; fits `merge(..., finish=write_merge_card)`.

    Args:
        results: `{row: {column: value}}`, printed as one table.
        scores: `{data set: {metric: value}}` of this very model, for the metadata; printed where there are no results.
        distances: `{"ssd, vision-language": value}`.
        license: SPDX-like id for the metadata, where the parents' is known.
        hashes: read the written weights once more, for their sha256; `publish` does it otherwise.

    Returns:
        The path of the card.
    """
    folder = Path(folder)
    weights = provenance.weight_files(folder) if hashes else []
    text = render(report, results=results, scores=scores, distances=distances, license=license, weights=weights)
    (folder / provenance.NAME).write_text(provenance.text(report.sources), encoding="utf-8")
    return write(folder, text)


def write_model_card(
    folder: Path | str,
    *,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    data: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    parents: Mapping[str, str] | None = None,
    name: str | None = None,
    summary: str = "",
) -> Path:
    """
    Write README.md into a folder with a trained or converted model (config.json and safetensors).

    Args:
        results: `{row: {column: value}}`, printed as one table.
        scores: `{data set: {metric: value}}` of this very model, for the metadata; printed where there are no results.
        data: names of what the model was trained on, as the section about training lists them.
        settings: `{name: value}` of the training.
        license: SPDX-like id for the metadata.
        datasets: those of the data that are data sets of the Hub, by id, for the metadata.
        parents: `{Hub id: revision}` of the models that training began from; they become `base_model`.
        name: title of the card and what its example loads; by default the folder's name.
        summary: a sentence on what the model is for, after the title.

    Returns:
        The path of the card.

    Raises:
        MergeError (a ValueError): the folder holds no weights.
        ValueError: results or scores are not nested.
        FileNotFoundError: it holds no config.json.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder.name} has no config.json, from which a card is written.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = name or folder.resolve().name
    inputs = parent_inputs(parents or {})
    metadata = {
        "base_model": list(parents or {}) or None,
        "license": license,
        "datasets": list(datasets) or None,
        "tags": ["hf_vlmerge"],
    }
    text = fill(
        "model_card.md.jinja",
        config,
        metadata,
        scores=scores,
        name=name,
        summary=summary,
        details=config_facts(config) | weight_facts(folder),
        data=data,
        settings=table({key: {"value": value} for key, value in (settings or {}).items()}, "setting"),
        parents=[provenance.link(each) for each in inputs],
        results=table(results or scores or {}),
        loading=loading(config, name),
        files=provenance.section(provenance.weight_files(folder), inputs),
        papers=[],
    )
    if inputs:
        (folder / provenance.NAME).write_text(provenance.text(inputs), encoding="utf-8")
    return write(folder, text)


def render(
    report: MergeReport,
    *,
    results=None,
    scores=None,
    distances=None,
    license: str | None = None,
    weights: Sequence = (),
) -> str:
    """The card of a merge as text: YAML metadata, then Markdown."""
    config = report.config or {}
    name = merges.name_of(report)
    size = {"Parameters": f"{report.parameters:,}"}
    return fill(
        "merge_card.md.jinja",
        config,
        merges.metadata(report) | {"license": license},
        scores=scores,
        name=name,
        details=size if report.recipe.adapters else config_facts(config) | size,
        loading=merges.adapter_loading(name) if report.recipe.adapters else loading(config, name),
        results=table(results or scores or {}),
        distances=table({pair: {"distance": value} for pair, value in (distances or {}).items()}),
        files=provenance.section(weights, report.sources),
        **merges.facts(report),
    )


def fill(
    template: str,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    name: str,
    scores: Mapping[str, Mapping[str, float]] | None,
    papers: Sequence[str],
    **facts,
) -> str:
    """A template with its facts, after the block of metadata; the papers of the architecture follow the given ones."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, FileSystemLoader

    known = {"library_name": "transformers", "pipeline_tag": PIPELINE_TAGS.get(architecture_of(config))}
    index = {"model_name": name, "eval_results": model_index(scores, known["pipeline_tag"])} if scores else {}
    block = ModelCardData(**known | metadata | index).to_yaml()
    papers = dict.fromkeys([*papers, *PAPERS_OF.get(config.get("model_type"), ())])
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    body = environment.get_template(template).render(name=name, papers=[reference(paper) for paper in papers], **facts)
    return f"---\n{block}\n---\n\n{body}"


def model_index(scores: Mapping[str, Mapping[str, float]], task: str | None) -> list:
    """`{data set: {metric: value}}` as the Hub reads it: an `EvalResult` a value. Ids of data sets on the Hub stay."""
    from huggingface_hub import EvalResult

    check_nested(scores)
    check_slugs(scores)
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=slug(data),
            dataset_name=data,
            metric_type=re.sub(r"\W+", "_", metric.lower()),
            metric_name=metric,
            metric_value=number(value, data, metric),
        )
        for data, values in scores.items()
        for metric, value in values.items()
    ]


def slug(data: str) -> str:
    """The name of a data set as the Hub writes it."""
    return re.sub(r"[^\w/.]+", "-", data)


def check_slugs(scores: Mapping[str, Any]) -> None:
    first: dict[str, str] = {}
    for data in scores:
        other = first.setdefault(slug(data), data)
        if other != data:
            raise ValueError(
                f"expected data sets that the Hub can tell apart; {other!r} and {data!r} are both {slug(data)!r} there."
            )


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's own; anything else as it is."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (ValueError, RuntimeError):  # an array of several
        return value


def number(value: Any, data: str, metric: str) -> float:
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"expected a number as {metric!r} of {data!r}; got {' '.join(repr(value).split())}.")
    return found


def check_nested(rows: Mapping[str, Any]) -> None:
    flat = [name for name, row in rows.items() if not isinstance(row, Mapping)]
    if flat:
        raise ValueError(f"expected {{name: {{name: value}}}}; {flat[0]!r} is {rows[flat[0]]!r}.")


def parent_inputs(parents: Mapping[str, str]) -> list[dict[str, Any]]:
    """Models that training began from, as inputs whose files are not known yet."""
    return [{"role": START, "label": name, "revision": revision, "files": []} for name, revision in parents.items()]


def write(folder: Path, text: str) -> Path:
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def table(rows: Mapping[str, Mapping[str, Any]], corner: str = "") -> str:
    """`{row: {column: value}}` as Markdown, nothing of nothing; absent cells stay empty, floats get four digits."""
    if not rows:
        return ""
    check_nested(rows)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| {corner}".rstrip() + " | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = (plain(row.get(column, "")) for column in columns)
        lines.append(f"| {name} | " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)
