"""Collators: examples with an image and a text become a model's batch."""

from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from hf_vlmerge.data.masking import WholeWordMasking


class VlmoCollator:
    """
    Image and text of each example as model inputs.

    Args:
        tokenizer: any tokenizer with `[CLS]`-like first tokens.
        image_processor: makes `pixel_values` from images; not needed where examples carry `pixel_values`
            (float as the model takes them, or uint8, which is scaled to [-1, 1]).
        max_length: tokens that a text is cut to.
        padding: `longest` of the batch, which changes no output and saves work, or `max_length`.
        image_column, text_column: names in the examples. Of a text that is a list of strings one is drawn at random.
        augmentation: changes uint8 images (B, 3, H, W) and gives floats, as `Augmentation`; for training only.
        seed: of a generator of the collator's own; without it torch's is used, which the Trainer seeds, saves and
            restores.

    An example may carry `input_ids` in place of the text. Examples may also come as one mapping of ready tensors
    (`input_ids`, `attention_mask`, `pixel_values`), as data sets in memory give them.

    Shapes:
        -> input_ids, attention_mask (B, T); pixel_values (B, 3, H, W)
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Callable | None = None,
        max_length: int = 40,
        padding: str = "longest",
        image_column: str = "image",
        text_column: str = "text",
        augmentation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        seed: int | None = None,
    ):
        if padding not in ("longest", "max_length"):
            raise ValueError(f"padding is {padding!r}; expected longest or max_length.")
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.max_length, self.padding = max_length, padding
        self.image_column, self.text_column = image_column, text_column
        self.augmentation = augmentation
        self.seed, self._generator = seed, None

    def __call__(self, examples: Sequence[Mapping] | Mapping) -> dict[str, torch.Tensor]:
        if isinstance(examples, Mapping):
            batch = dict(examples)
        else:
            batch = {**self.texts(examples), "pixel_values": self.images(examples)}
        batch["pixel_values"] = (self.augmentation or scaled)(batch["pixel_values"])
        return batch

    @property
    def generator(self) -> torch.Generator | None:
        """The collator's own generator, one a worker process; None if it has no seed."""
        if self.seed is not None and self._generator is None:
            worker = torch.utils.data.get_worker_info()
            self._generator = torch.Generator().manual_seed(self.seed + (1_000_003 * (worker.id + 1) if worker else 0))
        return self._generator

    def texts(self, examples: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        length = {"padding": self.padding, "max_length": self.max_length}
        if "input_ids" in examples[0]:
            ids = {"input_ids": [list(example["input_ids"]) for example in examples]}
            encoded = self.tokenizer.pad(ids, return_tensors="pt", **length)
        else:
            texts = [self.one_text(example) for example in examples]
            encoded = self.tokenizer(texts, truncation=True, return_tensors="pt", **length)
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def one_text(self, example: Mapping) -> str:
        text = column(example, self.text_column)
        if isinstance(text, str):
            return text
        return text[int(torch.randint(len(text), (), generator=self.generator))]

    def images(self, examples: Sequence[Mapping]) -> torch.Tensor:
        if "pixel_values" in examples[0]:
            return torch.stack([torch.as_tensor(example["pixel_values"]) for example in examples])
        if self.image_processor is None:
            raise ValueError("the examples hold images, so the collator needs an image_processor; got none.")
        images = [column(example, self.image_column) for example in examples]
        return self.image_processor(images, return_tensors="pt")["pixel_values"]


def column(example: Mapping, name: str):
    if name not in example:
        raise ValueError(f"an example has no column {name!r}; it has: {', '.join(map(str, example))}.")
    return example[name]


def scaled(pixel_values: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1]; floats as they are."""
    return pixel_values.float().div_(127.5).sub_(1) if pixel_values.dtype == torch.uint8 else pixel_values


class VlmoPreTrainingCollator(VlmoCollator):
    """
    Adds `mlm_input_ids` and `labels` for masked language modelling; see `WholeWordMasking` for the last two arguments.

    The original masks 15 % in the paper and 25 % in its published commands.
    """

    def __init__(
        self, tokenizer, image_processor=None, mask_probability: float = 0.15, count_padding: bool = False, **kwargs
    ):
        super().__init__(tokenizer, image_processor, **kwargs)
        self.masking = WholeWordMasking(tokenizer, mask_probability, count_padding)

    def __call__(self, examples) -> dict[str, torch.Tensor]:
        batch = super().__call__(examples)
        masked, labels = self.masking(batch["input_ids"], batch["attention_mask"], self.generator)
        return {**batch, "mlm_input_ids": masked, "labels": labels}


class VlmoRetrievalCollator(VlmoCollator):
    """Asks the retrieval model for its contrastive loss."""

    def __call__(self, examples) -> dict:
        return {**super().__call__(examples), "return_loss": True}


class VlmoQuestionAnsweringCollator(VlmoCollator):
    """
    Adds `labels`: answer ids (B,), or soft scores (B, num_labels), as the examples have them.

    Args:
        label_column: name in the examples.
    """

    def __init__(self, tokenizer, image_processor=None, label_column: str = "label", **kwargs):
        super().__init__(tokenizer, image_processor, **kwargs)
        self.label_column = label_column

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        labels = torch.as_tensor([column(example, self.label_column) for example in examples])
        return {**super().__call__(examples), "labels": labels}
