"""The engine: plan the groups, stream every tensor through its method in chunks, write, check, publish by a rename.

Inputs are read in chunks of flat order, merged in float32 and rounded once. Chunks start on block boundaries (or are
whole rows or tensors), so the result does not depend on their size.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .carrying import files_source, merged_config, verify, write_files
from .errors import MergeError
from .groups import COPY, MergeGroup
from .planning import open_sources, plan
from .program import complete, single_thread
from .recipe import Recipe
from .registry import get_merge_method
from .report import MergeReport, describe
from .streaming import CHUNK_SIZE, Job, Reader, settle_whole_model
from .tensors.dtypes import all_finite, dtype_name
from .tensors.sinks import SafetensorsSink, Spec, atomic_folder


class Run(NamedTuple):
    """A run of one output tensor: ``values`` in its dtype from flat index ``start``; ``how`` is merged, copied or equal
    (inputs that were byte-equal and therefore copied)."""

    group: MergeGroup
    start: int
    values: Tensor
    how: str


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

    recipe: path, YAML text, mapping or :class:`Recipe`. sources: ``{reference in the recipe: dict or source}`` for
    tensors in memory. finish: called with the temporary folder and the report before the rename (the place for a model
    card). overwrite: replace an existing folder, by renaming at the very end. dry_run: write nothing; the report is the
    plan, ``output`` may be None. allow_nonfinite: accept NaN and Inf in inputs. fsync: flush to disk before the rename.
    chunk_size: elements of one member in memory at a time (the result does not depend on it). max_shard_size: of a
    weight file, as "5GB".

    Raises MergeError for anything wrong with recipe, inputs or output; the output folder then is as it was.
    """
    started = time.perf_counter()
    recipe = Recipe.load(recipe)
    with open_sources(recipe, sources) as opened, single_thread():
        groups = plan(recipe, opened)
        report = describe(recipe, opened, groups, merged_config(recipe, opened))
        if dry_run:
            return report
        if output is None:
            raise MergeError("an output folder is needed")
        reader = Reader(opened, chunk_size, allow_nonfinite, recipe.seed)
        specs = {g.output: Spec(g.dtype, g.shape) for g in sorted(groups, key=lambda g: natural(g.output))}
        with atomic_folder(output, overwrite=overwrite, fsync=fsync) as folder:
            write_files(folder, report.recipe, report.config, files_source(recipe, opened))
            with SafetensorsSink(folder, specs, max_shard_size=max_shard_size) as sink:
                for run in runs(groups, reader, progress):
                    sink.write(run.group.output, run.start, run.values)
                    report.how[run.group.output] = run.how
                report.bytes_written = sink.total
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
        for run in runs(groups, Reader(opened, chunk_size, allow_nonfinite, recipe.seed), progress):
            result[run.group.output][run.start : run.start + run.values.numel()] = run.values
        return {g.output: result[g.output].reshape(g.shape) for g in groups}


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort layers by number, so that neighbours land in one shard."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def runs(groups: list[MergeGroup], reader: Reader, progress: bool) -> Iterator[Run]:
    """Every chunk of every output tensor, group after group."""
    jobs = {g.output: job_of(g) for g in groups if g.method != COPY}
    kin = lambda job: (job.group.method, repr(job.group.parameters))  # noqa: E731
    settle_whole_model(list(jobs.values()), lambda job: reader.chunks(job.group, job.method.unit), kin)
    total = sum(prod(g.shape) for g in groups)
    with tqdm(total=total, unit="", unit_scale=True, desc="merge", disable=not progress) as bar:
        for group in groups:
            job = jobs.pop(group.output, None)
            how = "copied" if job is None else "equal" if keeps_equal(job, reader) else "merged"
            for start, values in merged(job, reader) if how == "merged" else copied(group, reader):
                yield Run(group, start, values, how)
                bar.update(values.numel())


def job_of(group: MergeGroup) -> Job:
    """The group as its method sees it: with a base only where the method needs one."""
    method = get_merge_method(group.method)
    return Job(group if method.needs_base else replace(group, base=None), method)


def keeps_equal(job: Job, reader: Reader) -> bool:
    """Whether all inputs, and the base if the method needs one, are the same bytes and the method keeps those."""
    group = job.group
    refs = (*group.inputs, *((group.base,) if group.base else ()))
    return job.method.keeps_equal(group.parameters, group.weights) and reader.all_equal(group, refs)


def copied(group: MergeGroup, reader: Reader) -> Iterator[tuple[int, Tensor]]:
    for start, stop in reader.spans(group, "element"):
        yield start, rounded(reader.stored(group.inputs[0], start, stop), group, reader)


def merged(job: Job, reader: Reader) -> Iterator[tuple[int, Tensor]]:
    group, unit = job.group, job.method.unit
    merge_chunk = complete(job.program, job.step, lambda: reader.chunks(group, unit), unit)
    for chunk in reader.chunks(group, unit):
        values = merge_chunk(chunk)
        if values.shape != chunk.x.shape[1:]:
            raise RuntimeError(f"{group.method} returned {tuple(values.shape)} for {tuple(chunk.x.shape[1:])}")
        yield chunk.start, rounded(values.reshape(-1), group, reader)


def rounded(values: Tensor, group: MergeGroup, reader: Reader) -> Tensor:
    """The one rounding, to the output dtype."""
    result = values.to(group.dtype)
    if reader.allow_nonfinite or not group.dtype.is_floating_point or all_finite(result):
        return result
    raise MergeError(f"{group.output}: values up to {values.abs().max():.4g} do not fit into {dtype_name(group.dtype)}")
