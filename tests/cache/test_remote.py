"""Remote tiers over real servers: an S3 API (moto) and Valkey or Redis, and ones that fail."""

import asyncio
import logging
import os
import resource
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import valkey
import valkey_server
from cache.made import MODEL, assert_same_chunk, made_chunk
from fsspec.asyn import get_loop
from valkey_server import free_port

from blocktune.cache import ChunkStates, ChunkStore, chunk_key, states_key
from blocktune.cache.store import chunk_store, remote, tiers
from blocktune.cache.store.blobs import Blobs
from blocktune.cache.store.config import StoreConfig
from blocktune.cache.store.folder import ChunkFolder
from blocktune.cache.store.remote import open_remote
from blocktune.cache.store.shelf import Shelf, open_places

CHUNKS = [made_chunk(5, seed=10 * n) for n in range(4)]
KEYS = [chunk_key(MODEL, kv.token_ids) for kv in CHUNKS]
KINDS = ["file", "s3", *(["valkey"] if valkey_server.PROGRAM else [])]
"""A machine without a Valkey server tests the others."""


@pytest.fixture(autouse=True)
def patience(request, monkeypatch):
    """A busy machine answers late; only where a time-out is tested it must be short."""
    if "out_of_reach" not in request.node.name:
        monkeypatch.setattr(remote, "TIMEOUT_S", 30.0)
    else:
        monkeypatch.setattr(tiers, "RETRY_S", 600.0)  # no second try, however slow the machine


@pytest.fixture(scope="module")
def servers():
    """URLs by kind."""
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    logging.getLogger("werkzeug").disabled = True  # tests count lines
    port = moto._server.server_port if hasattr(moto, "_server") else moto.get_host_and_port()[1]
    settings = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
    settings |= {"AWS_DEFAULT_REGION": "us-east-1"}
    settings |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    for name, value in settings.items():
        patch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
    urls, valkey = {"s3": "s3://bucket/chunks"}, None
    if valkey_server.PROGRAM:
        port = free_port()
        valkey = valkey_server.start(port)
        urls["valkey"] = f"valkey://127.0.0.1:{port}/0"
    yield urls
    moto.stop()
    if valkey is not None:
        valkey.terminate()
        valkey.wait()
    patch.undo()


@pytest.fixture(params=KINDS)
def url(request, servers, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/remote"
    place = servers[request.param]
    blobs = open_remote(place)
    for key in list(blobs.keys()):
        blobs.remove(key)
    return place


def store_of(url, folder=None, **limits):
    return ChunkStore(config=StoreConfig(**{"memory": 0, "folder": folder, "remote": url} | limits))


def test_machines_share_a_remote(url, tmp_path):
    here = store_of(url, tmp_path / "here")
    for key, kv in zip(KEYS, CHUNKS, strict=True):
        here.put(key, kv, document="a.pdf", seconds=0.5)
    here.write_manifest(MODEL, lambda: {"fingerprint": MODEL, "dtype": "float32"})
    here.flush()
    there = store_of(url, tmp_path / "there")
    for key, kv in zip(KEYS, CHUNKS, strict=True):
        found = there.lookup(key, kv.token_ids, MODEL)
        assert found.tier == "remote"
        assert_same_chunk(found.kv, kv)
        assert there.lookup(key, kv.token_ids, MODEL).tier == "disk"  # it moved up
    stats = there.stats().tiers
    assert (stats["remote"].hits, stats["disk"].hits, stats["disk"].misses) == (4, 4, 4)
    for place in (url, str(tmp_path / "there")):
        shelf = Shelf.open(place)
        assert [row.key for row in shelf.rows()] == sorted(KEYS)
        assert {(row.document, row.seconds) for row in shelf.rows()} == {("a.pdf", 0.5)}
    assert open_remote(url).manifest(MODEL)["dtype"] == "float32"
    assert open_remote(url).fingerprints() == [MODEL]
    for row in shelf.rows(document="a.pdf"):
        there.discard(row.key)
    assert list(open_remote(url).keys()) == []


def test_a_remote_keeps_its_budget(url):
    store = store_of(url)
    for key, kv in zip(KEYS[:3], CHUNKS, strict=False):
        store.put(key, kv)
    store.flush()
    blobs = open_remote(url)
    limit = sum(size for _, size, _ in blobs.listing())
    other = store_of(url, remote_bytes=limit)  # another machine: it finds what is there
    other.put(KEYS[3], CHUNKS[3])
    other.flush()
    assert KEYS[3] in other
    assert sum(size for _, size, _ in blobs.listing()) <= limit
    assert other.stats().tiers["remote"].evictions == 1


def test_garbage_in_a_remote_is_a_miss(url, caplog):
    store = store_of(url)
    for garbage in (b"", b"garbage", os.urandom(5000)):
        open_remote(url).write(KEYS[0], garbage)
        assert store.get(KEYS[0], CHUNKS[0].token_ids, MODEL) is None
    assert store.stats().rejected == 3
    assert len(caplog.records) == 1
    store.put(KEYS[0], CHUNKS[0])
    store.flush()
    assert_same_chunk(store.get(KEYS[0], CHUNKS[0].token_ids, MODEL), CHUNKS[0])


def test_a_failed_write_to_a_folder_leaves_the_old_file(tmp_path):
    blobs = open_remote(f"file://{tmp_path}")
    blobs.write(KEYS[0], b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            blobs.write(KEYS[0], bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert blobs.open(KEYS[0]).content() == b"old"
    assert [path.stem for path in tmp_path.rglob("*.*")] == [KEYS[0]]


def test_export_and_import_copy_what_is_sound(blocktune_json, url, tmp_path, monkeypatch):
    store = store_of(None, tmp_path / "here")
    for key, kv in zip(KEYS, CHUNKS, strict=True):
        store.put(key, kv)
    damaged = tmp_path / "here" / KEYS[0][:2] / KEYS[0][2:4] / f"{KEYS[0]}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    counts = blocktune_json("store", "export", tmp_path / "here", url)
    assert (counts["copied"], counts["unsound"]) == (3, 1)
    fetched, read = [], Blobs.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Blobs,
            "open",
            lambda b, key, most=None: fetched.append((b.place, most)) or read(b, key, most),
        )
        counts = blocktune_json("store", "import", tmp_path / "new", url)
    assert (counts["copied"], counts["there"]) == (3, 0)
    assert fetched.count((open_remote(url).place, None)) == 3  # each chunk is fetched once
    assert blocktune_json("store", "import", tmp_path / "new", url)["there"] == 3
    record = blocktune_json("store", "stat", url)
    assert (record["chunks"], record["models"][MODEL]["tokens"]) == (3, 15)
    assert blocktune_json("store", "verify", url)["damaged"] == {}
    assert len(blocktune_json("store", "rm", url, "--model", MODEL[:6])["keys"]) == 3
    new = store_of(None, tmp_path / "new")
    assert_same_chunk(new.get(KEYS[1], CHUNKS[1].token_ids, MODEL), CHUNKS[1])


def test_tools_read_no_headers_but_those_of_their_chunks(
    blocktune_json, url, tmp_path, monkeypatch
):
    store, read, facts = store_of(url), [], Blobs.facts
    for key, kv in zip(KEYS[:3], CHUNKS, strict=False):
        store.put(key, kv)
    store.put(
        states_key(KEYS[0], 1), ChunkStates(CHUNKS[0].keys[0][0], 1, CHUNKS[0].token_ids, MODEL)
    )
    store.flush()
    here = store_of(None, tmp_path / "here")
    here.put(KEYS[3], CHUNKS[3])

    def noted(blobs, key):
        read.append(key)
        return facts(blobs, key)

    monkeypatch.setattr(Blobs, "facts", noted)
    assert blocktune_json("store", "export", tmp_path / "here", url)["copied"] == 1
    assert read == []
    assert blocktune_json("store", "show", url, KEYS[0])["sound"]
    removed = blocktune_json("store", "rm", url, KEYS[0])["keys"]
    assert removed == [KEYS[0], states_key(KEYS[0], 1)]
    assert set(read) == set(removed)
    assert set(open_remote(url).keys()) == set(KEYS[1:])


def test_a_damaged_manifest_stays_behind_and_is_replaced_by_a_sound_one(blocktune_json, tmp_path):
    places = [tmp_path / name for name in ("here", "there")]
    blobs = []
    for place in places:
        store_of(None, place).put(KEYS[1], CHUNKS[1])
        blobs.append(Shelf.open(str(place)).blobs)
    (places[0] / "manifests").mkdir()
    (places[0] / "manifests" / f"{MODEL}.json").write_text("{")
    assert blocktune_json("store", "export", *places)["there"] == 1
    assert blobs[1].manifest(MODEL) is None
    blobs[1].write_manifest({"fingerprint": MODEL})
    blocktune_json("store", "import", *places)
    assert blobs[0].manifest(MODEL) == {"fingerprint": MODEL}


@pytest.fixture
def blocktune_json():
    import json

    from typer.testing import CliRunner

    from blocktune.commands.application import app

    def run(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return run


@pytest.fixture
def silent():
    """A server that takes connections and never answers."""
    made = socket.create_server(("127.0.0.1", 0))
    held = []
    thread = threading.Thread(target=lambda: held.extend(iter(lambda: _accept(made), None)))
    thread.start()
    yield made.getsockname()[1]
    made.shutdown(socket.SHUT_RDWR)
    made.close()
    thread.join()


def _accept(made):
    try:
        return made.accept()[0]
    except OSError:
        return None


@pytest.mark.parametrize("kind", ["silent s3", "silent valkey", "no valkey", "garbage valkey"])
def test_a_remote_out_of_reach_costs_one_wait_and_one_line(kind, silent, servers, tmp_path, caplog):
    port = silent
    if kind == "garbage valkey":
        port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])  # it speaks HTTP
    elif kind == "no valkey":
        port = free_port()
    url = f"valkey://127.0.0.1:{port}/0"
    with pytest.MonkeyPatch.context() as patch:
        if kind == "silent s3":
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            url = "s3://bucket/chunks"
        store = store_of(url, tmp_path)
        for key, kv in zip(KEYS, CHUNKS, strict=True):
            assert store.get(key, kv.token_ids, MODEL) is None
            store.put(key, kv)
            assert_same_chunk(store.get(key, kv.token_ids, MODEL), kv)
        store.flush()
    stats = store.stats()
    assert (stats.misses, stats.files.hits, stats.rejected) == (4, 4, 0)
    # One wait to read and one to write (on its own thread), not one for every chunk.
    assert stats.tiers["remote"].failures in (1, 2)
    assert stats.tiers["remote"].unwritten == 4
    [record] = caplog.records
    assert "\n" not in record.getMessage()
    assert f"the store '{url}'" in record.getMessage()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("foo://x/y", r"cannot open a store there \(Protocol not known: foo\); give"),
        ("valkey://127.0.0.1:1/chunks", r"HOST/N numbers a database; name a store"),
        ("valkey://:hid/den@127.0.0.1:1/0", r"^valkey://HOST/N numbers .*%2F$"),
        ("valkey://127.0.0.1:1/0?prefx=a", r"127.0.0.1:1/0.prefx=a': .*'prefx'"),
        ("gs://bucket/chunks", r"cannot open 'gs://bucket/chunks': .*gcsfs .*Storage$"),
        ("valkey://127.0.0.1:1/0", r"cannot read the store 'valkey://127.0.0.1:1/0': Connection"),
    ],
)
def test_looking_into_what_does_not_open_says_what_and_why(place, message):
    with pytest.raises(ValueError, match=message):
        Shelf.open(place)


@pytest.mark.parametrize("url", ["valkey://user:hidden@host:1/0", "http://user:hidden@host/p@th"])
def test_a_url_never_shows_its_password(url):
    blobs = open_remote(url)
    assert "hidden" not in blobs.place + blobs.name(KEYS[0])
    assert store_of(url).place == blobs.place == url.replace("user:hidden@", "")


def test_options_of_a_valkey_url_reach_the_client():
    blobs = open_remote("valkey://127.0.0.1:1?db=3&prefix=mine&password=hidden&socket_timeout=9")
    options = blobs._client.connection_pool.connection_kwargs
    assert (options["db"], options["password"], options["socket_timeout"]) == (3, "hidden", 9.0)
    assert blobs.name(KEYS[0]).endswith(f" mine:{KEYS[0]}")
    assert "hidden" not in blobs.place


@pytest.mark.parametrize(("kind", "end"), [("valkey", "?prefix=team[a]*%5C"), ("s3", "//x/")])
def test_a_prefix_may_have_any_characters(servers, kind, end):
    url = servers.get(kind, "memory://prefix") + end
    store = store_of(url)
    store.put(KEYS[0], CHUNKS[0])
    store.flush()
    assert [row.key for row in Shelf.open(url).rows()] == [KEYS[0]]


def test_users_settings_of_a_client_stay(monkeypatch):
    import fsspec

    own = {"addressing_style": "path"}  # what many S3 servers need
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"s3": own}})
    settings = open_remote("s3://bucket/chunks")._fs.config_kwargs
    assert (settings["s3"], settings["connect_timeout"]) == (own, remote.TIMEOUT_S)


def test_a_listing_without_sizes_is_one():
    assert remote._size_and_date({"size": None, "mtime": 5.0}) == (0, 5.0)  # as over HTTP


def test_what_is_not_written_at_the_end_is_said(monkeypatch, caplog):
    class Tier:
        pass

    monkeypatch.setattr(tiers, "_FINISH_S", 0.05)
    tier, slow = Tier(), threading.Event()
    pending = tiers._in_background(tier)
    pending.put(slow.wait)
    pending.put(slow.wait)
    del tier
    slow.set()
    [record] = caplog.records
    assert "not written to a remote store; call flush()" in record.getMessage()


def test_a_fork_writes_to_the_remote_by_a_thread_of_its_own(url):
    store = store_of(url)
    store.put(KEYS[0], CHUNKS[0])
    store.flush()
    if not (child := os.fork()):
        signal.alarm(30)  # a fork that waits for its parent's thread would wait for ever
        store.put(KEYS[1], CHUNKS[1])
        store.flush()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert KEYS[1] in store


def test_a_slow_remote_is_read_if_the_user_waits(monkeypatch):
    async def slow(*_):
        await asyncio.sleep(0.1)
        return b"content"

    def read(limit):
        [blobs] = open_places(StoreConfig.parse(f"memory://slow,wait={limit}"))
        fs = SimpleNamespace(_cat_file=slow, loop=get_loop())
        monkeypatch.setattr(type(blobs), "_fs", fs)
        blobs._async = True
        return blobs.open(KEYS[0]).content()

    assert read("60s") == b"content"
    with pytest.raises(OSError, match=r"no answer in time .*wait=30s"):
        read("0.01s")
    with pytest.raises(ValueError, match="wait must be more than 0 seconds"):
        StoreConfig(wait=0)


def test_what_is_discarded_while_it_waits_is_not_written_later(tmp_path, monkeypatch):
    write, go_on = remote.FsspecBlobs._write, threading.Event()
    monkeypatch.setattr(remote.FsspecBlobs, "_write", lambda *args: go_on.wait(30) and write(*args))
    store = store_of(f"file://{tmp_path}")
    store.put(KEYS[0], CHUNKS[0])
    store.discard(KEYS[0])
    go_on.set()
    store.flush()
    assert KEYS[0] not in store


def test_a_write_that_fails_in_any_way_stops_no_other(tmp_path, monkeypatch):
    store = store_of(f"file://{tmp_path}")
    with monkeypatch.context() as patch:
        patch.setattr(chunk_store, "pack_chunk", lambda *_: (_ for _ in ()).throw(MemoryError))
        store.put(KEYS[0], CHUNKS[0])
    store.put(KEYS[1], CHUNKS[1])
    waiting = threading.Thread(target=store.flush, daemon=True)
    waiting.start()
    waiting.join(30)
    assert not waiting.is_alive()
    assert [key in store for key in KEYS[:2]] == [False, True]
    assert store.stats().files.unwritten == 1


def test_a_file_that_another_machine_removed_first_is_no_failure(tmp_path, monkeypatch):
    for blobs in (open_remote(f"file://{tmp_path}"), ChunkFolder(tmp_path)):
        blobs.write(KEYS[0], b"x")
        remove = blobs._remove
        monkeypatch.setattr(blobs, "_remove", lambda name, r=remove: (r(name), r(name)))
        assert not blobs.remove(KEYS[0])


def test_a_store_in_a_folder_of_another_is_not_listed(tmp_path):
    open_remote(f"file://{tmp_path}/below").write(KEYS[0], b"x")
    assert list(open_remote(f"file://{tmp_path}").keys()) == []
    assert list(open_remote(f"file://{tmp_path}/below").keys()) == [KEYS[0]]


def test_a_file_without_a_known_date_is_not_old():
    blobs = open_remote("memory://a-store")
    blobs.write(KEYS[0], b"x")
    assert [time.time() - used < 3600 for *_, used in blobs.listing()] == [True]
    assert time.time() - remote._size_and_date({"size": 1})[1] < 3600


def test_looking_at_a_value_is_no_use(servers, monkeypatch):
    commands, name = [], f"blocktune:{KEYS[0]}"

    def execute(pipe, raise_on_error):
        commands.extend(words for words, _ in pipe.command_stack)
        return [b"OK", 90_000, 100, b"x" * 10, b"OK"]

    with monkeypatch.context() as patch:
        patch.setattr(valkey.client.Pipeline, "execute", execute)
        file = open_remote("valkey://127.0.0.1:1").open(KEYS[0], 10)
    off, on = (("CLIENT NO-TOUCH", mode) for mode in ("OFF", "ON"))
    looks = [("OBJECT", "IDLETIME", name), ("STRLEN", name), ("GETRANGE", name, 0, 9)]
    assert commands == [on, *looks, off]
    assert (bytes(file.data), file.size) == (b"x" * 10, 100)
    assert round(time.time() - file.used, -3) == 90_000
    for url in filter(None, [servers.get("valkey")]):
        blobs, used = open_remote(url), []
        blobs.write(KEYS[0], b"x" * 100)
        for most in (10, None):
            whole = blobs._client.dump(name)
            blobs._client.restore(name, 0, whole, replace=True, idletime=90_000)
            used.append(blobs.open(KEYS[0], most).used if most else next(iter(blobs.listing()))[2])
        assert [round(time.time() - at, -3) for at in used] == [90_000] * 2
        blobs.touch(KEYS[0])
        assert blobs._client.object("IDLETIME", name) < 1000
        blobs.remove(KEYS[0])


def test_a_store_that_is_dropped_writes_what_waits_and_its_thread_ends(tmp_path):
    before = set(threading.enumerate())
    store = store_of(f"file://{tmp_path}")
    for key, kv in zip(KEYS, CHUNKS, strict=True):
        store.put(key, kv)
    del store
    deadline = time.monotonic() + 20
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(KEYS)
