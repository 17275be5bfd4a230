"""`hf-vlmerge methods`: the merge methods with their papers and parameters."""

import json
import textwrap
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
    print("\n\n".join(map(text, rows)))


def text(row: dict) -> str:
    """One method as a paragraph."""
    needs = f"  (needs {' and '.join(row['needs'])})" if row["needs"] else ""
    lines = [f"{row['name']}  {row['paper']}{needs}", row["summary"], f"cost {row['cost']}; {row['streaming']}"]
    for parameter, default in row["parameters"].items():
        other = row["mergekit"].get(parameter, default)
        lines.append(f"{parameter} = {default}" + (f"  (mergekit: {other})" if other != default else ""))
    return "\n    ".join([*lines, *textwrap.wrap(row["disagreements"], 100)])


def describe(method) -> dict:
    """What a method is: paper, first line of the docstring, needs, cost, streaming class, parameters with their
    defaults and those of mergekit's variant, and where references disagree."""
    return {
        "name": method.name,
        "paper": paper_link(method.paper),
        "summary": method.summary,
        "needs": needs_of(method),
        "needs_base": bool(method.needs_base),
        "needs_statistics": bool(method.statistics),
        "cost": method.cost,
        "streaming": method.streaming,
        "parameters": {
            **{name: parameter.default for name, parameter in method.parameters.items()},
            **({"weights": 1.0} if method.weighted else {}),
        },
        "mergekit": dict(method.mergekit),
        "disagreements": method.disagreements,
    }


def needs_of(method) -> list[str]:
    """What a recipe must give for a method."""
    least, most = method.members
    count = [f"{least} member{'s' if least > 1 else ''}"] if least == most else []
    count += [f"at most {most} members"] if least < most < 100 else []
    count += [f"at least {least} members"] if least > 1 and most >= 100 else []
    base = ["base"] if method.needs_base else ["base (optional)"] if method.takes_base else []
    return [*base, *([method.statistics] if method.statistics else []), *count]


def paper_link(paper: str | None) -> str:
    """An arXiv number as an address; other references as they are."""
    if paper and paper.replace(".", "").isdigit():
        return f"https://arxiv.org/abs/{paper}"
    return paper or ""
