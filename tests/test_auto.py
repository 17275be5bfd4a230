"""`import hf_vlmerge` is cheap, and the Auto classes work whatever is imported first (each case: a new interpreter)."""

import os
import subprocess
import sys
import tempfile

import pytest

ENV = os.environ | {"HF_MODULES_CACHE": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1"}  # remote code is copied there
IMPORT_ORDERS = [
    "import hf_vlmerge",
    "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor\nimport hf_vlmerge",
    "from hf_vlmerge import VlmoProcessor",
]
MORE_IMPORT_ORDERS = [
    "import transformers\nimport hf_vlmerge",
    "import transformers.models.auto.configuration_auto\nimport hf_vlmerge",
    "import transformers.models.auto.modeling_auto\nimport hf_vlmerge",
    "import hf_vlmerge\nimport transformers.models.auto.processing_auto",
    "import hf_vlmerge\nimport transformers.models.auto.image_processing_auto",
    "import hf_vlmerge\nfrom transformers import Trainer, pipeline",
    "from hf_vlmerge import VlmoImageProcessor",
    "from hf_vlmerge import VlmoForPreTraining",
]

LOOK_UPS = """
import sys
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining, AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification, AutoProcessor,
)
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder)
found = [
    AutoProcessor.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder), config,
    AutoModel.from_pretrained(folder), AutoModelForPreTraining.from_pretrained(folder),
    AutoModelForVisualQuestionAnswering.from_config(config),
    AutoModelForZeroShotImageClassification.from_config(config),
]
print(*(type(part).__name__ for part in found))
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True, timeout=200, env=ENV
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A folder with a tiny model and its processor, written by our classes."""
    from transformers import BertTokenizer

    from hf_vlmerge import VlmoConfig, VlmoForPreTraining, VlmoImageProcessor, VlmoProcessor

    folder = tmp_path_factory.mktemp("vlmo")
    config = VlmoConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=16,
        patch_size=8, max_text_length=4, num_text_positions=4, num_fusion_layers=1, expert_modules=["ffn"],
    )  # fmt: skip
    VlmoForPreTraining(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    image_processor = VlmoImageProcessor(size={"height": 16, "width": 16})
    VlmoProcessor(image_processor, tokenizer, max_text_length=4).save_pretrained(folder)
    return str(folder)


@pytest.mark.usefixtures("auto_image_processor")
@pytest.mark.parametrize(
    "imports", [*IMPORT_ORDERS, *(pytest.param(order, marks=pytest.mark.slow) for order in MORE_IMPORT_ORDERS)]
)
def test_auto_classes_find_our_classes_in_every_import_order(imports, checkpoint):
    assert run(imports + "\n" + LOOK_UPS, checkpoint).split() == [
        "VlmoProcessor", "VlmoImageProcessor", "VlmoConfig", "VlmoModel", "VlmoForPreTraining",
        "VlmoForQuestionAnswering", "VlmoForImageAndTextRetrieval",
    ]  # fmt: skip


def test_a_configuration_made_before_the_auto_classes_were_imported_is_known_to_them():
    code = """
from hf_vlmerge import VlmoConfig
config = VlmoConfig(vocab_size=6, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
                    image_size=16, patch_size=8, max_text_length=4, num_text_positions=4, num_fusion_layers=1)
from transformers import AutoModel
print(type(AutoModel.from_config(config)).__name__)
"""
    assert run(code).split() == ["VlmoModel"]


def test_a_folder_with_remote_code_gives_the_same_outputs_without_the_package(checkpoint, tmp_path):
    import shutil

    from hf_vlmerge.auto import add_remote_code

    folder = shutil.copytree(checkpoint, tmp_path / "with_code")
    add_remote_code(folder)
    code = """
import sys, torch
INSTALLED
from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor
folder = sys.argv[1]
options = {} if "hf_vlmerge" in sys.modules and sys.modules["hf_vlmerge"] else {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, **options)
inputs = processor(text=["red"], images=[torch.zeros(3, 16, 16)], padding="max_length")
for auto in (AutoModel, AutoModelForPreTraining):
    model = auto.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        output = model(**inputs)
    print(type(model).__name__, output[0].double().sum().item(), output[1].double().sum().item())
print(type(model).__module__.split(".")[0])
"""
    remote = run(code.replace("INSTALLED", 'sys.modules["hf_vlmerge"] = None'), str(folder)).split("\n")
    local = run(code.replace("INSTALLED", "import hf_vlmerge"), str(folder)).split("\n")
    assert remote[:2] == local[:2]
    assert (remote[2], local[2]) == ("transformers_modules", "hf_vlmerge")


def test_the_table_of_classes_is_that_of_the_models():
    from importlib import import_module

    from hf_vlmerge.auto import FAMILIES

    for name, family in FAMILIES.items():
        travelling = import_module(f"hf_vlmerge.models.{name}.configuration_{name}").AUTO_MAP
        models = {auto: f"modeling_{name}.{model}" for auto, model in family.models.items()}
        assert travelling == {"AutoConfig": f"configuration_{name}.{family.config}", **models}


def test_remote_code_is_for_our_models_only(tmp_path):
    from hf_vlmerge.auto import add_remote_code

    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    add_remote_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == '{"model_type": "bert"}'


def test_the_import_is_cheap():
    heavy = {"torch", "transformers", "numpy", "huggingface_hub", "typer"}
    assert run(f"import sys, hf_vlmerge; print({heavy} & set(sys.modules))").strip() == "set()"


def test_every_public_name_is_there_and_a_wrong_one_is_an_attribute_error():
    import hf_vlmerge

    for name in hf_vlmerge.__all__:
        assert getattr(hf_vlmerge, name) is not None
        assert name in dir(hf_vlmerge)
    with pytest.raises(AttributeError, match="VlmoModle"):
        _ = hf_vlmerge.VlmoModle
