"""`hf-vlmerge distance`: the report on the terminal, as JSON, as picture and page."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hf_vlmerge.cli import main
from hf_vlmerge.merging import list_distances


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, two models near it in the lower layer only, and Gram matrices for one weight."""
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = {f"enc.layers.{i}.fc.weight": torch.randn(8, 6) for i in range(2)}
    noisy = lambda: {k: v + (0.05, 2.0)[int(k[11])] * torch.randn(8, 6) for k, v in base.items()}  # noqa: E731
    for name, tensors in (("seed", base), ("left", noisy()), ("right", noisy())):
        (home / name).mkdir()
        save_file(tensors, home / name / "model.safetensors")
    save_file({"gram.enc.layers.0.fc.weight": 2 * torch.eye(6)}, home / "grams.safetensors")
    return home


def test_the_report_on_the_terminal(folders, capsys):
    assert main(["distance", str(folders / "left"), str(folders / "right")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("By the distance of their weights, enc.layers.0 (1 of 2 layers) will merge well; enc.layers")
    assert all(name in out for name in list_distances()) and "enc.layers.1 / fc" not in out
    assert main(["distance", f"x={folders / 'left'}", f"y={folders / 'right'}", "--modules"]) == 0
    assert "enc.layers.1 / fc" in capsys.readouterr().out


def test_json_picture_and_page(folders, tmp_path, capsys):
    png, page = tmp_path / "report.png", tmp_path / "report.html"
    options = ["--base", str(folders / "seed"), "--statistics", str(folders / "grams.safetensors"), "--json"]
    files = ["--plot", str(png), "--html", str(page), "--keep-fraction", "0.5"]
    assert main(["distance", str(folders / "left"), str(folders / "right"), *options, *files]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] == "base" and found["distances"].keys() == {*list_distances(), "cosine (weights)"}
    assert found["distances"]["tssd"]["parameters"]["keep_fraction"] == 0.5
    assert {row["condition"] for row in found["grams"]} == {1.0}
    assert found["summary"] in page.read_text()
    with Image.open(png) as image:
        assert image.width > 600


def test_one_distance_alone(folders, capsys):
    both = [str(folders / "left"), str(folders / "right")]
    assert main(["distance", *both, "--metric", "l2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metric"] == "l2"
    assert main(["distance", *both, "--metric", "l2"]) == 0
    assert capsys.readouterr().out.startswith("left-right (l2): ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "l2", "--html", "x.html"], "leave out --metric"),
        (["--metric", "l3"], "unknown distance 'l3'"),
        (["--reference", "base"], "needs a base"),
        (["--reference", "seed"], "'none' or 'base', not 'seed'"),
        (["--pairs", "some"], "pairs is 'each', 'all' or a list of pairs"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(folders, options, message, capsys):
    assert main(["distance", str(folders / "left"), str(folders / "right"), *options]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
