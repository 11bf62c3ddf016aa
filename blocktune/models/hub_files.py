"""From a name to a folder: a local one, or a repository of the Hub at a pinned revision."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx

READ = ("*.json", "*.safetensors", "*.jinja", "*.model")
"""What is fetched of an adapter's repository: never a pickle, never code."""


def pinned(name: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """Splits ``USER/NAME@REVISION``; a local folder is left as it is.

    Args:
        name: Folder, or a repository's name, with or without a revision behind ``@``.
        revision: Of the repository, given apart.

    Raises:
        ValueError: If two revisions are given, or an empty one.
    """
    if Path(name).exists():
        return str(name), revision
    bare, at, inside = str(name).partition("@")
    if not at:
        return bare, revision
    if revision is not None or not inside:
        raise ValueError(f"'{name}': give one revision, as NAME@REVISION or apart")
    return bare, inside


def adapter_folder(adapter: str | Path, revision: str | None = None) -> Path:
    """The adapter's local folder, fetched from the Hub if it is not one already.

    Raises:
        ValueError: If it is neither a folder nor a repository that can be reached.
    """
    name, revision = pinned(adapter, revision)
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(READ)))
    except (httpx.HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no adapter '{adapter}': it is no local folder, and the Hub says: {reason}"
        ) from None
