"""Records as people have them: every public shape is read, or told how it would be."""

import json

import pytest
from source_records import OWN, save

from blocktune.data import RagExample, load_chunks, load_examples
from blocktune.data.retrieval import read_questions
from blocktune.data.sources.options import with_fields
from blocktune.prompt import Chunk

SQUAD = {
    "title": "Town",
    "paragraphs": [
        {
            "context": f"Paragraph {p}: its code is {p}.",
            "qas": [
                {
                    "id": f"q{p}",
                    "question": f"What is the code of {p}?",
                    "answers": [{"text": str(p), "answer_start": 0}] * 2,
                }
            ],
        }
        for p in range(14)
    ],
}


LONGBENCH = {
    "input": "Who was born in Kirby?",
    "context": "Passage 1:\nAnna Belt\nAnna was born in Kirby.\n\nPassage 2:\nKirby\n\nA town.\n",
    "answers": ["Anna Belt"],
    "length": 12,
    "dataset": "hotpotqa",
    "_id": "l1",
}


SESSION = {
    "task_id": "t<::>2",
    "contexts": [{"document_id": "d1", "text": "Kirby is a town.", "score": 3.5}],
    "input": [
        {"speaker": "user", "text": "What is Kirby?"},
        {"speaker": "agent", "text": "A town."},
        {"speaker": "user", "text": "Where?"},
    ],
    "targets": [{"speaker": "agent", "text": "Nobody says."}],
    "turn": "2",
}


def test_unknown_fields_are_kept_and_named_once(tmp_path, caplog):
    rows = [OWN | {"source": f"s{i}", "level": "hard"} for i in range(3)]
    path = save(tmp_path / "rows.jsonl", OWN, *rows)
    examples = load_examples(path)
    assert examples[1].meta == {"source": "s0", "level": "hard"}
    assert [r.getMessage() for r in caplog.records] == [f"{path}: kept in meta: source, level"]


@pytest.mark.parametrize("nested", [lambda a: a, lambda a: {"data": [a, a], "version": "2.0"}])
@pytest.mark.parametrize("indent", [None, 2])
def test_squad(tmp_path, nested, indent):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(nested(SQUAD), indent=indent))
    examples = load_examples(path)
    assert len(examples) == (14 if "paragraphs" in nested(SQUAD) else 28)
    for example in examples:
        (gold,) = example.supporting
        texts = [chunk.text for chunk in example.chunks]
        assert f"its code is {example.answers[0]}." in texts[gold]
        assert (len(set(texts)), example.chunks[gold].title) == (10, "Town")
        numbers = [int(text.split()[1][:-1]) for text in texts]
        assert numbers == sorted(numbers)
    assert len({example.supporting for example in examples}) > 3
    assert load_examples(path, limit=3) == examples[:3]


def test_squad_without_answers_and_as_on_the_hub(tmp_path, caplog):
    asked = {"id": "i", "question": "?", "answers": [], "is_impossible": True}
    article = {
        "title": "T",
        "paragraphs": [SQUAD["paragraphs"][0], {"context": "c", "qas": [asked]}],
    }
    assert len(load_examples(save(tmp_path / "v2.jsonl", article, SQUAD))) == 15
    assert "v2.jsonl: left out 1 rows" in caplog.text
    flat = {"id": "f", "title": "T", "context": "It is here.", "question": "Where?"}
    flat |= {"answers": {"text": ["here", "here"], "answer_start": [6, 6]}}
    (example,) = load_examples(save(tmp_path / "flat.jsonl", flat))
    assert example == RagExample("Where?", (Chunk("It is here.", "T"),), ("here",), id="f")
    broken = {"title": "T", "paragraphs": [{"context": "c", "qas": [3]}]}
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 1: paragraphs\[0\]"):
        load_examples(save(tmp_path / "broken.jsonl", broken))


@pytest.mark.parametrize(
    "unanswered",
    [
        {"answers": {"text": [], "answer_start": []}},
        {"answers": ["No Answer Present."]},
        {"answers": [], "is_impossible": True},
        {"answer": "there", "answerable": False},
    ],
    ids=["SQuAD 2 on the Hub", "MS MARCO", "SQuAD 2", "MuSiQue"],
)
@pytest.mark.parametrize("name", ["context", "ctxs", "chunks"])
def test_what_its_passages_do_not_answer_is_left_out(tmp_path, caplog, unanswered, name):
    row = {"question": "Where?", name: ["It is here."]}
    path = save(tmp_path / "r.jsonl", row | unanswered, row | {"answers": []})
    assert load_examples(path) == [RagExample("Where?", ["It is here."])]
    assert "left out 1 rows: marked as impossible to answer" in caplog.text
    (asked, *_) = read_questions(path)
    assert asked.answers == (("there",) if "answer" in unanswered else ())


CHOICES = {"choice_A": "At home", "choice_B": "At sea", "choice_C": "No", "choice_D": "All"}
LISTED = "\nChoices:\n(A) At home\n(B) At sea\n(C) No\n(D) All\nAnswer in the words of one choice."


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"question": "Who?", "answer": "A", "domain": "Novels", **CHOICES}, "At home"),
        ({"input": "Who?", "answer": ["At sea"], "options": [*CHOICES.values()]}, "At sea"),
        ({"question": "Who?", "answer": "B", "options": [*CHOICES.values()]}, "At sea"),
    ],
    ids=["LongBench v2", "InfiniteBench", "over a context"],
)
def test_choices_are_asked_and_answered_in_words(tmp_path, record, answer):
    path = save(tmp_path / "r.jsonl", record | {"context": "One.\n\nTwo.", "_id": "x"})
    (example,) = load_examples(path)
    assert (example.question, example.answers) == (f"Who?{LISTED}", (answer,))
    assert len(example.chunks) == (1 if record.get("answer") == "B" else 2)
    assert example.kind == record.get("domain", "")


def test_a_number_is_no_answer_to_a_choice(tmp_path):
    """QuALITY counts from 1, its copy on the Hub from 0."""
    record = {"question": "Who?", "context": "It is Ann.", "choices": ["Bo", "Ann"]}
    path = save(tmp_path / "c.jsonl", record | {"answer": 1})
    with pytest.raises(ValueError, match=r'line 1: field "answers" must be .*letter'):
        load_examples(path)
    (example,) = load_examples(save(path, record | {"golden_answers": ["B"], "qid": 7}))
    assert (example.answers, example.id) == (("Ann",), "7")
    assert "(B) Ann\n" in example.question


def test_longbench(tmp_path):
    (example,) = load_examples(save(tmp_path / "l.jsonl", LONGBENCH))
    assert [c.text.split("\n")[1] for c in example.chunks] == ["Anna Belt", "Kirby"]
    assert (example.question, example.answers) == (LONGBENCH["input"], ("Anna Belt",))
    assert (example.kind, example.id, example.meta["length"]) == ("hotpotqa", "l1", 12)
    whole = LONGBENCH | {"context": "One.\n\nTwo.\n\nThree.", "input": "", "answers": ["Sum."]}
    path = save(tmp_path / "sum.jsonl", whole)
    (example,) = load_examples(path)
    assert len(example.chunks) == 3
    assert "summary" in example.question
    (cut,) = load_examples(f"{path}?chunker=delimiter&max_chunks=2")
    assert len(cut.chunks) == 2


def test_sessions_of_mt_rag(tmp_path, caplog):
    path = save(tmp_path / "m.jsonl", SESSION | {"contexts": []}, SESSION)
    (example,) = load_examples(path)
    assert "left out 1 rows: no passages in contexts" in caplog.text
    assert example.chunks[0].metadata == {"document_id": "d1", "score": 3.5}
    assert example.question.splitlines()[1:] == ["Assistant: A town.", "User: Where?"]
    assert (example.answers, example.id, example.meta) == (
        ("Nobody says.",),
        "t<::>2",
        {"turn": "2"},
    )
    (first,) = load_examples(save(tmp_path / "f.jsonl", SESSION | {"input": SESSION["input"][:1]}))
    assert first.question == "What is Kirby?"


@pytest.mark.parametrize(
    "name", ["ctxs", "passages", "contexts", "retrieved_contexts", "documents"]
)
def test_questions_over_passages_of_every_name(tmp_path, name):
    record = {"question": "Who?", name: ["one", {"page_content": "two"}], "answer": "Ann"}
    (example,) = load_examples(save(tmp_path / "r.jsonl", record))
    assert example == RagExample("Who?", ["one", "two"], "Ann")
    own = {"response": "It is Ann.", "kind": "who", "supporting": [1], "followups": [["a", "b"]]}
    (example,) = load_examples(save(tmp_path / "own.jsonl", record | own))
    assert example == RagExample("Who?", ["one", "two"], "Ann", **own)


@pytest.mark.parametrize(
    "record",
    [
        {"question": "Who?", "contexts": ["one"], "answer": "Bob", "ground_truth": "Ann"},
        {"question": "Who?", "chunks": ["one"], "answer": "Bob", "ground_truths": ["Ann"]},
        {"user_input": "Who?", "retrieved_contexts": "one", "response": "B", "reference": "Ann"},
    ],
)
def test_the_truth_and_not_the_answer_of_a_system_is_taken_from_ragas(tmp_path, record):
    (example,) = load_examples(save(tmp_path / "r.jsonl", record))
    assert (example.question, example.target) == ("Who?", "Ann")


@pytest.mark.parametrize(
    "passage",
    [
        {"title": "T", "text": "one"},
        {"id": "doc1", "title": "T", "contents": "one"},
        {"title": "T", "page_content": "one", "metadata": {"source": "a.pdf"}},
    ],
)
def test_corpora_of_every_form(tmp_path, passage):
    path = save(tmp_path / "corpus.jsonl", passage, passage)
    assert load_chunks(path) == [Chunk("one", "T")]
    with pytest.raises(ValueError, match="looks like a corpus") as error:
        load_examples(path)
    said = str(error.value)
    source = said[said.index("'") + 1 : said.rindex("'")]
    path.write_text(json.dumps({k: "a\n\nb" if v == "one" else v for k, v in passage.items()}))
    (example,) = load_examples(source)
    assert (example.chunks, example.target) == ((Chunk("a", "T"),), "b")


KV = {"ordered_kv_records": [["k1", "v1"], ["k2", "v2"]], "key": "k2", "value": "v2"}


NESTED = {"query": "Who?", "docs": [{"text": "one"}], "gold": {"text": "Ann"}, "tag": 3}


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (KV, RagExample("k2", [("k1", "v1"), ("k2", "v2")], "v2")),
        (
            {"prompt": "Who?", "evidence": ["one"], "label": "Ann", "tag": 3},
            RagExample("Who?", ["one"], "Ann", meta={"tag": 3}),
        ),
        (
            {"query": "Who?", "evidence": "one " * 200},
            RagExample("Who?", "one " * 200),
        ),
        (
            {"document": {"text": "one"}, "question": {"text": "Who?"}, "answers": ["Ann"]},
            RagExample("Who?", ["one"], "Ann"),  # as NarrativeQA
        ),
    ],
)
def test_an_unknown_shape_says_the_mapping_that_reads_it(tmp_path, record, wanted):
    path = save(tmp_path / "odd.jsonl", record)
    with pytest.raises(ValueError, match=r"first record has: .*fields=") as error:
        load_examples(path)
    said = str(error.value)
    source = said[said.index("'") + 1 : said.rindex("'")]
    assert load_examples(source) == [wanted]


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"timestamp": "2023-11-16 18:17", "input_length": 4}, "None of them holds text"),
        ({"note": "some words here"}, "question:FIELD,chunks:FIELD"),
        ({"question": "Who is it?", "answer": "Ann"}, "blocktune data passages"),
        (
            {"instruction": "Who?", "input": "Ann.", "output": "Ann"},
            "question:instruction,chunks:i",
        ),
        ({"question": {"text": "Who?"}, "document": {"tokens": ["a"]}}, "question:question.text,"),
        ({"Question": "Who?", "Context": "Ann.", "Answer": "Ann"}, "chunks:Context,answers:Answer"),
    ],
)
def test_what_no_mapping_reads_is_told(tmp_path, record, word):
    with pytest.raises(ValueError, match=word):
        load_examples(save(tmp_path / "odd.jsonl", record))


HITS = [
    {"document": {"text": "one", "title": "T"}, "score": 1.5},
    {"node": {"text": "one", "title": "T"}},
    {"id": 7, "payload": {"body": "one", "title": "T"}},
    {"_source": {"passage": "one", "title": "T"}, "_score": 2},
    {"passage_text": "one", "title": "T", "is_selected": 1},
]


@pytest.mark.parametrize("hit", HITS)
def test_hits_of_search_engines_are_passages(hit):
    (chunk,) = RagExample("Who?", [hit]).chunks
    assert (chunk.text, chunk.title) == ("one", "T")


def test_numbers_are_answers_and_titles():
    example = RagExample("When?", [{"text": "In that year.", "title": 1966}], [1966, 2.5])
    assert (example.chunks[0].title, example.answers) == ("1966", ("1966", "2.5"))


def test_fields_are_renamed_at_any_depth_and_for_any_shape(tmp_path):
    path = save(tmp_path / "n.jsonl", NESTED)
    (example,) = load_examples(f"{path}?fields=question:query,chunks:docs,answers:gold.text")
    assert example == RagExample("Who?", ["one"], "Ann", meta={"tag": 3})
    assert load_examples(
        with_fields(str(path), "question=query,chunks=docs,answers=gold.text")
    ) == [example]
    news = save(tmp_path / "news.jsonl", {"article": "One.\n\nTwo.", "highlights": "Both."})
    (summary,) = load_examples(f"{news}?as=summary&fields=document:article,summary:highlights")
    assert (len(summary.chunks), summary.answers) == (2, ("Both.",))
    long = save(tmp_path / "long.jsonl", {"q": "Who?", "text": "One.\n\nTwo."})
    (cut,) = load_examples(f"{long}?fields=question:q,chunks:text&chunker=delimiter")
    assert len(cut.chunks) == 2


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ("question:q", 'line 1: .*no field "q".* it has query, docs'),
        ("question", "NEW:OLD"),
        ("question:query,question:docs", "each NEW once"),
        ("question:query,chunks:gold.none", "gold.none"),
    ],
)
def test_a_wrong_mapping_is_one_line(tmp_path, fields, word):
    with pytest.raises(ValueError, match=word):
        load_examples(f"{save(tmp_path / 'n.jsonl', NESTED)}?fields={fields}")


@pytest.mark.parametrize(
    "other", ['{"text": "Anna."}', '"Anna."', '{"question": "Who?"}', '{"ctxs": [], "id": 3}', "7"]
)
@pytest.mark.parametrize(
    "first",
    [
        {"input": "Who?", "context": "Anna.", "answers": ["Anna"]},
        {"question": "Who?", "ctxs": [{"text": "Anna."}], "answers": ["Anna"]},
        {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]},
    ],
    ids=lambda record: next(iter(record)),
)
def test_a_record_of_another_shape_is_named(tmp_path, first, other):
    path = tmp_path / "mixed.jsonl"
    path.write_text(f"{json.dumps(first)}\n{other}\n")
    with pytest.raises(ValueError, match=r"^mixed\.jsonl, line 2: [^\n]*$"):
        load_examples(path)


def test_a_dotted_name_is_a_field_of_its_own_first(tmp_path):
    path = save(tmp_path / "d.jsonl", {"a.b": "Who?", "a": "kept", "docs": ["one"]})
    (example,) = load_examples(f"{path}?fields=question:a.b,chunks:docs")
    assert (example.question, example.meta) == ("Who?", {"a": "kept"})


def test_what_a_conversation_over_documents_is_scored_by_is_kept(tmp_path):
    asked = {"messages": [{"role": "user", "content": "Who?"}], "documents": ["It is Ann."]}
    (example,) = load_examples(save(tmp_path / "m.jsonl", asked | {"answers": ["Ann"]}))
    assert (example.answers, example.response) == (("Ann",), None)


@pytest.mark.parametrize(
    ("shape", "words"),
    [("ctxs", 'field "ctxs" must be'), ("longbench", 'field "context" must be')],
)
def test_a_field_that_a_shape_lacks_is_named(tmp_path, shape, words):
    path = save(tmp_path / "own.jsonl", {"question": "Who?", "chunks": ["Ann."]})
    with pytest.raises(ValueError, match=f"line 1: {words}"):
        load_examples(f"{path}?as={shape}")


def test_kinds_and_ids_may_be_numbers(tmp_path):
    row = {"question": "Who?", "context": ["Ann."], "type": 2}
    path = save(tmp_path / "k.jsonl", row | {"_id": 7.0}, row | {"_id": float("nan")})
    assert [(e.kind, e.id) for e in load_examples(path)] == [("2", "7"), ("2", "")]


def test_documents_are_not_lost_where_the_first_conversation_has_none(tmp_path):
    turns = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
    rows = [{"messages": turns, "documents": given} for given in (None, ["It is Ann."])]
    with pytest.raises(ValueError, match=r'^m\.jsonl, line 1: field "documents" must be'):
        load_examples(save(tmp_path / "m.jsonl", *rows))
    (example,) = load_examples(save(tmp_path / "m.jsonl", rows[1]))
    assert (example.chunks[0].text, len(example.followups)) == ("It is Ann.", 1)


def test_a_named_shape_that_the_records_do_not_have_is_told(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"question": "Q?", "chunks": ["T"]}')
    with pytest.raises(ValueError, match=r"line 1: not of the shape that is read .*user_input"):
        load_examples(f"{tmp_path / 'r.jsonl'}?as=ragas")
