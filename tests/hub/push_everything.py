"""Push one of each public class to the Hub that `HF_ENDPOINT` names, load it again, and print what is the same.

Run by `test_push.py` as a process of its own: `python -m tests.hub.push_everything FOLDER`. The folder receives the
inputs of each model, for those who load it later and compare the digest of what it gives.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertTokenizer

import hf_vlmerge
from hf_vlmerge import (
    UnivalForConditionalGeneration,
    UnivalImageCodes,
    UnivalImageCodesConfig,
    UnivalModel,
    VlmoImageProcessor,
    VlmoProcessor,
)
from tests.models.unival import tiny as unival
from tests.models.unival.tiny_processor import tiny_processor
from tests.models.vlmo import tiny as vlmo

CODES = {"num_codes": 16, "code_width": 12, "latent_channels": 10, "base_channels": 32, "blocks_per_level": 1}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle"]


def models_and_inputs() -> dict[str, tuple]:
    """{class name: (model, inputs)}; pairs of images for the class that compares two."""
    batch = vlmo.tiny_batch()
    pairs = batch | {"pixel_values": torch.stack([batch["pixel_values"], batch["pixel_values"].flip(0)], dim=1)}
    names = ["VlmoModel", "VlmoForPreTraining", "VlmoForImageAndTextRetrieval", "VlmoForQuestionAnswering"]
    made = {name: (vlmo.tiny_model(getattr(hf_vlmerge, name)), batch) for name in names}
    name = "VlmoForImagesAndTextClassification"
    made[name] = vlmo.tiny_model(getattr(hf_vlmerge, name), num_modality_types=3, num_labels=2), pairs
    words = tiny_processor().tokenizer
    for kind in (UnivalModel, UnivalForConditionalGeneration):
        inputs = unival.tiny_batch(kind="video")
        inputs["decoder_input_ids"] = inputs.pop("labels").clamp(min=0)
        made[kind.__name__] = unival.tiny_model(kind, vocab_size=len(words)), inputs
    codes = UnivalImageCodes(UnivalImageCodesConfig(**CODES)).eval()
    made["UnivalImageCodes"] = codes, {"pixel_values": torch.rand(2, 3, 32, 32) * 2 - 1}
    return made


def processors() -> dict[str, object]:
    """One of each class that prepares inputs, with the two tokenizers."""
    ours = tiny_processor()
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    images = VlmoImageProcessor(size={"height": 32, "width": 32})
    theirs = VlmoProcessor(images, tokenizer, max_text_length=12)
    parts = [ours, ours.image_processor, ours.feature_extractor, ours.tokenizer, theirs, images, tokenizer]
    return {type(part).__name__: part for part in parts}


@torch.no_grad()
def outputs(model, inputs) -> dict[str, torch.Tensor]:
    """The tensors that a model gives, by name."""
    return {name: value for name, value in model(**inputs).items() if isinstance(value, torch.Tensor)}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """One line for names, values and bits of some tensors."""
    lines = [f"{k} {hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest()}" for k, v in sorted(tensors.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def is_same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def main(folder: Path) -> None:
    facts, models, parts = {}, models_and_inputs(), processors()
    for name, (model, inputs) in models.items():
        model.push_to_hub(f"org/{name}", private=name == "UnivalModel")
        again, info = type(model).from_pretrained(f"org/{name}", output_loading_info=True)
        expected = outputs(model, inputs)
        facts[name] = {
            "incomplete": {what: list(names) for what, names in info.items() if names},
            "same tensors": is_same(model.state_dict(), again.state_dict()),
            "same outputs": is_same(expected, outputs(again.eval(), inputs)),
            "same settings": facts_of(again.config) == facts_of(model.config),
            "digest": digest(expected),
        }
        save_file(inputs, folder / f"{name}.safetensors")
    for name, part in parts.items():
        part.push_to_hub(f"org/{name}")
        again = type(part).from_pretrained(f"org/{name}")
        what = facts_of if hasattr(part, "to_dict") else type(part).get_vocab
        facts[name] = {"same settings": what(again) == what(part)}
    for kind in (hf_vlmerge.VlmoConfig, hf_vlmerge.UnivalConfig, hf_vlmerge.UnivalImageCodesConfig):
        config = kind(initializer_range=0.5)
        config.push_to_hub(f"org/{kind.__name__}")
        facts[kind.__name__] = {"same settings": kind.from_pretrained(f"org/{kind.__name__}").initializer_range == 0.5}
    complete = {"unival": "UnivalForConditionalGeneration", "vlmo": "VlmoForPreTraining"}  # as users load them
    for repo, name in complete.items():
        models[name][0].push_to_hub(f"org/{repo}")
        parts[f"{repo.capitalize()}Processor"].push_to_hub(f"org/{repo}")
    print(json.dumps(facts))


def facts_of(part) -> dict:
    """Settings of a part and its parts, without where it was loaded from and which code it names."""
    settings = part if isinstance(part, dict) else part.to_dict()
    kept = settings.keys() - {"auto_map", "_name_or_path"}
    return {k: facts_of(settings[k]) if isinstance(settings[k], dict) else settings[k] for k in kept}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
