"""The memory of this process."""

import ctypes


def trim_memory() -> None:
    """Makes the C library return freed memory, of which it may keep as much as is in use."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # only glibc has it
