"""Record what fusion_bench makes of tiny tensors, in an environment that has it (`pip install fusion_bench==0.2.33`)

    python tests/peer/record_fusion.py tests/golden

Writes `fusion_bench.safetensors`: the inputs (`base/<name>`, `0/<name>` ...; Grams and Fisher values beside them) and
the merged tensors of each algorithm (`<algorithm>/<name>`). Only its functions on state dicts are run, no model.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
from fusion_bench.method.wudi.wudi import wudi_merging
from safetensors.torch import save_file

SHAPES = {"tall.weight": (12, 8), "wide.weight": (7, 15), "square.weight": (9, 9), "bias": (8,)}
MEMBERS = 3


def main(output: Path) -> None:
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    base = {name: draw(*shape) for name, shape in SHAPES.items()}
    tasks = [{name: 0.01 * draw(*shape) for name, shape in SHAPES.items()} for _ in range(MEMBERS)]
    models = [{name: base[name] + task[name] for name in SHAPES} for task in tasks]
    inputs = [{name: draw(40, shape[1]) for name, shape in SHAPES.items() if len(shape) == 2} for _ in range(MEMBERS)]
    grams = [{name: x.T @ x / len(x) for name, x in own.items()} for own in inputs]
    fishers = [{name: 1e-5 * draw(*shape) ** 2 for name, shape in SHAPES.items()} for _ in range(MEMBERS)]
    lists = {name: [model[name] for model in models] for name in SHAPES}
    by_module = [{name.removesuffix(".weight"): g for name, g in own.items()} for own in grams]
    scales = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    copies = lambda: [{name: t.clone() for name, t in task.items()} for task in tasks]  # noqa: E731
    results = {
        "regmean_0.9": merging_with_regmean_weights(lists, by_module, reduce_non_diagonal_ratio=0.9),
        "regmean_1.0": merging_with_regmean_weights(lists, by_module, reduce_non_diagonal_ratio=1.0),
        "fisher": merging_with_fisher_weights(lists, fishers, torch.ones(MEMBERS, dtype=torch.float64) / MEMBERS),
        "fisher_scaled": merging_with_fisher_weights(lists, fishers, scales, normalize_fisher_weight=False),
        "tsv_merge": compute_and_sum_svd_mem_reduction(copies(), accelerator="cpu"),
        "iso_c": iso_c(copies(), accelerator="cpu"),
        "iso_cts": iso_cts(copies(), common_space_fraction=0.8, accelerator="cpu"),
        "iso_cts_0.4": iso_cts(copies(), common_space_fraction=0.4, accelerator="cpu"),
        "wudi_400": wudi_merging(copies(), accelerator="cpu", iter_num=400),  # its default
        "wudi_30000": wudi_merging(copies(), accelerator="cpu", iter_num=30000),
    }
    recorded = {f"base/{name}": t for name, t in base.items()}
    for i in range(MEMBERS):
        recorded |= {f"{i}/{name}": t for name, t in models[i].items()}
        recorded |= {f"{i}/gram.{name}": t for name, t in grams[i].items()}
        recorded |= {f"{i}/fisher.{name}": t for name, t in fishers[i].items()}
    for algorithm, merged in results.items():
        recorded |= {f"{algorithm}/{name}": t.detach().double().contiguous() for name, t in merged.items()}
    output.mkdir(parents=True, exist_ok=True)
    file = output / "fusion_bench.safetensors"
    made_with = f"fusion_bench {version('fusion_bench')}, torch {torch.__version__}"
    save_file(recorded, file, metadata={"made_with": made_with})
    file.chmod(0o644)
    print(f"{file}: {len(recorded)} tensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
