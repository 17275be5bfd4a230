"""Merge multimodal transformers and publish the result on the Hugging Face Hub.

Importing this package costs milliseconds: the public names below are loaded when they are first used, and
`hf_vlmerge.auto` only leaves a note for the Auto classes, so neither torch nor transformers is imported here.
"""

from importlib import import_module

from hf_vlmerge import auto

__version__ = "0.1.0"

# Public name -> the module that defines it.
_MODULE_OF = {
    "VlmoConfig": "hf_vlmerge.models.vlmo.configuration_vlmo",
    "VlmoModel": "hf_vlmerge.models.vlmo.modeling_vlmo",
    "VlmoForPreTraining": "hf_vlmerge.models.vlmo.modeling_vlmo",
    "VlmoForImageAndTextRetrieval": "hf_vlmerge.models.vlmo.modeling_vlmo",
    "VlmoForQuestionAnswering": "hf_vlmerge.models.vlmo.modeling_vlmo",
    "VlmoForImagesAndTextClassification": "hf_vlmerge.models.vlmo.modeling_vlmo",
    "VlmoImageProcessor": "hf_vlmerge.models.vlmo.image_processing_vlmo",
    "VlmoProcessor": "hf_vlmerge.models.vlmo.processing_vlmo",
    "UnivalConfig": "hf_vlmerge.models.unival.configuration_unival",
    "UnivalModel": "hf_vlmerge.models.unival.modeling_unival",
    "UnivalForConditionalGeneration": "hf_vlmerge.models.unival.modeling_unival",
    "UnivalImageCodes": "hf_vlmerge.models.unival.image_codes_unival",
    "UnivalImageCodesConfig": "hf_vlmerge.models.unival.configuration_image_codes_unival",
    "UnivalImageProcessor": "hf_vlmerge.models.unival.image_processing_unival",
    "UnivalFeatureExtractor": "hf_vlmerge.models.unival.feature_extraction_unival",
    "UnivalProcessor": "hf_vlmerge.models.unival.processing_unival",
    "Recipe": "hf_vlmerge.merging",
    "merge": "hf_vlmerge.merging",
    "distance": "hf_vlmerge.merging",
    "publish": "hf_vlmerge.hub.publish",
}

__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


auto.install()
