"""Statistics of models on data, which RegMean and Fisher merging need: collected once, kept as files."""

from .files import Statistics, statistic_key, token_count
from .fisher import collect_fisher
from .grams import collect_grams

__all__ = ["Statistics", "collect_fisher", "collect_grams", "statistic_key", "token_count"]
