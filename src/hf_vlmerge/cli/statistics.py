"""`hf-vlmerge statistics`: the Gram matrices that RegMean needs, or the Fisher information, over a data set."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer


def statistics(
    model: Annotated[str, typer.Argument(help="Model: Hub id or folder with its processor.")],
    out: Annotated[Path, typer.Argument(help="safetensors file to write.")],
    data: Annotated[
        str, typer.Option(help="`shapes` (embedded), a Parquet file, or a folder or Hub id of `datasets`.")
    ],
    kind: Annotated[str, typer.Option(help="gram (for RegMean) or fisher (for Fisher merging).")] = "gram",
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    image_column: Annotated[str, typer.Option(help="Column of images, used if it is there.")] = "image",
    text_column: Annotated[str, typer.Option(help="Column of texts, used if it is there.")] = "text",
    samples: Annotated[int, typer.Option(min=1, help="Rows to use, from the start.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a batch.")] = 32,
    modules: Annotated[
        list[str] | None,
        typer.Option(help="Glob over names of linear layers (gram) or of weights (fisher); may be repeated."),
    ] = None,
    padding: Annotated[str, typer.Option(help="gram: include or exclude the tokens of padding.")] = "include",
    sample_tokens: Annotated[
        str | None, typer.Option(help="gram: a share (0.25) or a number (512) of the tokens of each input in a batch.")
    ] = None,
    labels: Annotated[
        str, typer.Option(help="fisher: sampled or expected (by the model's prediction), or data (--label-column).")
    ] = "sampled",
    label_column: Annotated[str | None, typer.Option(help="Column of labels.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is sampled.")] = 0,
    float64: Annotated[bool, typer.Option("--float64", help="Write float64 in place of float32.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
):
    """Collect what a merge needs to know about a model on data, into one file.

    gram: the sum of x x^T over the inputs x of every linear layer. fisher: the sum of squared gradients of the log
    likelihood over samples, for every weight. The model's own forward decides which experts see data: a retrieval model
    runs an image and a text pass, a question-answering model a joint pass, a pre-training model all three.

    \b
    Example: hf-vlmerge statistics demo_out/runs/seed_0/seeded grams.safetensors --data shapes
    """
    check_choice("--kind", kind, ("gram", "fisher"))
    check_choice("--padding", padding, ("include", "exclude"))
    check_choice("--labels", labels, ("sampled", "expected", "data"))
    amount = token_amount(sample_tokens)
    import torch

    from hf_vlmerge.merging import collect_fisher, collect_grams

    network, processor = load(model)
    columns = {"images": image_column, "text": text_column, "labels": label_column}
    rows = open_rows(data, split, samples, columns)
    options = {"metadata": {"source": public_name(model), "data": public_name(data)}, "seed": seed}
    if kind == "gram":
        config = network.config
        options |= {"modules": modules or "*", "padding": padding, "sample_tokens": amount}
        options |= {"image_tokens": config.grid_size**2 + 1 if hasattr(config, "grid_size") else None}
        collected = collect_grams(network, batches(rows, processor, batch_size), **options)
    else:
        options |= {"weights": modules or "*", "labels": labels}
        collected = collect_fisher(network, batches(rows, processor, batch_size), **options)
    collected.save(out, dtype=torch.float64 if float64 else torch.float32)
    if as_json:
        print(json.dumps({"file": str(out), "samples": collected.samples, "tokens": collected.tokens}, indent=2))
    else:
        what = "Gram matrices" if kind == "gram" else "sums of squared gradients"
        print(f"{out}: {len(collected.sums)} {what} from {collected.samples} samples")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise typer.BadParameter(f"{option} is {value!r}; expected {' or '.join(choices)}.")


def token_amount(text: str | None) -> float | int | None:
    """A share or a whole number."""
    try:
        amount = None if text is None else int(text) if text.isdigit() else float(text)
    except ValueError:
        amount = -1.0
    if amount is not None and not (amount >= 1 if isinstance(amount, int) else 0 < amount <= 1):
        raise typer.BadParameter(f"--sample-tokens is {text!r}; expected a share up to 1.0 or a whole number.")
    return amount


def load(model: str):
    """The class that the checkpoint was saved with, so that weight names are those of its files, and its processor."""
    import transformers

    import hf_vlmerge

    config = transformers.AutoConfig.from_pretrained(model)
    name = (config.architectures or [""])[0]
    network = getattr(hf_vlmerge, name, None) or getattr(transformers, name, None)
    if network is None:
        raise ValueError(
            f"the config.json of {model} names the architecture {name!r}, which is not a known model class."
        )
    try:
        processor = transformers.AutoProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"{model} has no processor with its tokenizer beside the weights ({reason}).") from error
    return network.from_pretrained(model), processor


def public_name(reference: str) -> str:
    """A Hub id as it is; of a path its last part only, since statistics may be published."""
    return Path(reference).resolve().name if Path(reference).exists() else reference


def open_rows(data: str, split: str, samples: int, columns: dict[str, str | None]) -> list[dict]:
    """The first rows as `{"images": Pillow image, "text": string, "labels": number}`, with the keys for which there is
    a column."""
    if data == "shapes":
        from hf_vlmerge.data.shapes import ShapesDataset

        dataset = ShapesDataset(samples)
        columns = {**columns, "images": "image", "text": "text"}
        rows = [dataset[i] for i in range(samples)]
    else:
        rows = read_rows(data, split, samples)
    present = {key: column for key, column in columns.items() if rows and column in rows[0]}
    found = ", ".join(rows[0]) if rows else "no rows"
    if not present.keys() - {"labels"}:
        raise ValueError(f"{data} has neither a column {columns['images']!r} nor {columns['text']!r}; it has: {found}.")
    if columns["labels"] and "labels" not in present:
        raise ValueError(f"{data} has no column {columns['labels']!r}; it has: {found}.")
    return [{key: row[column] for key, column in present.items()} for row in rows]


def read_rows(data: str, split: str, samples: int) -> list[dict]:
    """Rows of a Parquet file, or of a folder or Hub id that `datasets` understands."""
    from datasets import load_dataset

    if data.endswith(".parquet"):
        stream = load_dataset("parquet", data_files={split: data}, split=split, streaming=True)
    else:
        stream = load_dataset(data, split=split, streaming=True)
    return list(stream.take(samples))


def batches(rows: list[dict], processor, batch_size: int) -> Iterator[dict]:
    """Model inputs; texts are padded to the processor's length, or else to the longest of the batch."""
    import torch

    padding = "max_length" if hasattr(processor, "max_text_length") else True
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        inputs = {key: [row[key] for row in part] for key in part[0]}
        labels = inputs.pop("labels", None)
        options = {"padding": padding, "truncation": True} if "text" in inputs else {}
        batch = dict(processor(**inputs, **options, return_tensors="pt"))
        yield batch if labels is None else {**batch, "labels": torch.tensor(labels)}
