"""The one error of this room, and the words that make it helpful."""

import difflib
from collections.abc import Iterable


class MergeError(ValueError):
    """Input that cannot be merged as asked; its message is one sentence for the user."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?``, or the list of choices when none is near and the list is short."""
    choices = sorted(map(str, choices))
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid are: {', '.join(choices)}" if 0 < len(choices) <= 12 else ""


def closest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Return the ``count`` names nearest to ``name``, for messages about tensors."""
    close = difflib.get_close_matches(name, list(choices), n=count, cutoff=0.3)
    return f" (closest: {', '.join(close)})" if close else ""
