"""Public data sets with a short name: location on the Hub, licence, what a record becomes.

A set is downloaded when it is first loaded. Licences are as stated by the authors or the Hub;
read them before you publish a model trained on the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from blocktune.data.example import RagExample

DATA_SETS = "data_sets"
"""Key in an example's ``meta``: name on the Hub -> licence. A file does not name its data set."""
_TEST = re.compile(r"(?<![a-z])test(?![a-z])")
_ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[^/]*)?")


@dataclass(frozen=True)
class DataSet:
    """A data set on the Hugging Face Hub, its licence as stated, and what a record becomes."""

    hub: str
    licence: str
    becomes: str
    config: str | None = None
    shape: str | None = None  # as in ``as=``; None if fields tell it, or without passages
    # branch, if not the main one: the Hub's own parquet copy of a repository with a loading script
    revision: str | None = None
    split: str = "validation"  # the default split
    streamed: bool = False  # too large to download as a whole; a limit is needed

    @property
    def at(self) -> str:
        """Repository and configuration, as after ``hf:``."""
        return self.hub + (f":{self.config}" if self.config else "")


_FILE = Path(__file__).with_name("catalog.yaml")
CATALOG = {name: DataSet(**entry) for name, entry in yaml.safe_load(_FILE.read_text()).items()}
"""By short name."""


def data_set(name: str) -> DataSet:
    """The data set of a name: one of `CATALOG`, ``owner/name[:config]``, or a folder."""
    if name in CATALOG:
        return CATALOG[name]
    path, _, config = name.partition(":")
    return DataSet(path, "see its card", "as its fields tell", config or None)


def data_sets_in(source: str) -> dict[str, str]:
    """Data sets on the Hub that a source names, with their licences; none for a file."""
    written = source.partition("?")[0]
    name = written.removeprefix("hf:")
    # hf: may also be followed by a local folder.
    on_hub = written.startswith("hf:") and _ON_HUB.fullmatch(name) and not Path(name).exists()
    if name not in CATALOG and not on_hub:
        return {}
    named = data_set(name)
    return {named.hub: named.licence}


def data_sets_of(examples: Iterable[RagExample]) -> dict[str, str]:
    """The data sets that examples name in their ``meta``: name on the Hub -> licence."""
    named = (example.meta.get(DATA_SETS) for example in examples)
    return {k: v for one in named if isinstance(one, Mapping) for k, v in one.items()}


def with_data_sets(examples: Iterable[RagExample], source: str) -> Iterator[RagExample]:
    """Adds the data sets of the source that examples were loaded from to their ``meta``."""
    named = data_sets_in(source)
    for example in examples:
        found = data_sets_of([example]) | named
        yield replace(example, meta=example.meta | ({DATA_SETS: found} if found else {}))


def is_test_split(source: str, split: str | None = None) -> bool:
    """Whether questions are of a final comparison: the split, an option or the file says ``test``.

    ``split`` is what is read if the source names none.
    """
    name, _, options = source.partition("?")
    default = split if split and "split=" not in options else ""
    shown = f"{Path(name).name}?{options}?{default}".lower()  # not the folders above a file
    return _TEST.search(shown) is not None
