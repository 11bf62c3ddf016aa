"""Public data sets by short name, and the data sets and licences that examples come from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from blocktune.data.example import RagExample

DATA_SETS = "data_sets"
"""Key in an example's ``meta`` for its data sets: name on the Hub -> licence."""
_TEST = re.compile(r"(?<![a-z])test(s|set)?(?![a-z])")
_ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[^:]+)?(:[^/]*)?")


@dataclass(frozen=True)
class DataSet:
    """A data set on the Hugging Face Hub."""

    hub: str  # repository
    licence: str  # as stated by the authors or the Hub
    becomes: str  # what a record is converted to, in words
    config: str | None = None
    shape: str | None = None  # as in ``as=``; None if detected by fields, or without passages
    # branch other than main: the Hub's parquet copy of a repository that has a loading script
    revision: str | None = None
    split: str = "validation"  # the default split; empty: validation, or train if it has none
    streamed: bool = False  # too large to download as a whole; needs a limit

    @property
    def at(self) -> str:
        """Repository and configuration, in the form used after ``hf:``."""
        return self.hub + (f":{self.config}" if self.config else "")


_ENTRIES = yaml.safe_load(Path(__file__).with_name("catalog.yaml").read_text())
CATALOG = {name: DataSet(**entry) for name, entry in _ENTRIES.items()}
"""The data sets by short name."""


def data_set(name: str) -> DataSet:
    """Returns the data set of a name in `CATALOG`, ``owner/name[@revision][:config]`` or folder."""
    if name in CATALOG:
        return CATALOG[name]
    path, _, config = name.partition(":")
    hub, _, revision = (path, "", "") if Path(path).exists() else path.partition("@")
    which = {"config": config or None, "revision": revision or None}
    return DataSet(hub, "see its card", "as its fields tell", split="", **which)


def data_sets_in(source: str) -> dict[str, str]:
    """The data set on the Hub that a source refers to -> its licence; empty for a file."""
    full_name = source.partition("?")[0]
    name = full_name.removeprefix("hf:")
    # hf: may also be followed by a local folder.
    on_hub = full_name.startswith("hf:") and _ON_HUB.fullmatch(name) and not Path(name).exists()
    if name not in CATALOG and not on_hub:
        return {}
    entry = data_set(name)
    return {entry.hub: entry.licence}


def data_sets_of(examples: Iterable[RagExample]) -> dict[str, str]:
    """The data sets in the ``meta`` of examples: name on the Hub -> licence."""
    entries = (example.meta.get(DATA_SETS) for example in examples)
    given = (entry.items() for entry in entries if isinstance(entry, Mapping))
    return {name: licence for pairs in given for name, licence in pairs if licence is not None}


def with_data_sets(examples: Iterable[RagExample], source: str) -> Iterator[RagExample]:
    """Adds the data set of a source to the ``meta`` of examples that were loaded from it."""
    of_source = data_sets_in(source)
    for example in examples:
        sets = data_sets_of([example]) | of_source
        yield replace(example, meta=example.meta | ({DATA_SETS: sets} if sets else {}))


def is_test_split(source: str, split: str | None = None) -> bool:
    """Whether a file's name, an option or the split says ``test``.

    ``split`` is the split that is read if the source names none.
    """
    name, _, options = source.partition("?")
    default = split if split and "split=" not in options else ""
    words = f"{Path(name).name}?{options}?{default}".lower()  # without the folders of a file
    return _TEST.search(words) is not None
