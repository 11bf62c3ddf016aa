"""Locks of DeepSpeed's operator builds: left alone while they are held, or named."""

import os

import pytest

from blocktune.training.launch_checks import refuse_stale_locks


def test_a_lock_that_nobody_holds_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    refuse_stale_locks()
    lock = tmp_path / "cpu_adam/lock"
    lock.parent.mkdir()
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)
    refuse_stale_locks()  # DeepSpeed waits for it
    os.close(descriptor)  # of a process that was killed
    with pytest.raises(ValueError, match=f"rm '{lock}'"):
        refuse_stale_locks()
