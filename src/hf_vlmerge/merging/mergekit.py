"""mergekit's recipe form in our words: the same keys run unchanged where they mean something here.

Understood: ``merge_method``, ``base_model``, ``models`` with scalars, layer gradients and filter lists, ``dtype``,
``out_dtype``, ``tokenizer_source`` (base or a model), and ``slices`` in which every source spans all layers.
"""

from collections.abc import Mapping
from typing import Any

from .errors import MergeError
from .registry import ALIASES, get_merge_method, list_merge_methods

IGNORED = ("int8_mask", "name", "chat_template", "tokenizer")
FORM = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source", "slices"}


def translate(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the recipe in the native form, and notes on what was ignored."""
    content, notes = dict(recipe), []
    in_their_form = content.keys() <= FORM | set(IGNORED)
    if isinstance(content.get("parameters"), Mapping):
        content["parameters"] = dict(content["parameters"])
    for where in (content, content.get("parameters")):
        for key in IGNORED if isinstance(where, dict) else ():
            if where.pop(key, None) is not None:
                notes.append(f"{key}: has no meaning here and is ignored")
    if isinstance(content.get("base_model"), Mapping) and "rename" not in content["base_model"]:
        content["base_model"] = _model({"model": content["base_model"]})["model"]
    if "slices" in content:
        _join_slices(content)
    if isinstance(content.get("models"), list | tuple):
        content["models"] = [_model(m) for m in content["models"]]
        _place_base(content)
        _carry_files(content, notes)
        _name_vectors(content)
        if in_their_form:
            notes += _differences(content)
    return content, notes


def _join_slices(content: dict[str, Any]) -> None:
    """Layer stacking is refused; one slice in which every source spans the same layers from 0 is the models form."""
    slices = content.pop("slices")
    only = slices[0] if isinstance(slices, list) and len(slices) == 1 else None
    sources = only.get("sources") if isinstance(only, Mapping) else None
    spans = (
        [s.get("layer_range") if isinstance(s, Mapping) else None for s in sources or ()] if _is_list(sources) else []
    )
    same = bool(spans) and all(_is_list(span) and list(span) == list(spans[0]) for span in spans)
    if "models" in content or not same or len(spans[0]) != 2 or spans[0][0] != 0 or not isinstance(spans[0][1], int):
        raise MergeError("slices: layer stacking is not understood; every source must span all layers, in one slice")
    given = [p or {} for p in (content.get("parameters"), only.get("parameters"))]
    if not all(isinstance(p, Mapping) for p in given):
        raise MergeError("slices: parameters must be a mapping")
    content["parameters"] = {**given[0], **given[1]}
    content["models"] = [{k: v for k, v in s.items() if k != "layer_range"} for s in sources]
    content["layers"] = spans[0][1]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _model(entry: Any) -> Any:
    """A model may be written as {model: {path, revision}} or {model: {model: ..., lora: ...}}."""
    if isinstance(entry, Mapping) and isinstance(entry.get("model"), Mapping):
        parts = entry["model"]
        named = (_path(parts.get("model", parts)), _path(parts.get("lora")))
        return {**entry, "model": "+".join(filter(None, named))}
    return entry


def _path(place: Any) -> Any:
    if isinstance(place, Mapping):
        return f"{place.get('path')}@{place['revision']}" if place.get("revision") else place.get("path")
    return place


def _place_base(content: dict[str, Any]) -> None:
    """A base listed among the models: it is no member of a delta method, and the first member where no weights say
    whose is whose."""
    base, name = content.get("base_model"), content.get("merge_method")
    listed = [m for m in content["models"] if (m.get("model") if isinstance(m, Mapping) else m) == base]
    if base is None or not listed or name not in list_merge_methods():
        return
    others, method = [m for m in content["models"] if m not in listed], get_merge_method(name)
    if method.needs_base or method.takes_base:
        content["models"] = others
    elif not method.weighted:
        content["models"] = [*listed, *others]


def _name_vectors(content: dict[str, Any]) -> None:
    """nuslerp's two switches say what one vector is: we have one parameter for it."""
    own = content.get("parameters")
    if content.get("merge_method") != "nuslerp" or not isinstance(own, dict):
        return
    flatten, columns = own.pop("nuslerp_flatten", True), own.pop("nuslerp_row_wise", False)
    if not flatten:
        own["along"] = "column" if columns else "row"


def _differences(content: Mapping[str, Any]) -> list[str]:
    """One note for each parameter whose default selects another variant of the formula than mergekit's does. A recipe
    that uses a word of ours (scale, weights, ratio) is not mergekit's."""
    name = content.get("merge_method")
    if name not in list_merge_methods():
        return []
    levels = [content.get("parameters"), *(m.get("parameters") for m in content["models"] if isinstance(m, Mapping))]
    given = {str(key) for level in levels if isinstance(level, Mapping) for key in level}
    if given & set(ALIASES.values()):
        return []
    method, own = get_merge_method(name), {ALIASES.get(key, key) for key in given}
    return [
        f"{name}: {p} is {method.default(p)!r} here and {theirs!r} in mergekit; `compat: mergekit` selects that"
        for p, theirs in method.mergekit.items()
        if p not in own and theirs != method.default(p)
    ]


def _carry_files(content: dict[str, Any], notes: list[str]) -> None:
    """tokenizer_source is our files_from, as far as it names one model."""
    source = content.pop("tokenizer_source", None)
    if source is None:
        return
    refs = [m.get("model") if isinstance(m, Mapping) else m for m in content["models"]]
    if source == "union" or (source != "base" and source not in refs):
        raise MergeError(f"tokenizer_source: {source!r} is not understood; give 'base' or one of the models")
    if source in refs:
        content["files_from"] = source
    notes.append("tokenizer_source: all side files are carried from that model")
