"""Image-text retrieval of a model that embeds each modality on its own."""

from collections.abc import Callable, Sequence

import torch
from tqdm.auto import tqdm

from hf_vlmerge.metrics import recall_at_k


def evaluate_retrieval(
    model: torch.nn.Module,
    images: torch.Tensor | Sequence,
    texts: dict[str, torch.Tensor] | Sequence[str],
    image_of_text=None,
    *,
    processor: Callable | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> dict[str, float]:
    """
    Recall at 1, 5 and 10 in both directions over all images and texts given (Sung et al. 2023, section 4.1).

    Args:
        model: its output has `image_embeds` when it gets `pixel_values` alone, `text_embeds` when it gets `input_ids`
            and `attention_mask` alone, of unit length. Left in the mode (training, evaluation) that it was in.
        images: pixel values (images, 3, H, W), or images for the processor.
        texts: `input_ids` and `attention_mask` (texts, T), or strings for the processor.
        image_of_text: (texts,) the image of each text; without it text i belongs to image i.
        processor: needed where images or texts are not tensors yet.
        batch_size: rows a forward pass.

    Returns:
        `tr_r1` ... `ir_r10`, `tr_mean`, `ir_mean`, `mean`; see `recall_at_k`.
    """
    was_training = model.training
    model.eval()
    try:
        image_embeds = embed_all(model, "images", images, processor, batch_size, progress)
        text_embeds = embed_all(model, "text", texts, processor, batch_size, progress)
    finally:
        model.train(was_training)
    if image_of_text is None:
        if len(image_embeds) != len(text_embeds):
            raise ValueError(
                f"{len(image_embeds)} images and {len(text_embeds)} texts: expected image_of_text, which says to which "
                "image each text belongs."
            )
        image_of_text = range(len(text_embeds))
    return recall_at_k((image_embeds @ text_embeds.t()).numpy(), list(image_of_text))


@torch.inference_mode()
def embed_all(model, kind: str, items, processor, batch_size: int, progress: bool) -> torch.Tensor:
    """Embeddings of all `images` or all `text` on the CPU, in float32: (items, D)"""
    field = {"images": "image_embeds", "text": "text_embeds"}[kind]
    device = next(model.parameters()).device
    count = len(items["input_ids"]) if isinstance(items, dict) else len(items)
    parts = []
    for start in tqdm(range(0, count, batch_size), desc=f"embedding {kind}", disable=not progress, leave=False):
        rows = slice(start, start + batch_size)
        if isinstance(items, dict):
            inputs = {name: value[rows] for name, value in items.items()}
        elif isinstance(items, torch.Tensor):
            inputs = {"pixel_values": items[rows]}
        elif processor is None:
            raise ValueError(f"the {kind} are not tensors, so a processor is needed; got none.")
        else:
            inputs = processor(**{kind: list(items[rows])}, return_tensors="pt")
        output = model(**{name: value.to(device) for name, value in inputs.items()})
        parts.append(output[field].float().cpu())
    return torch.cat(parts)
