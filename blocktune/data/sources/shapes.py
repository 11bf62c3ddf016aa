"""The table of record shapes: how each is recognised, and how it becomes an example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking import Chunker, build_chunker
from blocktune.data.example import TEXT_KEYS, RagExample
from blocktune.data.sources import schemas, texts


class Shape(NamedTuple):
    """One record shape."""

    key: str  # its name in ``as=``
    keys: tuple[tuple[str, ...], ...]  # sets of fields, any of which tells it; empty: only ``as=``
    # turns a record into an example, given a ``cutter`` where there is a ``chunker``; raises
    # `LeftOut`, or ValueError that names a field
    parse: Callable[..., RagExample]
    chunker: str | None = None  # the one it is cut by by default; None has chunks already
    may_cut: bool = False  # has chunks already, but may hold one text instead, which a chunker cuts
    in_shots: bool = False  # whether other examples of the source become the chunks

    def fits(self, value: Any) -> bool:
        """Whether ``value`` is a record of this shape."""
        return isinstance(value, Mapping) and any(
            all(value.get(key) is not None for key in keys) for keys in self.keys
        )

    def parser(
        self, chunker: Chunker | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Callable[[Any], RagExample]:
        """The function from a record to an example."""
        if self.chunker is None and chunker is None:
            return self.parse
        if self.chunker is None and not self.may_cut:
            raise ValueError(
                f"records of the shape '{self.key}' have chunks already; leave the chunker out"
            )
        cutter = schemas.Cutter(chunker or build_chunker(self.chunker), tokenizer)
        return partial(self.parse, cutter=cutter)


SHAPES = (
    Shape("blocktune", (("question", "chunks"),), schemas.parse_own, may_cut=True),
    Shape("musique", (("question", "paragraphs"),), schemas.parse_musique),
    Shape("wiki", (("question", "context"),), schemas.parse_wiki, may_cut=True),
    Shape("ctxs", tuple(("question", name) for name in schemas.PASSAGES), schemas.parse_ctxs),
    Shape("triviaqa", (("question", "entity_pages"),), schemas.parse_trivia, "delimiter"),
    Shape("mt-rag", (("contexts", "input", "targets"),), texts.parse_session),
    Shape("longbench", (("input", "context"),), schemas.parse_longbench, "delimiter"),
    Shape("grounded", (("messages", "documents"), ("prompt", "documents")), texts.parse_grounded),
    Shape("chat", (("messages",), ("conversations",)), texts.parse_chat, "message"),
    Shape("summary", (("document", "summary"),), texts.parse_summary, "delimiter"),
    Shape("few-shot", (("dialogue", "summary"),), texts.parse_pair, in_shots=True),
    Shape("document", (), texts.parse_document, "delimiter"),
)


def find_shape(values: Iterable[Any], source: str, key: str | None = None) -> Shape:
    """The shape that ``as=`` calls by its key, else the first that any of the records has."""
    known, values = {shape.key: shape for shape in SHAPES}, list(values)
    if key and key not in known:
        raise ValueError(f"unknown record shape '{key}'; available: {', '.join(known)}")
    found = known[key] if key else next((s for v in values for s in SHAPES if s.fits(v)), None)
    if found is None:
        raise ValueError(no_shape(values[0] if values else None, source))
    return found


def rename(record: Any, fields: Mapping[str, str]) -> Any:
    """A record with fields renamed: new name -> old name, with dots for a field within a field."""
    if not isinstance(record, Mapping):
        return record
    taken = {old.partition(".")[0] for old in fields.values()}
    renamed = {key: value for key, value in record.items() if key not in taken | fields.keys()}
    for new, old in fields.items():
        value: Any = record
        for part in [old] if old in record else old.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise ValueError(f"has no field \"{old}\" for '{new}'; it has {', '.join(record)}")
            value = value[part]
        renamed[new] = value
    return renamed


_QUESTION_KEYS = ("question", "query", "user_input", "instruction", "prompt", "input", "q", "key")
_ANSWER_KEYS = ("answers", "answer", "outputs", "output", "target", "response", "label", "value")
_PASSAGE_KEYS = ("context", "passage", "article", "document", "story", "input")


def no_shape(first: Any, source: str) -> str:
    """Why records cannot be read: what the first one looks like, and what would read it."""
    if not isinstance(first, Mapping) or not first:
        kind = "there is none" if not first else f"the first is {type(first).__name__}"
        return f'{source} holds no records with fields ({kind}); give {{"question", "chunks"}}'
    told = f"{source}: no known shape; the first record has: {', '.join(map(str, first))}"
    keys = {str(key).lower(): key for key, value in first.items() if value is not None}
    asked = [keys[key] for key in _QUESTION_KEYS if key in keys]
    question = next((key for key in asked if isinstance(first[key], str)), None)
    nested = (key for key in asked if isinstance(first[key], Mapping) and "text" in first[key])
    question = question or next((f"{key}.text" for key in nested), None)  # Natural Questions
    answers = next((keys[key] for key in _ANSWER_KEYS if key in keys), None)
    others = {k: v for k, v in first.items() if k not in (question, answers, "answer_aliases")}
    named = (keys[key] for key in _PASSAGE_KEYS if keys.get(key) in others)
    passages = next((key for key in named if isinstance(first[key], str)), None)
    passages = passages or next((k for k, v in others.items() if _holds_passages(v)), None)
    text = next((key for key in TEXT_KEYS if isinstance(first.get(key), str)), None)
    if question is None and text:
        named = "" if text == "text" else f"&fields=text:{text}"
        return (
            f"{told}. It looks like a corpus: give it to `blocktune data passages --corpus`, or "
            f"cut each text into an example by '{source}?as=document{named}'"
        )
    if question and answers and passages is None:
        return f"{told}. It holds questions without passages; add them: `blocktune data passages`"
    if (
        passages is None
        and question is None
        and not any(
            isinstance(v, str) and sum(map(str.isalpha, v.split())) > 1 for v in first.values()
        )
    ):
        return f"{told}. None of them holds text; questions with their passages are wanted"
    mapping = f"question:{question or 'FIELD'},chunks:{passages or 'FIELD'}"
    mapping += f",answers:{answers}" if answers else ""
    return f"{told}. Say which are meant, such as '{source}?fields={mapping}'"


def _holds_passages(value: Any) -> bool:
    """Whether a value may be a question's passages: texts or objects, columns, or a long text."""
    if isinstance(value, str):
        return len(value) > 400
    if isinstance(value, Mapping):
        return any(isinstance(column, list) for column in value.values())
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | list | Mapping)
