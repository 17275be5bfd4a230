"""The model card of a merge: metadata for the Hub, and how to load, remake and judge the model.

It names local inputs by their last path component and Hub inputs by id and commit, so no path of the author's machine
ends up on a public page.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_vlmerge.merging import MergeReport, get_merge_method

TEMPLATE = Path(__file__).with_name("merge_card.md.jinja")
OUR_MODEL_TYPES = ("vlmo",)
PAPERS = {
    "2304.14933": "Sung et al. 2023, *An Empirical Study of Multimodal Model Merging*",
    "2203.05482": "Wortsman et al. 2022, *Model soups*",
    "2212.04089": "Ilharco et al. 2022, *Editing Models with Task Arithmetic*",
    "2212.09849": "Jin et al. 2022, *Dataless Knowledge Fusion by Merging Weights of Language Models* (RegMean)",
}


def write_merge_card(
    folder: Path | str,
    report: MergeReport,
    *,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    distances: Mapping[str, float] | None = None,
    license: str | None = None,
) -> Path:
    """
    Write README.md into the folder of a merge; fits `merge(..., finish=write_merge_card)`.

    Args:
        results: `{row: {column: value}}`, printed as one table.
        distances: `{"ssd, vision-language": value}`.
        license: SPDX-like id for the metadata, where the parents' is known.

    Returns:
        The path of the card.
    """
    path = Path(folder) / "README.md"
    path.write_text(render(report, results=results, distances=distances, license=license), encoding="utf-8")
    return path


def render(report: MergeReport, *, results=None, distances=None, license: str | None = None) -> str:
    """The card as text: YAML metadata, then Markdown."""
    from jinja2 import Environment

    template = Environment(keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    members = [source["label"] for source in report.sources if is_member(source["role"])]
    body = template.render(
        name=name_of(report),
        members=" and ".join([", ".join(members[:-1]), members[-1]] if len(members) > 1 else members),
        counts=report.counts,
        size=size_of(report),
        loading=loading(report),
        sources=[source | {"link": link(source)} for source in report.sources],
        methods=method_rows(report),
        recipe=report.recipe.to_yaml(),
        notes=report.notes,
        results=table(results) if results else "",
        distances=table({pair: {"distance": value} for pair, value in distances.items()}) if distances else "",
        papers=papers(report),
    )
    return f"---\n{metadata(report, license)}---\n\n{body}"


def metadata(report: MergeReport, license: str | None) -> str:
    """The YAML block that the Hub reads. Only inputs that are on the Hub can be linked as base models."""
    from huggingface_hub import ModelCardData

    parents = [name for s in report.sources if not is_statistics(s["role"]) for name in hub_names(s)]
    data = ModelCardData(
        base_model=list(dict.fromkeys(parents)) or None,
        base_model_relation="merge" if parents else None,
        library_name="peft" if report.recipe.adapters else "transformers",
        license=license,
        tags=["merge", "hf_vlmerge", *used_methods(report)],
    )
    return data.to_yaml() + "\n"


def hub_names(source: Mapping[str, Any]) -> list[str]:
    """The Hub ids behind a source: its own, or those of base and adapter, which stand in its label with revisions."""
    if source["revision"]:
        return [source["label"].partition("@")[0]]
    return [part.partition("@")[0] for part in source["label"].split("+") if "@" in part]


def loading(report: MergeReport) -> str:
    """Lines that load the model, with the class that its config.json names."""
    if report.recipe.adapters:
        call = f'PeftModel.from_pretrained(base, "{name_of(report)}")'
        return f"from peft import PeftModel\n\nmodel = {call}  # base: the model that the adapters were made for"
    config = report.config or {}
    architecture = (config.get("architectures") or ["AutoModel"])[0]
    package = "hf_vlmerge" if config.get("model_type") in OUR_MODEL_TYPES else "transformers"
    return f'from {package} import {architecture}\n\nmodel = {architecture}.from_pretrained("{name_of(report)}")'


def name_of(report: MergeReport) -> str:
    """Last component of the output's path."""
    return report.output.name if report.output else "merged-model"


def size_of(report: MergeReport) -> str:
    """Parameters after and before."""
    before = report.input_parameters
    return f"It has {report.parameters:,} parameters" + (f"; its inputs have {before:,}." if before else ".")


def is_statistics(role: str) -> bool:
    return role.startswith("statistics")


def is_member(role: str) -> bool:
    return role != "base" and not is_statistics(role)


def link(source: Mapping[str, Any]) -> str:
    """A Hub input as a link to its commit, a local one by name."""
    label, revision = source["label"].partition("@")[0], source["revision"]
    return f"[{label}](https://huggingface.co/{label}/tree/{revision})" if revision else f"`{source['label']}`"


def used_methods(report: MergeReport) -> list[str]:
    """Names of the methods that made at least one tensor; copying is none."""
    return [name for name in dict.fromkeys(t.method for t in report.tensors) if name != "copy"]


def method_rows(report: MergeReport) -> list[dict]:
    """One row for all tensors that were made alike."""
    alike: dict[tuple, int] = {}
    for t in report.tensors:
        settings = ", ".join(f"{name} = {value}" for name, value in t.parameters.items())
        place = (t.method, ", ".join(t.members), settings)
        alike[place] = alike.get(place, 0) + 1
    names = ("method", "members", "settings")
    return [dict(zip(names, place, strict=True)) | {"tensors": count} for place, count in alike.items()]


def papers(report: MergeReport) -> list[str]:
    """References of the methods used, and of nothing else."""
    numbers = dict.fromkeys(get_merge_method(name).paper for name in used_methods(report))
    return [reference(number) for number in numbers if number]


def reference(paper: str) -> str:
    """An arXiv number as a titled link; any other reference as it is."""
    if not paper.replace(".", "").isdigit():
        return paper
    return f"{PAPERS.get(paper, 'arXiv ' + paper)}, https://arxiv.org/abs/{paper}"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """`{row: {column: value}}` as Markdown; absent cells stay empty, floats get four digits."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        lines.append(f"| {name} | " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)
