"""Working memory does not grow with the tensors: to merge tensors of 128 MB takes far less than one of them."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_vlmerge.merging import save_checkpoint

MEASURE = """
import sys, threading, time
from pathlib import Path
from hf_vlmerge.merging import merge

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1e3

def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)

method, folder = sys.argv[1], Path(sys.argv[2])
recipe = {"merge_method": method, "models": [str(folder / n) for n in "abc"], "base_model": str(folder / "base")}
recipe["rules"] = [{"match": "tiny", "keep": "a"}]
before, done = anonymous(), False
peak = [before]
watcher = threading.Thread(target=watch)
watcher.start()
merge(recipe, folder / method, threads=2, fsync=False, progress=False)
done = True
watcher.join()
print(peak[0] - before)
"""


@pytest.mark.slow
def test_working_memory_is_a_few_chunks(tmp_path):
    size = 32_000_000  # elements of a tensor: 128 MB
    for seed, name in enumerate(("base", "a", "b", "c")):
        values = torch.from_numpy(np.random.default_rng(seed).standard_normal(size, np.float32))
        save_checkpoint(tmp_path / name, {"w": values.view(8000, 4000), "tiny": torch.ones(3)}, fsync=False)
    for method in ("linear", "ties", "dare_ties", "della", "model_stock"):
        command = [sys.executable, "-c", MEASURE, method, str(tmp_path)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert float(ran.stdout) < 100, f"{method}: {float(ran.stdout):.0f} MB"
