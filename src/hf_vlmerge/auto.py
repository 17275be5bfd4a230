"""Makes the Auto classes of `transformers` know our models, in any import order, without importing `transformers`.

`transformers` has no plug-in entry point, so a package has to call `AutoConfig.register` and its relatives itself.
Doing that at import would load torch. Instead, `install()` waits for the following modules and acts once, right after
each has run:

* `configuration_auto`: register our configuration classes;
* our own `configuration_<family>`: wrap `__init__`, so that the first instance registers the model classes. Every
  look-up of a model class holds a configuration instance, and by then `modeling_auto` can be imported without a circle;
* `processing_auto`, `image_processing_auto` and `feature_extraction_auto`: register the processors, which are looked
  up by name alone.

A module that has already run is acted upon at once.

Where this package is not installed, `trust_remote_code=True` is the other road: our classes save their source files and
`auto_map` with everything else, and `add_remote_code` puts both into a folder that no class of ours wrote.
"""

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class Family(NamedTuple):
    """Class names of one model family; they live in `hf_vlmerge/models/<model_type>/<kind>_<model_type>.py`."""

    config: str
    models: dict[str, str]  # Auto class -> our class; as in `AUTO_MAP`, which travels with the model
    image_processor: str
    processor: str
    feature_extractor: str = ""


FAMILIES = {
    "vlmo": Family(
        config="VlmoConfig",
        models={
            "AutoModel": "VlmoModel",
            "AutoModelForPreTraining": "VlmoForPreTraining",
            "AutoModelForVisualQuestionAnswering": "VlmoForQuestionAnswering",
            "AutoModelForZeroShotImageClassification": "VlmoForImageAndTextRetrieval",
        },
        image_processor="VlmoImageProcessor",
        processor="VlmoProcessor",
    ),
    "unival": Family(
        config="UnivalConfig",
        models={
            "AutoModel": "UnivalModel",
            "AutoModelForImageTextToText": "UnivalForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "UnivalForConditionalGeneration",
        },
        image_processor="UnivalImageProcessor",
        processor="UnivalProcessor",
        feature_extractor="UnivalFeatureExtractor",
    ),
}


def add_remote_code(folder: "Path | str") -> None:
    """
    Make a folder of one of our models load with `trust_remote_code=True` where this package is not installed.

    Copies the family's source files into it and names the classes in the `auto_map` of config.json and of the
    processor's files. A folder of another model, or of weights alone, is left as it is.
    """
    import json
    import shutil
    from pathlib import Path

    folder = Path(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        return
    family = FAMILIES[model_type]
    for source in sorted((Path(__file__).parent / "models" / model_type).glob(f"*_{model_type}.py")):
        shutil.copyfile(source, folder / source.name)

    def names(kind: str, classes: dict[str, str]) -> dict[str, str]:
        return {auto: f"{kind}_{model_type}.{name}" for auto, name in classes.items()}

    image_processor = names("image_processing", {"AutoImageProcessor": family.image_processor})
    feature_extractor = {}
    if family.feature_extractor:
        feature_extractor = names("feature_extraction", {"AutoFeatureExtractor": family.feature_extractor})
    processor = names("processing", {"AutoProcessor": family.processor})
    models = names("configuration", {"AutoConfig": family.config}) | names("modeling", family.models)
    maps = {
        "config.json": models,
        "preprocessor_config.json": image_processor,
        "processor_config.json": processor,
        "tokenizer_config.json": processor,
    }
    for name, auto_map in maps.items():
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": auto_map}
            for part, classes in (("image_processor", image_processor), ("feature_extractor", feature_extractor)):
                if part in content:  # nested in processor_config.json
                    content[part]["auto_map"] = classes | processor
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def install() -> None:
    """Arrange the registrations. Idempotent; imports nothing that is not imported already."""
    actions: dict[str, Callable[[], None]] = {
        "transformers.models.auto.configuration_auto": _register_configs,
        "transformers.models.auto.feature_extraction_auto": _register_feature_extractors,
        "transformers.models.auto.image_processing_auto": _register_image_processors,
        "transformers.models.auto.processing_auto": _register_processors,
    }
    for model_type in FAMILIES:
        actions[_module_name(model_type, "configuration")] = functools.partial(
            _register_models_at_first_use, model_type
        )
    waiting = {name: action for name, action in actions.items() if name not in sys.modules}
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))
    for name, action in actions.items():
        if name not in waiting:
            action()


class _AfterImport:
    """Entry of `sys.meta_path` that finds the modules it waits for as the other finders would, and calls their action
    once when they have run. (It does not derive from `importlib.abc.MetaPathFinder`: that import takes 30 ms.)"""

    def __init__(self, actions: dict[str, Callable[[], None]]):
        self.actions = actions

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            action = self.actions.pop(fullname, None)
            if not self.actions and self in sys.meta_path:
                sys.meta_path.remove(self)
            if action is not None:
                action()

        spec.loader.exec_module = exec_module
        return spec


def _module_name(model_type: str, kind: str) -> str:
    return f"hf_vlmerge.models.{model_type}.{kind}_{model_type}"


def _load(model_type: str, kind: str, name: str) -> type:
    return getattr(import_module(_module_name(model_type, kind)), name)


def _auto(name: str, module: str) -> type:
    return getattr(import_module(f"transformers.models.auto.{module}"), name)


def _register_configs() -> None:
    for model_type, family in FAMILIES.items():
        config = _load(model_type, "configuration", family.config)
        _auto("AutoConfig", "configuration_auto").register(model_type, config, exist_ok=True)


def _register_models_at_first_use(model_type: str) -> None:
    config = _load(model_type, "configuration", FAMILIES[model_type].config)
    init = config.__init__

    @functools.wraps(init)
    def init_and_register(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if config.__init__ is init_and_register:
            config.__init__ = init
            _register_models(model_type, config)

    config.__init__ = init_and_register


def _register_models(model_type: str, config: type) -> None:
    for auto_class, name in FAMILIES[model_type].models.items():
        model = _load(model_type, "modeling", name)
        _auto(auto_class, "modeling_auto").register(config, model, exist_ok=True)


def _register_image_processors() -> None:
    for model_type, family in FAMILIES.items():
        config = _load(model_type, "configuration", family.config)
        image_processor = _load(model_type, "image_processing", family.image_processor)
        try:
            _auto("AutoImageProcessor", "image_processing_auto").register(
                config, image_processor_classes={"pil": image_processor}, exist_ok=True
            )
        except ImportError:
            # transformers 5.17 refuses any use of AutoImageProcessor without torchvision: nothing to register with.
            return


def _register_feature_extractors() -> None:
    for model_type, family in FAMILIES.items():
        if family.feature_extractor:
            config = _load(model_type, "configuration", family.config)
            feature_extractor = _load(model_type, "feature_extraction", family.feature_extractor)
            auto = _auto("AutoFeatureExtractor", "feature_extraction_auto")
            auto.register(config, feature_extractor, exist_ok=True)


def _register_processors() -> None:
    for model_type, family in FAMILIES.items():
        config = _load(model_type, "configuration", family.config)
        processor = _load(model_type, "processing", family.processor)
        _auto("AutoProcessor", "processing_auto").register(config, processor, exist_ok=True)
