"""EFIM's prompts: what was typed comes last, and earlier tokens never change."""

import pytest
from tiny_llama import tiny_llama
from tiny_tokenizer import build_tokenizer

from blocktune.engine import Engine, Sampling
from blocktune.prompt.infill import MARKERS, Infill

HEAD, TAIL = "Anna Belt was born in Port ", " and studied chemistry."


@pytest.fixture
def infill(tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS[1])})
    return Infill(tokenizer)


def ids_of(pieces):
    assert not pieces.chunks
    return [*pieces.prefix, *pieces.query]


def shared(left, right):
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), len(left))


def test_the_first_prompt_is_prefix_suffix_middle(infill):
    ids = ids_of(infill.pieces(HEAD, TAIL))
    read = infill.tokenizer.decode(ids)
    assert read == f"{MARKERS[1][0]}{HEAD}{MARKERS[1][1]}{TAIL}{MARKERS[1][2]}"


def test_what_is_typed_extends_the_prompt_token_by_token(infill):
    typed = ["A", "l", "der", " and"]  # "Alder" alone would be other tokens
    before = ids_of(infill.pieces(HEAD, TAIL))
    for end in range(1, len(typed) + 1):
        ids = ids_of(infill.pieces(HEAD + "".join(typed[:end]), TAIL))
        assert ids[: len(before)] == before
        assert len(ids) > len(before)
        assert infill.tokenizer.decode(ids).endswith(MARKERS[1][2] + "".join(typed[:end]))
        before = ids
    assert ids_of(infill.pieces(HEAD + "".join(typed), TAIL)) == before
    # Without the transformation the suffix and all after it moves.
    fresh = ids_of(Infill(infill.tokenizer).pieces(HEAD + "".join(typed), TAIL))
    assert shared(fresh, before) < len(ids_of(infill.pieces(HEAD, "")))


def test_deleted_text_goes_back_to_the_last_whole_piece(infill):
    for text in ("", "Alder", "Alder is", "Alder is a"):
        last = ids_of(infill.pieces(HEAD + text, TAIL))
    back = ids_of(infill.pieces(HEAD + "Alder isn't", TAIL))
    kept = len(ids_of(infill.pieces(HEAD + "Alder is", TAIL)))
    assert back[:kept] == last[:kept]


def test_a_changed_suffix_keeps_the_tokens_of_the_prefix(infill):
    infill.pieces(HEAD, TAIL)
    before = ids_of(infill.pieces(HEAD + "Alder", TAIL))
    after = ids_of(infill.pieces(HEAD + "Alder", " in 1966."))
    read = infill.tokenizer.decode(after)
    assert read.startswith(f"{MARKERS[1][0]}{HEAD}Alder{MARKERS[1][1]} in 1966.")
    head = len(infill.tokenizer.encode(HEAD)) + 1  # the marker
    assert shared(before, after) == head


def test_another_text_starts_again(infill):
    infill.pieces(HEAD, TAIL)
    read = infill.tokenizer.decode(ids_of(infill.pieces("The film", TAIL)))
    assert read == f"{MARKERS[1][0]}The film{MARKERS[1][1]}{TAIL}{MARKERS[1][2]}"


def test_written_markers_stay_text(infill):
    ids = ids_of(infill.pieces(MARKERS[1][2], TAIL))
    assert ids.count(infill.tokenizer.convert_tokens_to_ids(MARKERS[1][2])) == 1


def test_only_so_many_places_are_remembered(infill, monkeypatch):
    monkeypatch.setattr("blocktune.prompt.infill.MOST_PLACES", 2)
    first = ids_of(infill.pieces(HEAD, TAIL))
    for number in range(2):
        infill.pieces("other", f"{number}")
    ids = ids_of(infill.pieces(HEAD + "Alder", TAIL))
    assert ids[: len(first)] != first


def test_the_engine_resumes_the_whole_of_the_last_prompt(infill):
    model = tiny_llama(infill.tokenizer, 512)
    engine = Engine(model, infill.tokenizer)
    seen = []
    for text in (HEAD, HEAD + "Al", HEAD + "Alder"):
        pieces = infill.pieces(text, TAIL)
        run = engine.start([pieces], "prefix-cache")
        answer = run.answers(Sampling(), 2, streams=(0,))[0]
        seen.append((answer.usage.prefix_tokens, len(pieces.prefix)))
    assert seen[0][0] == 0
    assert [found for found, _ in seen[1:]] == [length for _, length in seen[:-1]]


def test_a_tokenizer_without_markers_is_refused(tokenizer):
    with pytest.raises(ValueError, match="has no infilling tokens"):
        Infill(tokenizer)
