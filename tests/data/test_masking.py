"""Whole-word masking: shares, whole words, padding, determinism."""

import pytest
import torch
from transformers import BertTokenizer

from hf_vlmerge.data.masking import WholeWordMasking

VOCABULARY = {
    word: i
    for i, word in enumerate(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##s", "red", "a", "b", "c", "d", "e", "f"]
    )
}
CLS, SEP, MASK, PLAY, ING, RED = 2, 3, 4, 5, 6, 8


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab=VOCABULARY)


def batch(rows: int, words: int, length: int):
    """`rows` texts of `words` words, padded to `length`."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    ids[:, 0], ids[:, words + 1] = CLS, SEP
    ids[:, 1 : words + 1] = torch.arange(words) % 6 + 9
    return ids, (ids != 0).long()


def test_shares(tokenizer):
    ids, mask = batch(500, 20, 30)
    masked, labels = WholeWordMasking(tokenizer, 0.15)(ids, mask, torch.Generator().manual_seed(0))
    chosen = labels != -100
    assert (chosen.sum(1) == 3).all()  # 15 % of 20 words, in every text
    assert not chosen[:, 0].any()  # nor [SEP], nor padding
    assert not chosen[:, 21:].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    hidden = (masked[chosen] == MASK).float().mean()
    kept = (masked[chosen] == ids[chosen]).float().mean()
    assert 0.77 < hidden < 0.84  # 80 %, and 1/15 of the random tokens
    assert 0.08 < kept < 0.14


def test_words_are_taken_whole_and_never_beyond_the_quota(tokenizer):
    ids = torch.tensor([[CLS, PLAY, ING, ING, RED, PLAY, ING, SEP]]).repeat(300, 1)  # words of 3, 1 and 2 pieces
    _, labels = WholeWordMasking(tokenizer, 0.4)(ids, torch.ones_like(ids), torch.Generator().manual_seed(1))
    chosen = (labels != -100)[:, 1:7]  # quota round(6 * 0.4) = 2 pieces
    patterns = {tuple(row) for row in chosen.int().tolist()}
    assert patterns == {(0, 0, 0, 1, 0, 0), (0, 0, 0, 0, 1, 1)}  # the word of 3 never fits; after "red" no other does


def test_a_short_text_still_has_one_word_hidden(tokenizer):
    ids, mask = batch(50, 2, 12)
    _, labels = WholeWordMasking(tokenizer, 0.15)(ids, mask)
    assert ((labels != -100).sum(1) == 1).all()


def test_counting_padding_as_the_original_does(tokenizer):
    ids, mask = batch(2000, 8, 40)
    _, labels = WholeWordMasking(tokenizer, 0.15, count_padding=True)(ids, mask, torch.Generator().manual_seed(2))
    chosen = (labels != -100).sum(1).float()
    assert not (labels != -100)[mask == 0].any()
    # 6 of 38 candidates are drawn; a text of 8 words gets 8 * 6 / 38 on average, and some texts none
    assert abs(chosen.mean() - 8 * 6 / 38) < 0.1
    assert 0.1 < (chosen == 0).float().mean() < 0.4


def test_the_generator_decides(tokenizer):
    ids, mask = batch(20, 10, 12)
    masking = WholeWordMasking(tokenizer, 0.3)
    first, again, other = (masking(ids, mask, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_bad_arguments(tokenizer):
    with pytest.raises(ValueError, match="between 0 and 1"):
        WholeWordMasking(tokenizer, 1.5)
    without = BertTokenizer(vocab=VOCABULARY)
    without.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        WholeWordMasking(without)
