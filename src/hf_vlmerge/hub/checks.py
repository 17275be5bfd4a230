"""What must not be published, each in one sentence. Nothing here asks the Hub."""

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf_vlmerge.merging.tensors.sources import PICKLES, is_inside

IGNORED = (".*", "*/.*", "__pycache__/*", "checkpoint-*")  # never uploaded: hidden files, states of training
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
PICKLED = (*PICKLES, ".pkl", ".pickle", ".joblib")
LARGEST_TEXT = 10_000_000  # bytes; whatever is larger is not read
LOCAL_PATH = re.compile(
    r"(?:file://|(?<![\w.:/~-])|(?<=\\[nrt]))/"  # in JSON, a path at the start of a line follows the letters \n
    r"(?:home|Users|root|mnt|tmp|private|scratch\w*|media|var|data|work|workspace|fsx|gpfs|lustre|nfs|content|kaggle)/"
    r"[^\s`'\"<>|)\]]+"
    r"|\b[A-Za-z]:\\+Users\\+[^\s`'\"<>|)\]]+"
)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")


class PublishError(ValueError):
    """What cannot be published as asked; its message is one sentence for the user."""


def check_repo_id(repo_id: str) -> None:
    """An owner and a name, of the letters that the Hub allows."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        valid = False
    else:
        valid = repo_id.count("/") == 1
    if not valid:
        raise PublishError(
            f"{repo_id!r} is no name of a repository: expected owner/name of letters, digits, '-', '_' and '.', "
            "as in org/unival-average"
        )


def strings(value: Any, where: str) -> list[str]:
    """One string or a list of them, as a list."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    for each in listed:
        if not isinstance(each, str) or not each:
            raise PublishError(
                f"{where} must be a string or a list of strings, not {value!r}; in YAML, quote what it reads as "
                "something else, such as no"
            )
    return listed


def files_of(folder: Path) -> list[str]:
    """The files of a folder that are uploaded, by their paths in it."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in IGNORED)]


def check_folder(folder: Path) -> list[str]:
    """The files of a folder, if it is a model with a card and nothing in it is pickled or lies elsewhere."""
    if not folder.is_dir():
        raise PublishError(f"there is no folder {folder.name!r} to publish")
    names = files_of(folder)
    pickled = [name for name in names if name.lower().endswith(PICKLED)]
    if pickled:
        raise PublishError(
            f"{folder.name} holds {pickled[0]}, which is pickled and may run code when it is loaded: expected "
            "safetensors only; remove it, or save the model once more with save_pretrained"
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise PublishError(f"{folder.name} holds no weights: expected model.safetensors, or shards with their index")
    if "README.md" not in names:
        raise PublishError(
            f"{folder.name} has no README.md: expected a card, as `hf-vlmerge merge` and `hf-vlmerge card` write it"
        )
    for name in names:
        if not is_inside(folder, folder / name):
            raise PublishError(f"{folder.name}: {name} is a link out of the folder; put the file there")
    return names


def text_of(path: Path) -> str:
    """The content of a file of text; nothing of a vocabulary, of a file of bytes and of one that is very large."""
    if path.name in VOCABULARIES or path.stat().st_size >= LARGEST_TEXT:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def check_texts(folder: Path, names: list[str], changed: Mapping[str, str]) -> None:
    """No text tells a path of this machine or a token; ``changed`` are texts that replace what the folder holds."""
    own = [str(path) for path in (Path.home(), Path.cwd(), folder.parent) if len(path.parts) > 2]
    for name in sorted({*names, *changed}):
        text = changed[name] if name in changed else text_of(folder / name)
        if TOKEN.search(text):
            raise PublishError(f"{name} holds what looks like an access token; remove it, and make a new token")
        found = LOCAL_PATH.search(text)
        path = found[0] if found else next((path for path in own if path in text), None)
        if path:
            raise PublishError(f"{name} names a path of this machine, {path!r}; write a name that others can use")
