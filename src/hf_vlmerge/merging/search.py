"""Search over what a recipe may say: grids, soups and an optimiser, with any score as the objective.

The inputs are read once and stay in memory; candidates are merged there, and none is written unless a command has to
evaluate it, in a temporary folder. Soups: Wortsman et al., 2022 (arXiv 2203.05482), section 2 and appendix.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from tqdm import tqdm

from .engine import merge, merge_tensors
from .errors import MergeError, nearest
from .objectives import Command, Objective, number
from .planning import references
from .recipe import Recipe
from .report import MergeReport
from .tensors.sinks import refuse_existing
from .tensors.sources import TensorSource, open_source
from .tensors.views import View
from .variation import changed, starting_point

Optimiser = Literal["nelder-mead", "differential-evolution"]
OPTIMISERS = ("nelder-mead", "differential-evolution")
WORST = 1e30  # what an optimiser sees of a candidate that has no score


@dataclass(frozen=True)
class Trial:
    """One candidate: what was set, and its score; or, without a score, in a sentence why there is none."""

    settings: dict[str, Any]
    recipe: Recipe
    score: float | None
    error: str = ""
    note: str = ""
    seconds: float = 0.0


@dataclass
class SweepReport:
    """All candidates, in the order in which they were tried."""

    kind: str  # "grid", "soups", or the optimiser's name
    varied: list[str]
    minimise: bool = False
    trials: list[Trial] = field(default_factory=list)
    merged: MergeReport | None = None  # of the best candidate, if it was written

    @property
    def ranked(self) -> list[Trial]:
        """Best first; the first tried wins a tie; candidates without a score come last."""
        return sorted(self.trials, key=self.rank)

    def rank(self, trial: Trial) -> tuple[bool, float]:
        """What sorts candidates: less is better."""
        return trial.score is None, 0.0 if trial.score is None else trial.score * (1 if self.minimise else -1)

    @property
    def best(self) -> Trial:
        return self.ranked[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every candidate, best first."""
        rows = [
            {"best": i == 0, "settings": t.settings, "score": t.score, "note": t.note, "error": t.error}
            | {"seconds": round(t.seconds, 3)}
            for i, t in enumerate(self.ranked)
        ]
        return {
            "kind": self.kind,
            "varied": self.varied,
            "better": "lower" if self.minimise else "higher",
            "recipe": self.best.recipe.to_dict(),
            "candidates": rows,
        }

    def table(self) -> str:
        """Candidates best first, with an asterisk at the best."""
        values = {name: [shown(t.settings[name]) for t in self.ranked] for name in self.varied}
        width = {name: max(len(name), *map(len, column)) + 2 for name, column in values.items()}
        lines = ["  " + "".join(f"{name:>{width[name]}}" for name in self.varied) + f"{'score':>14}"]
        for i, t in enumerate(self.ranked):
            cells = "".join(f"{values[name][i]:>{width[name]}}" for name in self.varied)
            score = " " * 14 if t.score is None else f"{t.score:>14.6g}"
            lines.append(f"{'* ' if i == 0 else '  '}{cells}{score}  {t.error or t.note}".rstrip())
        return "\n".join(lines)


def shown(value: Any) -> str:
    if isinstance(value, list):
        return " + ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def sweep(
    recipe: Any,
    objective: Objective | Command,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    greedy: bool = False,
    optimiser: Optimiser | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    budget: int = 40,
    minimise: bool = False,
    seed: int = 0,
    sources: Mapping[str, Any] | None = None,
    output: Path | str | None = None,
    overwrite: bool = False,
    finish: Callable[[Path, MergeReport], None] | None = None,
    progress: bool = True,
) -> SweepReport:
    """Try candidates of a recipe, score each, and merge the best one if asked.

    recipe, sources, finish, overwrite: as for :func:`merge`. objective: gets the merged tensors by name and returns a
    score (:func:`load_into` makes one of a model and a metric), or a :class:`Command`. minimise: lower is better.

    One of three searches. grid: ``{path: values}``, all combinations; a path is ``parameters.scale``,
    ``models.<alias>.<parameter>``, ``rules.<number>.<key>`` or a key of the recipe. greedy: soups of the recipe's
    models: the uniform one, each model alone, then the greedy one, which takes the models from the best on and keeps
    each that does not make the score worse (Recipe 1 of the paper). optimiser: "nelder-mead" from the recipe's own
    values, or "differential-evolution", over ``bounds`` ``{path: (low, high)}``, at most ``budget`` candidates.

    output: a folder for the best candidate. A candidate that fails or scores NaN has no score and says why. Raises
    MergeError for a wrong recipe or path, and when no candidate has a score.
    """
    recipe = Recipe.load(recipe)
    if sum((grid is not None, greedy, optimiser is not None)) != 1 or (bounds is None) == (optimiser is not None):
        raise MergeError("a sweep needs one of: grid, greedy, or optimiser with bounds")
    if budget < 1:
        raise MergeError(f"budget must be positive, not {budget}")
    if output is not None:
        refuse_existing(Path(output).expanduser(), overwrite)  # now, not after the search
    search = Search(recipe, objective, loaded(recipe, sources), minimise, finish)
    if grid is not None:
        search.over_grid(grid, progress)
    elif greedy:
        search.soups(progress)
    else:
        search.optimise(optimiser, bounds, budget, seed, progress)
    report = search.report
    if report.best.score is None:
        raise MergeError(f"no candidate has a score; the first: {report.trials[0].error}")
    if output is not None:
        report.merged = merge(
            report.best.recipe, output, sources=sources, finish=finish, overwrite=overwrite, progress=progress
        )
    return report


class Search:
    """One search: makes candidates of a recipe, scores them, and keeps what came out."""

    def __init__(
        self, recipe: Recipe, objective: Any, given: Mapping[str, TensorSource], minimise: bool, finish: Any
    ) -> None:
        self.recipe, self.objective, self.given, self.minimise, self.finish = recipe, objective, given, minimise, finish
        self.report = SweepReport("", [], minimise)

    def try_out(self, recipe: Recipe, settings: dict[str, Any], note: str = "") -> Trial:
        """Score one candidate. Whatever goes wrong with it becomes a sentence in its row."""
        started, score, error = time.perf_counter(), None, ""
        try:
            score = number(self.score(recipe))
        except Exception as problem:  # a metric may raise anything
            said = " ".join(str(problem).split())
            error = said if isinstance(problem, MergeError) else f"{type(problem).__name__}: {said}"
        trial = Trial(settings, recipe, score, error, note, time.perf_counter() - started)
        self.report.trials.append(trial)
        return trial

    def score(self, recipe: Recipe) -> Any:
        if not isinstance(self.objective, Command):
            return self.objective(merge_tensors(recipe, self.given))
        with tempfile.TemporaryDirectory(prefix="hf_vlmerge-") as temporary:
            folder = Path(temporary) / "candidate"
            merge(recipe, folder, sources=self.given, finish=self.finish, fsync=False, progress=False)
            return self.objective(folder)

    def over_grid(self, grid: Mapping[str, Sequence[Any]], progress: bool) -> None:
        self.report.kind, self.report.varied = "grid", list(grid)
        empty = next((path for path, values in grid.items() if not len(values)), None)
        if empty or not grid:
            raise MergeError(f"{empty}: no values to try" if empty else "the grid varies nothing")
        candidates = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        recipes = [changed(self.recipe, settings) for settings in candidates]  # a wrong path is told before any work
        for recipe, settings in zip(recipes, tqdm(candidates, desc="sweep", disable=not progress), strict=True):
            self.try_out(recipe, settings)

    def soups(self, progress: bool) -> None:
        self.report.kind, self.report.varied = "soups", ["members"]
        aliases = self.recipe.aliases
        if len(aliases) < 2 or self.recipe.merge_method != "linear":
            raise MergeError("a soup is the mean of several models: a recipe with merge_method linear and models")
        if "weights" in self.recipe.parameters or any("weights" in m.parameters for m in self.recipe.models):
            raise MergeError("a soup weighs its models equally: leave out the weights")
        with tqdm(total=2 * len(aliases), desc="sweep", disable=not progress) as bar:
            self.cook(aliases, "uniform soup", bar)
            alone = [self.cook([alias], "alone", bar) for alias in aliases]
            ranked = sorted((t for t in alone if t.score is not None), key=self.report.rank)
            soup = ranked[0] if ranked else None
            for each in ranked[1:]:
                (added,) = each.settings["members"]
                tried = self.cook([*soup.settings["members"], added], f"greedy: with {added}", bar)
                if self.report.rank(tried) <= self.report.rank(soup):
                    soup = tried

    def cook(self, members: Sequence[str], note: str, bar: tqdm) -> Trial:
        """Score the soup of some members; one that was scored before is not scored again."""
        models = tuple(m for m in self.recipe.models if m.alias in members)
        settings = {"members": [m.alias for m in models]}
        known = next((t for t in self.report.trials if t.settings == settings), None)
        bar.update()
        if known is None:
            return self.try_out(replace(self.recipe, models=models), settings, note)
        self.report.trials.append(replace(known, note=note, seconds=0.0))
        return self.report.trials[-1]

    def optimise(
        self, name: str, bounds: Mapping[str, tuple[float, float]], budget: int, seed: int, progress: bool
    ) -> None:
        """Coordinates run over [0, 1] within their bounds; what is tried is rounded to six digits."""
        if name not in OPTIMISERS:
            raise MergeError(f"unknown optimiser {name!r}{nearest(name, OPTIMISERS)}")
        wrong = next((path for path, (low, high) in bounds.items() if not low < high), None)
        if wrong or not bounds:
            raise MergeError(f"{wrong}: the lower bound comes first" if wrong else "no bounds: nothing to optimise")
        self.report.kind, self.report.varied = name, list(bounds)
        start = [starting_point(self.recipe, path, *ends) for path, ends in bounds.items()]
        seen: dict[tuple[float, ...], float] = {}
        with tqdm(total=budget, desc="sweep", disable=not progress) as bar:

            def cost(u: Sequence[float]) -> float:
                values = [
                    float(f"{low + float(x) * (high - low):.6g}")
                    for x, (low, high) in zip(u, bounds.values(), strict=True)
                ]
                if tuple(values) not in seen:
                    if len(seen) == budget:
                        raise Spent
                    settings = dict(zip(bounds, values, strict=True))
                    score = self.try_out(changed(self.recipe, settings), settings).score
                    seen[tuple(values)] = WORST if score is None else score if self.minimise else -score
                    bar.update()
                return seen[tuple(values)]

            changed(self.recipe, dict.fromkeys(bounds, 0.5))  # a wrong path is told before any work
            minimise_by(name, cost, start, seed)


class Spent(Exception):
    """The budget is used up."""


def minimise_by(name: str, cost: Callable[[Sequence[float]], float], start: list[float], seed: int) -> None:
    """Let SciPy look for the minimum in the unit cube until it is content or the budget is spent."""
    from scipy import optimize

    count = len(start)
    try:
        if name == "nelder-mead":
            corners = [
                [x + (0.25 if x <= 0.5 else -0.25) * (i == j) for j, x in enumerate(start)] for i in range(count)
            ]
            options = {"initial_simplex": [start, *corners], "xatol": 1e-3, "fatol": 1e-9, "maxfev": sys.maxsize}
            optimize.minimize(cost, start, method=name, bounds=[(0, 1)] * count, options=options)
        else:
            optimize.differential_evolution(cost, [(0, 1)] * count, rng=seed, x0=start, popsize=5, polish=False)
    except Spent:
        pass


class InMemory(View):
    """A source whose tensors were read into memory."""

    def __init__(self, source: TensorSource) -> None:
        super().__init__(source)
        self.tensors = {key: source.read(key) for key in source}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.tensors[self.require(key)][start:stop]

    def extent(self, key: str) -> None:
        """In no file."""


def loaded(recipe: Recipe, sources: Mapping[str, Any] | None) -> dict[str, TensorSource]:
    """Everything a recipe names, read once: reference -> source in memory."""
    given = sources or {}
    found = {}
    for ref in dict.fromkeys(references(recipe).values()):
        source = open_source(given.get(ref, ref))
        found[ref] = InMemory(source)
        if ref not in given:
            source.close()
    return found
