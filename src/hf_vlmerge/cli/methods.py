"""`hf-vlmerge methods`: the merge methods with their papers and parameters."""

import json
from typing import Annotated

import typer


def methods(
    name: Annotated[str | None, typer.Argument(help="Only this method.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
):
    """List the merge methods with their papers, needs and parameters.

    \b
    Example: hf-vlmerge methods interpolation
    """
    from hf_vlmerge.merging import get_merge_method, list_merge_methods

    rows = [describe(get_merge_method(each)) for each in ([name] if name else list_merge_methods())]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        needs = [need for need in ("base", "statistics") if row[f"needs_{need}"]]
        print(f"{row['name']}  {row['paper']}" + (f"  (needs {' and '.join(needs)})" if needs else ""))
        print(f"    {row['summary']}")
        for parameter, default in row["parameters"].items():
            print(f"    {parameter} = {default}")


def describe(method) -> dict:
    """Name, paper, first line of the docstring, needs, and parameters with their defaults."""
    return {
        "name": method.name,
        "paper": paper_link(method.paper),
        "summary": method.summary,
        "needs_base": bool(method.needs_base),
        "needs_statistics": bool(method.statistics),
        "parameters": {
            name: "required" if parameter.default is parameter.empty else parameter.default
            for name, parameter in method.parameters.items()
        },
    }


def paper_link(paper: str | None) -> str:
    """An arXiv number as an address; other references as they are."""
    if paper and paper.replace(".", "").isdigit():
        return f"https://arxiv.org/abs/{paper}"
    return paper or ""
