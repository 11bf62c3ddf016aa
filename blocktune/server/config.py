"""The configuration of a server: limits, tenants and defaults."""

import hashlib
import hmac
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from blocktune.cache.store.config import parse_bytes
from blocktune.parsing import build_config, load_yaml, read, refuse_doubles
from blocktune.registry import require_count

FIX = "give a YAML mapping of tenant names to {key, max_requests, tokens_per_minute}"


@dataclass(frozen=True)
class Limits:
    """Limits of one request and of all together; each is positive."""

    body_bytes: int = 8 << 20  # size of a request's body
    body_s: float = 30.0  # seconds within which the body must arrive
    chunks: int = 256  # documents of a request
    prompt_tokens: int = 131_072  # tokens of a prompt; the model's context also limits them
    new_tokens: int = 4096  # tokens of an answer
    default_new_tokens: int = 256  # tokens of an answer if the request has no limit
    choices: int = 8  # ``n`` of a request
    request_s: float = 300.0  # seconds from a request's arrival to its last token
    queue: int = 64  # requests that may wait; further ones get HTTP 429
    running: int = 16  # answers that are decoded at the same time
    kv_bytes: int = 4 << 30  # keys and values of all running answers; requests wait for theirs
    pinned_bytes: int = 1 << 30  # bytes of chunks that clients may pin in the store
    prefill_tokens: int = 2048  # tokens of chunks that are encoded between two decoding steps

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"'{name}' must be positive, got {value}")


def read_limits(pairs: list[str]) -> Limits:
    """Limits from ``name=value`` pairs; raises ValueError if a name or a value is wrong."""
    values = dict(pair.partition("=")[::2] for pair in pairs)
    for name, text in values.items():
        with suppress(ValueError):  # a value that is not a size is refused below, by name
            values[name] = str(parse_bytes(text)) if name.endswith("_bytes") else text
    return build_config(Limits, values, "--limit")


@dataclass(frozen=True)
class Tenant:
    """A client with its own key, quota and cache."""

    name: str = "default"  # in logs and metrics
    key: str | None = field(default=None, repr=False)  # its API key; None: no key is needed
    max_requests: int | None = None  # at a time, with waiting ones; None: no limit of its own
    tokens_per_minute: int | None = None  # prompt and answer tokens; None: no quota

    def __post_init__(self):
        if self.key is not None and (len(self.key) < 8 or self.key != self.key.strip()):
            raise ValueError("the key must have 8 characters or more, no white space at its ends")
        for name in ("max_requests", "tokens_per_minute"):
            if (value := getattr(self, name)) is not None:
                require_count(f"'{name}'", value, 1)

    def salt(self, cache_salt: str | None) -> str:
        """The salt of its chunks' keys, by the request's own; tenants with keys never share one."""
        if self.key is None:
            return cache_salt or ""
        return hashlib.sha256(f"{self.name}\0{cache_salt or ''}".encode()).hexdigest()

    @property
    def payer(self) -> str:
        """Whose quota in the store its chunks count against, whatever the request's salt."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:12]

    def sign(self, key: str) -> str:
        """The tenant's signed name for a chunk's store ``key``; `verify` inverts it."""
        if self.key is None:
            return key
        return f"{key}-{hmac.new(self.key.encode(), key.encode(), hashlib.sha256).hexdigest()[:16]}"

    def verify(self, name: str) -> str | None:
        """The store key in one of this tenant's signed names; None if the signature is wrong."""
        key = name.partition("-")[0]
        return key if hmac.compare_digest(self.sign(key), name) else None


class OnlyTenant(Tenant):
    """The one client of ``--api-key``. It uses the chunks that `blocktune encode` has stored."""

    def salt(self, cache_salt: str | None) -> str:
        """The request's own salt: there is nobody else to keep the chunks from."""
        return cache_salt or ""


def load_tenants(path: Path) -> tuple[Tenant, ...]:
    """Reads tenants from YAML: ``{acme: {key: ..., tokens_per_minute: 100000}}``; or ValueError."""
    values = load_yaml(path, "tenants", FIX)
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{path}: {FIX}")
    tenants = []
    for name, value in values.items():
        if not isinstance(value, Mapping) or not value.get("key"):
            raise ValueError(f"{path}: tenant '{name}' has no key; {FIX}")
        if "name" in value:
            raise ValueError(f"{path}: tenant '{name}' has its name twice; drop 'name'; {FIX}")
        tenants.append(read(Tenant, {**value, "name": str(name)}, f"{path}: tenant '{name}'"))
    refuse_doubles(f"{path}: tenants", [tenant.name for tenant in tenants], "rename one")
    if len({tenant.key for tenant in tenants}) < len(tenants):
        raise ValueError(f"{path}: two tenants have the same key")
    return tuple(tenants)


@dataclass(frozen=True)
class ServerConfig:
    """The whole configuration."""

    limits: Limits = Limits()
    tenants: tuple[Tenant, ...] = ()  # with keys; empty: all clients are one tenant
    hosts: tuple[str, ...] = ("*",)  # accepted Host headers; ``*`` stands for any text
    log_texts: bool = False  # whether answers are logged

    def accepts(self, host: str) -> bool:
        """Whether a Host header is one of `hosts`, with or without its port."""
        forms = host.lower(), re.sub(r":\d*$", "", host.lower())
        patterns = [known.lower().replace("[", "[[]") for known in self.hosts]
        return any(fnmatchcase(form, pattern) for form in forms for pattern in patterns)

    def tenant_of(self, authorization: str | None) -> Tenant | None:
        """The tenant of an ``Authorization`` header, or None if it must not be served."""
        if not self.tenants:
            return Tenant()
        scheme, _, text = (authorization or "").partition(" ")
        key, match = text.strip().encode("latin-1"), None  # as the header was decoded
        for tenant in self.tenants:  # always compares all, so that the time reveals nothing
            is_same = hmac.compare_digest((tenant.key or "").encode(), key)
            match = tenant if is_same and scheme.lower() == "bearer" else match
        return match


class Quotas:
    """Counts the running requests and recent tokens of tenants. Thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._requests: dict[str, int] = {}
        self._tokens: dict[str, tuple[float, float]] = {}  # tokens left, and at what time

    def enter(self, tenant: Tenant, tokens: int) -> float | None:
        """Admits a request of at most ``tokens``, or returns the seconds to wait."""
        with self._lock:
            running = self._requests.get(tenant.name, 0)
            if tenant.max_requests is not None and running >= tenant.max_requests:
                return 1.0
            if tenant.tokens_per_minute is not None:
                now, rate = time.monotonic(), tenant.tokens_per_minute / 60
                left, since = self._tokens.get(tenant.name, (tenant.tokens_per_minute, now))
                left = min(tenant.tokens_per_minute, left + (now - since) * rate)
                needed = min(tokens, tenant.tokens_per_minute)
                if left < needed:
                    return max(1.0, (needed - left) / rate)
                self._tokens[tenant.name] = (left - tokens, now)
            self._requests[tenant.name] = running + 1
            return None

    def leave(self, tenant: Tenant, refund: int = 0) -> None:
        """Ends a request that `enter` admitted, and gives back ``refund`` of its tokens."""
        with self._lock:
            self._requests[tenant.name] -= 1
            if tenant.name in self._tokens:
                left, since = self._tokens[tenant.name]
                self._tokens[tenant.name] = (left + refund, since)
