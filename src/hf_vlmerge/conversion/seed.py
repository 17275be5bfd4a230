"""A seed's folder as a modality-specific model's folder."""

from collections.abc import Iterable
from pathlib import Path

from hf_vlmerge.conversion.specialise import specialise
from hf_vlmerge.conversion.write import Finish
from hf_vlmerge.merging.tensors import open_source, save_checkpoint


def specialise_folder(
    source: str | Path,
    output: str | Path,
    expert_modules: Iterable[str],
    *,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Path:
    """
    Copies shared -> every expert (see `specialise`); config.json gets `expert_modules`, the files beside it come along.

    Raises:
        ValueError: the source is no modality-agnostic VLMo checkpoint.
    """
    expert_modules = list(expert_modules)
    with open_source(source) as seed:
        if (seed.config or {}).get("model_type") != "vlmo":
            raise ValueError(f"{seed.label} is not a VLMo checkpoint: its config.json does not say so.")
        return save_checkpoint(
            output,
            specialise(seed, expert_modules, seed.config["num_fusion_layers"]),
            config={**seed.config, "expert_modules": expert_modules},
            side_files=seed.side_files,
            overwrite=overwrite,
            finish=finish,
        )
