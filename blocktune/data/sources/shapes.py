"""Table of record shapes: how each is recognised, and how it is converted to an example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking import Chunker, build_chunker
from blocktune.data.example import TEXT_KEYS, RagExample
from blocktune.data.sources import schemas, texts


class Shape(NamedTuple):
    """The format of a source's records."""

    key: str  # its name in ``as=``
    keys: tuple[tuple[str, ...], ...]  # sets of fields, each sufficient; empty: only by ``as=``
    # converts a record; gets a ``cutter`` if there is a chunker; raises `LeftOut` or ValueError
    parse: Callable[..., RagExample]
    chunker: str | None = None  # default chunker; None: its records already have chunks
    may_cut: bool = False  # records without a default chunker may hold one text, to be split
    in_shots: bool = False  # whether other examples of the source become the chunks

    def fits(self, value: Any) -> bool:
        """Whether ``value`` is a record with the fields of this shape."""
        return isinstance(value, Mapping) and any(
            all(value.get(key) is not None for key in keys) for keys in self.keys
        )

    def parser(
        self, chunker: Chunker | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Callable[[Any], RagExample]:
        """Returns the function that converts a record to an example."""
        if self.chunker is None and chunker is None:
            return self.parse
        if self.chunker is None and not self.may_cut:
            raise ValueError(f"shape '{self.key}' has chunks already; leave the chunker out")
        cutter = schemas.Cutter(chunker or build_chunker(self.chunker), tokenizer)
        return partial(self.parse, cutter=cutter)


_CHATS = (("messages",), ("conversations",))
SHAPES = (
    Shape("blocktune", (("question", "chunks"),), schemas.parse_own, may_cut=True),
    Shape("musique", (("question", "paragraphs"),), schemas.parse_musique),
    Shape("longbench-v2", (("context", "choice_A"),), schemas.parse_longbench, "delimiter"),
    Shape("wiki", (("question", "context"),), schemas.parse_wiki, may_cut=True),
    Shape("ctxs", tuple(("question", name) for name in schemas.PASSAGES), schemas.parse_ctxs),
    Shape("ragas", (("user_input", "retrieved_contexts"),), schemas.parse_ragas),
    Shape("triviaqa", (("question", "entity_pages"),), schemas.parse_trivia, "delimiter"),
    Shape("mt-rag", (("contexts", "input", "targets"),), texts.parse_session),
    Shape("longbench", (("input", "context"),), schemas.parse_longbench, "delimiter"),
    Shape("grounded", tuple((n, "documents") for n in texts.GROUNDED), texts.parse_grounded),
    Shape("chat", _CHATS, texts.parse_chat, "message"),
    Shape("summary", (("document", "summary"),), texts.parse_summary, "delimiter"),
    Shape("few-shot", (("dialogue", "summary"),), texts.parse_pair, in_shots=True),
    Shape("completion", (("prompt", "completion"),), texts.parse_chat, "message"),
    Shape("document", (), texts.parse_document, "delimiter"),
)


def find_shape(values: Iterable[Any], source: str, key: str | None = None) -> Shape:
    """Returns the shape named by ``key``, else the first in `SHAPES` that fits any record."""
    by_key, values = {shape.key: shape for shape in SHAPES}, list(values)
    if key and key not in by_key:
        raise ValueError(f"unknown record shape '{key}'; available: {', '.join(by_key)}")
    shape = by_key[key] if key else next((s for s in SHAPES for v in values if s.fits(v)), None)
    if shape is None:
        raise ValueError(unknown_shape(values[0] if values else None, source))
    return shape


def rename(record: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Renames fields: new name -> old name, which may be a dotted path to a nested field."""
    used = {old if old in record else old.partition(".")[0] for old in fields.values()}
    renamed = {key: value for key, value in record.items() if key not in used | fields.keys()}
    for new, old in fields.items():
        value: Any = record
        for part in [old] if old in record else old.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise ValueError(f"has no field \"{old}\" for '{new}'; it has {', '.join(record)}")
            value = value[part]
        renamed[new] = value
    return renamed


_QUESTION_KEYS = ("question", "query", "user_input", "instruction", "prompt", "input", "q", "key")
_ANSWER_KEYS = ("answers", "golden_answers", "ground_truth", "reference", "answer", "outputs")
_ANSWER_KEYS += ("output", "target", "response", "label", "value")
_PASSAGE_KEYS = ("chunks", "context", "passage", "article", "document", "story", "input")


def unknown_shape(first: Any, source: str) -> str:
    """Error message for records of unknown shape: their fields, and how they might be read."""
    if not isinstance(first, Mapping) or not first:
        kind = "there is none" if not first else f"the first is {type(first).__name__}"
        return f'{source} holds no records with fields ({kind}); give {{"question", "chunks"}}'
    reason = f"{source}: no known shape; the first record has: {', '.join(map(str, first))}"
    keys = {str(key).lower(): key for key, value in first.items() if value is not None}
    candidates = [keys[key] for key in _QUESTION_KEYS if key in keys]
    question = next((key for key in candidates if isinstance(first[key], str)), None)
    nested = (k for k in candidates if isinstance(first[k], Mapping) and "text" in first[k])
    question = question or next((f"{key}.text" for key in nested), None)  # Natural Questions
    answers = next((keys[key] for key in _ANSWER_KEYS if key in keys), None)
    asked = (question or "").partition(".")[0]
    others = {k: v for k, v in first.items() if k not in (asked, answers, "answer_aliases")}
    usual = (keys[key] for key in _PASSAGE_KEYS if keys.get(key) in others)
    passages = next((key for key in usual if isinstance(first[key], str)), None)
    passages = passages or next((k for k, v in others.items() if _holds_passages(v)), None)
    text = next((key for key in TEXT_KEYS if isinstance(first.get(key), str)), None)
    if question is None and text:
        fields = "" if text == "text" else f"&fields=text:{text}"
        return (
            f"{reason}. It looks like a corpus: give it to `blocktune data passages --corpus`, or "
            f"cut each text into an example by '{source}?as=document{fields}'"
        )
    if question and answers and passages is None:
        return f"{reason}. It holds questions without passages; add them: `blocktune data passages`"
    texts = [value.split() for value in first.values() if isinstance(value, str)]
    has_words = any(sum(map(str.isalpha, words)) > 1 for words in texts)
    if passages is None and question is None and not has_words:
        return f"{reason}. None of them holds text; questions with their passages are wanted"
    mapping = f"question:{question or 'FIELD'},chunks:{passages or 'FIELD'}"
    mapping += f",answers:{answers}" if answers else ""
    return f"{reason}. Say which are meant, such as '{source}?fields={mapping}'"


def _holds_passages(value: Any) -> bool:
    """Whether a value may hold passages: a list, columns, an object with a text, a long text."""
    if isinstance(value, str):
        return len(value) > 400
    if isinstance(value, Mapping):
        return "text" in value or any(isinstance(column, list) for column in value.values())
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | list | Mapping)
