"""A small WordPiece tokenizer made from texts, for runs that load nothing from anywhere."""

from collections import Counter
from collections.abc import Iterable

from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertTokenizer, PreTrainedTokenizerBase

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # ids 0 to 4


def train_wordpiece(texts: Iterable[str], vocab_size: int = 256, max_length: int = 40) -> PreTrainedTokenizerBase:
    """
    A lower-casing BERT tokenizer whose vocabulary is the frequent words of `texts`, and letters for all others.

    The same texts always give the same ids (the trainer of the `tokenizers` library does not: it breaks ties by the
    order of a hash table, so a run could not be repeated).

    Args:
        texts: where the words come from; read once.
        vocab_size: upper limit, special tokens and letters included; the rest are words by falling frequency.
        max_length: tokens to which the tokenizer truncates when asked to.

    Raises:
        ValueError: there was no text, or not even the letters fit.
    """
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    if not counts:
        raise ValueError("expected texts to learn a vocabulary from; got none with a word in it.")
    letters = sorted({letter for word in counts for letter in word})
    pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    if vocab_size < len(pieces):
        raise ValueError(f"vocab_size is {vocab_size}, but special tokens and letters alone are {len(pieces)}.")
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *words][:vocab_size])}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=max_length)
