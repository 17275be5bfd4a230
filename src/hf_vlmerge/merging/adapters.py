"""Merging LoRA adapters into one adapter, without their base.

The update of adapter i is s_i B_i A_i. A weighted sum of updates is again a product of two factors, by concatenation:
[c_1 s_1 B_1 ... c_n s_n B_n] [A_1; ...; A_n], which is exact and has the sum of the ranks. The best update of a lower
rank is its truncated singular value decomposition; through QR of the two factors it costs O(d (sum r)^2), and W is
never formed. Averaging A and B separately is offered nowhere: the mean of products is not the product of means.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import MergeError
from .groups import Settler, applies
from .program import single_thread
from .recipe import Recipe
from .registry import get_merge_method
from .report import MergeReport, TensorReport, published
from .tensors.dtypes import dtype_name, parse_dtype
from .tensors.hub import is_hub_id
from .tensors.lora import PREFIX, Adapter, LoraModule, open_adapter
from .tensors.sinks import atomic_folder, copy_side_files, write_json

# What a merged adapter no longer has: how it was trained, and settings that its own factors contain.
TRAINING = ("auto_mapping", "init_lora_weights", "lora_dropout", "eva_config", "corda_config", "lora_ga_config")


@dataclass
class MergedAdapter:
    """One adapter made of several: tensors and configuration as peft stores them. ``errors``: by module, the relative
    Frobenius error that truncation makes (0 for concatenation); ``error``: that of all modules together."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    weights: dict[str, tuple[float, ...]]  # module -> coefficients in member order
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0


def merge_adapters(
    recipe: Any,
    output: Path | str | None,
    *,
    sources: Mapping[str, Any] | None = None,
    finish: Callable[[Path, MergeReport], None] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    fsync: bool = True,
    distributed: bool = False,
    hash_inputs: bool = False,
) -> MergeReport:
    """Merge adapters as a recipe with the key ``adapters`` says, and write an adapter folder that peft loads.

    The arguments are those of :func:`merge`; of several processes the first writes. Tensors are float32 unless the
    recipe gives a dtype: adapters are small, and concatenation stays exact. Raises MergeError where the sum is not
    defined: other bases, other modules, DoRA.
    """
    started = time.perf_counter()
    recipe = Recipe.load(recipe)
    with opened(recipe, sources) as adapters, single_thread():
        merged = merged_adapter(recipe, adapters)
        report = described(recipe, adapters, merged, hash_inputs)
        if dry_run or (distributed and os.environ.get("RANK", "0") != "0"):
            return report
        if output is None:
            raise MergeError("an output folder is needed")
        with atomic_folder(output, overwrite=overwrite, fsync=fsync) as folder:
            write_adapter(folder, merged, report, carried(recipe, adapters))
            report.output, report.seconds = Path(output), time.perf_counter() - started
            if finish is not None:
                finish(folder, report)
    return report


def merge_adapter_tensors(recipe: Any, sources: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The same merge in memory: the tensors of the merged adapter by name."""
    recipe = Recipe.load(recipe)
    with opened(recipe, sources) as adapters, single_thread():
        return merged_adapter(recipe, adapters).tensors


@contextmanager
def opened(recipe: Recipe, given: Mapping[str, Any] | None) -> Iterator[dict[str, Adapter]]:
    """The adapters by alias. ``given`` replaces references by adapters that are open."""
    with ExitStack() as stack:
        adapters = {}
        for member in recipe.models:
            own = (given or {}).get(member.model)
            adapters[member.alias] = own if isinstance(own, Adapter) else open_adapter(own or member.model)
            stack.callback(adapters[member.alias].close)
        yield adapters


def merged_adapter(recipe: Recipe, adapters: Mapping[str, Adapter]) -> MergedAdapter:
    """The weighted sum of the adapters' updates, module by module."""
    check_bases(adapters)
    names = common_modules(adapters, recipe.adapters.missing)
    weights = coefficients(recipe, names)
    dtype = parse_dtype(recipe.out_dtype or recipe.dtype or "float32")
    tensors: dict[str, Tensor] = {}
    ranks, errors, lost, total = {}, {}, 0.0, 0.0
    for name in names:
        pairs = zip(adapters.values(), weights[name], strict=True)
        parts = [(a.modules[name], a, c) for a, c in pairs if name in a.modules]
        model = check_alike(name, parts)
        left, right = concatenated(parts)
        if recipe.adapters.form == "svd":
            left, right, left_out, norm = truncated(left, right, recipe.adapters.rank)
            errors[name] = (left_out / norm) ** 0.5 if norm else 0.0
            lost, total = lost + left_out, total + norm
        ranks[name] = right.shape[0]
        a, b = shaped(left, right, model, parts[0][1])
        tensors[model.a], tensors[model.b] = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    tensors |= whole_tensors(recipe, adapters, dtype)
    error = (lost / total) ** 0.5 if total else 0.0
    return MergedAdapter(tensors, merged_config(adapters, ranks), weights, errors, error)


def check_bases(adapters: Mapping[str, Adapter]) -> None:
    """Updates can be added only where they update the same weights, and add up only where they are plain products."""
    first, *others = adapters.items()
    base = lambda adapter: adapter.config.get("base_model_name_or_path")  # noqa: E731
    for alias, adapter in others:
        if base(adapter) and base(first[1]) and same_name(base(adapter)) != same_name(base(first[1])):
            mine, theirs = same_name(base(first[1])), same_name(base(adapter))
            raise MergeError(f"the adapters have different bases: {first[0]!r} {mine!r} and {alias!r} {theirs!r}")
    for alias, adapter in adapters.items():
        dora = next((m.name for m in adapter.modules.values() if m.magnitude), None)
        if dora:
            raise MergeError(
                f"{alias!r} is a DoRA adapter ({dora}): its update depends on the base's norms, so there is no sum of "
                "such adapters; merge them as 'base+adapter' into a full model instead"
            )
        bias = next((m.name for m in adapter.modules.values() if m.bias), None)
        if bias:
            raise MergeError(f"{alias!r} adds to the bias of {bias} (lora_bias), which a merged adapter cannot hold")


def same_name(base: str) -> str:
    """A Hub id as it is, a path by its last part."""
    return base if is_hub_id(base) and not Path(base).is_absolute() else Path(base).name


def common_modules(adapters: Mapping[str, Adapter], missing: str) -> list[str]:
    names = dict.fromkeys(name for adapter in adapters.values() for name in adapter.modules)
    for alias, adapter in adapters.items():
        absent = [name for name in names if name not in adapter.modules]
        if absent and missing == "refuse":
            raise MergeError(
                f"{alias!r} does not adapt {absent[0]}, which others do; if that means no update there, say "
                "'adapters: {form: ..., missing: zero}'"
            )
    if not names:
        raise MergeError("the adapters have no low-rank modules")
    return list(names)


def coefficients(recipe: Recipe, names: list[str]) -> dict[str, tuple[float, ...]]:
    """Each module's factor on each adapter's update: w_i / sum w for linear, scale * w_i for task arithmetic."""
    for number, rule in enumerate(recipe.rules, 1):
        if rule.keep or rule.members or rule.has or rule.method:
            raise MergeError(f"rule {number}: of rules for adapters only match and parameters are understood")
    settler = Settler({}, recipe, recipe.aliases, [f"{name}.weight" for name in names])
    method, found = get_merge_method(recipe.merge_method), {}
    for name in names:
        rules = [rule for rule in recipe.rules if applies(rule, f"{name}.weight", recipe.aliases)]
        parameters, weights = settler.parameters(method, f"{name}.weight", recipe.aliases, rules)
        whole = sum(weights) if parameters["normalize"] else 1.0
        if whole == 0:
            raise MergeError(f"{name}: the weights add up to 0, so their mean is not defined")
        found[name] = tuple(parameters.get("scale", 1.0) * w / whole for w in weights)
    return found


Part = tuple[LoraModule, Adapter, float]


def check_alike(name: str, parts: list[Part]) -> LoraModule:
    """All adapters update a tensor of the same shape in the same manner."""
    first, adapter, _ = parts[0]
    for module, other, _ in parts[1:]:
        if signature(module, other) != signature(first, adapter):
            raise MergeError(f"{name}: {adapter.label} and {other.label} adapt tensors of different shapes")
    return first


def signature(module: LoraModule, owner: Adapter) -> tuple:
    a, b = owner.tensors.shape(module.a), owner.tensors.shape(module.b)
    return module.embedding, a[1:], b[:1], bool(owner.config.get("fan_in_fan_out"))


def concatenated(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Factors of the sum: (out, sum r) and (sum r, in), in float64; scale and coefficient are in the first."""
    pairs = [(module.scale * c, *owner.factors(module)) for module, owner, c in parts]
    return torch.cat([s * b.double() for s, b, _ in pairs], 1), torch.cat([a.double() for _, _, a in pairs], 0)


def truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best factors of rank ``rank`` (Eckart and Young, 1936); also the squared norms of what is lost and of all."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.t())
    u, s, v = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    root = s[:rank].sqrt()
    first, second = (q_left @ u[:, :rank]) * root, (root[:, None] * v[:rank]) @ q_right.t()
    return first, second, float((s[rank:] ** 2).sum()), float((s**2).sum())


def shaped(left: Tensor, right: Tensor, module: LoraModule, owner: Adapter) -> tuple[Tensor, Tensor]:
    """Factors as peft stores them for this kind of module: A, then B."""
    a, b = owner.tensors.shape(module.a), owner.tensors.shape(module.b)
    return right.reshape(right.shape[0], *a[1:]), left.reshape(b[0], left.shape[1], *b[2:])


def whole_tensors(recipe: Recipe, adapters: Mapping[str, Adapter], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors that adapters hold whole (modules_to_save, biases): equal ones are carried, others averaged where the
    merge is a mean. They are values, not updates, so any other sum of them is not defined."""
    result = {}
    for name in dict.fromkeys(name for adapter in adapters.values() for name in adapter.replaced):
        owners = [a for a in adapters.values() if name in a.replaced]
        if len(owners) < len(adapters):
            lacking = next(alias for alias, a in adapters.items() if name not in a.replaced)
            raise MergeError(f"{lacking!r} does not hold the whole tensor {name}, which others do")
        values = [a.tensors[a.replaced[name]] for a in owners]
        if any(v.shape != values[0].shape for v in values):
            raise MergeError(f"{name}: the adapters hold it in different shapes")
        if not all(v.equal(values[0]) for v in values):
            weights = coefficients(recipe, [name.removesuffix(".weight")])[name.removesuffix(".weight")]
            if abs(sum(weights) - 1) > 1e-6:
                raise MergeError(
                    f"{name} is held whole by the adapters and differs; without the base only a mean of it is defined, "
                    "and the weights do not add up to 1"
                )
            values = [sum(w * v.double() for w, v in zip(weights, values, strict=True))]
        result[owners[0].replaced[name]] = values[0].to(dtype if values[0].is_floating_point() else values[0].dtype)
    return result


def merged_config(adapters: Mapping[str, Adapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json whose scaling is 1 everywhere: lora_alpha = r, and patterns where ranks differ."""
    first = next(iter(adapters.values()))
    config = {key: value for key, value in first.config.items() if key not in TRAINING}
    common = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != common}
    base = config.get("base_model_name_or_path")
    public = base and is_hub_id(base) and not Path(base).expanduser().exists()
    kept = {"base_model_name_or_path": base, "revision": config.get("revision")} if public else {}
    targets = [a.config.get("target_modules") for a in adapters.values()]
    same = all(as_comparable(t) == as_comparable(targets[0]) for t in targets)
    return config | {
        "base_model_name_or_path": None,
        "revision": None,
        **kept,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": {re.escape(name): rank for name, rank in other.items()},
        "alpha_pattern": {re.escape(name): rank for name, rank in other.items()},
        "use_rslora": False,
        "target_modules": targets[0] if same else sorted(ranks),
    }


def as_comparable(targets: Any) -> Any:
    return sorted(targets) if isinstance(targets, list) else targets


def carried(recipe: Recipe, adapters: Mapping[str, Adapter]) -> Adapter:
    """Whose tokenizer and other files go along."""
    alias = recipe.files_from or recipe.aliases[0]
    alias = next((m.alias for m in recipe.models if m.model == alias), alias)
    if alias not in adapters:
        raise MergeError(f"files_from: {recipe.files_from!r} is no member")
    return adapters[alias]


def write_adapter(folder: Path, merged: MergedAdapter, report: MergeReport, files: Adapter) -> None:
    from safetensors.torch import save_file

    own = ("adapter_config.json", "recipe.yaml")
    copy_side_files(folder, {name: path for name, path in files.side_files.items() if name not in own})
    save_file(merged.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", json.loads(json.dumps(merged.config)))
    (folder / "recipe.yaml").write_text(report.recipe.to_yaml(), encoding="utf-8")
    report.bytes_written = sum(t.nbytes for t in merged.tensors.values())


def described(recipe: Recipe, adapters: Mapping[str, Adapter], merged: MergedAdapter, hash_inputs: bool) -> MergeReport:
    public = {m.model: adapters[m.alias].pinned for m in recipe.models}
    parameters = recipe.adapters.to_dict()
    names = {key: key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in merged.tensors}
    return MergeReport(
        recipe=recipe.map_sources(public.__getitem__),
        tensors=[
            TensorReport(
                output=key,
                shape=tuple(t.shape),
                dtype=dtype_name(t.dtype),
                method=recipe.merge_method,
                members=tuple(adapters),
                parameters=parameters,
                weights=merged.weights.get(names[key], ()),
                rules=(),
                note="" if names[key] in merged.weights else "held whole by the adapters",
            )
            for key, t in merged.tensors.items()
        ],
        sources=[
            {
                "role": alias,
                "label": a.label,
                "revision": a.revision,
                "files": [published(f, hash_inputs) for f in a.tensors.files],
            }
            for alias, a in adapters.items()
        ],
        notes=[*recipe.notes, *observations(recipe, merged)],
        input_parameters=sum(a.tensors.numel(k) for a in adapters.values() for k in a.tensors),
    )


def observations(recipe: Recipe, merged: MergedAdapter) -> list[str]:
    ranks = f"the result has rank {merged.config['r']}" + (" at most" if merged.config["rank_pattern"] else "")
    if recipe.adapters.form == "concatenation":
        return [f"{ranks}; concatenation is exact"]
    worst = max(merged.errors, key=merged.errors.__getitem__)
    return [
        f"{ranks}; cutting to it loses {merged.error:.3g} of the norm of the whole update, and at most "
        f"{merged.errors[worst]:.3g} in one module ({worst})"
    ]
