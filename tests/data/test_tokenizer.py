import pytest

from hf_vlmerge.data.tokenizer import train_wordpiece


def test_the_same_texts_give_the_same_ids():
    tokenizer = train_wordpiece(["Red cat", "a red dog", "red dog"], 100)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    letters = ["a", "c", "d", "e", "g", "o", "r", "t"]
    words = ["red", "dog", "cat"]  # by falling frequency, then by name
    assert vocabulary == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), *words]
    assert tokenizer.tokenize("A RED tea") == ["a", "red", "t", "##e", "##a"]


def test_a_vocabulary_without_room_for_letters_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size is 8, but special tokens and letters alone are 11"):
        train_wordpiece(["abc"], 8)
