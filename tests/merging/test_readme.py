"""The README of the room: its table of methods is generated, its example of a method works."""

import re
from pathlib import Path

import pytest
import torch

import hf_vlmerge.merging as merging
from hf_vlmerge.cli.methods import describe
from hf_vlmerge.merging import get_merge_method, list_merge_methods
from hf_vlmerge.merging.registry import MERGE_METHODS

README = Path(merging.__file__).with_name("README.md")
MARKS = re.compile(r"(<!-- methods: .*? -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table():
    lines = [
        "| method | what it gives | parameters | needs | cost | streaming | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = ["", "Where references disagree, and which one the defaults follow:", ""]
    for method in map(get_merge_method, list_merge_methods()):
        facts = describe(method)
        names = [f"`{name}` {default(value)}" for name, value in facts["parameters"].items()]
        links = re.sub(r"(https://arxiv\.org/abs/(\S+))", r"[\2](\1)", facts["paper"])
        cells = (f"`{method.name}`", method.summary.rstrip("."), ", ".join(names), ", ".join(facts["needs"]))
        cells = [cell.replace("|", "\\|") for cell in (*cells, facts["cost"], facts["streaming"], links)]
        lines.append("| " + " | ".join(cells) + " |")
        theirs = ", ".join(f"`{name}: {default(value)}`" for name, value in facts["mergekit"].items())
        said = [facts["disagreements"], f"`compat: mergekit` is {theirs}." if theirs else ""]
        if any(said):
            notes.append(f"- `{method.name}`: {' '.join(filter(None, said))}")
    return "\n".join((*lines, *notes)) + "\n"


def default(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def test_the_table_of_methods_is_the_registry():
    found = MARKS.search(README.read_text(encoding="utf-8"))
    assert found[2] == table(), f"the table in {README.name} should read:\n\n{table()}"


def test_the_example_of_a_new_method_works():
    code = re.search(r"```python\n(@merge_method.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    scope = {}
    exec("from collections.abc import Callable\nfrom torch import Tensor", scope)
    exec("from hf_vlmerge.merging.registry import Chunk, merge_method", scope)
    exec(code, scope)
    try:
        merged = get_merge_method("geometric")([torch.tensor([1.0, -2.0]), torch.tensor([4.0, -8.0])])
        assert merged.tolist() == pytest.approx([2.0, -4.0])
    finally:
        MERGE_METHODS.entries.pop("geometric")


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(MARKS.sub(lambda found: found[1] + table() + found[3], text), encoding="utf-8")
