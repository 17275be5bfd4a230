"""Train one small UnIVAL on pictures, clips and sounds at once, and score it beside rules that need no network.

Gives   a folder with model, processor and card, results.json and results.md; prints the table.
Costs   10 minutes on one CPU core with the settings file here.
Run     python training_scripts/train_unival.py training_scripts/settings/unival.yaml DATA runs/unival

DATA is a folder with a folder for each `data` of the settings' tasks, with train.parquet and validation.parquet. Every
step sees media of all data sets, with several texts about each of them. Questions, captions and boxes are all texts, so
there is one loss: the mean over all their tokens. Batches of one kind of media need less padding than mixed ones.
"""

import argparse
import json
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from unival_baselines import baselines, caption_scores, hits
from unival_tasks import Collator, Corpus, Example, Mixture, Sizes, Task
from unival_towers import towers_run_once

from hf_vlmerge.evaluation.classification import clustered_error
from hf_vlmerge.evaluation.tables import markdown
from hf_vlmerge.hub.card import write_model_card
from hf_vlmerge.models.unival.configuration_unival import UnivalConfig
from hf_vlmerge.models.unival.feature_extraction_unival import UnivalFeatureExtractor
from hf_vlmerge.models.unival.image_processing_unival import UnivalImageProcessor
from hf_vlmerge.models.unival.modeling_unival import UnivalForConditionalGeneration
from hf_vlmerge.models.unival.processing_unival import UnivalProcessor
from hf_vlmerge.models.unival.tokenization_unival import MASK_TOKEN, SPECIAL_TOKENS, WORD, build_tokenizer
from hf_vlmerge.training.stages import Stage

MAX_CAPTION_TOKENS = 48
METRICS = {"answers": "accuracy", "captions": "CIDEr-D", "boxes": "Acc@0.5"}
IN_CARD = ("score", "standard_error", "best_baseline", "difference", "difference_error", "examples")


def make_tokenizer(texts, size: int, num_bins: int, max_length: int):
    """Byte-level BPE of the training texts, then the mask and the bins; no image codes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tables = json.loads(bpe.to_str())["model"]
    vocab = tables["vocab"] | {MASK_TOKEN: len(tables["vocab"])}
    merges = [tuple(pair) for pair in tables["merges"]]
    return build_tokenizer(vocab, merges, num_codes=0, num_bins=num_bins, max_length=max_length)


def make_processor(settings: dict, texts) -> UnivalProcessor:
    sizes, side = settings["sizes"], settings["sizes"]["image_size"]
    tokenizer = make_tokenizer(texts, **settings["vocabulary"], max_length=settings["model"]["max_position_embeddings"])
    return UnivalProcessor(
        UnivalImageProcessor(size={"height": side, "width": side}),
        UnivalFeatureExtractor(sampling_rate=sizes["sampling_rate"], num_samples=settings["num_samples"]),
        tokenizer,
        num_frames=sizes["num_frames"],
        frame_size=sizes["frame_size"],
        grounding_size=side,
    )


def train(settings: dict, corpus: Corpus, processor: UnivalProcessor, seed: int) -> UnivalForConditionalGeneration:
    """A model trained on the mixture of all tasks that have texts in a batch."""
    torch.manual_seed(seed)
    config = UnivalConfig(vocab_size=len(processor.tokenizer), **settings["model"])
    model = UnivalForConditionalGeneration(config)
    for kind in config.towers:  # twice as fast on a CPU
        order = torch.channels_last_3d if kind == "video" else torch.channels_last
        model.get_submodule(f"model.encoder.{kind}_tower").to(memory_format=order)
    mixture = Mixture(corpus.train, corpus.tasks, settings["batch"], seed)
    options = dict(settings["training"])
    fields = {name: options.pop(name) for name in list(options) if name in Stage.__dataclass_fields__}
    stage = Stage(**fields, batch_size=1, seed=seed)  # what the mixture yields is a batch
    options["gradient_accumulation_steps"] = len(mixture.kinds)
    options["accelerator_config"] = {"dispatch_batches": False}  # batches hold tensors of different lengths
    collator = Collator(processor, seed)
    with towers_run_once(model):
        losses = stage.train(model, mixture, lambda batches: collator(*batches), "training UnIVAL", **options)
        refresh_batch_norm(model, mixture, Collator(processor, seed, with_targets=False))
    print(f"loss of the last steps: {losses['loss']:.3f}")
    return model.to(memory_format=torch.contiguous_format).eval()


@torch.inference_mode()
def refresh_batch_norm(model: torch.nn.Module, mixture: Mixture, collator: Collator, batches: int = 20) -> None:
    """
    Statistics of the final weights: plain means over some batches of each kind of media in place of running means over
    small batches of a network that changed. Dropout and blanked stripes are off, as they will be.
    """
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    for examples in islice(mixture, batches * len(mixture.kinds)):
        model.get_encoder()(**collator(examples).to(model.device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.inference_mode()
def score(
    model,
    processor: UnivalProcessor,
    task: Task,
    train: list[Example],
    validation: list[Example],
    batch_size: int = 128,
) -> np.ndarray:
    """Right (1) or wrong (0), or CIDEr-D, of every validation example: (examples,)"""
    collator = Collator(processor, with_targets=False)
    starts = range(0, len(validation), batch_size)
    batches = (collator(validation[start : start + batch_size]).to(model.device) for start in starts)
    if task.kind == "answers":
        answers = sorted({example.targets[0] for example in train})
        trie = processor.answer_trie(answers)
        best = [model.score_candidates(batch, trie, rows_per_step=1024).argmax(dim=1) for batch in batches]
        said = [answers[i] for i in torch.cat(best).tolist()]
        return np.array([answer == example.targets[0] for answer, example in zip(said, validation, strict=True)], float)
    if task.kind == "captions":
        sequences = [model.generate(**batch, max_new_tokens=MAX_CAPTION_TOKENS) for batch in batches]
        said = [text.strip() for each in sequences for text in processor.batch_decode(each, skip_special_tokens=True)]
        return caption_scores(said, [example.targets for example in validation])
    first = processor.tokenizer.convert_tokens_to_ids("<bin_0>")
    options = {"token_range": (first, len(processor.tokenizer)), "min_new_tokens": 4, "max_new_tokens": 5}
    sequences = [model.generate(**batch, **options) for batch in batches]
    side = processor.grounding_size
    boxes = [processor.post_process_grounding(each, [(side, side)] * len(each)) for each in sequences]
    return hits(torch.cat(boxes).numpy(), np.array([example.box for example in validation]))


def compare(scores: np.ndarray, rules: dict[str, np.ndarray], groups: list, stated: float | None) -> dict:
    """
    The model beside the best rule, whose error is that of differences on the same examples, and beside the number that
    is stated for other examples. Beaten is what is two standard errors below.
    """
    best = max(rules, key=lambda name: rules[name].mean())
    difference = scores - rules[best]
    margins = [(difference.mean(), clustered_error(difference, groups))]
    margins += [] if stated is None else [(scores.mean() - stated, clustered_error(scores, groups))]
    return {
        "score": float(scores.mean()),
        "standard_error": clustered_error(scores, groups),
        "baselines": {name: float(values.mean()) for name, values in rules.items()},
        "best_baseline": best,
        "stated": stated,
        "beaten": all(margin > 2 * error for margin, error in margins),
        "difference": float(difference.mean()),
        "difference_error": clustered_error(difference, groups),
        "examples": len(scores),
    }


def percent(*values: float, factor: float, digits: int) -> str:
    """A number, or a number and its error."""
    return " ± ".join(f"{factor * each:.{digits}f}" for each in values)


def table(results: dict[str, dict], tasks: dict[str, Task]) -> list[str]:
    """Percent, and CIDEr-D as it is."""
    rows = []
    for name, result in results.items():
        factor, digits = (1, 2) if tasks[name].kind == "captions" else (100, 1)
        number = partial(percent, factor=factor, digits=digits)
        rows.append(
            [
                name.replace("_", " "),
                number(result["score"], result["standard_error"]),
                ", ".join(f"{rule} {number(value)}" for rule, value in result["baselines"].items()),
                number(result["difference"], result["difference_error"]),
                "" if result["stated"] is None else number(result["stated"]),
                "yes" if result["beaten"] else "no",
            ]
        )
    return markdown(["task", "UnIVAL", "without a network", "difference to the best", "stated", "beaten"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="YAML file with model, sizes, training and tasks")
    parser.add_argument("data", type=Path, help="folder with the data sets that the tasks name")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, help="instead of the settings' own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    settings = yaml.safe_load(Path(arguments.settings).read_text())
    settings["training"] |= {"steps": arguments.steps} if arguments.steps else {}
    tasks = {name: Task(**task) for name, task in settings["tasks"].items()}
    corpus = Corpus(arguments.data, tasks, Sizes(**settings["sizes"]))
    processor = make_processor(settings, corpus.texts())
    model = train(settings, corpus, processor, arguments.seed)
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    trained = time.perf_counter()
    results = {}
    for name, task in tasks.items():
        examples = corpus.train[name], corpus.validation[name]
        with towers_run_once(model):
            scores = score(model, processor, task, *examples)
        groups = [example.group for example in examples[1]]
        results[name] = compare(scores, baselines(task, *examples), groups, task.stated)
        print(name, json.dumps(results[name]), flush=True)
    minutes = {"minutes": (time.perf_counter() - started) / 60, "minutes_training": (trained - started) / 60}
    minutes["minutes_of_processors"] = time.process_time() / 60
    text = "\n".join(table(results, tasks))
    (arguments.output / "results.json").write_text(
        json.dumps(minutes | {"settings": settings, "tasks": results}, indent=2)
    )
    (arguments.output / "results.md").write_text(f"{text}\n")
    write_model_card(
        arguments.output,
        results={name: {key: result[key] for key in IN_CARD} for name, result in results.items()},
        scores={name: {METRICS[tasks[name].kind]: result["score"]} for name, result in results.items()},
        data=list(settings["batch"]),
        settings={"seed": arguments.seed} | settings["training"],
        summary="A small UnIVAL, trained from scratch on pictures, clips and sounds at once.",
    )
    print(text)
    print(
        f"{minutes['minutes']:.1f} minutes, {minutes['minutes_training']:.1f} of them until the end of training; "
        f"{minutes['minutes_of_processors']:.1f} of processors"
    )


if __name__ == "__main__":
    main()
