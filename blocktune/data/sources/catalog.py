"""Public data sets with a short name: location on the Hub, licence, what a record becomes.

A set is downloaded when it is first loaded. Licences are as stated by the authors or the Hub;
read them before you publish a model trained on the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from blocktune.data.example import RagExample

PARQUET = "refs/convert/parquet"
"""The Hub's own parquet copy, for repositories that still hold a loading script."""

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
    # as in ``as=``; None if the fields tell it, or for questions without passages
    shape: str | None = None
    revision: str | None = None  # branch, if not the main one
    split: str = "validation"  # the default split
    streamed: bool = False  # too large to download as a whole; a limit is needed

    @property
    def at(self) -> str:
        """Repository and configuration, as after ``hf:``."""
        return self.hub + (f":{self.config}" if self.config else "")


CATALOG = {
    "2wikimultihopqa": DataSet(
        "framolfese/2WikiMultihopQA", "Apache-2.0", "question over its 10 paragraphs", shape="wiki"
    ),
    "hotpotqa": DataSet(
        "hotpotqa/hotpot_qa",
        "CC BY-SA 4.0",
        "question over its 10 paragraphs",
        "distractor",
        "wiki",
    ),
    "musique": DataSet(
        "dgslibisey/MuSiQue", "CC BY 4.0", "question over its 20 paragraphs", shape="musique"
    ),
    "triviaqa": DataSet(
        "mandarjoshi/trivia_qa",
        "not stated on the Hub (code Apache-2.0)",
        "question over its evidence pages, cut; then `data passages` for the best",
        config="rc",
        shape="triviaqa",
    ),
    "triviaqa-questions": DataSet(
        "mandarjoshi/trivia_qa",
        "not stated on the Hub (code Apache-2.0)",
        "question without passages, for `data passages`",
        config="rc.nocontext",
    ),
    "nq": DataSet(
        "google-research-datasets/nq_open",
        "CC BY-SA 3.0",
        "question without passages, for `data passages`",
    ),
    "tulu-3": DataSet(
        "allenai/tulu-3-sft-mixture",
        "ODC-BY 1.0; parts have their own, some non-commercial",
        "conversation, a chunk per earlier turn or piece of the message",
        shape="chat",
        split="train",
    ),
    "xsum": DataSet(
        "EdinburghNLP/xsum",
        "not stated",
        "article, cut, and its summary",
        shape="summary",
        revision=PARQUET,
    ),
    "multi-news": DataSet(
        "alexfabbri/multi_news",
        "other: non-commercial research and education",
        "articles, a chunk each, and their summary",
        shape="summary",
        revision=PARQUET,
    ),
    "samsum": DataSet(
        "knkarthick/samsum",
        "CC BY-NC-ND 4.0",
        "dialogue to summarise, solved ones as chunks",
        shape="few-shot",
    ),
    "fineweb": DataSet(
        "HuggingFaceFW/fineweb",
        "ODC-BY 1.0, and Common Crawl's terms of use",
        "web page, cut; the model writes the last piece",
        config="sample-10BT",
        shape="document",
        split="train",
        streamed=True,
    ),
}
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
