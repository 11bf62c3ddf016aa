"""From an adapter's folder to a repository: checked first, sent in one commit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import httpx
from rich.console import Console

from blocktune.adapter import OWN_WEIGHTS, AdapterInfo
from blocktune.check import Check, check_model
from blocktune.engine import Engine
from blocktune.hub.card import CardFacts, card
from blocktune.hub.files import Source, files_of, is_published
from blocktune.hub.names import check_repo, license_of, on_the_hub
from blocktune.hub.results import read_results

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Publication:
    """All that a repository will hold.

    Attributes:
        repo: ``USER/NAME``.
        files: Name -> a file's path, or its content where it was rewritten; the card among them.
    """

    repo: str
    files: dict[str, Source]

    @property
    def card(self) -> str:
        """The model card."""
        return self.files[CARD_FILE].decode()


class Sent(NamedTuple):
    """Where a publication went: address of the repository and the commit."""

    url: str
    revision: str


def prepare(
    adapter: str | Path,
    repo: str,
    facts: CardFacts,
    *,
    model: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    token: str | None = None,
) -> Publication:
    """Checks an adapter and gathers what is published of it; nothing is sent.

    Args:
        adapter: Its folder.
        repo: ``USER/NAME``.
        facts: For the card.
        model: Where the base is, for the check; None: where the adapter says.
        dtype: Of the check.
        device: Of the check.
        token: Of the Hub, to ask for the base's licence; None: as `send`.

    Raises:
        ValueError: In one line, if a check fails, the base is nobody else's to load, the licence
            is unknown, the folder is no adapter or holds pickled weights, or the results are not
            its own.
    """
    folder = Path(adapter)
    info = AdapterInfo.load(folder)
    check_repo(repo)
    base = _base_name(info, facts)
    files = files_of(folder, info, base)
    measured = read_results(facts.results, folder, info) if facts.results else None
    facts = replace(facts, license=facts.license or license_of(base, token))
    checks = _checked(folder, info, model, dtype, device)
    text = card(repo, info, base, facts, checks, measured)
    return Publication(repo, files | {CARD_FILE: text.encode()})


def send(publication: Publication, *, private: bool = False, token: str | None = None) -> Sent:
    """Creates the repository if needed and commits all files at once.

    Files of an earlier push that this one does not have are deleted: weights left over would be
    loaded with the new ones.

    Args:
        publication: From `prepare`.
        private: Make the repository private if it is new.
        token: Of the Hub; None: the one of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        ValueError: If the Hub refuses.
    """
    api = HfApi(token=token)
    try:
        url = api.create_repo(publication.repo, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(n, source) for n, source in publication.files.items()]
        there = api.list_repo_files(publication.repo)
        gone = [n for n in there if is_published(n) and n not in publication.files]
        operations += [CommitOperationDelete(name) for name in gone]
        done = api.create_commit(publication.repo, operations, commit_message="Push with blocktune")
    except (httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the Hub refused '{publication.repo}': {reason}; log in with `hf auth login` or set "
            "HF_TOKEN to a token that may write there"
        ) from None
    return Sent(str(url), done.oid)


def show(publication: Publication, console: Console) -> None:
    """Prints every file with its size, and the card."""
    console.print(f"{publication.repo}: {len(publication.files)} files, nothing sent", style="bold")
    for name, source in sorted(publication.files.items()):
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        console.print(f"  {size:>13,} bytes  {name}", highlight=False)
    console.print(f"\n{publication.card}", highlight=False, markup=False, soft_wrap=True)


def _base_name(info: AdapterInfo, facts: CardFacts) -> str:
    named = info.base_model
    if named == OWN_WEIGHTS:
        named = info.training.get("started_from", "")
    return on_the_hub(facts.base_model or named)


def _checked(folder: Path, info: AdapterInfo, model, dtype, device) -> list[Check]:
    engine = Engine.from_pretrained(
        model, folder, dtype=dtype, device=device, quantize=info.quantization
    )
    checks = check_model(engine)
    if failed := [one for one in checks if not one.passed]:
        first = failed[0]
        raise ValueError(
            f"'{folder}' is not pushed: {len(failed)} of {len(checks)} checks fail, first "
            f"'{first.name}' ({first.max_abs_diff:.1e}, tolerance {first.tolerance:.1e}); see "
            "`blocktune check`"
        )
    return checks
