"""Needles over a grid: of the length, depth and chunk size asked for."""

import re

import pytest

from blocktune.data import load_examples
from blocktune.data.needle import FORMAT, MAX_NEW_TOKENS, largest
from blocktune.prompt import chunk_ids, make_pieces

GRID = "needle:?lengths=700,1400&depths=0,50,100&n=2&chunk=100"


def test_needle_stands_at_its_depth(tokenizer):
    examples = load_examples(GRID, tokenizer=tokenizer)
    assert len(examples) == 12
    assert len({example.kind for example in examples}) == 6
    assert examples[2].kind == "700 tokens, depth 50 %"
    for example in examples:
        text = " ".join(chunk.text for chunk in example.chunks)
        at = text.index("One of the special magic numbers") / len(text)
        assert at == pytest.approx(example.meta["depth"] / 100, abs=0.2)
        assert example.answers[0] in example.chunks[example.supporting[0]].text
        assert 0.85 * 700 < example.meta["length"] <= int(example.kind.split()[0])
    assert load_examples(GRID, tokenizer=tokenizer, limit=3) == examples[:3]


def test_every_cell_hides_the_same_needles(tokenizer):
    answers = [example.answers for example in load_examples(GRID, tokenizer=tokenizer)]
    assert set(answers[::2]) == {answers[0]}
    assert set(answers[1::2]) == {answers[1]}


def test_length_and_chunk_size_are_kept(tokenizer):
    for example in load_examples(GRID, tokenizer=tokenizer):
        pieces = make_pieces(tokenizer, FORMAT, example.chunks, example.question)
        tokens = sum(map(len, (pieces.prefix, *pieces.chunks, pieces.query))) + MAX_NEW_TOKENS
        assert tokens == example.meta["length"]
        sizes = [len(ids) for ids in chunk_ids(tokenizer, FORMAT, example.chunks)]
        assert max(sizes) <= 100 + 5  # the newline after a chunk, and merges across sentences
        assert len(sizes) <= 2.5 * sum(sizes) / 100


def test_example_says_how_it_is_asked_and_scored(tokenizer):
    example = load_examples(GRID, tokenizer=tokenizer, limit=1)[0]
    assert re.fullmatch(r"\d{7}", example.answers[0])
    key = re.fullmatch(r"What is the special magic number for (\S+) men.*\?", example.question)[1]
    text = " ".join(chunk.text for chunk in example.chunks)
    needle = f"One of the special magic numbers for {key} is: {example.answers[0]}."
    assert text.count(needle) == 1
    assert example.meta["scorer"] == "ruler_recall"
    assert example.meta["instruction"].startswith("A special magic number is hidden within")
    assert example.meta["lead"].endswith(f"{key} mentioned in the provided text is")


def test_own_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tok")
    source = "needle:?lengths=900&depths=50&n=1"
    [example] = load_examples(source, tokenizer=tokenizer)
    assert load_examples(f"{source}&tokenizer={tmp_path / 'tok'}") == [example]
    with pytest.raises(ValueError, match="tokenizer=MODEL"):
        load_examples("needle:")


@pytest.mark.parametrize(("bound", "found"), [(77, 77), (1, 1), (0, None)])
def test_largest(bound, found):
    assert largest(lambda size: size <= bound) == found


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("needle:?depths=0,120", "needle:: 'depths' must be percent from 0 to 100"),
        ("needle:?lengths=a", "needle:: 'lengths' must be whole numbers, with commas"),
        ("needle:?lengths=50", r"needle: a prompt has at least \d+ tokens, got length 50"),
        ("needle:x", "'needle:' is followed by options"),
        ("needle:?n=0", "'n' must be a whole number, at least 1"),
        ("needle:?chnk=3", "unknown option 'chnk' of 'needle:'; known: lengths"),
        ("needle:?tokenizer=no/where", "cannot load a tokenizer from 'no/where'"),
    ],
)
def test_bad_options_are_one_line(tokenizer, source, message):
    with pytest.raises(ValueError, match=message) as error:
        load_examples(source, tokenizer=tokenizer)
    assert "\n" not in str(error.value)
