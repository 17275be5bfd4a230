"""The README's code runs as it stands, in an empty folder."""

import os
import re
import subprocess
import sys

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_example_comes_early_and_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1 and len(blocks[0].splitlines()) <= 20
    assert README[: README.index(blocks[0])].count("\n") + blocks[0].count("\n") <= 30 + 2
    script = tmp_path / "example.py"
    script.write_text(blocks[0], encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[]")


def test_every_path_in_the_readme_exists():
    paths = re.findall(r"`((?:src|hub_configs|training_scripts|tests)/[\w/.]*)`", README)
    paths += [link.partition("#")[0] for link in re.findall(r"\]\(((?!http)[^)]+)\)", README)]
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
