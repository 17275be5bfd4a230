# Copyright 2026 The hf_vlmerge authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
The vocabulary of UnIVAL: that of BART, then the codes of pictures, then the bins of coordinates.

Codes and bins are ordinary pieces of the vocabulary rather than added tokens: with 9 192 of those, loading takes more
than twice as long. A word that is a piece of the vocabulary is taken whole (`ignore_merges`), which changes nothing for
BART's own pieces: each of them is also what its merges make of it.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from transformers import AddedToken
from transformers import AutoTokenizer
from transformers import BartTokenizer
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3
MASK_TOKEN = "<mask>"
NUM_CODES = 8192
NUM_BINS = 1000
FILE_NAMES = (("vocab.json", "merges.txt"), ("vocab.json", "vocab.bpe"))  # of byte-level BPE tables in a folder
NEW_TOKEN = r"<(?:code|bin)_\d+>"
# how GPT-2 cuts a text into words, as in the byte-level step of `tokenizers`
WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def build_tokenizer(
    vocab: Any, merges: Any = None, *, num_codes: int = NUM_CODES, num_bins: int = NUM_BINS, max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer of BART with `<code_0>` ... and `<bin_0>` ... after its last token.

    With BART's tables the ids are those of the released models: pieces 4 to 50 263, `<mask>` 50 264, codes from 50 265,
    bins from 58 457, 59 457 in all. It is a plain tokenizer of `transformers`, saved and loaded as any other.
    White space before a code or a bin is not encoded.

    Args:
        vocab: a folder or Hub id of a BART tokenizer, a `tokenizer.json`, a `vocab.json`, the vocabulary as a mapping
            from tokens to ids, or a tokenizer.
        merges: the file of merges or a list of pairs; only with a `vocab.json` or a mapping.
        num_codes, num_bins: how many tokens are added; those that are there already stay.
        max_length: tokens that the model has text positions for.

    Raises:
        ValueError: the vocabulary does not begin with the four special tokens of BART, or its ids have gaps.
    """
    bart = _bart_tokenizer(vocab, merges)
    table = bart.get_vocab()
    ids = [table.get(name) for name in SPECIAL_TOKENS]
    if ids != [0, 1, 2, 3]:
        raise ValueError(f"expected a BART vocabulary, with {' '.join(SPECIAL_TOKENS)} as ids 0 to 3; got ids {ids}.")
    if sorted(table.values()) != list(range(len(table))):
        raise ValueError(f"expected ids 0 to {len(table) - 1} for {len(table)} tokens; some are missing or doubled.")
    for kind, count in (("code", num_codes), ("bin", num_bins)):
        for i in range(count):
            table.setdefault(f"<{kind}_{i}>", len(table))
    pairs = json.loads(bart.backend_tokenizer.to_str())["model"]["merges"]
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(table, [tuple(pair) for pair in pairs]),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token=AddedToken(MASK_TOKEN, lstrip=True),
        model_max_length=max_length,
    )


def _byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """The five steps of a tokenizer of the `tokenizers` library."""
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    except ImportError as error:
        raise ImportError("making a tokenizer needs tokenizers: pip install tokenizers") from error
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.Replace(Regex(rf"\s+(?={NEW_TOKEN})"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{NEW_TOKEN}|{WORD}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bart_tokenizer(vocab: Any, merges: Any) -> Any:
    if hasattr(vocab, "backend_tokenizer"):
        return vocab
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
