"""Merging on a GPU against merging on the CPU: throughput, memory of the GPU, and how far the results are apart.

Cost: with the defaults (0.27 B parameters, three repeats, all methods) about 4 minutes with 16 cores, 13 GB of disk.
Run on a machine with a GPU: `python -m tests.benchmarks.merge_device [--methods linear ties] [--repeats 3]`

Each device has a process of its own, which makes every merge once to warm up and then the repeats: files in the page
cache, no flush, all cores. The CPU's workers are processes, as in the command. GB/s counts inputs and output as stored.
"Apart" is the share of values that differ at all, and the largest difference in steps of bfloat16.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from hf_vlmerge.merging import merge, open_source
from tests.benchmarks.merge_speed import GLOBAL_TIES, MEMBERS, METHODS, ROOT, SIZES, make_inputs, our_recipe

MATRIX_METHODS: dict[str, dict] = {"tsv_merge": {}, "iso_c": {}, "wudi": {}}
DEVICES = ("cpu", "cuda")


def recipe(method: str, folder: Path) -> dict:
    if method not in MATRIX_METHODS:
        return our_recipe(method, folder)
    models = [str(folder / member) for member in MEMBERS]
    vectors = {"match": ["*embed*", "lm_head*"], "method": "task_arithmetic"}
    return {"merge_method": method, "base_model": str(folder / "base"), "models": models, "rules": [vectors]}


def measure(folder: Path, methods: list[str], device: str, repeats: int, threads: int) -> None:
    """Print for every method the seconds of each repeat and the most memory of the GPU that was in use, MB."""
    for method in methods:
        out = folder / f"out-{device}-{method.replace(', ', '-')}"
        settings = {"threads": threads, "device": device, "processes": True, "fsync": False, "overwrite": True}
        reports = [merge(folder / f"{method}.yaml", out, **settings, progress=False) for _ in range(1 + repeats)]
        peak = torch.cuda.max_memory_reserved() / 1e6 if device == "cuda" else 0.0
        print(json.dumps([method, [report.seconds for report in reports[1:]], peak]), flush=True)


def apart(folder: Path, method: str) -> tuple[float, float]:
    """Of both devices' results: the share of values that differ, and the largest difference in steps of bfloat16."""
    differ = count = steps = 0
    one, other = (folder / f"out-{device}-{method.replace(', ', '-')}" for device in DEVICES)
    with open_source(one) as a, open_source(other) as b:
        for key in a:
            x, y = a[key].double(), b[key].double()
            step = torch.exp2(torch.maximum(x.abs(), y.abs()).clamp(min=2.0**-126).log2().floor() - 7)
            differ, count = differ + int((x != y).sum()), count + x.numel()
            steps = max(steps, float(((x - y).abs() / step).max()))
    return differ / count, steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="0.27b")
    parser.add_argument("--methods", nargs="*", default=[*METHODS, GLOBAL_TIES, *MATRIX_METHODS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "merge_device")
    parser.add_argument("--device", choices=DEVICES, help="measure this one only, and print what the table is made of")
    options = parser.parse_args()
    folder = options.folder / options.size
    if options.device:
        measure(folder, options.methods, options.device, options.repeats, options.threads)
        return
    make_inputs(folder, options.size)
    for method in options.methods:
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(recipe(method, folder)))
    rows: dict[str, dict] = {method: {} for method in options.methods}
    for device in DEVICES:
        command = [sys.executable, "-m", "tests.benchmarks.merge_device", "--device", device, *sys.argv[1:]]
        said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        for method, seconds, peak in map(json.loads, said.splitlines()):
            rows[method][device] = statistics.median(seconds), peak
    print(f"{torch.cuda.get_device_name()}, {options.threads} threads, {options.size}")
    print("| method | CPU, s | GPU, s | ratio | GPU, GB/s | GPU, MB | differ | steps |\n" + "|---" * 8 + "|")
    size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors")) / 1e9
    for method, row in rows.items():
        (cpu, _), (gpu, peak) = row["cpu"], row["cuda"]
        moved = size * (len(MEMBERS) + (method != "linear") + 1)
        differ, steps = apart(folder, method)
        figures = f"{cpu:.2f} | {gpu:.2f} | {cpu / gpu:.1f} | {moved / gpu:.1f} | {peak:.0f}"
        print(f"| {method} | {figures} | {differ:.2%} | {steps:.0f} |", flush=True)


if __name__ == "__main__":
    main()
