"""Stores that cannot be written, things in a file's place, foreign files, and forged entries."""

import errno
import fcntl
import json
import os
import socket

import pytest
from cache.made import MODEL, assert_same_chunk, made_chunk

from blocktune.cache import ChunkStore, chunk_key
from blocktune.cache.store import chunk_store, tiers
from blocktune.cache.store.blobs import SECRET, SECRET_FILE
from blocktune.cache.store.folder import WRITING, ChunkFolder, chunk_path
from blocktune.cache.store.ledger import INDEX

IDS = range(5)
KEY = chunk_key(MODEL, IDS)
CHUNK = made_chunk(5)
OTHER = made_chunk(5, seed=50)
OTHER_KEY = chunk_key(MODEL, OTHER.token_ids)
SECRET_A, SECRET_B = b"a" * 32, b"b" * 32


def open_store(folder, **fields):
    return ChunkStore(max_bytes=0, folder=folder, **fields)


def found(store, key=KEY, chunk=CHUNK):
    return store.get(key, chunk.token_ids, MODEL)


@pytest.fixture
def broken(monkeypatch):
    """Makes the disk refuse what changes it, as a read-only mount or a full disk does."""

    def refuse(number):
        real = os.open

        def opened(path, flags, *args, **kwargs):
            if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, flags, *args, **kwargs)

        def refused(path, *_, **__):
            raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr(os, "open", opened)
        for name in ("mkdir", "replace", "unlink"):
            monkeypatch.setattr(os, name, refused)

    return refuse


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_store_that_cannot_be_written_serves_what_it_holds(
    tmp_path, broken, caplog, number, when
):
    open_store(tmp_path).put(KEY, CHUNK)
    if when == "before":
        broken(number)
    store = open_store(tmp_path)
    if when == "after":
        broken(number)
    for _ in range(3):
        store.put(OTHER_KEY, OTHER)
        assert_same_chunk(found(store), CHUNK)
        assert found(store, OTHER_KEY, OTHER) is None
    assert not store.discard(KEY)
    stats = store.stats()
    assert (stats.files.unwritten, stats.files.hits, stats.misses, stats.rejected) == (3, 3, 3, 0)
    [record] = caplog.records
    assert os.strerror(number) in record.getMessage()
    assert str(tmp_path) in record.getMessage()


def test_a_folder_that_cannot_be_made_leaves_the_memory(tmp_path, broken, caplog):
    broken(errno.EROFS)
    store = ChunkStore(folder=tmp_path / "new" / "store")
    store.put(KEY, CHUNK)
    assert_same_chunk(found(store), CHUNK)
    assert (len(store.held()), store.stats().files.unwritten, len(caplog.records)) == (1, 1, 1)


def test_writing_goes_on_when_the_disk_has_room_again(tmp_path, broken, monkeypatch):
    store = open_store(tmp_path)
    with monkeypatch.context():
        broken(errno.ENOSPC)
        store.put(KEY, CHUNK)
    monkeypatch.undo()
    store.put(KEY, CHUNK)  # too early
    assert (found(store), store.stats().files.unwritten) == (None, 2)
    now = chunk_store.time.monotonic()
    monkeypatch.setattr(chunk_store.time, "monotonic", lambda: now + tiers.RETRY_S + 1)
    store.put(KEY, CHUNK)
    assert_same_chunk(found(store), CHUNK)


def test_who_must_write_gets_one_line(tmp_path, broken):
    store = open_store(tmp_path, must_write=True)
    broken(errno.ENOSPC)
    for act in (lambda: store.put(KEY, CHUNK), lambda: open_store(tmp_path, must_write=True)):
        with pytest.raises(ValueError, match=r"cannot write .*No space left.*free space") as error:
            act()
        assert "\n" not in str(error.value)


def test_a_disk_that_fills_while_writing_leaves_nothing(tmp_path, monkeypatch):
    store = open_store(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    store.put(KEY, CHUNK)
    assert store.stats().files.unwritten == 1
    assert list((tmp_path / WRITING).iterdir()) == []
    assert KEY not in store


def in_place(kind, path, tmp_path):
    """Puts a thing of a kind at ``path``; returns what must stay as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    foreign = tmp_path / "foreign"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        (path / "precious").write_text("text")
    elif kind == "socket":
        held = os.getcwd()
        os.chdir(path.parent)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(held)
    elif kind == "link":
        open_store(tmp_path / "elsewhere").put(KEY, CHUNK)
        os.rename(chunk_path(tmp_path / "elsewhere", KEY), foreign)
        path.symlink_to(foreign)
    elif kind == "dangling":
        path.symlink_to(foreign)
    elif kind == "linked folder":
        open_store(tmp_path / "elsewhere").put(KEY, CHUNK)
        path.parent.rmdir()
        path.parent.symlink_to(chunk_path(tmp_path / "elsewhere", KEY).parent)
    elif kind == "file for a folder":
        path.parent.rmdir()
        path.parent.write_text("text")


def seen(folder):
    """All that is there but unfinished files and the index."""
    paths = (p for p in sorted(folder.rglob("*")) if WRITING not in p.parts)
    return {p: os.lstat(p) for p in paths if not p.name.startswith(INDEX)}


@pytest.mark.parametrize(
    "kind",
    ["pipe", "folder", "socket", "link", "dangling", "linked folder", "file for a folder"],
)
def test_what_is_no_file_of_the_store_is_a_miss_and_stays(tmp_path, caplog, kind):
    folder = tmp_path / "store"
    store = open_store(folder)
    path = chunk_path(folder, KEY)
    in_place(kind, path, tmp_path)
    before = seen(tmp_path)
    assert found(store) is None
    assert KEY not in store
    store.put(KEY, CHUNK)
    assert found(store) is None
    store.discard(KEY)
    assert not list(ChunkFolder(folder).listing())
    assert (store.stats().rejected, store.stats().files.unwritten) == (2, 1)
    after = seen(tmp_path)
    assert before.keys() == after.keys()
    assert all(before[p].st_ino == after[p].st_ino for p in before)
    assert all(before[p].st_mtime == after[p].st_mtime for p in before)
    # One place is taken; the others are written.
    store.put(OTHER_KEY, OTHER)
    assert_same_chunk(found(store, OTHER_KEY, OTHER), OTHER)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE])
def test_a_file_that_cannot_be_read_is_replaced_and_the_others_are_read(
    tmp_path, monkeypatch, caplog, number
):
    """Another user's file; or, on NFS, one that another machine has just replaced."""
    store = open_store(tmp_path)
    store.put(KEY, CHUNK)
    store.put(OTHER_KEY, OTHER)
    path, real = chunk_path(tmp_path, KEY), os.open
    inode = path.stat().st_ino

    def opened(given, flags, *args, **kwargs):
        if str(given) == str(path) and path.stat().st_ino == inode:
            raise OSError(number, os.strerror(number), str(path))
        return real(given, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)
    for _ in range(2):
        assert found(store) is None
        assert_same_chunk(found(store, OTHER_KEY, OTHER), OTHER)
    assert KEY in store
    store.put(KEY, CHUNK)
    assert_same_chunk(found(store), CHUNK)
    [record] = caplog.records
    assert "a chunk is encoded instead" in record.getMessage()


def test_a_file_that_cannot_be_read_makes_room(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.put(KEY, CHUNK)
    path, real = str(chunk_path(tmp_path, KEY)), os.open

    def opened(given, *args, **kwargs):
        if str(given) == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(given, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)
    size = os.path.getsize(path)
    store = ChunkStore.open(f"{tmp_path},memory=0,disk={size * 3 // 2}")
    store.put(OTHER_KEY, OTHER)
    assert_same_chunk(found(store, OTHER_KEY, OTHER), OTHER)
    assert not os.path.exists(path)


def test_a_linked_folder_of_unfinished_files_is_never_cleared_or_written(tmp_path, caplog):
    foreign, folder = tmp_path / "foreign", tmp_path / "store"
    foreign.mkdir()
    folder.mkdir()
    names = ["precious", f".{KEY}-{'0' * 32}.part", f".{KEY}-abcd_123.safetensors"]
    for name in names:
        (foreign / name).write_text("text")
        os.utime(foreign / name, (0, 0))
    (folder / WRITING).symlink_to(foreign)
    store = open_store(folder)
    store.put(KEY, CHUNK)
    assert sorted(p.name for p in foreign.iterdir()) == sorted(names)
    assert store.stats().files.unwritten == 1
    assert len(caplog.records) == 1


def test_opening_removes_only_what_stopped_writers_left(tmp_path):
    open_store(tmp_path).put(KEY, CHUNK)
    writing = tmp_path / WRITING
    left = writing / f".{KEY}-{'0' * 32}.part"
    live = writing / f".{KEY}-{'1' * 32}.part"
    foreign = [writing / "precious", writing / f".{KEY}.part", writing / "notes.safetensors"]
    for file in (left, live, *foreign):
        file.write_text("half")
    for file in (live, *foreign):
        os.utime(file, (0, 0))
    link, folder = writing / f".{KEY}-{'2' * 32}.part", writing / f".{KEY}-{'3' * 32}.part"
    link.symlink_to(foreign[0])
    folder.mkdir()
    with live.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert KEY in open_store(tmp_path)
        kept = {live, *foreign, link, folder}
        assert set(writing.iterdir()) == kept
    open_store(tmp_path)
    assert set(writing.iterdir()) == kept - {live}


def test_foreign_files_are_not_counted_and_stay(tmp_path):
    store = open_store(tmp_path)
    store.put(KEY, CHUNK)
    near = chunk_path(tmp_path, KEY).parent
    foreign = [
        near / "notes.safetensors",
        near / f"{'0' * 64}.safetensors",  # in another chunk's folder
        tmp_path / "README",
        tmp_path / "zz" / "zz" / f"{KEY}.safetensors",
    ]
    for file in foreign:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("text")
    assert KEY in open_store(tmp_path)
    assert list(ChunkFolder(tmp_path).keys()) == [KEY]
    store.discard(KEY)
    assert all(file.read_text() == "text" for file in foreign)


def test_a_file_in_the_folders_place_is_no_store_and_holds_nothing(tmp_path):
    (tmp_path / "st").write_text("mine")
    assert list(ChunkFolder(tmp_path / "st").keys()) == []
    with pytest.raises(ValueError, match=r"cannot use '.*st' as a chunk store: File exists; give"):
        ChunkStore(0, tmp_path / "st")


def test_hundreds_of_damaged_files_are_one_line(tmp_path, caplog):
    chunks = [made_chunk(2, seed=seed, shapes=((1, 2),)) for seed in range(300)]
    keys = [chunk_key(MODEL, kv.token_ids) for kv in chunks]
    store = open_store(tmp_path)
    for key in keys:
        path = chunk_path(tmp_path, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"damaged")
    for key, kv in zip(keys, chunks, strict=True):
        assert found(store, key, kv) is None
    [record] = caplog.records
    assert str(chunk_path(tmp_path, keys[0])) in record.getMessage()
    assert store.stats().rejected == 300
    assert str(chunk_path(tmp_path, keys[0])) in store.stats().first_rejected


def forged(folder, header_changes):
    """An entry with other numbers, and checksums that fit them."""
    forger = made_chunk(5, seed=9, token_ids=CHUNK.token_ids)
    open_store(folder).put(KEY, forger)
    path = chunk_path(folder, KEY)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= header_changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("signature", [{}, {"signature": "0" * 64}, {"signature": "\u00e9"}])
def test_with_a_key_a_forged_entry_is_a_miss(tmp_path, caplog, signature):
    forged(tmp_path, signature)
    store = open_store(tmp_path, secret=SECRET_A)
    assert found(store) is None
    assert (store.stats().rejected, store.stats().misses) == (1, 1)
    assert "not signed with the key" in caplog.text
    store.put(KEY, CHUNK)
    assert_same_chunk(found(store), CHUNK)


def test_a_signed_entry_is_read_with_its_key_and_without_one_but_not_with_another(tmp_path):
    open_store(tmp_path, secret=SECRET_A).put(KEY, CHUNK)
    assert_same_chunk(found(open_store(tmp_path, secret=SECRET_A)), CHUNK)
    assert_same_chunk(found(open_store(tmp_path)), CHUNK)
    other = open_store(tmp_path, secret=SECRET_B)
    assert found(other) is None
    assert other.stats().rejected == 1


def test_a_signature_belongs_to_one_key_and_content(tmp_path):
    store = open_store(tmp_path, secret=SECRET_A)
    store.put(KEY, CHUNK)
    store.put(OTHER_KEY, OTHER)
    header = ChunkFolder(tmp_path).facts(OTHER_KEY)[0]
    forged(tmp_path, {"signature": header["signature"]})
    assert found(store) is None
    os.replace(chunk_path(tmp_path, OTHER_KEY), chunk_path(tmp_path, KEY))
    assert found(store) is None
    assert store.stats().rejected == 2


def test_the_key_comes_from_the_environment_or_a_file(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_bytes(SECRET_A + b"\n")
    open_store(tmp_path, secret=SECRET_A).put(KEY, CHUNK)
    for name, value, hit in [
        (SECRET, SECRET_A.decode() + "\n", True),
        (SECRET, SECRET_B.decode(), False),
        (SECRET_FILE, str(file), True),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert (found(open_store(tmp_path)) is not None) is hit
    for name, value in [(SECRET, ""), (SECRET, "short"), (SECRET_FILE, str(tmp_path / "none"))]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ValueError, match=r"BLOCKTUNE_STORE_KEY"):
                open_store(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"checksums": "[1]"},
        {"checksums": "3"},
        {"num_layers": "many"},
        {"num_layers": "1000000"},
        {"origin": "-1"},
    ],
)
def test_a_header_of_a_forger_is_a_miss_and_no_traceback(tmp_path, monkeypatch, change):
    from blocktune.cache.store import chunk_file

    real = chunk_file.encoded
    monkeypatch.setattr(chunk_file, "encoded", lambda *args: (change, real(*args)[1]))
    store = open_store(tmp_path)
    store.put(KEY, CHUNK)
    assert found(store) is None
    assert store.stats().rejected == 1
