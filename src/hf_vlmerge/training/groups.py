"""Which parameters are decayed, and which belong to a head that learns faster."""

import re

from torch import nn

# Norms that the released code exempts: it goes by names, and those of per-modality copies are not among them.
RELEASED_NORMS = re.compile(
    r"(^|\.)(norm[12]\.shared|encoder\.norm|embeddings\.text\.layer_norm|mlm_head\.layer_norm)\.weight$"
)


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def decayed_parameters(model: nn.Module, as_released: bool = False) -> list[str]:
    """
    Names of the parameters under weight decay.

    Exempt are biases (by name, and so VLMo's table of relative positions) and all norms. The released code of Sung et
    al. 2023 decays the norms of per-modality experts and the one in the classifier, since its list of exempt names does
    not match them; `as_released` does the same.
    """
    norms = {
        f"{name}.{parameter}" if name else parameter
        for name, module in model.named_modules()
        if isinstance(module, NORMS)
        for parameter, _ in module.named_parameters(recurse=False)
    }
    if as_released:
        norms = {name for name in norms if RELEASED_NORMS.search(name)}
    return [name for name, _ in model.named_parameters() if "bias" not in name.rsplit(".", 1)[-1] and name not in norms]


def head_parameters(model: nn.Module, prefix: str = "classifier.") -> list[str]:
    """Names of the parameters that get the head's learning rate: the classifier (VQA, NLVR2), not the pooler."""
    return [name for name, _ in model.named_parameters() if name.startswith(prefix)]
