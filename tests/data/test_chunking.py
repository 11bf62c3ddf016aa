"""Every chunker: its spans join to the text, and it cuts where its paper cuts."""

import random
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blocktune.data.chunking import CHUNKERS, Message, build_chunker, chunks_of, parse_chunker
from blocktune.prompt import Chunk

TEXTS = [
    "Dr. Belt lives in Port Alder. She moved there in 1966!  Why? Nobody asked.\n\nNew page.",
    "one\ntwo\n\n\nthree---four\n===\nfive",
    "no delimiter and no full stop",
    " \n ",
    "naïve café, 東京は雨です。 🎬🎬 done.",
]
CHAT = [
    Message("system", "Be brief."),
    Message("user", "Who?"),
    Message("assistant", "Anna."),
    Message("assistant", "Anna Belt."),
    Message("user", "Where?"),
]


@pytest.mark.parametrize("name", CHUNKERS.available())
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 3])
def test_spans_join_to_the_text(tokenizer, name, text, size):
    parameters = {"size": size} if name in ("fixed", "sentence") else {}
    spans = build_chunker(name, **parameters).split(text, tokenizer)
    assert "".join(spans) == text


def test_the_strongest_delimiter_cuts_and_stays_on_the_left():
    split = build_chunker("delimiter").split
    assert split("a\nb\n\nc\n\nd") == ["a\nb\n\n", "c\n\n", "d"]
    assert split("a\r\nb\r\n\r\nc") == ["a\r\nb\r\n\r\n", "c"]
    assert split("a---b\nc") == ["a---", "b\nc"]
    assert split("\n\na\n\n\n\nb\n\n") == ["\n\na\n\n\n\n", "b\n\n"]
    assert build_chunker("delimiter", delimiter="|").split("a|b\n\nc|") == ["a|", "b\n\nc|"]


def test_the_shortest_neighbours_are_joined():
    text = "aaaa\n\nb\n\nc\n\ndddd\n\neeee"
    spans = build_chunker("delimiter", max_chunks=3).split(text)
    assert spans == ["aaaa\n\n", "b\n\nc\n\n", "dddd\n\neeee"]


@pytest.mark.parametrize("mark", ["\n", "|"])
@pytest.mark.parametrize("most", [1, 3, 14])
def test_joining_is_that_of_the_definition(mark, most):
    """The queue of pairs gives what a search among all pairs gives, which is quadratic."""
    draw = random.Random(f"{mark}/{most}")
    for _ in range(100):
        text = "".join(draw.choices(["a", "bcd", " ", mark, mark * 2], k=draw.randrange(60)))
        parts, wanted = re.findall(rf"[^{re.escape(mark)}]*{re.escape(mark)}|.+$", text), []
        for part in parts if mark in text.strip() else [text]:
            blank = wanted and not (part.strip() and wanted[-1].strip())
            wanted[-1:] = [wanted[-1] + part] if blank else [*wanted[-1:], part]
        while len(wanted) > most:
            at = min(range(len(wanted) - 1), key=lambda i: len(wanted[i] + wanted[i + 1]))
            wanted[at : at + 2] = [wanted[at] + wanted[at + 1]]
        assert build_chunker("delimiter", delimiter=mark, max_chunks=most).split(text) == wanted


def test_fixed_spans_have_so_many_tokens_and_overlap(tokenizer):
    text = "Anna Belt was born in Port Alder and studied chemistry at the college there."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spans = build_chunker("fixed", size=5).split(text, tokenizer)
    decoded = [tokenizer.decode(ids[start : start + 5]) for start in range(0, len(ids), 5)]
    assert spans == decoded
    overlapping = build_chunker("fixed", size=5, overlap=2).split(text, tokenizer)
    assert overlapping[1] == tokenizer.decode(ids[3:8])
    assert overlapping[-1].endswith("there.")


def test_what_the_tokenizer_leaves_out_stays_in_the_spans():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    spans = build_chunker("fixed", size=2).split("  one two  three\n", words)
    assert spans == ["  one two  ", "three\n"]


def test_sentences_are_grouped_and_abbreviations_do_not_end_them():
    text = "Dr. Smith went to Washington, D.C. in Jan. 1999. He paid $3.50. Then he left."
    assert build_chunker("sentence", size=2).split(text) == [
        "Dr. Smith went to Washington, D.C. in Jan. 1999. He paid $3.50. ",
        "Then he left.",
    ]


def test_turns_and_messages():
    assert build_chunker("message").split_messages(CHAT) == [
        "System: Be brief.",
        "User: Who?\nAssistant: Anna.\nAssistant: Anna Belt.",
        "User: Where?",
    ]
    assert len(build_chunker("message", unit="message").split_messages(CHAT)) == 5
    assert build_chunker("message").split("a\n\nb") == ["a\n\n", "b"]
    by_sentence = build_chunker("sentence", size=1).split_messages(CHAT[:2])
    assert by_sentence == ["System: Be brief.", "User: Who?"]


def test_chunks_keep_the_indent_of_a_line_and_no_other_space_around_them():
    spans = [" \n\n  a\n", "\n", "    b\n\n", "c", "  d ", "e"]
    texts = ["  a", "    b", "c", "d", "e"]
    assert chunks_of(spans, "T") == tuple(Chunk(text, "T") for text in texts)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("magic", "unknown chunker 'magic'; available: delimiter, fixed, message, sentence"),
        ({"size": 3}, "must be a name or {name, ...}, got {'size': 3}"),
        ({"name": "fixed", "sise": 3}, "unknown key 'sise'; known: size, overlap"),
        ({"name": "fixed", "size": 0}, "size must be a whole number, at least 1"),
        (
            {"name": "fixed", "size": 4, "overlap": 4},
            "at least 5 (more than the overlap), got 4",
        ),
        ({"name": "sentence", "size": "x"}, "'size' must be a whole number, got 'x'"),
        ({"name": "sentence", "language": False}, "'language' must be text, got False"),
        ({"name": "delimiter", "delimiter": 5}, "'delimiter' must be text or null, got 5"),
        ({"name": "delimiter", "delimiter": ""}, "delimiter must not be empty"),
        ({"name": "delimiter", "max_chunks": 0}, "max_chunks must be a whole number, at least 1"),
        ({"name": "message", "unit": "day"}, "unit must be one of turn, message, got 'day'"),
    ],
)
def test_bad_chunker_is_refused(value, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        parse_chunker(value, "mixture.yaml: parts[1]: chunker")
    assert str(error.value).startswith("mixture.yaml: parts[1]: chunker: ")
    assert message in str(error.value)


def test_counting_tokens_needs_a_fast_tokenizer():
    with pytest.raises(ValueError, match="chunker 'fixed' needs a fast tokenizer, got none"):
        build_chunker("fixed").split("text")
