"""A tiny WordPiece tokenizer trained from texts, for runs that load nothing from anywhere."""

from collections.abc import Iterable

from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizer, PreTrainedTokenizerBase

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # ids 0 to 4


def train_wordpiece(texts: Iterable[str], vocab_size: int = 256, max_length: int = 40) -> PreTrainedTokenizerBase:
    """
    A lower-casing BERT tokenizer whose vocabulary is learned from `texts`.

    Args:
        texts: where the words come from; read once.
        vocab_size: upper limit, special tokens and single letters included.
        max_length: tokens to which the tokenizer truncates when asked to.

    Raises:
        ValueError: there was no text.
    """
    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=1, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    vocabulary = trainer.get_vocab()
    if len(vocabulary) == len(SPECIAL_TOKENS):
        raise ValueError("expected texts to learn a vocabulary from; got none with a word in it.")
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=max_length)
