"""Public data sets with a short name: location on the Hub, licence, what a record becomes.

A set is downloaded when it is first loaded. Licences are as stated by the authors or the Hub;
read them before you publish a model trained on the data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PARQUET = "refs/convert/parquet"
"""The Hub's own parquet copy, for repositories that still hold a loading script."""

_ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[^/]*)?")


@dataclass(frozen=True)
class DataSet:
    """A data set on the Hugging Face Hub.

    Attributes:
        hub: Repository.
        licence: As stated.
        becomes: What one record turns into.
        config: Configuration, or None for the default.
        shape: Record shape, as in ``as=``; None if the fields tell it, or if the records are
            questions without passages.
        revision: Branch, if not the main one.
        split: The default split.
        streamed: Too large to download as a whole; a limit is needed.
        home: The authors' page.
    """

    hub: str
    licence: str
    becomes: str
    home: str
    config: str | None = None
    shape: str | None = None
    revision: str | None = None
    split: str = "validation"
    streamed: bool = False


CATALOG = {
    "2wikimultihopqa": DataSet(
        hub="framolfese/2WikiMultihopQA",
        licence="Apache-2.0",
        becomes="question over its 10 paragraphs",
        home="https://github.com/Alab-NII/2wikimultihop",
        shape="wiki",
    ),
    "hotpotqa": DataSet(
        hub="hotpotqa/hotpot_qa",
        config="distractor",
        licence="CC BY-SA 4.0",
        becomes="question over its 10 paragraphs",
        home="https://hotpotqa.github.io",
        shape="wiki",
    ),
    "musique": DataSet(
        hub="dgslibisey/MuSiQue",
        licence="CC BY 4.0",
        becomes="question over its 20 paragraphs",
        home="https://github.com/StonyBrookNLP/musique",
        shape="musique",
    ),
    "triviaqa": DataSet(
        hub="mandarjoshi/trivia_qa",
        config="rc",
        licence="not stated on the Hub (code Apache-2.0)",
        becomes="question over its evidence pages, cut; then `data passages` for the best",
        home="https://nlp.cs.washington.edu/triviaqa",
        shape="triviaqa",
    ),
    "triviaqa-questions": DataSet(
        hub="mandarjoshi/trivia_qa",
        config="rc.nocontext",
        licence="not stated on the Hub (code Apache-2.0)",
        becomes="question without passages, for `data passages`",
        home="https://nlp.cs.washington.edu/triviaqa",
    ),
    "nq": DataSet(
        hub="google-research-datasets/nq_open",
        licence="CC BY-SA 3.0",
        becomes="question without passages, for `data passages`",
        home="https://ai.google.com/research/NaturalQuestions",
    ),
    "tulu-3": DataSet(
        hub="allenai/tulu-3-sft-mixture",
        licence="ODC-BY 1.0; parts have their own, some non-commercial",
        becomes="conversation, a chunk per earlier turn or piece of the message",
        home="https://arxiv.org/abs/2411.15124",
        shape="chat",
        split="train",
    ),
    "xsum": DataSet(
        hub="EdinburghNLP/xsum",
        licence="not stated",
        becomes="article, cut, and its summary",
        home="https://arxiv.org/abs/1808.08745",
        shape="summary",
        revision=PARQUET,
    ),
    "multi-news": DataSet(
        hub="alexfabbri/multi_news",
        licence="other: non-commercial research and education",
        becomes="articles, a chunk each, and their summary",
        home="https://arxiv.org/abs/1906.01749",
        shape="summary",
        revision=PARQUET,
    ),
    "samsum": DataSet(
        hub="knkarthick/samsum",
        licence="CC BY-NC-ND 4.0",
        becomes="dialogue to summarise, solved ones as chunks",
        home="https://arxiv.org/abs/1911.12237",
        shape="few-shot",
    ),
    "fineweb": DataSet(
        hub="HuggingFaceFW/fineweb",
        config="sample-10BT",
        licence="ODC-BY 1.0, and Common Crawl's terms of use",
        becomes="web page, cut; the model writes the last piece",
        home="https://arxiv.org/abs/2406.17557",
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
    return DataSet(path, "see its card", "as its fields tell", path, config or None)


def data_sets_in(source: str) -> dict[str, str]:
    """Data sets on the Hub that a source names, with their licences; none for a file.

    Args:
        source: As for `blocktune.data.load_examples`.
    """
    written = source.partition("?")[0]
    name = written.removeprefix("hf:")
    # hf: may also be followed by a local folder.
    on_hub = written.startswith("hf:") and _ON_HUB.fullmatch(name) and not Path(name).exists()
    if name not in CATALOG and not on_hub:
        return {}
    named = data_set(name)
    return {named.hub: named.licence}
