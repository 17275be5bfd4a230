"""Merging: one output tensor is made from N input tensors, optionally with a base and statistics of the inputs."""

from .engine import merge, merge_tensors
from .errors import MergeError
from .measurement import DistanceReport, distance
from .recipe import ExpertLayout, Recipe
from .registry import get_distance, get_merge_method, list_distances, list_merge_methods
from .report import MergeReport
from .statistics import GramStatistics, collect_grams
from .tensors import TensorSource, atomic_folder, open_source, save_checkpoint

__all__ = [
    "DistanceReport",
    "ExpertLayout",
    "GramStatistics",
    "MergeError",
    "MergeReport",
    "Recipe",
    "TensorSource",
    "atomic_folder",
    "collect_grams",
    "distance",
    "get_distance",
    "get_merge_method",
    "list_distances",
    "list_merge_methods",
    "merge",
    "merge_tensors",
    "open_source",
    "save_checkpoint",
]
