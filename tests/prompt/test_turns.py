"""More than one turn: what the template makes of a conversation, and what of it is learnt."""

import pytest
from chat_families import FAMILIES, family, rendered
from tiny_tokenizer import build_tokenizer

from blocktune.data.example import RagExample
from blocktune.data.worlds import WorldConfig, generate_examples
from blocktune.layout import GLOBAL, Kind
from blocktune.prompt import (
    IGNORED,
    Chunk,
    LayoutSpec,
    PromptFormat,
    answer_ids,
    conversation_pieces,
    lay_out,
    make_pieces,
    stack,
)

CHUNKS = (
    Chunk("Anna Belt was born in Port Alder.\n\nShe studied there.", "Anna Belt"),
    Chunk("The film was shot in {Port} Alder; 100% of it.", "Frozen Shore"),
)
QUESTION = "Where was the film shot?"
SAID = "In Port Alder"
FOLLOWUPS = (("Who was born there?", "Anna Belt"), ("When?", "In 1966"))
MESSAGES = (("user", "Who was born there?"), ("assistant", "Anna Belt."), ("user", "When?"))
SYSTEM = ("system", "Be brief.")
FOLDED = ("gemma", "gemma3")
"""Families whose template has no system turn, or puts its text into the user's."""


def pieces_of(tokenizer, followups=FOLLOWUPS, response=SAID):
    return make_pieces(tokenizer, PromptFormat(), CHUNKS, QUESTION, response, followups=followups)


def test_a_reply_that_ends_in_plain_text_is_refused():
    """Its answer ends in EOS, which the template does not write when the user goes on."""
    with pytest.raises(ValueError, match="ends a reply differently"):
        pieces_of(family("smolvlm"))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "smolvlm"])
def test_a_conversation_reads_as_the_template_renders_it(name):
    tokenizer, fmt = family(name), PromptFormat()
    pieces = pieces_of(tokenizer, FOLLOWUPS[:1])
    text = f"{fmt.instruction}\n\n" + "".join(map(fmt.render_chunk, CHUNKS))
    said = [("user", f"{text}Question: {QUESTION}"), ("assistant", SAID)]
    said.append(("user", f"Question: {FOLLOWUPS[0][0]}"))
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
    labels = [label for label in tuple(stack([prompt], 0).labels[0].tolist()) if label != IGNORED]
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
    with pytest.raises(ValueError, match="no chat template that renders a second user turn"):
        pieces_of(build_tokenizer(template))


def test_examples_keep_their_turns_in_json():
    example = RagExample("Who?", tuple(CHUNKS), ("Anna",), followups=FOLLOWUPS)
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


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_is_what_the_template_renders(name):
    tokenizer = family(name)
    pieces = conversation_pieces(tokenizer, PromptFormat(), MESSAGES, "In 1966.")
    assert tokenizer.decode(pieces.prefix) == rendered(name, MESSAGES)
    assert pieces.answer == answer_ids(tokenizer, "In 1966.")
    prompt = lay_out(pieces, LayoutSpec(block=False))
    assert prompt.ids == pieces.prefix + pieces.answer
    assert [
        label for label in tuple(stack([prompt], 0).labels[0].tolist()) if label != -100
    ] == list(pieces.answer)


@pytest.mark.parametrize("name", FAMILIES)
def test_its_system_turn_is_its_own_or_the_wordings(name):
    tokenizer, brief = family(name), PromptFormat(system="Be brief.")
    own = conversation_pieces(tokenizer, PromptFormat(system="Be wordy."), (SYSTEM, *MESSAGES), "x")
    assert own == conversation_pieces(tokenizer, brief, MESSAGES, "x")
    text = tokenizer.decode(own.prefix)
    assert text.count("Be brief.") == 1
    assert "wordy" not in text
    if name not in FOLDED:
        assert text == rendered(name, (SYSTEM, *MESSAGES))


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_in_messages_stay_text(name):
    tokenizer = family(name)
    special = " ".join(tokenizer.added_tokens_encoder)
    asked = tuple((role, text.replace("When", f"When {special}")) for role, text in MESSAGES)
    prefix, plain = (
        conversation_pieces(tokenizer, PromptFormat(), turns, "x").prefix
        for turns in (asked, MESSAGES)
    )
    steering = tokenizer.added_tokens_decoder
    assert [i for i in prefix if i in steering] == [i for i in plain if i in steering]
    assert tokenizer.decode(prefix) == tokenizer.decode(plain).replace("When", f"When {special}")


def test_the_tag_of_full_attention_opens_the_first_message():
    tokenizer = family("llama3")
    pieces = conversation_pieces(tokenizer, PromptFormat(full_tag="[Full]"), MESSAGES, "x")
    text = tokenizer.decode(pieces.prefix)
    assert "[Full] Who was born there?" in text
    assert text.count("[Full]") == 1


def test_what_renders_no_conversation_is_refused():
    dropping = "{{ bos_token }}{{ messages[0].content }}"
    for template in (None, dropping):
        with pytest.raises(ValueError, match="no chat template that renders this conversation"):
            conversation_pieces(build_tokenizer(template), PromptFormat(), MESSAGES, "x")
