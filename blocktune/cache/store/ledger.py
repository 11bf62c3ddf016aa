"""The ledger of a tier, in SQLite: entries, their worth, what to evict. No torch is imported."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, fields
from pathlib import Path

from blocktune.cache.store.config import POLICIES, About, Row

INDEX = "index.sqlite"  # file name of the ledger in a folder
_FORMAT = 1
_BUFFER_S = 1.0  # seconds after which a thread writes hits to the file: no lookup waits for it
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    key TEXT PRIMARY KEY, size INTEGER, num_tokens INTEGER, kind TEXT, fingerprint TEXT,
    document TEXT, tenant TEXT, seconds REAL, created REAL, used REAL, uses INTEGER, clock REAL,
    worth REAL, pinned INTEGER, expires REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_worth ON entries (pinned, worth, used, size, tenant);
CREATE INDEX IF NOT EXISTS by_tenant ON entries (tenant, pinned, worth, used, size);
CREATE INDEX IF NOT EXISTS by_model ON entries (fingerprint);
CREATE INDEX IF NOT EXISTS by_end ON entries (expires) WHERE expires IS NOT NULL;
CREATE TABLE IF NOT EXISTS totals (tenant TEXT PRIMARY KEY, size INTEGER, entries INTEGER);
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON entries BEGIN
    INSERT INTO totals VALUES (new.tenant, new.size, 1) ON CONFLICT (tenant)
    DO UPDATE SET size = size + new.size, entries = entries + 1;
END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON entries BEGIN
    UPDATE totals SET size = size - old.size, entries = entries - 1 WHERE tenant = old.tenant;
    DELETE FROM totals WHERE tenant = old.tenant AND entries < 1;
END;
"""

_VALUED = """
CREATE TEMP TRIGGER valued AFTER INSERT ON entries BEGIN
    UPDATE entries SET worth = {0} WHERE key = new.key;
END;
CREATE TEMP TRIGGER revalued AFTER UPDATE OF uses ON entries BEGIN
    UPDATE entries SET worth = {0} WHERE key = new.key;
END;
"""

_Use = tuple[int, float, Row | None]  # hits, time of the last one, row to insert if it is new
_CLOCK = "coalesce((SELECT value FROM meta WHERE name = 'clock'), 0.0)"
_USE = f"UPDATE entries SET uses = uses + ?, used = max(used, ?), clock = {_CLOCK} WHERE key = ?"
_COLUMNS = tuple(field.name for field in fields(Row))
_ADD = (
    f"INSERT OR IGNORE INTO entries ({', '.join(_COLUMNS)}, clock, worth) "
    f"VALUES ({', '.join('?' * len(_COLUMNS))}, {_CLOCK}, 0.0)"
)
# For entries that a clock ahead of time dated: they would never be the oldest again.
_LATE = "UPDATE entries SET used = min(used, ?1), created = min(created, ?1) WHERE used > ?1"
_CLAUSES = {"document": "instr(char(10) || document || char(10), char(10) || ? || char(10))"}
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM entries"
_LEAVING = "SELECT key, size, tenant, worth FROM entries"


class Ledger:
    """Entries of one tier and their order of eviction. sqlite3.Error: its file cannot be used."""

    def __init__(
        self,
        path: Path | None = None,  # None: in memory
        *,
        max_bytes: int | None = None,  # limit of the tier; None: no limit
        policy: str | None = None,  # one of `POLICIES`; None: that of the file, or ``lru``
        quota: int | None = None,  # limit of one tenant in bytes
        clock: Callable[[], float] = time.time,  # seconds since the epoch
    ):
        if policy is not None and policy not in POLICIES:
            raise ValueError(f"unknown policy '{policy}'; available: {', '.join(POLICIES)}")
        self.path, self.max_bytes, self.policy = path, max_bytes, policy
        self.quota, self._clock = quota, clock
        self._lock = threading.RLock() if path is None else _ALL
        self._uses_lock, self._last_time = threading.Lock(), 0.0
        self._uses: dict[str, _Use] = {}  # hits that are not written yet
        self._writer = 0  # id of the process whose timer will write them; 0: none
        self._held: list[sqlite3.Connection] = []  # one, or none while the process forks
        self._connect()
        weakref.finalize(self, _close, self._held, self._uses)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Runs the block as one atomic transaction; only one process runs one at a time."""
        with self._lock:
            database = self._open()
            if database.in_transaction:
                yield database
                return
            database.execute("BEGIN IMMEDIATE")
            with database:  # commits, or rolls back
                yield database

    def add(self, key: str, size: int, about: About) -> None:
        """Inserts or replaces an entry, which keeps its pin and uses, also those of a `Row`."""
        with self.transaction() as database:
            now, kept = self.now(), self.row(key) or about
            uses, pinned = getattr(kept, "uses", 0), getattr(kept, "pinned", 0)
            database.execute("DELETE FROM entries WHERE key = ?", (key,))
            metadata = (getattr(about, field.name) for field in fields(About))
            database.execute(_ADD, (*metadata, key, max(size, 1), now, now, uses + 1, pinned))

    def use(self, key: str, row: Row | None = None) -> None:
        """Counts a hit, to be written later. ``row`` is inserted if ``key`` has no entry."""
        with self._uses_lock:
            now = self.now()
            self._uses[key] = self._uses.get(key, (0,))[0] + 1, now, row
            start = self.path is not None and self._writer != os.getpid()
            if start:
                self._writer = os.getpid()
        # Without the lock: starting waits for the thread, and a fork would copy it locked.
        if start:
            timer = threading.Timer(_BUFFER_S, _write, (weakref.ref(self),))
            timer.daemon = True
            timer.start()

    def remove(self, keys: Iterable[str]) -> None:
        """Deletes entries."""
        keys = list(keys)
        with self._uses_lock:
            for key in keys:
                self._uses.pop(key, None)
        with self.transaction() as database:
            database.executemany("DELETE FROM entries WHERE key = ?", [(key,) for key in keys])

    def leaving(self, size: int, tenant: str = "", key: str = "") -> list[str] | None:
        """Keys to evict so that ``size`` bytes fit, and expired keys; None if they cannot fit.

        Pinned entries stay, even expired ones; that of ``key`` counts as free. `remove` follows.
        """
        with self._lock:
            self.flush()
            database = self._open()
            expired = f"{_LEAVING} WHERE expires <= ? AND key != ? AND NOT pinned"
            found = database.execute(expired, (self._clock(), key))
            evicted = {old: (freed, whose) for old, freed, whose, _ in found}
            replaced = database.execute(f"{_LEAVING} WHERE key = ?", (key,)).fetchall()
            for limit, owner in ((self.quota, tenant), (self.max_bytes, None)):
                free = [*evicted.values(), *(row[1:3] for row in replaced)]
                freed = sum(n for n, whose in free if owner in (None, whose))
                need = 0 if limit is None else self.size(owner) + size - limit - freed
                if need > 0 and not self._select(owner, need, key, evicted):
                    return None
            return list(evicted)

    def size(self, tenant: str | None = None) -> int:
        """Total size in bytes of the entries of one tenant, or of all."""
        find = "SELECT total(size) FROM totals WHERE tenant = coalesce(?, tenant)"
        with self._lock:
            return int(self._open().execute(find, (tenant,)).fetchone()[0])

    def row(self, key: str) -> Row | None:
        """The row of ``key`` or None, after others' evictions; hits not yet written are missing."""
        with self.transaction() as database:
            record = database.execute(f"{_SELECT} WHERE key = ?", (key,)).fetchone()
        return record and Row(*record)

    def is_pinned(self, key: str) -> bool:
        """Whether ``key`` has an entry that is pinned."""
        return bool(getattr(self.row(key), "pinned", 0))

    def rows(self, **wanted: str) -> Iterator[Row]:
        """Rows, sorted by key, whose columns have the ``wanted`` values; ``start``: of the key."""
        start = wanted.pop("start", "")
        clauses = ["key >= ?", "key < ?", *(_CLAUSES.get(name, f"{name} = ?") for name in wanted)]
        find, values = f"{_SELECT} WHERE {' AND '.join(clauses)} ORDER BY key", wanted.values()
        with self._lock:
            self.flush()
            records = self._open().execute(find, (start, f"{start}~", *values)).fetchall()
        return (Row(*record) for record in records)

    def counts(self, column: str) -> dict[str, dict[str, int]]:
        """Total ``chunks``, ``tokens`` and ``bytes``, grouped by the values of ``column``."""
        sums, names = "count(*), total(num_tokens), total(size)", ("chunks", "tokens", "bytes")
        with self._lock:
            rows = self._open().execute(f"SELECT {column}, {sums} FROM entries GROUP BY {column}")
            return {name: dict(zip(names, map(int, own), strict=True)) for name, *own in rows}

    def pin(self, keys: Iterable[str], pinned: bool = True) -> int:
        """Pins entries, which are then never evicted, or unpins them. Returns how many exist."""
        pins, update = [(int(pinned), key) for key in keys], "UPDATE entries SET pinned = ?"
        with self.transaction() as database:
            return database.executemany(f"{update} WHERE key = ?", pins).rowcount

    def flush(self) -> None:
        """Writes the hits counted since the last write."""
        with self._uses_lock:
            uses = dict(self._uses)
            self._uses.clear()
        if uses:
            with self.transaction() as database:
                _write_uses(database, uses)

    def fill(self, rows: Iterable[Row]) -> None:
        """Inserts rows found by listing the files, unless their keys are there already."""
        found = [astuple(row) for row in rows]  # files are read before others must wait
        with self.transaction() as database:
            database.executemany(_ADD, found)

    def copy(self, path: Path) -> None:
        """Adds the rows of an index that may not be writable; none if it cannot be read."""
        for how in ("mode=ro", "immutable=1"):  # the former needs shared memory: room on the disk
            with suppress(sqlite3.Error):
                with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)) as of:
                    self.fill(Row(*record) for record in of.execute(_SELECT))
                return

    def now(self) -> float:
        """The current time, strictly increasing from call to call."""
        self._last_time = max(self._clock(), self._last_time + 1e-6)
        return self._last_time

    def _select(self, tenant: str | None, need: int, key: str, evicted: dict) -> bool:
        """Adds keys of least worth to ``evicted`` until ``need`` bytes are free, if possible."""
        where, values = ("", ()) if tenant is None else ("tenant = ? AND ", (tenant,))
        find, clock = f"{_LEAVING} WHERE {where}pinned = 0 ORDER BY worth, used", None
        for name, size, whose, worth in self._open().execute(find, values):
            if need <= 0:
                break
            if name != key and name not in evicted:
                evicted[name] = size, whose
                need, clock = need - size, worth
        if need <= 0 and clock is not None and self.policy == "gdsf":
            with self.transaction() as database:
                database.execute("INSERT OR REPLACE INTO meta VALUES ('clock', ?)", (clock,))
        return need <= 0

    def _open(self) -> sqlite3.Connection:
        return self._held[0] if self._held else self._connect()

    def _connect(self) -> sqlite3.Connection:
        where = ":memory:" if self.path is None else str(self.path)
        options = {"timeout": 1.0, "isolation_level": None, "check_same_thread": False}
        database = sqlite3.connect(where, **options)
        if self.path is not None:
            _INDEXES.add(self)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = OFF")  # it can be rebuilt from the files
        database.executescript(_SCHEMA)
        database.execute("BEGIN IMMEDIATE")
        with database:
            meta = dict(database.execute("SELECT name, value FROM meta"))
            if meta.get("format", _FORMAT) != _FORMAT:
                raise sqlite3.DatabaseError(f"{where}: index of another version")
            database.execute("INSERT OR REPLACE INTO meta VALUES ('format', ?)", (_FORMAT,))
            self.policy = self.policy or meta.get("policy", "lru")
            late = database.execute(_LATE, (self._clock(),)).rowcount
            if late or meta.get("policy") != self.policy:
                database.execute("INSERT OR REPLACE INTO meta VALUES ('policy', ?)", (self.policy,))
                database.execute(f"UPDATE entries SET worth = {POLICIES[self.policy]}")
        database.executescript(_VALUED.format(POLICIES[self.policy]))
        self._held.append(database)
        return database


def _write(owner: weakref.ref[Ledger]) -> None:
    """Writes the hits of a ledger that still exists. If that fails, only times of use are lost."""
    if (ledger := owner()) is not None:
        ledger._writer = 0
        with suppress(sqlite3.Error):
            ledger.flush()


def _close(held: list[sqlite3.Connection], uses: dict[str, _Use]) -> None:
    for database in held:
        with suppress(sqlite3.Error):  # only times of use are lost
            _write_uses(database, uses)
        database.close()
    held.clear()
    uses.clear()


def _close_all() -> None:
    """Closes the indexes: a fork would trust in locks that it does not have, and lose rows."""
    _ALL.acquire()
    for ledger in list(_INDEXES):
        _close(ledger._held, ledger._uses)


_INDEXES: weakref.WeakSet[Ledger] = weakref.WeakSet()
_ALL = threading.RLock()  # of all indexes
os.register_at_fork(before=_close_all, after_in_parent=_ALL.release, after_in_child=_ALL.release)


def _write_uses(database: sqlite3.Connection, uses: dict[str, _Use]) -> None:
    database.executemany(_ADD, [astuple(row) for *_, row in uses.values() if row])
    database.executemany(_USE, [(n, at, key) for key, (n, at, _) in uses.items()])
