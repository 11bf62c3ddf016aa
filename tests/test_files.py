"""Files are whole or not there, and stopped logs continue."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys

import pytest

from blocktune.files import (
    append_lines,
    locked,
    move_entries,
    move_folder,
    replace_json,
    replace_text,
    replacing,
    resumed,
    truncate_lines,
    whole_lines,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    replace_text(path, "old")
    with pytest.raises(KeyError), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("new")
        raise KeyError
    with pytest.raises(ValueError, match="JSON"):
        replace_json(path, {"score": float("nan")})
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_write_replaces_with_usual_permissions(tmp_path):
    path = tmp_path / "made" / "a.json"
    replace_json(path, {"a": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o600)
    with replacing(path) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("2")
    assert path.read_text() == "2"
    assert path.stat().st_mode & 0o777 == 0o600  # a private file stays private


def test_a_link_a_pipe_and_a_folder_stay_what_they_are(tmp_path):
    """A rename would replace a link, and remove ``/dev/null``."""
    (tmp_path / "link").symlink_to("file")
    replace_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "x" * 250):  # of a link to nowhere, a file is made
        replace_text(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with locked(tmp_path / "pipe"), locked(tmp_path / "pipe"):
        replace_text(tmp_path / "pipe", "said")
    assert os.read(reader, 9) == b"said"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path, "x")
    with pytest.raises(OSError, match=r"/proc/x\.txt"):  # not of the temporary file
        replace_text("/proc/x.txt", "x")


@pytest.mark.parametrize("end", ["my only line", '[{"a": 1}]', '{"a": 1}', "\x80"])
def test_no_file_of_others_is_cut_as_a_torn_log(tmp_path, end):
    path = tmp_path / "mine"
    for text in (end, "first\n" + end):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="mine"), resumed(path):
            pass
        assert path.read_text(encoding="latin-1") == text
    for torn in ("", "[", '{"a": [1', '["\u00c3'):
        path.write_text("first\n" + torn, encoding="latin-1")
        with resumed(path) as lines:
            assert lines == ["first"]
        assert path.read_text() == "first\n"


def test_a_folder_replaces_a_folder(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    move_folder(tmp_path / "new", tmp_path / "old")
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == ["new"]


def test_the_named_entry_moves_last(tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "z").mkdir(parents=True)
    (source / "a.json").touch()
    moved, rename = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(a.name), rename(a, b)))
    move_entries(source, tmp_path / "target", last="a.json")
    assert moved == ["z", "a.json"]
    assert names(tmp_path) == ["target"]


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    assert whole_lines(path) == []
    append_lines(path, ["a\u2028b", "ü"])
    assert whole_lines(path) == ["a\u2028b", "ü"]
    path.write_bytes(path.read_bytes() + "ü".encode()[:1])
    assert whole_lines(path) == ["a\u2028b", "ü"]
    truncate_lines(path, 2)
    assert path.read_bytes() == "a\u2028b\nü\n".encode()
    truncate_lines(path, 1)
    assert whole_lines(path) == ["a\u2028b"]


def test_a_second_process_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    code = f"from blocktune.files import locked\nwith locked({str(path)!r}): pass"
    with locked(path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert b"another process is writing" in done.stderr
    with locked(path):
        pass


def test_a_device_is_written_to_and_never_read(tmp_path):
    """``/dev/full`` holds zeros without end, and a pipe cannot be synced."""
    assert whole_lines("/dev/full") == []
    with pytest.raises(OSError, match=r"No space left.*'/dev/full'"):
        append_lines("/dev/full", ["a"])
    with pytest.raises(OSError, match=r"No space left.*'/dev/full'"):
        replace_text("/dev/full", "a")
    truncate_lines("/dev/null", 0)
    append_lines("/dev/null", ["a"])


@pytest.mark.parametrize("missing", ["chmod", "fsync of folders", "flock"])
def test_a_file_system_with_fewer_functions_is_written_to(tmp_path, monkeypatch, missing):
    """FUSE and SMB may refuse permissions and to sync folders; Lustre may have no locks."""
    real = os.fsync

    def refused(*_, **__):
        number = errno.EPERM if missing == "chmod" else errno.ENOSYS
        raise OSError(number, os.strerror(number))

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    if missing == "fsync of folders":
        monkeypatch.setattr(os, "fsync", fsync)
    else:
        monkeypatch.setattr(fcntl if missing == "flock" else os, missing, refused)
    for text in ("old", "new"):
        replace_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_text() == "new"
    append_lines(tmp_path / "log", ["{}"])
    with resumed(tmp_path / "log") as lines:
        assert lines == ["{}"]


def test_a_disk_that_cannot_sync_is_an_error(tmp_path, monkeypatch):
    def broken(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        replace_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == []
