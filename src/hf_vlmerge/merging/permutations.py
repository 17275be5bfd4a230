"""Which units of a transformer may be renumbered without changing what it computes: tables by name, walked by code.

A unit is a hidden unit of an FFN, an attention head, a query-key or value-output dimension within a head, or an entry
of the residual stream. Renumbering it moves the same index along some axes of some tensors. The tables say which, for
the names of modules that files hold; no table knows a model class. What no table describes stays as it is: a tensor
beside the listed ones that seems to depend on the units keeps the whole block from moving.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

from .errors import MergeError
from .tensors.sources import TensorSource
from .weights import layer_of

# Where a unit lies in a tensor: the axis, or (axis, part, parts) where several stand one after the other on it.
Place = int | tuple[int, int, int]
Places = Mapping[str, Place]  # name within the module -> place; biases may be absent

# Hidden units of feed-forward networks. The first name is what the module is found by; weights must be there.
FFN: tuple[Places, ...] = (
    {"fc1.weight": 0, "fc2.weight": 1, "fc1.bias": 0},  # VLMo, CLIP, SigLIP, BART, Whisper, DINOv2
    {"intermediate.dense.weight": 0, "output.dense.weight": 1, "intermediate.dense.bias": 0},  # BERT, ViT, BEiT
    {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1, "gate_proj.bias": 0, "up_proj.bias": 0},
    {"wi.weight": 0, "wo.weight": 1},  # T5
    {"wi_0.weight": 0, "wi_1.weight": 0, "wo.weight": 1},  # T5 1.1
    {"lin1.weight": 0, "lin2.weight": 1, "lin1.bias": 0},  # DistilBERT
    {"intermediate_dense.weight": 0, "output_dense.weight": 1, "intermediate_dense.bias": 0},  # Wav2Vec2
    {"c_fc.weight": 1, "c_proj.weight": 0, "c_fc.bias": 0},  # GPT-2, whose weights are stored as (in, out)
)
# Tensors of an FFN's module that have nothing to do with its hidden units, whatever their size.
FFN_FIXED = ("attention.*", "crossattention.*", "output.dense.bias", "output.LayerNorm.*", "fc2.bias", "down_proj.bias")

Rotary = Literal["never", "always", "config"]  # rotated positions pair up query-key dimensions, which then must stay


class AttentionTable(NamedTuple):
    """Names within one attention module: queries, keys, values, output, and tensors with one entry a head."""

    q: Places
    k: Places
    v: Places
    o: Places
    rotary: Rotary
    per_head: Mapping[str, int] = {}
    heads_shared: bool = False  # something outside the module (T5's position bias) numbers the heads


def projections(q: str, k: str, v: str, o: str, rotary: Rotary, **more: Any) -> AttentionTable:
    """The table of four separate linear layers."""
    rows = ({f"{name}.weight": 0, f"{name}.bias": 0} for name in (q, k, v))
    return AttentionTable(*rows, {f"{o}.weight": 1}, rotary, **more)


def fused(name: str, o: str, axis: int, rotary: Rotary, bias: Sequence[Places]) -> AttentionTable:
    """The table of one layer that holds queries, keys and values one after the other."""
    rows = ({f"{name}.weight": (axis, part, 3), **bias[part]} for part in range(3))
    return AttentionTable(*rows, {f"{o}.weight": 1 - axis}, rotary)


def stacked(name: str) -> list[Places]:
    return [{name: (0, part, 3)} for part in range(3)]


VLMO_ATTENTION = fused("qkv", "proj", 0, "never", [{"q_bias": 0}, {}, {"v_bias": 0}])
BEIT_TABLE = "attention.relative_position_bias.relative_position_bias_table"
ATTENTION: tuple[AttentionTable, ...] = (
    projections("self.query", "self.key", "self.value", "output.dense", "config",
                per_head={"self.relative_position_bias_table": 1}),  # BERT, RoBERTa, Swin
    projections("attention.query", "attention.key", "attention.value", "output.dense", "config",
                per_head={BEIT_TABLE: 1}),  # ViT, BEiT, DINOv2
    projections("q_proj", "k_proj", "v_proj", "o_proj", "always"),  # Llama and its kin
    projections("q_proj", "k_proj", "v_proj", "out_proj", "config"),  # CLIP, SigLIP, BART, Whisper
    projections("q_lin", "k_lin", "v_lin", "out_lin", "config"),  # DistilBERT
    projections("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o", "never", heads_shared=True),
    projections("EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v", "EncDecAttention.o", "never"),  # T5
    VLMO_ATTENTION,
    fused("qkv", "proj", 0, "always", stacked("qkv.bias")),  # vision towers, some of which rotate
    fused("c_attn", "c_proj", 1, "config", stacked("c_attn.bias")),  # GPT-2
)  # fmt: skip
ATTENTION_FIXED = ("output.dense.bias", "output.LayerNorm.*", "proj.bias", "*o_proj.bias", "*out_proj.bias",
                   "out_lin.bias", "c_proj.bias", "layer_norm.*", "DenseReluDense.*")  # fmt: skip

# The residual stream: axes that carry it, by glob; () carries none. The first match wins, and every tensor must match.
Axes = tuple[int, ...]
HEAD_OF_TOKENS: dict[str, Axes] = {  # an output layer may be tied to the embeddings, so what it reads moves with them
    "*transform.dense.weight": (0, 1), "*transform.dense.bias": (0,), "*transform.LayerNorm.*": (0,),
    "*mlm_head.dense.weight": (0, 1), "*mlm_head.dense.bias": (0,), "*mlm_head.layer_norm.*": (0,),
    "*decoder.weight": (1,), "*lm_head.weight": (1,), "*predictions.bias": (), "*decoder.bias": (),
    "*mlm_head.bias": (),
}  # fmt: skip
RESIDUAL: dict[str, dict[str, Axes]] = {  # by the name of a tensor that only these models have
    "*encoder.relative_position_bias_table": {  # VLMo
        "*.relative_position_bias_table": (), "*_embeddings.weight": (1,), "*.text.layer_norm.*": (0,),
        "*.cls_token": (2,), "*.patch_projection.*": (0,), "*.layer_scale_?": (0,), "*norm?.*": (0,), "*.norm.*": (0,),
        "*.qkv.weight": (1,), "*.q_bias": (), "*.v_bias": (), "*.proj.*": (0,), "*.fc1.weight": (1,), "*.fc1.bias": (),
        "*.fc2.*": (0,), "*pooler.dense.weight": (1,), "*pooler.dense.bias": (), "itc.*_projection.weight": (1,),
        "itc.*": (), "itm_head.*": (), "classifier.*": (), **HEAD_OF_TOKENS,
    },
    "*embeddings.patch_embeddings.projection.weight": {  # ViT, BEiT, DINOv2
        "*_token": (-1,), "*position_embeddings": (-1,), "*patch_embeddings.projection.*": (0,),
        "*.query.weight": (1,), "*.key.weight": (1,), "*.value.weight": (1,), "*.query.bias": (), "*.key.bias": (),
        "*.value.bias": (), "*relative_position_bias_table": (), "*output.dense.*": (0,),
        "*intermediate.dense.weight": (1,), "*intermediate.dense.bias": (), "*fc1.weight": (1,), "*fc1.bias": (),
        "*fc2.*": (0,), "*layernorm*": (0,), "*.norm?.*": (0,), "*lambda*": (0,), "*pooler.dense.weight": (1,),
        "*pooler.dense.bias": (), "classifier.weight": (1,), "classifier.bias": (),
    },
    "*embeddings.word_embeddings.weight": {  # BERT, RoBERTa
        "*_embeddings.weight": (1,), "*embeddings.LayerNorm.*": (0,), "*.query.weight": (1,), "*.key.weight": (1,),
        "*.value.weight": (1,), "*.query.bias": (), "*.key.bias": (), "*.value.bias": (),
        "*intermediate.dense.weight": (1,), "*intermediate.dense.bias": (), "*output.dense.*": (0,),
        "*output.LayerNorm.*": (0,), "*pooler.dense.weight": (1,), "*pooler.dense.bias": (), **HEAD_OF_TOKENS,
        "classifier.weight": (1,), "classifier.bias": (), "classifier.dense.weight": (1,), "classifier.dense.bias": (),
        "classifier.out_proj.*": (), "qa_outputs.weight": (1,), "qa_outputs.bias": (), "*position_ids": (),
    },
    "*embed_tokens.weight": {  # Llama and its kin
        "*embed_tokens.weight": (1,), "*.q_proj.weight": (1,), "*.k_proj.weight": (1,), "*.v_proj.weight": (1,),
        "*.o_proj.*": (0,), "*.?_proj.bias": (), "*.gate_proj.weight": (1,), "*.up_proj.weight": (1,),
        "*.down_proj.*": (0,), "*.gate_proj.bias": (), "*.up_proj.bias": (),
        "*layernorm.weight": (0,), "*.norm.weight": (0,), "*lm_head.weight": (1,),
        "score.weight": (1,), "*.?_norm.weight": (),
    },
}  # fmt: skip

HEAD_KEYS = ("num_attention_heads", "num_heads", "n_head", "n_heads")


class Slot(NamedTuple):
    """A run [start, start + length) of one axis of a tensor that is numbered by units; of ``rows`` (first, last) of the
    first axis only, where given."""

    key: str
    axis: int
    start: int
    length: int
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Units:
    """Units that may be put in any order: the hidden units of an FFN, or the residual stream."""

    label: str
    kind: str
    size: int
    slots: tuple[Slot, ...]


class Module(NamedTuple):
    """Slots of one attention module: query, key, value, output."""

    q: tuple[Slot, ...]
    k: tuple[Slot, ...]
    v: tuple[Slot, ...]
    o: tuple[Slot, ...]


@dataclass(frozen=True)
class Heads:
    """Heads that move as blocks: ``groups`` key-value heads with ``heads // groups`` query heads each. Several modules
    move together where they share what is stored by head (``per_head``). What is not free keeps its order."""

    label: str
    heads: int
    groups: int
    modules: tuple[Module, ...]
    per_head: tuple[Slot, ...] = ()
    free_heads: bool = True
    free_qk: bool = True
    free_vo: bool = True
    kind: str = field(default="attention", init=False)

    @property
    def size(self) -> int:
        return self.heads

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (*(slot for module in self.modules for part in module for slot in part), *self.per_head)


Block = Units | Heads


class Blocks(NamedTuple):
    """The blocks of a model, and sentences on what was left alone."""

    found: list[Block]
    left: list[str]


class Names:
    """The keys of a source in alphabetical order, so that those of a module are found at once."""

    def __init__(self, source: TensorSource) -> None:
        self.source, self.keys = source, sorted(source)

    def stranger(
        self, module: str, listed: Sequence[Slot], fixed: tuple[str, ...], sizes: tuple[int, ...]
    ) -> str | None:
        """A tensor of the module that no table lists and that has an axis of one of these sizes."""
        known, prefix = {slot.key for slot in listed}, f"{module}."
        for key in islice(self.keys, bisect_left(self.keys, prefix), None):
            if not key.startswith(prefix):
                return None
            name = key.removeprefix(prefix)
            of_units = any(size in self.source.shape(key) for size in sizes)
            if of_units and key not in known and not any(fnmatchcase(name, glob) for glob in fixed):
                return key
        return None


def ffn_blocks(source: TensorSource) -> Blocks:
    """The hidden units of every FFN that a table describes."""
    blocks, names = Blocks([], []), Names(source)
    for table, module in modules_of(source, [(table, list(table)) for table in FFN]):
        slots = slots_of(source, module, table)
        size = slots[0].length
        odd = names.stranger(module, slots, FFN_FIXED, (size,))
        if odd or any(slot.length != size for slot in slots):
            blocks.left.append(
                f"{module}: {odd or slots[-1].key} is not in the table of FFNs; its units keep their order"
            )
        else:
            blocks.found.append(Units(module, "ffn", size, slots))
    return blocks


def attention_blocks(source: TensorSource, heads: int | None = None, *, between_experts: bool = False) -> Blocks:
    """The heads of every attention module that a table describes. ``heads`` is their number where config.json does not
    tell. ``between_experts``: modules are to be matched with others of the same model, so what an expert shares with
    the others stays; known for VLMo only."""
    blocks, names = Blocks([], []), Names(source)
    outside = position_bias_outside(source)
    by_layer: dict[str, list[Heads]] = {}
    for table, module in modules_of(source, [(t, [*t.q, *t.k, *t.v, *t.o]) for t in ATTENTION]):
        own = table is VLMO_ATTENTION
        try:
            if between_experts and not own:
                raise Unfit("whether its experts attend to each other is not known")
            block = attention_block(names, module, table, heads)
        except Unfit as reason:
            blocks.left.append(f"{module}: {reason}; its heads keep their order")
            continue
        if own:
            by_layer.setdefault(module.rpartition(".")[0], []).append(block)
        else:
            blocks.found.append(replace(block, free_heads=block.free_heads and not outside))
    for siblings in by_layer.values():
        joined = with_position_table(source, siblings, between_experts)
        blocks.found.extend(joined.found)
        blocks.left.extend(joined.left)
    return Blocks([b for b in blocks.found if b.free_heads or b.free_qk or b.free_vo], blocks.left)


class Unfit(Exception):
    """Why a module cannot be permuted."""


def position_bias_outside(source: TensorSource) -> bool:
    """Whether a table of positions that many layers share numbers the heads of all of them alike."""
    words = ("relative_position_bias", "relative_attention_bias", "rel_pos")
    return any(any(w in k for w in words) and ".layer." not in k and ".layers." not in k for k in source)


def attention_block(names: Names, module: str, table: AttentionTable, heads: int | None) -> Heads:
    source = names.source
    q, k, v, o = (slots_of(source, module, places) for places in (table.q, table.k, table.v, table.o))
    config = config_for(source.config or {}, module)
    count = heads or head_count(config, module)
    width, kv_width = q[0].length, k[0].length
    if not count:
        raise Unfit("the number of heads is not in config.json (say align: {heads: n})")
    if width % count or kv_width % (width // count):
        raise Unfit(f"{count} heads do not divide {width} queries and {kv_width} keys")
    dimension = width // count
    groups = kv_width // dimension
    same = all(s.length == part[0].length for part in (q, k, v, o) for s in part)
    if count % groups or o[0].length * groups != v[0].length * count or not same:
        raise Unfit("its queries, keys, values and outputs have sizes that do not go together")
    per_head = slots_of(source, module, table.per_head)
    stranger = partial(names.stranger, module, (*q, *k, *v, *o, *per_head), ATTENTION_FIXED)
    odd = stranger((width, kv_width))
    if odd:
        raise Unfit(f"{odd} is not in the table of attention modules")
    rotary = table.rotary == "always" or (table.rotary == "config" and (not config or is_rotary(config)))
    by_dimension = stranger((dimension,))
    by_head = table.heads_shared or numbers_heads(config) or stranger((count,))
    return Heads(
        label=module,
        heads=count,
        groups=groups,
        modules=(Module(q, k, v, o),),
        per_head=per_head,
        free_heads=not by_head,
        free_qk=not (rotary or by_dimension),
        free_vo=not by_dimension,
    )


def with_position_table(source: TensorSource, siblings: list[Heads], between_experts: bool) -> Blocks:
    """VLMo's attention modules of one layer (one an expert) with their columns of the table of relative positions.

    The table has a row for each offset: those of images first, then two between the modalities, then those of text. In
    lower layers each expert sees its own modality and its own rows, so its heads move alone. A fusion layer's experts
    share rows and move together, or not at all where they are to be matched with each other.
    """
    table = next((k for k in source if fnmatchcase(k, "*encoder.relative_position_bias_table")), None)
    config, layer = source.config or {}, layer_of(siblings[0].label)
    modalities = {block.label.rpartition(".")[2]: block for block in siblings}
    where = siblings[0].label.rpartition(".")[0]
    if table is None or layer is None:
        return Blocks(siblings if len(siblings) == 1 and not between_experts else [], [])
    count = siblings[0].heads
    total = source.shape(table)[0]
    column = Slot(table, 1, layer.index * count, count)
    if set(modalities) == {"vision", "language"}:
        if config.get("joint_attention_in_lower_layers") or "image_size" not in config:
            return Blocks([], [f"{where}: its experts attend to each other; their heads keep their order"])
        offsets = (2 * (config["image_size"] // config["patch_size"]) - 1) ** 2
        rows = {"vision": (0, offsets + 3), "language": (offsets + 5, total)}
        own = [replace(block, per_head=(column._replace(rows=rows[m]),)) for m, block in modalities.items()]
        return Blocks(own, [])
    if between_experts:
        fixed = [replace(block, free_heads=False) for block in siblings]
        return Blocks(fixed, [f"{where}: its experts share the table of positions; their heads keep their order"])
    modules = tuple(module for block in siblings for module in block.modules)
    label = siblings[0].label if len(siblings) == 1 else where
    return Blocks([replace(siblings[0], label=label, modules=modules, per_head=(column,))], [])


# An output layer that reads the pooled token, whose entries are numbered by the pooler, not by the residual stream.
POOLED: dict[str, Axes] = {"classifier.weight": (), "cls.seq_relationship.*": ()}


def residual_block(source: TensorSource) -> Units:
    """The residual stream of the whole model. Raises MergeError where a tensor is in no table."""
    has = lambda glob: any(fnmatchcase(k, glob) for k in source)  # noqa: E731
    family = next((table for name, table in RESIDUAL.items() if has(name)), None)
    if family is not None and has("*pooler.dense.weight"):
        family = {**POOLED, **{glob: axes for glob, axes in family.items() if glob not in POOLED}}
    if family is None:
        raise MergeError(f"align: the residual stream of {source.label} is in no table; leave 'residual' out of blocks")
    slots = []
    for key in source:
        axes = next((axes for glob, axes in family.items() if fnmatchcase(key, glob)), None)
        if axes is None:
            raise MergeError(f"align: {key} is not in the table of residual streams; leave 'residual' out of blocks")
        shape = source.shape(key)
        slots += [Slot(key, axis % len(shape), 0, shape[axis]) for axis in axes]
    sizes = sorted({slot.length for slot in slots})
    if len(sizes) > 1:
        odd = next(slot.key for slot in slots if slot.length != slots[0].length)
        raise MergeError(f"align: {odd} does not have the width of the residual stream; leave 'residual' out of blocks")
    return Units("residual stream", "residual", sizes[0], tuple(slots))


def modules_of(source: TensorSource, tables: list[tuple[Any, list[str]]]) -> Iterator[tuple[Any, str]]:
    """Each module with the first table of whose weights it has all."""
    found: set[str] = set()
    for key in source:
        for table, names in tables:
            if key in found or not key.endswith(f".{names[0]}"):
                continue
            module = key.removesuffix(f".{names[0]}")
            needed = [n for n in names if n.endswith("weight") or (table is VLMO_ATTENTION and n == "q_bias")]
            if all(f"{module}.{name}" in source for name in needed):
                found.add(key)
                yield table, module


def slots_of(source: TensorSource, module: str, places: Places) -> tuple[Slot, ...]:
    """The slots of the listed tensors that the module has."""
    slots = []
    for name, place in places.items():
        key = f"{module}.{name}"
        if key not in source:
            continue
        axis, part, parts = place if isinstance(place, tuple) else (place, 0, 1)
        length = source.shape(key)[axis] // parts
        slots.append(Slot(key, axis, part * length, length))
    return tuple(slots)


def config_for(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The part of a nested configuration that is about a module: ``vision_config`` for ``vision_tower.…``."""
    synonyms = {"text": ("text", "language")}
    for name, part in config.items():
        stem = name.removesuffix("_config")
        if isinstance(part, Mapping) and stem != name:
            words = synonyms.get(stem, (stem,))
            if any(component.startswith(words) for component in module.split(".")):
                return part
    return config


def head_count(config: Mapping[str, Any], module: str) -> int | None:
    stacks = [f"{side}_attention_heads" for side in ("encoder", "decoder") if side in module.split(".")]
    return next((config[key] for key in (*stacks, *HEAD_KEYS) if isinstance(config.get(key), int)), None)


def is_rotary(config: Mapping[str, Any]) -> bool:
    """Whether a configuration speaks of rotary positions, in itself or in a part of it."""
    parts = [part for part in config.values() if isinstance(part, Mapping)]
    named = any(value and (key.startswith("rope") or "rotary" in key) for key, value in config.items())
    return named or position_kind(config) in ("rotary", "rope") or any(map(is_rotary, parts))


def numbers_heads(config: Mapping[str, Any]) -> bool:
    """Whether heads differ by their number alone: ALiBi's slopes (arXiv 2108.12409)."""
    return position_kind(config) == "alibi" or any(value and "alibi" in key for key, value in config.items())


def position_kind(config: Mapping[str, Any]) -> Any:
    return config.get("position_embedding_type") or config.get("position_embeddings_type")
