"""Conversations, documents, summaries, pairs and evidence become examples."""

import json
from urllib.parse import quote

import pytest

from blocktune.data import build_chunker, load_examples
from blocktune.data.sources.texts import CONTINUE, SUMMARIZE
from blocktune.prompt import Chunk

TURNS = [("user", "Who?"), ("assistant", "Anna."), ("user", "Where?"), ("assistant", "In Kirby.")]
CHAT = {"id": "c1", "messages": [{"role": r, "content": t} for r, t in TURNS]}
SAMSUM = [
    {"id": f"s{i}", "dialogue": f"A: hi {i}\nB: bye", "summary": f"They met {i}."} for i in range(8)
]
TRIVIA = {
    "question": "Who?",
    "question_id": "tc_1",
    "entity_pages": {"title": ["Anna"], "wiki_context": ["Anna Belt.\n\nBorn in Kirby."]},
    "search_results": {"title": ["Site"], "search_context": ["Belt, Anna"]},
    "answer": {"value": "Anna Belt", "aliases": ["Belt", "Anna Belt"]},
}


@pytest.fixture
def save(tmp_path):
    def write(*records, name="set.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        return path

    return write


def only(source, **options):
    (example,) = load_examples(source, **options)
    return example


def test_earlier_turns_are_chunks_and_the_last_one_asks(save):
    example = only(save(CHAT))
    assert example.chunks == (Chunk("User: Who?\nAssistant: Anna."),)
    assert (example.question, example.target, example.kind) == ("Where?", "In Kirby.", "chat")
    assert (example.id, example.answers) == ("c1", ())
    assert example.conversation == tuple(TURNS[:3])
    doubled = [{"role": "user", "content": "Hello?"}, *CHAT["messages"]]
    assert only(save({"messages": doubled})).conversation == ()  # two of the user's in a row
    by_message = only(f"{save(CHAT)}?chunker=message&unit=message")
    assert [c.text for c in by_message.chunks] == ["User: Who?", "Assistant: Anna."]


def test_sharegpt_names_and_parts_of_text(save):
    asked = {"from": "human", "value": "Passage one.\n\nPassage two.\n\nWho?"}
    example = only(save({"conversations": [asked, {"from": "gpt", "value": "Anna."}]}))
    assert [c.text for c in example.chunks] == ["Passage one.", "Passage two."]
    assert (example.question, example.target) == ("Who?", "Anna.")
    parts = [{"type": "text", "text": "a\n\n"}, {"type": "text", "text": "b"}]
    reply = {"role": "Assistant", "content": "c"}
    messages = [{"role": "User", "content": parts, "from": None}, reply]
    example = only(save({"messages": messages}))
    assert (example.chunks, example.question) == ((Chunk("a"),), "b")
    both = save({"messages": messages, "system": "Be brief."})  # Anthropic, LLaMA-Factory
    assert only(both).chunks[0] == Chunk("System: Be brief.")
    assert only(both).conversation[0] == ("system", "Be brief.")
    grounded = {"documents": ["a"], "system": "Be brief.", "messages": messages}
    assert only(save(grounded)).meta == {"system": "Be brief."}


def test_prompt_and_completion_of_trl_are_a_conversation(save):
    for prompt in ("a\n\nb", [{"from": "user", "value": "a\n\nb", "role": None, "content": None}]):
        example = only(save({"prompt": prompt, "completion": "c"}))
        assert (example.chunks, example.question, example.target) == ((Chunk("a"),), "b", "c")


def test_what_follows_the_last_reply_is_dropped(save):
    longer = CHAT["messages"] + [{"role": "user", "content": "And?"}]
    assert only(save({"messages": longer})).question == "Where?"


def test_conversations_that_cannot_be_cut_are_counted(save, caplog):
    single = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Anna."}]
    silent = [{"role": "user", "content": "Who?"}]
    assert only(save({"messages": single}, {"messages": silent}, CHAT))
    assert "left out 1 rows: a single message that the chunker leaves whole" in caplog.text
    assert "left out 1 rows: no user message with a reply" in caplog.text
    calling = [CHAT["messages"][0], {**CHAT["messages"][1], "tool_calls": [{"name": "search"}]}]
    assert only(save({"messages": calling}, {**CHAT, "tool_calls": None}))
    assert "left out 1 rows: a message that calls tools" in caplog.text
    call = [{"from": "human", "value": "Who?"}, {"from": "function_call", "value": "{}"}]
    image = [{"role": "user", "content": [{"type": "image"}]}, CHAT["messages"][1]]
    assert only(save({"conversations": call}, {"messages": image}, CHAT))
    assert "left out 1 rows: a message with an image" in caplog.text
    system = [{"role": "system", "content": "Be brief."}, *single]
    assert only(save({"messages": system})).chunks == (Chunk("System: Be brief."),)


def test_code_keeps_its_indent_and_is_not_cut_out_of_a_single_message(save, caplog):
    code = "def sign(x):\n    return -1"
    asked = {"role": "user", "content": f"Explain:\n{code}"}
    reply = {"role": "assistant", "content": "Minus one."}
    example = only(save({"messages": [asked, reply]}, {"messages": [asked, reply] * 2}))
    assert "left out 1 rows: a single message that holds code" in caplog.text
    assert code in example.chunks[0].text
    assert example.question == f"Explain:\n{code}"


def test_null_is_a_row_without_it(save, caplog):
    path = save({"dialogue": None, "summary": "x"}, *SAMSUM)
    assert len(load_examples(path)) == len(SAMSUM)
    assert 'left out 1 rows: "dialogue" is blank' in caplog.text


def test_document_ends_with_what_the_model_writes(save):
    path = save({"text": "One.\n\nTwo.\n\nThree.", "title": "T"}, {"text": "whole"})
    example = only(f"{path}?as=document")
    assert example.chunks == (Chunk("One.", "T"), Chunk("Two.", "T"))
    assert (example.question, example.target) == (CONTINUE, "Three.")
    cut = only(f"{path}?as=document", chunker=build_chunker("delimiter", max_chunks=2))
    assert len(cut.chunks) == 1


@pytest.mark.parametrize("mark", ["\n", "---", "1", "#", "- ", "++"])
def test_a_delimiter_is_taken_as_written(save, mark):
    path = save({"text": f"One.\n\nTwo, still two.{mark}Three."})
    example = only(f"{path}?as=document&chunker=delimiter&delimiter={quote(mark, safe='+')}")
    assert example.target == "Three."
    assert len(example.chunks) == (2 if mark == "\n" else 1)


def test_document_in_tokens(save, tokenizer, tmp_path):
    path = save({"text": "Anna Belt was born in Port Alder. " * 5})
    example = only(f"{path}?as=document&chunker=fixed&size=12", tokenizer=tokenizer)
    texts = [*(chunk.text for chunk in example.chunks), example.target]
    assert len(texts) > 2
    assert all(text == text.strip() for text in texts)  # spans open with the space before a word
    tokenizer.save_pretrained(tmp_path / "tok")
    named = f"{path}?as=document&chunker=fixed&size=12&tokenizer={tmp_path / 'tok'}"
    assert only(named) == example
    with pytest.raises(ValueError, match="line 1: chunker 'fixed' needs a fast tok"):
        only(f"{path}?as=document&chunker=fixed")


def test_summaries(save):
    example = only(save({"document": "One.\nTwo.", "summary": "Both."}))
    assert example.chunks == (Chunk("One."), Chunk("Two."))
    assert (example.question, example.answers, example.kind) == (SUMMARIZE, ("Both.",), "summary")
    several = {"document": "A1.\n\nA2. ||||| B. |||||", "summary": "– All."}  # noqa: RUF001
    example = only(save(several))
    assert [c.text for c in example.chunks] == ["A1.\n\nA2.", "B."]
    assert example.answers == ("All.",)


def test_shots_are_other_instances_chosen_by_seed(save):
    path = save(*SAMSUM)
    examples = load_examples(f"{path}?shots=3")
    for example in examples:
        assert len(set(example.chunks)) == 3
        assert all(example.question not in chunk.text for chunk in example.chunks)
    assert examples[0].question == "Dialogue:\nA: hi 0\nB: bye\nSummary:"
    assert examples[0].answers == ("They met 0.",)
    solved = {f"{e.question} {e.answers[0]}" for e in examples}
    assert {chunk.text for chunk in examples[0].chunks} < solved
    assert load_examples(f"{path}?shots=3", limit=2) == examples[:2]
    assert load_examples(f"{path}?shots=3&seed=1") != examples
    with pytest.raises(ValueError, match="8 shots need 9 instances, got 8; lower shots"):
        load_examples(f"{path}?shots=8")


def test_pairs_of_other_names(save):
    records = [{"input": f"{i}+{i}", "output": str(2 * i)} for i in range(1, 9)]
    example = load_examples(f"{save(*records)}?as=few-shot")[0]
    assert (example.question, example.answers) == ("Input:\n1+1\nOutput:", ("2",))
    assert len(example.chunks) == 5


def test_trivia_evidence(save):
    example = only(save(TRIVIA))
    texts = [("Anna", "Anna Belt."), ("Anna", "Born in Kirby."), ("Site", "Belt, Anna")]
    assert [(c.title, c.text) for c in example.chunks] == texts
    assert (example.answers, example.id) == (("Anna Belt", "Belt"), "tc_1")


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([CHAT], "as=musique", 'record 1|line 1: field "paragraphs" must be'),
        ([CHAT], "as=magic", "unknown record shape 'magic'; available: blocktune, musique"),
        ([CHAT], "shots=3", "'shots' and 'seed' belong to few-shot, the shape is 'chat'"),
        ([CHAT], "split=train", "has no splits; leave split='train' out"),
        (
            [{"messages": [{"role": "narrator", "content": "x"}]}],
            "",
            'field "messages" must be mes',
        ),
        ([{"messages": "x"}], "", 'field "messages" must be a list of {"role", "content"}'),
        ([{"text": 3}], "as=document", 'line 1: field "text" must be a string, got 3'),
        ([{"a": 1}], "as=few-shot", "line 1: a pair must have the fields of one of dialogue, summ"),
        ([TRIVIA | {"answer": {"x": 1}}], "", 'field "answer" must be text, a list'),
        ([{"question": "q", "answer": ["a"]}], "", "holds questions without passages; add them"),
        ([{"text": "whole"}], "as=document", "no example in it, 1 rows left out: a text that"),
        ([{"question": "q", "chunks": ["c"]}], "chunker=delimiter", "have chunks already"),
    ],
)
def test_wrong_record_or_option_is_named(save, records, options, message):
    path = save(*records)
    with pytest.raises(ValueError, match=message) as error:
        load_examples(f"{path}?{options}" if options else path)
    assert "\n" not in str(error.value)
