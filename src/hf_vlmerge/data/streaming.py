"""Examples of any `datasets` data set, read when they are needed: by their number from the disk, or as a stream."""

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

NUMBER = "<number>"  # of an example, beside its columns


def open_split(source: str | Path, split: str, *, config: str | None = None, streaming: bool = False):
    """
    The rows of a split, nothing decoded yet.

    Args:
        source: a folder with `<split>.parquet` (or `<split>-*.parquet`, or these in a folder `data`), or the id of a
            data set on the Hub.
        config: of a data set on the Hub; below a folder, the folder of that name.
        streaming: rows in their order as they are read, which needs neither disk nor memory.

    Raises:
        FileNotFoundError: the folder has no file of that split.
    """
    import datasets

    if not Path(source).is_dir():
        return datasets.load_dataset(str(source), config, split=split, streaming=streaming)
    folder = Path(source, config or "")
    names = (f"{place}{split}{part}.parquet" for place in ("", "data/") for part in ("", "-*"))
    files = sorted(str(path) for name in names for path in folder.glob(name))
    if not files:
        found = ", ".join(sorted(path.name for path in folder.rglob("*.parquet"))) or "no Parquet file"
        raise FileNotFoundError(f"expected {split}.parquet in {folder}; found {found}.")
    return datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)


def first_rows(rows, count: int | None):
    """The first so many rows of a split or a stream; None means all of them."""
    if count is None:
        return rows
    return rows.select(range(min(count, len(rows)))) if hasattr(rows, "__len__") else rows.take(count)


def only_columns(rows, names: Iterable[str], source: str | Path):
    """
    Rows with these columns alone, pictures, clips and sounds as bytes.

    Raises:
        ValueError: there is no such column; says which one is meant.
    """
    import datasets

    names, known = list(dict.fromkeys(names)), list(rows.column_names or next(iter(rows)))
    for name in names:
        if name not in known:
            raise ValueError(
                f"{source} has no column {name!r}{nearest(name, known)}; its columns are {', '.join(known)}."
            )
    rows = rows.select_columns(names)
    if isinstance(rows, datasets.IterableDataset):
        return rows.decode(False)
    for name, feature in rows.features.items():
        if getattr(feature, "decode", False):
            feature = copy.copy(feature)
            feature.decode = False
            rows = rows.cast_column(name, feature)
    return rows


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that does not exist."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def aligned(*values: Any) -> list[tuple]:
    """
    Where the first value is a list, all are lists of the same length, and their elements go together: one tuple each.
    Where it is a text, the values go together as they are.

    Raises:
        ValueError: lists differ in length.
    """
    if not isinstance(values[0], (list, tuple)):
        return [values]
    lengths = [len(value) if isinstance(value, (list, tuple)) else 1 for value in values]
    if len(set(lengths)) > 1 or not all(isinstance(value, (list, tuple)) for value in values):
        raise ValueError(f"expected lists of one length, since the first text is a list; got {lengths} entries.")
    return list(zip(*values, strict=True))


class Spread:
    """
    Rows to examples: a row with a list of texts is one example a text, and classes are given by their names.

    Args:
        lists: columns that go together element by element where the first of them has a list.
        features: of the rows, if known.
    """

    def __init__(self, lists: Sequence[str], features: Mapping[str, Any] | None = None):
        self.lists = list(lists)
        parts = {column: getattr(feature, "feature", feature) for column, feature in (features or {}).items()}
        self.names: dict[str, Callable] = {
            column: feature.int2str for column, feature in parts.items() if hasattr(feature, "int2str")
        }

    def __call__(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        row = dict(row) | {column: name(row[column]) for column, name in self.names.items() if row[column] is not None}
        if not self.lists:
            return [row]
        values = aligned(*(row[column] for column in self.lists))
        return [row | dict(zip(self.lists, each, strict=True)) for each in values]

    def batch(self, columns: Mapping[str, list]) -> dict[str, list]:
        """The same for the columns of some rows."""
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        examples = [example for row in rows for example in self(row)]
        return {name: [example[name] for example in examples] for name in columns}


class Examples(torch.utils.data.Dataset):
    """
    Examples by number, each with its `NUMBER`; a row is read when one of its examples is asked for.

    Args:
        rows: of `only_columns`, or a list of such rows.
        spread: what makes examples of a row.
    """

    def __init__(self, rows, spread: Spread):
        self.rows, self.spread = rows, spread
        counts = self._counts(spread.lists[0]) if spread.lists else [1] * len(rows)
        self.places = [(row, place) for row, count in enumerate(counts) for place in range(count)]

    def _counts(self, column: str) -> list[int]:
        """Texts of every row; no other column is read."""
        texts = [row[column] for row in self.rows] if isinstance(self.rows, list) else self.rows[column]
        return [len(text) if isinstance(text, (list, tuple)) else 1 for text in texts]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row, place = self.places[number]
        return self.spread(self.rows[row])[place] | {NUMBER: number}


def stream_examples(rows, spread: Spread, shuffle_buffer_size: int = 0, seed: int = 0):
    """
    The same examples as a stream, in the order of the rows, or each drawn from a buffer of the next ones.

    Args:
        rows: a stream of `only_columns`.
        shuffle_buffer_size: examples in the buffer, undecoded; 0 keeps their order.
    """
    examples = rows.map(spread.batch, batched=True, batch_size=16)
    return examples.shuffle(seed=seed, buffer_size=shuffle_buffer_size) if shuffle_buffer_size else examples
