"""`hf-vlmerge statistics`: the Gram matrices that RegMean needs, collected over a data set."""

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
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    image_column: Annotated[str, typer.Option(help="Column of images, used if it is there.")] = "image",
    text_column: Annotated[str, typer.Option(help="Column of texts, used if it is there.")] = "text",
    samples: Annotated[int, typer.Option(min=1, help="Rows to use, from the start.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a batch.")] = 32,
    modules: Annotated[
        list[str] | None, typer.Option(help="Glob over names of linear layers; may be repeated.")
    ] = None,
    padding: Annotated[str, typer.Option(help="include or exclude the tokens of padding.")] = "include",
    float64: Annotated[bool, typer.Option("--float64", help="Write float64 in place of float32.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print token counts as JSON.")] = False,
):
    """Collect the Grams (sum of x x^T over tokens) of the inputs of a model's linear layers.

    The model's own forward decides which experts see data: a retrieval model runs an image and a text pass, a
    question-answering model a joint pass, a pre-training model all three.

    \b
    Example: hf-vlmerge statistics demo_out/runs/seed_0/seeded grams.safetensors --data shapes
    """
    if padding not in ("include", "exclude"):
        raise typer.BadParameter(f"--padding is {padding!r}; expected include or exclude.")
    import torch

    from hf_vlmerge.merging import collect_grams

    network, processor = load(model)
    rows = open_rows(data, split, samples, image_column, text_column)
    config = network.config
    grams = collect_grams(
        network,
        batches(rows, processor, batch_size),
        modules=modules or "*",
        padding=padding,
        image_tokens=config.grid_size**2 + 1 if hasattr(config, "grid_size") else None,
        metadata={"source": public_name(model), "data": public_name(data)},
    )
    grams.save(out, dtype=torch.float64 if float64 else torch.float32)
    if as_json:
        print(json.dumps({"file": str(out), "samples": grams.samples, "tokens": grams.tokens}, indent=2))
    else:
        print(f"{out}: {len(grams.grams)} Gram matrices from {grams.samples} samples")


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


def open_rows(data: str, split: str, samples: int, image_column: str, text_column: str) -> list[dict]:
    """The first rows as `{"images": Pillow image, "text": string}`, with the keys for which there is a column."""
    if data == "shapes":
        from hf_vlmerge.data.shapes import ShapesDataset

        dataset, image_column, text_column = ShapesDataset(samples), "image", "text"
        rows = [dataset[i] for i in range(samples)]
    else:
        rows = read_rows(data, split, samples)
    columns = {"images": image_column, "text": text_column}
    present = {key: column for key, column in columns.items() if rows and column in rows[0]}
    if not present:
        found = ", ".join(rows[0]) if rows else "no rows"
        raise ValueError(f"{data} has neither a column {image_column!r} nor {text_column!r}; it has: {found}.")
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
    padding = "max_length" if hasattr(processor, "max_text_length") else True
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        inputs = {key: [row[key] for row in part] for key in part[0]}
        options = {"padding": padding, "truncation": True} if "text" in inputs else {}
        yield dict(processor(**inputs, **options, return_tensors="pt"))
