"""A recipe for every method over the same small folders. As a program it merges them all, in as many processes as a
launcher starts: ``python -m tests.merging.every_method INPUTS OUTPUTS``."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_vlmerge.merging import get_merge_method, list_merge_methods, merge
from hf_vlmerge.merging.program import BLOCK

SHAPES = {"layers.0.weight": (96, 130), "layers.1.weight": (70, 1030), "layers.1.bias": (70,), "flat": (2 * BLOCK + 9,)}


def write_inputs(folder: Path) -> None:
    """Members a and b, a base, a frozen tensor, a counter, and statistics of both kinds."""
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b", "base"):
        (folder / name).mkdir(parents=True)
        tensors = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in SHAPES.items()}
        tensors |= {"frozen": torch.ones(300), "steps": torch.tensor(7)}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    rows = {key: torch.randn(200, shape[1], generator=generator) for key, shape in SHAPES.items() if len(shape) == 2}
    statistics = {f"gram.{key}": x.T @ x + torch.eye(x.shape[1]) for key, x in rows.items()}
    fisher = {f"fisher.{key}": torch.rand(shape, generator=generator) for key, shape in SHAPES.items()}
    save_file(statistics | fisher, folder / "statistics.safetensors")


def recipe_for(name: str, folder: Path) -> dict:
    method = get_merge_method(name)
    models = [str(folder / alias) for alias in ("a", "b")][: method.members[1]]
    recipe = {"merge_method": name, "models": models, "seed": 3}
    if method.needs_base or method.takes_base:
        recipe["base_model"] = str(folder / "base")
    if method.statistics:
        recipe["statistics"] = str(folder / "statistics.safetensors")
    return recipe


def main(inputs: Path, outputs: Path) -> None:
    for name in list_merge_methods():
        merge(recipe_for(name, inputs), outputs / name, distributed=True, threads=1, fsync=False, progress=False)
    (outputs / f"ranks-{os.environ.get('RANK', 0)}-of-{os.environ.get('WORLD_SIZE', 1)}").touch()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
