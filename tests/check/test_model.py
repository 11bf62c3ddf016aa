"""`check_model` on adapters of every placement: what is claimed of one must be true of it."""

from dataclasses import replace

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from blocktune.adapter import AdapterInfo
from blocktune.check import check_model
from blocktune.check.serving import all_visible, batch_of
from blocktune.engine import Engine
from blocktune.links import install_links, new_links
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.prompt import LayoutSpec, PromptFormat
from blocktune.testing import TINY, WORDS, byte_tokenizer, random_llama


def trained_for(layout: LayoutSpec, words: PromptFormat = WORDS) -> Engine:
    """An engine of a random model, as if an adapter of this layout had been trained on it."""
    tokenizer = byte_tokenizer()
    model = random_llama(len(tokenizer), initializer_range=0.2, **TINY)
    facts = ("specimen", base_fingerprint(model), tokenizer_hash(tokenizer))
    info = AdapterInfo(*facts, layout, words)
    if layout.num_learned:
        install_links(model, new_links(model, layout.num_learned, 0))
    return Engine(model, tokenizer, format=words, adapter=info)


def in_full(batch):
    ids, layout = all_visible(batch.input_ids, batch.layout)
    return replace(batch, input_ids=ids, layout=layout)


@pytest.mark.parametrize(
    "layout",
    [
        LayoutSpec(),
        LayoutSpec(shared_prefix=True),
        LayoutSpec(placement="parallel"),
        LayoutSpec(placement="parallel", shared_prefix=True),
        LayoutSpec(placement="composite"),
        LayoutSpec(placement="composite", num_headers=1, num_trailers=1),
        LayoutSpec(placement="parallel", num_links=2),
    ],
    ids=str,
)
def test_every_claim_holds_of_a_sound_model(layout):
    checks = {one.name: one for one in check_model(trained_for(layout))}
    assert [one for one in checks.values() if not one.passed] == []
    fresh = [name for name in checks if name.startswith(("all tokens fresh", "ratio 1"))]
    where = "full prefill" if layout.placement == "sequential" else "full attention at the same"
    assert len(fresh) == (0 if layout.num_learned else 2)
    assert all(f"= {where}" in name for name in fresh)


def test_tags_of_the_mode_are_no_failure():
    words = replace(WORDS, block_tag="[Block]", full_tag="[Full]")
    checks = check_model(trained_for(LayoutSpec(), words))
    assert [one for one in checks if not one.passed] == []
    fresh = [one.name for one in checks if one.name.startswith(("all tokens fresh", "ratio 1"))]
    assert all(name.endswith("= full attention at the same positions") for name in fresh)
    assert len(fresh) == 2


def test_a_window_shorter_than_a_chunk_is_no_failure():
    """No row of the question reaches a chunk, but rows of a chunk reach the one before."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = TINY | {"num_hidden_layers": 1, "sliding_window": 12, "pad_token_id": None}
    config = Phi3Config(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)
    engine = Engine(Phi3ForCausalLM(config).eval(), tokenizer, format=WORDS)
    checks = {one.name: one for one in check_model(engine)}
    assert [one for one in checks.values() if not one.passed] == []
    assert checks["hiding chunks from each other is seen"].max_abs_diff > 0.1


def test_other_positions_alone_do_not_count_as_hidden_chunks(monkeypatch):
    """A mask that hides nothing, at positions that no full prefill has."""
    engine = trained_for(LayoutSpec(placement="parallel"))
    monkeypatch.setattr(
        "blocktune.check.serving.batch_of",
        lambda engine, method: in_full(batch_of(engine, method)),
    )
    last = check_model(engine)[-1]
    assert last.name == "hiding chunks from each other is seen"
    assert not last.passed
    assert last.max_abs_diff < 1e-3


def test_links_and_learned_tokens_around_chunks_are_refused_together():
    engine = trained_for(LayoutSpec(num_links=1, num_headers=1, num_trailers=1))
    with pytest.raises(
        ValueError, match="no method serves an adapter with link tokens and learned"
    ):
        check_model(engine)
