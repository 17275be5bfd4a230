"""From a recipe to open sources and a checked list of groups; nothing but headers is read."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from .errors import MergeError
from .groups import COPY, MergeGroup, Ref, Sources, group_by_expert, group_by_name
from .recipe import ExpertLayout, Recipe
from .tensors.sources import TensorSource, open_source
from .views import viewed
from .weights import layer_counts


def references(recipe: Recipe) -> dict[str, str]:
    """The source reference of each role that a recipe fills."""
    roles = {"experts": recipe.experts_of, "base": recipe.base_model, "statistics": recipe.statistics}
    for member in recipe.models:
        roles[member.alias] = member.model
        roles[f"statistics:{member.alias}"] = member.statistics
    return {role: ref for role, ref in roles.items() if ref}


@contextmanager
def open_sources(recipe: Recipe, given: Mapping[str, Any] | None = None) -> Iterator[dict[str, TensorSource]]:
    """Open everything a recipe names, by role. ``given`` replaces references by dicts or sources that are open."""
    roles, given = references(recipe), given or {}
    with ExitStack() as stack:
        opened: dict[str, TensorSource] = {}
        for ref in dict.fromkeys(roles.values()):
            opened[ref] = open_source(given.get(ref, ref))
            if ref not in given:
                stack.enter_context(opened[ref])
        yield viewed(recipe, {role: opened[ref] for role, ref in roles.items()})


def layout_of(recipe: Recipe, source: TensorSource) -> ExpertLayout:
    """The recipe's expert layout, else the one in the source's config.json."""
    if recipe.experts is not None:
        return recipe.experts
    layout = (source.config or {}).get("expert_layout")
    if layout is None:
        raise MergeError(f"{source.label} has no expert_layout in its config.json; give 'experts' in the recipe")
    return ExpertLayout.from_dict(layout, f"expert_layout of {source.label}")


def plan(recipe: Recipe, sources: Sources) -> list[MergeGroup]:
    """All groups of a recipe, with the checks that span tensors."""
    if recipe.experts_of:
        groups = list(group_by_expert(sources, layout_of(recipe, sources["experts"]), recipe))
    else:
        groups = list(group_by_name(sources, recipe))
    check_depth(recipe, groups)
    check_ties(groups, sources)
    check_quantised(groups, sources)
    return groups


def check_depth(recipe: Recipe, groups: list[MergeGroup]) -> None:
    """The layers that a recipe's ``slices`` claim are all layers."""
    depth = max(layer_counts(g.output for g in groups).values(), default=0)
    if recipe.layers not in (None, depth):
        raise MergeError(f"slices span {recipe.layers} layers of {depth}: layer stacking is not understood")


def check_quantised(groups: list[MergeGroup], sources: Sources) -> None:
    """What is averaged are weights, not the codes of a quantised model."""
    for role in {ref.source for group in groups if group.method != COPY for ref in group.refs}:
        if (sources[role].config or {}).get("quantization_config"):
            raise MergeError(
                f"{sources[role].label} is quantised (quantization_config in its config.json), and codes cannot be "
                "averaged; save it dequantised first"
            )


def check_ties(groups: list[MergeGroup], sources: Sources) -> None:
    """Outputs whose inputs, or whose namesakes in every source, are the same memory are made alike, or they would no
    longer be tied."""
    memory = {Ref(role, k): i for role, s in sources.items() for i, keys in enumerate(s.tied) for k in keys}
    first: dict[tuple, MergeGroup] = {}
    for group in groups:
        namesakes = [Ref(role, group.output) for role, source in sources.items() if group.output in source]
        for refs in (group.inputs, namesakes):
            shared = tuple((ref.source, memory.get(ref)) for ref in refs)
            if not shared or any(i is None for _, i in shared):
                continue
            other = first.setdefault(shared, group)
            if how(other) != how(group):
                raise MergeError(f"{other.output} and {group.output} are tied, but the recipe merges them differently")


def how(group: MergeGroup) -> tuple:
    return group.method, group.parameters, group.weights, [ref.source for ref in group.inputs]
