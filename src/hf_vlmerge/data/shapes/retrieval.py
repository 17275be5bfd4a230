"""Retrieval sets: scenes with pairwise different captions, and the recall that a perfect model would reach."""

from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from hf_vlmerge.data.shapes.captions import Caption, canonical_caption, satisfies
from hf_vlmerge.data.shapes.render import render
from hf_vlmerge.data.shapes.world import LEVELS, SPLITS, Scene, checked, generator_for, scenes_of


@dataclass(frozen=True)
class RetrievalSet:
    """
    Shapes:
        images (N, image_size, image_size, 3), uint8; texts N strings, text i belongs to image i;
        image_of_text (N,); ceiling: recall by name (`tr_r1` ... `ir_r10`, `mean`), as fractions
    """

    images: np.ndarray
    texts: list[str]
    image_of_text: np.ndarray
    ceiling: dict[str, float]


def retrieval_set(
    num_images: int = 512,
    split: str = "test",
    level: str = "easy",
    image_size: int = 48,
    seed: int = 0,
    noise: float = 10.0,
    progress: bool = False,
) -> RetrievalSet:
    """Scenes of a split that no two share the canonical caption, each with that caption."""
    checked(split, SPLITS, "split"), checked(level, LEVELS, "level")
    if num_images < 1:
        raise ValueError(f"expected num_images >= 1; got {num_images}.")
    scenes, captions, images, seen = [], [], [], set()
    index = 0
    with tqdm(total=num_images, desc="drawing the retrieval set", leave=False, disable=not progress) as bar:
        while len(scenes) < num_images:
            random = generator_for(seed, f"{split}/{level}/retrieval", index)
            scene = next(scenes_of(random, level, split))
            caption = canonical_caption(scene)
            index += 1
            if caption.text not in seen:
                seen.add(caption.text)
                scenes.append(scene), captions.append(caption)
                images.append(render(scene, random, image_size, noise))
                bar.update()
            elif index > 100 * num_images:
                raise ValueError(
                    f"the {split} split of level {level} has not {num_images} scenes with different captions; "
                    f"{len(scenes)} were found."
                )
    texts = [caption.text for caption in captions]
    return RetrievalSet(np.stack(images), texts, np.arange(num_images), recall_ceiling(scenes, captions))


def recall_ceiling(scenes: list[Scene], captions: list[Caption], ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """
    Expected recall of a model that knows all the facts, caption i being of scene i.

    A caption may be true of several scenes, which even that model cannot tell apart: among m candidates that all fit,
    the right one is in the top k with probability min(1, k / m).
    """
    true = np.array([[satisfies(scene, caption) for caption in captions] for scene in scenes])
    ceiling = {}
    for direction, candidates in (("tr", true.sum(1)), ("ir", true.sum(0))):
        ceiling |= {f"{direction}_r{k}": float(np.minimum(1, k / candidates).mean()) for k in ks}
    ceiling["mean"] = sum(ceiling.values()) / len(ceiling)
    return ceiling
