"""Whole-word masking for masked language modelling."""

import torch
from transformers import PreTrainedTokenizerBase

IGNORED = -100
SPLIT_OF_CHOSEN = (0.8, 0.9)  # below: [MASK]; between: a random token; above: the token itself


class WholeWordMasking:
    """
    Hides whole words of WordPiece texts: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay.

    Words are taken in random order until round(probability * tokens) tokens are covered (at least one); a word that
    would exceed that is skipped. Padding is no candidate and does not count, so every text gets its share.

    Args:
        tokenizer: pieces that begin with `##` continue a word; with another kind of tokenizer each token is a word.
        probability: share of the tokens to predict (0.15 in the paper).
        count_padding: as in the original code: all T positions count, padding can be chosen, and what falls on it is
            lost; short texts then often get no mask at all.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float = 0.15, count_padding: bool = False):
        if not 0 < probability < 1:
            raise ValueError(f"expected a masking probability between 0 and 1; got {probability}.")
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token; masked language modelling needs one.")
        self.probability, self.count_padding = probability, count_padding
        self.mask_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)
        self.continues = torch.zeros(self.vocab_size, dtype=torch.bool)
        self.special = torch.zeros(self.vocab_size, dtype=torch.bool)
        self.continues[[i for token, i in tokenizer.get_vocab().items() if token.startswith("##")]] = True
        self.special[list({tokenizer.cls_token_id, tokenizer.sep_token_id} - {None})] = True

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Shapes:
            input_ids, attention_mask (B, T) -> masked ids (B, T), labels (B, T) with -100 where nothing is predicted
        """
        real = attention_mask.bool()
        chosen = self.choose(input_ids, real, generator) & real
        labels = input_ids.masked_fill(~chosen, IGNORED)
        fate = torch.rand(input_ids.shape, generator=generator)
        random_ids = torch.randint(self.vocab_size, input_ids.shape, generator=generator)
        to_mask, to_random = SPLIT_OF_CHOSEN
        masked = input_ids.masked_fill(chosen & (fate < to_mask), self.mask_id)
        return torch.where(chosen & (fate >= to_mask) & (fate < to_random), random_ids, masked), labels

    def choose(self, input_ids: torch.Tensor, real: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Tokens of the chosen words: (B, T), bool."""
        candidate = ~self.special[input_ids]
        if self.count_padding:
            counted = torch.full((len(input_ids),), input_ids.shape[1])
        else:
            candidate &= real
            counted = candidate.sum(1)
        quota = (counted * self.probability).round().clamp(min=1).long()

        starts = candidate & ~(self.continues[input_ids] & real)
        word = starts.cumsum(1)  # 1, 2, ... ; 0 before the first word
        length = torch.zeros_like(input_ids).scatter_add(1, word, candidate.long())  # by word
        order = torch.rand(starts.shape, generator=generator).masked_fill(~starts, 2.0).argsort(1)
        taken = torch.zeros_like(starts)  # by word
        covered = torch.zeros_like(quota)
        for place in order[:, : int(starts.sum(1).max())].t():  # the next word of every text
            row = torch.arange(len(input_ids))
            each = word[row, place]
            fits = starts[row, place] & (covered + length[row, each] <= quota)
            taken[row, each] |= fits
            covered += length[row, each] * fits
        return taken.gather(1, word) & candidate
