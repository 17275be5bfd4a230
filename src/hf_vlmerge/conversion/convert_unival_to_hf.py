"""UnIVAL checkpoints of the original code (fairseq `.pt` files), to our layout and back.

The configuration is inferred from names and shapes alone; hyper-parameters inside the file are never looked at.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError

from hf_vlmerge.conversion.convert_vlmo_to_hf import compare_keys
from hf_vlmerge.conversion.report import ConversionReport
from hf_vlmerge.conversion.unival_buffers import MEL_MATRIX, recomputed_tensors
from hf_vlmerge.conversion.unival_keys import DROPPED, PREFIX, RECOMPUTED, TIED, original_key, our_key
from hf_vlmerge.conversion.unival_sizes import TOWERS, Shapes, infer_sizes
from hf_vlmerge.conversion.write import Finish, check_shapes, make_fresh, write_model, write_torch
from hf_vlmerge.merging.tensors import TensorSource, open_source
from hf_vlmerge.merging.tensors.pickles import load_safely
from hf_vlmerge.models.unival.configuration_unival import UnivalConfig
from hf_vlmerge.models.unival.encoders_unival import mel_matrix
from hf_vlmerge.models.unival.feature_extraction_unival import UnivalFeatureExtractor
from hf_vlmerge.models.unival.image_processing_unival import UnivalImageProcessor
from hf_vlmerge.models.unival.processing_unival import UnivalProcessor
from hf_vlmerge.models.unival.tokenization_unival import build_tokenizer

ARCHITECTURE = "UnivalForConditionalGeneration"
ARCHITECTURES = {ARCHITECTURE: PREFIX, "UnivalModel": ""}  # -> what stands before a tensor's name
RELEASED_IMAGE_SIZE = 480
SECONDS = 10  # of sound that the feature extractor gives
OFA = (
    "this is an OFA checkpoint: its ResNet has three stages (stride 16), UnIVAL's has four (stride 32), and the layers "
    "after it were trained for the features of three. Only UnIVAL checkpoints can be converted."
)


class Plan(NamedTuple):
    """What a conversion will do."""

    config: UnivalConfig
    table: dict[str, str]  # original key -> our key
    dropped: dict[str, str]  # original key -> why
    notes: list[str]


def convert_to_hf(
    source: str | Path,
    output: str | Path,
    *,
    ema: bool = False,
    settings: Mapping[str, Any] | None = None,
    image_size: int = RELEASED_IMAGE_SIZE,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> ConversionReport:
    """
    A checkpoint of the original code as a folder of ours, in float32.

    Args:
        source: a `.pt` file, or anything that `open_source` takes, with the original's names.
        ema: take the averaged weights (`extra_state["ema"]`), which the original evaluates VQA models with.
        settings: fields of the configuration that override what was inferred or assumed. The weights do not tell
            `audio_hop`, `audio_sample_rate`, `audio_min_frequency`, `audio_max_frequency` and `code_image_size`; the
            values of the released models are assumed (256 pixels or what the grid holds for the last one).
        image_size: side of the images that the processor gives.
        tokenizer: Hub id or folder of a BART tokenizer (codes and bins are added to it) or of one of ours; without it
            only the image processor is written, or the feature extractor where audio is all there is.
        finish: called with the temporary folder before it gets its name.

    Raises:
        ValueError: an OFA checkpoint, no EMA weights, a key that is neither converted nor known to be unused, a missing
            key, sizes that do not agree, or a stored mel matrix that does not belong to the settings.
    """
    with open_original(source, ema) as tensors:
        plan = plan_conversion({key: tensors.shape(key) for key in tensors}, settings)
        check_tied(tensors)
        if "audio" in plan.config.towers and MEL_MATRIX in tensors:
            check_mel_matrix(plan.config, tensors[MEL_MATRIX])
        notes = plan.notes + dtype_notes(tensors, plan.table)
        converted = {ours: as_float32(tensors[theirs]) for theirs, ours in plan.table.items()}
        label = tensors.label
    processor = make_processor(plan.config, tokenizer, image_size)
    write_model(output, ARCHITECTURE, plan.config, converted, processor=processor, overwrite=overwrite, finish=finish)
    return ConversionReport(
        source=label,
        output=str(output),
        architecture=ARCHITECTURE,
        converted=len(converted),
        dropped=plan.dropped,
        notes=["averaged weights (EMA)", *notes] if ema else notes,
        config=sizes(plan.config),
    )


def convert_to_original(source: str | Path, output: str | Path, *, overwrite: bool = False) -> ConversionReport:
    """
    One of our folders as a `{"model": ...}` file under the original names.

    Kept tensors are byte-equal to what they were in the original; second names, index tensors and the mel matrix are
    written anew. What no output depends on (the ResNet's classifier) is not there: load the file with `strict=False`.

    Raises:
        ValueError: the source is no UnIVAL checkpoint of this package, or lacks a tensor.
    """
    with open_source(source) as tensors:
        if (tensors.config or {}).get("model_type") != "unival":
            raise ValueError(
                f"{tensors.label} is not a UnIVAL checkpoint of this package: its config.json does not say so."
            )
        config = UnivalConfig.from_dict(tensors.config)
        architecture = (config.architectures or ["UnivalModel"])[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {architecture!r} is none of {', '.join(ARCHITECTURES)}.")
        table = key_table(config, architecture)
        compare_keys(found=set(tensors) - tied_keys(config, architecture), expected=set(table.values()))
        original = {theirs: tensors[ours] for theirs, ours in table.items()}
        label = tensors.label
    again = {second: original[first] for second, first in TIED.items()}
    recomputed = recomputed_tensors(config)
    write_torch(output, {"model": original | again | recomputed}, overwrite=overwrite)
    return ConversionReport(
        source=label,
        output=str(output),
        architecture=architecture,
        converted=len(original),
        dropped={key: why for key, why in DROPPED.items() if "embed_images" not in key or "image" in config.towers},
        recomputed=[*again, *recomputed],
        config=sizes(config),
    )


def open_original(source: str | Path, ema: bool) -> TensorSource:
    """The weights of a checkpoint, or its averaged weights."""
    if not ema:
        return open_source(source)
    path = Path(source).expanduser()
    if not path.is_file() or path.suffix == ".safetensors":
        raise ValueError(f"averaged weights stand in a fairseq checkpoint file (.pt); {path.name!r} is none.")
    content = load_safely(path)
    extra = content.get("extra_state") if isinstance(content, Mapping) else None
    averaged = extra.get("ema") if isinstance(extra, Mapping) else None
    if not isinstance(averaged, Mapping) or not averaged:
        raise ValueError(f"{path.name} has no averaged weights: extra_state['ema'] is not there.")
    tensors = open_source({key: value for key, value in averaged.items() if isinstance(value, torch.Tensor)})
    tensors.label = path.name
    return tensors


def plan_conversion(shapes: Shapes, settings: Mapping[str, Any] | None = None) -> Plan:
    """Everything that follows from names and shapes; see `convert_to_hf` for the arguments."""
    found = infer_sizes(shapes)
    if "vocab_size" not in found or "num_attention_heads" not in found:
        raise ValueError(
            "this is not a UnIVAL checkpoint: expected 'encoder.embed_tokens.weight' and "
            "'encoder.layers.0.self_attn.c_attn'."
        )
    if is_ofa(shapes, found):
        raise ValueError(OFA)
    settings = checked_settings(settings)
    config = make_config(found, settings)
    dropped = {key: why for key in shapes if (why := reason_to_drop(key, config.towers))}
    table = key_table(config, ARCHITECTURE)
    compare_keys(found=set(shapes) - set(dropped), expected=set(table))
    check_shapes(config, ARCHITECTURE, {ours: shapes[theirs] for theirs, ours in table.items()})
    return Plan(config, table, dropped, assumptions(config, settings))


def make_config(found: Mapping[str, Any], settings: Mapping[str, Any]) -> UnivalConfig:
    """The configuration of inferred sizes and settings; generated images are as large as the grid allows, up to 256."""
    fields = {**found, **settings}
    if "code_image_size" not in fields and "grid_size" in fields:
        fields["code_image_size"] = min(UnivalConfig.code_image_size, 8 * fields["grid_size"])
    try:
        return UnivalConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"the sizes do not agree: {error.__cause__ or error}") from None


def checked_settings(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings without what every config.json has beside its fields. An unknown field: ValueError with the nearest."""
    known = UnivalConfig().to_dict()
    result = dict(settings or {})
    model_type = result.pop("model_type", "unival")
    if model_type != "unival":
        raise ValueError(f"the settings are those of a {model_type!r} model; expected 'unival'.")
    for name in ("architectures", "auto_map", "transformers_version", "dtype"):
        result.pop(name, None)
    for name in result:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"the configuration has no field {name!r}" + (f"; nearest: {near[0]!r}." if near else "."))
    return result


def is_ofa(shapes: Shapes, found: Mapping[str, Any]) -> bool:
    """OFA has the same names, but three stages of the ResNet and no other tower."""
    return found["towers"] == ["image"] and len(found.get("image_widths", ())) == 3


def assumptions(config: UnivalConfig, settings: Mapping[str, Any]) -> list[str]:
    """A note on each value that neither the weights nor the settings gave."""
    fields = ["code_image_size"]
    if "audio" in config.towers:
        fields += ["audio_hop", "audio_sample_rate", "audio_min_frequency", "audio_max_frequency"]
    assumed = [f"{field} {getattr(config, field)}" for field in fields if field not in settings]
    return [f"assumed, since weights do not tell: {', '.join(assumed)}"] if assumed else []


def key_table(config: UnivalConfig, architecture: str) -> dict[str, str]:
    """Original key -> our key for every tensor of a model."""
    prefix = ARCHITECTURES[architecture]
    ours = make_fresh(architecture, config, seed=None)
    return {original_key(key.removeprefix(prefix)): key for key in ours}


def tied_keys(config: UnivalConfig, architecture: str) -> set[str]:
    """Our second names of one tensor, which some writers store."""
    prefix = ARCHITECTURES[architecture]
    return {"lm_head.weight", f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight"}


def reason_to_drop(key: str, towers: Iterable[str]) -> str | None:
    """Why an original tensor is not needed; None for one that is converted, or that nobody knows."""
    if key in TIED:
        return f"second name of {TIED[key]}"
    if key in RECOMPUTED:
        return f"recomputed: {RECOMPUTED[key]}"
    if key in DROPPED:
        return DROPPED[key]
    try:
        ours = our_key(key)
    except KeyError:
        return None
    absent = [tower for tower in TOWERS if tower not in towers and ours.startswith(f"encoder.{tower}_")]
    return f"the checkpoint has no {absent[0]} tower" if absent else None


def check_tied(tensors: TensorSource) -> None:
    """Raises ValueError if the second name of a tensor holds other values."""
    for second, first in TIED.items():
        if second in tensors and not torch.equal(tensors[second], tensors[first]):
            raise ValueError(f"{second} and {first} differ; in UnIVAL they are one tensor.")


def check_mel_matrix(config: UnivalConfig, stored: torch.Tensor) -> None:
    """Raises ValueError unless the stored matrix is, up to half precision, the one that the configuration gives."""
    ours = mel_matrix(config)
    if stored.shape != ours.shape or (stored.float() - ours).abs().max() > 2e-3 * ours.abs().max():
        raise ValueError(
            f"the stored mel matrix {tuple(stored.shape)} is not that of {config.audio_mel_bins} bins from "
            f"{config.audio_min_frequency} to {config.audio_max_frequency} Hz at {config.audio_sample_rate} samples a "
            "second; set audio_sample_rate, audio_min_frequency and audio_max_frequency."
        )


def dtype_notes(tensors: TensorSource, table: Mapping[str, str]) -> list[str]:
    """Which precision the source had, where it was lower."""
    kinds = {tensors.dtype(key) for key in table}
    low = sorted(str(kind).removeprefix("torch.") for kind in kinds if kind.is_floating_point and kind.itemsize < 4)
    return [f"{' and '.join(low)} in the source, float32 here"] if low else []


def as_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def make_processor(
    config: UnivalConfig, tokenizer: str | Path | None, image_size: int
) -> UnivalProcessor | UnivalImageProcessor | UnivalFeatureExtractor:
    """The processor that fits a configuration; without a tokenizer a part of it."""
    images = UnivalImageProcessor(size={"height": image_size, "width": image_size})
    rate = config.audio_sample_rate
    sounds = UnivalFeatureExtractor(sampling_rate=rate, num_samples=SECONDS * rate)
    if tokenizer is None:
        return sounds if list(config.towers) == ["audio"] else images
    words = build_tokenizer(tokenizer, num_codes=0, num_bins=0, max_length=config.max_position_embeddings)
    if "<code_0>" not in words.get_vocab():
        words = build_tokenizer(tokenizer, max_length=config.max_position_embeddings)
    if len(words) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(words)} tokens, but the model's vocabulary is {config.vocab_size}.")
    return UnivalProcessor(images, sounds, words)


def sizes(config: UnivalConfig) -> dict:
    """The inferred part of a configuration, for reports."""
    names = (
        "towers", "vocab_size", "hidden_size", "encoder_layers", "decoder_layers", "num_attention_heads",
        "intermediate_size", "max_position_embeddings", "grid_size",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}
