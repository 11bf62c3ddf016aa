"""One record of every shape that blocktune reads, written for the tests."""

import json

MUSIQUE = {
    "id": "3hop1__11_22_33",
    "paragraphs": [
        {"idx": 0, "title": "A", "paragraph_text": "a text", "is_supporting": True},
        {"idx": 1, "title": "B", "paragraph_text": "b text", "is_supporting": False},
        {"idx": 2, "title": "C", "paragraph_text": "c text", "is_supporting": True},
    ],
    "question": "Who?",
    "question_decomposition": [{"id": 11}, {"id": 22}, {"id": 33}],
    "answer": "Ann",
    "answer_aliases": ["Anna", "Ann"],
    "answerable": True,
}
WIKI = {
    "_id": "w1",
    "type": "bridge_comparison",
    "question": "Which?",
    "context": [["A", ["One.", " Two. "]], ["B", ["Three."]], ["A", ["Four."]]],
    "supporting_facts": [["A", 0], ["A", 1]],
    "evidences": [["A", "is", "B"]],
    "answer": "yes",
}
HUB_HOTPOT = {
    "id": "h1",
    "type": "comparison",
    "level": "hard",
    "question": "Which?",
    "context": {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]},
    "supporting_facts": {"title": ["B", "B"], "sent_id": [0, 1]},
    "answer": "no",
}
CTXS = {
    "ctxs": [{"title": "", "text": "lower case"}, {"title": "T", "text": "titled"}],
    "question": "who?",
    "answers": ["ann", "anna"],
}
OWN = {"question": "q", "chunks": ["one", "two"]}


def json_lines(records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def save(path, *records):
    path.write_text(json_lines(records), encoding="utf-8")
    return path
