"""What collecting statistics costs, as multiples of the plain forward pass in the same run.

    OMP_NUM_THREADS=2 python tests/benchmarks/statistics_cost.py [--layers 2] [--batches 6] [--rounds 5]

A BERT-like encoder of base width (768, feed-forward 3072, 12 heads) in float32, 16 texts of 128 tokens a batch. Prints
medians over interleaved rounds, by the clock and in processor time (which other programs disturb less): Grams of all
linear layers, of all but the second layer of the feed-forward block, of a quarter of the tokens, and per-sample squared
gradients beside a forward and backward pass of the batches.
"""

import argparse
import statistics
import time

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_vlmerge.merging import collect_fisher, collect_grams

NARROW = ["*.self.*", "*.attention.output.dense", "*.intermediate.dense"]  # all that read 768 features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=arguments.layers, vocab_size=2000, num_labels=4)
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(2000, (16, 128))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * arguments.batches
    runs = {
        "forward": lambda: plain(model, batches),
        "grams, all layers": lambda: collect_grams(model, batches, progress=False),
        "grams, without fc2": lambda: collect_grams(model, batches, modules=NARROW, progress=False),
        "grams, a quarter of the tokens": lambda: collect_grams(model, batches, sample_tokens=0.25, progress=False),
        "forward and backward": lambda: with_backward(model, batches),
        "fisher, sampled labels": lambda: collect_fisher(model, batches, progress=False),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(arguments.rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    medians = {n: [statistics.median(each) for each in zip(*v[1:], strict=True)] for n, v in times.items()}
    print(f"{arguments.layers} layers, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, (wall, cpu) in medians.items():
        of_wall, of_cpu = wall / medians["forward"][0], cpu / medians["forward"][1]
        print(f"{name:32} {wall:7.3f} s  {of_wall:5.2f} x forward   processor time {of_cpu:5.2f} x")


@torch.no_grad()
def plain(model, batches) -> None:
    for batch in batches:
        model(**batch)


def with_backward(model, batches) -> None:
    for batch in batches:
        model(**batch).logits.log_softmax(-1)[:, 0].sum().backward()
    model.zero_grad()


if __name__ == "__main__":
    main()
