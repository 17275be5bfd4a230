"""`hf-vlmerge distance`: how far the members of a merge are from each other, and which layers will merge well."""

import json
from pathlib import Path
from typing import Annotated

import typer


def distance(
    what: Annotated[
        list[str],
        typer.Argument(help="A recipe, a checkpoint with experts, or two and more checkpoints (alias=reference)."),
    ],
    metric: Annotated[
        str | None, typer.Option(help="One distance alone (l2, cosine, ssd, tssd, ...); otherwise the whole report.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Common starting weights; then task vectors are compared.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="none: compare the weights; base: the vectors from the base (default with a base)."),
    ] = None,
    statistics: Annotated[
        str | None, typer.Option(help="Gram matrices (of hf-vlmerge statistics), to report their conditioning.")
    ] = None,
    pairs: Annotated[str, typer.Option(help="each: pair by pair; all: one value for all members at once.")] = "each",
    keep_fraction: Annotated[
        float | None, typer.Option(help="tssd: the share of largest entries that is kept.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="tssd: the threshold is found a tensor or global.")] = None,
    modules: Annotated[bool, typer.Option("--modules", help="Also print every module of every layer.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write heat maps, layers by module kinds (PNG, SVG, PDF).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one self-contained HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: everything that was measured.")] = False,
):
    """The mergeability report: all distances between experts of one checkpoint or between several checkpoints.

    \b
    Example: hf-vlmerge distance demo_out/runs/seed_0/seeded --html report.html
    """
    from hf_vlmerge.merging import MergeError, list_distances
    from hf_vlmerge.merging import distance as one_distance
    from hf_vlmerge.merging.survey import mergeability

    given = {"keep_fraction": keep_fraction, "scope": scope}
    parameters = {name: value for name, value in given.items() if value is not None}
    common = {"base": base, "pairs": pairs}
    if metric is not None:
        if plot or html or statistics:
            raise MergeError("--plot, --html and --statistics belong to the whole report: leave out --metric")
        one = one_distance(members(what), metric=metric, reference=reference or "none", **common, **parameters)
        print(json.dumps(one.to_dict(), indent=2, default=str) if as_json else one.table())
        return
    metrics = {name: parameters if name == "tssd" else {} for name in list_distances()}
    report = mergeability(members(what), reference=reference, statistics=statistics, metrics=metrics, **common)
    if plot:
        from hf_vlmerge.evaluation.mergeability_plot import plot_mergeability

        plot_mergeability(report, plot)
    if html:
        from hf_vlmerge.evaluation.mergeability_page import mergeability_page

        mergeability_page(report, html)
    print(json.dumps(report.to_dict(), indent=2, default=str) if as_json else report.table(modules=modules))


def members(what: list[str]) -> str | list[str] | dict[str, str]:
    """One reference as it is; several as a list, or as a mapping if all have the form alias=reference."""
    if len(what) == 1:
        return what[0]
    named = [each.partition("=") for each in what]
    if all(equals for _, equals, _ in named):
        return {alias: reference for alias, _, reference in named}
    return what
