"""Arguments of training, with the values of Sung et al. 2023 as defaults."""

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class LossArguments:
    """What of UnIVAL's loss is decided for a run, beside label smoothing; see `objectives`."""

    encouraging_log_end: float | None = field(
        default=None, metadata={"help": "Encouraging loss of UnIVAL, with a tangent beyond this probability (0.75)."}
    )
    drop_worst_ratio: float = field(
        default=0.0, metadata={"help": "Share of the target tokens with the highest loss that is left out (UnIVAL)."}
    )
    drop_worst_after: int = field(default=0, metadata={"help": "Steps after which the worst tokens are left out."})
    rdrop_alpha: float = field(default=0.0, metadata={"help": "Factor of the divergence of R-drop (UnIVAL)."})


@dataclass
class VlmergeTrainingArguments(LossArguments, TrainingArguments):
    """
    `TrainingArguments` with the papers' optimiser: AdamW, betas (0.9, 0.98), decay 0.01, linear warm-up and decay, no
    clipping; and with columns kept, since images and texts are named by the data and not by the model.

    Nothing secret gets on the Hub: the library pickles its arguments and, with another `hub_strategy` than "end",
    uploads them while it trains. So a `hub_token` is handed to the environment, and not kept here.
    """

    adam_beta2: float = 0.98
    weight_decay: float = 0.01
    max_grad_norm: float = 0.0
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or below 1 the share of all steps."})
    remove_unused_columns: bool = False
    hub_strategy: str = field(default="end", metadata={"help": "When to push; as of transformers.TrainingArguments."})
    report_to: None | str | list[str] = "none"  # noqa: RUF036 - HfArgumentParser wants None first
    head_learning_rate_factor: float = field(
        default=1.0, metadata={"help": "Learning rate of the classifier over that of the rest (10 for VQA)."}
    )
    decay_as_released: bool = field(
        default=False, metadata={"help": "Decay the norms of per-modality experts, as the released code does."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.hub_token:
            os.environ["HF_TOKEN"], self.hub_token = self.hub_token, None
