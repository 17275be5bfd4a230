# Copyright 2026 The hf_vlmerge authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The vocabulary of UnIVAL: that of BART, then the codes of pictures, then the bins of coordinates."""

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

from transformers import AddedToken
from transformers import AutoTokenizer
from transformers import BartTokenizer

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3
NUM_CODES = 8192
NUM_BINS = 1000
FILE_NAMES = (("vocab.json", "merges.txt"), ("vocab.json", "vocab.bpe"))  # of byte-level BPE tables in a folder


def build_tokenizer(
    vocab: Any, merges: Any = None, *, num_codes: int = NUM_CODES, num_bins: int = NUM_BINS, max_length: int = 1024
) -> Any:
    """
    A byte-level BPE tokenizer of BART with `<code_0>` ... and `<bin_0>` ... after its last token.

    With BART's tables the ids are those of the released models: pieces 4 to 50 263, `<mask>` 50 264, codes from 50 265,
    bins from 58 457, 59 457 in all. It is a plain tokenizer of `transformers`, saved and loaded as any other.
    White space before a code or a bin is not encoded.

    Args:
        vocab: a folder or Hub id of a BART tokenizer, a `tokenizer.json`, a `vocab.json`, the vocabulary as a mapping
            from tokens to ids, or a tokenizer (which is not changed).
        merges: the file of merges or a list of pairs; only with a `vocab.json` or a mapping.
        num_codes, num_bins: how many tokens are added.
        max_length: tokens that the model has text positions for.

    Raises:
        ValueError: the vocabulary does not begin with the four special tokens of BART.
    """
    tokenizer = _bart_tokenizer(vocab, merges)
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    if ids != [0, 1, 2, 3]:
        raise ValueError(f"expected a BART vocabulary, with {' '.join(SPECIAL_TOKENS)} as ids 0 to 3; got ids {ids}.")
    tokenizer.model_max_length = max_length
    names = [f"<code_{i}>" for i in range(num_codes)] + [f"<bin_{i}>" for i in range(num_bins)]
    tokenizer.add_tokens([AddedToken(name, lstrip=True, normalized=False) for name in names])
    return tokenizer


def _bart_tokenizer(vocab: Any, merges: Any) -> Any:
    if hasattr(vocab, "backend_tokenizer"):
        return copy.deepcopy(vocab)
    if isinstance(vocab, Mapping):
        return BartTokenizer(vocab=dict(vocab), merges=merges or [])
    vocab = os.path.expanduser(os.fspath(vocab))
    if os.path.isdir(vocab) and not os.path.isfile(os.path.join(vocab, "tokenizer.json")):
        for names in FILE_NAMES:
            paths = [os.path.join(vocab, name) for name in names]
            if all(map(os.path.isfile, paths)):
                return BartTokenizer(vocab=paths[0], merges=paths[1])
        raise ValueError(f"expected tokenizer.json, or vocab.json and merges.txt, in {vocab!r}; found neither.")
    if os.path.isfile(vocab):
        if merges is not None:
            return BartTokenizer(vocab=vocab, merges=merges)
        with open(vocab, encoding="utf-8") as file:
            model = json.load(file).get("model")
        if not isinstance(model, dict):
            raise ValueError(f"{vocab!r} is no tokenizer.json: pass the file of merges beside a vocab.json.")
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        return BartTokenizer(vocab=model["vocab"], merges=pairs)
    return AutoTokenizer.from_pretrained(vocab)


__all__ = ["build_tokenizer"]
