"""The script that trains a small UnIVAL, on data made here: pictures of one colour, clips, and tones."""

import importlib
import io
import json
import random
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from hf_vlmerge.models.unival.prompts_unival import fields_of

SCRIPTS = Path(__file__).resolve().parents[2] / "training_scripts"
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
QUESTION = {"media": "image", "prompt": "question_answering", "text": "questions", "target": "answers"}
SETTINGS = {
    "model": {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 1,
        "max_position_embeddings": 64, "text_bucket_size": 16, "text_bucket_distance": 64, "grid_size": 8,
        "code_image_size": 64, "image_stem_width": 8, "image_widths": [8, 8], "image_depths": [1, 1],
        "video_stem_width": 8, "video_widths": [32], "video_depths": [1], "video_cardinality": 8,
        "audio_widths": [4, 8], "audio_sample_rate": 4000, "audio_window": 128, "audio_hop": 128, "audio_mel_bins": 16,
        "audio_max_frequency": 2000, "audio_time_stripe": 4, "audio_mel_stripe": 2,
    },
    "sizes": {"image_size": 32, "frame_size": 16, "num_frames": 4, "sampling_rate": 4000},
    "num_samples": 2048,
    "vocabulary": {"size": 300, "num_bins": 100},
    "training": {"steps": 3, "learning_rate": 1e-3, "warmup_steps": 1},
    "batch": {"pictures": 2, "clips": 2, "sounds": 2},
    "tasks": {
        "questions": {"data": "pictures", "kind": "answers", "texts": 2, "stated": 0.5, **QUESTION},
        "captions": {
            "data": "pictures", "media": "image", "kind": "captions", "prompt": "image_captioning", "target": "caption",
            "texts": 1,
        },
        "grounding": {
            "data": "pictures", "media": "image", "kind": "boxes", "prompt": "visual_grounding", "texts": 1,
            "text": "referring_texts", "target": "referring_boxes",
        },
        "clips": {
            "data": "clips", "kind": "answers", "texts": 1, "baseline": "first_frame", **QUESTION, "media": "video",
            "only": "what color is it?",
        },
        "sounds": {
            "data": "sounds", "media": "audio", "prompt": "question_answering", "question": "what is the sound?",
            "target": "label", "kind": "answers", "texts": 1, "baseline": "spectral_neighbours",
        },
    },
}  # fmt: skip


def picture(name: str) -> Image.Image:
    """Half of it has the colour: the right one."""
    image = Image.new("RGB", (40, 20))
    image.paste(COLOURS[name], (20, 0, 40, 20))
    return image


def sound(low: bool) -> dict:
    file = io.BytesIO()
    wave = np.sin(np.arange(4000) * (0.2 if low else 1.2)) * 0.5
    soundfile.write(file, wave, 4000, format="WAV", subtype="PCM_16")
    return {"bytes": file.getvalue(), "path": None}


def write(folder: Path, split: str, rows: int) -> None:
    names = [list(COLOURS)[i % 2] for i in range(rows)]
    questions = {
        "questions": [["what color is it?", "how many colors are there?"]] * rows,
        "answers": [[name, "1"] for name in names],
    }
    tables = {
        "pictures": {
            "image": [picture(name) for name in names],
            "caption": [f"a picture with some {name}, on the right" for name in names],
            "referring_texts": [[f"the {name} half"] for name in names],
            "referring_boxes": [[[20.0, 0.0, 40.0, 20.0]]] * rows,
        }
        | questions,
        "clips": {"frames": [[picture(name).crop((20, 0, 40, 20))] * 5 for name in names]} | questions,
        "sounds": {
            "audio": [sound(i % 2 == 0) for i in range(rows)],
            "label": [["low", "high"][i % 2] for i in range(rows)],
        },
    }
    for name, table in tables.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(table).to_parquet(str(folder / name / f"{split}.parquet"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder, "train", 8)
    write(folder, "validation", 4)
    return folder


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("train_unival")


@pytest.fixture
def corpus(script, data):
    tasks = {name: script.Task(**task) for name, task in SETTINGS["tasks"].items()}
    return script.Corpus(data, tasks, script.Sizes(**SETTINGS["sizes"]))


def test_the_script_trains_scores_and_saves(script, data, tmp_path, monkeypatch, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    monkeypatch.setattr("sys.argv", ["train_unival.py", str(settings), str(data), str(tmp_path / "out")])
    script.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert list(results) == list(SETTINGS["tasks"])
    assert results["questions"]["baselines"] == {"majority": 0.5, "text only": 0.75}
    assert results["clips"]["baselines"] == {"majority": 0.5, "text only": 0.5, "first frame, 3-NN": 1.0}
    assert results["sounds"]["baselines"]["log spectrum, 5-NN"] == 1.0
    assert results["grounding"]["baselines"] == {"constant box": 1.0, "box of the text": 1.0}
    assert all(0 <= result["score"] <= 10 and result["examples"] for result in results.values())
    assert "| questions" in (tmp_path / "out" / "results.md").read_text()
    measured = ModelCard((tmp_path / "out" / "README.md").read_text()).data.eval_results
    assert [result.metric_value for result in measured] == [result["score"] for result in results.values()]
    assert {result.metric_name for result in measured} == {"accuracy", "CIDEr-D", "Acc@0.5"}
    model, processor = (each.from_pretrained(tmp_path / "out") for each in (AutoModelForSeq2SeqLM, AutoProcessor))
    inputs = processor(images=picture("red"), text="what color is it?")
    assert model.score_candidates(inputs, processor.answer_trie(["red", "blue"])).shape == (1, 2)


def test_every_step_sees_all_texts_of_every_medium_side_by_side(script, corpus):
    def batches(seed: int) -> list:
        return list(islice(script.Mixture(corpus.train, corpus.tasks, SETTINGS["batch"], seed), 3 * 8))

    order = batches(0)
    for number, batch in enumerate(order):
        media, length = [("image", 8), ("video", 2), ("audio", 2)][number % 3]
        assert {example.media for example in batch} == {media} and len(batch) == length
    for pictures in order[::3]:
        rows = [example.row for example in pictures]
        assert rows == [rows[0]] * 4 + [rows[4]] * 4 and rows[0] != rows[4]
        assert sum(example.prompt == " what does the image describe?" for example in pictures) == 2
    assert {example.row for sounds in order[2::3] for example in sounds} == set(range(8))
    same = [[one is two for one, two in zip(*pair, strict=True)] for pair in zip(order, batches(0), strict=True)]
    other = [[one is two for one, two in zip(*pair, strict=True)] for pair in zip(order, batches(1), strict=True)]
    assert all(map(all, same)) and not all(map(all, other))


def test_a_medium_without_texts_of_a_task_gives_others(script, corpus):
    questions, boxes = corpus.train["questions"][:2], corpus.train["grounding"][:1]
    draw = importlib.import_module("unival_tasks").draw
    drawn = draw({"questions": questions}, {"questions": 3, "grounding": 2}, random.Random(0))
    assert len(drawn) == 5 and all(example in questions for example in drawn)
    drawn = draw({"questions": questions, "grounding": boxes}, {"questions": 2, "grounding": 1}, random.Random(0))
    assert drawn[2] is boxes[0] and drawn[0] is not drawn[1]


def test_towers_run_once_for_rows_with_the_same_medium(script, corpus):
    processor = script.make_processor(SETTINGS, corpus.texts())
    config = script.UnivalConfig(vocab_size=len(processor.tokenizer), **SETTINGS["model"])
    model = script.UnivalForConditionalGeneration(config).eval()
    names = ("questions", "captions", "grounding", "clips", "sounds")
    pair = [example for name in names for example in corpus.train[name] if example.row < 2]
    pair.sort(key=lambda example: (example.media, example.row))
    batch, rows = script.Collator(processor)(pair), []
    with torch.inference_mode():
        plain = model(**batch).logits
        hook = model.model.encoder.image_tower.conv1.register_forward_hook(lambda *call: rows.append(len(call[2])))
        with script.towers_run_once(model):
            torch.testing.assert_close(model(**batch).logits, plain)
        torch.testing.assert_close(model(**batch).logits, plain)
    hook.remove()
    assert rows == [2, len(batch["pixel_values"])]


def test_boxes_of_a_mixed_batch_come_back(script, corpus):
    processor = script.make_processor(SETTINGS, corpus.texts())
    examples = [corpus.train[name][0] for name in ("grounding", "sounds", "clips", "questions")]
    batch = script.Collator(processor)(examples)
    assert batch["media_types"].tolist() == [0, 2, 1, 0]
    assert len(batch["pixel_values"]) == 2 and len(batch["pixel_values_videos"]) == len(batch["input_values"]) == 1
    labels = batch["labels"][0]
    boxes = processor.post_process_grounding(labels[labels >= 0][None], [(20, 40)])
    np.testing.assert_allclose(boxes, [[20, 0, 40, 20]], atol=4)  # half a bin: 512 / 99 / 2 pixels at 32, more at 40
    said = processor.batch_decode([row[row >= 0] for row in batch["labels"][1:]], skip_special_tokens=True)
    assert [text.strip() for text in said] == [each.targets[0] for each in examples[1:]]


def test_statistics_are_those_of_the_final_weights(script, corpus):
    processor = script.make_processor(SETTINGS, corpus.texts())
    torch.manual_seed(0)
    config = script.UnivalConfig(vocab_size=len(processor.tokenizer), **SETTINGS["model"])
    model = script.UnivalForConditionalGeneration(config)
    mixture = script.Mixture(corpus.train, corpus.tasks, SETTINGS["batch"], seed=0)
    collator = script.Collator(processor, with_targets=False)
    script.refresh_batch_norm(model, mixture, collator, batches=1)
    tower = model.model.encoder.image_tower
    pixels = collator(next(iter(mixture)))["pixel_values"]
    features = tower.conv1(pixels)
    torch.testing.assert_close(tower.bn1.running_mean, features.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tower.bn1.running_var, features.var(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in model.modules()) and tower.bn1.momentum == 0.1


def test_the_settings_of_the_repository_fit_together(script):
    settings = yaml.safe_load((SCRIPTS / "settings" / "unival.yaml").read_text())
    tasks = {name: script.Task(**task) for name, task in settings["tasks"].items()}
    fields = {"answers": ["question"], "captions": [], "boxes": ["text"]}
    assert all(fields_of(task.prompt) == fields[task.kind] for task in tasks.values())
    config = script.UnivalConfig(**settings["model"])
    assert {task.media for task in tasks.values() if task.texts} == set(config.towers)
    assert {task.data for task in tasks.values() if task.texts} == set(settings["batch"])
    assert settings["sizes"]["sampling_rate"] == config.audio_sample_rate
