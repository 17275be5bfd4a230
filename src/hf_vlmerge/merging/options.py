"""Recipe keys that say how members are seen before they are merged: other names, other rows, other units."""

from dataclasses import dataclass, fields
from typing import Any

from .errors import MergeError
from .reading import choice, mapping, text, texts
from .tensors.renamed import check_renaming

FORMS = ("concatenation", "svd")
ABSENT_MODULES = ("refuse", "zero")
MISSING = ("keep", "mean")
BLOCKS = ("ffn", "attention", "residual")


def renaming(value: Any, where: str) -> dict[str, str | None] | None:
    """``rename``: pattern -> new pattern, or null to leave the tensors out."""
    if value is None:
        return None
    found = {}
    for old, new in mapping(value, f"{where}: rename").items():
        found[text(old, f"{where}: rename: a pattern")] = None if new is None else text(new, f"{where}: rename: {old}")
    if not found:
        raise MergeError(f"{where}: rename is empty")
    check_renaming(found, where)
    return found


@dataclass(frozen=True)
class Vocabulary:
    """``vocabulary``: rows of the tensors that ``match`` are matched by token to those of ``reference`` ("base" or an
    alias; the key ``from``). ``missing``: what stands for a token that a member lacks: "keep" the reference's row, or
    the "mean" of the member's matched rows."""

    match: tuple[str, ...]
    reference: str
    missing: str = "keep"

    @classmethod
    def from_dict(cls, value: Any) -> "Vocabulary | None":
        if value is None:
            return None
        value = mapping(value, "vocabulary", ("match", "from", "missing"))
        return cls(
            texts(value.get("match"), "vocabulary: match"),
            text(value.get("from"), "vocabulary: from (whose vocabulary numbers the rows: base or an alias)"),
            choice(value.get("missing", "keep"), "vocabulary: missing", MISSING),
        )

    def to_dict(self) -> dict[str, Any]:
        return {"match": list(self.match), "from": self.reference, "missing": self.missing}


@dataclass(frozen=True)
class Align:
    """``align``: the other members' units are renumbered to match those of ``to`` ("base", an alias, or an expert) by
    git re-basin's weight matching. ``blocks``: which units (ffn, attention, residual). ``heads``: the number of
    attention heads, where config.json does not tell."""

    to: str
    blocks: tuple[str, ...] = ("ffn", "attention")
    heads: int | None = None

    @classmethod
    def from_dict(cls, value: Any) -> "Align | None":
        if value is None:
            return None
        value = mapping({"to": value} if isinstance(value, str) else value, "align", [f.name for f in fields(cls)])
        blocks = texts(value.get("blocks") or cls.blocks, "align: blocks")
        heads = value.get("heads")
        if heads is not None and (not isinstance(heads, int) or isinstance(heads, bool) or heads < 1):
            raise MergeError(f"align: heads must be a positive number, not {heads!r}")
        return cls(
            text(value.get("to"), "align: to (base, an alias or an expert)"),
            tuple(choice(block, "align: blocks", BLOCKS) for block in blocks),
            heads,
        )

    def to_dict(self) -> dict[str, Any]:
        heads = {} if self.heads is None else {"heads": self.heads}
        return {"to": self.to, "blocks": list(self.blocks), **heads}


@dataclass(frozen=True)
class AdapterForm:
    """``adapters``: the models are LoRA adapters and the result is one adapter. ``form``: "concatenation" (exact; ranks
    add up) or "svd" (the best update of rank ``rank``). ``missing``: what a member is taken for where it does not adapt
    a module that another does: "refuse", or "zero", no update."""

    form: str
    rank: int | None = None
    missing: str = "refuse"

    @classmethod
    def from_dict(cls, value: Any) -> "AdapterForm | None":
        if value is None:
            return None
        value = {"form": value} if isinstance(value, str) else value
        value = mapping(value, "adapters", [f.name for f in fields(cls)])
        form = choice(value.get("form"), "adapters: form", FORMS)
        rank = value.get("rank")
        if form == "svd" and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise MergeError(f"adapters: svd needs a positive rank, not {rank!r}")
        if form == "concatenation" and rank is not None:
            raise MergeError("adapters: concatenation has the sum of the ranks; 'rank' belongs to the form svd")
        return cls(form, rank, choice(value.get("missing", "refuse"), "adapters: missing", ABSENT_MODULES))

    def to_dict(self) -> dict[str, Any]:
        rank = {} if self.rank is None else {"rank": self.rank}
        missing = {} if self.missing == "refuse" else {"missing": self.missing}
        return {"form": self.form, **rank, **missing}


def check_options(recipe: Any) -> None:
    """What the options of a recipe demand of the rest of it."""
    roles = (*recipe.aliases, *(("base",) if recipe.base_model else ()))
    if recipe.adapters:
        others = {"experts_of": recipe.experts_of, "base_model": recipe.base_model, "vocabulary": recipe.vocabulary}
        others |= {"align": recipe.align, "rename": any(m.rename for m in recipe.models)}
        for key in (key for key, value in others.items() if value):
            raise MergeError(f"'adapters' merges adapters into one adapter; {key!r} belongs to merges of models")
        if recipe.merge_method not in ("linear", "task_arithmetic"):
            raise MergeError(
                f"adapters are merged by linear or task_arithmetic, not {recipe.merge_method}: only a weighted sum of "
                "low-rank updates has low rank; merge them as 'base+adapter' into a full model instead"
            )
    if recipe.experts_of:
        for key in ("vocabulary", "base_rename"):
            if getattr(recipe, key):
                raise MergeError(f"{key.replace('base_', '')!r} is about several models, not experts inside one")
    if recipe.vocabulary and recipe.vocabulary.reference not in roles:
        raise MergeError(f"vocabulary: from: {recipe.vocabulary.reference!r} is neither 'base' nor a member")
    if recipe.vocabulary and recipe.files_from is not None:
        reference = next((m.model for m in recipe.models if m.alias == recipe.vocabulary.reference), None)
        if recipe.files_from not in (recipe.vocabulary.reference, reference):
            raise MergeError(
                f"files_from: {recipe.files_from!r}, but the rows follow the vocabulary of "
                f"{recipe.vocabulary.reference!r}; the tokenizer must come from there"
            )
    if recipe.align and not recipe.experts_of and recipe.align.to not in roles:
        raise MergeError(f"align: to: {recipe.align.to!r} is neither 'base' nor a member")
    check_files_from(recipe)


def check_files_from(recipe: Any) -> None:
    """The configuration that is carried along must fit the names of the result."""
    if recipe.files_from is not None or recipe.experts_of:
        return
    renamed = recipe.base_rename if recipe.base_model else recipe.models[0].rename
    if renamed:
        who = "the base" if recipe.base_model else f"the model {recipe.models[0].alias!r}"
        raise MergeError(
            f"{who} is renamed, so its config.json does not fit the result: give 'files_from' (base or an alias)"
        )
