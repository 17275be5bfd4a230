"""The script that trains a small UnIVAL, on data made here: pictures of one colour, clips, and tones."""

import importlib
import io
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
import yaml
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
    "sizes": {"image_size": 32, "num_frames": 4, "sampling_rate": 4000},
    "frame_size": 16,
    "num_samples": 2048,
    "vocabulary": {"size": 300, "num_bins": 100},
    "training": {"steps": 3, "learning_rate": 1e-3, "warmup_steps": 1},
    "tasks": {
        "questions": {"data": "pictures", "kind": "answers", "rows": 3, "stated": 0.5, **QUESTION},
        "captions": {
            "data": "pictures", "media": "image", "kind": "captions", "prompt": "image_captioning", "target": "caption",
            "rows": 1,
        },
        "grounding": {
            "data": "pictures", "media": "image", "kind": "boxes", "prompt": "visual_grounding", "rows": 1,
            "text": "referring_texts", "target": "referring_boxes",
        },
        "clips": {
            "data": "clips", "kind": "answers", "rows": 2, "baseline": "first_frame", **QUESTION, "media": "video",
            "only": "what color is it?",
        },
        "sounds": {
            "data": "sounds", "media": "audio", "prompt": "question_answering", "question": "what is the sound?",
            "target": "label", "kind": "answers", "rows": 2, "baseline": "spectral_neighbours",
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
    model, processor = (each.from_pretrained(tmp_path / "out") for each in (AutoModelForSeq2SeqLM, AutoProcessor))
    inputs = processor(images=picture("red"), text="what color is it?")
    assert model.score_candidates(inputs, processor.answer_trie(["red", "blue"])).shape == (1, 2)


def test_every_batch_holds_the_rows_of_every_task(script, corpus):
    mixture = script.Mixture(corpus.train, corpus.tasks, seed=0)
    order = list(islice(mixture, 8 * mixture.batch_size))
    for start in range(0, len(order), mixture.batch_size):
        batch = order[start : start + mixture.batch_size]
        assert Counter(example.media for example in batch) == {"image": 5, "video": 2, "audio": 2}
    captions = [example.targets[0] for example in order if example.prompt == " what does the image describe?"]
    assert len(captions) == 8 and sorted(captions) == sorted(each.targets[0] for each in corpus.train["captions"])
    again = list(islice(script.Mixture(corpus.train, corpus.tasks, seed=0), len(order)))
    other = list(islice(script.Mixture(corpus.train, corpus.tasks, seed=1), len(order)))
    assert all(one is two for one, two in zip(order, again, strict=True))
    assert any(one is not two for one, two in zip(order, other, strict=True))


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
    mixture = script.Mixture(corpus.train, corpus.tasks, seed=0)
    collator = script.Collator(processor, with_targets=False)
    script.refresh_batch_norm(model, mixture, collator, batches=1)
    tower = model.model.encoder.image_tower
    pixels = collator(list(islice(mixture, mixture.batch_size)))["pixel_values"]
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
    assert {task.media for task in tasks.values() if task.rows} == set(config.towers)
    assert settings["sizes"]["sampling_rate"] == config.audio_sample_rate
