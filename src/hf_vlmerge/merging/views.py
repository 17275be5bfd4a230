"""From a recipe's options to views: sources as their groups see them, with other names, rows or units."""

from contextlib import suppress
from itertools import combinations

from .alignment import aligned
from .errors import MergeError
from .groups import Sources
from .recipe import Recipe
from .tensors.renamed import RenamedSource
from .tensors.sources import TensorSource
from .tensors.vocabulary import FILES, RowMappedSource, conflicts, has_vocabulary, vocabulary_of


def viewed(recipe: Recipe, sources: Sources) -> dict[str, TensorSource]:
    """The sources by role, seen as the recipe says: renamed, then with rows matched by token, then aligned."""
    result = dict(sources)
    rename = {"base": recipe.base_rename, **{m.alias: m.rename for m in recipe.models}}
    for role in (role for role, patterns in rename.items() if patterns and role in result):
        result[role] = RenamedSource(result[role], rename[role])
    members = [role for role in ("base", *recipe.aliases) if role in result]
    if recipe.vocabulary:
        reference = result[recipe.vocabulary.reference]
        for role in members:
            if result[role] is not reference:
                result[role] = with_rows(result[role], reference, recipe)
    else:
        refuse_conflicts([result[role] for role in members])
    if recipe.align:
        result |= aligned(recipe, result)
    return result


def with_rows(source: TensorSource, reference: TensorSource, recipe: Recipe) -> TensorSource:
    """A member with the rows of the reference's vocabulary; as it is where its vocabulary and rows are the same."""
    view = RowMappedSource(source, reference, recipe.vocabulary.match, recipe.vocabulary.missing)
    same = view.own == view.theirs and all(source.shape(k) == reference.shape(k) for k in view.mapped)
    return source if same else view


def refuse_conflicts(sources: list[TensorSource]) -> None:
    """Embeddings of tokenizers that number their tokens differently must not be merged row by row."""
    known = {id(s): s for s in sources if has_vocabulary(s)}
    for first, second in combinations(known.values(), 2):
        differ: list[str] = []
        if same_files(first, second):
            continue
        with suppress(MergeError):  # a file that is no vocabulary says nothing about rows
            differ = conflicts(vocabulary_of(first), vocabulary_of(second))
        if differ:
            raise MergeError(
                f"the vocabularies of {first.label} and {second.label} give {len(differ)} tokens different rows, such "
                f"as {differ[0]!r}; say by 'vocabulary: {{match: [names of embeddings], from: base or an alias}}' "
                "whose rows the result has"
            )


def same_files(first: TensorSource, second: TensorSource) -> bool:
    """Whether two sources carry the same tokenizer files, byte by byte; then nothing needs to be parsed."""
    for name in FILES:
        a, b = first.side_files.get(name), second.side_files.get(name)
        if (a is None) != (b is None) or (a and a.read_bytes() != b.read_bytes()):
            return False
    return True
