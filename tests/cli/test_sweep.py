"""`hf-vlmerge sweep`: searches from the command line, what is written, and how options are read."""

import json
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_vlmerge.cli import main
from hf_vlmerge.cli.sweep import numbers

EVALUATE = """
import sys
from pathlib import Path
from safetensors.numpy import load_file
folder = Path(sys.argv[1])
assert (folder / "config.json").is_file() and (folder / "README.md").is_file()
weight = load_file(folder / "model.safetensors")["0.w"][0]
print("score:", -abs(weight - 0.6).item())
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A recipe of two models on a base, and a script that scores folders."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("seed", 0.0), ("a", 1.0), ("b", 0.5)):
        (tmp_path / name).mkdir()
        save_file({"0.w": torch.full((3,), value)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "toy"}')
    models = [{"model": str(tmp_path / n)} for n in "ab"]
    delta = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "seed"), "models": models}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(delta))
    (tmp_path / "soup.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    (tmp_path / "eval.py").write_text(EVALUATE)
    return tmp_path, f"{sys.executable} eval.py {{folder}}"


def test_a_sweep_writes_a_table_a_plot_and_the_best(workplace, capsys):
    folder, command = workplace
    before = {path.name for path in folder.iterdir()}
    arguments = [
        "sweep",
        "recipe.yaml",
        "--vary",
        "parameters.scale=0.2:0.6:0.2",
        "--command",
        command,
        "--out",
        "best",
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["*", "0.4"]
    content = json.loads((folder / "sweep.json").read_text())
    assert [c["settings"]["parameters.scale"] for c in content["candidates"]] == [0.4, 0.2, 0.6]
    assert content["candidates"][0]["best"] and content["candidates"][0]["score"] == pytest.approx(0, abs=1e-6)
    with Image.open(folder / "sweep.png") as image:
        assert image.width > 600
    assert load_file(folder / "best" / "model.safetensors")["0.w"].tolist() == pytest.approx([0.6] * 3)
    assert "scale: 0.4" in (folder / "best" / "README.md").read_text()
    assert {path.name for path in folder.iterdir()} == before | {"sweep.json", "sweep.png", "best"}


def test_soups_and_optimisers(workplace, capsys):
    _, command = workplace
    assert main(["sweep", "soup.yaml", "--greedy", "--command", command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "soups" and found["candidates"][0]["settings"] == {"members": ["b"]}
    optimise = ["--optimiser", "nelder-mead", "--budget", "4", "--vary", "parameters.lambda=0:1", "--table", "t/x.json"]
    assert main(["sweep", "recipe.yaml", *optimise, "--command", command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "nelder-mead" and len(found["candidates"]) == 4


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([], 2, "needs --vary (at least once) or --greedy"),
        (["--greedy", "--vary", "a=1"], 2, "not both"),
        (["--vary", "parameters.scale"], 2, "--vary takes PATH=VALUES"),
        (["--vary", "parameters.scale=0:1"], 2, "start:stop:step"),
        (["--vary", "parameters.scale=1:0:0.1"], 2, "start:stop:step"),
        (["--vary", "parameters.scale=0:1:0.1", "--optimiser", "nelder-mead"], 2, "low:high"),
        (["--vary", "parameters.scale=0:1", "--optimiser", "adam"], 1, "unknown optimiser 'adam'"),
        (["--vary", "parameters.sclae=0,1"], 1, "did you mean 'scale'?"),
        (["--vary", "parameters.scale=0.5", "--command", "false {folder}"], 1, "ended with status 1"),
        (["--vary", "parameters.scale=0.5", "--command", "eval"], 1, "{folder}"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(workplace, options, status, message, capsys):
    folder, command = workplace
    command = [] if "--command" in options else ["--command", command]
    assert main(["sweep", "recipe.yaml", *options, *command]) == status
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said and "Traceback" not in said
    assert not (folder / "sweep.json").exists()


def test_a_missing_recipe(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "none.yaml"), "--greedy", "--command", "x {folder}"]) == 1
    assert "none.yaml is not a file" in capsys.readouterr().err


def test_values_as_they_are_written():
    assert numbers("0:1:0.1") == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert numbers("1:-1:-1") == [1, 0, -1]
    assert numbers("0.2,1,true,linear") == [0.2, 1, True, "linear"]


def test_the_help_shows_an_example(capsys):
    assert main(["sweep", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example: hf-vlmerge sweep recipe.yaml --vary parameters.ratio=0:1:0.25 --command" in text
