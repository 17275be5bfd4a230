"""VLMo checkpoints of the released research code and of Microsoft, to our layout and back.

The configuration is inferred from names and shapes alone; hyper-parameters inside the file are never looked at.
"""

import difflib
import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import NamedTuple

from hf_vlmerge.conversion.report import ConversionReport
from hf_vlmerge.conversion.vlmo_buffers import index_buffers
from hf_vlmerge.conversion.vlmo_keys import (
    CLASSES,
    HEADS,
    INDEX_BUFFERS,
    NAMINGS,
    UNUSED_PARAMETERS,
    Naming,
    head_table,
    key_table,
)
from hf_vlmerge.conversion.write import Finish, check_shapes, write_model, write_torch
from hf_vlmerge.merging.tensors import open_source
from hf_vlmerge.models.vlmo.configuration_vlmo import EXPERT_MODULES, VlmoConfig
from hf_vlmerge.models.vlmo.image_processing_vlmo import VlmoImageProcessor
from hf_vlmerge.models.vlmo.processing_vlmo import VlmoProcessor

Shapes = Mapping[str, tuple[int, ...]]
RELEASED_FUSION_LAYERS = 2
RELEASED_TEXT_POSITIONS = 196


class Plan(NamedTuple):
    """What a conversion will do."""

    config: VlmoConfig
    head: str
    table: dict[str, str]  # source key -> our key
    dropped: dict[str, str]  # source key -> why
    notes: list[str]


def convert_to_hf(
    source: str | Path,
    output: str | Path,
    *,
    head: str = "auto",
    num_fusion_layers: int | None = None,
    num_text_positions: int | None = None,
    joint_attention_in_lower_layers: bool | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> ConversionReport:
    """
    A checkpoint of the research code (Lightning `.ckpt`, state dict) or of Microsoft's VLMo as a folder of ours.

    Args:
        head: `auto` keeps the head of pre-training, else VQA, else NLVR2, else retrieval, by what is complete.
        num_fusion_layers: M of a modality-agnostic checkpoint, whose tensors do not show it (2 in the released models).
        num_text_positions: S of the position table where no index tensors are stored (196 in the released models).
        joint_attention_in_lower_layers: default true for Microsoft's naming, false otherwise. The released custom
            layer norm configuration attends jointly; the paper's text does not.
        tokenizer: Hub id or folder of a WordPiece tokenizer; without one only the image processor is written.
        finish: called with the temporary folder before it gets its name.

    Raises:
        ValueError: a key that is neither converted nor known to be unused, a missing key, or sizes that do not agree.
    """
    with open_source(source) as tensors:
        plan = plan_conversion(
            {key: tensors.shape(key) for key in tensors},
            head=head,
            num_fusion_layers=num_fusion_layers,
            num_text_positions=num_text_positions,
            joint_attention_in_lower_layers=joint_attention_in_lower_layers,
        )
        converted = {ours: tensors[theirs] for theirs, ours in plan.table.items()}
        label = tensors.label
    processor = make_processor(plan.config, tokenizer)
    write_model(
        output, CLASSES[plan.head], plan.config, converted, processor=processor, overwrite=overwrite, finish=finish
    )
    return ConversionReport(
        source=label,
        output=str(output),
        architecture=CLASSES[plan.head],
        converted=len(converted),
        dropped=plan.dropped,
        notes=plan.notes,
        config=sizes(plan.config),
    )


def convert_to_original(
    source: str | Path, output: str | Path, *, naming: str = "research", overwrite: bool = False
) -> ConversionReport:
    """
    One of our folders as a `{"state_dict": ...}` file of the original code.

    Kept tensors are byte-equal to what they were in the original; index buffers are computed anew, and the unused
    parameters that the way here dropped are not there, so load the file with `strict=False`.

    Raises:
        ValueError: an unknown naming, or an architecture that the original does not have.
    """
    names = pick_naming(naming)
    with open_source(source) as tensors:
        if (tensors.config or {}).get("model_type") != "vlmo":
            raise ValueError(
                f"{tensors.label} is not a VLMo checkpoint of this package: its config.json does not say so."
            )
        config = VlmoConfig.from_dict(tensors.config)
        architecture = (config.architectures or ["VlmoModel"])[0]
        heads = {class_name: head for head, class_name in CLASSES.items()}
        if architecture not in heads:
            raise ValueError(f"architecture {architecture!r} is none of {', '.join(heads)}.")
        head = heads[architecture]
        ours_of = table_for(config, head, names)
        compare_keys(found=set(tensors), expected=set(ours_of.values()))
        original = {theirs: tensors[ours] for theirs, ours in ours_of.items()}
        label = tensors.label
    buffers = index_buffers(config, pretraining=head == "pretraining") if names.index_buffers else {}
    write_torch(output, {"state_dict": original | buffers}, overwrite=overwrite)
    return ConversionReport(
        source=label,
        output=str(output),
        architecture=architecture,
        converted=len(original),
        dropped=dict(UNUSED_PARAMETERS),
        recomputed=list(buffers),
        config=sizes(config),
    )


def plan_conversion(
    shapes: Shapes,
    *,
    head: str = "auto",
    num_fusion_layers: int | None = None,
    num_text_positions: int | None = None,
    joint_attention_in_lower_layers: bool | None = None,
) -> Plan:
    """Everything that follows from names and shapes; see `convert_to_hf` for the arguments."""
    naming_name = "microsoft" if any(MICROSOFT_KEY.match(key) for key in shapes) else "research"
    naming = NAMINGS[naming_name]
    notes: list[str] = []
    head = choose_head(shapes, head, naming)
    config = infer_config(shapes, naming, num_fusion_layers, num_text_positions, notes)
    config.architectures = [CLASSES[head]]
    if head in ("vqa", "nlvr2"):
        config.num_labels = shapes[f"{head}_classifier.3.bias"][0]
    if joint_attention_in_lower_layers is None:
        joint_attention_in_lower_layers = naming_name == "microsoft"
        if config.expert_modules == ["layer_norm"]:
            notes.append(
                "custom layer norm: lower layers attend within a modality, as in the paper's text; the released "
                "configuration attends jointly (--joint-attention-in-lower-layers)"
            )
    config.joint_attention_in_lower_layers = joint_attention_in_lower_layers

    table = table_for(config, head, naming)
    dropped = {key: why for key in shapes if key not in table and (why := reason_to_drop(key, naming))}
    compare_keys(found=set(shapes) - set(dropped), expected=set(table))
    check_shapes(config, CLASSES[head], {ours: shapes[theirs] for theirs, ours in table.items()})
    return Plan(config, head, table, dropped, notes)


MICROSOFT_KEY = re.compile(r"transformer\.blocks\.\d+\.(mlp|norm2)_(text|imag|vl)\.|itc_")


def table_for(config: VlmoConfig, head: str, naming: Naming) -> dict[str, str]:
    """Original key -> our key for a configuration."""
    return key_table(head, naming, config.expert_modules, config.num_hidden_layers, config.num_fusion_layers)


def choose_head(shapes: Shapes, wanted: str, naming: Naming) -> str:
    """The first head all of whose tensors are there, or the one asked for."""
    if wanted != "auto":
        if wanted not in HEADS:
            raise ValueError(f"head is {wanted!r}; expected auto, {', '.join(HEADS)}.")
        missing = [key for key in head_table(wanted, naming) if key not in shapes]
        if missing:
            raise ValueError(f"the checkpoint has no {wanted} head: {missing[0]!r} is missing.")
        return wanted
    return next(head for head in HEADS if all(key in shapes for key in head_table(head, naming)))


def reason_to_drop(key: str, naming: Naming) -> str | None:
    """Why a source tensor is not needed; None for one that nobody knows."""
    if key in UNUSED_PARAMETERS:
        return UNUSED_PARAMETERS[key]
    if key in INDEX_BUFFERS:
        return "index buffer, computed from the sizes"
    if any(key in head_table(head, naming) for head in HEADS):
        return "belongs to another head"
    return None


def infer_config(
    shapes: Shapes, naming: Naming, num_fusion_layers: int | None, num_text_positions: int | None, notes: list[str]
) -> VlmoConfig:
    """Sizes from shapes, architecture from names; what neither tells is taken from the arguments and noted."""

    def shape(key: str, axes: int) -> tuple[int, ...]:
        if key not in shapes:
            raise ValueError(f"this is not a VLMo checkpoint: {key!r} is missing.")
        if len(shapes[key]) != axes:
            raise ValueError(f"this is not a VLMo checkpoint: {key!r} has shape {tuple(shapes[key])}, not {axes} axes.")
        return tuple(shapes[key])

    def layers_with(pattern: str) -> list[int]:
        match_layer = re.compile(r"transformer\.blocks\.(\d+)\." + pattern)
        return sorted({int(match[1]) for key in shapes if (match := match_layer.match(key))})

    def copies(module: str, expert: str) -> str:
        return re.escape(f"{module}{naming.separator}{naming.experts[expert]}.")

    vocab_size, hidden_size = shape("text_embeddings.word_embeddings.weight", 2)
    _, num_channels, patch_size, _ = shape("transformer.patch_embed.proj.weight", 4)
    num_layers = len(layers_with(""))
    if num_layers == 0:
        raise ValueError("this is not a VLMo checkpoint: it has no 'transformer.blocks.*'.")
    rows, columns = shape("relative_position_bias_table", 2)
    if columns % num_layers:
        raise ValueError(f"the position table has {columns} columns, which is no multiple of {num_layers} layers.")
    grid, num_text_positions = infer_grid(shapes, rows, num_text_positions, notes)
    fc1 = next((key for key in shapes if re.search(r"\.mlp.*fc1\.weight$", key)), "transformer.blocks.0.mlp.fc1.weight")

    custom = {module: bool(layers_with(copies(module, "vision"))) for module in ("attn", "mlp", "norm1", "norm2")}
    has = {"attention": custom["attn"], "ffn": custom["mlp"], "layer_norm": custom["norm1"] and custom["norm2"]}
    fusion = {layer for module in custom for layer in layers_with(copies(module, "vision_language"))}
    if num_fusion_layers is None:
        num_fusion_layers = len(fusion)
        if not any(custom.values()):
            num_fusion_layers = min(RELEASED_FUSION_LAYERS, num_layers)
            notes.append(f"modality-agnostic: {num_fusion_layers} fusion layers assumed (--num-fusion-layers)")
    return VlmoConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=columns // num_layers,
        intermediate_size=shape(fc1, 2)[0],
        image_size=grid * patch_size,
        patch_size=patch_size,
        num_channels=num_channels,
        max_text_length=infer_text_length(shapes, num_text_positions),
        num_text_positions=num_text_positions,
        num_fusion_layers=num_fusion_layers,
        expert_modules=[name for name in EXPERT_MODULES if has[name]],
        num_modality_types=shape("token_type_embeddings.weight", 2)[0],
    )


def infer_grid(shapes: Shapes, rows: int, num_text_positions: int | None, notes: list[str]) -> tuple[int, int]:
    """Grid g and S from the rows (2g-1)^2 + 5 + 2S of the position table, with an index tensor or a given S."""
    if "relative_position_index" in shapes:
        grid = isqrt(shapes["relative_position_index"][0] - 1)
        return grid, (rows - 5 - (2 * grid - 1) ** 2) // 2
    if num_text_positions is None:
        num_text_positions = RELEASED_TEXT_POSITIONS
        notes.append(f"no index tensors: {num_text_positions} text positions assumed (--num-text-positions)")
    offsets = rows - 5 - 2 * num_text_positions
    span = isqrt(max(offsets, 0))
    if span * span != offsets or span % 2 == 0:
        raise ValueError(
            f"the position table has {rows} rows, which is not (2g-1)^2 + 5 + 2S for S = {num_text_positions}; "
            "give the right S with --num-text-positions."
        )
    return (span + 1) // 2, num_text_positions


def infer_text_length(shapes: Shapes, num_text_positions: int) -> int:
    """T from whatever has one row or column a text token; else the released 40."""
    for key in ("text_relative_position_index", "text_embeddings.position_ids"):
        if key in shapes:
            return shapes[key][-1]
    if "text_embeddings.position_embeddings.weight" in shapes:
        return shapes["text_embeddings.position_embeddings.weight"][0]
    return min(40, num_text_positions)


def compare_keys(found: set[str], expected: set[str]) -> None:
    """Every key converted, none left over; the error names the first that is not, and its nearest relative."""
    unknown, missing = sorted(found - expected), sorted(expected - found)
    if unknown:
        near = difflib.get_close_matches(unknown[0], missing or expected, n=1)
        hint = f"; the nearest expected name is {near[0]!r}" if near else ""
        raise ValueError(f"the source key {unknown[0]!r} is neither known nor known to be unused{hint}.")
    if missing:
        raise ValueError(f"the source key {missing[0]!r} is missing ({len(missing)} in all).")


def pick_naming(name: str) -> Naming:
    if name not in NAMINGS:
        raise ValueError(f"naming is {name!r}; expected {' or '.join(NAMINGS)}.")
    return NAMINGS[name]


def make_processor(config: VlmoConfig, tokenizer: str | None) -> VlmoProcessor | VlmoImageProcessor:
    """The processor that fits a configuration; without a tokenizer its image part alone."""
    image_processor = VlmoImageProcessor(size={"height": config.image_size, "width": config.image_size})
    if tokenizer is None:
        return image_processor
    from transformers import BertTokenizer

    words = BertTokenizer.from_pretrained(tokenizer)
    if len(words) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(words)} words, but the model's vocabulary is {config.vocab_size}.")
    return VlmoProcessor(image_processor, words, max_text_length=config.max_text_length)


def sizes(config: VlmoConfig) -> dict:
    """The inferred part of a configuration, for reports."""
    names = (
        "expert_modules", "hidden_size", "num_hidden_layers", "num_fusion_layers", "num_attention_heads",
        "image_size", "patch_size", "vocab_size", "max_text_length", "num_text_positions",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}
