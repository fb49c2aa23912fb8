"""Upload shared folders to Hugging Face's hub and download them, with huggingface_hub (the extra `hub`).

The library's ModelHubMixin is not used: networks would have to inherit from it, and it passes an untrusted config.json
to the constructor unchecked.
"""

import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NETWORK = ["config.json", "model.safetensors"]
"""The only files that are downloaded: no code, no pickle."""
CARD = "README.md"


def is_name(source: str | Path) -> bool:
    """Return True if `source` can be the name of a network on the hub; a Path cannot."""
    return isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII) is not None


def download(name: str, revision: str | None) -> Path:
    """Download a network's files at a branch, tag or commit; return their folder in the library's cache.

    Raises:
        FileNotFoundError: no such network or revision, or the hub cannot be reached and the cache lacks it.
        ValueError: not a name on the hub, or huggingface_hub is not installed.
    """
    hub = _library(name)
    try:
        with _as_connection_error(name):
            return Path(hub.snapshot_download(name, revision=revision, allow_patterns=NETWORK))
    except hub.errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"{name}: no revision {revision!r} on the hub; expected a branch, a tag or the full hash of a commit"
        ) from None
    except hub.errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name}: no such folder here, and no such network on the hub; if it is private, run `hf auth login`"
        ) from None


def upload(folder: Path, name: str, private: bool) -> str:
    """Upload a folder's network and model card; create the repository if necessary; return the commit's hash.

    Raises:
        OSError: the hub refuses or cannot be reached.
        ValueError: not a name on the hub, or huggingface_hub is not installed.
    """
    hub = _library(name)
    with _as_connection_error(name):
        hub.create_repo(name, private=private, exist_ok=True)
        return hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[*NETWORK, CARD],
            commit_message="Upload a network of multifire",
        ).oid


@contextlib.contextmanager
def _as_connection_error(name: str) -> Iterator[None]:
    """Turn errors of the HTTP client into ConnectionError; releases of the library use different clients."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ConnectionError(f"{name}: the hub was not reached ({type(error).__name__}: {error})") from error


def _library(name: str) -> Any:
    """Check the name and import huggingface_hub."""
    if not is_name(name):
        raise ValueError(f"{str(name)!r} is not a network's name on the hub, expected one such as 'owner/name'")
    try:
        importlib.import_module("huggingface_hub.errors")
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError(
            f"{name}: the hub needs the package huggingface_hub: run `pip install 'multifire[hub]'`; "
            "if you meant a folder, check its path"
        ) from None
