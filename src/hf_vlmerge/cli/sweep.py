"""`hf-vlmerge sweep`: try variants of a recipe, score each by a command, keep the best."""

import json
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

import typer


def sweep(
    recipe: Annotated[Path, typer.Argument(help="Recipe: a YAML file.")],
    command: Annotated[
        str, typer.Option(help="Evaluation: {folder} is the merged candidate, the last number printed is its score.")
    ],
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="PATH=0:1:0.1 (both ends), PATH=0.2,0.5 or, for an optimiser, PATH=0:1; again for more. A path is "
            "parameters.scale, models.ALIAS.weight, rules.1.parameters.ratio or a key of the recipe."
        ),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Soups: uniform, each model alone, greedy.")] = False,
    optimiser: Annotated[
        str | None, typer.Option(help="nelder-mead or differential-evolution, over the ranges of --vary.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Candidates an optimiser may try.")] = 40,
    minimise: Annotated[bool, typer.Option("--minimise", help="A lower score is better.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of differential-evolution.")] = 0,
    timeout: Annotated[float | None, typer.Option(help="Seconds that one evaluation may take.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the best candidate.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    table: Annotated[Path, typer.Option(help="The table of all candidates, best first.")] = Path("sweep.json"),
    plot: Annotated[Path, typer.Option(help="The plot: a curve, a heat map or bars (PNG, SVG, PDF).")] = Path(
        "sweep.png"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
):
    """Search for the best ratio, weights, scale or density: every candidate is merged from memory and scored.

    A losing candidate stands in a temporary folder only while the command runs.

    \b
    Example: hf-vlmerge sweep recipe.yaml --vary parameters.ratio=0:1:0.25 --command "python eval.py {folder}"
    """
    if not recipe.is_file():
        raise FileNotFoundError(f"the recipe {recipe} is not a file.")
    chosen = search_of(vary or [], greedy, optimiser)

    from hf_vlmerge.auto import add_remote_code
    from hf_vlmerge.evaluation.sweep_plot import plot_sweep
    from hf_vlmerge.hub.card import write_merge_card
    from hf_vlmerge.merging.objectives import Command
    from hf_vlmerge.merging.search import sweep as run

    def finish(folder: Path, report: Any) -> None:
        write_merge_card(folder, report)
        add_remote_code(folder)

    report = run(
        recipe,
        Command(command, timeout),
        **chosen,
        budget=budget,
        minimise=minimise,
        seed=seed,
        output=out,
        overwrite=overwrite,
        finish=finish,
    )
    for path in (table, plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.to_dict(), indent=2, default=str)
    table.write_text(text + "\n", encoding="utf-8")
    plot_sweep(report, plot)
    print(text if as_json else report.table())


def search_of(vary: list[str], greedy: bool, optimiser: str | None) -> dict[str, Any]:
    """The search that the options describe, as keywords of the library's function."""
    values = [each.partition("=") for each in vary]
    wrong = next((each for each, (_, equals, right) in zip(vary, values, strict=True) if not equals or not right), None)
    if wrong is not None:
        raise typer.BadParameter(f"--vary takes PATH=VALUES, such as parameters.scale=0:1:0.1, not {wrong!r}.")
    if greedy + bool(vary) != 1 or (optimiser and greedy):
        raise typer.BadParameter("a sweep needs --vary (at least once) or --greedy, not both.")
    if greedy:
        return {"greedy": True}
    if optimiser is None:
        return {"grid": {path: numbers(text) for path, _, text in values}}
    return {"optimiser": optimiser, "bounds": {path: ends(text) for path, _, text in values}}


def numbers(text: str) -> list[Any]:
    """0:1:0.25 with both ends, or values between commas."""
    parts = text.split(":")
    if len(parts) == 1:
        return [plain(part) for part in text.split(",")]
    try:
        start, stop, step = (Decimal(part) for part in parts)
        count = int((stop - start) / step)
    except (ValueError, ArithmeticError, InvalidOperation):
        count = -1
    if count < 0:
        raise typer.BadParameter(f"a range reads start:stop:step, as 0:1:0.1, not {text!r}.")
    return [plain(str(start + i * step)) for i in range(count + 1)]


def ends(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise typer.BadParameter(f"for an optimiser a range reads low:high, as 0:1, not {text!r}.") from None
    return low, high


def plain(text: str) -> Any:
    """A number, true or false, or the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)
