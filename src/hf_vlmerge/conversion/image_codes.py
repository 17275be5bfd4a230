"""The VQ-GAN of text-to-image, from a checkpoint of taming-transformers (`GumbelVQ`) to a folder of ours."""

import inspect
import json
import re
import shutil
from pathlib import Path

import torch

from hf_vlmerge.conversion.convert_unival_to_hf import as_float32
from hf_vlmerge.conversion.image_codes_keys import DROPPED, our_key
from hf_vlmerge.conversion.report import ConversionReport
from hf_vlmerge.conversion.unival_sizes import Shapes
from hf_vlmerge.merging.tensors import open_source, save_checkpoint
from hf_vlmerge.models.unival.configuration_image_codes_unival import UnivalImageCodesConfig
from hf_vlmerge.models.unival.image_codes_unival import UnivalImageCodes

NEAREST = "quantize.embedding.weight"  # of a VQ-GAN that takes the nearest code


def convert_image_codes(source: str | Path, output: str | Path, *, overwrite: bool = False) -> ConversionReport:
    """
    A Gumbel VQ-GAN as a folder that `UnivalImageCodes.from_pretrained` reads, also as remote code, in float32.

    Raises:
        ValueError: another kind of VQ-GAN, an unknown or missing tensor, or sizes that do not agree.
    """
    with open_source(source) as tensors:
        config = infer_config({key: tensors.shape(key) for key in tensors})
        converted, dropped = {}, {}
        for key in tensors:
            ours = name_of(key)
            if ours is None:
                dropped[key] = DROPPED[key.partition(".")[0]]
            else:
                converted[ours] = as_float32(tensors[key])
        label = tensors.label
    check(config, converted)
    config.architectures, config.dtype = [UnivalImageCodes.__name__], torch.float32
    content = json.loads(config.to_json_string())
    classes = {"AutoConfig": UnivalImageCodesConfig, "AutoModel": UnivalImageCodes}
    files = {auto: Path(inspect.getfile(kind)) for auto, kind in classes.items()}
    content["auto_map"] = {auto: f"{files[auto].stem}.{kind.__name__}" for auto, kind in classes.items()}

    def add_code(folder: Path) -> None:
        for file in files.values():
            shutil.copyfile(file, folder / file.name)

    save_checkpoint(
        output,
        converted,
        config=content,
        overwrite=overwrite,
        finish=add_code,
    )
    fields = ("num_codes", "code_width", "base_channels", "channel_multipliers", "blocks_per_level", "attention_levels")
    return ConversionReport(
        source=label,
        output=str(output),
        architecture=UnivalImageCodes.__name__,
        converted=len(converted),
        dropped=dropped,
        config={field: getattr(config, field) for field in fields},
    )


def infer_config(shapes: Shapes) -> UnivalImageCodesConfig:
    """Sizes from shapes."""
    if NEAREST in shapes:
        raise ValueError(
            f"this VQ-GAN takes the nearest code ({NEAREST!r}); expected one with a Gumbel code book ('quantize.proj')."
        )
    for key in ("encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embed.weight"):
        if key not in shapes or len(shapes[key]) < 2:
            raise ValueError(f"this is not a Gumbel VQ-GAN: {key!r} is missing, or no matrix.")
    levels: dict[int, int] = {}
    blocks, attention = set(), set()
    for key, shape in shapes.items():
        match = re.match(r"encoder\.down\.(\d+)\.(block|attn)\.(\d+)\.(conv2\.bias)?", key)
        if match and match[4]:
            levels[int(match[1])] = shape[0]
            blocks.add(int(match[3]))
        elif match and match[2] == "attn":
            attention.add(int(match[1]))
    base = shapes["encoder.conv_in.weight"][0]
    num_codes, code_width = shapes["quantize.embed.weight"]
    return UnivalImageCodesConfig(
        num_codes=num_codes,
        code_width=code_width,
        latent_channels=shapes["encoder.conv_out.weight"][0],
        base_channels=base,
        channel_multipliers=[levels[level] // base for level in sorted(levels)],
        blocks_per_level=len(blocks),
        attention_levels=sorted(attention),
    )


def name_of(key: str) -> str | None:
    try:
        return our_key(key)
    except KeyError:
        raise ValueError(f"the source key {key!r} is not one of a Gumbel VQ-GAN.") from None


def check(config: UnivalImageCodesConfig, converted: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless the tensors are exactly those of the model."""
    with torch.device("meta"):
        expected = {key: tuple(tensor.shape) for key, tensor in UnivalImageCodes(config).state_dict().items()}
    for key in sorted(expected.keys() ^ converted.keys()):
        raise ValueError(f"the tensor for {key!r} is {'missing' if key in expected else 'not one of this model'}.")
    for key, shape in expected.items():
        if tuple(converted[key].shape) != shape:
            raise ValueError(f"{key} has shape {tuple(converted[key].shape)}; these sizes need {shape}.")
