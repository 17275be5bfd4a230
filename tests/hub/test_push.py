"""`push_to_hub` and back, for every public class: the same bits and the same outputs, with the package and without it.

The Hub is one on the loopback interface, and each client a process of its own: the address is read at the first import.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from safetensors import safe_open

import hf_vlmerge
from tests.conftest import ROOT
from tests.hub_server import TOKEN, HubServer

MODELS = [
    "VlmoModel", "VlmoForPreTraining", "VlmoForImageAndTextRetrieval", "VlmoForQuestionAnswering",
    "VlmoForImagesAndTextClassification", "UnivalModel", "UnivalForConditionalGeneration", "UnivalImageCodes",
]  # fmt: skip
VLMO = {"AutoModel", "AutoModelForPreTraining", "AutoModelForVisualQuestionAnswering"}
VLMO |= {"AutoModelForZeroShotImageClassification", "AutoConfig"}
UNIVAL = {"AutoModel", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoConfig"}
# (Auto class, repository, inputs); the first two share a repository with their processors
LOADED = [
    ("AutoModelForPreTraining", "org/vlmo", "VlmoForPreTraining"),
    ("AutoModelForImageTextToText", "org/unival", "UnivalForConditionalGeneration"),
    ("AutoModelForSeq2SeqLM", "org/unival", "UnivalForConditionalGeneration"),
    ("AutoModelForVisualQuestionAnswering", "org/VlmoForQuestionAnswering", "VlmoForQuestionAnswering"),
    ("AutoModelForZeroShotImageClassification", "org/VlmoForImageAndTextRetrieval", "VlmoForImageAndTextRetrieval"),
    ("AutoModel", "org/VlmoModel", "VlmoModel"),
    ("AutoModel", "org/UnivalModel", "UnivalModel"),
]
LOAD = """
import json, sys
FIRST
import torch, transformers
from safetensors.torch import load_file
sys.path.insert(0, sys.argv[1])
from digest import digest
folder, loaded = sys.argv[1], json.loads(sys.argv[2])
options = {} if sys.modules.get("hf_vlmerge") else {"trust_remote_code": True}
facts = {}
try:
    has_image_processors = bool(transformers.AutoImageProcessor.register)
except ImportError:  # transformers 5.17 without torchvision refuses any use
    has_image_processors = False
for auto, repo, name in loaded:
    model = getattr(transformers, auto).from_pretrained(repo, **options).eval()
    with torch.no_grad():
        found = model(**load_file(f"{folder}/{name}.safetensors"))
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    facts[f"{auto} {name}"] = [type(model).__module__.split(".")[0], type(model).__name__, digest(tensors)]
    if auto == "AutoModelForImageTextToText":
        writer = model
names = ["AutoProcessor", "AutoTokenizer"]
if has_image_processors:
    names.append("AutoImageProcessor")
for repo, autos in {"org/unival": [*names, "AutoFeatureExtractor"], "org/vlmo": names}.items():
    parts = {auto: getattr(transformers, auto).from_pretrained(repo, **options) for auto in autos}
    inputs = parts["AutoProcessor"](text=["red circle"], images=[torch.zeros(3, 32, 32)])
    facts[repo] = [{auto: type(part).__name__ for auto, part in parts.items()}, digest(dict(inputs))]
    if repo == "org/unival":
        facts["generated"] = writer.generate(**inputs, num_beams=2, max_new_tokens=4).tolist()
print(json.dumps(facts))
"""


THEIR_WARNING = "ignore:Use 'content=:DeprecationWarning"  # the Hub's client about its own way to upload


def run(hub, home, *command, token=TOKEN):
    """What a fresh interpreter that knows this Hub only prints, as JSON."""
    environment = {**os.environ, **hub.environment(home, token), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-W", THEIR_WARNING, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The Hub after one of every class was pushed, the facts about each, and the folder of inputs."""
    folder = tmp_path_factory.mktemp("pushed")
    with HubServer() as hub:
        facts = run(hub, folder / "home", "-m", "tests.hub.push_everything", folder)
        yield SimpleNamespace(hub=hub, facts=facts, folder=folder)


def test_everything_comes_back_as_it_was(pushed):
    for name, facts in pushed.facts.items():
        assert not facts.pop("incomplete", None), name
        digest = facts.pop("digest", None)
        assert (digest is not None) == (name in MODELS)
        assert all(facts.values()), (name, facts)
        facts["digest"] = digest
    classes = {name for name in hf_vlmerge.__all__ if name.startswith(("Vlmo", "Unival"))}
    assert classes <= pushed.facts.keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_pushed_model_has_safetensors_a_card_and_its_code(name, pushed):
    files = pushed.hub.files(f"org/{name}")
    family = "vlmo" if name.startswith("Vlmo") else "unival"
    weights = {file for file in files if file.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5"))}
    assert weights == {"model.safetensors"} and "README.md" in files
    path = pushed.folder / "weights.safetensors"
    path.write_bytes(files["model.safetensors"])
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    assert ("generation_config.json" in files) == (name == "UnivalForConditionalGeneration")
    auto_map = json.loads(files["config.json"])["auto_map"]
    expected = {"AutoModel", "AutoConfig"} if name == "UnivalImageCodes" else VLMO if family == "vlmo" else UNIVAL
    assert auto_map.keys() == expected
    folder = ROOT / "src" / "hf_vlmerge" / "models" / family
    for module in {place.partition(".")[0] for place in auto_map.values()}:
        assert files[f"{module}.py"] == (folder / f"{module}.py").read_bytes()


def test_pushed_processors_name_their_classes(pushed):
    unival = json.loads(pushed.hub.files("org/unival")["processor_config.json"])
    assert unival["auto_map"]["AutoProcessor"] == "processing_unival.UnivalProcessor"
    assert unival["image_processor"]["auto_map"]["AutoImageProcessor"] == "image_processing_unival.UnivalImageProcessor"
    extractor = unival["feature_extractor"]["auto_map"]["AutoFeatureExtractor"]
    assert extractor == "feature_extraction_unival.UnivalFeatureExtractor"
    vlmo = json.loads(pushed.hub.files("org/vlmo")["processor_config.json"])
    assert vlmo["auto_map"]["AutoProcessor"] == "processing_vlmo.VlmoProcessor"
    assert vlmo["image_processor"]["auto_map"]["AutoImageProcessor"] == "image_processing_vlmo.VlmoImageProcessor"


def test_a_private_model_is_private(pushed):
    assert pushed.hub.private == {"org/UnivalModel"}


def test_the_auto_classes_load_it_with_the_package_and_as_remote_code(pushed):
    source = (ROOT / "tests" / "hub" / "push_everything.py").read_text()
    function = source[source.index("def digest") : source.index("def is_same")]
    (pushed.folder / "digest.py").write_text(f"import hashlib\nimport torch\n{function}")  # for who has no package
    codes = ("AutoModel", "org/UnivalImageCodes", "UnivalImageCodes")  # no Auto class of the package knows it

    def load(home, first, loaded):
        return run(pushed.hub, home, "-c", LOAD.replace("FIRST", first), pushed.folder, json.dumps(loaded))

    with ThreadPoolExecutor() as both:
        local = both.submit(load, pushed.folder / "local", "import hf_vlmerge", LOADED)
        blocked = 'sys.modules["hf_vlmerge"] = None'
        remote = both.submit(load, pushed.folder / "remote", blocked, [*LOADED, codes])
        local, remote = local.result(), remote.result()
    for auto, _, name in LOADED:
        module, class_name, digest = local[f"{auto} {name}"]
        assert (module, class_name, digest) == ("hf_vlmerge", name, pushed.facts[name]["digest"])
        assert remote[f"{auto} {name}"] == ["transformers_modules", name, digest]
    codes = remote.pop("AutoModel UnivalImageCodes")
    assert codes == ["transformers_modules", "UnivalImageCodes", pushed.facts["UnivalImageCodes"]["digest"]]
    for what in ("org/unival", "org/vlmo", "generated"):
        assert remote[what] == local[what]
    for family, parts in (("Unival", local["org/unival"][0]), ("Vlmo", local["org/vlmo"][0])):
        ours = {auto: name for auto, name in parts.items() if auto != "AutoTokenizer"}
        assert ours == {auto: auto.replace("Auto", family) for auto in ours} and "AutoProcessor" in ours
