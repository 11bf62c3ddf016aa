"""The engine's answers, its caches and its accounts."""

import dataclasses
import time

import pytest
import torch
from engine.served import ASK, SHORT, Ask, engine_of
from families import FAMILIES

from blocktune.cache import ChunkStore
from blocktune.engine import Sampling
from blocktune.prompt import Chunk
from blocktune.reuse import available, build


@pytest.fixture
def engine(tokenizer):
    return engine_of(FAMILIES["llama"](), tokenizer)


def layer_rows(engine) -> list[list[int]]:
    """Hooks that record how many rows each layer's feed-forward really computes."""
    counts: list[list[int]] = [[] for _ in engine.model.model.layers]
    for index, layer in enumerate(engine.model.model.layers):
        layer.mlp.register_forward_hook(
            lambda module, args, output, index=index: counts[index].append(args[0].shape[1])
        )
    return counts


@pytest.mark.parametrize(
    "method", [build("naive"), build("epic", k=2), build("cacheblend"), build("full-prefill")]
)
def test_the_account_matches_the_rows_that_the_layers_executed(engine, method):
    engine.encode(ASK.chunks)
    counts = layer_rows(engine)
    answer = engine.answer([ASK], method, max_new_tokens=1)[0]
    pieces = engine.prompts.pieces(ASK, method)
    around = len(pieces.query) + (len(pieces.prefix) if method == build("full-prefill") else 0)
    executed = [sum(layer) - around for layer in counts]
    assert list(answer.account.layer_tokens) == executed
    assert answer.account.context_tokens == sum(map(len, pieces.chunks))
    share = sum(executed) / (len(executed) * answer.account.context_tokens)
    assert answer.account.recompute_ratio == pytest.approx(share)


def test_cacheblend_keeps_its_share_and_computes_the_first_layer_in_full(engine):
    account = engine.answer([ASK], build("cacheblend", ratio=0.5), max_new_tokens=1)[0].account
    assert account.layer_tokens[0] == account.context_tokens == account.probed_tokens
    assert account.layer_tokens[1] == -(-account.context_tokens // 2)


def test_chunks_are_encoded_once_and_their_bytes_are_counted(engine):
    report = engine.encode(ASK.chunks)
    assert (report.num_chunks, report.num_encoded) == (3, 3)
    assert engine.encode(ASK.chunks).num_encoded == 0
    account = engine.answer([ASK], "naive", max_new_tokens=1)[0].account
    assert (account.chunk_hits, account.chunk_misses) == (3, 0)
    pieces = engine.prompts.pieces(ASK, build("naive"))
    cached = len(pieces.prefix) + sum(map(len, pieces.chunks))
    config = engine.model.config
    states = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert account.bytes_read == cached * (4 * states + 8)  # float32, and an int64 token id


def test_encoding_a_corpus_holds_one_pass_of_it_at_a_time(engine, monkeypatch):
    monkeypatch.setattr("blocktune.engine.encode.TOKENS_PER_PASS", 40)
    encoder, held = engine._server.encoder, []
    find = encoder.find

    def seen(group, watch):
        held.append(sum(len(piece.ids) for piece in group))
        return find(group, watch)

    monkeypatch.setattr(encoder, "find", seen)
    report = engine.encode([Chunk(f"Anna Belt has {count} films.") for count in range(20)] * 2)
    assert (report.num_chunks, report.num_encoded) == (40, 20)
    assert len(held) > 1
    assert max(held) <= 40


def test_a_chunk_answers_alike_wherever_and_whenever_it_was_encoded(engine, tokenizer):
    expected = engine.next_logits([ASK], "naive")
    other = engine_of(FAMILIES["llama"](), tokenizer)
    other.encode(tuple(reversed(ASK.chunks)) + SHORT.chunks)
    torch.testing.assert_close(other.next_logits([ASK], "naive"), expected, rtol=0, atol=1e-5)


def test_a_folder_of_chunks_serves_the_next_process(tokenizer, tmp_path):
    first = engine_of(FAMILIES["llama"](), tokenizer, store=ChunkStore(folder=tmp_path))
    expected = first.next_logits([ASK], "naive")
    again = engine_of(FAMILIES["llama"](), tokenizer, store=ChunkStore(folder=tmp_path))
    account = again.answer([ASK], "naive", max_new_tokens=1)[0].account
    assert (account.chunk_hits, account.chunk_misses) == (3, 0)
    assert torch.equal(again.next_logits([ASK], "naive"), expected)


def test_the_prefix_cache_reuses_only_what_stands_first(engine):
    first = engine.answer([ASK], "prefix-cache", max_new_tokens=1)[0].account
    again = engine.answer([ASK], "prefix-cache", max_new_tokens=1)[0].account
    moved = Ask(ASK.question, ASK.chunks[1:] + ASK.chunks[:1])
    other = engine.answer([moved], "prefix-cache", max_new_tokens=1)[0].account
    assert [a.chunk_hits for a in (first, again, other)] == [0, 3, 0]
    assert [a.recompute_ratio for a in (first, again, other)] == [1.0, 0.0, 1.0]


def test_batches_answer_in_the_order_of_the_requests(engine):
    asks = [ASK, SHORT, Ask("What?", ASK.chunks[:1])]
    together = engine.answer(asks, "naive", max_new_tokens=6, batch_size=2)
    alone = [engine.answer([ask], "naive", max_new_tokens=6)[0] for ask in asks]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


def test_streamed_pieces_join_to_the_answer(engine):
    whole = engine.answer([ASK], "epic", max_new_tokens=12)[0].text
    assert "".join(engine.stream(ASK, "epic", max_new_tokens=12)).strip() == whole


def test_sampling_repeats_by_seed_and_is_not_greedy(engine):
    def draw(seed):
        sampling = Sampling(temperature=2.0, top_k=50, top_p=0.95, seed=seed)
        return engine.answer([ASK], "naive", max_new_tokens=8, sampling=sampling)[0].token_ids

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_a_chunk_longer_than_the_context_is_refused(engine):
    long = Ask("Who?", (Chunk("Anna Belt was born in Port Alder. " * 200),))
    with pytest.raises(ValueError, match=r"longest chunk has \d+ tokens, .* context holds 512"):
        engine.answer([long], "naive")
    with pytest.raises(ValueError, match=r"chunk 0 .* tokens, the model's context holds 512"):
        engine.encode(long.chunks)


def test_what_cannot_run_is_refused_before_anything_does(engine):
    with pytest.raises(ValueError, match="check_layer must be below the model's 2 layers, got 7"):
        engine.answer([ASK], build("cacheblend", check_layer=7))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        engine.answer([ASK], "naive", max_new_tokens=0)
    assert len(engine.store) == 0


def test_time_to_first_token_counts_every_part_of_the_way(engine):
    started = time.perf_counter()
    account = engine.answer([ASK], "naive", max_new_tokens=1)[0].account
    spent = time.perf_counter() - started
    parts = dataclasses.asdict(account.ttft)
    assert all(seconds > 0 for name, seconds in parts.items() if name != "load_s")
    assert sum(parts.values()) == account.ttft_s <= spent


@pytest.mark.parametrize("name", ["block-attention", "kvlink"])
def test_methods_that_need_an_adapter_say_which(engine, name):
    with pytest.raises(ValueError, match=f"'{name}' needs an adapter trained with .* --adapter"):
        engine.answer([ASK], name)


@pytest.mark.parametrize("name", sorted(set(available()) - {"block-attention", "kvlink"}))
def test_later_text_never_changes_an_earlier_column(engine, name):
    """Not for CacheBlend's choice of tokens: it spends one budget over the whole prompt."""
    method = build(name, ratio=1.0) if name == "cacheblend" else build(name)
    later = Ask("And who wrote the music of it?", ASK.chunks)
    keys = []
    for ask in (ASK, later):
        pieces, prompts = engine._read([ask], method)
        run = engine._server.start(prompts, pieces, method)
        until = len(pieces[0].prefix) + sum(map(len, pieces[0].chunks))
        keys.append([layer.keys[0, :, :until].clone() for layer in run.cache.layers])
    for left, right in zip(*keys, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=2e-6)
