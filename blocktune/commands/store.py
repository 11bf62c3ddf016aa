"""`blocktune store`: inspects, verifies, copies and removes the chunks of a store."""

import json
import math
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument

from blocktune.cache.store.blobs import Blobs, states_key
from blocktune.cache.store.config import Row, parse_bytes
from blocktune.cache.store.shelf import NO_MANIFEST, Shelf, found_rows
from blocktune.commands.application import new_group
from blocktune.commands.options import AsJson, option, tell

SHORT = 12  # number of digits of a key or fingerprint that are shown
MOST_LAYERS = 512  # of a model, whose hidden states `rm` looks for
MOST_UNNAMED = 20  # up to this many models, those without a manifest are shown
LEAST_DIGITS = 6  # that identify a key or fingerprint on the command line

Place = Annotated[str, Argument(metavar="STORE", help="Folder or URL of the store.")]
Model = option(str, "Only of this model: its first digits, as in `stat`.", metavar="FINGERPRINT")
Document = option(str, "Only chunks of this document, by its id or title.")
Key = Annotated[str, Argument(help="Key of the chunk; its first 6 digits are enough.")]
Keys = Annotated[list[str], Argument(help="Keys, or their first 6 digits.")]
Undo = option(bool, "Unpin the chunks.", "--undo")
Other = Annotated[str, Argument(help="Folder or URL of the other store.")]
DryRun = option(bool, "Only show what would be removed.", "--dry-run")

store_command = new_group(
    "store",
    "Inspect, verify, copy or clean up a store of encoded chunks (`--store`).",
    "blocktune store stat cache/",
    "blocktune store ls cache/ --model 3f2a91",
)


@store_command("blocktune store stat cache/")
def stat(store: Place, as_json: AsJson = False) -> None:
    """Count chunks and bytes by model, and by kind (such as exact prefixes)."""
    shelf = Shelf.open(store)
    models, kinds, tenants = map(shelf.ledger.counts, ("fingerprint", "kind", "tenant"))
    unreadable = models.pop("", {"chunks": 0})["chunks"]
    for fingerprint, sums in models.items():
        sums["base"], sums["adapter"] = shelf.names(fingerprint)
    total = {n: sum(m[n] for m in models.values()) for n in ("chunks", "tokens", "bytes")}
    kinds = {name: sums for name, sums in kinds.items() if name}
    tenants = {name: sums["bytes"] for name, sums in tenants.items() if name}
    record = total | {"unreadable": unreadable, "kinds": kinds, "tenants": tenants}
    damaged = f", {unreadable:,} unreadable" if unreadable else ""
    named = {name: sums for name, sums in models.items() if sums["base"] != NO_MANIFEST}
    shown = models if len(models) <= MOST_UNNAMED else named
    lines = [f"{_sums(total)}, {len(shown)} models{damaged}"]
    for fingerprint, sums in shown.items():
        adapter = f" + {sums['adapter']}" if sums["adapter"] else ""
        lines.append(f"  {fingerprint[:SHORT]}  {_sums(sums)}  {sums['base']}{adapter}")
    if left := len(models) - len(shown):
        lines.append(f"  {left:,} others without a manifest, of salts and cached answers (--json)")
    lines += [f"  of kind {kind}: {_sums(s)}" for kind, s in kinds.items() if kind != "chunk"]
    tell(as_json, record | {"models": models}, *lines)


@store_command("blocktune store ls cache/ --document handbook.pdf")
def ls(store: Place, model: Model = "", document: Document = "", as_json: AsJson = False) -> None:
    """List chunks, one per line: key, kind, tokens, bytes, last use, model, document."""
    shelf = Shelf.open(store)
    for row in shelf.rows(model=_model(shelf, model), document=document):
        record = _record(row)
        name = "  pinned" * bool(row.pinned) + "  " + " ".join(row.document.split())
        line = (
            f"{row.key[:SHORT]}  {row.kind:8} {row.num_tokens:>7,} tokens {_size(row.size):>9}  "
            f"{record['used']}  {row.fingerprint[:SHORT]}{name}".rstrip()
        )
        if row.fingerprint:
            typer.echo(json.dumps(record) if as_json else line)


@store_command("blocktune store show cache/ 9c01ab4e")
def show(store: Place, key: Key, as_json: AsJson = False) -> None:
    """Show one chunk: its header and token ids, and whether it verifies."""
    from blocktune.cache.store.chunk_file import ChunkFile  # imports torch

    shelf = Shelf.open(store)
    [row] = _rows(shelf, [key])
    problem, _ = _checked(shelf.blobs, row.key)
    facts = {"sound": problem is None, "problem": problem, "signed": False, "codec": "as-is"}
    record = _record(row) | facts
    with suppress(OSError, ValueError):  # damaged, as ``problem`` says, gone or expired
        header, _ = shelf.blobs.facts(row.key)
        record |= {"signed": "signature" in header, "codec": header.get("codec", "as-is")}
        record["token_ids"] = ChunkFile(shelf.blobs, row.key).token_ids.tolist()
    tell(as_json, record, *(f"{name:12} {value}" for name, value in record.items()))


@store_command("blocktune store verify s3://bucket/chunks")
def verify(store: Place, as_json: AsJson = False) -> None:
    """Compare every file with its checksums (and signature); exit code 1 if one fails.

    The index of a writable folder is repaired first.
    """
    shelf = Shelf.open(store)
    blobs, index = shelf.blobs, shelf.mend()
    results = {key: _checked(blobs, key)[0] for key in blobs.keys()}  # noqa: SIM118
    problems = {key: problem for key, problem in results.items() if problem}
    signed = "" if blobs.secret is None else " and signed"
    sound = f"{len(results) - len(problems):,} of {len(results):,} chunks are sound{signed}"
    lines = [*_describe_repairs(index), *(f"{key}: {problem}" for key, problem in problems.items())]
    tell(as_json, {"chunks": len(results), "damaged": problems, "index": index}, *lines, sound)
    if problems:
        raise typer.Exit(1)


@store_command("blocktune store gc cache/ --max-size 50GB --unused-days 30 --damaged")
def gc(
    store: Place,
    max_size: option(str, "Such as 50GB: remove the least recently used.") = "",
    unused_days: option(float | None, "Remove chunks not used for this many days.", min=0) = None,
    damaged: option(bool, "Remove chunks that fail `verify`.", "--damaged") = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove unfinished files, expired chunks, and chunks by size, age or damage.

    The index of a folder is repaired first. Pinned chunks stay, unless they are expired or damaged.
    """
    limit = parse_bytes(max_size) if max_size else math.inf
    now, shelf = time.time(), Shelf.open(store)
    cutoff = 0.0 if unused_days is None else now - unused_days * 86400
    unfinished, index = (0, {}) if dry_run else (shelf.blobs.clean(), shelf.mend())
    total, kept, to_remove = 0, [], {}
    for row in shelf.rows():
        expired = row.expires is not None and row.expires <= now
        if expired or (damaged and _checked(shelf.blobs, row.key)[0]):
            to_remove[row.key] = row.size
            continue
        total += row.size
        if row.fingerprint and not row.pinned:
            kept.append((row.used, row.key, row.size))
    for used, key, size in sorted(kept):
        if used < cutoff or total > limit:
            to_remove[key] = size
            total -= size
    _remove(shelf, to_remove, dry_run, as_json, unfinished=unfinished, index=index)


@store_command("blocktune store pin cache/ 9c01ab4e")
def pin(store: Place, keys: Keys, undo: Undo = False, as_json: AsJson = False) -> None:
    """Protect chunks of a folder from eviction, until `rm` or `gc` removes them."""
    shelf = Shelf.open(store)
    selected = [row.key for row in _rows(shelf, keys)]
    if shelf.index is None:
        raise ValueError(f"'{shelf.blobs.place}' has no writable index, where pins are stored")
    count = shelf.index.pin(selected, not undo)
    record = {"chunks": count, "pinned": not undo, "keys": selected}
    tell(as_json, record, f"{'unpinned' if undo else 'pinned'} {count:,} chunks")


@store_command("blocktune store rm cache/ --document handbook.pdf")
def rm(
    store: Place,
    keys: Keys = None,
    model: Model = "",
    document: Document = "",
    adapter: option(str, "Only chunks of this adapter, as in `stat`.") = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove chunks by keys, model, adapter or document, with their hidden states, if any."""
    shelf = Shelf.open(store)
    if sum(map(bool, (keys, model, document, adapter))) != 1:
        raise ValueError("give either keys, --model FINGERPRINT, --adapter NAME or --document NAME")
    if not dry_run:
        shelf.mend()  # or files that were copied into the folder would stay
    if keys:
        rows = _rows(shelf, keys)
    elif adapter:
        models = shelf.ledger.counts("fingerprint")
        adapter = str(Path(adapter))  # as manifests name it: without ./ and a last slash
        selected = {fingerprint for fingerprint in models if shelf.names(fingerprint)[1] == adapter}
        rows = [row for row in shelf.rows() if row.fingerprint in selected]
    else:
        rows = shelf.rows(model=_model(shelf, model), document=document)
    rows, index = list(rows), shelf.index
    if keys or document:  # an answer that made a chunk's states knew no document
        known = shelf.blobs.keys() if index is None else (r.key for r in index.rows(kind="states"))
        own = (states_key(row.key, layer) for row in rows for layer in range(MOST_LAYERS))
        rows += found_rows(shelf.blobs, sorted({*known}.intersection(own)))
    _remove(shelf, {row.key: row.size for row in rows}, dry_run, as_json)


@store_command("blocktune store export cache/ s3://bucket/chunks --model 3f2a91", name="export")
def export_chunks(
    store: Place, target: Other, model: Model = "", document: Document = "", as_json: AsJson = False
) -> None:
    """Copy chunks and manifests to another store, verifying each; existing ones are skipped."""
    _copy(Shelf.open(store), Shelf.open(target, make=True), model, document, as_json)


@store_command("blocktune store import cache/ s3://bucket/chunks", name="import")
def import_chunks(
    store: Place, source: Other, model: Model = "", document: Document = "", as_json: AsJson = False
) -> None:
    """Copy chunks and manifests from another store, verifying each; existing ones are skipped."""
    _copy(Shelf.open(source), Shelf.open(store, make=True), model, document, as_json)


@store_command("blocktune store manifest cache/ --json")
def manifest(store: Place, model: Model = "", as_json: AsJson = False) -> None:
    """Show what other programs need to use the chunks: model, tokenizer, prompt, shapes, RoPE."""
    blobs = Shelf.open(store).blobs
    selected = [name for name in blobs.fingerprints() if name.startswith(model)]
    if not selected:
        which = f" of {model}" if model else ""
        hint = "`blocktune encode` and `answer --store` write one for each model"
        raise ValueError(f"no manifest{which} in '{store}'; {hint}")
    records = [blobs.manifest(fingerprint) for fingerprint in selected]
    facts = [(name, json.dumps(value)) for record in records for name, value in record.items()]
    lines = (f"{name:14} {text[:300]}{' ... (--json)' * (len(text) > 300)}" for name, text in facts)
    tell(as_json, records, *lines)


def _checked(blobs: Blobs, key: str) -> tuple[str | None, Any]:
    """What is wrong with a chunk, or its file; neither: it is gone. ValueError: no access."""
    from blocktune.cache.store.chunk_file import ChunkFile

    try:
        (file := ChunkFile(blobs, key)).verify()
        return None, file
    except FileNotFoundError:
        return None, None
    except OSError as error:  # says nothing about the file, which must not be called damaged
        reason = error.strerror or error
        raise ValueError(f"cannot read '{blobs.name(key)}': {reason}; repeat the command") from None
    except ValueError as error:
        return " ".join(str(error).split()), None


def _describe_repairs(index: dict[str, int]) -> list[str]:
    counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in index.items() if count]
    return [f"index repaired: {', '.join(counts)}"] if counts else []


def _remove(shelf: Shelf, sizes: dict[str, int], dry_run: bool, as_json: bool, **more: Any) -> None:
    removed = {key: size for key, size in sizes.items() if dry_run or shelf.blobs.remove(key)}
    if not dry_run and shelf.index is not None:
        shelf.index.remove(sizes)
    record = {"chunks": len(removed), "bytes": sum(removed.values()), "dry_run": dry_run} | more
    left = f", {more['unfinished']:,} unfinished files" if more.get("unfinished") else ""
    line = f"{'would remove' if dry_run else 'removed'} {len(removed):,} chunks"
    lines = [*_describe_repairs(more.get("index", {})), f"{line} ({_size(record['bytes'])}){left}"]
    tell(as_json, record | {"keys": list(removed)}, *lines)


def _copy(source: Shelf, target: Shelf, model: str, document: str, as_json: bool) -> None:
    fingerprint = _model(source, model)
    counts = {"copied": 0, "bytes": 0, "there": 0, "unsound": 0}  # a row without a file: no chunk
    for row in source.rows(model=fingerprint, document=document):
        if target.blobs.has(row.key):
            counts["there"] += 1
            continue
        problem, file = _checked(source.blobs, row.key)
        counts["unsound"] += problem is not None
        if file is not None:
            data = file.blob.content()  # what was verified: the path may have another file now
            try:
                target.blobs.write(row.key, data)
                if target.index is not None:
                    target.index.fill([row])
            except OSError as error:
                reason = f"after {counts['copied']:,} chunks: {error.strerror or error}"
                raise ValueError(f"'{target.blobs.place}', {reason}") from None
            counts["copied"] += 1
            counts["bytes"] += len(data)
    for name in (n for n in source.blobs.fingerprints() if n.startswith(fingerprint)):
        try:
            record = source.blobs.manifest(name)
        except ValueError as error:  # the chunks are copied all the same
            typer.echo(f"manifest not copied: {error}", err=True)
            continue
        with suppress(ValueError):  # a damaged manifest is replaced
            if target.blobs.manifest(name) is not None:
                continue
        target.blobs.write_manifest(record)
    line = f"copied {counts['copied']:,} chunks ({_size(counts['bytes'])}) to {target.blobs.place}"
    line += f"; {counts['there']:,} were already there, {counts['unsound']:,} failed to verify"
    tell(as_json, counts, line)


def _rows(shelf: Shelf, starts: list[str]) -> list[Row]:
    return [_find_one(start, shelf.rows(start=start), "chunk") for start in starts]


def _model(shelf: Shelf, start: str) -> str:
    if not start:
        return ""
    models = shelf.ledger.counts("fingerprint")
    return _find_one(start, (name for name in models if name.startswith(start)), "model")


def _find_one(start: str, matches: Iterable, kind: str) -> Any:
    """Returns the only match of the first digits ``start``, or raises ValueError."""
    if not re.fullmatch(rf"[0-9a-f]{{{LEAST_DIGITS},64}}", start):
        raise ValueError(f"a {kind} is named by {LEAST_DIGITS} to 64 hex digits, got '{start}'")
    matches = list(matches)
    if len(matches) != 1:
        raise ValueError(f"{len(matches)} of the store's {kind}s begin with '{start}'; see `ls`")
    return matches[0]


def _record(row: Row) -> dict[str, Any]:
    record = asdict(row) | {"pinned": bool(row.pinned)}
    for name in ("created", "used"):
        record[name] = time.strftime("%Y-%m-%d %H:%M", time.localtime(record[name]))
    return {"tokens": record.pop("num_tokens"), "bytes": record.pop("size")} | record


def _sums(sums: dict[str, Any]) -> str:
    return f"{sums['chunks']:,} chunks, {sums['tokens']:,} tokens, {_size(sums['bytes'])}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count < 10**9 else f"{count / 1e9:,.1f} GB"
