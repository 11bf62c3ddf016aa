"""Names on the Hub: what may be one, and what the Hub says of a base."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id


def check_repo(repo: str) -> None:
    """Refuses what is no USER/NAME.

    Raises:
        ValueError: If it is none.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--repo must be USER/NAME: {str(error).splitlines()[0]}") from None
    if "/" not in repo:
        raise ValueError(f"--repo must be USER/NAME, got '{repo}'")


def on_the_hub(name: str) -> str:
    """The base's name, if it can be one on the Hub.

    Raises:
        ValueError: If it is a folder.
    """
    if not name or Path(name).exists() or name.count("/") > 1 or name.startswith((".", "/")):
        raise ValueError(
            f"the base is the local folder '{name}', which nobody else can load; give its name on "
            "the Hub: --base-model ORG/NAME"
        )
    return name


def license_of(base: str, token: str | None = None) -> str:
    """The licence that a base's card states.

    Args:
        base: Its name on the Hub.
        token: Of the Hub; None: the one that is logged in.

    Raises:
        ValueError: If there is none, or the Hub does not answer.
    """
    try:
        data = HfApi(token=token).model_info(base).card_data
    except (httpx.HTTPError, HFValidationError, OSError):
        data = None
    if data is None or not data.license:
        raise ValueError(f"the licence of '{base}' is not known; give one: --license apache-2.0")
    return data.license
