"""Merging: one output tensor is made from N input tensors, optionally with a base and statistics of the inputs."""

from .alignment import Alignment, align, align_experts
from .engine import merge, merge_tensors
from .errors import MergeError
from .measurement import DistanceReport, distance
from .objectives import Command, load_into
from .recipe import ExpertLayout, Recipe
from .registry import get_distance, get_merge_method, list_distances, list_merge_methods
from .report import MergeReport
from .search import SweepReport, sweep
from .sequential import regmean_plus_plus
from .statistics import Statistics, collect_fisher, collect_grams
from .survey import MergeabilityReport, mergeability
from .tensors import TensorSource, atomic_folder, open_source, save_checkpoint

__all__ = [
    "Alignment",
    "Command",
    "DistanceReport",
    "ExpertLayout",
    "MergeError",
    "MergeReport",
    "MergeabilityReport",
    "Recipe",
    "Statistics",
    "SweepReport",
    "TensorSource",
    "align",
    "align_experts",
    "atomic_folder",
    "collect_fisher",
    "collect_grams",
    "distance",
    "get_distance",
    "get_merge_method",
    "list_distances",
    "list_merge_methods",
    "load_into",
    "merge",
    "merge_tensors",
    "mergeability",
    "open_source",
    "regmean_plus_plus",
    "save_checkpoint",
    "sweep",
]
