"""Which model classes a merge survives: this engine and mergekit 0.1.5 on the same tiny folders, as a markdown table.

Cost: about five minutes on one core (mergekit needs some seconds to start, and starts once a class).
Run: `make peer && .venv/bin/python -m tests.benchmarks.architectures [CLASS ...]`

Three float32 members (and a base) of each class are merged by `linear` and by `task_arithmetic`. A cell says OK where
the output holds every tensor of the inputs, loads with nothing missing, unexpected or mismatched, and lies within 2^-20
of the tensor's largest value of a float64 oracle. mergekit runs as a subprocess, with a time limit.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from torch import Tensor

from hf_vlmerge.auto import add_remote_code
from hf_vlmerge.merging import merge
from tests.merging.architectures import ARCHITECTURES, Tiny, build, load, moved, save, tensors_of

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".venv-peer" / "bin" / "python"
LIMIT = 180  # seconds for the two merges of a class
METHODS = {"linear": {}, "task_arithmetic": {"base_model": "base"}}
WEIGHTS = {"a": 0.2, "b": 0.3, "c": 0.5}
PEER_CODE = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

for recipe, out in json.load(sys.stdin):
    try:
        run_merge(MergeConfiguration.model_validate(recipe), out, MergeOptions(trust_remote_code=True, quiet=True))
        said = ""
    except Exception as error:
        said = f"raised {type(error).__name__}: {error}"
    print("\\nOUTCOME", json.dumps(said), flush=True)
"""


def make_family(tiny: Tiny, folder: Path) -> None:
    """The base and the members, each with its own code where no library has it."""
    model = build(tiny)
    for seed, name in enumerate(("base", *WEIGHTS)):
        save(moved(model, seed) if seed else model, folder / name)
        add_remote_code(folder / name)


def recipe_for(method: str, folder: Path) -> dict:
    models = [{"model": str(folder / alias), "parameters": {"weight": w}} for alias, w in WEIGHTS.items()]
    more = {key: str(folder / name) for key, name in METHODS[method].items()}
    return {"merge_method": method, "models": models, **more}


def run_ours(folder: Path) -> list[str]:
    said = []
    for method in METHODS:
        try:
            merge(recipe_for(method, folder), folder / "ours" / method, fsync=False, progress=False)
            said.append("")
        except Exception as error:  # whatever it is, the table says it
            said.append(f"raised {type(error).__name__}: {error}")
    return said


def run_peer(folder: Path) -> list[str]:
    work = json.dumps([[recipe_for(method, folder), str(folder / "peer" / method)] for method in METHODS])
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    said: list[str] = []
    command = [PEER, "-c", PEER_CODE]
    try:
        done = subprocess.run(command, input=work, capture_output=True, text=True, timeout=LIMIT, env=environment)
        said = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("OUTCOME ")]
        last = f"ended with status {done.returncode}"
    except subprocess.TimeoutExpired:
        last = f"still ran after {LIMIT} s"
    return [*said, *[last] * (len(METHODS) - len(said))]


def oracle(method: str, given: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """What float64 says of the floating tensors; both methods come to weighted sums. Integers: see :func:`judge`."""
    base = given["base"]
    keep = 0.0 if method == "linear" else 1.0 - sum(WEIGHTS.values())
    floats = [name for name, value in base.items() if value.is_floating_point()]
    return {n: keep * base[n].double() + sum(w * given[a][n].double() for a, w in WEIGHTS.items()) for n in floats}


def judge(tiny: Tiny, method: str, folder: Path, out: Path, said: str) -> str:
    """OK, or in a few words what is wrong with an output."""
    if said:
        return shortened(said.replace(str(folder), "…"))
    given = {name: tensors_of(folder / name) for name in ("base", *WEIGHTS)}
    found = tensors_of(out)
    _, info = load(tiny, out)
    wrong = {kind: len(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        counts = ", ".join(f"{count} {kind.removesuffix('_keys')}" for kind, count in wrong.items())
        return f"{len(found)} of {len(given['base'])} tensors written; on reload {counts}"
    if found.keys() != given["base"].keys():
        return "loads, but holds other names than the inputs"
    exact = oracle(method, given)
    off = [n for n, e in exact.items() if (found[n].double() - e).abs().max() > 2**-20 * e.abs().max().clamp(min=1)]
    off += [n for n in found if n not in exact and not any(found[n].equal(given[m][n]) for m in given)]
    return f"wrong values in {len(off)} of {len(found)} tensors ({off[0]})" if off else "OK"


def shortened(said: str) -> str:
    """An error as one line of a table: its beginning and its end."""
    said = " ".join(said.split()).replace("|", "/")
    return said if len(said) <= 140 else f"{said[:80]} … {said[-50:]}"


def joined(cells: list[str]) -> str:
    return cells[0] if len(set(cells)) == 1 else "; ".join(f"{m}: {c}" for m, c in zip(METHODS, cells, strict=True))


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    rows, passed = [], {"ours": 0, "peer": 0}
    for name in names or ARCHITECTURES:
        tiny = ARCHITECTURES[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make_family(tiny, folder)
            cells = {}
            for who, run in (("ours", run_ours), ("peer", run_peer)):
                said = dict(zip(METHODS, run(folder), strict=True))
                each = [judge(tiny, m, folder, folder / who / m, s) for m, s in said.items()]
                cells[who] = joined(each)
                passed[who] += cells[who] == "OK"
        rows.append(f"| {name} (`{tiny.model}`) | {cells['ours']} | {cells['peer']} |")
        print(rows[-1], file=sys.stderr, flush=True)
    total = f"| **{len(rows)} classes** | **{passed['ours']} OK** | **{passed['peer']} OK** |"
    print("\n".join(["| class | hf_vlmerge | mergekit 0.1.5 |", "|---|---|---|", *rows, total]))


if __name__ == "__main__":
    main(sys.argv[1:])
