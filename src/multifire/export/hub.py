"""A shared folder on Hugging Face's hub, up and down, by the library huggingface_hub: the extra `hub`.

Why not its ModelHubMixin: the network would have to inherit from it, so that nothing runs without the library, and it
hands a stranger's config.json to the constructor unread. Our folders have a reader that trusts nothing.
"""

import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NETWORK = ["config.json", "model.safetensors"]
"""All that is ever fetched: no code, and no pickle."""
CARD = "README.md"


def is_name(source: str | Path) -> bool:
    """Whether this can be the name of a network on the hub: a Path never is."""
    return isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII) is not None


def download(name: str, revision: str | None) -> Path:
    """The folder, in the library's cache, with a network's files as they are at a branch, a tag or a commit.

    Raises:
        FileNotFoundError: the hub has no such network or revision, or is not reached and nothing is kept of it.
        ValueError: no name, or huggingface_hub is not installed.
    """
    hub = _library(name)
    try:
        with _one_kind_of_error(name):
            return Path(hub.snapshot_download(name, revision=revision, allow_patterns=NETWORK))
    except hub.errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"{name}: no revision {revision!r} on the hub; expected a branch, a tag or the whole hash of a commit"
        ) from None
    except hub.errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name}: no such folder here, and no such network on the hub; if it is private, run `hf auth login`"
        ) from None


def upload(folder: Path, name: str, private: bool) -> str:
    """Put a folder's network and its card on the hub, where a repository is made if there is none; the commit's hash.

    Raises:
        OSError: the hub refuses, or is not reached.
        ValueError: no name, or huggingface_hub is not installed.
    """
    hub = _library(name)
    with _one_kind_of_error(name):
        hub.create_repo(name, private=private, exist_ok=True)
        return hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[*NETWORK, CARD],
            commit_message="Upload a network of multifire",
        ).oid


@contextlib.contextmanager
def _one_kind_of_error(name: str) -> Iterator[None]:
    """Errors of the HTTP client beneath, which one that is depends on the library's release, as OSError."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ConnectionError(f"{name}: the hub was not reached ({type(error).__name__}: {error})") from error


def _library(name: str) -> Any:
    if not is_name(name):
        raise ValueError(f"{str(name)!r} is no network's name on the hub, expected one such as 'owner/name'")
    try:
        importlib.import_module("huggingface_hub.errors")
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError(
            f"{name}: the hub needs the package huggingface_hub: pip install 'multifire[hub]' "
            "(and if a folder was meant, there is none of that name)"
        ) from None
