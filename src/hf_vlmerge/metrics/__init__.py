"""Metrics: one file a metric, a plain function of the file's name."""

from importlib import import_module
from pathlib import Path

# The folder is the list: a new metric is one new file with a function of the same name.
__all__ = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))

for _name in __all__:  # at once, so that no later import of a file can put the module in its function's place
    globals()[_name] = getattr(import_module(f"{__name__}.{_name}"), _name)
