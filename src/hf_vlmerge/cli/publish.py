"""`hf-vlmerge publish` and `hf-vlmerge card`: a finished model to the Hub, and its card."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer


def publish(
    what: Annotated[Path, typer.Argument(help="Folder with model and card, or a YAML as in hub_configs/publish.")],
    repo_id: Annotated[str | None, typer.Argument(help="owner/name on the Hub; a YAML names it itself.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Who may see a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to write; main unless told.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The recipe that was run: its local inputs are hashed.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print, ask and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
):
    """Upload a model with its card in one commit, after checks; hashes of inputs and weights go into the card.

    \b
    Example: hf-vlmerge publish hub_configs/publish/unival_average.yaml --dry-run
    """
    given = {"private": private, "revision": revision, "message": message}
    if what.suffix in (".yaml", ".yml"):
        if repo_id is not None or recipe is not None:
            raise typer.BadParameter(f"{what.name} names repository and recipe itself: leave both out.")
        from hf_vlmerge.hub.publication import Publication

        changes = {name: value for name, value in given.items() if value is not None}
        done = dataclasses.replace(Publication.load(what), **changes).publish(dry_run=dry_run)
    else:
        if repo_id is None:
            raise typer.BadParameter("a repository is missing: hf-vlmerge publish FOLDER owner/name.")
        from hf_vlmerge.hub.publish import publish as run

        done = run(what, repo_id, recipe=recipe, dry_run=dry_run, **given)
    print(json.dumps(done.to_dict(), indent=2) if as_json else text(done, dry_run))


def text(done, dry_run: bool) -> str:
    """What was done, for people."""
    lines = [f"note: {note}" for note in done.notes]
    if dry_run:
        lines += [f"{size:>14,}  {name}" for name, size in done.files.items()]
        return "\n".join([*lines, f"{done.repo_id}: nothing was uploaded (dry run)"])
    what = f"{len(done.files)} files in one commit" if done.changed else "everything is there already"
    return "\n".join([*lines, f"{done.repo_id}: {what}, {done.url}/tree/{done.commit}"])


def card(
    folder: Annotated[Path, typer.Argument(help="Folder with a trained or converted model.")],
    results: Annotated[Path | None, typer.Option(help="JSON of {row: {column: value}}.")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="JSON of {data set: {metric: value}} of this model, for the Hub's metadata.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="What it was trained on; give it again for more.")] = None,
    license: Annotated[str | None, typer.Option(help="Id of the licence, as apache-2.0.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the card that is there.")] = False,
):
    """Write the card of a trained or converted model, with what its files tell. (A merge has its own already.)

    \b
    Example: hf-vlmerge card unival-vqa --data VQAv2 --license apache-2.0
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.name!r}.")
    if (folder / "README.md").exists() and not overwrite:
        raise FileExistsError(f"{folder.name} has a README.md; say --overwrite to replace it.")

    from hf_vlmerge.cli.convert import read_fields
    from hf_vlmerge.hub.card import write_model_card

    tables = {"results": read_fields(results), "scores": read_fields(scores)}
    print(write_model_card(folder, **tables, data=data or [], license=license))
