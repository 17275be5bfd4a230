"""The `hf-vlmerge` command: quick help, runnable examples, one sentence an error, JSON where output is data."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hf_vlmerge.cli import main
from hf_vlmerge.cli.demo import ARMS

COMMANDS = [["demo"], ["merge"], ["distance"], ["statistics"], ["methods"], ["convert", "vlmo"], ["convert", "beit"]]
COMMANDS += [["publish"], ["card"]]
COMMANDS += [["convert", name] for name in ("seed", "unival", "unival-init", "image-codes")]
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "blue", "small", "large", "circle", "square",
    "of", "the",
]  # fmt: skip


@pytest.fixture(scope="module")
def specific(tmp_path_factory) -> str:
    """A tiny modality-specific model with a processor whose tokenizer knows the words of the embedded captions."""
    from transformers import BertTokenizer

    from hf_vlmerge import VlmoConfig, VlmoForPreTraining, VlmoImageProcessor, VlmoProcessor

    folder = tmp_path_factory.mktemp("models") / "specific"
    torch.manual_seed(0)
    config = VlmoConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, image_size=16,
        patch_size=8, max_text_length=8, num_text_positions=8, num_fusion_layers=1,
    )  # fmt: skip
    VlmoForPreTraining(config).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    image_processor = VlmoImageProcessor(size={"height": 16, "width": 16})
    VlmoProcessor(image_processor, tokenizer, max_text_length=8).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(specific, tmp_path):
    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"merge_method": "interpolation", "experts_of": specific} | changes))
        return str(path)

    return write


def errors_of(capsys) -> str:
    """What stands on stderr, without progress bars."""
    return "\n".join(line for line in capsys.readouterr().err.splitlines() if "it/s" not in line and "/s]" not in line)


def test_help_answers_at_once_without_torch_or_numpy():
    heavy = {"torch", "transformers", "numpy", "huggingface_hub"}
    code = f"import sys, hf_vlmerge.cli as c; c.main(['--help']); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("set()\n"), done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_that_parses(command, capsys):
    assert main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    (example,) = [line.strip() for line in text.splitlines() if "Example:" in line]
    words = example.removeprefix("Example: hf-vlmerge ").split()
    assert words[: len(command)] == command
    options = [word for word in words if word.startswith("--")]
    assert all(option in text for option in options)
    made = [word for word in words if word.startswith("demo_out/")]  # by the demo, in its default folder
    assert all(re.fullmatch(r"demo_out/runs/seed_0/(\w+)", word)[1] in ARMS for word in made)


def test_methods_lists_all_methods_with_papers_and_parameters(capsys):
    from hf_vlmerge.merging import list_merge_methods

    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list_merge_methods()
    by_name = {row["name"]: row for row in rows}
    assert by_name["interpolation"]["parameters"]["ratio"] == 0.5
    assert by_name["interpolation"]["paper"] == "https://arxiv.org/abs/2304.14933"
    assert by_name["task_arithmetic"]["needs_base"] and by_name["regmean"]["needs_statistics"]
    assert main(["methods", "slerp"]) == 0
    assert capsys.readouterr().out.startswith("slerp")
    assert main(["methods", "interpolate"]) == 1
    assert "interpolation" in errors_of(capsys)


def test_merge_writes_a_model_with_card_and_recipe(recipe, tmp_path, capsys):
    from hf_vlmerge import VlmoForPreTraining

    out = tmp_path / "merged"
    assert main(["merge", recipe(parameters={"ratio": 0.75}), str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["merged"] > 0
    model, info = VlmoForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.expert_modules == []
    card = (out / "README.md").read_text()
    assert "merge_method: interpolation" in card
    assert str(tmp_path) not in card + (out / "recipe.yaml").read_text()

    assert main(["merge", recipe(), str(out)]) == 1
    assert "exists" in errors_of(capsys)
    assert main(["merge", recipe(), str(out), "--overwrite", "--dtype", "bfloat16", "--no-fsync"]) == 0
    assert VlmoForPreTraining.from_pretrained(out).dtype == torch.bfloat16


def test_a_dry_run_prints_the_plan_and_writes_nothing(recipe, tmp_path, capsys):
    assert main(["merge", recipe(), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "vision, language, vision_language" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_nan_is_refused_unless_allowed(specific, tmp_path, recipe, capsys):
    from hf_vlmerge import VlmoForPreTraining

    model = VlmoForPreTraining.from_pretrained(specific)
    with torch.no_grad():
        model.vlmo.encoder.layers[0].ffn["vision"].fc1.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    path = recipe(experts_of=str(tmp_path / "broken"))
    capsys.readouterr()
    assert main(["merge", path, str(tmp_path / "out")]) == 1
    assert "ffn.vision.fc1.weight" in errors_of(capsys)
    assert not (tmp_path / "out").exists()
    assert main(["merge", path, str(tmp_path / "out"), "--allow-nonfinite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["merge", "no_such.yaml", "out"], 1, "no_such.yaml is not a file"),
        (["merge", "no_such.yaml"], 2, "a folder to write is missing"),
        (["merge"], 2, "Missing argument"),
        (["merg"], 2, "Did you mean 'merge'?"),
        (["convert", "vlmo", "no_such.ckpt", "out"], 1, "no_such.ckpt"),
        (["distance", "./no/such/folder"], 1, "folder"),
        (["statistics", "m", "o", "--data", "shapes", "--padding", "some"], 2, "expected include or exclude"),
    ],
)
def test_an_error_is_a_sentence_and_an_exit_code(arguments, code, said, capsys):
    assert main(arguments) == code
    error = errors_of(capsys)
    assert said in error
    assert "Traceback" not in error
    if code == 1:
        assert len(error.splitlines()) == 1 and error.startswith("hf-vlmerge: ")


def test_debug_shows_where_it_happened():
    with pytest.raises(FileNotFoundError):
        main(["merge", "no_such.yaml", "out", "--debug"])


def test_an_unforeseen_error_is_still_one_sentence(monkeypatch, capsys):
    import hf_vlmerge.cli.methods as methods

    monkeypatch.setattr(methods, "describe", lambda method: 1 / 0)
    assert main(["methods"]) == 1
    assert capsys.readouterr().err == "hf-vlmerge: ZeroDivisionError: division by zero (--debug shows where)\n"


def test_distance_prints_pairs_and_json(specific, capsys):
    assert main(["distance", specific, "--metric", "tssd", "--keep-fraction", "0.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["total"]) == {"vision-language", "vision-vision_language", "language-vision_language"}
    assert main(["distance", f"a={specific}", f"b={specific}", "--metric", "l2"]) == 0
    assert "a-b (l2): 0" in capsys.readouterr().out


def test_statistics_feed_a_regmean_merge(specific, recipe, tmp_path, capsys):
    grams = tmp_path / "grams.safetensors"
    command = ["statistics", specific, str(grams), "--data", "shapes", "--samples", "6", "--batch-size", "4", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 6
    tokens = report["tokens"]["vlmo.encoder.layers.0.ffn.language.fc1.weight"]
    assert tokens == 6 * 8  # padding included
    assert main(["merge", recipe(merge_method="regmean", statistics=str(grams)), str(tmp_path / "merged")]) == 0


def test_statistics_read_a_parquet_file_and_leave_padding_out(specific, tmp_path, capsys):
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    pictures = [Image.fromarray(np.full((16, 16, 3), value, dtype=np.uint8)) for value in (0, 255)]
    path = tmp_path / "captions.parquet"
    Dataset.from_dict({"picture": pictures, "caption": ["a red circle", "a small green square"]}).to_parquet(path)
    command = ["statistics", specific, str(tmp_path / "grams.safetensors"), "--data", str(path)]
    columns = ["--image-column", "picture", "--text-column", "caption"]
    assert main([*command, *columns, "--padding", "exclude", "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert tokens["vlmo.encoder.layers.0.ffn.language.fc1.weight"] == 5 + 6  # with [CLS] and [SEP]
    assert tokens["vlmo.encoder.layers.0.ffn.vision.fc1.weight"] == 2 * 5
    assert main([*command, "--image-column", "photo", "--text-column", "words"]) == 1
    assert "it has: picture, caption" in errors_of(capsys)


def test_convert_goes_from_a_checkpoint_to_a_folder_and_back(specific, tmp_path, capsys):
    assert main(["convert", "vlmo", specific, str(tmp_path / "original.ckpt"), "--to-original"]) == 0
    assert "recomputed: relative_position_index" in capsys.readouterr().out
    command = ["convert", "vlmo", str(tmp_path / "original.ckpt"), str(tmp_path / "again"), "--tokenizer", specific]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architecture"] == "VlmoForPreTraining"
    assert (tmp_path / "again/tokenizer.json").is_file()
    assert (tmp_path / "again/modeling_vlmo.py").is_file()  # loads where this package is not installed


def test_convert_seed_refuses_a_model_with_experts(specific, tmp_path, capsys):
    assert main(["convert", "seed", specific, str(tmp_path / "out")]) == 1
    assert "must be modality-agnostic" in errors_of(capsys)


BAD_INPUT = {
    "unknown method": ({"merge_method": "liner"}, "did you mean 'linear'?"),
    "unknown parameter": ({"parameters": {"normalise": True}}, "did you mean 'normalize'?"),
    "missing base": ({"merge_method": "task_arithmetic"}, "task_arithmetic needs a base"),
    "missing statistics": ({"merge_method": "regmean"}, "regmean needs statistics"),
    "shapes": ({"models": ["a", "wide"]}, "w: shapes differ, (2, 2) in 'a' and (2, 3) in 'wide'"),
    "missing key": ({"models": ["a", "less"]}, "'less' lacks the tensor w"),
    "truncated": ({"models": ["a", "cut"]}, "model.safetensors is truncated"),
    "index": ({"models": ["a", "index"]}, "points outside its folder"),
    "no such model": ({"models": ["a", "./gone"]}, "'./gone' is neither a file or folder here nor a Hub id"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    from hf_vlmerge.merging import save_checkpoint

    monkeypatch.chdir(tmp_path)
    for name, width in (("a", 2), ("b", 2), ("wide", 3), ("cut", 2)):
        save_checkpoint(name, {"v": torch.ones(2), "w": torch.ones(2, width)})
    save_checkpoint("less", {"v": torch.ones(2)})
    file = tmp_path / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    (tmp_path / "index").mkdir()
    index = {"weight_map": {"w": "../a/model.safetensors"}}
    (tmp_path / "index/model.safetensors.index.json").write_text(json.dumps(index))
    changes, said = BAD_INPUT[case]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": ["a", "b"]} | changes))
    before = sorted(tmp_path.rglob("*"))
    assert main(["merge", "r.yaml", "out"]) == 1
    error = errors_of(capsys)
    assert said in error and error.startswith("hf-vlmerge: ") and len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_without_a_config_are_merged(tmp_path, capsys):
    from hf_vlmerge.merging import open_source, save_checkpoint

    for name, value in (("a", 1.0), ("b", 3.0)):
        save_checkpoint(tmp_path / name, {"w": torch.full((2,), value)})
    models = [str(tmp_path / name / "model.safetensors") for name in "ab"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    assert main(["merge", str(tmp_path / "r.yaml"), str(tmp_path / "out")]) == 0
    assert open_source(tmp_path / "out")["w"].tolist() == [2.0, 2.0]
    written = {"model.safetensors", "README.md", "recipe.yaml", "provenance.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == written


def test_an_error_cannot_steer_the_terminal(tmp_path, capsys):
    assert main(["merge", "no\x1b[2Jsuch.yaml", "out"]) == 1
    assert capsys.readouterr().err == "hf-vlmerge: the recipe no?[2Jsuch.yaml is not a file.\n"


def test_statistics_need_a_processor_and_name_no_path(specific, tmp_path, capsys):

    from hf_vlmerge.merging import open_source

    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(Path(specific) / name, bare / name)
    command = ["--data", "shapes", "--samples", "2"]
    assert main(["statistics", str(bare), str(tmp_path / "g.safetensors"), *command]) == 1
    assert "bare has no processor with its tokenizer beside the weights" in errors_of(capsys)
    assert main(["statistics", specific, str(tmp_path / "g.safetensors"), *command]) == 0
    assert open_source(tmp_path / "g.safetensors").metadata["source"] == '"specific"'


ENDING = """
import atexit
from hf_vlmerge import cli

class Torn:
    def __del__(self):
        print("torn down")

def main():
    atexit.register(print, "what others want done at the end", end="")
    print("printed", end=" ")
    END

there = Torn()
cli.main = main
cli.command()
"""


@pytest.mark.parametrize(
    ("end", "code", "complaint"),
    [
        ("return 0", 0, ""),
        ("return 2", 2, ""),
        ("raise ValueError('as with --debug')", 1, "ValueError: as with --debug"),
    ],
)
def test_a_command_ends_at_once_but_not_before_everything_is_done(end, code, complaint):
    done = subprocess.run(
        [sys.executable, "-c", ENDING.replace("END", end)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert done.stdout == "printed what others want done at the end"
    assert complaint in done.stderr and bool(done.stderr) == bool(complaint)
