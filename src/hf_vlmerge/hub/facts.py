"""What a card can say of a model by itself: facts from config.json and the weights' headers, and how to load it."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hf_vlmerge
from hf_vlmerge.auto import FAMILIES
from hf_vlmerge.merging import open_source
from hf_vlmerge.merging.tensors.dtypes import dtype_name

SUNG = "2304.14933"  # arXiv numbers
SHUKOR = "2307.16184"
BAO = "2111.02358"
PAPERS = {
    SUNG: "Sung et al. 2023, *An Empirical Study of Multimodal Model Merging*",
    SHUKOR: "Shukor et al. 2023, *UnIVAL: Unified Model for Image, Video, Audio and Language Tasks*",
    BAO: "Bao et al. 2021, *VLMo: Unified Vision-Language Pre-Training with Mixture-of-Modality-Experts*",
    "2203.05482": "Wortsman et al. 2022, *Model soups*",
    "2212.04089": "Ilharco et al. 2022, *Editing Models with Task Arithmetic*",
    "2212.09849": "Jin et al. 2022, *Dataless Knowledge Fusion by Merging Weights of Language Models* (RegMean)",
}
PAPERS_OF = {"vlmo": (BAO, SUNG), "unival": (SHUKOR,), "unival_image_codes": (SHUKOR,)}  # by model_type
PIPELINE_TAGS = {
    "UnivalForConditionalGeneration": "image-text-to-text",
    "VlmoForQuestionAnswering": "visual-question-answering",
    "VlmoForImageAndTextRetrieval": "zero-shot-image-classification",
    "UnivalModel": "feature-extraction",
    "VlmoModel": "feature-extraction",
}
AUTO_CLASSES = {"UnivalImageCodes": "AutoModel"} | {  # the first one of a class that has several
    name: auto for family in FAMILIES.values() for auto, name in reversed(family.models.items())
}
WEIGHTS_ALONE = """from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors.torch import load_file

name = "{name}"
folder = name if Path(name).is_dir() else snapshot_download(name)
tensors = {{}}
for file in Path(folder).glob("*.safetensors"):
    tensors |= load_file(file)"""


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that config.json names."""
    return (config.get("architectures") or ["AutoModel"])[0]


def is_ours(architecture: str) -> bool:
    return architecture in hf_vlmerge.__all__


def loading(config: Mapping[str, Any], name: str) -> str:
    """Lines that load the model ``name``: with its class, and without this package where the code travels along; only
    its tensors where nothing says what model they are."""
    if not config:
        return WEIGHTS_ALONE.format(name=name)
    architecture = architecture_of(config)
    if not is_ours(architecture) and (auto := remote_class(config)):
        call = f'{auto}.from_pretrained("{name}", trust_remote_code=True)'
        return f"from transformers import {auto}\n\nmodel = {call}"
    package = "hf_vlmerge" if is_ours(architecture) else "transformers"
    lines = [f"from {package} import {architecture}", "", f'model = {architecture}.from_pretrained("{name}")']
    if is_ours(architecture) and architecture in AUTO_CLASSES:
        auto = AUTO_CLASSES[architecture]
        lines += ["", "# or without the package hf_vlmerge", f"from transformers import {auto}", ""]
        lines += [f'model = {auto}.from_pretrained("{name}", trust_remote_code=True)']
    return "\n".join(lines)


def remote_class(config: Mapping[str, Any]) -> str | None:
    """The Auto class of a model whose code travels with it."""
    classes = {auto: str(place).rpartition(".")[2] for auto, place in (config.get("auto_map") or {}).items()}
    architecture = architecture_of(config)
    return next((auto for auto, name in classes.items() if architecture in (name, auto)), None)


def config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """`{what: value}` of the architecture, as far as a reader of the card can use it."""
    facts = {"Class": f"`{architecture_of(config)}`", "Model type": config.get("model_type", "not stated")}
    return facts | FACTS_OF.get(config.get("model_type"), lambda config: {})(config)


def vlmo_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    modules = config.get("expert_modules")
    experts = f"one copy a modality of {', '.join(modules)}" if modules else "one shared copy: modality-agnostic"
    return {
        "Experts": experts,
        "Layers": f"{config['num_hidden_layers']}, of them {config['num_fusion_layers']} fusion layers",
        "Width": f"{config['hidden_size']}, {config['num_attention_heads']} heads, FFN {config['intermediate_size']}",
        "Images": f"{config['image_size']} pixels a side, patches of {config['patch_size']}",
        "Text": f"up to {config['max_text_length']} of {config['vocab_size']:,} tokens",
    }


def unival_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    towers = {
        "image": lambda: f"ResNet, blocks {config['image_depths']}",
        "video": lambda: f"3-D ResNeXt, blocks {config['video_depths']}",
        "audio": lambda: f"Cnn14 at {config['audio_sample_rate']:,} Hz, channels {config['audio_widths']}",
    }
    named = [f"{name} ({towers[name]()})" for name in config["towers"]]
    return {
        "Inputs": ", ".join(["text", *config["towers"]]),
        "Towers": "; ".join(named) or "none",
        "Layers": f"{config['encoder_layers']} of the encoder, {config['decoder_layers']} of the decoder",
        "Width": f"{config['hidden_size']}, {config['num_attention_heads']} heads, FFN {config['intermediate_size']}",
        "Text": f"up to {config['max_position_embeddings']:,} of {config['vocab_size']:,} tokens",
    }


def image_code_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"Code book": f"{config['num_codes']:,} codes of width {config['code_width']}"}


FACTS_OF = {"vlmo": vlmo_facts, "unival": unival_facts, "unival_image_codes": image_code_facts}


def weight_facts(folder: Path) -> dict[str, Any]:
    """Parameters and dtypes, counted from the headers of the weights; nothing else is read."""
    with open_source(folder) as source:
        sizes = Counter()
        for key in source:
            sizes[dtype_name(source.dtype(key))] += source.numel(key)
    stored = ", ".join(f"{name}: {count:,}" for name, count in sizes.most_common())
    return {"Parameters and buffers": f"{sizes.total():,} ({stored})"}


def reference(paper: str) -> str:
    """An arXiv number as a titled link; any other reference as it is."""
    if not paper.replace(".", "").isdigit():
        return paper
    return f"{PAPERS.get(paper, 'arXiv ' + paper)}, https://arxiv.org/abs/{paper}"
