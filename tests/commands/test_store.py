"""`blocktune store`; and commands over stores that are damaged or cannot be written."""

import errno
import json
import os
import sqlite3
import time

import forked
import pytest
import torch
from cache.made import MODEL, OTHER_MODEL, made_chunk
from typer.testing import CliRunner

from blocktune.cache import (
    ChunkStates,
    ChunkStore,
    PrefixTree,
    RowCache,
    chunk_key,
    cut_exact,
    states_key,
)
from blocktune.cache.store import remote
from blocktune.cache.store.blobs import SECRET
from blocktune.cache.store.folder import WRITING, chunk_path
from blocktune.cache.store.ledger import INDEX
from blocktune.cache.store.remote import FsspecBlobs
from blocktune.cache.store.shelf import Shelf
from blocktune.commands import app
from blocktune.commands import store as store_commands

CHUNKS = [made_chunk(5, seed=seed) for seed in (0, 10)]
OTHER = made_chunk(7, seed=20, fingerprint=OTHER_MODEL)
KEYS = [chunk_key(kv.fingerprint, kv.token_ids) for kv in (*CHUNKS, OTHER)]

EIO = OSError(errno.EIO, os.strerror(errno.EIO))
MENDED = {"without_file": 0, "not_indexed": 0}


@pytest.fixture
def folder(tmp_path):
    store = ChunkStore(folder=tmp_path / "store")
    for key, kv in zip(KEYS, (*CHUNKS, OTHER), strict=True):
        store.put(key, kv)
    folder = store.folder
    for age, key in enumerate(KEYS):
        os.utime(chunk_path(folder, key), (1e9 - age, 1e9 - age))
    del store
    forget_index(folder)
    return folder


def forget_index(folder):
    """It is made again from the files and their dates."""
    for suffix in ("", "-wal", "-shm"):
        (folder / (INDEX + suffix)).unlink(missing_ok=True)


@pytest.fixture
def asked(blocktune, folder):
    """Runs a command of the group on the folder and returns its JSON."""

    def run(command, *arguments, code=0):
        done = blocktune("store", command, folder, *arguments, "--json")
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    return run


def damage(folder, key):
    path = chunk_path(folder, key)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_stat_counts_by_model(blocktune, folder, asked):
    sizes = [chunk_path(folder, key).stat().st_size for key in KEYS]
    chunk_path(folder, "0" * 64).parent.mkdir(parents=True)
    chunk_path(folder, "0" * 64).write_text("damaged")
    forget_index(folder)
    record = asked("stat")
    assert (record["chunks"], record["tokens"], record["bytes"]) == (3, 17, sum(sizes))
    assert record["unreadable"] == 1
    assert record["models"][MODEL]["chunks"] == 2
    assert record["kinds"]["chunk"]["tokens"] == 17
    assert record["models"][OTHER_MODEL]["tokens"] == 7
    text = blocktune("store", "stat", folder).stdout
    assert "3 chunks, 17 tokens" in text
    assert "1 unreadable" in text
    assert f"{MODEL[:12]}  2 chunks" in text


def test_stat_shows_exact_prefixes(blocktune, folder, asked):
    cache = RowCache(1, 1, 6, exact=True)
    cache.select(torch.arange(6)[None])
    cache.update(torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6, 2), 0)
    tree = PrefixTree(200, store=ChunkStore(0, folder))
    for ids in ((1, 2, 3, 4, 5, 6), (7, 8, 9)):
        tree.insert(cut_exact(cache, 0, ids, MODEL))
    record = asked("stat")
    assert (record["kinds"]["prefix"]["chunks"], record["kinds"]["prefix"]["tokens"]) == (1, 6)
    assert "of kind prefix: 1 chunks, 6 tokens" in blocktune("store", "stat", folder).stdout
    assert asked("verify") == {"chunks": 4, "damaged": {}, "index": MENDED}


def test_ls_and_show_name_every_chunk(blocktune, folder, asked):
    states = ChunkStates(CHUNKS[0].keys[0][0], 3, CHUNKS[0].token_ids, MODEL)
    ChunkStore(folder=folder).put(states_key(KEYS[0], 3), states, document="two\nlines")
    lines = blocktune("store", "ls", folder, "--json").stdout.splitlines()
    records = {record["key"]: record for record in map(json.loads, lines)}
    assert records.keys() == {*KEYS, states_key(KEYS[0], 3)}
    assert records[KEYS[2]]["fingerprint"] == OTHER_MODEL
    assert {r["kind"] for r in records.values()} == {CHUNKS[0].kind, "states"}
    assert len(blocktune("store", "ls", folder, "--model", "cdcdcd").stdout.splitlines()) == 1
    assert "named by 6 to 64 hex" in blocktune("store", "ls", folder, "--model", "data/t").stderr
    assert blocktune("store", "ls", folder).stdout.count("\n") == 4  # one each
    shown = asked("show", KEYS[1][:10])
    assert shown["token_ids"] == CHUNKS[1].token_ids.tolist()
    assert (shown["sound"], shown["signed"]) == (True, False)


def test_verify_names_what_is_damaged(blocktune, folder, asked):
    assert asked("verify") == {"chunks": 3, "damaged": {}, "index": MENDED}
    damage(folder, KEYS[1])
    record = asked("verify", code=1)
    assert record["damaged"].keys() == {KEYS[1]}
    assert "checksum" in record["damaged"][KEYS[1]]
    done = blocktune("store", "verify", folder)
    assert done.exit_code == 1
    assert "2 of 3 chunks are sound" in done.stdout
    assert KEYS[1] in done.stdout


def test_verify_with_a_key_names_what_is_not_signed(folder, asked, monkeypatch):
    monkeypatch.setenv(SECRET, "k" * 32)
    ChunkStore(folder=folder).put(KEYS[0], CHUNKS[0])
    assert asked("verify", code=1)["damaged"].keys() == {*KEYS[1:]}
    assert asked("gc", "--damaged")["keys"] == sorted(KEYS[1:])


def test_gc_keeps_what_was_used_last(folder, asked):
    sizes = {key: chunk_path(folder, key).stat().st_size for key in KEYS}
    left = folder / WRITING / f".{KEYS[0]}-{'0' * 32}.part"
    left.write_text("half")
    (folder / "notes.txt").write_text("text")
    ChunkStore(max_bytes=0, folder=folder).get(KEYS[1], CHUNKS[1].token_ids, MODEL)  # a use
    left.write_text("half")  # opening the store removed it
    limit = ("--max-size", sizes[KEYS[0]] + sizes[KEYS[1]])
    assert asked("gc", *limit, "--dry-run")["keys"] == [KEYS[2]]
    assert left.exists()
    record = asked("gc", *limit)
    assert (record["keys"], record["unfinished"]) == ([KEYS[2]], 1)
    assert record["bytes"] == sizes[KEYS[2]]
    assert asked("gc", *limit)["chunks"] == 0
    assert asked("gc", "--max-size", sizes[KEYS[1]], "--dry-run")["keys"] == [KEYS[0]]
    assert asked("gc", "--max-size", "1GB")["chunks"] == 0
    assert asked("gc", "--unused-days", 1)["keys"] == [KEYS[0]]
    assert list(folder.rglob("*.safetensors")) == [chunk_path(folder, KEYS[1])]
    assert (folder / "notes.txt").read_text() == "text"


def test_rm_removes_by_key_or_model(refused, folder, asked):
    assert asked("rm", KEYS[0][:8], "--dry-run")["keys"] == [KEYS[0]]
    assert asked("rm", KEYS[0][:8])["keys"] == [KEYS[0]]
    assert asked("rm", "--model", OTHER_MODEL[:6])["keys"] == [KEYS[2]]
    assert asked("ls")["key"] == KEYS[1]
    assert "0 of the store's chunks begin with" in refused("store", "rm", folder, "0" * 12)
    assert "6 to 64 hex digits" in refused("store", "rm", folder, "../..")
    assert "either keys" in refused("store", "rm", folder)
    assert "kB, MB" in refused("store", "gc", folder, "--max-size", "much")
    for option in ("codec=int4", "disk=1kB", "remote=file:///x"):
        assert "name the place alone" in refused("store", "export", folder, f"new,{option}")
    for place in (folder / "none", folder.parent):  # a folder that holds one is none itself
        assert "no store at" in refused("store", "verify", place)
    assert "no manifest" in refused("store", "manifest", folder)


def test_a_chunk_that_is_evicted_while_it_is_copied_is_copied(
    blocktune, folder, tmp_path, monkeypatch
):
    checked = store_commands._checked

    def removed(blobs, key):
        found = checked(blobs, key)
        chunk_path(folder, key).unlink()
        return found

    monkeypatch.setattr(store_commands, "_checked", removed)
    done = blocktune("store", "export", folder, tmp_path / "copy", "--json")
    assert json.loads(done.stdout)["copied"] == 3
    assert set(Shelf.open(str(tmp_path / "copy")).blobs.keys()) == set(KEYS)


def test_what_the_index_does_not_know_is_removed_too(asked, folder):
    """Files that rsync copied into a folder are served: a removed document must be gone."""
    store = ChunkStore(folder=folder)
    store.put(KEYS[0], CHUNKS[0], document="handbook")
    store._blobs[0].ledger.remove([KEYS[0]])
    assert asked("rm", "--document", "handbook")["keys"] == [KEYS[0]]


def test_an_adapter_is_named_with_and_without_a_last_slash(asked, folder):
    record = {"fingerprint": MODEL, "base": {"name": "b"}, "adapter": {"name": "out/kvlink"}}
    Shelf.open(str(folder)).blobs.write_manifest(record)
    assert asked("rm", "--adapter", "./out/kvlink/", "--dry-run")["chunks"] == 2


def test_encode_says_what_the_store_does_not_keep(blocktune, refused, model, tmp_path):
    documents = tmp_path / "docs.jsonl"
    documents.write_text("".join(f'{{"text": "Town {n} is small."}}\n' for n in range(3)))
    encode = ("encode", "-m", model, "-i", documents, "--store")
    for limit in ("disk=1kB", "quota=1kB"):
        done = blocktune(*encode, f"{tmp_path / 'small'},{limit}")
        assert done.exit_code == 2
        assert "4 chunks were not stored" in done.stderr  # and the prefix
    done = blocktune(*encode, tmp_path / "whole")
    assert "were evicted" not in done.output
    size = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*.safetensors"))
    done = blocktune(*encode, f"{tmp_path / 'one'},disk={size // 1000 + 1}kB")
    assert done.exit_code == 0
    assert "3 chunks were evicted" in done.output  # the prefix too
    for place, word in (("", "no folder"), ("memory=1GB", "no folder"), ("x,ttl=0", "ttl")):
        assert word in refused(*encode, place)
    assert "'ttl' is given twice" in refused(*encode, "x,ttl=1s,ttl=2s")


ANSWER = ("-q", "Where was Anna born?", "--max-new-tokens", 2, "--json")
PASSAGES = ("-c", "Anna Belt was born in Port Alder.", "-c", "Port Alder is in Lorne.")


@pytest.fixture
def answers(blocktune, model, tmp_path):
    """Answers one question over the store: the record and what was said on standard error."""
    folder = tmp_path / "cache"

    def run():
        done = blocktune("answer", "-m", model, *ANSWER, *PASSAGES, "--store", folder)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout), done.stderr

    return folder, run


def test_damaged_chunks_are_one_line_and_the_answer_is_right(answers):
    folder, run = answers
    expected, _ = run()
    files = list(folder.rglob("*.safetensors"))
    for path in files:
        path.write_bytes(b"damaged")
    record, said = run()
    assert record["answer"] == expected["answer"]
    [line] = [line for line in said.splitlines() if "could not be used" in line]
    assert line.startswith(f"{len(files)} stored chunks")
    assert len(said.splitlines()) == 2  # and how many were read and encoded


def test_a_store_that_cannot_be_written_answers_and_encode_fails(
    answers, refused, model, tmp_path, monkeypatch, caplog
):
    folder, run = answers
    expected, _ = run()
    real = os.open

    def read_only(path, flags, *arguments, **options):
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *arguments, **options)

    documents = tmp_path / "docs.jsonl"
    documents.write_text('{"text": "Kirby is small."}\n')
    monkeypatch.setattr(os, "open", read_only)
    record, said = run()
    assert record["answer"] == expected["answer"]
    assert "0 encoded now" in said
    assert [r.getMessage().count("Read-only") for r in caplog.records] == [1]
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    record, said = run()
    assert record["answer"] == expected["answer"]
    assert "not stored" in said
    line = refused("encode", "-m", model, "-i", documents, "--store", folder)
    assert "Read-only file system" in line


def test_what_a_remote_does_not_get_is_said_of_the_remote(blocktune, model, tmp_path):
    ask = ("answer", "-m", model, "-q", "Where?", "-c", "Kirby.", "--max-new-tokens", 1)
    said = blocktune(*ask, "--store", f"{tmp_path / 'new'},remote=valkey://127.0.0.1:1/0").stderr
    assert "2 encoded now" in said
    assert said.endswith(", 2 not stored in the remote: it is full or out of reach\n")


def test_encoding_does_not_list_the_store_first(blocktune, refused, model, tmp_path, monkeypatch):
    def listed(store):
        raise AssertionError("a remote may have millions of files")

    monkeypatch.setattr(remote.ValkeyBlobs, "listing", listed)
    documents = tmp_path / "docs.jsonl"
    documents.write_text('{"text": "Kirby is small."}\n')
    encode = ("encode", "-m", model, "-i", documents, "--store")
    done = blocktune(*encode, tmp_path / "new")
    assert "encoded 1 chunks" in done.stdout
    line = refused(*encode, "valkey://127.0.0.1:1/0")
    assert "cannot write to the store 'valkey://127.0.0.1:1/0'" in line


def test_the_manifest_is_shown_without_the_model(answers, blocktune, model):
    folder, run = answers
    run()
    [record] = json.loads(blocktune("store", "manifest", folder, "--json").stdout)
    assert record["base"]["name"] == model
    assert len(record["layers"]) == 2
    assert record["fingerprint"][:12] in blocktune("store", "manifest", folder).stdout
    assert model in blocktune("store", "stat", folder).stdout


def test_processes_share_a_corpus_into_one_store_and_resume(model, tmp_path):
    documents, folder = tmp_path / "docs.jsonl", tmp_path / "store"
    texts = [f"Place {n} is in region {n * 7}." for n in range(10)]
    records = [{"text": text, "id": f"d{n % 2}"} for n, text in enumerate(texts)]
    documents.write_text("".join(json.dumps(record) + "\n" for record in records))
    encode = ("encode", "-m", model, "-i", documents, "--store", f"{folder},disk=1GB")
    launched = forked.run_ranks(2, ["-m", "blocktune.cli", *encode])
    assert launched.returncode == 0, launched.stderr
    said = sorted(line for line in launched.stdout.splitlines() if line.startswith("process "))
    assert [line.partition(": ")[0] for line in said] == ["process 1 of 2", "process 2 of 2"]
    assert all("encoded 5 chunks" in line for line in said)
    done = CliRunner().invoke(app, [*map(str, encode)])
    assert "encoded 0 chunks" in done.stdout
    assert "10 were already there" in done.stdout
    rows = list(Shelf.open(str(folder)).rows(document="d1"))
    assert len(rows) == 5
    assert all(row.seconds > 0 for row in rows)
    removed = CliRunner().invoke(app, ["store", "rm", str(folder), "--document", "d1", "--json"])
    assert json.loads(removed.stdout)["chunks"] == 5


def test_digests_without_a_manifest_do_not_flood_the_statistics(blocktune, folder, asked):
    store = ChunkStore(folder=folder)
    for n in range(25):  # as cached answers have them
        store.put(chunk_key(f"{n:064x}", (1,)), made_chunk(5, seed=n, fingerprint=f"{n:064x}"))
    lines = blocktune("store", "stat", folder).stdout.splitlines()
    assert lines[0].startswith("28 chunks")
    assert lines[1:] == ["  27 others without a manifest, of salts and cached answers (--json)"]
    assert len(asked("stat")["models"]) == 27


def test_pinned_chunks_outlive_budgets(folder, asked, refused):
    assert asked("pin", KEYS[0][:8])["chunks"] == 1
    assert json.loads(asked_line("ls", folder, KEYS[0]))["pinned"] is True
    assert asked("gc", "--max-size", 1)["keys"] == [KEYS[2], KEYS[1]]
    assert asked("pin", KEYS[0][:8], "--undo")["pinned"] is False
    assert asked("gc", "--max-size", 1)["keys"] == [KEYS[0]]
    assert "either keys" in refused("store", "rm", folder, KEYS[0], "--document", "d")


def test_pinned_chunks_count_towards_the_size_that_is_kept(folder, asked):
    sizes = {key: chunk_path(folder, key).stat().st_size for key in KEYS}
    asked("pin", KEYS[0])
    limit = sum(sizes.values()) - 1
    assert asked("gc", "--max-size", limit)["keys"] == [KEYS[2]]
    assert asked("gc", "--max-size", limit - sizes[KEYS[2]])["keys"] == [KEYS[1]]


def asked_line(command, folder, key):
    done = CliRunner().invoke(app, ["store", command, str(folder), "--json"])
    return next(line for line in done.stdout.splitlines() if key in line)


@pytest.mark.parametrize("command", ["gc", "verify"])
def test_an_index_that_disagrees_with_the_files_is_mended(blocktune, folder, asked, command):
    asked("stat")  # makes the index
    path, new = chunk_path(folder, KEYS[0]), made_chunk(5, seed=30)
    path.unlink()
    asked("gc", "--dry-run")
    assert len(blocktune("store", "ls", folder).stdout.splitlines()) == 3
    key = chunk_key(MODEL, new.token_ids)
    ChunkStore(0, folder.parent / "other").put(key, new)
    chunk_path(folder, key).parent.mkdir(parents=True)
    chunk_path(folder.parent / "other", key).rename(chunk_path(folder, key))
    text = blocktune("store", command, folder).stdout
    assert text.startswith("index repaired: 1 without file, 1 not indexed\n")
    assert asked(command)["index"] == MENDED
    listed = [line.split()[0] for line in blocktune("store", "ls", folder).stdout.splitlines()]
    assert listed == sorted(one[:12] for one in (KEYS[1], KEYS[2], key))


def test_a_file_without_a_header_is_shown_with_its_problem(folder, asked):
    chunk_path(folder, KEYS[0]).write_bytes(b"")
    shown = asked("show", KEYS[0])
    assert (shown["sound"], shown["problem"]) == (False, "unreadable: its header is cut off")


def test_a_copy_to_a_full_place_names_the_place(blocktune, folder, tmp_path, monkeypatch):
    def full(self, key, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("blocktune.cache.store.folder.ChunkFolder.write", full)
    done = blocktune("store", "export", folder, tmp_path / "other")
    assert done.exit_code == 2
    assert f"'{tmp_path / 'other'}', after 0 chunks: No space left" in done.output.replace(
        "\n", " "
    )


@pytest.mark.parametrize("error", [TimeoutError(), OSError("ReadTimeoutError: slow"), EIO])
def test_a_chunk_that_cannot_be_read_is_not_called_damaged(blocktune, folder, monkeypatch, error):
    """Of a file that is out of reach nothing is known: neither sound nor damaged, and it stays."""
    place, before = folder.as_uri(), sorted(folder.rglob("*.safetensors"))
    real = FsspecBlobs._open

    def open_(self, name, most):
        if most is None:
            return remote._call_client(fail)
        return real(self, name, most)

    def fail():
        raise error

    monkeypatch.setattr(FsspecBlobs, "_open", open_)
    for command in (["gc", place, "--damaged"], ["verify", place]):
        done = blocktune("store", *command)
        assert done.exit_code == 2, done.output
        assert "cannot read" in done.stderr
        assert not done.stderr.rstrip().endswith(":")
    assert sorted(folder.rglob("*.safetensors")) == before


def test_a_disk_that_cannot_be_read_does_not_damage_a_chunk(blocktune, folder, monkeypatch):
    real = os.preadv

    def preadv(descriptor, buffers, start):
        if start > 0:
            raise EIO
        return real(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", preadv)
    for command in (["gc", folder, "--damaged"], ["verify", folder]):
        done = blocktune("store", *command)
        assert done.exit_code == 2, done.output
        assert "cannot read" in done.stderr
        assert done.stderr.endswith(": Input/output error; repeat the command\n")
    store = ChunkStore(0, folder)
    assert store.get(KEYS[0], CHUNKS[0].token_ids, MODEL) is None
    assert (store.stats().files.failures, store.stats().rejected) == (1, 0)


def test_an_expired_chunk_is_shown(folder, asked):
    chunk, key = made_chunk(5, seed=30), chunk_key(MODEL, range(30, 35))
    ChunkStore.open(f"{folder},ttl=0.01s").put(key, chunk)
    time.sleep(0.02)
    assert (shown := asked("show", key))["sound"]
    assert "token_ids" not in shown


def test_a_chunk_is_removed_with_its_states(folder, asked):
    store = ChunkStore(folder=folder)
    for key, kv in zip(KEYS[:2], CHUNKS, strict=True):
        for layer in (0, 3):
            store.put(
                states_key(key, layer), ChunkStates(kv.keys[0][0], layer, kv.token_ids, MODEL)
            )
    store.put(KEYS[1], CHUNKS[1], document="handbook")
    assert asked("rm", KEYS[0])["chunks"] == 3
    assert asked("rm", "--document", "handbook")["chunks"] == 3
    assert [path.stem for path in folder.rglob("*.safetensors")] == [KEYS[2]]


def test_a_busy_index_is_one_line(folder, refused, monkeypatch):
    other, real = sqlite3.connect(folder / INDEX, isolation_level=None), Shelf.open.__func__

    def open_(*args, **options):
        shelf = real(*args, **options)
        other.execute("BEGIN IMMEDIATE")
        return shelf

    monkeypatch.setattr(Shelf, "open", classmethod(open_))
    line = refused("store", "rm", folder, KEYS[0])
    assert "the index of the store cannot be used: database is locked; repeat the" in line
    other.close()


def test_a_row_without_its_file_does_not_stop_a_copy(blocktune, folder, asked, tmp_path):
    asked("stat")  # makes the index
    chunk_path(folder, KEYS[0]).unlink()
    record = asked("export", tmp_path / "other")
    assert (record["copied"], record["unsound"]) == (2, 0)


def test_a_folder_and_its_remote_are_two_places(refused, folder, tmp_path):
    both = f"{folder},remote={(tmp_path / 'far').as_uri()}"
    assert "two places" in refused("store", "rm", both, "--document", "handbook")


def test_a_write_may_take_as_long_as_its_bytes(monkeypatch):
    asked = []
    monkeypatch.setattr("fsspec.asyn.sync", lambda *args, timeout, **more: asked.append(timeout))
    blobs = FsspecBlobs("memory://store", None, remote.TIMEOUT_S)
    monkeypatch.setattr(blobs, "_async", True)
    monkeypatch.setattr(type(blobs._fs), "_pipe_file", None, raising=False)
    monkeypatch.setattr(type(blobs._fs), "loop", None, raising=False)
    blobs._write("x", b"0" * 10_000_000)
    assert asked == [pytest.approx(remote.TIMEOUT_S + 10)]
