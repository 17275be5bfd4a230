"""`hf-vlmerge demo`: the main finding of Sung et al. 2023 in minutes, on a CPU, with nothing to download.

Experts that were trained apart from the start cannot be averaged; experts that share a seed phase can.

    (a) modality-agnostic   one set of weights for all modalities, all steps
    (b) modality-specific   experts from the first step on; their average is the naive merge
    (c) seeded              experts made at step `seed_steps` from (a)'s weights; their average is the seeded merge

All settings are in demo.yaml beside this file. (c)'s seed is (a) at that step: same initial weights, scenes and
learning rate, so training it again would give the same numbers.
"""

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_vlmerge.data.memory import PairsInMemory

EXPERT_MODULES = ["attention", "ffn", "layer_norm"]
ARMS = {  # folder -> name in table and plot
    "agnostic": "modality-agnostic",
    "specific": "modality-specific",
    "naive_merge": "naive merge",
    "seeded": "seeded specific",
    "seeded_merge": "seeded merge",
}
MERGES = {"naive_merge": "specific", "seeded_merge": "seeded"}
RESULTS = "results.json"
RECALLS = {"tr_mean": "TR", "ir_mean": "IR", "mean": "both"}  # of texts, of images


def run(*, out: Path, quick: bool, seeds: list[int]) -> None:
    """Train, merge, fine-tune, write and reload; prints its table."""
    # Read when torch loads. Threads that wait by spinning slow a small model twentyfold on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import transformers

    started = time.perf_counter()
    settings = load_settings(quick)
    check_output(out)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as work:
        runs = [run_seed(settings, seed, Path(work) / f"seed_{seed}") for seed in dict.fromkeys(seeds)]
        text = table(runs)
        publish(out, runs, Path(work), settings, text)
    print(f"\n{text}\n")
    print(f"{out}: the seeded merge with its card, recipe, {RESULTS} and plot.png; the runs' models in {out / 'runs'}")
    print(load_back(out))
    print(f"{time.perf_counter() - started:.0f} s in all")


def load_settings(quick: bool) -> dict[str, Any]:
    """demo.yaml, with the changes under `quick` if asked for."""
    import yaml

    settings = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    changes = settings.pop("quick")
    for section, values in changes.items() if quick else ():
        settings[section] |= values
    return settings


def check_output(out: Path) -> None:
    """Only an older demo's folder is replaced."""
    if out.exists() and not (out / RESULTS).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an earlier demo's output; give another folder with --out.")


# ------------------------------------------------------------------------------------------------------------ one seed


@dataclass
class Material:
    """What all arms of a seed share."""

    settings: dict[str, Any]
    seed: int
    processor: Any
    scenes: "PairsInMemory"
    unseen: "PairsInMemory"
    ceiling: float


def run_seed(settings: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """All arms of one seed; their models stay in `folder`."""
    from hf_vlmerge.conversion.seed import specialise_folder

    material = prepare(settings, seed)
    initialise(material, folder / "initial")
    steps, seed_steps = settings["training"]["steps"], settings["training"]["seed_steps"]
    pretrain(material, folder / "initial", folder / "agnostic", 0, save_at=seed_steps)
    (folder / "agnostic" / f"checkpoint-{seed_steps}").rename(folder / "seed")
    for start, arm, first in (("initial", "specific", 0), ("seed", "seeded", seed_steps)):
        specialise_folder(folder / start, folder / f"{arm}_start", EXPERT_MODULES)
        pretrain(material, folder / f"{arm}_start", folder / arm, first)
    for merged, source in MERGES.items():
        merge_folder(material, folder / source, folder / merged)
    return {
        "seed": seed,
        "steps": steps,
        "ceiling": material.ceiling,
        "arms": {arm: measure(material, folder / arm) for arm in ARMS},
        "distances": {merged: distances(folder / source, settings["distances"]) for merged, source in MERGES.items()},
    }


def prepare(settings: dict[str, Any], seed: int) -> Material:
    """Scenes for all steps, drawn once; a tokenizer of their captions' words; the retrieval set."""
    from hf_vlmerge import VlmoImageProcessor, VlmoProcessor
    from hf_vlmerge.data.memory import PairsInMemory
    from hf_vlmerge.data.shapes import ShapesDataset, retrieval_set
    from hf_vlmerge.data.tokenizer import train_wordpiece

    data, length = settings["data"], settings["model"]["max_text_length"]
    common = {"level": data["level"], "image_size": data["image_size"]}
    count = (settings["training"]["steps"] + settings["fine_tuning"]["steps"]) * settings["training"]["batch_size"]
    images, columns = ShapesDataset(count, "train", seed=seed, **common).arrays(progress=True)
    unseen = retrieval_set(data["retrieval_images"], "test", **common)
    tokenizer = train_wordpiece(columns["text"], max_length=length)
    side = {"height": data["image_size"], "width": data["image_size"]}
    return Material(
        settings=settings,
        seed=seed,
        processor=VlmoProcessor(VlmoImageProcessor(size=side), tokenizer, max_text_length=length),
        scenes=PairsInMemory(images, columns["text"], tokenizer, length),
        unseen=PairsInMemory(unseen.images, unseen.texts, tokenizer, length),
        ceiling=unseen.ceiling["mean"],
    )


def initialise(material: Material, folder: Path) -> None:
    """The initial weights that all arms share: a modality-agnostic model, of which every expert becomes a copy."""
    from transformers import set_seed

    from hf_vlmerge import VlmoConfig, VlmoForPreTraining

    set_seed(material.seed)
    config = VlmoConfig(
        **material.settings["model"],
        image_size=material.settings["data"]["image_size"],
        vocab_size=len(material.processor.tokenizer),
        expert_modules=[],
    )
    VlmoForPreTraining(config).save_pretrained(folder)
    material.processor.save_pretrained(folder)


def pretrain(material: Material, start: Path, folder: Path, first: int, save_at: int | None = None) -> None:
    """Steps `first` to the last of the shared schedule, on the scenes of those steps."""
    from hf_vlmerge import VlmoForPreTraining
    from hf_vlmerge.data.collators import VlmoPreTrainingCollator

    settings = material.settings["training"]
    steps, rate, warmup = settings["steps"], settings["learning_rate"], settings["warmup_steps"]
    if first:  # the rest of the same straight line, after a short warm-up of its own
        warmup = settings["new_expert_warmup_steps"]
        rate *= (steps - first - warmup) / (steps - settings["warmup_steps"])
    collator = VlmoPreTrainingCollator(
        material.processor.tokenizer, mask_probability=settings["mask_probability"], seed=material.seed
    )
    saving = {"save_strategy": "steps", "save_steps": save_at, "save_only_model": True} if save_at else {}
    model = VlmoForPreTraining.from_pretrained(start)
    schedule = {"learning_rate": rate, "warmup_steps": warmup, **saving}
    train(material, model, collator, ARMS[folder.name], folder, (first, steps), **schedule)
    model.save_pretrained(folder)
    material.processor.save_pretrained(folder)


def train(material: Material, model, collator, name: str, folder: Path, span: tuple[int, int], **schedule) -> None:
    """One stage over the scenes of steps span[0] to span[1]-1, in order."""
    from torch.utils.data import Subset

    from hf_vlmerge.training.stages import Stage

    batch_size = material.settings["training"]["batch_size"]
    stage = Stage(
        steps=span[1] - span[0],
        batch_size=batch_size,
        learning_rate=schedule.pop("learning_rate"),
        warmup_steps=schedule.pop("warmup_steps"),
        seed=material.seed,
    )
    scenes = Subset(material.scenes, range(span[0] * batch_size, span[1] * batch_size))
    description = f"seed {material.seed}, {name}"
    stage.train(model, scenes, collator, description, folder, train_sampling_strategy="sequential", **schedule)


def merge_folder(material: Material, source: Path, output: Path) -> None:
    """The experts of `source` averaged, by the recipe of demo.yaml."""
    from hf_vlmerge import merge

    recipe = {"experts_of": str(source), **material.settings["merge"]}
    merge(recipe, output, fsync=False, progress=False)


def measure(material: Material, folder: Path) -> dict[str, Any]:
    """Recall before and after fine-tuning, and the size of the checkpoint."""
    from hf_vlmerge import VlmoForImageAndTextRetrieval, VlmoForPreTraining
    from hf_vlmerge.data.collators import VlmoRetrievalCollator

    settings = material.settings["fine_tuning"]
    first = material.settings["training"]["steps"]
    model = VlmoForImageAndTextRetrieval.from_pretrained(folder)
    before = recall(model, material.unseen)
    schedule = {name: settings[name] for name in ("learning_rate", "warmup_steps")}
    collator = VlmoRetrievalCollator(material.processor.tokenizer)
    span = (first, first + settings["steps"])
    train(material, model, collator, f"fine-tuning {ARMS[folder.name]}", folder / "fine_tuned", span, **schedule)
    parameters = VlmoForPreTraining.from_pretrained(folder).num_parameters()
    return {"parameters": parameters, "before": before, "after": recall(model, material.unseen)}


def recall(model, pairs: "PairsInMemory") -> dict[str, float]:
    from hf_vlmerge.data.collators import scaled
    from hf_vlmerge.evaluation.retrieval import evaluate_retrieval

    texts = {name: pairs.columns[name] for name in ("input_ids", "attention_mask")}
    return evaluate_retrieval(model, scaled(pairs.columns["pixel_values"]), texts)


def distances(folder: Path, metrics: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Between the vision and the language experts of a checkpoint, over all their tensors."""
    from hf_vlmerge import distance

    pairs = [("vision", "language")]
    reports = {label: distance(str(folder), pairs=pairs, progress=False, **how) for label, how in metrics.items()}
    return {label: report.total["vision-language"] for label, report in reports.items()}


# ------------------------------------------------------------------------------------------------------------- results


def publish(out: Path, runs: list[dict], work: Path, settings: dict[str, Any], text: str) -> None:
    """Write the first seed's seeded merge into `out`, with everything about it, in one rename."""
    from hf_vlmerge import merge
    from hf_vlmerge.auto import add_remote_code
    from hf_vlmerge.evaluation.plots import plot_merge_comparison
    from hf_vlmerge.hub.card import write_merge_card

    rows, by_merge = summary(runs), mean_distances(runs)
    unwanted = shutil.ignore_patterns(
        "*_start", "fine_tuned", "checkpoint-*", "training_args.bin", "trainer_state.json"
    )

    def finish(folder: Path, report) -> None:
        seeded = {f"{label}, vision-language": value for label, value in by_merge["seeded_merge"].items()}
        own = runs[0]["arms"]["seeded_merge"]["before"]
        recalls = {f"recall, {label}": own[key] for key, label in RECALLS.items()}
        write_merge_card(folder, report, results=rows, scores={"shapes": recalls}, distances=seeded)
        add_remote_code(folder)
        (folder / RESULTS).write_text(json.dumps({"settings": settings, "runs": runs}, indent=2), encoding="utf-8")
        (folder / "table.md").write_text(text + "\n", encoding="utf-8")
        plot_merge_comparison(
            {
                name: tuple(scores(runs, arm, when, "mean") for when in ("before", "after"))
                for arm, name in ARMS.items()
            },
            {merged.split("_")[0]: values for merged, values in by_merge.items()},
            folder / "plot.png",
            chance=chance(settings["data"]["retrieval_images"]),
            ceiling=mean(run["ceiling"] for run in runs),
        )
        for run in runs:
            name = f"seed_{run['seed']}"
            shutil.copytree(work / name, folder / "runs" / name, ignore=unwanted)

    recipe = {"experts_of": str(work / f"seed_{runs[0]['seed']}" / "seeded"), **settings["merge"]}
    merge(recipe, out, overwrite=True, finish=finish, progress=False)


def chance(images: int, ks: tuple[int, ...] = (1, 5, 10)) -> float:
    """Mean recall of a model that knows nothing."""
    return mean(min(1, k / images) for k in ks)


def scores(runs: list[dict], arm: str, when: str, name: str) -> list[float]:
    return [run["arms"][arm][when][name] for run in runs]


def percent(values: list[float]) -> str:
    """`71.3`, or of several runs `71.3 ± 0.8`"""
    values = [100 * value for value in values]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def summary(runs: list[dict]) -> dict[str, dict[str, str]]:
    """One row an arm: recall (mean of R@1, 5, 10) of text and image retrieval and of both."""
    return {
        name: {"parameters": f"{runs[0]['arms'][arm]['parameters']:,}"}
        | {
            f"{when}: {label}": percent(scores(runs, arm, when, key))
            for when in ("before", "after")
            for key, label in RECALLS.items()
        }
        for arm, name in ARMS.items()
    }


def mean_distances(runs: list[dict]) -> dict[str, dict[str, float]]:
    labels = runs[0]["distances"]["seeded_merge"]
    return {
        merged: {label: mean(run["distances"][merged][label] for run in runs) for label in labels} for merged in MERGES
    }


def table(runs: list[dict]) -> str:
    """Results and distances as Markdown."""
    from hf_vlmerge.evaluation.tables import markdown

    rows = summary(runs)
    head = ["arm", *next(iter(rows.values()))]
    body = [[name, *row.values()] for name, row in rows.items()]
    lines = markdown(head, body)
    by_merge = mean_distances(runs)
    far = [
        [ARMS[source], ARMS[merged], *(f"{value:.4g}" for value in by_merge[merged].values())]
        for merged, source in MERGES.items()
    ]
    lines += ["", *markdown(["experts of", "become", *by_merge["seeded_merge"]], far)]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    ceiling = mean(run["ceiling"] for run in runs)
    title = (
        f"Retrieval on unseen scenes before and after fine-tuning, mean of R@1, R@5, R@10 in % (seed {seeds}; "
        f"a model that knows every fact reaches {100 * ceiling:.1f}), and distances of vision and language experts:"
    )
    return "\n".join([title, "", *lines])


def load_back(out: Path) -> str:
    """Load the written folder as a user would, and compare with the class that wrote it."""
    import torch
    from transformers import AutoModel, AutoProcessor

    from hf_vlmerge import VlmoForPreTraining
    from hf_vlmerge.data.shapes import ShapesDataset

    model, info = AutoModel.from_pretrained(out, output_loading_info=True)
    example = ShapesDataset(1, "test")[0]
    inputs = AutoProcessor.from_pretrained(out)(images=example["image"], text=example["text"])
    with torch.inference_mode():
        one = model.eval()(**inputs).last_hidden_state
        other = VlmoForPreTraining.from_pretrained(out).eval().vlmo(**inputs).last_hidden_state
    if info["missing_keys"] or not torch.equal(one, other):
        raise ValueError(f"{out} does not load back as it was written: missing {sorted(info['missing_keys'])}.")
    return (
        f"AutoModel.from_pretrained({str(out)!r}) gives a {type(model).__name__} with the same outputs, nothing missing"
    )
