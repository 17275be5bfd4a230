"""What the written folder holds beside the weights: config, tokenizer, processor, code, and the recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import MergeError
from .groups import Sources
from .planning import layout_of
from .recipe import Recipe
from .tensors.dtypes import dtype_name, parse_dtype
from .tensors.sinks import Spec, copy_side_files, write_json
from .tensors.sources import TensorSource, open_source


def files_source(recipe: Recipe, sources: Sources) -> TensorSource:
    """Whose files are carried along: ``files_from``, else the checkpoint with experts, the base, the first model."""
    if recipe.files_from is not None:
        by_ref = {m.model: m.alias for m in recipe.models}
        role = by_ref.get(recipe.files_from, recipe.files_from)
        if role not in ("base", *recipe.aliases) or role not in sources:
            raise MergeError(f"files_from: {recipe.files_from!r} is neither 'base' nor a member")
        return sources[role]
    return next(sources[role] for role in ("experts", "base", *recipe.aliases) if role in sources)


def merged_config(recipe: Recipe, sources: Sources) -> dict[str, Any] | None:
    """The carried config.json with the expert layout's changes, and the dtype where the recipe sets one. Without
    ``_name_or_path``: it names an input, often by a path of somebody's machine."""
    config = files_source(recipe, sources).config
    if config is None:
        return None
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    if recipe.experts_of:
        config |= layout_of(recipe, sources["experts"]).config
    if recipe.out_dtype or recipe.dtype:
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = dtype_name(parse_dtype(recipe.out_dtype or recipe.dtype))
    return config


def write_files(folder: Path, recipe: Recipe, config: Mapping[str, Any] | None, source: TensorSource) -> None:
    """Carry the side files; config.json follows the merge, recipe.yaml tells how the folder was made."""
    copy_side_files(folder, {name: path for name, path in source.side_files.items() if name != "config.json"})
    if config is not None:
        write_json(folder / "config.json", config)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def verify(folder: Path, specs: Mapping[str, Spec]) -> None:
    """Read the written headers back: names, shapes and dtypes must be those of the plan."""
    with open_source(folder) as written:
        found = {key: Spec(written.dtype(key), written.shape(key)) for key in written}
    if found != specs:
        wrong = sorted(found.keys() ^ specs.keys()) or [k for k in specs if specs[k] != found[k]]
        raise RuntimeError(f"the written folder differs from the plan at {wrong[0]}")
