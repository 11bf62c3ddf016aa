"""A run that is stopped anywhere ends with the file of a run that was not."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from blocktune.data import RagExample, load_examples
from blocktune.data.answers import regenerate
from blocktune.prompt import Chunk

EXAMPLES = [RagExample(f"Q{i}?", (Chunk(f"C{i}"),), (f"a{i}",), id=str(i)) for i in range(10)]
FACTS = {"model": "m", "seed": 0}


class Model:
    """Answers with the batch's number; stops like a killed process before a given batch."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.asked = []

    def __call__(self, batch, number):
        if number == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(number)
        return [f" It is a{e.id} ({number}) " if e.id != "4" else " \n" for e in batch]


def run(path, model, **changes):
    options = {"facts": FACTS, "batch_size": 3} | changes
    return regenerate(EXAMPLES, model, path, **options)


def test_answers_become_the_response(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    seen = []
    done = run(path, Model(), on_batch=seen.append)
    assert (done["written"], done["resumed"], done["empty"], done["wrong"]) == (9, 0, 1, 0)
    assert seen == [0, 3, 6, 9, 10]
    examples = load_examples(path)
    assert examples[1].response == examples[1].target == "It is a1 (0)"
    assert examples[1].answers == ("a1",)
    assert examples[1].meta == {"answered_by": FACTS}
    assert "4" not in [example.id for example in examples]
    assert [p.name for p in path.parent.iterdir()] == ["out.jsonl"]


def test_a_reply_that_was_cut_is_no_response(tmp_path):
    """Training adds the end of the turn to it: the model would learn to stop anywhere."""
    path = tmp_path / "out.jsonl"
    done = run(path, lambda batch, number: [None if e.id == "2" else "x" for e in batch])
    assert (done["written"], done["cut"]) == (9, 1)
    assert "2" not in [example.id for example in load_examples(path)]


def test_meta_of_any_type_is_told_apart(tmp_path):
    dated = [replace(e, meta={"at": datetime(2026, 1, 1, tzinfo=UTC)}) for e in EXAMPLES]
    done = regenerate(dated, Model(), tmp_path / "o.jsonl", facts=FACTS, batch_size=3)
    assert done["written"] == 9


@pytest.mark.parametrize("stop_at", [0, 1, 3])
@pytest.mark.parametrize("torn", [0, 5])
def test_stopped_and_resumed_matches_whole(tmp_path, stop_at, torn):
    run(tmp_path / "whole.jsonl", Model())
    path, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with pytest.raises(KeyboardInterrupt):
        run(path, Model(stop_at))
    assert not path.exists()
    if torn:  # killed while it wrote a line
        part.write_bytes(part.read_bytes() + b'["It is'[:torn])
    model = Model()
    done = run(path, model)
    assert done["resumed"] == 3 * stop_at
    assert model.asked == list(range(stop_at, 4))
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_torn_and_stopped_again(tmp_path):
    run(tmp_path / "whole.jsonl", Model())
    path, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    for stop_at in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run(path, Model(stop_at))
        part.write_bytes(part.read_bytes() + b'["It i')
    assert run(path, Model())["resumed"] == 6
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_part_with_a_torn_header_begins_anew(tmp_path):
    (tmp_path / "out.jsonl.part").write_text('{"ke')
    with pytest.raises(ValueError, match="is a folder"):
        run(tmp_path, Model())
    assert run(tmp_path / "out.jsonl", Model())["resumed"] == 0


@pytest.mark.parametrize("changes", [{"facts": {"model": "other"}}, {"batch_size": 2}])
def test_another_command_does_not_go_on(tmp_path, changes):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, Model(2))
    with pytest.raises(ValueError, match=r"out\.jsonl\.part' is of other"):
        run(path, Model(), **changes)
    with pytest.raises(ValueError, match="remove"):
        regenerate(EXAMPLES[:5], Model(), path, facts=FACTS, batch_size=3)


def test_only_correct_answers(tmp_path):
    path = tmp_path / "out.jsonl"

    def model(batch, number):
        return [f"A{e.id}!" if int(e.id) % 2 else f"a{e.id}0" for e in batch]

    done = regenerate(EXAMPLES, model, path, facts=FACTS, batch_size=4, only_correct=True)
    assert (done["written"], done["wrong"]) == (5, 5)
    assert [json.loads(line)["response"] for line in path.open()][:2] == ["A1!", "A3!"]


def test_a_model_that_skips_a_question_is_our_bug(tmp_path):
    with pytest.raises(RuntimeError, match="3 questions got 1 answers"):
        run(tmp_path / "out.jsonl", lambda batch, number: ["x"])


def test_nothing_right_writes_nothing(tmp_path):
    path = tmp_path / "out.jsonl"
    for _ in range(2):  # the answers are kept, to be read again with another filter
        with pytest.raises(ValueError, match="of 10 answers, 0 are empty, 10 are wrong, 0 are cut"):
            run(path, lambda batch, number: ["x"] * len(batch), only_correct=True)
    assert not path.exists()
    assert run(path, None)["written"] == 10


def test_only_correct_needs_accepted_answers(tmp_path):
    asked = [RagExample("Q?", (Chunk("C"),))]
    with pytest.raises(ValueError, match=r"example 'Q\?' has none"):
        regenerate(asked, None, tmp_path / "o", facts={}, batch_size=1, only_correct=True)
    assert list(tmp_path.iterdir()) == []
