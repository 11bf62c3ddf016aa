"""Turns after the first answer: the tokens that the template writes, learnt like the first."""

import pytest
from chat_families import FAMILIES, family, rendered
from tiny_tokenizer import build_tokenizer

from blocktune.data.example import RagExample
from blocktune.data.worlds import WorldConfig, generate_examples
from blocktune.layout import GLOBAL, Kind
from blocktune.prompt import IGNORED, Chunk, LayoutSpec, PromptFormat, lay_out, make_pieces

CHUNKS = (
    Chunk("Anna Belt was born in Port Alder.\n\nShe studied there.", "Anna Belt"),
    Chunk("The film was shot in {Port} Alder; 100% of it.", "Frozen Shore"),
)
QUESTION = "Where was the film shot?"
SAID = "In Port Alder"
TURNS = (("Who was born there?", "Anna Belt"), ("When?", "In 1966"))


def pieces_of(tokenizer, followups=TURNS, response=SAID):
    return make_pieces(tokenizer, PromptFormat(), CHUNKS, QUESTION, response, followups=followups)


def test_a_reply_that_ends_in_plain_text_is_refused():
    """Its answer ends in EOS, which the template does not write when the user goes on."""
    with pytest.raises(ValueError, match="ends a reply in another way"):
        pieces_of(family("smolvlm"))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "smolvlm"])
def test_a_conversation_reads_as_the_template_renders_it(name):
    tokenizer, fmt = family(name), PromptFormat()
    pieces = pieces_of(tokenizer, TURNS[:1])
    text = f"{fmt.instruction}\n\n" + "".join(map(fmt.render_chunk, CHUNKS))
    said = [("user", f"{text}Question: {QUESTION}"), ("assistant", SAID)]
    said.append(("user", f"Question: {TURNS[0][0]}"))
    text = rendered(name, said)
    asked = text[text.rindex(SAID) + len(SAID) :]
    ours = tokenizer.decode([*pieces.query, *pieces.answer, *pieces.followups[0][0]])
    assert ours[ours.rindex(SAID) + len(SAID) :] == asked


@pytest.mark.parametrize("template", [True, False])
def test_every_turn_is_a_query_and_an_answer_that_is_learnt(template):
    tokenizer = build_tokenizer() if template else build_tokenizer(None)
    pieces = pieces_of(tokenizer)
    prompt = lay_out(pieces, LayoutSpec(block=True))
    layout = prompt.layout
    labels = [label for label in prompt.labels if label != IGNORED]
    assert labels == [*pieces.answer, *pieces.followups[0][1], *pieces.followups[1][1]]
    after = layout.kind[0] >= 0
    after &= (layout.kind[0] == Kind.QUERY) | (layout.kind[0] == Kind.ANSWER)
    assert (layout.group[0, after] == GLOBAL).all()
    assert (layout.order[0, 1:] > layout.order[0, :-1]).all()
    assert (layout.position[0, after].diff() == 1).all()
    assert len(prompt.ids) == pieces.num_tokens


def test_the_first_turn_does_not_change():
    tokenizer = build_tokenizer()
    with_turns, without = pieces_of(tokenizer), pieces_of(tokenizer, ())
    assert with_turns._replace(followups=()) == without


def test_turns_after_no_answer_are_refused():
    with pytest.raises(ValueError, match="followups come after an answer"):
        pieces_of(build_tokenizer(), response=None)


def test_a_template_without_a_second_user_turn_is_refused():
    template = "{{ bos_token }}<|user|>{{ messages[0].content }}<|assistant|>"
    with pytest.raises(ValueError, match="does not render a second user turn"):
        pieces_of(build_tokenizer(template))


def test_examples_keep_their_turns_in_json():
    example = RagExample("Who?", tuple(CHUNKS), ("Anna",), followups=TURNS)
    assert RagExample.from_json(example.to_json()) == example


@pytest.mark.parametrize("turns", [["Who?"], [["Who?"]], [["Who?", ""]], "Who?"])
def test_what_is_no_turn_is_refused(turns):
    record = {"question": "Who?", "chunks": ["She."], "followups": turns}
    with pytest.raises(ValueError, match=r'field "followups" must be a list of'):
        RagExample.from_json(record)


def test_worlds_ask_in_turn():
    single = list(generate_examples(WorldConfig(num_examples=20, seed=2)))
    turned = list(generate_examples(WorldConfig(num_examples=20, seed=2, turns=4)))
    assert [e.chunks for e in turned] == [e.chunks for e in single]
    assert [e.question for e in turned] == [e.question for e in single]
    assert max(len(e.followups) for e in turned) == 3
    for example in turned:
        asked = [example.question, *(question for question, _ in example.followups)]
        assert len(set(asked)) == len(asked)
        assert set(example.supporting) <= set(range(len(example.chunks)))


def test_questions_as_examples_and_as_turns_are_not_both():
    with pytest.raises(ValueError, match="set only one of questions_per_world and turns"):
        WorldConfig(turns=2, questions_per_world=2)
