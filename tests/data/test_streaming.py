"""Examples by number and as a stream are the same, and what does not exist is named."""

import datasets
import pytest
from PIL import Image

from hf_vlmerge.data.streaming import (
    NUMBER,
    Examples,
    Spread,
    aligned,
    first_rows,
    only_columns,
    open_split,
    stream_examples,
)

ROWS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files a split; one to three questions a row."""
    folder = tmp_path_factory.mktemp("rows")
    counts = [1 + i % 3 for i in range(ROWS)]
    table = {
        "image": [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(ROWS)],
        "questions": [[f"question {i}.{k}" for k in range(count)] for i, count in enumerate(counts)],
        "answers": [[f"answer {i}.{k}" for k in range(count)] for i, count in enumerate(counts)],
        "kind": [i % 2 for i in range(ROWS)],
    }
    rows = datasets.Dataset.from_dict(table).cast_column("kind", datasets.ClassLabel(names=["even", "odd"]))
    for part, start in enumerate((0, 4)):
        rows.select(range(start, min(start + 4, ROWS))).to_parquet(str(folder / f"train-{part}.parquet"))
    return folder


def both(folder, count=None, lists=("questions", "answers")):
    """Examples by number and the same as a stream, without numbers."""
    found = []
    for streaming in (False, True):
        rows = only_columns(
            first_rows(open_split(folder, "train", streaming=streaming), count),
            ["image", "questions", "answers", "kind"],
            folder,
        )
        spread = Spread(lists, rows.features)
        found.append(list(stream_examples(rows, spread)) if streaming else list(Examples(rows, spread)))
    numbers = [example.pop(NUMBER) for example in found[0]]
    assert numbers == list(range(len(numbers)))
    return found


@pytest.mark.parametrize(("count", "expected"), [(None, 13), (3, 6), (100, 13)])
def test_a_stream_gives_the_examples_of_the_first_rows_in_order(folder, count, expected):
    examples, stream = both(folder, count)
    assert examples == stream and len(examples) == expected
    assert [example["questions"] for example in examples[:3]] == ["question 0.0", "question 1.0", "question 1.1"]
    assert all(each["answers"] == each["questions"].replace("question", "answer") for each in examples)
    assert examples[0]["kind"] == "even" and examples[1]["kind"] == "odd"
    assert isinstance(examples[0]["image"]["bytes"], bytes)  # decoded by the collator


def test_a_split_is_its_own_files_alone(tmp_path):
    for name in ("test", "testA", "test_std", "val", "validation"):
        datasets.Dataset.from_dict({"split": [name]}).to_parquet(str(tmp_path / f"{name}.parquet"))
    for name in ("test", "val"):
        assert open_split(tmp_path, name)["split"] == [name]


def test_a_column_called_number_stays_what_it_is(folder):
    examples = Examples([{"number": "two"}, {"number": "three"}], Spread(()))
    assert [example["number"] for example in examples] == ["two", "three"]


def test_classes_in_lists_have_names_and_nothing_stays_nothing(tmp_path):
    kind = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"all": datasets.List(kind), "one": kind})
    rows = datasets.Dataset.from_dict({"all": [[1, 0], []], "one": [None, 1]}, features=features)
    spread = Spread((), rows.features)
    assert [spread(row)[0] for row in rows] == [{"all": ["yes", "no"], "one": None}, {"all": [], "one": "yes"}]


def test_rows_without_lists_are_examples(folder):
    examples, stream = both(folder, lists=())
    assert examples == stream and len(examples) == ROWS


def test_a_shuffled_stream_has_the_same_examples_in_an_order_of_its_seed(folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 s after each reading

    def order(seed):
        rows = only_columns(open_split(folder, "train", streaming=True), ["questions", "answers"], folder)
        return [example["questions"] for example in stream_examples(rows, Spread(["questions", "answers"]), 8, seed)]

    assert sorted(order(0)) == sorted(order(1)) and order(0) != order(1) and order(0) == order(0)


def test_what_does_not_exist_is_named(folder):
    with pytest.raises(
        ValueError, match=r"no column 'question' \(did you mean 'questions'\?\); its columns are image,"
    ):
        only_columns(open_split(folder, "train"), ["question"], folder)
    with pytest.raises(FileNotFoundError, match=r"expected test\.parquet in .*; found train-0\.parquet, train-1"):
        open_split(folder, "test")
    with pytest.raises(ValueError, match=r"lists of one length, .*; got \[2, 1\] entries"):
        aligned(["a", "b"], ["c"])


def test_lists_go_together_and_others_as_they_are():
    assert aligned(["a", "b"], [1, 2]) == [("a", 1), ("b", 2)]
    assert aligned("a", ["red", "blue"]) == [("a", ["red", "blue"])]
