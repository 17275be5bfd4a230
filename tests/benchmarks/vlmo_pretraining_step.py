"""Multiply-adds of a pre-training step at base size, ours against six separate passes.

    python tests/benchmarks/vlmo_pretraining_step.py [--equality]

12 layers, 2 of them fusion layers, 224 px, 40 tokens. Counts forward and backward on the meta device, which needs no
memory. `--equality` also runs both at full size on two rows (about 5 GB, a minute) and prints the largest differences
of losses and gradients in eval mode.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_vlmerge import VlmoConfig, VlmoForPreTraining
from tests.models.vlmo.separate_passes import separate_passes

ARCHITECTURES = {"modality-specific": ["attention", "ffn", "layer_norm"], "modality-agnostic": []}


def training_batch(rows: int, device: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (rows, 40), device=device)
    masked, labels = ids.clone(), torch.full_like(ids, -100)
    masked[:, 2::7], labels[:, 2::7] = 103, ids[:, 2::7]
    shifted = torch.arange(rows, device=device).roll(1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, 224, 224, device=device),
        "mlm_input_ids": masked,
        "labels": labels,
        "negative_image_index": shifted,
        "negative_text_index": shifted,
    }


def reused(model, batch) -> torch.Tensor:
    return model(**batch).loss


def separate(model, batch) -> torch.Tensor:
    return sum(separate_passes(model, batch).values())


def multiply_adds(model, batch, step) -> int:
    with FlopCounterMode(display=False) as counter:
        step(model, batch).backward()
    return counter.get_total_flops() // 2


def count(rows: int = 8) -> None:
    print(f"multiply-adds of one step, {rows} rows, forward and backward")
    for name, expert_modules in ARCHITECTURES.items():
        with torch.device("meta"):
            model = VlmoForPreTraining(VlmoConfig(expert_modules=expert_modules, attn_implementation="eager")).eval()
        batch = training_batch(rows, "meta")
        six, one = multiply_adds(model, batch, separate), multiply_adds(model, batch, reused)
        print(f"  {name:18}  separate {six / 1e9:8.1f} G   reused {one / 1e9:8.1f} G   ratio {six / one:.2f}")


def equality() -> None:
    print("full size in eval mode, two rows: largest absolute difference")
    for name, expert_modules in ARCHITECTURES.items():
        torch.manual_seed(0)
        model = VlmoForPreTraining(VlmoConfig(expert_modules=expert_modules)).eval()
        batch, gradients, losses = training_batch(2, "cpu"), [], []
        for step in (reused, separate):
            model.zero_grad(set_to_none=True)
            loss = step(model, batch)
            loss.backward()
            losses.append(loss.item())
            gradients.append([p.grad for p in model.parameters()])
        worst = max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))
        print(f"  {name:18}  loss {abs(losses[0] - losses[1]):.1e} of {losses[0]:.3f}   gradients {worst:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--equality", action="store_true")
    arguments = parser.parse_args()
    count()
    if arguments.equality:
        equality()
