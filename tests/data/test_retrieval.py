"""Passages for questions: BM25, a retriever's file, the best of their own."""

import json
from dataclasses import replace

import pytest
from source_records import CTXS, MUSIQUE

from blocktune.data import RagExample
from blocktune.data.answers import evidence, gives_answer, holds_answer
from blocktune.data.retrieval import (
    Index,
    from_corpus,
    from_own,
    from_retriever,
    read_questions,
)
from blocktune.prompt import Chunk

CORPUS = [
    Chunk("The harbour town has a lighthouse and a museum.", "Port Alder"),
    Chunk("Anna Belt studied chemistry."),
    Chunk("Chemistry is a science, and chemistry is taught at the college.", "Chemistry"),
    Chunk("Nothing to see here."),
]


def ask(question, answers, id="", kind=""):
    """A question whose passages are not known yet."""
    return RagExample(question, ("none",), answers, id=id, kind=kind)


def lines(path, *records):
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def test_bm25_finds_words_in_text_and_title_and_keeps_order_on_ties():
    index = Index(CORPUS)
    found = index.search(["Where is port alder?", "chemistry", "zebra", "the of"], 2)
    assert [list(hits) for hits in found] == [[0, 1], [2, 1], [0, 1], [0, 1]]
    assert found[0][0] > 0 == found[2][0]
    assert len(index.search(["x"], 99)[0]) == 4
    with pytest.raises(ValueError, match="an index needs at least one chunk"):
        Index([])


def test_bm25_scores_match_the_formula():
    """Lucene's: ln(1 + (N - n + 0.5) / (n + 0.5)) times tf / (tf + k1 (1 - b + b len / mean))."""
    import math

    chunks = [Chunk("red red blue"), Chunk("blue"), Chunk("green green green green")]
    (hits,) = Index(chunks).search(["red"], 3)
    idf = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    tf = 2 / (2 + 1.5 * (1 - 0.75 + 0.75 * 3 / (8 / 3)))
    assert hits == pytest.approx({0: idf * tf, 1: 0, 2: 0}, rel=1e-5)
    assert list(hits) == [0, 1, 2]


@pytest.mark.parametrize("texts", [("the", "of"), ("A", "B")])
def test_passages_without_a_word_to_search_keep_their_order(texts):
    (hits,) = Index([Chunk(text) for text in texts]).search(["Which of them?"], 2)
    assert hits == {0: 0, 1: 0}


def test_chinese_is_searched_and_compared_without_spaces():
    chunks = [Chunk("我们去公园散步。"), Chunk("安娜在北京ABC公司工作。")]
    (hits,) = Index(chunks).search(["谁在北京abc工作？"], 2)  # noqa: RUF001
    assert list(hits) == [1, 0]
    assert gives_answer("答案是北京。", ["北京"])
    assert not gives_answer("答案是南京。", ["北京"])
    assert holds_answer(RagExample("谁?", chunks, ["ABC公司"]))


def test_vowel_signs_belong_to_their_word():
    texts = [
        "\u0926\u093f\u0932\u094d\u0932\u0940 \u0930\u093e\u091c\u0927\u093e\u0928\u0940",
        "\u0926\u0932 \u0932\u093e",
    ]
    delhi = texts[0].split()[0]
    (hits,) = Index([Chunk(text) for text in reversed(texts)]).search([delhi], 2)
    assert list(hits) == [1, 0]
    assert hits[1] > hits[0] == 0
    assert gives_answer(texts[0], [delhi])
    assert not gives_answer("\u0915\u093e", ["\u0915\u0940"])  # they differ only by the sign


def test_from_corpus():
    (example,) = from_corpus([ask("Who studied chemistry?", ("Anna Belt",), "q1")], CORPUS, 2)
    assert example.chunks == (CORPUS[1], CORPUS[2])
    assert (example.id, example.answers) == ("q1", ("Anna Belt",))
    assert example.meta["retriever"] == "bm25"
    assert example.meta["scores"] == sorted(example.meta["scores"], reverse=True)


def test_own_passages_are_ranked_and_keep_their_evidence():
    example = RagExample("Who studied chemistry?", tuple(CORPUS), ("Anna Belt",), supporting=(1, 3))
    (best,) = from_own([example], 2)
    assert best.chunks == (CORPUS[1], CORPUS[2])
    assert best.supporting == (0,)


@pytest.mark.parametrize("k", [1, 2, 7, 12])
def test_equal_scores_keep_the_order_of_the_corpus_at_the_cut(k):
    chunks = [Chunk(f"{'red' if i % 3 == 0 else 'blue'} stone") for i in range(12)]
    (hits,) = Index(chunks).search(["red"], k)
    reds, others = [0, 3, 6, 9], [1, 2, 4, 5, 7, 8, 10, 11]
    assert list(hits) == (reds + others)[:k]


def test_yes_and_no_are_told_by_the_evidence_that_is_left():
    said_no = Chunk("There is no road to Port Alder.")
    whole = RagExample("Do both sail?", (said_no, *CORPUS[:2]), ("no",), supporting=(1, 2))
    kept = replace(whole, chunks=tuple(CORPUS[:2]), supporting=(0, 1))
    lost = replace(whole, chunks=(said_no, CORPUS[0]), supporting=(1,))
    assert [holds_answer(e, whole) for e in (whole, kept, lost)] == [True, True, False]
    assert not holds_answer(whole)
    named = replace(lost, answers=("Port Alder",))
    assert holds_answer(named)
    assert evidence(replace(whole, supporting=())) == {0, 1, 2}


@pytest.mark.parametrize(
    ("reply", "given"),
    [("No, they do not.", True), ("There is no evidence, so yes.", False), ("Not at all", False)],
)
def test_a_reply_opens_with_its_verdict(reply, given):
    assert gives_answer(reply, ("no",)) is given
    assert gives_answer(f"Yes: Port Alder. {reply}", ("Port Alder",))


def test_from_retriever(tmp_path):
    path = lines(
        tmp_path / "dpr.jsonl",
        {"id": "q1", "passages": ["one", {"title": "T", "text": "two", "score": 3}, "three"]},
        {"question": "Where?", "ctxs": [{"id": "7", "title": "", "text": "here"}]},
    )
    asked = [ask("Who?", ("Anna",), "q1"), ask("Where?", (), "q2")]
    first, second = from_retriever(asked, path, 2)
    assert first.chunks == (Chunk("one"), Chunk("two", "T"))
    assert second.chunks == (Chunk("here"),)
    with pytest.raises(ValueError, match=r"dpr\.jsonl has no passages for question 'q3'"):
        list(from_retriever([ask("Why?", (), "q3")], path, 2))


def test_ids_may_be_numbers_from_zero(tmp_path):
    questions = lines(tmp_path / "q.jsonl", *({"question": "Who?", "id": i} for i in range(2)))
    found = lines(tmp_path / "r.jsonl", *({"id": i, "passages": [f"P{i}"]} for i in range(2)))
    examples = from_retriever(read_questions(questions), found, 1)
    assert [(e.id, e.chunks[0].text) for e in examples] == [("0", "P0"), ("1", "P1")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "q", "passages": []}, 'field "passages" must be a non-empty list'),
        ({"passages": ["x"]}, 'needs the question\'s "id" or the "question"'),
        ({"id": "q", "ctxs": [{"words": "x"}]}, r'field "ctxs\[0\]" must be a string or'),
        ({"id": "q", "passages": ["a", " "]}, r'field "passages\[1\]": a chunk\'s text must be'),
        (3, "must be an object"),
    ],
)
def test_wrong_retrieved_line_is_named(tmp_path, record, message):
    path = lines(tmp_path / "dpr.jsonl", {"id": "a", "passages": ["x"]}, record)
    with pytest.raises(ValueError, match=rf"^dpr\.jsonl, line 2: {message}"):
        list(from_retriever([], path, 1))


def test_questions_of_every_shape(tmp_path):
    value = {"value": "Anna", "aliases": ["Ann", "Anna"]}
    path = lines(
        tmp_path / "q.jsonl",
        {"question": "who?", "answer": ["Anna", " ", "Ann"], "answers": None},
        {"question": "who? ", "answer": value, "question_id": "tc_1"},
        {"question": "who?", "answer": "Anna", "type": "bridge", "_id": "h"},
        MUSIQUE,
        CTXS,
    )
    assert [replace(question, chunks=("none",)) for question in read_questions(path)] == [
        ask("who?", ("Anna", "Ann")),
        ask("who?", ("Anna", "Ann"), "tc_1"),
        ask("who?", ("Anna",), "h", "bridge"),
        ask("Who?", ("Ann", "Anna"), MUSIQUE["id"]),
        ask("who?", ("ann", "anna")),
    ]
    assert len(list(read_questions(path, limit=2))) == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "x"}, 'field "question" must be a non-blank string, got null'),
        ({"question": "q", "answer": True}, 'field "answer" must be text, a list of texts'),
        ({"question": "q", "answer": {"x": 1}}, 'field "answer" must be text, a list of texts'),
        (
            {"question": "q", "answer": ["", " "]},
            'field "answers" must be a list of non-blank strings',
        ),
    ],
)
def test_wrong_question_is_named(tmp_path, record, message):
    path = lines(tmp_path / "q.jsonl", {"question": "q", "answer": "a"}, record)
    with pytest.raises(ValueError, match=rf"^q\.jsonl, line 2: {message}"):
        list(read_questions(path))


def test_questions_of_a_missing_file():
    with pytest.raises(ValueError, match=r"no file 'none\.jsonl'; give a file, 'hf:NAME', or"):
        read_questions("none.jsonl")


def test_what_a_question_has_besides_is_kept(tmp_path):
    own = {"response": "In Port Alder.", "followups": [["When?", "In 1966."]], "meta": {"k": 1}}
    path = lines(tmp_path / "q.jsonl", {"question": "Where?", "answers": ["Port Alder"]} | own)
    found = lines(tmp_path / "r.jsonl", {"question": "Where?", "passages": ["In Port Alder."]})
    [example] = from_retriever(read_questions(path), found, 1)
    assert example.target == "In Port Alder."
    assert example.followups == (("When?", "In 1966."),)
    assert example.meta["k"] == 1
    wrong = lines(tmp_path / "w.jsonl", {"question": "q", "answers": ["a"], "response": 3})
    with pytest.raises(ValueError, match='field "response"'):
        list(read_questions(wrong))


CAFE = ("Le caf\u00e9 est l\u00e0.", "Le cafe\u0301 est la\u0300.")
"""A text with composed accents, and with separate ones, as macOS writes them."""


@pytest.mark.parametrize(("one", "other"), [CAFE, CAFE[::-1]])
def test_both_unicode_forms_of_an_accent_are_the_same(tmp_path, one, other):
    word = other.split()[1]
    assert gives_answer(one, [word])
    assert holds_answer(RagExample("q", [one], [word]))
    found = Index([Chunk("Le bar est ici."), Chunk(one)]).search([f"{word}?"], 1)
    assert list(found[0]) == [1]
    path = lines(tmp_path / "r.jsonl", {"question": other, "passages": ["here"]})
    assert next(from_retriever([ask(one, ())], path, 1)).chunks == (Chunk("here"),)


def test_passages_of_a_question_in_several_records_are_refused(tmp_path):
    """The last record would win, and the passages of the others would be lost."""
    rows = [{"id": "q", "passages": ["one"]}, {"id": "q", "passages": ["two"]}]
    with pytest.raises(ValueError, match=r"^r\.jsonl, line 2: question 'q' has other passages"):
        list(from_retriever([], lines(tmp_path / "r.jsonl", *rows), 2))
    again = [rows[0], rows[0], {"id": "r", "question": "Q?", "ctxs": None, "docs": ["three"]}]
    again += [{"id": "s", "question": "Q?", "passages": ["four"]}]
    asked = [ask("A?", (), "q"), ask("Q?", (), "r"), ask("Q?", (), "s")]
    found = from_retriever(asked, lines(tmp_path / "r.jsonl", *again), 2)
    assert [e.chunks[0].text for e in found] == ["one", "three", "four"]
    with pytest.raises(ValueError, match=r"other passages under each id for question 'Q\?'"):
        list(from_retriever([ask("Q?", ())], tmp_path / "r.jsonl", 2))


def test_embeddings_are_compared_question_by_question():
    """One matrix of all questions by all passages would not fit into memory."""
    rows = {"a": [1.0, 0.0], "b": [0.0, 1.0]}
    index = Index([Chunk("a"), Chunk("b")], lambda texts: [rows[text] for text in texts])
    assert not hasattr(index._scores(["a", "b"]), "shape")
    assert [list(hits) for hits in index.search(["b", "a"], 1)] == [[1], [0]]


def test_mistakes_in_questions_are_told_before_the_corpus_is_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr("blocktune.data.retrieval.Index", None)
    path = lines(tmp_path / "q.jsonl", {"answer": "x"})
    with pytest.raises(ValueError, match=r"^q\.jsonl, line 1: field \"question\""):
        from_corpus(read_questions(path), CORPUS, 2)
