"""The embedded data set: determinism, splits by content, true captions, balanced answers."""

import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from hf_vlmerge.data.shapes import LEVELS, ShapesDataset, Thing, draw_scene, retrieval, retrieval_set, split_of
from hf_vlmerge.data.shapes.captions import (
    OPPOSITE,
    canonical_caption,
    corrupt,
    fixed_captions,
    random_caption,
    satisfies,
)
from hf_vlmerge.data.shapes.questions import ANSWERS, answers_of, families_of
from hf_vlmerge.data.shapes.render import render
from hf_vlmerge.data.shapes.retrieval import recall_ceiling
from hf_vlmerge.data.shapes.world import COLOURS, HELD_OUT, SHAPES, SPLITS, canonical, generator_for


def fingerprint(dataset: ShapesDataset) -> str:
    digest = hashlib.sha256()
    for example in dataset:
        digest.update(np.asarray(example["image"]).tobytes())
        digest.update(repr([example[name] for name in sorted(example) if name != "image"]).encode())
    return digest.hexdigest()[:16]


GOLDEN = {
    ("train", "captions"): "da0991fbe0340af0",
    ("train", "questions"): "7154177ca950726f",
    ("train", "matching"): "ee43bcabfa9083d8",
    ("validation", "captions"): "cbc72e45653fd9c6",
    ("validation", "questions"): "f983cfb4d12601f0",
    ("validation", "matching"): "641799bbf45cae9e",
    ("test", "captions"): "8d6ea3fe4bd57ff0",
    ("test", "questions"): "7b06c8e982df8315",
    ("test", "matching"): "b0c1bea35f1e46ee",
    ("test_compositional", "captions"): "00191951e62a6468",
    ("test_compositional", "questions"): "dfd155d629ef7de5",
    ("test_compositional", "matching"): "d5b4f7ad412b7520",
}


@pytest.mark.parametrize(("split", "task"), [(s, t) for s in SPLITS for t in ("captions", "questions", "matching")])
def test_first_examples_never_change(split, task):
    assert fingerprint(ShapesDataset(100, split, task=task)) == GOLDEN[split, task]


def test_an_example_depends_on_its_index_alone():
    long, short = ShapesDataset(50, level="hard"), ShapesDataset(10, level="hard")
    assert long[7]["text"] == short[7]["text"]
    assert np.array_equal(np.asarray(long[7]["image"]), np.asarray(short[7]["image"]))
    assert long[-1]["text"] == long[49]["text"]
    assert ShapesDataset(10, level="hard", seed=1)[7]["text"] != short[7]["text"]
    with pytest.raises(IndexError, match="10 is outside"):
        short[10]


def test_arrays_are_the_items():
    dataset = ShapesDataset(5, "test", image_size=32)
    images, columns = dataset.arrays()
    assert images.shape == (5, 32, 32, 3)
    assert np.array_equal(images[3], np.asarray(dataset[3]["image"]))
    assert columns["text"] == [example["text"] for example in dataset] == dataset.texts()


@pytest.mark.parametrize("level", LEVELS)
def test_splits_share_no_scene_and_training_no_held_out_pair(level):
    scenes = {
        split: {canonical(s) for s in map(ShapesDataset(200, split, level).scene, range(200))} for split in SPLITS
    }
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not scenes[one] & scenes[other]
    for i in range(200):
        scene = ShapesDataset(200, "train", level).scene(i)
        assert not {(thing.colour, thing.shape) for thing in scene} & HELD_OUT


def test_shares_of_the_splits():
    random = generator_for(0, "shares", 0)
    counts = Counter(split_of(draw_scene(random, "medium")) for _ in range(4000))
    ordinary = 4000 - counts["test_compositional"]
    assert abs(counts["train"] / ordinary - 0.8) < 0.03
    assert abs(counts["validation"] / ordinary - 0.1) < 0.02


def test_held_out_pairs_leave_every_colour_and_shape_in_training():
    assert len(HELD_OUT) == 8
    assert max(Counter(colour for colour, _ in HELD_OUT).values()) <= 2
    assert max(Counter(shape for _, shape in HELD_OUT).values()) <= 2


@pytest.mark.parametrize("level", LEVELS)
def test_captions_are_true_and_their_corruptions_false(level):
    random = generator_for(0, "captions", 0)
    for _ in range(200):
        scene = draw_scene(random, level)
        caption = random_caption(scene, level, random)
        false = corrupt(caption, scene, level, random)
        assert all(satisfies(scene, true) for true in [caption, canonical_caption(scene), *fixed_captions(scene)])
        assert not satisfies(scene, false)
        assert len(set(false.text.split()) ^ set(caption.text.split())) <= 6  # a word, perhaps its article and relation
        if LEVELS[level].relations_only:
            assert caption.relation in OPPOSITE
            assert all(thing.size is not None for thing in caption.things)


def test_what_a_caption_says_by_hand():
    scene = (Thing(0, 0, 0, 0, 0, 0), Thing(5, 1, 1, 5, 0, 0))  # small red circle top left, large orange square right
    assert [caption.text for caption in fixed_captions(scene)] == [
        "a small red circle and a large orange square",
        "a small red circle left of a large orange square",
        "a small red circle at the top left",
        "two objects: a small red circle and a large orange square",
        "a small red circle",
    ]
    relations = {random_caption(scene, "pair", generator_for(0, "r", i)).relation for i in range(40)}
    assert relations == {"left of", "right of", "above", "below"}  # a diagonal pair has two true ones either way


@pytest.mark.parametrize("level", ["easy", "medium"])
def test_answers_are_balanced_within_each_family(level):
    counts = defaultdict(Counter)
    images_only = ShapesDataset(1500, level=level, task="questions")
    for i in range(1500):
        _, row, _ = images_only._draw(i)
        counts[row["family"]][row["answer"]] += 1
        assert ANSWERS[row["label"]] == row["answer"]
    assert sorted(counts) == sorted(families_of(LEVELS[level]))
    for family, answers in counts.items():
        expected = answers_of(family, LEVELS[level])
        assert set(answers) == set(expected)
        share = sum(answers.values()) / len(expected)
        assert all(abs(n - share) < 5 * share**0.5 for n in answers.values()), (family, answers)


def true_answer(question: str, scene) -> str:
    """An answer found by reading the question's words, apart from the code that wrote them."""
    words = question.rstrip("?").split()
    looks = [(COLOURS[t.colour], SHAPES[t.shape]) for t in scene]
    number = ["zero", "one", "two", "three", "four", "five"]
    match words:
        case ["is", "there", _, colour, shape]:
            return "yes" if (colour, shape) in looks else "no"
        case ["is", "the", c1, s1, *relation, "the", c2, s2]:
            one, two = scene[looks.index((c1, s1))], scene[looks.index((c2, s2))]
            steps = {"left": two.cell % 3 - one.cell % 3, "above": two.cell // 3 - one.cell // 3}
            steps |= {"right": -steps["left"], "below": -steps["above"]}
            return "yes" if steps[relation[0]] > 0 else "no"
        case ["what", "colour", "is", "the", shape]:
            return next(c for c, s in looks if s == shape)
        case ["what", "shape", "is", "the", colour, "object"]:
            return next(s for c, s in looks if c == colour)
        case ["how", "many", "objects", "are", "there"]:
            return number[len(scene)]
        case ["how", "many", colour, "objects", "are", "there"]:
            return number[sum(c == colour for c, _ in looks)]
        case ["how", "many", shapes, "are", "there"]:
            return number[sum(shapes.startswith(s) for _, s in looks)]
        case ["are", "there", "more", first, "than", second]:
            more, less = (sum(plural.startswith(s) for _, s in looks) for plural in (first, second))
            return "yes" if more > less else "no"
        case ["what", "is", *place]:
            row = 0 if "top" in place else (2 if "bottom" in place else 1)
            column = 0 if "left" in place else (2 if "right" in place else 1)
            return next((SHAPES[t.shape] for t in scene if t.cell == 3 * row + column), "nothing")
    raise AssertionError(question)


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_true(level):
    dataset = ShapesDataset(300, level=level, task="questions")
    for i in range(300):
        scene, row, _ = dataset._draw(i)
        assert true_answer(row["text"], scene) == row["answer"], (row, scene)


def test_pixels_show_the_scene():
    scene = (Thing(0, 1, 1, 0, 0, 0), Thing(2, 0, 0, 8, 0, 0))
    image = render(scene, generator_for(0, "pixels", 0), image_size=48, noise=0)
    assert image.dtype == np.uint8
    assert tuple(image[8, 8]) == (220, 40, 40)  # red in the centre of the first cell
    assert tuple(image[40, 40]) == (40, 80, 220)
    assert image[24, 24].min() >= 215  # background
    noisy = render(scene, generator_for(0, "pixels", 0), image_size=48, noise=10)
    assert 7 < np.std(noisy[14:34, 14:34].astype(float) - image[14:34, 14:34]) < 13


def test_retrieval_set_has_different_captions_and_a_ceiling():
    chosen = retrieval_set(60, level="pair", image_size=32)
    assert len(set(chosen.texts)) == 60
    assert chosen.images.shape == (60, 32, 32, 3)
    assert 0.9 < chosen.ceiling["mean"] <= 1


def test_a_split_that_is_too_small_for_the_retrieval_set(monkeypatch):
    lone = (Thing(0, 1, 0, 0, 0, 0),)
    monkeypatch.setattr(retrieval, "scenes_of", lambda *_: iter([lone]))
    with pytest.raises(ValueError, match="has not 2 scenes with different captions; 1 were found"):
        retrieval_set(2)


def test_ceiling_by_hand():
    red_left = (Thing(0, 1, 0, 0, 0, 0), Thing(2, 1, 0, 2, 0, 0))
    red_right = (Thing(2, 1, 0, 0, 0, 0), Thing(0, 1, 0, 2, 0, 0))
    both = canonical_caption(red_left)._replace(relation=None)  # true of both scenes
    ceiling = recall_ceiling([red_left, red_right], [both, canonical_caption(red_right)], ks=(1,))
    assert ceiling == {"tr_r1": (1 + 0.5) / 2, "ir_r1": (0.5 + 1) / 2, "mean": 0.75}


def test_bad_arguments_name_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'validation'"):
        ShapesDataset(1, split="validatoin")
    with pytest.raises(ValueError, match="Did you mean 'easy'"):
        ShapesDataset(1, level="eazy")
    with pytest.raises(ValueError, match="Did you mean 'captions'"):
        ShapesDataset(1, task="caption")
    with pytest.raises(ValueError, match="num_examples >= 1"):
        ShapesDataset(0)
