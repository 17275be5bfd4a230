"""The scripts that fine-tune UnIVAL, with a tiny model on data made here: pictures of one colour, clips, and tones."""

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vlmerge.auto import add_remote_code
from hf_vlmerge.models.unival.modeling_unival import UnivalForConditionalGeneration
from hf_vlmerge.training.arguments import VlmergeTrainingArguments
from hf_vlmerge.training.script_arguments import DataTrainingArguments, ModelArguments, flags, parse_arguments
from tests import hub_server
from tests.models.unival.tiny import tiny_config
from tests.models.unival.tiny_processor import tiny_processor

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "training_scripts"
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
SIZES = {
    "max_position_embeddings": 64, "image_widths": [8, 8], "image_depths": [1, 1], "video_widths": [32],
    "video_depths": [1], "audio_widths": [4, 8], "audio_sample_rate": 1000, "audio_window": 64, "audio_hop": 50,
    "audio_min_frequency": 10, "audio_max_frequency": 500, "audio_mel_bins": 16,
}  # fmt: skip


def picture(name: str) -> Image.Image:
    image = Image.new("RGB", (40, 20))
    image.paste(COLOURS[name], (20, 0, 40, 20))
    return image


def tone(low: bool) -> dict:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(100) * (0.2 if low else 1.2)) * 0.5, 1000, format="WAV", subtype="PCM_16")
    return {"bytes": file.getvalue(), "path": None}


def table(rows: int) -> dict:
    names = [list(COLOURS)[i % 2] for i in range(rows)]
    return {
        "picture": [picture(name) for name in names],
        "frames": [[picture(name)] * 5 for name in names],
        "sound": [tone(i % 2 == 0) for i in range(rows)],
        "question": ["what colour?"] * rows,
        "answer": names,
        "colour": [i % 2 for i in range(rows)],
        "captions": [[f"a {name} half.", f"half is {name}"] for name in names],
        "texts": [["the half", "all"], ["the half"]] * (rows // 2),
        "boxes": [[[20.0, 0.0, 40.0, 20.0], [0.0, 0.0, 40.0, 20.0]], [[20.0, 0.0, 40.0, 20.0]]] * (rows // 2),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    for split, rows in {"train": 12, "validation": 6}.items():
        made = datasets.Dataset.from_dict(table(rows)).cast_column("colour", datasets.ClassLabel(names=list(COLOURS)))
        made.to_parquet(str(folder / f"{split}.parquet"))
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A tiny model of initial weights, and its processor."""
    folder = tmp_path_factory.mktemp("model")
    processor = tiny_processor(max_length=64)
    torch.manual_seed(0)
    UnivalForConditionalGeneration(tiny_config(vocab_size=len(processor.tokenizer), **SIZES)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(data, checkpoint, tmp_path) -> dict:
    return {
        "model_name_or_path": checkpoint, "dataset_name": data, "prompt": "question_answering",
        "image_column": "picture", "text_column": ["question"], "target_column": "answer",
        "output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_steps": 0, "seed": 1,
    }  # fmt: skip


def for_script(script: str, settings: dict) -> dict:
    """The Trainer does without checkpoints in other words."""
    if script == "finetune_unival" and not settings["save_steps"]:
        return {name: value for name, value in settings.items() if name != "save_steps"} | {"save_strategy": "no"}
    return settings


@pytest.fixture
def run(monkeypatch):
    """Runs a script in this process and gives its lines of losses."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(settings: dict, script: str = "finetune_unival") -> list[float]:
        module = importlib.import_module(script)
        monkeypatch.setattr("sys.argv", [script, *flags(for_script(script, settings))])
        module.main()
        return losses(settings["output_dir"])

    return run


def with_dropout(settings: dict, folder: Path) -> None:
    """So that random numbers matter."""
    copy = Path(shutil.copytree(settings["model_name_or_path"], folder / "dropout"))
    config = json.loads((copy / "config.json").read_text()) | {"hidden_dropout_prob": 0.2, "drop_path_rate": 0.2}
    (copy / "config.json").write_text(json.dumps(config))
    settings["model_name_or_path"] = str(copy)


def losses(folder: str) -> list[float]:
    state, history = Path(folder, "trainer_state.json"), Path(folder, "log_history.json")
    lines = json.loads(state.read_text())["log_history"] if state.is_file() else json.loads(history.read_text())
    return [line["loss"] for line in lines if "loss" in line]


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model.safetensors"))


def test_it_learns_scores_and_saves(run, settings):
    found = run(
        settings
        | {"max_steps": 25, "validation_split": "validation", "predict_with_generate": True, "generation_num_beams": 1}
    )
    assert len(found) == 25 and found[-1] < 0.3 * found[0]
    folder = settings["output_dir"]
    scores = json.loads(Path(folder, "eval_results.json").read_text())
    assert scores["eval_loss"] < 0.5 * found[0] and 0 <= scores["eval_exact_match"] <= 1
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    said = model.generate(**processor(images=picture("red"), text="what colour?"), max_new_tokens=8)
    assert processor.batch_decode(said, skip_special_tokens=True)[0].strip()
    card = Path(folder, "README.md").read_text()
    start, data = Path(settings["model_name_or_path"]).name, Path(settings["dataset_name"]).name
    assert f"was fine-tuned from the checkpoint `{start}` on the {data} dataset" in card and "Exact Match" in card
    assert str(Path(folder).parent) not in card


def test_flags_yaml_and_json_give_the_same_run(run, settings, monkeypatch, tmp_path):
    expected = run(settings)
    for suffix, dump in {".yaml": yaml.safe_dump, ".json": json.dumps}.items():
        output = str(tmp_path / suffix[1:])
        file = tmp_path / f"settings{suffix}"
        file.write_text(dump(for_script("finetune_unival", settings | {"output_dir": output})))
        monkeypatch.setattr("sys.argv", ["finetune_unival.py", str(file)])
        importlib.import_module("finetune_unival").main()
        assert losses(output) == expected
    assert len(expected) == 3


def test_a_stream_gives_the_run_of_the_first_rows_in_order(run, settings, tmp_path):
    settings |= {"max_train_samples": 8, "train_sampling_strategy": "sequential", "max_steps": 2}
    expected = run(settings)
    stream = {"streaming": True, "shuffle_buffer_size": 0, "output_dir": str(tmp_path / "stream")}
    assert run(settings | stream) == expected
    settings.pop("train_sampling_strategy")
    loop = {"output_dir": str(tmp_path / "loop")}
    found = run(settings | stream | loop, "finetune_unival_no_trainer")
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_loop_gives_the_losses_and_scores_of_the_trainer(run, settings, tmp_path):
    settings |= {
        "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2,
        "text_column": ["texts"], "target_column": "boxes", "prompt": "visual_grounding", "max_grad_norm": 1.0,
        "label_smoothing_factor": 0.1, "encouraging_log_end": 0.75, "drop_worst_ratio": 0.2, "drop_worst_after": 1,
        "validation_split": "validation", "predict_with_generate": True, "generation_num_beams": 1,
    }  # fmt: skip
    with_dropout(settings, tmp_path)
    expected = run(settings)  # 18 examples: batches of 5, 5 | 5, 3 in each epoch
    found = run(settings | {"output_dir": str(tmp_path / "loop")}, "finetune_unival_no_trainer")
    assert len(expected) == 4 and found == pytest.approx(expected, abs=1e-6)
    scores, others = (json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("out", "loop"))
    assert others == pytest.approx({name: scores[name] for name in others}, abs=1e-5)
    assert set(others) == {"eval_loss", "eval_grounding_accuracy"}
    measured = ModelCard((tmp_path / "loop/README.md").read_text()).data.eval_results
    assert {f"eval_{result.metric_name}": result.metric_value for result in measured} == others
    one, two = weights(tmp_path / "out"), weights(tmp_path / "loop")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("script", ["finetune_unival", "finetune_unival_no_trainer"])
def test_a_run_that_goes_on_ends_with_the_same_weights(run, settings, tmp_path, script):
    with_dropout(settings, tmp_path)
    settings |= {"max_steps": 5, "save_steps": 4, "gradient_accumulation_steps": 2}  # step 4 ends the second epoch
    run(settings, script)
    went_on = settings | {"output_dir": str(tmp_path / "on"), "save_steps": 3}
    run(went_on, script)
    shutil.rmtree(tmp_path / "on" / "checkpoint-5", ignore_errors=True)  # what the Trainer writes at the end
    run(went_on | {"resume_from_checkpoint": "last"}, script)
    run(
        settings | {"output_dir": str(tmp_path / "two"), "resume_from_checkpoint": str(tmp_path / "out/checkpoint-4")},
        script,
    )
    for folder in ("on", "two"):
        one, two = weights(tmp_path / "out"), weights(tmp_path / folder)
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert losses(tmp_path / folder) == losses(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({"image_column": None, "audio_column": "sound", "target_column": "colour"}, "exact_match"),
        ({"image_column": None, "video_column": "frames", "prompt": "{colour}?", "text_column": []}, "exact_match"),
        ({"prompt": "image_captioning", "text_column": [], "target_column": "captions"}, "cider_d"),
        ({"prompt_type": "prev_output", "max_target_length": 4}, "exact_match"),
    ],
    ids=["sounds", "clips and a template", "captions", "a question before the answer"],
)  # fmt: skip
def test_any_media_and_prompts(run, settings, changes, metric, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 s after a shuffled stream
    evaluation = {"validation_split": "validation", "predict_with_generate": True, "generation_num_beams": 1}
    stream = {"max_steps": 1, "streaming": True, "max_eval_samples": 5, "freeze_embeddings": True}
    run(settings | changes | evaluation | stream)
    scores = json.loads(Path(settings["output_dir"], "eval_results.json").read_text())
    assert 0 <= scores[f"eval_{metric}"] <= 10
    before, after = weights(settings["model_name_or_path"]), weights(settings["output_dir"])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and "model.shared.weight" not in changed


def test_code_of_a_checkpoint_runs_only_if_it_is_trusted(run, settings, checkpoint, tmp_path):
    """A copy of the model under a type that the package does not know."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "fork"))
    add_remote_code(folder)
    for path in (*folder.glob("*.json"), *folder.glob("*.py")):
        path.write_text(re.sub(r"(model_type\"?(?:: str)? ?[:=] ?)\"unival\"", r'\1"unival_fork"', path.read_text()))
    settings |= {"model_name_or_path": str(folder), "max_steps": 1}
    with pytest.raises(ValueError, match="trust_remote_code"):
        run(settings)
    assert len(run(settings | {"trust_remote_code": True})) == 1
    assert json.loads(Path(settings["output_dir"], "config.json").read_text())["model_type"] == "unival_fork"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "question_answer"}, r"no prompt 'question_answer' \(did you mean 'question_answering'\?\)"),
        ({"image_column": "pictures"}, r"no column 'pictures' \(did you mean 'picture'\?\); its columns are picture,"),
        ({"text_column": []}, r"'question_answering' takes question: expected 1 names in text_column; got 0"),
        ({"prompt": "{answers}", "text_column": []}, r"no column 'answers' \(did you mean 'answer'\?\)"),
        ({"validation_split": "test"}, r"expected test\.parquet in"),
        ({"resume_from_checkpoint": "last"}, r"resume_from_checkpoint is 'last'; expected a folder checkpoint-"),
        ({"prompt": "text_to_image", "predict_with_generate": True, "validation_split": "train"}, "no metric for"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_named(run, settings, changes, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        run(settings | changes)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image_colum", "x"], "there is no argument '--image_colum' (did you mean 'image_column'?)."),
        (["--predict_with_generate", "true"], "expected validation_split; got none."),
        (["--streaming", "true", "--validation_split", "a"], "expected max_eval_samples to say how many; got none."),
        (["other.yaml"], "there is no argument 'other.yaml'"),
        (["--seed", "one"], "argument --seed: invalid int value: 'one'"),
    ],
)
def test_wrong_arguments_end_with_one_sentence(capsys, arguments, sentence):
    needed = ["--model_name_or_path", "a", "--dataset_name", "b", "--prompt", "c d", "--target_column", "e"]
    with pytest.raises(SystemExit) as ended:
        parse_arguments(ModelArguments, DataTrainingArguments, VlmergeTrainingArguments, arguments=needed + arguments)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_flags_change_what_a_file_says(tmp_path, capsys):
    file = tmp_path / "settings.yml"
    needed = {"model_name_or_path": "a", "dataset_name": "b", "prompt": "c d", "target_column": "e"}
    file.write_text(yaml.safe_dump(needed | {"text_column": ["f", "g"], "streaming": True, "max_eval_samples": None}))
    model, data = parse_arguments(ModelArguments, DataTrainingArguments, arguments=[str(file), "--prompt", "h"])
    assert (model.model_name_or_path, data.prompt, data.text_column, data.streaming) == ("a", "h", ["f", "g"], True)
    with pytest.raises(SystemExit):
        parse_arguments(ModelArguments, arguments=[str(tmp_path / "none.json")])
    assert "there is no file" in capsys.readouterr().err


def test_another_model_is_refused(run, settings, tmp_path):
    from transformers import BlipConfig, BlipForConditionalGeneration

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BlipConfig(
        text_config={"vocab_size": 10, **sizes}, vision_config={"image_size": 32, **sizes}, projection_dim=8
    )
    BlipForConditionalGeneration(config).save_pretrained(tmp_path / "blip")
    with pytest.raises(ValueError, match=r"expected a checkpoint of UnIVAL; .* is a BlipForConditionalGeneration"):
        run(settings | {"model_name_or_path": str(tmp_path / "blip")})


def test_the_loop_has_the_names_and_defaults_of_the_trainer(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    defaults = VlmergeTrainingArguments(output_dir="trainer_output", use_cpu=True)
    for each in fields(importlib.import_module("finetune_unival_no_trainer").LoopArguments):
        if each.name != "use_cpu":
            assert getattr(defaults, each.name) == each.default, each.name


def test_the_settings_of_the_repository_are_understood_by_both(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    loop = importlib.import_module("finetune_unival_no_trainer").LoopArguments
    for training in (loop, VlmergeTrainingArguments):
        file = str(SCRIPTS / "settings" / "finetune_unival.yaml")
        _, data, parsed = parse_arguments(ModelArguments, DataTrainingArguments, training, arguments=[file])
        assert data.prompt == "question_answering" and data.text_column == ["questions"]
        assert parsed.learning_rate == 1e-3


@pytest.mark.multiproc
@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["numbered", "streamed"])
@pytest.mark.parametrize("script", ["finetune_unival", "finetune_unival_no_trainer"])
def test_two_processes_are_one_with_twice_the_batch(run, settings, tmp_path, script, streaming):
    """Started as users do, by `accelerate launch`; targets differ in length, and 5 rows are not even."""
    settings |= {
        "validation_split": "validation", "predict_with_generate": True, "generation_num_beams": 1, "use_cpu": True,
        "freeze_batch_norm": True, "gradient_accumulation_steps": 2, "max_eval_samples": 5, "streaming": streaming,
        "shuffle_buffer_size": 0,
    }  # fmt: skip
    expected = run(settings, script)
    scores = json.loads(Path(settings["output_dir"], "eval_results.json").read_text())
    config = SCRIPTS / "accelerate_configs" / "cpu_2proc.yaml"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--main_process_port",
        "0",
    ]
    two = settings | {"per_device_train_batch_size": 2, "output_dir": str(tmp_path / "two")}
    command = [*launch, str(SCRIPTS / f"{script}.py"), *flags(for_script(script, two))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    card = (tmp_path / "two" / "README.md").read_text()
    devices = re.compile(r"num_devices\W+2")  # each script has its own form of card
    assert devices.search(card) and not devices.search((tmp_path / "out" / "README.md").read_text())
    assert losses(str(tmp_path / "two")) == pytest.approx(expected, abs=1e-5)
    found = json.loads((tmp_path / "two" / "eval_results.json").read_text())
    assert found["eval_exact_match"] == scores["eval_exact_match"]


@pytest.mark.parametrize("script", ["finetune_unival", "finetune_unival_no_trainer"])
def test_from_the_hub_and_to_the_hub(settings, checkpoint, tmp_path, script):
    commit, files = "1" * 40, {path.name: path.read_bytes() for path in Path(checkpoint).iterdir()}
    settings |= {"model_name_or_path": "org/base", "model_revision": "v1", "validation_split": "validation"}
    settings |= {"max_steps": 1, "push_to_hub": True, "hub_model_id": "org/tuned"}
    if script == "finetune_unival":
        settings |= {"hub_token": hub_server.TOKEN, "load_best_model_at_end": True, "eval_steps": 1, "save_steps": 1}
        settings |= {"eval_strategy": "steps", "save_strategy": "steps"}
    with hub_server.HubServer({"org/base": {commit: files}}, {"org/base": {"main": commit, "v1": commit}}) as hub:
        command = [sys.executable, str(SCRIPTS / f"{script}.py"), *flags(for_script(script, settings))]
        environment = os.environ | hub.environment(tmp_path / "home", hub_server.TOKEN)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.files("org/tuned")
    assert {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= files.keys()
    assert files["model.safetensors"] == Path(settings["output_dir"], "model.safetensors").read_bytes()
    assert not any(name.startswith("checkpoint") for name in files)
    for secret in (hub_server.TOKEN, str(tmp_path)):
        assert not [name for name, content in files.items() if secret.encode() in content]
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["base_model"] in ("org/base", ["org/base"])
    assert Path(settings["dataset_name"]).name in card and str(tmp_path) not in card
    if script == "finetune_unival_no_trainer":
        assert f"https://huggingface.co/org/base/tree/{commit}" in card
