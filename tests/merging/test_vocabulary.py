"""Rows of embeddings matched by token where two tokenizers number their tokens differently."""

import json

import pytest
import torch

from hf_vlmerge.merging import MergeError, Recipe, merge, open_source, save_checkpoint
from hf_vlmerge.merging.tensors.vocabulary import conflicts, vocabulary_of

FIRST = ["<pad>", "a", "b", "c"]
SECOND = ["<pad>", "c", "a", "d", "b"]  # other rows, one token more
NAMES = ["embed.weight", "head.weight", "head.bias"]


def tokenizer_json(tokens, added=()):
    known = {token: i for i, token in enumerate(tokens)}
    extra = [{"id": len(tokens) + i, "content": token} for i, token in enumerate(added)]
    return {"tokenizer.json": json.dumps({"model": {"type": "WordLevel", "vocab": known}, "added_tokens": extra})}


def unigram(tokens):
    return {"tokenizer.json": json.dumps({"model": {"type": "Unigram", "vocab": [[t, 0.0] for t in tokens]}})}


def vocab_json(tokens):
    return {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens[:-1])}),
        "added_tokens.json": json.dumps({tokens[-1]: len(tokens) - 1}),
    }


def vocab_txt(tokens):
    return {"vocab.txt": "\n".join(tokens) + "\n"}


def save(folder, tokens, files=tokenizer_json, rows=None, seed=0, config=None):
    """A model with an embedding, an output layer and a bias over tokens, whose row for a token holds its letter."""
    torch.manual_seed(seed)
    count = rows or len(tokens)
    value = torch.arange(count).float() + 10 * seed
    tensors = {"embed.weight": value[:, None].repeat(1, 3), "head.weight": value[:, None].repeat(1, 3) * 2}
    tensors |= {"head.bias": value.clone(), "body.weight": torch.full((2, 2), float(seed))}

    def finish(path):
        for name, content in files(tokens).items():
            (path / name).write_text(content, encoding="utf-8")

    save_checkpoint(folder, tensors, config=config or {"vocab_size": count}, finish=finish, fsync=False)
    return str(folder)


def recipe(tmp_path, **more):
    models = [{"model": str(tmp_path / "one")}, {"model": str(tmp_path / "two")}]
    return {"merge_method": "linear", "models": models, **more}


def by_token(**more):
    return {"vocabulary": {"match": NAMES, "from": "one", **more}}


@pytest.mark.parametrize("files", [tokenizer_json, unigram, vocab_json, vocab_txt], ids=lambda f: f.__name__)
def test_vocabularies_are_read_as_data(tmp_path, files):
    source = open_source(save(tmp_path / "m", SECOND, files))
    assert vocabulary_of(source) == {token: i for i, token in enumerate(SECOND)}


def test_added_tokens_belong_to_the_vocabulary(tmp_path):
    source = open_source(save(tmp_path / "m", FIRST, lambda tokens: tokenizer_json(tokens, ["<image>"])))
    assert vocabulary_of(source)["<image>"] == 4


def test_rows_are_matched_by_token(tmp_path):
    save(tmp_path / "one", FIRST, seed=1)
    save(tmp_path / "two", SECOND, vocab_txt, seed=2)
    report = merge(recipe(tmp_path, **by_token()), tmp_path / "out", progress=False, fsync=False)
    merged = open_source(tmp_path / "out")
    rows = [20, 22, 24, 21]  # of <pad>, a, b, c in the second
    expected = torch.tensor([(10 + i + row) / 2 for i, row in enumerate(rows)])
    assert merged["embed.weight"].equal(expected[:, None].repeat(1, 3))
    assert merged["head.weight"].equal(expected[:, None].repeat(1, 3) * 2) and merged["head.bias"].equal(expected)
    assert merged["body.weight"].eq(1.5).all()
    assert any("4 tokens matched, 0 missing" in note and "1 left out" in note for note in report.notes)
    assert report.config["vocab_size"] == 4 and report.recipe.files_from == "one"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_longer_vocabulary_may_lead_and_a_missing_token_keeps_its_row(tmp_path):
    save(tmp_path / "one", FIRST, seed=1)
    save(tmp_path / "two", SECOND, seed=2)
    asked = recipe(tmp_path, vocabulary={"match": NAMES, "from": "two"})
    merge(asked, tmp_path / "out", progress=False, fsync=False)
    merged = open_source(tmp_path / "out")["embed.weight"][:, 0]
    assert merged.tolist() == [15.0, 17.0, 16.5, 23.0, 18.0]  # d is the second's own


def test_a_missing_token_may_be_the_mean_of_the_others(tmp_path):
    save(tmp_path / "one", FIRST, seed=1)
    save(tmp_path / "two", SECOND, seed=2)
    asked = recipe(tmp_path, vocabulary={"match": NAMES, "from": "two", "missing": "mean"})
    report = merge(asked, tmp_path / "out", progress=False, fsync=False)
    assert open_source(tmp_path / "out")["embed.weight"][3, 0] == (23 + 11.5) / 2
    assert any("1 missing (taken as the mean of the others)" in note for note in report.notes)


def test_padding_rows_are_the_references_own_and_reading_by_runs_changes_nothing(tmp_path):
    from hf_vlmerge.merging.tensors.vocabulary import RowMappedSource

    save(tmp_path / "one", FIRST, rows=8, seed=1)
    save(tmp_path / "two", SECOND, rows=5, seed=2)
    first, second = open_source(tmp_path / "one"), open_source(tmp_path / "two")
    view = RowMappedSource(second, first, ("embed.weight",), "mean")
    assert view.shape("embed.weight") == (8, 3) and view.extent("embed.weight") is None
    assert view["embed.weight"][:, 0].tolist() == [20, 22, 24, 21, 14, 15, 16, 17]
    whole = view.read("embed.weight")
    for start, stop in ((0, 1), (2, 7), (11, 24), (5, 5)):
        assert view.read("embed.weight", start, stop).equal(whole[start:stop])


def test_another_numbering_is_refused_unless_the_recipe_says_how(tmp_path):
    save(tmp_path / "one", FIRST, seed=1)
    save(tmp_path / "two", ["<pad>", "c", "b", "a"], seed=2)
    message = r"the vocabularies of one and two give 2 tokens different rows, such as 'a'; say by 'vocabulary:"
    with pytest.raises(MergeError, match=message):
        merge(recipe(tmp_path), tmp_path / "out")


def test_another_number_of_rows_is_refused_with_a_hint(tmp_path):
    save(tmp_path / "one", FIRST, seed=1)
    save(tmp_path / "two", [*FIRST, "d"], seed=2)
    with pytest.raises(
        MergeError, match=r"embed\.weight: shapes differ.*if these are rows of tokens, say so by 'vocab"
    ):
        merge(recipe(tmp_path), tmp_path / "out")


def test_equal_vocabularies_and_more_tokens_at_the_end_are_no_conflict(tmp_path):
    save(tmp_path / "one", FIRST, rows=6, seed=1)
    save(tmp_path / "two", [*FIRST, "d"], vocab_txt, rows=6, seed=2)
    merge(recipe(tmp_path), tmp_path / "out", progress=False, fsync=False)


def test_what_counts_as_another_numbering():
    many = {f"t{i}": i for i in range(200)}
    renamed = {("<image>" if i == 7 else f"t{i}"): i for i in range(200)}
    assert conflicts(many, renamed) == []  # a reserved token that got a use
    assert conflicts({"a": 0, "b": 1}, {"b": 0, "a": 1}) == ["a", "b"]
    assert len(conflicts(many, {f"u{i}": i for i in range(200)})) == 200  # nothing in common


def test_a_file_that_is_no_vocabulary_matters_only_where_it_is_needed(tmp_path):
    save(tmp_path / "one", FIRST, seed=1)
    save(tmp_path / "two", FIRST, lambda _: {"tokenizer.json": "{}"}, seed=2)
    merge(recipe(tmp_path), tmp_path / "out", progress=False, fsync=False)
    with pytest.raises(MergeError, match=r"two: tokenizer\.json is no vocabulary \(KeyError: 'model'\)"):
        merge(recipe(tmp_path, **by_token()), tmp_path / "other")


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"match": NAMES}, "vocabulary: from .* must be a name, not None"),
        ({"match": NAMES, "from": "third"}, "vocabulary: from: 'third' is neither 'base' nor a member"),
        ({"from": "one"}, "vocabulary: match must name at least one"),
        ({"match": "nothing.*", "from": "one"}, r"no tensor that two and one have matches nothing\.\*"),
        ({"match": "body.*", "from": "one"}, None),
        ({"match": NAMES, "from": "one", "missing": "zero"}, "missing can be keep or mean, not 'zero'"),
    ],
)
def test_vocabularies_that_are_refused(tmp_path, vocabulary, message):
    save(tmp_path / "one", FIRST, seed=1)
    save(tmp_path / "two", SECOND, seed=2)
    message = message or "embed.weight: shapes differ"
    with pytest.raises(MergeError, match=message):
        merge(recipe(tmp_path, vocabulary=vocabulary), tmp_path / "out")


def test_models_without_a_tokenizer_cannot_be_matched(tmp_path):
    save(tmp_path / "one", FIRST, seed=1)
    save(tmp_path / "two", SECOND, lambda _: {}, seed=2)
    with pytest.raises(MergeError, match=r"two carries no vocabulary \(tokenizer\.json, vocab\.json, vocab\.txt\)"):
        merge(recipe(tmp_path, **by_token()), tmp_path / "out")
    with pytest.raises(MergeError, match="files_from: 'two', but the rows follow the vocabulary of 'one'"):
        merge(recipe(tmp_path, **by_token(), files_from="two"), tmp_path / "out")


def test_the_recipe_reads_itself_back():
    content = {"merge_method": "linear", "models": ["x/a", "x/b"], "vocabulary": {"match": "embed*", "from": "a"}}
    loaded = Recipe.load(content)
    assert Recipe.load(loaded.to_yaml()) == loaded
    assert loaded.to_dict()["vocabulary"] == {"match": ["embed*"], "from": "a", "missing": "keep"}


def test_the_vocabulary_files_of_published_models(shared):
    folder = shared / "data" / "tokenizers"
    for name, size, known in (
        ("bert_base_uncased/vocab.txt", 30522, "[CLS]"),
        ("gpt2_bart_bpe/vocab.json", 50265, "<s>"),
    ):
        source = open_source({})
        source.side_files = {name.partition("/")[2]: folder / name}
        vocabulary = vocabulary_of(source)
        assert len(vocabulary) == size and known in vocabulary
        assert sorted(vocabulary.values()) == list(range(size))
