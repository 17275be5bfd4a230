"""The Auto classes find UnIVAL by name, installed and as remote code (each case: a new interpreter)."""

import json

import pytest
import torch

from hf_vlmerge.auto import add_remote_code
from hf_vlmerge.models.unival.configuration_unival import UnivalConfig
from hf_vlmerge.models.unival.modeling_unival import UnivalForConditionalGeneration
from tests.conftest import ROOT
from tests.models.unival.tiny import tiny_model
from tests.models.unival.tiny_processor import tiny_processor
from tests.test_auto import run

LOOK_UPS = """
import sys, torch
FIRST
from transformers import (
    AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForSeq2SeqLM,
    AutoProcessor,
)
folder = sys.argv[1]
options = {} if "hf_vlmerge" in sys.modules and sys.modules["hf_vlmerge"] else {"trust_remote_code": True}
parts = (AutoConfig, AutoProcessor, AutoImageProcessor, AutoFeatureExtractor)
autos = (AutoModel, AutoModelForSeq2SeqLM, AutoModelForImageTextToText)
found = [auto.from_pretrained(folder, **options) for auto in (*parts, *autos)]
print(*(type(part).__name__ for part in found))
inputs = found[1](text=[" red"], images=[torch.zeros(3, 32, 32)])
with torch.no_grad():
    print(found[4](**inputs)[0].double().sum().item(), found[5](**inputs).logits.double().sum().item())
    print(found[6].generate(**inputs, num_beams=2, max_new_tokens=4).tolist())
print(type(found[6]).__module__.split(".")[0])
"""
NAMES = [
    "UnivalConfig", "UnivalProcessor", "UnivalImageProcessor", "UnivalFeatureExtractor", "UnivalModel",
    "UnivalForConditionalGeneration", "UnivalForConditionalGeneration",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A folder with a tiny model, its processor and the source files."""
    folder = tmp_path_factory.mktemp("unival")
    processor = tiny_processor()
    tiny_model(UnivalForConditionalGeneration, vocab_size=len(processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    add_remote_code(folder)
    return str(folder)


@pytest.mark.usefixtures("auto_image_processor")
def test_installed_and_remote_code_give_the_same(checkpoint):
    remote = run(LOOK_UPS.replace("FIRST", 'sys.modules["hf_vlmerge"] = None'), checkpoint).split("\n")
    local = run(LOOK_UPS.replace("FIRST", "import hf_vlmerge"), checkpoint).split("\n")
    assert local[0].split() == NAMES
    assert remote[:3] == local[:3]
    assert (remote[3], local[3]) == ("transformers_modules", "hf_vlmerge")


@pytest.mark.usefixtures("auto_image_processor")
def test_transformers_may_be_imported_first(checkpoint):
    first = "from transformers import AutoConfig, AutoModelForSeq2SeqLM\nimport hf_vlmerge"
    assert run(LOOK_UPS.replace("FIRST", first), checkpoint).split()[:7] == NAMES


@torch.no_grad()
def test_the_image_text_pipeline(checkpoint):
    from PIL import Image
    from transformers import pipeline

    from hf_vlmerge import UnivalProcessor

    processor = UnivalProcessor.from_pretrained(checkpoint)
    model = UnivalForConditionalGeneration.from_pretrained(checkpoint)
    describe = pipeline("image-text-to-text", model=model, processor=processor)
    image = Image.new("RGB", (48, 40), "red")
    prompt = " what does the image describe?"
    found = describe(images=image, text=prompt, max_new_tokens=4, return_full_text=False)
    ids = model.generate(**processor(images=[image], text=[prompt]), max_new_tokens=4)
    assert found[0]["generated_text"] == processor.batch_decode(ids, skip_special_tokens=True)[0]


def test_the_configuration_of_the_hub_is_the_default():
    stored = json.loads((ROOT / "hub_configs" / "unival" / "base" / "config.json").read_text())
    assert stored.pop("architectures") == ["UnivalForConditionalGeneration"]
    made = json.loads(UnivalConfig().to_json_string())
    made.pop("transformers_version")
    assert stored == made
