"""Conversations in full attention: what the template makes of the messages, then the response."""

import pytest
from chat_families import FAMILIES, family, rendered
from tiny_tokenizer import build_tokenizer

from blocktune.prompt import LayoutSpec, PromptFormat, answer_ids, conversation_pieces, lay_out

TURNS = (("user", "Who was born there?"), ("assistant", "Anna Belt."), ("user", "When?"))
SYSTEM = ("system", "Be brief.")
FOLDED = ("gemma", "gemma3")
"""Families whose template takes no system turn, or folds it into the user's."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_is_what_the_template_renders(name):
    tokenizer = family(name)
    pieces = conversation_pieces(tokenizer, PromptFormat(), TURNS, "In 1966.")
    assert tokenizer.decode(pieces.prefix) == rendered(name, TURNS)
    assert pieces.answer == answer_ids(tokenizer, "In 1966.")
    prompt = lay_out(pieces, LayoutSpec(block=False))
    assert prompt.ids == pieces.prefix + pieces.answer
    assert [label for label in prompt.labels if label != -100] == list(pieces.answer)


@pytest.mark.parametrize("name", FAMILIES)
def test_its_system_turn_is_its_own_or_the_wordings(name):
    tokenizer, brief = family(name), PromptFormat(system="Be brief.")
    own = conversation_pieces(tokenizer, PromptFormat(system="Be wordy."), (SYSTEM, *TURNS), "x")
    assert own == conversation_pieces(tokenizer, brief, TURNS, "x")
    text = tokenizer.decode(own.prefix)
    assert text.count("Be brief.") == 1
    assert "wordy" not in text
    if name not in FOLDED:
        assert text == rendered(name, (SYSTEM, *TURNS))


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_in_messages_stay_text(name):
    tokenizer = family(name)
    special = " ".join(tokenizer.added_tokens_encoder)
    asked = tuple((role, text.replace("When", f"When {special}")) for role, text in TURNS)
    prefix, plain = (
        conversation_pieces(tokenizer, PromptFormat(), turns, "x").prefix
        for turns in (asked, TURNS)
    )
    steering = tokenizer.added_tokens_decoder
    assert [i for i in prefix if i in steering] == [i for i in plain if i in steering]
    assert tokenizer.decode(prefix) == tokenizer.decode(plain).replace("When", f"When {special}")


def test_the_tag_of_full_attention_opens_the_first_message():
    tokenizer = family("llama3")
    pieces = conversation_pieces(tokenizer, PromptFormat(full_tag="[Full]"), TURNS, "x")
    text = tokenizer.decode(pieces.prefix)
    assert "[Full] Who was born there?" in text
    assert text.count("[Full]") == 1


def test_what_renders_no_conversation_is_refused():
    dropping = "{{ bos_token }}{{ messages[0].content }}"
    for template in (None, dropping):
        with pytest.raises(ValueError, match="no chat template that renders this conversation"):
            conversation_pieces(build_tokenizer(template), PromptFormat(), TURNS, "x")
