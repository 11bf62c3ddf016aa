"""The table of record shapes: how each is told from the others, and what it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking import Chunker, build_chunker
from blocktune.data.example import RagExample
from blocktune.data.sources.schemas import parse_ctxs, parse_musique, parse_wiki
from blocktune.data.sources.texts import (
    Cutter,
    parse_chat,
    parse_document,
    parse_pair,
    parse_summary,
    parse_trivia,
)


class Shape(NamedTuple):
    """One record shape.

    Attributes:
        key: What ``as=`` calls it.
        name: As errors call it.
        keys: Fields that tell it from the others; empty if only ``as=`` can name it.
        parse: Turns a record into an example, given a `Cutter` where there is a ``chunker``;
            raises `LeftOut`, or ValueError that names a field.
        chunker: Name of the chunker it is cut by unless another is given; None has chunks already.
        in_shots: Whether other examples of the source become the chunks.
    """

    key: str
    name: str
    keys: tuple[tuple[str, ...], ...]
    parse: Callable[..., RagExample]
    chunker: str | None = None
    in_shots: bool = False

    def fits(self, value: Any) -> bool:
        """Whether ``value`` is a record of this shape."""
        return isinstance(value, Mapping) and any(
            all(value.get(key) is not None for key in keys) for keys in self.keys
        )

    def parser(
        self, chunker: Chunker | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Callable[[Any], RagExample]:
        """The function from a record to an example.

        Raises:
            ValueError: If a chunker is given and records of this shape have chunks already.
        """
        if self.chunker is None and chunker is not None:
            raise ValueError(
                f"records of the shape '{self.key}' have chunks already; leave the chunker out"
            )
        if self.chunker is None:
            return self.parse
        cutter = Cutter(chunker or build_chunker(self.chunker), tokenizer)
        return partial(self.parse, cutter=cutter)


SHAPES = (
    Shape("blocktune", "blocktune", (("question", "chunks"),), RagExample.from_json),
    Shape("musique", "MuSiQue", (("question", "paragraphs"),), parse_musique),
    Shape("wiki", "HotpotQA or 2WikiMultihopQA", (("question", "context"),), parse_wiki),
    Shape("ctxs", "CacheBlend", (("question", "ctxs"),), parse_ctxs),
    Shape("triviaqa", "TriviaQA", (("question", "entity_pages"),), parse_trivia, "delimiter"),
    Shape("chat", "conversations", (("messages",), ("conversations",)), parse_chat, "message"),
    Shape("summary", "summaries", (("document", "summary"),), parse_summary, "delimiter"),
    Shape("few-shot", "pairs", (("dialogue", "summary"),), parse_pair, in_shots=True),
    Shape("document", "plain texts", (), parse_document, "delimiter"),
)


def named_shape(key: str) -> Shape:
    """The shape that ``as=`` calls so.

    Raises:
        ValueError: If there is none.
    """
    for shape in SHAPES:
        if shape.key == key:
            return shape
    known = ", ".join(shape.key for shape in SHAPES)
    raise ValueError(f"unknown record shape '{key}'; available: {known}")


def find_shape(values: Iterable[Any], source: str) -> Shape:
    """The first shape that any of the records has.

    Raises:
        ValueError: If none fits; lists the shapes.
    """
    values = list(values)
    for value in values:
        for shape in SHAPES:
            if shape.fits(value):
                return shape
    raise ValueError(_no_shape(values[0] if values else None, source))


def _no_shape(first: Any, source: str) -> str:
    if isinstance(first, Mapping) and {"question", "answer"} <= first.keys():
        of_answers = ("answer", "answers", "answer_aliases")
        lists = [k for k, value in first.items() if isinstance(value, list) and k not in of_answers]
        if lists:
            return (
                f'{source} has no field "chunks"; rename the one that holds the passages (it has '
                f'the lists {", ".join(lists)}) and "answer", if need be, to a list "answers"'
            )
        return f"{source} holds questions without passages; add them: `blocktune data passages`"
    wanted = "; ".join(
        f"{shape.name}: {' or '.join(map(', '.join, shape.keys))}" for shape in SHAPES if shape.keys
    )
    found = ", ".join(map(str, first)) if isinstance(first, Mapping) else type(first).__name__
    return (
        f"{source} holds no questions in a known shape; looked for the fields of {wanted}; "
        f"the first record has: {found or 'nothing'}; a shape can be named: as=document"
    )
