"""Does seed pre-training make experts mergeable? The comparison of Sung et al. 2023 on a small data set.

Gives   five models in OUTPUT (modality-agnostic, modality-specific from scratch and its merge, modality-specific from a
        seed and its merge), their scores before and after fine-tuning, the distances between the experts of both
        modality-specific models; results.json, results.md, and plot.png where retrieval is a task.
Costs   under 40 minutes on two CPU cores with the settings files here.
Run     python training_scripts/compare_merges.py training_scripts/settings/emoji_captions.yaml DATA runs/emoji

All models share initialisation, data order, learning rate and the total number of steps.
"""

import argparse
import json
import time
from pathlib import Path

import yaml
from finetune_vlmo import finetune, measure_retrieval
from pretrain_vlmo import ALL_EXPERTS, Experiment, pretrain

from hf_vlmerge.evaluation.plots import plot_merge_comparison
from hf_vlmerge.evaluation.tables import markdown
from hf_vlmerge.hub.card import write_merge_card
from hf_vlmerge.merging import distance, merge
from hf_vlmerge.models.vlmo.modeling_vlmo import VlmoForImageAndTextRetrieval, VlmoForPreTraining

METRICS = ("l2", "cosine", "ssd", "tssd")
MERGES = {"naive_merge": "specific", "seeded_merge": "seeded_specific"}
NAMES = {
    "agnostic": "modality-agnostic",
    "specific": "modality-specific, from scratch",
    "naive_merge": "its merge (naive)",
    "seeded_specific": "modality-specific, from the seed",
    "seeded_merge": "its merge (seeded)",
}


def train_arms(experiment: Experiment, output: Path, seed: int) -> None:
    """Writes the three models that are trained; an arm whose folder exists is left as it is."""
    settings = experiment.settings["pretraining"]
    steps, seed_steps = settings["steps"], settings["seed_steps"]

    def arm(name: str, experts: list[str], steps: int, start=None) -> None:
        if (output / name).exists():
            return
        title = f"pre-training {name}: {steps} steps"
        model = pretrain(experiment, experts, steps, seed, start, title)
        model.save_pretrained(output / name)
        experiment.processor.save_pretrained(output / name)

    arm("agnostic", [], steps)
    arm("specific", ALL_EXPERTS, steps)
    arm("seed", [], seed_steps)
    start = VlmoForPreTraining.from_pretrained(output / "seed").state_dict()
    arm("seeded_specific", ALL_EXPERTS, steps - seed_steps, start)


def merge_arms(experiment: Experiment, output: Path) -> dict[str, dict[str, float]]:
    """Merges both modality-specific models by the settings' recipe; distances of their experts by arm and metric."""
    distances = {}
    for merged, arm in MERGES.items():
        recipe = {"experts_of": str(output / arm), **experiment.settings["merge"]}
        distances[merged] = {
            metric: distance(str(output / arm), metric=metric, pairs="all", progress=False).total for metric in METRICS
        }
        merge(recipe, output / merged, finish=write_merge_card, overwrite=True)
    return distances


def table(results: dict) -> str:
    """Scores of every model, in percent; distances of the experts that were merged."""
    columns = list(next(iter(results["scores"].values())))
    rows = [[NAMES[arm], *(scores[column] for column in columns)] for arm, scores in results["scores"].items()]
    far = [
        [NAMES[MERGES[merged]], NAMES[merged], *(f"{values[metric]['vision-language']:.3g}" for metric in METRICS)]
        for merged, values in results["distances"].items()
    ]
    distances = markdown(["experts of", "become", *METRICS], far)
    return "\n".join([*markdown(["model", *columns], rows), "", *distances])


def draw(results: dict, path: Path) -> None:
    """Bars of retrieval before and after fine-tuning, and the distances."""
    arms = {
        arm: tuple([raw[f"retrieval, {when}"]["mean"]] for when in ("before", "fine-tuned"))
        for arm, raw in ((arm.replace("_", " "), results["raw"][arm]) for arm in NAMES)
    }
    distances = {
        merged.split("_")[0]: {metric: values[metric]["vision-language"] for metric in METRICS}
        for merged, values in results["distances"].items()
    }
    plot_merge_comparison(arms, distances, path)


def shown(scores: dict[str, float]) -> str:
    if "accuracy" in scores:
        return f"{100 * scores['accuracy']:.1f} ± {100 * scores['standard_error']:.1f}"
    names = {"mean": "mean", "tr_r1": "TR@1", "ir_r1": "IR@1", "all_r1": "TR@1 of all"}
    return ", ".join(f"{label} {100 * scores[name]:.1f}" for name, label in names.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="YAML file with model, stages, merge and tasks")
    parser.add_argument("data", help="folder with train.parquet and validation.parquet, or the id of a data set")
    parser.add_argument("output", type=Path, help="folder for models and results")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started, experiment = time.perf_counter(), Experiment.load(arguments.settings, arguments.data)
    arguments.output.mkdir(parents=True, exist_ok=True)

    train_arms(experiment, arguments.output, arguments.seed)
    distances = merge_arms(experiment, arguments.output)
    results = {"settings": experiment.settings, "distances": distances, "raw": {}, "scores": {}}
    text_column = experiment.settings["pretraining"]["text_column"]
    for arm in NAMES:
        folder = arguments.output / arm
        model = VlmoForImageAndTextRetrieval.from_pretrained(folder)
        raw = {"retrieval, before": measure_retrieval(experiment, model, text_column)}
        for task in experiment.settings["tasks"]:
            raw[f"{task}, fine-tuned"] = finetune(experiment, folder, task, arguments.seed)[1]
        results["raw"][arm] = raw
        results["scores"][arm] = {name: shown(scores) for name, scores in raw.items()}
        print(yaml.safe_dump({arm: results["scores"][arm]}), flush=True)
    results["minutes"] = (time.perf_counter() - started) / 60
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2))
    text = table(results)
    (arguments.output / "results.md").write_text(f"{text}\n")
    if "retrieval" in experiment.settings["tasks"]:
        draw(results, arguments.output / "plot.png")
    print(text)
    print(f"{results['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
