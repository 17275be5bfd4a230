"""Where tensors come from (sources) and where they go (sinks)."""

from .sinks import atomic_folder, save_checkpoint
from .sources import TensorSource, open_source, sha256_of

__all__ = ["TensorSource", "atomic_folder", "open_source", "save_checkpoint", "sha256_of"]
