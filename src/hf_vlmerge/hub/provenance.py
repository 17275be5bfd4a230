"""Where a model's weights come from, by hash: `provenance.json`, and the section "Files" of the card that shows it.

`{"inputs": [{"role", "label", "revision", "files": [{"name", "size", "sha256"}]}]}`; what is not known is null.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_vlmerge.merging.tensors import sha256_of

from .checks import files_of

NAME = "provenance.json"
HEADING = "## Files"
SECTION = re.compile(r"^## Files\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
LATER = "`hf-vlmerge publish` lists the sha256 of every weight file here."
KEPT = ("role", "label", "revision", "files")


def read(folder: Path) -> list[dict[str, Any]]:
    """The inputs that a folder's provenance.json names; none without one."""
    path = folder / NAME
    if not path.is_file():
        return []
    try:
        inputs = json.loads(path.read_text(encoding="utf-8"))["inputs"]
        return [{key: each[key] for key in KEPT} for each in inputs]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{NAME} is not as it was written: expected {{"inputs": [{{{", ".join(KEPT)}}}]}}') from None


def text(inputs: Iterable[Mapping[str, Any]]) -> str:
    """The content of provenance.json."""
    plain = [{key: each[key] for key in KEPT} for each in inputs]
    return json.dumps({"inputs": plain}, indent=2, ensure_ascii=False) + "\n"


def weight_files(folder: Path) -> list[dict[str, Any]]:
    """Name, bytes and sha256 of every weight file of a folder."""
    names = [name for name in files_of(folder) if name.endswith(".safetensors")]
    return [{"name": n, "size": (folder / n).stat().st_size, "sha256": sha256_of(folder / n)} for n in names]


def section(weights: Iterable[Mapping[str, Any]], inputs: Iterable[Mapping[str, Any]]) -> str:
    """The section of the card: weight files of the model, then those that it was made from."""
    lines = [HEADING, ""]
    rows = [f"| {f['name']} | {f['size']:,} | `{f['sha256']}` |" for f in weights]
    lines += ["| file | bytes | sha256 |", "|---|---:|---|", *rows, ""] if rows else [LATER, ""]
    rows = [input_row(each, file) for each in inputs for file in each["files"] or [{}]]
    if rows:
        lines += ["Made from:", "", "| role | source | file | bytes | sha256 |", "|---|---|---|---:|---|", *rows, ""]
    return "\n".join(lines) + "\n"


def input_row(source: Mapping[str, Any], file: Mapping[str, Any]) -> str:
    size = f"{file['size']:,}" if file else ""
    sha256 = f"`{file['sha256']}`" if file.get("sha256") else "not recorded"
    return f"| {source['role']} | {link(source)} | {file.get('name', '')} | {size} | {sha256} |"


def link(source: Mapping[str, Any]) -> str:
    """A Hub input as a link to its commit, a local one by name."""
    label, revision = source["label"].partition("@")[0], source["revision"]
    return f"[{label}](https://huggingface.co/{label}/tree/{revision})" if revision else f"`{source['label']}`"


def with_section(card: str, new: str) -> str:
    """A card with its section "Files" replaced, or put before the citation or at the end where it has none."""
    if SECTION.search(card):
        return SECTION.sub(lambda _: new, card, count=1)
    at = card.find("\n## Citation")
    at = len(card.rstrip()) + 1 if at < 0 else at + 1
    return card[:at].rstrip() + "\n\n" + new + card[at:]
