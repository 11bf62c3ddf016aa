"""The index of a folder, and what the headers of files say where there is none. No torch."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator

from blocktune.cache.blobs import Blobs, FileFacts
from blocktune.cache.folder import ChunkFolder
from blocktune.cache.ledger import INDEX, Ledger, Row

_LOG = logging.getLogger(__name__)


def open_index(folder: ChunkFolder, **budget) -> Ledger | None:
    """The index of a folder, made from its files if it is lost or damaged; None if it cannot be.

    Args:
        folder: Of the store.
        budget: As for `Ledger`; without a ``policy`` the index keeps its own.
    """
    path = folder.path / INDEX
    for _ in range(3):
        fresh = not path.exists()
        if path.is_symlink() or not (fresh or path.is_file()):
            _LOG.warning("'%s' is not the index of the store; it is not used", path)
            return None
        try:
            ledger = Ledger(path, **budget)
            if fresh:
                ledger.fill(found_rows(folder))
            return ledger
        except sqlite3.OperationalError as error:  # read-only, or held too long
            if "locked" not in str(error):
                return None
            time.sleep(0.1)
        except sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(INDEX + suffix).unlink(missing_ok=True)
    return None


def found_rows(blobs: Blobs, keys: Iterable[str] | None = None) -> Iterator[Row]:
    """Rows of all files or of some, from their headers; one that cannot be read has no model."""
    for key in blobs.keys() if keys is None else keys:
        try:
            facts = blobs.facts(key)
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            facts = FileFacts({}, 0, 1, time.time())
        yield row_of(key, facts)


def row_of(key: str, facts: FileFacts) -> Row:
    """A row of what a file's header says."""
    header = facts.header
    try:
        seconds, expires = (float(header.get(name, 0.0)) for name in ("seconds", "expires"))
    except ValueError:
        seconds = expires = 0.0
    return Row(
        *(facts.num_tokens, header.get("kind", ""), header.get("fingerprint", "")),
        document=header.get("document", ""),
        tenant=header.get("tenant", ""),
        seconds=seconds,
        expires=expires or None,
        key=key,
        size=facts.size,
        created=facts.used,
        used=facts.used,
        uses=1,
    )
