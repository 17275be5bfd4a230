"""The engine: plan the groups, make every tensor on some threads and processes, check, publish by a rename.

Every header is written first, so each chunk goes straight to its final place, in any order. What is made depends
neither on chunk size nor threads, processes or interruptions: chunks start on block boundaries (or are whole rows or
tensors), and sums are taken over blocks in flat order.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import forks
from ._compiled import is_worth_it, load
from .adapters import merge_adapter_tensors, merge_adapters
from .carrying import files_source, merged_config, verify, write_files
from .devices import chunk_size_on, device_for, memory_limit
from .errors import MergeError
from .estimate import estimate, fit
from .groups import Sources
from .making import Maker, Sink, job_of, memory_of, output_of
from .manifest import Manifest, fingerprint, unfinished
from .planning import open_sources, plan
from .program import single_thread
from .ranks import ALONE, Ranks, Team, shares
from .recipe import Recipe
from .report import MergeReport, describe
from .streaming import Job, Reader, settle_whole_model
from .tensors.sinks import SafetensorsSink, Spec, parse_size, split_shards
from .workers import Workers, available_threads


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
    threads: int | None = None,
    processes: bool = False,
    max_memory: int | str | None = None,
    device: str = "cpu",
    distributed: bool = False,
    hash_inputs: bool = False,
    chunk_size: int | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> MergeReport:
    """Merge as a recipe says and write the result into the folder ``output``.

    recipe: path, YAML text, mapping or :class:`Recipe`. sources: ``{reference in the recipe: dict or source}`` for
    tensors in memory. finish: called with the temporary folder and the report before the rename (the place for a model
    card). overwrite: replace an existing folder, by renaming at the very end. dry_run: write nothing; the report is the
    plan, ``output`` may be None. hash_inputs: read every input once more for the sha256 in the report, and compare it
    with the Hub's; otherwise the report has what the Hub says. allow_nonfinite: accept NaN and Inf in inputs. fsync:
    flush to disk before the rename.

    threads: workers (default: the cores, or OMP_NUM_THREADS). processes: make them copies of this process, which are
    faster; for programs without threads or numba functions of their own, on Linux. max_memory: of chunks and matrices
    in use at once, as "2GB", beside what Python and torch take. device: where chunks are merged, as "cuda".
    distributed: all processes that a launcher started call this and share the work. chunk_size: elements of one member
    in memory at a time. max_shard_size: of a weight file, as "5GB". None of these changes a bit (another device may, in
    the last place).

    A merge that was stopped goes on where it was when it is called again with the same recipe and inputs.
    Raises MergeError for anything wrong with recipe, inputs or output; the output folder then is as it was.
    """
    started = time.perf_counter()
    recipe = Recipe.load(recipe)
    if recipe.adapters:
        settings = {"overwrite": overwrite, "dry_run": dry_run, "fsync": fsync, "distributed": distributed}
        return merge_adapters(recipe, output, sources=sources, finish=finish, hash_inputs=hash_inputs, **settings)
    place = device_for(device)
    limit = memory_limit(place) if max_memory is None else parse_size(max_memory)
    chunk_size = chunk_size_on(place) if chunk_size is None else chunk_size
    shard_size = parse_size(max_shard_size)
    ranks = Ranks.launched() if distributed and not dry_run else ALONE
    with open_sources(recipe, sources) as opened, single_thread(), ExitStack() as stack:
        groups = sorted(plan(recipe, opened), key=lambda g: natural(g.output))
        report = describe(recipe, opened, groups, merged_config(recipe, opened), hash_inputs and ranks.first)
        jobs = [job_of(group) for group in groups]
        threads, chunk_size = fit(jobs, threads or available_threads(), chunk_size, limit)
        entries = sum(prod(group.shape) * len(group.refs) for group in groups)
        compiled = place.type == "cpu" and is_worth_it(entries)
        report.estimate = estimate(jobs, opened, threads, chunk_size, place, compiled)
        if dry_run:
            return report
        if output is None:
            raise MergeError("an output folder is needed")
        check_inputs_stay(Path(output), opened)
        specs = {g.output: Spec(g.dtype, g.shape) for g in groups}
        reader = Reader(opened, chunk_size, allow_nonfinite, recipe.seed, place, compiled and load(alone=processes))

        def prepare() -> Path:
            key = fingerprint(recipe, opened, {"shard size": shard_size, "device": place.type})
            folder = stack.enter_context(unfinished(output, key, overwrite=overwrite, fsync=fsync))
            write_files(folder, report.recipe, report.config, files_source(recipe, opened))
            SafetensorsSink(folder, specs, max_shard_size=shard_size).close()  # headers, and each file at its length
            return folder

        def make_share(folder: Path, team: Team, threads: int) -> Manifest:
            with (
                Manifest(folder, team.index) as manifest,
                SafetensorsSink(folder, specs, max_shard_size=shard_size) as sink,
                Workers(threads, limit, place) as workers,
            ):
                team.exchange(None)  # everybody has read what is finished before anybody adds to it
                own = share(jobs, specs, shard_size, team)
                Run(jobs, own, reader, sink, workers, manifest, team, progress).make()
                if fsync and team.machines > 1:
                    sink.flush()
                return manifest

        def complete(folder: Path) -> None:
            verify(folder, specs)
            report.output, report.seconds = Path(output), time.perf_counter() - started
            if finish is not None:
                finish(folder, report)

        folder = ranks.on_first(prepare)
        if processes and threads > 1 and ranks.count == 1 and place.type == "cpu" and forks.can_fork():
            manifests = stack.enter_context(forks.together(threads, lambda team: make_share(folder, team, 1)))
        else:
            manifests = ranks.together(lambda: make_share(folder, ranks, threads))
        how = {name: how for manifest in manifests for name, how in manifest.done.items()}
        report.how = {g.output: how[g.output] for g in groups}
        report.resumed = manifests[0].resumed
        report.bytes_written = sum(prod(shape) * dtype.itemsize for dtype, shape in specs.values())
        ranks.on_first(lambda: complete(folder))
        ranks.on_first(stack.close)
    return report


def merge_tensors(
    recipe: Any,
    sources: Mapping[str, Any] | None = None,
    *,
    allow_nonfinite: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    chunk_size: int | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The same merge in memory: output tensors by name."""
    recipe = Recipe.load(recipe)
    if recipe.adapters:
        return merge_adapter_tensors(recipe, sources)
    threads, place = threads or available_threads(), device_for(device)
    chunk_size = chunk_size_on(place) if chunk_size is None else chunk_size
    with open_sources(recipe, sources) as opened, single_thread(), Workers(threads, device=place) as workers:
        groups = plan(recipe, opened)
        sink = Tensors({g.output: Spec(g.dtype, g.shape) for g in groups})
        jobs = [job_of(group) for group in groups]
        reader = Reader(opened, chunk_size, allow_nonfinite, recipe.seed, place)
        Run(jobs, {g.output for g in groups}, reader, sink, workers, progress=progress).make()
        return sink.tensors


def check_inputs_stay(output: Path, sources: Sources) -> None:
    """An output that replaces a folder may replace an input, but not a folder with inputs in it."""
    output = output.expanduser().resolve()
    for source in sources.values():
        for place in (p for file in source.files if file.path for p in (file.path.absolute(), file.path.resolve())):
            if output in place.parents and place.parent != output:
                raise MergeError(f"the output {output.name!r} is a folder above the input {source.label!r}")


class Tensors:
    """A sink in memory."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self.tensors = {key: torch.empty(spec.shape, dtype=spec.dtype) for key, spec in specs.items()}

    def write(self, key: str, start: int, values: Tensor) -> None:
        self.tensors[key].view(-1)[start : start + values.numel()] = values

    def copy(self, key: str, source: int, offset: int) -> bool:
        return False


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort layers by number, so that neighbours land in one shard."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def share(jobs: list, specs: Mapping[str, Spec], shard_size: int, team: Team) -> set[str]:
    """The outputs that this process makes. Processes of one machine share tensors; several machines share files, since
    a network file system does not promise that two may write one file."""
    units = split_shards(specs, shard_size) if team.machines > 1 else [[name] for name in specs]
    sizes = {output_of(job).output: memory_of(job, 1 << 62) for job in jobs}
    return set(shares(units, sizes.__getitem__, team.count)[team.index])


@dataclass
class Run:
    """One process's part of a merge: ``own`` outputs of all jobs, into a sink. Where the team takes turns, that is only
    its part of what methods ask of the whole model."""

    jobs: list
    own: set[str]
    reader: Reader
    sink: Sink
    workers: Workers
    manifest: Manifest | None = None
    team: Team = ALONE
    progress: bool = True

    def make(self) -> None:
        """Serve what methods ask of the whole model, then make the tensors that are not finished yet."""
        done = set() if self.manifest is None else set(self.manifest.done)
        self.settle(done)
        turns = self.team.takes_turns
        todo = [job for job in self.jobs if (name := output_of(job).output) not in done and (turns or name in self.own)]
        todo.sort(key=lambda job: -prod(output_of(job).shape))  # the largest first: nobody is left with it at the end
        elements = [prod(output_of(job).shape) for job in todo]
        expected = sum(elements) // (self.team.count if turns else 1)
        with tqdm(total=expected, unit="", unit_scale=True, desc="merge", disable=self.disabled()) as bar:
            lock = Lock()

            def written(count: int) -> None:
                with lock:
                    bar.update(min(count, expected - bar.n))  # in turns it may become more

            maker = Maker(self.reader, self.sink, written)
            cut = 0 if turns else sum(size * 2 * self.workers.threads > sum(elements) for size in elements)
            for job in todo[:cut]:  # larger than half of a worker's part: cut among all of them
                self.finish(maker, job, self.workers.map)
            need = lambda job: memory_of(job, self.reader.chunk_size)  # noqa: E731
            self.workers.each(lambda job: self.finish(maker, job, map), self.team.turns(todo[cut:]), need)
            bar.update(expected - bar.n)

    def finish(self, maker: Maker, job: Any, run: Callable[..., Any]) -> None:
        how = maker.make(job, run)
        if self.manifest is not None:
            self.manifest.add(output_of(job).output, how)

    def settle(self, done: set[str]) -> None:
        """Sums over the whole model, for methods with a tensor left to make."""
        kin = lambda job: (job.group.method, repr(job.group.parameters))  # noqa: E731
        methods = [job for job in self.jobs if isinstance(job, Job)]
        wanted = {kin(job) for job in methods if job.group.output not in done}
        settle_whole_model(
            [job for job in methods if kin(job) in wanted],
            lambda job: self.reader.reads(job.group, job.method.unit),
            kin,
            mine=lambda job: job.group.output in self.own,
            run=self.workers.map,
            exchange=self.team.exchange,
        )

    def disabled(self) -> bool:
        return not (self.progress and self.team.first)
