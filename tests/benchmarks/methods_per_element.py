"""Time of every merge method an output element: one thread, chunks in memory, three members and a base.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.methods_per_element [--entries 1048576] [method ...]

All passes count: what a method asks for first, and the merge (with a copy of its chunk); not reading, rounding and
writing. Beside it, in the same run, a NumPy copy of the same bytes (three members, base and output). Times are the
thread's own: the median, and the least, which is nearest to a machine that does nothing else.
Methods that see whole matrices take seconds and are left out unless they are named.
"""

import argparse
import time
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from hf_vlmerge.merging import get_merge_method, list_merge_methods
from hf_vlmerge.merging.allocator import keep_freed_memory
from hf_vlmerge.merging.program import BLOCK, Chunk, begin, blocks, complete, shape_for

COLUMNS = 1024
EXPENSIVE = ("tensor",)  # units that work on whole matrices: seconds each, not in the table unless they are named


def chunks_for(method, entries: int) -> list[Chunk]:
    """A base and members near it, as fine-tuning leaves them, in the shape that the method's unit asks for."""
    generator = torch.Generator().manual_seed(0)
    view = shape_for(method.unit, (entries // COLUMNS, COLUMNS))
    base = 0.02 * torch.randn(view, generator=generator)
    count = min(3, method.members[1])
    x = base + 0.002 * torch.randn((count, *view), generator=generator)
    statistics = tuple(torch.rand(view, generator=generator) for _ in range(count)) if method.statistics else ()
    weights = torch.ones(count, dtype=torch.float64)
    uses_base = method.needs_base or method.takes_base
    whole = Chunk(x, base if uses_base else None, tuple("abc"[:count]), weights, statistics, (1,) * count, name="w")
    return list(blocks(whole, method.unit))


def seconds(run, repeats: int) -> tuple[float, float]:
    """The median and the least time of a call, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.thread_time()
        run()
        times.append(time.thread_time() - started)
    return median(times), min(times)


def merge_once(method, chunks: list[Chunk]) -> None:
    parameters, _ = method.bind({"scope": "tensor"} if "scope" in method.parameters else {}, chunks[0].members)
    program = method.program(parameters)
    merge = complete(program, begin(program), lambda: chunks, method.unit, alone=True)
    for chunk in chunks:
        merge(replace(chunk, x=chunk.x.clone()))  # it may be used up


def copy_time(entries: int, repeats: int) -> tuple[float, float]:
    source, target = (np.ones(entries * 5, np.float32) for _ in range(2))
    return seconds(lambda: np.copyto(target, source), repeats)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--entries", type=int, default=1 << 20, help="of one member, in all its chunks")
    arguments.add_argument("--repeats", type=int, default=9)
    arguments.add_argument("methods", nargs="*", help="only these")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the engine does
    copied = [t / options.entries * 1e9 for t in copy_time(options.entries, options.repeats)]
    print(f"{options.entries:,} entries in chunks of {BLOCK:,}; copying five: {copied[1]:.2f} ns an entry\n")
    print("| method | members | ns an output entry: median | least | times the copy |\n|---|---|---|---|---|")
    for name in options.methods or list_merge_methods():
        method = get_merge_method(name)
        if method.unit in EXPENSIVE and name not in options.methods:
            continue
        chunks = chunks_for(method, options.entries)
        times = seconds(lambda: merge_once(method, chunks), options.repeats)  # noqa: B023
        middle, least = (t / options.entries * 1e9 for t in times)
        members = len(chunks[0].members)
        print(f"| {name} | {members} | {middle:.2f} | {least:.2f} | {least / copied[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
