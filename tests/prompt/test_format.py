"""Formats, layout specs and chunks refuse what they do not understand."""

import pytest

from blocktune.prompt import Chunk, LayoutSpec, PromptFormat


def test_chunk_text_is_not_a_template():
    chunk = Chunk("{title} {0} %s", "{text}")
    assert PromptFormat().render_chunk(chunk) == "{text}\n{title} {0} %s\n\n"


def test_empty_title_is_no_title():
    assert PromptFormat().render_chunk(Chunk("text", "")) == "text\n\n"


@pytest.mark.parametrize(
    "value", [PromptFormat(system="s", titled="{text} ({title})"), LayoutSpec()]
)
def test_dict_round_trip(value):
    assert type(value).from_dict(value.to_dict()) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"titled": "{title}"}, "format: 'titled' must hold {text} and {title} and no other"),
        ({"question": "{question} {text}"}, "format: 'question' must hold {question} and no other"),
        ({"untitled": "{text"}, "format: 'untitled' is not a template"),
        ({"untitled": "{text!r}"}, "format: 'untitled' must hold {text} and no other"),
        ({"untitled": 3}, "format: 'untitled' must be text, got 3"),
        ({"instruction": None}, "format: 'instruction' must be text, got None"),
        ({"system": 1}, "format: 'system' must be text or null, got 1"),
        ({"tag_place": "end"}, "format: 'tag_place' must be one of turn, prompt, got 'end'"),
        ({"strip": 1}, "format: 'strip' must be true or false, got 1"),
        ({"sytem": "x"}, "prompt format: unknown key 'sytem'; known: instruction, system"),
        (["x"], "prompt format: must be a mapping"),
    ],
)
def test_bad_format_is_refused(values, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        PromptFormat.from_dict(values)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_links": -1}, "layout: 'num_links' must be a whole number, at least 0, got -1"),
        ({"num_blanks": 1.0}, "layout: 'num_blanks' must be a whole number, got 1.0"),
        ({"num_links": True}, "layout: 'num_links' must be a whole number, got True"),
        ({"block": 1}, "layout: 'block' must be true or false, got 1"),
        ({"link_side": "left"}, "layout: 'link_side' must be one of after, before, got 'left'"),
        ({"placement": "ape"}, "layout: 'placement' must be one of sequential, parallel"),
        ({"num_blanks": 1, "shared_prefix": True}, "layout: one of num_blanks"),
        ({"block": False, "num_blanks": 1}, "layout: one of num_blanks"),
        ({"block": False, "shared_prefix": True}, "layout: one of num_blanks"),
        ({"links": 1}, "layout: unknown key 'links'; known: block, num_links"),
    ],
)
def test_bad_layout_spec_is_refused(values, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        LayoutSpec.from_dict(values)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("values", [("",), (" \n",), (None,), ("text", 3)])
def test_bad_chunk_is_refused(values):
    with pytest.raises(ValueError, match="a chunk's t"):
        Chunk(*values)


def test_a_mode_tag_opens_the_turn_of_its_mode():
    fmt = PromptFormat(instruction="Answer.", block_tag="[Block]")
    assert (fmt.opening(True), fmt.opening(False)) == ("[Block] Answer.", "Answer.")
    assert PromptFormat(instruction="", full_tag="[Full]").opening(False) == "[Full]"
    assert PromptFormat.from_dict(fmt.to_dict()) == fmt


def test_a_tag_before_the_prompt_is_not_in_the_turn():
    fmt = PromptFormat(instruction="Answer.", block_tag="[Block]", tag_place="prompt")
    assert (fmt.opening(True), fmt.tag(True, "prompt"), fmt.tag(False, "prompt")) == (
        *("Answer.", "[Block]", ""),
    )


def test_stripped_passages_keep_their_titles_and_questions_their_indent():
    fmt = PromptFormat(strip=True)
    assert fmt.render_chunk(Chunk(" text\n", " T ")) == " T \ntext\n\n"
    assert fmt.render_question(" Who? \n") == "Question:  Who?"


def test_what_else_is_known_of_a_chunk_changes_nothing():
    plain, known = Chunk("text", "T"), Chunk("text", "T", {"id": 7, "score": 0.5})
    assert (plain, hash(plain)) == (known, hash(known))
    assert PromptFormat().render_chunk(plain) == PromptFormat().render_chunk(known)
    assert known.metadata["score"] == 0.5
    with pytest.raises(ValueError, match="metadata must be a mapping"):
        Chunk("text", None, "id")


@pytest.mark.parametrize("values", [("bad \ud83d half",), ("text", "\udc00")])
def test_a_lone_surrogate_is_refused(values):
    with pytest.raises(ValueError, match="lone surrogate"):
        Chunk(*values)
