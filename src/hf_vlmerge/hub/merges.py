"""What a merge's report says, as the card wants it."""

import re
from collections.abc import Mapping
from typing import Any

from hf_vlmerge.merging import MergeReport, get_merge_method

from .provenance import link

COMMIT = re.compile(r"[0-9a-f]{40}")  # a local folder may have an "@" in its name, too


def facts(report: MergeReport) -> dict[str, Any]:
    """What the template of the card asks for."""
    members = [source["label"] for source in report.sources if is_member(source["role"])]
    return {
        "members": " and ".join([", ".join(members[:-1]), members[-1]] if len(members) > 1 else members),
        "counts": report.counts,
        "size": size_of(report),
        "sources": [source | {"link": link(source)} for source in report.sources],
        "methods": method_rows(report),
        "recipe": report.recipe.to_yaml(),
        "notes": report.notes,
        "papers": papers(report),
    }


def metadata(report: MergeReport) -> dict[str, Any]:
    """What the Hub reads. Only inputs that are on the Hub can be linked as base models."""
    parents = [name for s in report.sources if not is_statistics(s["role"]) for name in hub_names(s)]
    return {
        "base_model": list(dict.fromkeys(parents)) or None,
        "base_model_relation": "merge" if parents else None,
        "library_name": "peft" if report.recipe.adapters else "transformers",
        "tags": ["merge", "hf_vlmerge", *used_methods(report)],
    }


def adapter_loading(name: str) -> str:
    """Lines that load a merge of adapters."""
    call = f'PeftModel.from_pretrained(base, "{name}")'
    return f"from peft import PeftModel\n\nmodel = {call}  # base: the model that the adapters were made for"


def hub_names(source: Mapping[str, Any]) -> list[str]:
    """The Hub ids behind a source: its own, or those of base and adapter, which stand in its label with commits."""
    if source["revision"]:
        return [source["label"].partition("@")[0]]
    parts = [part.partition("@") for part in source["label"].split("+")]
    return [name for name, _, revision in parts if COMMIT.fullmatch(revision)]


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
    """References of the methods used, and of no other method."""
    return [paper for name in used_methods(report) if (paper := get_merge_method(name).paper)]
