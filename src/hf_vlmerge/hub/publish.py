"""Publishing a finished folder: checked, completed with hashes, and uploaded in one commit."""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_vlmerge.auto import add_remote_code
from hf_vlmerge.merging import Recipe, merge

from . import provenance
from .card import START, parent_inputs
from .checks import IGNORED, TOKEN, PublishError, check_folder, check_repo_id, check_texts, files_of, strings

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
FRONT_MATTER = re.compile(r"\A---\n(.*?)^---\n", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
CODE = re.compile(r"^```python\n.*?^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Published:
    """What was uploaded, or would be: ``files`` by name with their bytes; without a commit after a dry run."""

    repo_id: str
    files: dict[str, int]
    notes: tuple[str, ...] = ()
    url: str | None = None
    commit: str | None = None
    changed: bool = False  # False: the Hub had all of it already

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def publish(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    recipe: Any = None,
    parents: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> Published:
    """
    Upload a folder with a model and its card to the Hub, in one commit.

    What is uploaded is the folder with a completed card: the sha256 of every weight file and of the inputs of a merge,
    as far as they can be known, and the name of the repository in title and example; our models get their source
    files. The folder itself stays as it is, but for provenance.json, which remembers the inputs.

    Args:
        folder: config.json, safetensors, README.md, and what belongs to them.
        repo_id: `owner/name`; the repository is created where there is none.
        private: whether a new repository is private; of an existing one, what it is expected to be.
        revision: the branch to write, made from `main` where there is none.
        message: of the commit.
        recipe: the recipe of the merge as it was run (path or mapping); its local inputs are hashed.
        parents: `{Hub id: revision}` of the models that training began from.
        metadata: what the card's metadata get, such as `{"license": "apache-2.0"}`.
        dry_run: check everything that can be checked without the Hub, and write nothing.

    Raises:
        PublishError (a ValueError): the folder cannot be published, before any request; or the Hub refused.
    """
    folder = Path(folder).expanduser().resolve()
    check_repo_id(repo_id)
    names = check_folder(folder)
    inputs = inputs_of(folder, recipe, parents or {})
    weights = provenance.weight_files(folder)
    settings = ({"base_model": list(parents)} if parents else {}) | dict(metadata or {})
    card = with_metadata((folder / "README.md").read_text(encoding="utf-8"), settings)
    card = with_name(card, folder.name, repo_id)
    check_texts(folder, names, texts_of(card, weights, inputs))
    if dry_run:
        return Published(repo_id, sizes_of(folder), unknown_hashes(inputs))
    with one_sentence(repo_id), tempfile.TemporaryDirectory() as temporary:
        inputs = [with_reported_hashes(each) for each in inputs]
        texts = texts_of(card, weights, inputs)
        staged = stage(folder, names, texts, Path(temporary) / folder.name)
        done = upload(staged, Published(repo_id, sizes_of(staged), unknown_hashes(inputs)), private, revision, message)
        if provenance.NAME in texts:
            (folder / provenance.NAME).write_text(texts[provenance.NAME], encoding="utf-8")
        return done


def stage(folder: Path, names: list[str], texts: Mapping[str, str], staged: Path) -> Path:
    """A copy of a folder as it is uploaded: with other texts and our source files, its weights by links."""
    for name in names:
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        copy = Path.symlink_to if name.endswith(".safetensors") else lambda new, old: shutil.copyfile(old, new)
        copy(staged / name, folder / name)
    for name, text in texts.items():
        (staged / name).write_text(text, encoding="utf-8")
    add_remote_code(staged)
    return staged


def upload(folder: Path, what: Published, private: bool | None, revision: str | None, message: str | None) -> Published:
    """One commit on top of what the branch holds now. Weight files that the folder does not have are removed there."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(what.repo_id, private=private, exist_ok=True)
    head = api.model_info(what.repo_id)
    if private is not None and head.private != private:
        is_now, expected = ("public", "private") if private else ("private", "public")
        raise PublishError(f"{what.repo_id} exists and is {is_now}, not {expected}; change that on its page first")
    if revision is not None:
        api.create_branch(what.repo_id, branch=revision, exist_ok=True)
        head = api.model_info(what.repo_id, revision=revision)
    commit = api.upload_folder(
        repo_id=what.repo_id,
        folder_path=folder,
        commit_message=message or f"Publish {what.repo_id.partition('/')[2]} with hf_vlmerge",
        revision=revision,
        parent_commit=head.sha,
        ignore_patterns=list(IGNORED),
        delete_patterns=list(WEIGHTS),
    )
    return Published(what.repo_id, what.files, what.notes, str(url), commit.oid, commit.oid != head.sha)


def inputs_of(folder: Path, recipe: Any, parents: Mapping[str, str]) -> list[dict[str, Any]]:
    """What a model was made from: what its provenance says, or the recipe by which its merge was made, with the sha256
    of every input; and the models that training began from."""
    inputs = provenance.read(folder)
    if recipe is not None:
        report = merge(Recipe.load(recipe), None, dry_run=True, hash_inputs=True)
        path = folder / "recipe.yaml"
        if not path.is_file() or Recipe.load(path) != report.recipe:
            raise PublishError(f"{folder.name} is not a merge of this recipe, or its inputs have another revision now")
        inputs = report.sources
    inputs = [each for each in inputs if each["role"] != START or each["label"] not in parents]
    known = {each["label"] for each in inputs}
    return [*inputs, *(each for each in parent_inputs(parents) if each["label"] not in known)]


def texts_of(card: str, weights: list[dict[str, Any]], inputs: list[dict[str, Any]]) -> dict[str, str]:
    """The files that publishing writes, by name."""
    texts = {"README.md": provenance.with_section(card, provenance.section(weights, inputs))}
    return texts | ({provenance.NAME: provenance.text(inputs)} if inputs else {})


def sizes_of(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in files_of(folder)}


def unknown_hashes(inputs: list[dict[str, Any]]) -> tuple[str, ...]:
    """A note for every local input whose sha256 nobody has recorded."""
    return tuple(
        f"the sha256 of {file['name']} of {each['label']} ({each['role']}) is not known; give the recipe that was run"
        for each in inputs
        for file in each["files"]
        if not file["sha256"] and not each["revision"]
    )


def with_reported_hashes(source: Mapping[str, Any]) -> dict[str, Any]:
    """An input on the Hub with its commit, its weight files and the sha256 that the Hub reports for them."""
    from huggingface_hub import HfApi, errors

    files = source["files"]
    if not source["revision"] or (files and all(file["sha256"] for file in files)):
        return dict(source)
    name = source["label"].partition("@")[0]
    try:
        info = HfApi().model_info(name, revision=source["revision"], files_metadata=True)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise PublishError(
            f"the parent {name!r} is not on the Hub with revision {source['revision']!r}, or not for this login"
        ) from None
    there = {each.rfilename: each for each in info.siblings or () if each.lfs}
    if not files:
        files = [{"name": n, "size": f.size, "sha256": None} for n, f in there.items() if n.endswith(".safetensors")]
    hashed = [file | {"sha256": there[file["name"]].lfs.sha256} if file["name"] in there else file for file in files]
    return source | {"revision": info.sha, "files": hashed}


def metadata_of(card: str) -> dict[str, Any]:
    """The block of metadata of a card; empty where it has none."""
    found = FRONT_MATTER.match(card)
    try:
        block = (yaml.safe_load(found[1]) if found else None) or {}
    except yaml.YAMLError as error:
        raise PublishError(f"the metadata of README.md are not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(block, dict):
        raise PublishError(f"the metadata of README.md must be a mapping, not {block!r}")
    return block


def with_block(card: str, block: Mapping[str, Any]) -> str:
    """A card with this block of metadata; the same text where it has it already."""
    if block == metadata_of(card):
        return card
    text = yaml.safe_dump(block, sort_keys=False, allow_unicode=True, width=120)
    found = FRONT_MATTER.match(card)
    return f"---\n{text}---\n" + (card[found.end() :] if found else f"\n{card}")


def with_metadata(card: str, metadata: Mapping[str, Any]) -> str:
    """A card whose block of metadata has these values, and these tags beside its own; the same text where it has them
    already."""
    block = metadata_of(card)
    new = block | {key: value for key, value in metadata.items() if value is not None}
    given = [tags for each in (block, metadata) if (tags := each.get("tags"))]
    if given:
        new["tags"] = list(dict.fromkeys(tag for tags in given for tag in strings(tags, "tags of the card")))
    return with_block(card, new)


def with_name(card: str, folder: str, repo_id: str) -> str:
    """A card whose example loads from the Hub, where it names the folder or what the folder was called when the card
    was written; then the title follows. A `model-index` follows always."""
    title, repo = TITLE.search(card), repo_id.partition("/")[2]
    for name in {folder, title[1] if title else folder}:
        if any(f'"{name}"' in block for block in CODE.findall(card)):
            card = CODE.sub(lambda block, name=name: block[0].replace(f'"{name}"', f'"{repo_id}"'), card)
            card = card.replace(f"\n# {name}\n", f"\n# {repo}\n", 1)
    block = metadata_of(card)
    match block.get("model-index"):
        case [{"name": _} as model]:
            return with_block(card, block | {"model-index": [model | {"name": repo}]})
    return card


@contextmanager
def one_sentence(repo_id: str) -> Iterator[None]:
    """What goes wrong on the way to the Hub as one sentence, without a token."""
    from huggingface_hub import errors

    try:
        yield
    except PublishError:
        raise
    except errors.LocalTokenNotFoundError:
        raise PublishError("the Hub wants a login: run `hf auth login`, or set HF_TOKEN") from None
    except (errors.HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        reason = TOKEN.sub("(token)", str(cause).strip().partition("\n")[0]) or type(cause).__name__
        known = REFUSALS.get(status, "").format(repo=repo_id)
        raise PublishError(known or f"{repo_id} could not be published: {reason}") from error


REFUSALS = {  # by the status of the answer
    401: "the Hub refuses the login for {repo}: run `hf auth login` with a token that may write, or set HF_TOKEN",
    403: "this login may not write to {repo}; ask its owner, or choose a repository of yours",
    412: "{repo} has got another commit meanwhile; look at it and publish again",
}
