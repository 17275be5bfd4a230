"""The engine: plan the groups, stream every tensor through its method in chunks, write, check, publish by a rename.

Inputs are read in chunks of flat order, merged in float32 and rounded once. Chunks start on block boundaries (or are whole
rows or tensors), so the result does not depend on their size.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import MergeError
from .groups import COPY, MergeGroup, Ref, Sources, group_by_expert, group_by_name
from .program import BLOCK, Chunk, Step, Unit, WholeModel, begin, blocks, complete, resume, shape_for, single_thread
from .recipe import ExpertLayout, Recipe
from .registry import get_merge_method
from .report import MergeReport, TensorReport
from .tensors.dtypes import dtype_name, is_mergeable
from .tensors.sinks import SafetensorsSink, Spec, atomic_folder, copy_side_files, write_json
from .tensors.sources import TensorSource, open_source

CHUNK_SIZE = 1 << 20  # elements of one member


@contextmanager
def open_sources(recipe: Recipe, given: Mapping[str, Any] | None = None) -> Iterator[dict[str, TensorSource]]:
    """Open everything a recipe names, by role. ``given`` replaces references by dicts or sources that are open already."""
    wanted = {"experts": recipe.experts_of, "base": recipe.base_model, "statistics": recipe.statistics}
    wanted |= {m.alias: m.model for m in recipe.models}
    wanted |= {f"statistics:{m.alias}": m.statistics for m in recipe.models}
    with ExitStack() as stack:
        opened: dict[str, TensorSource] = {}
        for ref in dict.fromkeys(filter(None, wanted.values())):
            is_given = ref in (given or {})
            opened[ref] = open_source(given[ref] if is_given else ref)
            if not is_given:
                stack.enter_context(opened[ref])
        yield {role: opened[ref] for role, ref in wanted.items() if ref}


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
    return groups


def check_depth(recipe: Recipe, groups: list[MergeGroup]) -> None:
    from .weights import layer_counts

    deepest = max(layer_counts(g.output for g in groups).values(), default=0)
    if recipe.layers is not None and recipe.layers != deepest:
        raise MergeError(
            f"slices span {recipe.layers} layers, the models have {deepest}: layer stacking is not understood"
        )


def check_ties(groups: list[MergeGroup], sources: Sources) -> None:
    """Tensors that are one memory in every input must be merged alike, or they would no longer be tied."""
    by_output = {g.output: g for g in groups}
    for keys in {keys for source in sources.values() for keys in source.tied}:
        tied = [by_output[k] for k in keys if k in by_output]
        for other in tied[1:]:
            same = ("method", "parameters", "weights", "members")
            if any(getattr(tied[0], part) != getattr(other, part) for part in same):
                raise MergeError(
                    f"{tied[0].output} and {other.output} are tied, but the recipe merges them differently"
                )


@dataclass(frozen=True)
class Reader:
    """Reads groups in chunks and refuses values that are not finite."""

    sources: Sources
    chunk_size: int = CHUNK_SIZE
    allow_nonfinite: bool = False
    seed: int = 0

    def read(self, ref: Ref, start: int, stop: int) -> Tensor:
        """A run of one input in float32."""
        values = self.sources[ref.source].read(ref.key, start, stop).to(torch.float32)
        self.check(ref, values)
        return values

    def check(self, ref: Ref, values: Tensor) -> None:
        if not self.allow_nonfinite and values.dtype.is_floating_point and not values.isfinite().all():
            bad = "NaN" if values.isnan().any() else "Inf"
            raise MergeError(
                f"{ref.key} of {self.sources[ref.source].label} ({ref.source}) contains {bad}; allow it or mend it"
            )

    def spans(self, group: MergeGroup, unit: Unit) -> Iterator[tuple[int, int]]:
        """Flat (start, stop) of each chunk: whole blocks of the unit."""
        view, total = shape_for(unit, group.shape), prod(group.shape)
        width = 1 if unit == "element" else max(1, prod(view[1:]))
        block = max(1, BLOCK // width) * width
        step = total if unit == "tensor" else max(1, self.chunk_size // block) * block
        for start in range(0, total, max(step, 1)):
            yield start, min(start + step, total)

    def chunks(self, group: MergeGroup, unit: Unit) -> Iterator[Chunk]:
        view = shape_for(unit, group.shape)
        statistics = tuple(None if r is None else self.sources[r.source][r.key] for r in group.statistics)
        weights = torch.tensor(group.weights, dtype=torch.float64)
        for start, stop in self.spans(group, unit):
            shape = view if unit == "tensor" else (-1, *view[1:])
            yield Chunk(
                x=torch.stack([self.read(ref, start, stop).reshape(shape) for ref in group.inputs]),
                base=None if group.base is None else self.read(group.base, start, stop).reshape(shape),
                members=group.members,
                weights=weights,
                statistics=statistics,
                tokens=group.tokens,
                name=group.output,
                start=start,
                seed=self.seed,
            )

    def all_equal(self, group: MergeGroup, refs: tuple[Ref, ...]) -> bool:
        """Whether all these tensors are the same bytes; stops at the first chunk that differs."""
        if len({self.sources[r.source].dtype(r.key) for r in refs}) > 1:
            return False
        for start, stop in self.spans(group, "element"):
            first, *others = (self.sources[r.source].read(r.key, start, stop).view(torch.uint8) for r in refs)
            if not all(torch.equal(first, other) for other in others):
                return False
        return True


@dataclass
class Job:
    """One group on its way: its program's open request, or the function that merges its chunks (None: copy)."""

    group: MergeGroup
    unit: Unit = "element"
    program: Any = None
    step: Step = Step(None)


def settle_whole_model(jobs: list[Job], chunks: Callable[[Job], Iterator[Chunk]], kin: Callable[[Job], Any]) -> None:
    """Serve all requests for sums over the whole model: over all jobs of one kin, per member."""
    while waiting := [j for j in jobs if isinstance(j.step.request, WholeModel)]:
        sums: dict[Any, dict[str, list[Tensor]]] = {}
        for job in waiting:
            rows = sums.setdefault(kin(job), {})
            for chunk in chunks(job):
                for block in blocks(chunk, job.unit):
                    add_by_member(rows, block.members, job.step.request.reduce(block))
        for job in waiting:
            rows, members = sums[kin(job)], job.group.members
            totals = tuple(torch.stack(parts) for parts in zip(*(rows[m] for m in members), strict=True))
            job.step = resume(job.program, totals)


def add_by_member(rows: dict[str, list[Tensor]], members: tuple[str, ...], parts: tuple[Tensor, ...]) -> None:
    for i, member in enumerate(members):
        own = [part[i] for part in parts]
        rows[member] = own if member not in rows else [a + b for a, b in zip(rows[member], own, strict=True)]


def merged_chunks(
    groups: list[MergeGroup], reader: Reader, progress: bool
) -> Iterator[tuple[MergeGroup, int, Tensor, str]]:
    """Yield (group, start, values in the output dtype, how) for every chunk of every output tensor, group after group.

    ``how`` is "merged", "copied", or "equal" for inputs that were byte-equal and therefore copied.
    """
    jobs = []
    for group in groups:
        job = Job(group)
        if group.method != COPY:
            method = get_merge_method(group.method)
            job.unit, job.program = method.unit, method.program(group.parameters)
            job.step = begin(job.program)
        jobs.append(job)
    settle_whole_model(
        jobs, lambda j: reader.chunks(j.group, j.unit), lambda j: (j.group.method, repr(j.group.parameters))
    )
    with tqdm(
        total=sum(prod(g.shape) for g in groups), unit="", unit_scale=True, desc="merge", disable=not progress
    ) as bar:
        for job in jobs:
            how = "copied" if job.group.method == COPY else "equal" if is_equal(job.group, reader) else "merged"
            run = merge_chunks(job, reader) if how == "merged" else copy_chunks(job.group, reader)
            for start, values in run:
                yield job.group, start, values, how
                bar.update(values.numel())


def is_equal(group: MergeGroup, reader: Reader) -> bool:
    """Whether the inputs (and the base of a method that needs one) are the same bytes and the method keeps such tensors."""
    method = get_merge_method(group.method)
    refs = (*group.inputs, *((group.base,) if method.needs_base and group.base else ()))
    return method.keeps_equal(group.parameters, group.weights) and reader.all_equal(group, refs)


def copy_chunks(group: MergeGroup, reader: Reader) -> Iterator[tuple[int, Tensor]]:
    ref = group.inputs[0]
    for start, stop in reader.spans(group, "element"):
        values = reader.sources[ref.source].read(ref.key, start, stop)
        reader.check(ref, values.float() if is_mergeable(values.dtype) else values)
        yield start, rounded(values, group, reader)


def merge_chunks(job: Job, reader: Reader) -> Iterator[tuple[int, Tensor]]:
    merge = complete(job.program, job.step, lambda: reader.chunks(job.group, job.unit), job.unit)
    for chunk in reader.chunks(job.group, job.unit):
        values = merge(chunk)
        if values.shape != chunk.x.shape[1:]:
            raise RuntimeError(f"{job.group.method} returned {tuple(values.shape)} for {tuple(chunk.x.shape[1:])}")
        yield chunk.start, rounded(values.reshape(-1), job.group, reader)


def rounded(values: Tensor, group: MergeGroup, reader: Reader) -> Tensor:
    """The one rounding, to the output dtype."""
    if values.dtype == group.dtype:
        return values
    result = values.to(group.dtype)
    if not reader.allow_nonfinite and values.isfinite().all() and not result.float().isfinite().all():
        raise MergeError(
            f"{group.output}: values up to {values.abs().max():.4g} do not fit into {dtype_name(group.dtype)}"
        )
    return result


def merge(
    recipe: Any,
    output: Path | str | None,
    *,
    sources: Mapping[str, Any] | None = None,
    finish: Callable[[Path, MergeReport], None] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_nonfinite: bool = False,
    fsync: bool = True,
    chunk_size: int = CHUNK_SIZE,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> MergeReport:
    """Merge as a recipe says and write the result into the folder ``output``.

    recipe: path, YAML text, mapping or :class:`Recipe`. sources: ``{reference in the recipe: dict or source}`` for tensors
    in memory. finish: called with the temporary folder and the report before the rename (the place for a model card).
    overwrite: replace an existing folder, by renaming at the very end. dry_run: write nothing; the report is the plan.
    allow_nonfinite: accept NaN and Inf in inputs. fsync: flush to disk before the rename. chunk_size: elements of one member
    that are in memory at a time (the result does not depend on it). max_shard_size: bytes a weight file ("5GB").

    Raises MergeError for anything wrong with recipe, inputs or output; the output folder then is as it was.
    """
    started = time.perf_counter()
    recipe = Recipe.load(recipe)
    with open_sources(recipe, sources) as opened, single_thread():
        groups = plan(recipe, opened)
        report = describe(recipe, opened, groups)
        if dry_run:
            return report
        if output is None:
            raise MergeError("an output folder is needed")
        reader = Reader(opened, checked_chunk_size(chunk_size), allow_nonfinite, recipe.seed)
        specs = {g.output: Spec(g.dtype, g.shape) for g in sorted(groups, key=lambda g: natural(g.output))}
        with atomic_folder(output, overwrite=overwrite, fsync=fsync) as folder:
            with SafetensorsSink(folder, specs, max_shard_size=max_shard_size) as sink:
                for group, start, values, how in merged_chunks(groups, reader, progress):
                    sink.write(group.output, start, values)
                    report.how[group.output] = how
                report.bytes_written = sink.total
            write_side_files(folder, report, files_source(recipe, opened))
            verify(folder, specs)
            report.output, report.seconds = Path(output), time.perf_counter() - started
            if finish is not None:
                finish(folder, report)
    return report


def merge_tensors(
    recipe: Any,
    sources: Mapping[str, Any] | None = None,
    *,
    allow_nonfinite: bool = False,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The same merge in memory: output tensors by name."""
    recipe = Recipe.load(recipe)
    with open_sources(recipe, sources) as opened, single_thread():
        groups = plan(recipe, opened)
        result = {g.output: torch.empty(prod(g.shape), dtype=g.dtype) for g in groups}
        reader = Reader(opened, checked_chunk_size(chunk_size), allow_nonfinite, recipe.seed)
        for group, start, values, _ in merged_chunks(groups, reader, progress):
            result[group.output][start : start + values.numel()] = values
        return {g.output: result[g.output].reshape(g.shape) for g in groups}


def checked_chunk_size(size: int) -> int:
    if size < 1:
        raise MergeError(f"chunk_size must be positive, not {size}")
    return size


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort layers by number, so that neighbours land in one shard."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def files_source(recipe: Recipe, sources: Sources) -> TensorSource:
    """Whose config, tokenizer, processor and code are carried along: ``files_from``, else experts, base, first model."""
    if recipe.files_from is not None:
        by_ref = {m.model: m.alias for m in recipe.models}
        role = by_ref.get(recipe.files_from, recipe.files_from)
        if role not in sources:
            raise MergeError(f"files_from: {recipe.files_from!r} is neither 'base' nor a member")
        return sources[role]
    return next(sources[role] for role in ("experts", "base", *recipe.aliases) if role in sources)


def write_side_files(folder: Path, report: MergeReport, source: TensorSource) -> None:
    """Carry the side files; config.json follows the merge, recipe.yaml tells how the folder was made."""
    copy_side_files(folder, {name: path for name, path in source.side_files.items() if name != "config.json"})
    if report.config is not None:
        write_json(folder / "config.json", report.config)
    (folder / "recipe.yaml").write_text(report.recipe.to_yaml(), encoding="utf-8")


def merged_config(recipe: Recipe, sources: Sources, groups: list[MergeGroup]) -> dict[str, Any] | None:
    """The carried config.json with the expert layout's changes and the dtype, where the recipe sets one."""
    config = files_source(recipe, sources).config
    if config is None:
        return None
    config = dict(config)
    if recipe.experts_of:
        config |= layout_of(recipe, sources["experts"]).config
    if recipe.out_dtype or recipe.dtype:
        dtype = next((dtype_name(g.dtype) for g in groups if g.dtype.is_floating_point), None)
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config |= {key: dtype} if dtype else {}
    return config


def verify(folder: Path, specs: Mapping[str, Spec]) -> None:
    """Read the written headers back: names, shapes and dtypes must be those of the plan."""
    with open_source(folder) as written:
        found = {key: Spec(written.dtype(key), written.shape(key)) for key in written}
    if found != specs:
        wrong = sorted(found.keys() ^ specs.keys()) or [k for k in specs if specs[k] != found[k]]
        raise RuntimeError(f"the written folder differs from the plan at {wrong[0]}")


def describe(recipe: Recipe, sources: Sources, groups: list[MergeGroup]) -> MergeReport:
    """The report before anything is computed: the plan, where everything comes from, what a reader should know."""
    notes = list(recipe.notes)
    stored = {dtype_name(sources[r.source].dtype(r.key)) for g in groups if g.method != COPY for r in g.inputs}
    if len(stored) > 1:
        notes.append(f"the inputs have different dtypes ({', '.join(sorted(stored))})")
    if "float64" in stored:
        notes.append("float64 inputs are merged in float32 precision")
    for role, source in sources.items():
        if source.ignored:
            notes.append(
                f"{source.label} ({role}): not tensors of the state dict, left out: {', '.join(source.ignored[:8])}"
            )
    if "base" in sources:
        rest = [k for k in sources["base"] if k not in {g.output for g in groups}]
        if rest:
            notes.append(f"the base has {len(rest)} tensors that no member has, such as {rest[0]}; they are not used")
    used = {key for source in sources.values() for key in (source.label,)}
    return MergeReport(
        recipe=public_recipe(recipe, sources),
        tensors=[
            TensorReport(
                g.output, g.shape, dtype_name(g.dtype), g.method, g.members, dict(g.parameters), g.weights, g.note
            )
            for g in groups
        ],
        sources=[
            {"role": role, "label": s.label, "revision": s.revision, "files": [f._asdict() for f in s.files]}
            for role, s in sources.items()
        ],
        notes=notes,
        config=merged_config(recipe, sources, groups),
        input_parameters=sum(s.numel(k) for r, s in sources.items() if is_member(r) for k in s) if used else 0,
    )


def is_member(role: str) -> bool:
    return role != "base" and not role.startswith("statistics")


def public_recipe(recipe: Recipe, sources: Sources) -> Recipe:
    """The recipe with Hub revisions pinned and paths of this machine reduced to their last part."""
    refs = {"experts": recipe.experts_of, "base": recipe.base_model, "statistics": recipe.statistics}
    refs |= {m.alias: m.model for m in recipe.models} | {f"statistics:{m.alias}": m.statistics for m in recipe.models}
    names = {}
    for role, ref in refs.items():
        if ref:
            source = sources[role]
            pinned = f"{source.label}@{source.revision}" if source.revision else source.label
            names[ref] = ref if pinned == "memory" else pinned
    return replace(recipe.map_sources(lambda ref: names[ref]), notes=recipe.notes)
