"""Merging against mergekit 0.1.5 and against plain copying of the same bytes: time, memory, error.

Cost: with the defaults (0.27 B parameters, five repeats, all methods) about 25 minutes on two cores, 3 GB of disk.
Run: `make peer && .venv/bin/python -m tests.benchmarks.merge_speed [--size 1b] [--methods linear ties] [--repeats 5]`

Both tools run the same recipe on the same Llama-shaped bfloat16 checkpoints (a base and three copies with small noise),
two threads, warm page cache, in turn. "whole" is the time of the process from its start to its end, "inside" that of
the merge alone, after the imports (for ours, numba's too). Memory is the largest sum of anonymous memory (Pss_Anon)
over all its processes that was seen, in a run of its own before the others: to look takes a good part of a core. Ours
runs without the flush to disk, as mergekit does, and once more with it; TIES is trimmed by tensors, as there. Otherwise
each tool computes its own variant of a formula; "compat" is ours with `compat: mergekit`, whose L1 factors take a pass
more.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml

from hf_vlmerge.merging import open_source, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".venv-peer" / "bin" / "python"
OURS = ROOT / ".venv" / "bin" / "hf-vlmerge"
THREADS = 2
SIZES = {"0.27b": (1024, 16, 2816), "1b": (2048, 16, 5632), "tiny": (128, 2, 256)}  # width, layers, FFN
VOCABULARY = 32000
MEMBERS = ("m1", "m2", "m3")

METHODS: dict[str, dict] = {
    "linear": {},
    "task_arithmetic": {"parameters": {"lambda": 0.3}},
    "dare_ties": {"parameters": {"density": 0.5}},
    "ties": {"parameters": {"density": 0.2}},
    "breadcrumbs": {"parameters": {"density": 0.9, "gamma": 0.01}},
    "della": {"parameters": {"density": 0.5, "epsilon": 0.15}},
}
GLOBAL_TIES = "ties, global"

PEER_CODE = """
import sys, time
from mergekit.scripts.run_yaml import main
start = time.perf_counter()
main([sys.argv[1], sys.argv[2], "--quiet", "-j", sys.argv[3]], standalone_mode=False)
print("INSIDE", time.perf_counter() - start)
"""
OUR_CODE = """
import gc, sys, time
import filelock, jinja2  # the peer has loaded all it needs, too
from hf_vlmerge.hub.card import write_merge_card
from hf_vlmerge.merging import merge
from hf_vlmerge.merging._compiled import load
load(alone=True)
gc.set_threshold(50_000, 20, 100)  # as the command does
gc.freeze()
start = time.perf_counter()
merge(sys.argv[1], sys.argv[2], threads=int(sys.argv[3]), processes=True, fsync=False, finish=write_merge_card)
print("INSIDE", time.perf_counter() - start)
"""


def make_inputs(folder: Path, size: str) -> None:
    """Four checkpoints; nothing is made twice."""
    width, layers, ffn = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6, "hidden_act": "silu",
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (VOCABULARY, width), "lm_head.weight": (VOCABULARY, width)}
    shapes["model.norm.weight"] = (width,)
    for i in range(layers):
        block = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
        names = {f"self_attn.{name}": shape for name, shape in block.items()}
        names |= {"mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}
        names |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in names.items()}
    base = None
    for seed, name in enumerate(("base", *MEMBERS)):
        if (folder / name).exists():
            continue
        base = base or {k: torch.randn(s, generator=torch.Generator().manual_seed(0)) * 0.02 for k, s in shapes.items()}
        noise = torch.Generator().manual_seed(seed)
        moved = {
            k: (t + (torch.randn(t.shape, generator=noise) * 2e-3 if seed else 0)).bfloat16() for k, t in base.items()
        }
        save_checkpoint(folder / name, moved, config=config, fsync=False)


def recipe_for(method: str, folder: Path) -> dict:
    name = method.partition(", ")[0]
    recipe = {"merge_method": name, "dtype": "bfloat16", **METHODS[name]}
    weights = (0.2, 0.3, 0.5) if name == "linear" else (1.0, 1.0, 1.0)
    recipe["models"] = [
        {"model": str(folder / m), "parameters": {"weight": w}} for m, w in zip(MEMBERS, weights, strict=True)
    ]
    if name != "linear":
        recipe["base_model"] = str(folder / "base")
    return recipe


def our_recipe(method: str, folder: Path) -> dict:
    """The same recipe with the scope of TIES, which mergekit's form cannot say."""
    name, _, scope = method.partition(", ")
    recipe = recipe_for(method, folder)
    if name == "ties":
        recipe["parameters"] = {**recipe["parameters"], "scope": scope or "tensor"}
    return recipe


def started(command: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> str:
    """What it said."""
    said, complaint = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(process.args)}\n{complaint[-2000:]}")
    return said


def timed(command: list[str], out: Path) -> tuple[float, float]:
    """Seconds of the whole process, and seconds inside (0 where it does not say)."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    said = ended(started(command))
    whole = time.perf_counter() - start
    inside = [float(line.split()[1]) for line in said.splitlines() if line.startswith("INSIDE")]
    return whole, inside[0] if inside else 0.0


def peak_memory(command: list[str], out: Path) -> float:
    """The largest anonymous memory of a process and its copies in MB; what they share counts once."""
    shutil.rmtree(out, ignore_errors=True)
    process, peak = started(command), 0.0
    while now := anonymous(process.pid):
        peak = max(peak, now)
        time.sleep(0.05)
    ended(process)
    return peak


def anonymous(pid: int) -> float:
    """Pss_Anon of a process and its children in MB; 0 when it has ended."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return int(text.split("Pss_Anon:")[1].split()[0]) / 1e3 + sum(anonymous(int(child)) for child in children)


def plain_copy(folder: Path, out: Path, names: tuple[str, ...]) -> float:
    """Seconds to read the inputs and write as many bytes as one of them, by blocks, on as many threads."""
    out.mkdir(exist_ok=True)
    files = [folder / name / "model.safetensors" for name in names]
    size, block = files[0].stat().st_size, 1 << 20
    inputs = [os.open(f, os.O_RDONLY) for f in files]
    target = os.open(out / "copy.bin", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.truncate(target, size)

    own = threading.local()  # memory that was touched before: the fastest way there is

    def copy(at: int) -> None:
        buffer = own.__dict__.setdefault("buffer", bytearray(block))
        for descriptor in inputs:
            count = os.preadv(descriptor, [buffer], at)
        os.pwrite(target, memoryview(buffer)[:count], at)

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, range(0, size, block)))
    seconds = time.perf_counter() - start
    for descriptor in (*inputs, target):
        os.close(descriptor)
    return seconds


def errors(folder: Path, out: Path) -> str:
    """A linear merge against float64: values that are not the correctly rounded ones."""
    wrong = count = 0
    with open_source(out) as merged, open_source(folder / "m1") as a:
        others = [open_source(folder / m) for m in MEMBERS[1:]]
        for key in a:
            exact = sum(w * s[key].double() for w, s in zip((0.2, 0.3, 0.5), (a, *others), strict=True))
            wrong += int((merged[key] != exact.bfloat16()).sum())
            count += exact.numel()
    return f"{wrong / count:.4%} of values are not the correctly rounded ones"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="0.27b")
    parser.add_argument("--methods", nargs="*", default=[*METHODS, GLOBAL_TIES])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "merge_speed")
    parser.add_argument("--ours-only", action="store_true")
    options = parser.parse_args()
    folder = options.folder / options.size
    make_inputs(folder, options.size)
    peer_code, our_code = folder / "peer.py", folder / "ours.py"
    peer_code.write_text(PEER_CODE)
    our_code.write_text(OUR_CODE)
    out, rows = folder / "out", {}
    for method in options.methods:
        files = {name: folder / f"{name}.yaml" for name in ("theirs", "ours", "compat")}
        files["theirs"].write_text(yaml.safe_dump(recipe_for(method, folder)))
        files["ours"].write_text(yaml.safe_dump(our_recipe(method, folder)))
        files["compat"].write_text(yaml.safe_dump({**recipe_for(method, folder), "compat": "mergekit"}))
        ours = ["merge", str(files["ours"]), str(out), "--threads", str(THREADS)]
        commands = {
            "ours": [str(OURS), *ours, "--no-fsync"],
            "inside": [sys.executable, str(our_code), str(files["ours"]), str(out), str(THREADS)],
            "flushed": [str(OURS), *ours],
        }
        if method != GLOBAL_TIES:
            commands["compat"] = [sys.executable, str(our_code), str(files["compat"]), str(out), str(THREADS)]
        if not options.ours_only and method != GLOBAL_TIES:
            commands["peer"] = [str(PEER), str(peer_code), str(files["theirs"]), str(out), str(THREADS)]
        peaks = {}
        for name in commands.keys() & {"ours", "peer"}:
            peaks[name] = peak_memory(commands[name], out)
            if method == "linear":
                print(f"{name}: {errors(folder, out)}", flush=True)
        found: dict[str, list] = {name: [] for name in [*commands, "copy"]}
        names = MEMBERS if method == "linear" else ("base", *MEMBERS)
        for _ in range(options.repeats):
            shutil.rmtree(out, ignore_errors=True)
            found["copy"].append((plain_copy(folder, out, names), 0.0))
            for name, command in commands.items():
                found[name].append(timed(command, out))
        shutil.rmtree(out, ignore_errors=True)
        rows[method] = {
            name: [*map(statistics.median, zip(*runs, strict=True)), peaks.get(name, 0.0)]
            for name, runs in found.items()
        }
        print(line(method, rows[method]), flush=True)
    print("\n" + table(rows))
    (folder / "figures.json").write_text(json.dumps(rows, indent=2))


def line(method: str, row: dict[str, list[float]]) -> str:
    ours, inside, copy = row["ours"][0], row["inside"][1], row["copy"][0]
    text = f"{method}: ours {ours:.2f} s whole, {inside:.2f} inside, {row['flushed'][0]:.2f} flushed, copy {copy:.2f}"
    text += f" (inside/copy {inside / copy:.2f}), {row['ours'][2]:.0f} MB"
    if "compat" in row:
        text += f"; compat {row['compat'][1]:.2f} inside"
    if "peer" in row:
        whole, within, memory = row["peer"]
        text += f"; mergekit {whole:.2f} s whole, {within:.2f} inside, {memory:.0f} MB"
        text += (
            f"; ratio {whole / ours:.1f} whole, {within / inside:.1f} inside, {whole / row['flushed'][0]:.1f} flushed"
        )
    return text


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    """The figures as markdown."""
    lines = [
        "| method | whole, s: mergekit / ours | ratio | flushed | inside, s: mergekit / ours | ratio | compat | copy | MB |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, row in rows.items():
        ours, inside, peer = row["ours"], row["inside"], row.get("peer")
        theirs = [f"{peer[0]:.1f} / ", f"{peer[1]:.1f} / ", f"{peer[2]:.0f} / "] if peer else ["", "", ""]
        ratios = [peer[0] / ours[0], peer[0] / row["flushed"][0], peer[1] / inside[1]] if peer else []
        ratios += [peer[1] / row["compat"][1]] if peer else []
        shown = [f"{ratio:.1f}" for ratio in ratios] or [""] * 4
        lines.append(
            f"| {method} | {theirs[0]}{ours[0]:.2f} | {shown[0]} | {shown[1]} | {theirs[1]}{inside[1]:.2f} "
            f"| {shown[2]} | {shown[3]} | {row['copy'][0]:.2f} | {theirs[2]}{ours[2]:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
