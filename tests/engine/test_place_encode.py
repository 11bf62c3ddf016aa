"""Every way to place and encode chunks equals one forward under the dense mask."""

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from engine.served import ASK, FORMAT, SHORT, dense_logits, engine_of, served_spans
from families import FAMILIES, ROPES, build, dealt

from blocktune.adapter import AdapterInfo
from blocktune.attention import DensePlan
from blocktune.engine import Engine
from blocktune.layout import GLOBAL, Kind, Layout
from blocktune.links import install_links, new_links
from blocktune.methods import Method, Weights
from blocktune.methods import build as method_of
from blocktune.methods.select import Everything, FirstK, Nothing, Selection
from blocktune.prompt import LayoutSpec

MODELS = {**FAMILIES, **{f"rope-{name}": config for name, config in ROPES.items()}}
TOLERANCE = {"rtol": 0, "atol": 1e-4}
SPECS: dict[str, dict[str, Any]] = {
    "blanks": {"num_blanks": 3},
    "shared prefix": {"shared_prefix": True},
    "bos dropped": {"bos": "drop"},
    "bos kept": {"bos": "keep"},
    "parallel": {"placement": "parallel"},
    "composite": {"placement": "composite"},
    "reserved": {"placement": "reserved", "slot": 70},
    "reserved, after blanks": {"placement": "reserved", "slot": 64, "num_blanks": 2},
}
WRAPPED = LayoutSpec(num_headers=2, num_trailers=1)


@dataclasses.dataclass(frozen=True)
class Made(Method):
    """Any layout under any selector."""

    source: ClassVar[str] = "https://example.org"
    weights: ClassVar[Weights] = Weights.WRAPS
    changes: tuple = ()
    selected: Selection = dataclasses.field(default_factory=Nothing)

    def layout(self, spec):
        return dataclasses.replace(spec, **dict(self.changes))

    def select(self):
        return self.selected

    def layout_for(self, trained):  # of any adapter, or of none
        return self.layout(trained or LayoutSpec())


def made(changes: dict[str, Any], select: Selection | None = None) -> Made:
    return Made(tuple(changes.items()), select or Nothing())


@pytest.fixture
def engine(request, tokenizer):
    config = MODELS[request.param]()
    if request.param == "mistral":  # all layers slide: the last row must still reach a seam
        config.sliding_window = 40
    return engine_of(config, tokenizer)


def wrapping_engine(config, tokenizer, layout=WRAPPED) -> Engine:
    """An engine whose adapter has learned tokens around chunks, far from each other."""
    config.vocab_size = len(tokenizer)
    model = build(config)
    table = new_links(model, layout.num_learned)
    torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(1))
    install_links(model, table)
    info = AdapterInfo("base", "a-b-c", "d", layout, FORMAT)
    return Engine(model, tokenizer, adapter=info)


@pytest.mark.parametrize(("engine", "name"), dealt(MODELS, SPECS), indirect=["engine"])
def test_served_logits_match_one_dense_forward(engine, name):
    plain = dense_logits(engine, ASK, made({}))
    for select in (Nothing(), FirstK(k=3)):
        method = made(SPECS[name], select)
        served, spans = served_spans(engine, ASK, method)
        torch.testing.assert_close(served, dense_logits(engine, ASK, method, spans), **TOLERANCE)
        assert (served - plain).abs().max() > 10 * TOLERANCE["atol"]


@pytest.mark.parametrize(("engine", "name"), dealt(MODELS, SPECS), indirect=["engine"])
def test_everything_fresh_matches_full_attention_at_the_same_positions(engine, name):
    method = made(SPECS[name], Everything())
    served = engine.next_logits([ASK], method)[0]
    pieces = engine.prompts.pieces(ASK, method)
    prompt = engine.prompts.prompt(pieces, engine.prompts.spec(method))
    seen = (prompt.layout.kind != Kind.BLANK)[0]
    layout = Layout(**vars(prompt.layout.map(lambda field: field[:, seen]).rows()))
    layout = dataclasses.replace(layout, group=torch.full_like(layout.group, GLOBAL))
    with torch.no_grad():
        whole = engine.model(
            torch.tensor(prompt.ids)[seen][None],
            position_ids=layout.position,
            plan=DensePlan(layout),
            use_cache=False,
        )
    torch.testing.assert_close(served, whole.logits[0, -1], **TOLERANCE)


@pytest.mark.parametrize("name", SPECS)
def test_a_ragged_batch_in_any_order_of_storing_matches_single_prompts(tokenizer, name):
    method = made(SPECS[name], FirstK(k=2))
    alone = engine_of(FAMILIES["llama"](), tokenizer)
    single = torch.cat([alone.next_logits([ask], method) for ask in (ASK, SHORT)])
    together = engine_of(FAMILIES["llama"](), tokenizer)
    turned = dataclasses.replace(ASK, chunks=ASK.chunks[::-1])
    together.next_logits([SHORT, turned], method)  # stored the other way round
    torch.testing.assert_close(together.next_logits([ASK, SHORT], method), single, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_tokens_around_chunks_match_one_dense_forward(family, tokenizer):
    config = FAMILIES[family]()
    if family == "mistral":
        config.sliding_window = 40
    engine = wrapping_engine(config, tokenizer)
    for method in (method_of("kv-packet"), made({}, FirstK(k=2))):
        served, spans = served_spans(engine, ASK, method)
        torch.testing.assert_close(served, dense_logits(engine, ASK, method, spans), **TOLERANCE)
    bare = dense_logits(engine, ASK, made({"num_headers": 0, "num_trailers": 0}))
    assert (served - bare).abs().max() > 10 * TOLERANCE["atol"]


def test_learned_tokens_are_stored_with_the_chunk_and_counted_apart(tokenizer):
    engine = wrapping_engine(FAMILIES["llama"](), tokenizer)
    assert engine.encode(ASK.chunks).num_encoded == 3
    usage = engine.answer([ASK], "kv-packet", max_new_tokens=1)[0].usage
    pieces = engine.prompts.pieces(ASK, method_of("kv-packet"))
    assert usage.chunk_hits == 3
    assert usage.context_tokens == sum(map(len, pieces.chunks))
    assert usage.prompt_tokens - usage.context_tokens == len(pieces.prefix + pieces.query) + 9
    assert sum(usage.layer_tokens) == 0


@pytest.mark.parametrize("bos", ["keep", "keep-all"])
def test_an_auxiliary_model_scores_the_tokens_of_chunks_that_begin_with_bos(bos, tokenizer):
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    method = method_of(f"naive + auxiliary-attention 30 % window=1 + layout bos={bos}")
    served, spans = served_spans(engine, ASK, method)
    torch.testing.assert_close(served, dense_logits(engine, ASK, method, spans), **TOLERANCE)
    prompt = engine.lay_out(engine.prompts.pieces(ASK, method), method)
    fresh = [int((prompt.layout.order[0] == span.column).nonzero()) for span in spans]
    assert fresh
    assert tokenizer.bos_token_id not in prompt.input_ids[fresh]


def test_turborag_positions_are_one_after_the_other_or_all_from_zero(tokenizer):
    engine = wrapping_engine(FAMILIES["llama"](), tokenizer, LayoutSpec(num_headers=1))
    for positions, starts in (("reordered", None), ("composite", [0, 0, 0])):
        method = method_of("turborag", positions=positions)
        served = engine.next_logits([ASK], method)[0]
        torch.testing.assert_close(served, dense_logits(engine, ASK, method), **TOLERANCE)
        prompt = engine.prompts.prompt(
            engine.prompts.pieces(ASK, method), engine.prompts.spec(method)
        )
        opens = prompt.layout.position[prompt.layout.kind == Kind.WRAP].tolist()
        assert opens == (starts or prompt.layout.order[prompt.layout.kind == Kind.WRAP].tolist())


def test_what_a_chunk_is_encoded_after_is_in_its_key(tokenizer):
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    for changes in ({}, {"num_blanks": 1}, {"num_blanks": 2}, {"bos": "drop"}, {"bos": "keep"}):
        usage = engine.answer([ASK], made(changes), max_new_tokens=1)[0].usage
        assert usage.chunk_misses == 3
    # Where a chunk stands is not: positions are only relocated.
    for changes in ({"placement": "composite"}, {"placement": "reserved", "slot": 80}):
        usage = engine.answer([ASK], made(changes), max_new_tokens=1)[0].usage
        assert usage.chunk_hits == 3


def test_a_chunk_longer_than_its_slot_is_refused(tokenizer):
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    with pytest.raises(ValueError, match=r"takes \d+ positions, the schema reserves 8"):
        engine.next_logits([ASK], method_of("prompt-cache-schema", slot=8))
    with pytest.raises(
        ValueError, match=r"has \d+ tokens, this model's maximum context length is 512"
    ):
        engine.next_logits([ASK], method_of("prompt-cache-schema", slot=200))


def test_a_tokenizer_without_bos_cannot_keep_or_drop_one():
    from tiny_tokenizer import build_tokenizer

    engine = engine_of(FAMILIES["llama"](), build_tokenizer(None, bos_token=None))
    with pytest.raises(ValueError, match=r"layout 'bos' is 'keep', but tokenizer .* has no BOS"):
        engine.next_logits([ASK], made({"bos": "keep"}))


def test_learned_tokens_are_never_served_in_silence(tokenizer):
    engine = wrapping_engine(FAMILIES["llama"](), tokenizer)
    with pytest.raises(ValueError, match=r"use .kv-packet., or compose: .kv-packet \+ naive."):
        engine.next_logits([ASK], "naive")
    plain = engine_of(FAMILIES["llama"](), tokenizer)
    with pytest.raises(ValueError, match=r"'kv-packet' needs .* learned tokens .*, got none"):
        plain.next_logits([ASK], "kv-packet")
