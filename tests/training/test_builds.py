"""Locks of DeepSpeed's operator builds: waited for, or named where nobody holds them."""

import os
import threading
import time

import pytest

from blocktune.training.launch_checks import wait_for_builds


def test_a_lock_is_waited_for_or_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    wait_for_builds()
    lock = tmp_path / "cpu_adam/lock"
    lock.parent.mkdir()
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)

    def release():
        time.sleep(0.3)
        os.remove(lock)
        os.close(descriptor)

    thread = threading.Thread(target=release)
    thread.start()
    wait_for_builds()
    thread.join()
    assert capsys.readouterr().out.startswith("waiting for another process to build")
    lock.touch()  # of a process that was killed
    with pytest.raises(ValueError, match=f"rm '{lock}'"):
        wait_for_builds()
