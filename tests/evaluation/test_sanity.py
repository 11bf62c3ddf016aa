"""The prompt check finds what would make the oracle look worse than it is."""

from types import SimpleNamespace

import pytest
from tiny_tokenizer import build_tokenizer

from blocktune.data import RagExample
from blocktune.evaluation import sanity
from blocktune.prompt import Chunk, PromptFormat, make_pieces

EXAMPLE = RagExample("Where was Anna born?", (Chunk("Anna was born in Kirby."),), ("Kirby",))
CLOSING = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"  # as Mistral's


def engine(tokenizer, **fmt):
    return SimpleNamespace(tokenizer=tokenizer, format=PromptFormat(**fmt))


@pytest.mark.parametrize(
    "tokenizer",
    [
        build_tokenizer(),
        build_tokenizer(adds_bos=True),
        build_tokenizer(template=None),
        build_tokenizer(template=CLOSING, bos_token=None),
    ],
    ids=["template writes BOS", "both add BOS", "no template", "no BOS, turn opened by closing"],
)
def test_sound_prompts_pass(tokenizer):
    engines = {"base": engine(tokenizer), "tuned": engine(tokenizer)}
    assert sanity.check_prompts(engines, EXAMPLE) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, bos: p._replace(prefix=(bos, *p.prefix)), "holds it 2 times"),
        (lambda p, bos: p._replace(prefix=p.prefix[1:]), "holds it 0 times"),
        (lambda p, bos: p._replace(prefix=p.prefix[1:], query=(bos, *p.query)), "it opens with"),
        (lambda p, bos: p._replace(query=p.query[:-2]), "open the assistant's turn"),
    ],
    ids=["two BOS", "no BOS", "BOS elsewhere", "turn not opened"],
)
def test_unsound_prompts_are_refused(monkeypatch, change, message):
    def broken(tokenizer, *arguments):
        return change(make_pieces(tokenizer, *arguments), tokenizer.bos_token_id)

    monkeypatch.setattr(sanity, "make_pieces", broken)
    with pytest.raises(ValueError, match=message):
        sanity.check_prompts({"base": engine(build_tokenizer())}, EXAMPLE)


def test_weights_with_different_prompts_are_refused():
    engines = {
        "base": engine(build_tokenizer()),
        "out/other": engine(build_tokenizer(), instruction="Be brief."),
    }
    message = "'out/other' and 'base' build different prompts .*wordings differ in instruction"
    with pytest.raises(ValueError, match=message):
        sanity.check_prompts(engines, EXAMPLE)


def test_the_tag_of_a_mode_is_no_difference():
    tagged = engine(build_tokenizer(), block_tag="[Block]", full_tag="[Full]")
    engines = {"base": engine(build_tokenizer()), "out/tagged": tagged}
    assert sanity.check_prompts(engines, EXAMPLE) is None
