"""`shapes`: scenes of coloured shapes with captions, questions and matching pairs, from a seed and nothing else."""

from hf_vlmerge.data.shapes.dataset import ShapesDataset
from hf_vlmerge.data.shapes.retrieval import RetrievalSet, retrieval_set
from hf_vlmerge.data.shapes.world import LEVELS, Scene, Thing, draw_scene, split_of

__all__ = ["LEVELS", "RetrievalSet", "Scene", "ShapesDataset", "Thing", "draw_scene", "retrieval_set", "split_of"]
