"""Fetching a model repository of the Hub: which files, at which commit, with a retry around each call."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..errors import MergeError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
ATTEMPTS = 3  # with pauses of 1 and 2 seconds
PAUSE = 1.0
SIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.vocab", "*.merges", "LICENSE*", "NOTICE*")
T = TypeVar("T")


class Snapshot(NamedTuple):
    """A downloaded repository: its name, commit, folder, and the sha256 of large files as the Hub reports them."""

    repo: str
    revision: str
    folder: Path
    sha256: dict[str, str]


def is_hub_id(ref: str) -> bool:
    looks_like_file = ref.endswith((".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".yaml", ".yml"))
    return bool(HUB_ID.fullmatch(ref)) and not looks_like_file


def fetch(ref: str, weights: Callable[[list[str]], list[str]] | None = None) -> Snapshot:
    """Download (or find in the cache) weights and side files of ``org/name[@revision]``; shows a progress bar.
    ``weights`` chooses the weight files among all of a repository's; by default those of a model."""
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    repo, _, revision = ref.partition("@")
    try:
        if constants.HF_HUB_OFFLINE:
            folder = cached(repo, revision or None)
            return Snapshot(repo, folder.name, folder, {})
        info = retried(lambda: HfApi().model_info(repo, revision=revision or None, files_metadata=True))
        files = {f.rfilename: f.lfs.sha256 if f.lfs else None for f in info.siblings or ()}
        patterns = [*SIDE, *(weights or weight_patterns)(list(files))]
        folder = retried(lambda: snapshot_download(repo, revision=info.sha, allow_patterns=patterns))
        return Snapshot(repo, info.sha, Path(folder), {name: sha for name, sha in files.items() if sha})
    except errors.GatedRepoError:
        raise MergeError(f"{repo} is gated: ask for access on its page and log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise MergeError(f"{repo} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise MergeError(
            f"{repo!r} is neither a folder here nor a model on the Hub (or it is private: log in)"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise MergeError(
            f"{ref!r} is no folder here and not in the local cache, and the Hub cannot be reached"
        ) from None
    except (errors.HTTPError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise MergeError(f"{ref!r} is no folder here and could not be fetched from the Hub: {reason}") from error


def cached(repo: str, revision: str | None) -> Path:
    """The folder of a repository in the local cache. It may hold only what was fetched of it."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    known = "config.json model.safetensors model.safetensors.index.json pytorch_model.bin adapter_config.json"
    for name in known.split():
        path = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return Path(snapshot_download(repo, revision=revision, local_files_only=True))


def weight_patterns(files: list[str]) -> list[str]:
    """The usual safetensors files where there are any, else any safetensors, else the pickled weights."""
    top = [f for f in files if "/" not in f]
    for stem, suffix in (("model", ".safetensors"), ("", ".safetensors"), ("pytorch_model", ".bin")):
        found = [f for f in top if f.startswith(stem) and f.endswith(suffix)]
        if found:
            return found
    return []


def adapter_weights(files: list[str]) -> list[str]:
    """The weights of an adapter as peft names them, safetensors first."""
    return [name for name in ("adapter_model.safetensors", "adapter_model.bin") if name in files][:1]


def retried(call: Callable[[], T]) -> T:
    """Call again after a server error or a broken connection; what the Hub refuses for good is raised at once."""
    from huggingface_hub import errors

    for attempt in range(ATTEMPTS):
        try:
            return call()
        except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if (status < 500 and status != 429) or attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError("unreachable")
