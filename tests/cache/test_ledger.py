"""What leaves a full tier: policies, quotas, pins, time to live; and the index of a folder."""

import os
import random
import signal
import sqlite3
import threading
from pathlib import Path

import pytest
from cache.made import MODEL, assert_same_chunk, made_chunk

from blocktune.cache import ChunkStore, chunk_key
from blocktune.cache.store.config import StoreConfig, parse_bytes
from blocktune.cache.store.folder import ChunkFolder, chunk_path
from blocktune.cache.store.ledger import INDEX, POLICIES, About, Ledger
from blocktune.cache.store.shelf import Shelf, open_index

CHUNKS = [made_chunk(5, seed=10 * n) for n in range(4)]
KEYS = [chunk_key(MODEL, kv.token_ids) for kv in CHUNKS]


def filled(policy):
    """a: used last; b: used most; c: slow to encode; d: entered last. All of 10 bytes."""
    ledger = Ledger(max_bytes=40, policy=policy)
    for key, seconds in (("a", 1.0), ("b", 1.0), ("c", 9.0), ("d", 1.0)):
        ledger.add(key, 10, About(seconds=seconds))
    for key in "bbba":
        ledger.use(key)
    return ledger


@pytest.mark.parametrize(
    ("policy", "order"), [("lru", "cdba"), ("fifo", "abcd"), ("lfu", "cdab"), ("gdsf", "dabc")]
)
def test_a_policy_orders_what_leaves(policy, order):
    ledger = filled(policy)
    assert ledger.leaving(40) == list(order)
    assert ledger.leaving(10) == [order[0]]
    assert ledger.leaving(10, key=order[0]) == []  # it replaces itself
    assert ledger.leaving(41) is None


def test_every_policy_has_a_case_above():
    assert set(POLICIES) == {"lru", "fifo", "lfu", "gdsf"}


def test_gdsf_prefers_seconds_per_byte_and_forgets_old_fame():
    ledger = Ledger(max_bytes=100, policy="gdsf")
    ledger.add("large", 80, About(seconds=4.0))
    ledger.add("small", 10, About(seconds=1.0))
    for _ in range(30):
        ledger.use("small")
    assert ledger.leaving(80) == ["large"]
    ledger.remove(["large"])
    # What leaves raises the clock: in the end also the famous one is worth less than what is new.
    for count in range(1000):
        gone = ledger.leaving(50)
        ledger.remove(gone)
        if "small" in gone:
            break
        ledger.add(str(count), 50, About(seconds=4.0))
    assert 3 < count < 999


def test_pinned_entries_stay_and_expired_ones_leave_first():
    now = [1000.0]
    ledger = Ledger(max_bytes=30, clock=lambda: now[0])
    ledger.add("a", 10, About())
    ledger.add("b", 10, About(expires=1010.0))
    ledger.add("c", 10, About())
    assert ledger.pin(["a"]) == 1
    assert ledger.leaving(10) == ["b"]
    assert ledger.leaving(21) is None
    now[0] = 1011.0
    assert ledger.leaving(10) == ["b"]
    ledger.add("a", 10, About())  # written again
    assert ledger.leaving(20) == ["b", "c"]
    ledger.pin(["a"], False)
    assert ledger.leaving(30) == ["b", "c", "a"]


def test_a_tenant_over_its_quota_makes_room_itself():
    ledger = Ledger(max_bytes=100, quota=30)
    for tenant, key in (("x", "x1"), ("y", "y1"), ("x", "x2")):
        ledger.add(key, 15, About(tenant=tenant))
    assert ledger.leaving(15, "y") == []
    assert ledger.leaving(15, "x") == ["x1"]
    assert ledger.leaving(31, "x") is None
    assert (ledger.size("x"), ledger.size("y"), ledger.size()) == (30, 15, 45)


def test_expired_entries_make_room_within_a_quota():
    ledger = Ledger(max_bytes=100, quota=30, clock=lambda: 1000.0)
    for tenant in "xy":
        ledger.add(tenant, 30, About(tenant=tenant, expires=999.0))
    assert set(ledger.leaving(30, "x")) == {"x", "y"}
    assert ledger.leaving(31, "x") is None


def test_what_cannot_fit_does_not_move_the_clock_of_gdsf():
    ledger = Ledger(max_bytes=20, policy="gdsf")
    for key, seconds in (("a", 1.0), ("b", 4.5)):
        ledger.add(key, 10, About(seconds=seconds))
    assert ledger.leaving(21) is None
    ledger.remove(["a"])
    ledger.add("c", 10, About(seconds=2.0))
    assert ledger.leaving(10) == ["c"]


def test_hits_at_the_end_of_a_process_keep_the_clock_of_gdsf(tmp_path):
    ledger = Ledger(tmp_path / INDEX, max_bytes=20, policy="gdsf")
    for key, seconds in (("a", 1.0), ("b", 4.5)):
        ledger.add(key, 10, About(seconds=seconds))
    ledger.remove(ledger.leaving(10))
    ledger.add("c", 10, About(seconds=2.0))
    ledger.use("c")  # worth 5e8: the clock, 1e8, and twice 2 s of 10 bytes
    del ledger
    assert Ledger(tmp_path / INDEX, max_bytes=20).leaving(10) == ["b"]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_budget_holds_under_random_work(policy):
    draw, ledger, there = random.Random(0), Ledger(max_bytes=500, quota=300, policy=policy), {}
    for _ in range(2000):
        key, size = str(draw.randrange(60)), draw.randrange(1, 120)
        if draw.random() < 0.5:
            ledger.use(key)
            continue
        tenant = draw.choice("xyz")
        doomed = ledger.leaving(size, tenant, key)
        ledger.remove(doomed)
        ledger.add(key, size, About(tenant=tenant))
        for one in doomed:
            del there[one]
        there[key] = (size, tenant)
        assert sum(size for size, _ in there.values()) == ledger.size() <= 500
        for tenant in "xyz":
            of_tenant = sum(size for size, whose in there.values() if whose == tenant)
            assert of_tenant == ledger.size(tenant) <= 300
    assert {row.key for row in ledger.rows()} == there.keys()


def test_an_index_keeps_its_policy_until_another_is_named(tmp_path):
    for given, expected in ((None, "lru"), ("gdsf", "gdsf"), (None, "gdsf"), ("fifo", "fifo")):
        assert Ledger(tmp_path / INDEX, policy=given).policy == expected


def test_threads_share_a_ledger(tmp_path):
    ledger, failures = Ledger(tmp_path / INDEX, max_bytes=500), []

    def work(seed):
        draw = random.Random(seed)
        try:
            for _ in range(60):
                key = str(draw.randrange(40))
                ledger.remove(ledger.leaving(20, key=key))
                ledger.add(key, 20, About())
                ledger.use(str(draw.randrange(40)))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert ledger.size() == 20 * len(list(ledger.rows()))


def store_of(folder, **limits):
    limits = {"memory": 0, "folder": folder} | limits
    return ChunkStore(config=StoreConfig(**limits))


def file_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.fixture
def folder(tmp_path):
    store = store_of(tmp_path)
    for key, kv in zip(KEYS[:3], CHUNKS, strict=False):
        store.put(key, kv, document=f"doc {key[:4]}", seconds=2.0)
    return tmp_path


def test_a_folder_keeps_its_budget_over_processes(folder):
    limit = file_bytes(folder)
    store = store_of(folder, disk=limit)
    assert store.get(KEYS[0], CHUNKS[0].token_ids, MODEL) is not None
    store.put(KEYS[3], CHUNKS[3])
    assert [key in store for key in KEYS] == [True, False, True, True]
    assert file_bytes(folder) <= limit
    assert store.stats().tiers["disk"].evictions == 1
    assert store_of(folder, disk=10).put(KEYS[1], CHUNKS[1]) is not None  # it cannot be kept
    assert KEYS[1] not in store


@pytest.mark.parametrize("how", ["removed", "emptied", "damaged", "half", "other version"])
def test_a_lost_index_is_made_again(folder, how):
    path = folder / INDEX
    before = list(Shelf.open(str(folder)).rows())
    if how == "other version":
        with sqlite3.connect(path) as database:
            database.execute("UPDATE meta SET value = 99 WHERE name = 'format'")
        database.close()
    else:
        for suffix in ("-wal", "-shm"):
            path.with_name(INDEX + suffix).unlink(missing_ok=True)
        data = {"removed": None, "emptied": b"", "damaged": b"x" * 5000}
        data = (data | {"half": path.read_bytes()[:3000]})[how]
        path.unlink() if data is None else path.write_bytes(data)
    store = store_of(folder, disk=10**6)
    for key, kv in zip(KEYS[:3], CHUNKS, strict=False):
        assert_same_chunk(store.get(key, kv.token_ids, MODEL), kv)
    after = list(Shelf.open(str(folder)).rows())
    facts = [(r.key, r.size, r.num_tokens, r.fingerprint, r.document, r.seconds) for r in before]
    assert facts == [
        (r.key, r.size, r.num_tokens, r.fingerprint, r.document, r.seconds) for r in after
    ]


def test_an_index_that_is_a_link_is_not_followed(folder, tmp_path_factory):
    foreign = tmp_path_factory.mktemp("foreign") / "precious"
    foreign.write_text("text")
    for suffix in ("", "-wal", "-shm"):
        (folder / (INDEX + suffix)).unlink(missing_ok=True)
    (folder / INDEX).symlink_to(foreign)
    assert open_index(ChunkFolder(folder)) is None
    store = store_of(folder)
    assert_same_chunk(store.get(KEYS[0], CHUNKS[0].token_ids, MODEL), CHUNKS[0])
    store.put(KEYS[3], CHUNKS[3])
    assert KEYS[3] in store
    assert foreign.read_text() == "text"
    # A budget that nothing can keep account of is kept by writing nothing.
    limited = store_of(folder, disk=10**9)
    limited.discard(KEYS[0])
    limited.put(KEYS[0], CHUNKS[0])
    assert (KEYS[0] in limited, limited.stats().files.unwritten) == (False, 1)
    strict = ChunkStore(config=StoreConfig(folder=folder, disk=10**9), must_write=True)
    with pytest.raises(ValueError, match=r"index\.sqlite, which keeps account of its size, cannot"):
        strict.put(KEYS[0], CHUNKS[0])


def test_files_that_the_index_does_not_know_are_found_by_use_and_by_gc(folder):
    shelf = Shelf.open(str(folder))
    shelf.ledger.remove(KEYS[:2])
    store = store_of(folder)
    assert store.get(KEYS[0], CHUNKS[0].token_ids, MODEL) is not None
    store.flush()
    assert {row.key for row in shelf.rows()} == {KEYS[0], KEYS[2]}
    chunk_path(folder, KEYS[2]).unlink()
    shelf.mend()
    assert {row.key for row in shelf.rows()} == {KEYS[0], KEYS[1]}


def test_a_fork_and_its_parent_lose_no_rows(tmp_path):
    """SQLite's locks do not survive a fork: who closed first removed what the other wrote."""
    store = store_of(tmp_path)
    store.put(KEYS[0], CHUNKS[0])
    (read, write), (done, tell) = os.pipe(), os.pipe()
    if not (child := os.fork()):
        signal.alarm(30)
        store.put(KEYS[1], CHUNKS[1])
        os.write(tell, b".")
        os.read(read, 1)  # until the parent has closed its index
        store.put(KEYS[2], CHUNKS[2])
        store.flush()
        os._exit(0)
    os.read(done, 1)
    del store
    os.write(write, b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert {row.key for row in open_index(ChunkFolder(tmp_path)).rows()} == set(KEYS[:3])


def test_a_group_may_write_the_index(tmp_path):
    mask = os.umask(0o002)
    try:
        store = store_of(tmp_path)
    finally:
        os.umask(mask)
    store.put(KEYS[0], CHUNKS[0])
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.glob(f"{INDEX}*")}
    assert modes == {0o664}


def test_an_index_is_mended_beside_a_writer(tmp_path, monkeypatch):
    sync, mended = os.fsync, []

    def sync_late(descriptor):
        if not mended:
            mended.append(Shelf.open(str(tmp_path)).mend())
        sync(descriptor)

    store = store_of(tmp_path)
    monkeypatch.setattr(os, "fsync", sync_late)
    store.put(KEYS[0], CHUNKS[0])
    assert mended == [{"without_file": 0, "not_indexed": 0}]
    assert KEYS[0] in store


def test_a_folder_that_cannot_be_listed_has_no_index(folder, monkeypatch):
    for path in folder.glob(f"{INDEX}*"):
        path.unlink()
    monkeypatch.setattr(ChunkFolder, "listing", lambda _: os.listdir("/dev/null"))
    store = store_of(folder)
    assert_same_chunk(store.get(KEYS[0], CHUNKS[0].token_ids, MODEL), CHUNKS[0])


def test_entries_are_found_by_document_model_and_tenant(folder):
    store = store_of(folder)
    store.put(KEYS[3], CHUNKS[3], tenant="acme")
    ledger = Shelf.open(str(folder)).ledger
    assert [row.key for row in ledger.rows(document=f"doc {KEYS[0][:4]}")] == [KEYS[0]]
    assert [row.key for row in ledger.rows(tenant="acme")] == [KEYS[3]]
    assert [row.key for row in ledger.rows(fingerprint=MODEL)] == sorted(KEYS)
    store.discard(KEYS[3])
    assert list(ledger.rows(tenant="acme")) == []


def test_a_tenant_without_entries_is_forgotten(folder):
    store = store_of(folder)
    for n in range(3):
        store.put(KEYS[3], CHUNKS[3], tenant=f"salt {n}")
    store.discard(KEYS[3])
    ledger = Shelf.open(str(folder)).ledger
    with ledger.transaction() as database:
        assert database.execute("SELECT count(*) FROM totals").fetchone() == (1,)


def test_a_chunk_is_gone_when_its_time_is_over(tmp_path, monkeypatch):
    from blocktune.cache.store import chunk_file, ledger

    store = store_of(tmp_path, memory=1 << 20, ttl=60.0)
    store.put(KEYS[0], CHUNKS[0])
    assert store.lookup(KEYS[0], CHUNKS[0].token_ids, MODEL).tier == "memory"
    later = chunk_file.time.time() + 61
    monkeypatch.setattr(chunk_file.time, "time", lambda: later)
    monkeypatch.setattr(store._memories[0].ledger, "_clock", lambda: later)
    assert ledger.time.time() == later
    for one in (store, store_of(tmp_path)):  # also one that knows of no time to live
        assert one.lookup(KEYS[0], CHUNKS[0].token_ids, MODEL).tier == "none"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chunks/", {"folder": "chunks"}),
        ("s3://b/p", {"remote": "s3://b/p"}),
        ("c,disk=2GB,policy=gdsf,ttl=2d", {"folder": "c", "disk": 2 * 10**9, "ttl": 172800.0}),
        ("memory=1GB,codec=fp8", {"folder": None, "memory": 10**9, "codec": "fp8"}),
        ("~/c,disk=5Gi,cpu=1 kB", {"folder": str(Path.home() / "c"), "disk": 5 << 30, "cpu": 1000}),
        ("~no-such-user/c", {"folder": "~no-such-user/c"}),
        ("c,remote=valkey://h:1/0?prefix=x", {"remote": "valkey://h:1/0?prefix=x"}),
    ],
)
def test_a_store_is_one_text(text, expected):
    config = StoreConfig.parse(text)
    for name, value in expected.items():
        actual = getattr(config, name)
        assert (str(actual) if name == "folder" and actual else actual) == value


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("c,disc=2GB", "policy, press, quota"),
        ("c,disk", "PLACE,name=value"),
        ("c,disk=much", "kB, MB, GB"),
        ("c,policy=best", "lru, lfu, fifo, gdsf"),
        ("c,codec=mp3", "as-is, fp8"),
        ("c,ttl=soon", "s, m, h or d"),
        ("c,remote=", "got 'remote='"),  # fsspec would open the current folder
    ],
)
def test_a_wrong_text_says_what_is_right(text, wanted):
    with pytest.raises(ValueError, match=wanted):
        StoreConfig.parse(text)


def test_a_folder_of_python_is_no_url_and_knows_the_home():
    for folder in ("s3://bucket/chunks", Path("s3://bucket/chunks")):
        with pytest.raises(ValueError, match=r"is a URL.*ChunkStore\.open"):
            ChunkStore(folder=folder)
    assert StoreConfig(folder=Path("~/c")).folder == Path.home() / "c"


def test_a_folder_with_a_comma_is_a_folder(tmp_path):
    (tmp_path / "a,b=c").mkdir()
    assert StoreConfig.parse(str(tmp_path / "a,b=c")).folder == tmp_path / "a,b=c"
    assert StoreConfig.parse("", memory=5) == StoreConfig(memory=5)  # a server without --store
    assert parse_bytes("1.5 kB") == 1500
    with pytest.raises(ValueError, match="up to 15 digits"):
        parse_bytes("9" * 400)
    assert os.listdir(tmp_path) == ["a,b=c"]


def test_looking_into_a_folder_that_is_no_store_makes_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match="no store at"):
        Shelf.open(str(tmp_path))
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_an_expired_entry_that_is_replaced_frees_its_space_once():
    now = [1.0]
    ledger = Ledger(max_bytes=30, clock=lambda: now[0])
    ledger.add("a", 10, About(expires=5.0))
    for key in ("b", "c"):
        ledger.add(key, 10, About())
    now[0] = 6.0
    ledger.remove(ledger.leaving(20, key="a"))
    ledger.add("a", 20, About())
    assert ledger.size() <= 30


def test_a_clock_that_jumps_and_comes_back_ends_nothing_early(tmp_path, monkeypatch):
    now, start = [1e9], Ledger.__init__.__kwdefaults__
    monkeypatch.setitem(start, "clock", lambda: now[0])
    monkeypatch.setattr("blocktune.cache.store.tiers.time.time", lambda: now[0])
    store = store_of(tmp_path, memory=1 << 20, ttl=60.0)
    now[0] += 86400
    store.put(KEYS[0], CHUNKS[0])
    now[0] -= 86400
    for key, kv in zip(KEYS[1:], CHUNKS[1:], strict=True):
        store.put(key, kv)
    for key, kv in zip(KEYS, CHUNKS, strict=True):
        assert store.lookup(key, kv.token_ids, MODEL).tier == "memory"
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(KEYS)


def test_what_is_evicted_before_its_file_is_written_leaves_no_file(tmp_path):
    store = store_of(tmp_path, disk=6000)  # one file
    blobs, real = store._blobs[0].blobs, store._blobs[0].blobs.write

    def write(key, data):
        blobs.write = real
        store_of(tmp_path, disk=6000).put(KEYS[1], CHUNKS[1])
        real(key, data)

    blobs.write = write
    store.put(KEYS[0], CHUNKS[0])
    assert [path.stem for path in tmp_path.rglob("*.safetensors")] == [KEYS[1]]
    assert [row.key for row in Shelf.open(str(tmp_path)).rows()] == [KEYS[1]]


def test_entries_dated_by_a_clock_ahead_leave_as_others_do(tmp_path):
    ahead = Ledger(tmp_path / INDEX, clock=lambda: 4e9)
    for key in ("a", "b"):
        ahead.add(key, 10, About())
    del ahead
    now = [1e9]
    ledger = Ledger(tmp_path / INDEX, max_bytes=30, clock=lambda: now[0])
    for key in "cdef":
        now[0] += 1
        ledger.remove(ledger.leaving(10))
        ledger.add(key, 10, About())
    assert [row.key for row in ledger.rows()] == ["d", "e", "f"]
