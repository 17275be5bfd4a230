"""Low-rank adapters (LoRA, Hu et al., 2021, arXiv 2106.09685) as peft stores them: adapter_config.json beside
adapter_model.safetensors. Read as data; peft is not needed.

A module's weight W becomes W + scale * B A, with scale = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732).
DoRA (arXiv 2402.09353) then gives each row the norm that it stores.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import MergeError
from . import hub
from .sources import SafetensorsSource, TensorSource, pickle_source, side_files

PREFIX = "base_model.model."
PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B|magnitude_vector)"
)
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base before training
# What else a configuration may hold that makes the update more than W + scale * B A.
UNKNOWN = {
    "target_parameters": "it adapts parameters that are no modules",
    "trainable_token_indices": "it trains single rows of an embedding",
    "layer_replication": "it repeats layers of its base",
    "alora_invocation_tokens": "it is active for some tokens only",
    "use_qalora": "it pools its inputs (QA-LoRA)",
    "use_bdlora": "its factors are block-diagonal",
    "velora_config": "it uses VeLoRA",
    "monteclora_config": "it uses MonteCLoRA",
    "kasa_config": "it uses KaSA",
    "arrow_config": "it routes between adapters",
}


@dataclass(frozen=True)
class LoraModule:
    """The update of one module: keys of its factors in the adapter, and the factor ``scale`` on their product.

    Shapes: linear A (r, in), B (out, r); convolution A (r, in, *kernel), B (out, r, 1, ...); embedding A (r, rows), B
    (width, r).
    """

    name: str
    a: str
    b: str
    rank: int
    scale: float
    embedding: bool = False
    bias: str | None = None  # of B
    magnitude: str | None = None  # DoRA


class Adapter:
    """An adapter: its configuration, its modules by name, and whole tensors that replace those of the base."""

    def __init__(self, config: Mapping[str, Any], tensors: TensorSource, label: str) -> None:
        self.config, self.tensors, self.label = dict(config), tensors, label
        self.revision: str | None = None
        self.side_files: dict[str, Path] = {}
        self.refuse_unknown()
        self.modules, self.replaced = self.parse()

    @property
    def pinned(self) -> str:
        return f"{self.label}@{self.revision}" if self.revision else self.label

    def refuse_unknown(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise MergeError(f"{self.label} is an adapter of type {kind!r}; only LORA can be merged")
        for key, reason in UNKNOWN.items():
            if self.config.get(key):
                raise MergeError(f"{self.label} cannot be merged: {reason} ({key})")
        start = self.config.get("init_lora_weights")
        if start not in HARMLESS_STARTS:
            raise MergeError(
                f"{self.label} started from init_lora_weights={start!r}, which changes its base; save it as a plain "
                "LoRA first (peft: path_initial_model_for_weight_conversion)"
            )

    def parse(self) -> tuple[dict[str, LoraModule], dict[str, str]]:
        parts: dict[str, dict[str, str]] = {}
        replaced: dict[str, str] = {}
        for key in self.tensors:
            name = key.removeprefix(PREFIX)
            found = PART.fullmatch(name.removesuffix(".weight") if "magnitude" in name else name)
            if found:
                parts.setdefault(found["module"], {})[found["part"]] = key
            elif ".lora_" in name:
                raise MergeError(f"{self.label}: {key} is no part of a LoRA that is known here")
            else:
                replaced[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = key
        return {name: self.module(name, found) for name, found in parts.items()}, replaced

    def module(self, name: str, parts: Mapping[str, str]) -> LoraModule:
        embedding = "embedding_A" in parts
        pair = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
        if not all(part in parts for part in pair):
            raise MergeError(f"{self.label}: {name} has only one of the two factors of a LoRA")
        a, b = (parts[part] for part in pair)
        rank, alpha = self.setting("r", "rank_pattern", name), self.setting("lora_alpha", "alpha_pattern", name)
        if not self.tensors.shape(a)[0] == self.tensors.shape(b)[1] == rank:
            found = self.tensors.shape(a)[0], self.tensors.shape(b)[1]
            raise MergeError(f"{self.label}: the factors of {name} have ranks {found}, its configuration says {rank}")
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return LoraModule(name, a, b, rank, scale, embedding, parts.get("B.bias"), parts.get("magnitude_vector"))

    def setting(self, key: str, pattern_key: str, module: str) -> Any:
        """A number that patterns may give for some modules: the first pattern that ends the module's path."""
        for pattern, value in (self.config.get(pattern_key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        if not self.config.get(key):
            raise MergeError(f"{self.label}: adapter_config.json gives no {key}")
        return self.config[key]

    def factors(self, module: LoraModule) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in) in float32 and as matrices; their product has the shape of a linear weight, and of
        an embedding's transpose."""
        a, b = self.tensors[module.a].float(), self.tensors[module.b].float()
        return b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)

    def close(self) -> None:
        self.tensors.close()


def open_adapter(ref: Any) -> Adapter:
    """Open an adapter: a folder, or a Hub id with an optional revision. Raises MergeError where it is none."""
    path = Path(ref).expanduser()
    if path.is_dir():
        return read_adapter(path, path.resolve().name)
    if not hub.is_hub_id(str(ref)):
        raise MergeError(
            f"{str(ref)!r} is neither the folder of an adapter nor a Hub id (org/name or org/name@revision)"
        )
    snapshot = hub.fetch(str(ref), hub.adapter_weights)
    adapter = read_adapter(snapshot.folder, snapshot.repo)
    adapter.revision = snapshot.revision
    files = adapter.tensors.files
    adapter.tensors.files = tuple(f._replace(sha256=snapshot.sha256.get(f.name)) for f in files)
    return adapter


def read_adapter(folder: Path, label: str) -> Adapter:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise MergeError(f"{label} is no adapter: it has no adapter_config.json")
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise MergeError(f"{label}: adapter_config.json is not a JSON object ({error})") from None
    adapter = Adapter(config, adapter_tensors(folder, label), label)
    adapter.side_files = side_files(folder)
    return adapter


def adapter_tensors(folder: Path, label: str) -> TensorSource:
    single, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if single.is_file():
        return SafetensorsSource({single: None}, label)
    if pickled.is_file():
        return pickle_source({pickled: None}, label)
    raise MergeError(f"{label} holds no weights of an adapter (adapter_model.safetensors or adapter_model.bin)")
