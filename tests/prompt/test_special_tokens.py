"""What was read lately is recalled, and only that."""

import copy
from unittest.mock import patch

import pytest
from transformers import PreTrainedTokenizerFast

from blocktune.prompt import special_tokens
from blocktune.prompt.special_tokens import encode


@pytest.fixture
def own(tokenizer):
    """A tokenizer that has read nothing yet."""
    return copy.deepcopy(tokenizer)


@pytest.fixture
def reads(own):
    """How often the tokenizer itself was asked."""
    count = []
    plain = PreTrainedTokenizerFast.__call__

    def counted(self, *args, **kwargs):
        count.append(self)
        return plain(self, *args, **kwargs)

    with patch.object(PreTrainedTokenizerFast, "__call__", counted):
        yield count


def test_a_text_is_read_once_for_each_rule(own, reads):
    text = f"a b {own.eos_token}"
    plain, split = (encode(own, text, split_special_tokens=s) for s in (False, True))
    assert plain != split
    assert [encode(own, text, split_special_tokens=s) for s in (False, True)] == [plain, split]
    assert len(reads) == 2
    encode(copy.deepcopy(own), text)
    assert len(reads) == 3


def test_a_token_that_is_added_changes_what_is_read(own):
    before = encode(own, "a <new> b")
    own.add_tokens(["<new>"])
    after = encode(own, "a <new> b")
    assert own.convert_tokens_to_ids("<new>") in after
    assert after != before


def test_what_was_not_asked_for_longest_is_forgotten_first(own, reads):
    size = special_tokens._size(("x a",), encode(own, "x a"))
    with patch.object(special_tokens, "MOST_BYTES", 2 * size):
        for text in ("x b", "x c", "x b", "x d", "x b"):
            encode(own, text)
        assert len(reads) == 4
        encode(own, "x c")
        assert len(reads) == 5
