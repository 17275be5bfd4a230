"""`import hf_vlmerge` is cheap, and the Auto classes work whatever is imported first (each case: a new interpreter)."""

import subprocess
import sys

import pytest

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
        [sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True, timeout=200
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
    VlmoProcessor(VlmoImageProcessor(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return str(folder)


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


def test_the_import_is_cheap():
    code = """
import sys, time
start = time.perf_counter()
import hf_vlmerge
print(time.perf_counter() - start, "torch" in sys.modules, "transformers" in sys.modules)
"""
    best = min((run(code).split() for _ in range(3)), key=lambda words: float(words[0]))
    assert best[1:] == ["False", "False"]
    assert float(best[0]) < 0.1  # seconds


def test_every_public_name_is_there_and_a_wrong_one_is_an_attribute_error():
    import hf_vlmerge

    for name in hf_vlmerge.__all__:
        assert getattr(hf_vlmerge, name) is not None
        assert name in dir(hf_vlmerge)
    with pytest.raises(AttributeError, match="VlmoModle"):
        _ = hf_vlmerge.VlmoModle
