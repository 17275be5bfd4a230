"""`hf-vlmerge distance`: how far the members of a merge are from each other."""

import json
from typing import Annotated

import typer


def distance(
    what: Annotated[
        list[str],
        typer.Argument(help="A recipe, a checkpoint with experts, or two and more checkpoints (alias=reference)."),
    ],
    metric: Annotated[str, typer.Option(help="l2, cosine, ssd or tssd.")] = "ssd",
    base: Annotated[str | None, typer.Option(help="Common starting weights, for --reference base.")] = None,
    reference: Annotated[
        str, typer.Option(help="Compare the weights (none) or the vectors from the base (base).")
    ] = "none",
    pairs: Annotated[str, typer.Option(help="each: pair by pair; all: one value for all members at once.")] = "each",
    keep_fraction: Annotated[
        float | None, typer.Option(help="tssd: the share of largest entries that is kept.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="tssd: the threshold is found a tensor or global.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: total, layers and rows.")] = False,
):
    """Distances between experts of one checkpoint or between several checkpoints, a layer and in total.

    \b
    Example: hf-vlmerge distance demo_out/runs/seed_0/seeded --metric tssd
    """
    from hf_vlmerge.merging import distance as run

    given = {"keep_fraction": keep_fraction, "scope": scope}
    parameters = {name: value for name, value in given.items() if value is not None}
    report = run(members(what), metric=metric, base=base, reference=reference, pairs=pairs, **parameters)
    print(json.dumps(report.to_dict(), indent=2, default=str) if as_json else report.table())


def members(what: list[str]) -> str | list[str] | dict[str, str]:
    """One reference as it is; several as a list, or as a mapping if all have the form alias=reference."""
    if len(what) == 1:
        return what[0]
    named = [each.partition("=") for each in what]
    if all(equals for _, equals, _ in named):
        return {alias: reference for alias, _, reference in named}
    return what
