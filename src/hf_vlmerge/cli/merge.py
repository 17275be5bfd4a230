"""`hf-vlmerge merge`: run a recipe."""

import dataclasses
import gc
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def merge(
    recipe: Annotated[Path, typer.Argument(help="Recipe: a YAML file.")],
    out: Annotated[Path | None, typer.Argument(help="Folder to write; not needed with --dry-run.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what applies to each tensor, write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    no_fsync: Annotated[bool, typer.Option("--no-fsync", help="Do not wait for the disk at the end.")] = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Accept NaN and Inf in inputs.")] = False,
    dtype: Annotated[str | None, typer.Option(help="dtype of the output, for example bfloat16.")] = None,
    threads: Annotated[int | None, typer.Option(help="Workers; the number of cores unless told.")] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Limit of working memory, for example 2GB; chunks and workers become fewer.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    device: Annotated[str, typer.Option(help="Where chunks are merged: cpu or cuda.")] = "cpu",
    hash_inputs: Annotated[
        bool, typer.Option("--hash", help="Write the sha256 of every input and output file into the card.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
):
    """Merge what a recipe names, and write a folder that `from_pretrained` loads, with a model card.

    A merge that was stopped goes on where it was when the same command runs again. Under `accelerate launch` or
    `torchrun` the processes share the work.

    \b
    Example: hf-vlmerge merge hub_configs/recipes/interpolation.yaml merged --dry-run
    """
    if out is None and not dry_run:
        raise typer.BadParameter("a folder to write is missing: hf-vlmerge merge RECIPE OUT (or --dry-run).")
    if not recipe.is_file():
        raise FileNotFoundError(f"the recipe {recipe} is not a file.")

    gc.disable()  # torch makes a million objects that stay: nobody looks through them, now or later
    from hf_vlmerge.auto import add_remote_code
    from hf_vlmerge.hub.card import write_merge_card
    from hf_vlmerge.merging import MergeReport, Recipe
    from hf_vlmerge.merging import merge as run

    gc.freeze()
    gc.enable()

    def finish(folder: Path, report: MergeReport) -> None:
        write_merge_card(folder, report, hashes=hash_inputs)
        add_remote_code(folder)

    loaded = Recipe.load(recipe)
    if dtype is not None:
        loaded = dataclasses.replace(loaded, out_dtype=dtype)
    report = run(
        loaded,
        out,
        finish=finish,
        overwrite=overwrite,
        dry_run=dry_run,
        allow_nonfinite=allow_nonfinite,
        fsync=not no_fsync,
        threads=threads,
        processes=True,
        max_memory=max_memory,
        max_shard_size=max_shard_size,
        device=device,
        distributed=True,
        hash_inputs=hash_inputs,
        progress=sys.stderr.isatty(),
    )
    if int(os.environ.get("RANK", 0)):
        return
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, default=str))
        return
    for note in report.notes:
        print(f"note: {note}")
    if dry_run:
        print(report.table())
        return
    if report.resumed:
        print(f"{report.resumed} tensors were finished by an earlier run")
    counts = ", ".join(f"{number} {what}" for what, number in report.counts.items())
    print(
        f"{out}: {report.parameters:,} parameters from {report.input_parameters:,} ({counts}), {report.seconds:.1f} s"
    )
