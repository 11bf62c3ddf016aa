"""Traces of every kind, and what a store of a given size saves on them."""

import gzip
import json
from itertools import pairwise

import pytest
from cache.made import MODEL, made_chunk

from blocktune.bench import replay as played
from blocktune.bench.replay import Use, read_requests, zipf_requests
from blocktune.cache import ChunkStore, chunk_key
from blocktune.cache.store.config import StoreConfig

COSTS = played.Costs(token_bytes=10, token_s=1.0, pair_s=0.0, load_bytes_s=1000.0)


def test_mooncake_blocks_are_uses_and_the_last_is_shorter(tmp_path):
    path = tmp_path / "trace.jsonl.gz"
    lines = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 9, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]},
    ]
    with gzip.open(path, "wt") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    assert read_requests(path) == [
        (Use("0", 512), Use("1", 512), Use("2", 76)),
        (Use("0", 512), Use("7", 88)),
    ]
    assert len(read_requests(path, limit=1)) == 1


def test_azure_lengths_are_filled_with_drawn_chunks(tmp_path):
    path = tmp_path / "trace.csv"
    rows = "".join(f"2023-11-16 18:17:{n:02}.9,{500 + 700 * n},8\n" for n in range(40))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    requests = read_requests(path)
    assert [sum(u.num_tokens for u in one) for one in requests[:2]] == [500, 1200]
    assert requests == read_requests(path)
    assert len({use.key for one in requests for use in one}) < sum(map(len, requests))


def test_a_store_records_what_replay_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(played, "SAME_REQUEST_S", -60.0)  # however fast: each use is a request
    trace = tmp_path / "trace.jsonl"
    config = StoreConfig(folder=tmp_path / "chunks", memory=0, trace=trace)
    store, chunks = ChunkStore(config=config), [made_chunk(5, seed=seed) for seed in (0, 10)]
    for kv in (*chunks, chunks[0]):
        key = chunk_key(MODEL, kv.token_ids)
        if store.get(key, kv.token_ids, MODEL) is None:
            store.put(key, kv, seconds=2.0, tenant="acme")
    uses = [use for request in read_requests(trace) for use in request]
    size = chunks[0].num_bytes
    assert [(u.num_tokens, u.num_bytes, u.seconds) for u in uses] == [(5, size, 2.0)] * 3
    outcome = played.replay(read_requests(trace), 10**6)
    assert (round(outcome.hit_rate, 3), outcome.peak_bytes) == (0.333, 2 * size)
    assert store.histograms()["reuse_distance"] == {4: 1}
    assert store.stats().tiers["disk"].hits == 1
    with trace.open("a") as file:
        file.write('{"op": "ge')  # a kill
    assert len(read_requests(trace)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "an empty trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,abc,2\n", "'abc'"),
        ("[1]\n", "line 1: not a JSON"),
        ('{"a": 1}\n', "neither of a store"),
        ("\x80", "utf-8"),
        ('{"hash_ids": [1], "input_length": null}\n', "TypeError"),
        ('{"hash_ids": [], "input_length": 9}\n', "an empty trace"),
        ('{"op": "get", "key": "a"}\n', "bytes"),
        ('{"op": "put", "key": "a"}\n', "an empty trace"),
        ('{"op": "get", "key": "a", "tokens": -1, "bytes": 2}\n', r"\[-1, 2"),
        ('{"op": "get", "key": "a", "tokens": "9", "bytes": 2}\n', r"\['9', 2"),
        (f'{{"op": "get", "key": "a", "tokens": 9, "bytes": {10**20}}}\n', f"{10**20}"),
        ('{"op": "get", "key": "a", "tokens": NaN, "bytes": 2}\n', r"\[nan, 2"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "x").write_text(text, encoding="latin-1")
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"text")[:-9])
    with pytest.raises(ValueError, match=r"x\.gz': EOFError"):
        read_requests(tmp_path / "x.gz")
    with pytest.raises(ValueError, match=message):
        read_requests(tmp_path / "x")
    with pytest.raises(ValueError, match="cannot read the trace"):
        read_requests(tmp_path / "none")


def test_a_trace_may_have_a_mark_of_its_encoding(tmp_path):
    text = "\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\n1,500,3\n"
    (tmp_path / "A.CSV.GZ").write_bytes(gzip.compress(text.encode()))
    [[use]] = read_requests(tmp_path / "A.CSV.GZ")
    assert use.num_tokens == 500


def test_replay_counts_by_hand():
    a, b, c = (Use(name, tokens) for name, tokens in (("a", 10), ("b", 20), ("c", 10)))
    requests = [(a, b), (a,), (c,), (b,), (a,)]
    outcome = played.replay(requests, 300, "lru", COSTS)  # holds two of them
    # b was used before a when c comes: it leaves, and comes back in a's place.
    assert outcome.hit_rate == pytest.approx(1 / 6)
    assert outcome.saved_s == pytest.approx(10 - 100 / 1000)
    assert outcome.peak_bytes == 300
    assert played.replay(requests, 400, "lru", COSTS).hit_rate == pytest.approx(3 / 6)
    assert played.replay(requests, 5, "lru", COSTS).hit_rate == 0


def test_under_sustained_novelty_the_store_is_steady_and_cost_aware_saves_most():
    requests = list(zipf_requests(2000, seed=1))
    budget = played.touched_bytes(requests) // 10
    found = {name: played.replay(requests, budget, name) for name in ("lru", "gdsf")}
    for outcome in found.values():
        assert outcome.peak_bytes <= budget
        assert max(outcome.windows[3:]) - min(outcome.windows[3:]) < 0.06
    assert found["gdsf"].saved_s > found["lru"].saved_s


def test_reuse_pays_before_prefix_caching_where_retrieval_orders_freely():
    points = played.break_even(requests=100)
    assert points[0].reuse_s < points[0].none_s  # attention within chunks alone is cheaper
    assert all(a.reuse_s >= b.reuse_s for a, b in pairwise(points))
    assert points[8].reuse_s < points[8].prefix_s <= points[8].none_s
    dear = played.break_even(recompute=0.5, requests=100)
    assert dear[0].reuse_s > dear[0].prefix_s
