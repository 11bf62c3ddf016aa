"""`blocktune store`: what a folder of encoded chunks holds, and what is removed from it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blocktune.commands import app
from blocktune.commands.options import AsJson, teach

if TYPE_CHECKING:
    from blocktune.cache.folder import ChunkFolder, FileFacts

HELP = "Look into a folder of encoded chunks (`--store`), verify it, and remove from it."
SHORT = 12
"""Digits of a key or fingerprint that are shown."""
LEAST_DIGITS = 6
COUNTS = {"chunks": 0, "tokens": 0, "bytes": 0}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

Folder = Annotated[Path, typer.Argument(help="Folder of the store.")]
Model = Annotated[
    str, typer.Option("--model", metavar="FINGERPRINT", help="Only chunks of this model.")
]
Key = Annotated[str, typer.Argument(help="Key of the chunk; its first digits are enough.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")]


group = typer.Typer(
    no_args_is_help=True,
    help=HELP,
    rich_markup_mode="rich",
    epilog=teach(
        "blocktune store stat cache/",
        "blocktune store ls cache/ --model 3f2a91",
        "blocktune store verify cache/",
        "blocktune store gc cache/ --max-size 50GB --unused-days 30 --damaged",
        "blocktune store manifest cache/ --json",
    ),
)
app.add_typer(group, name="store")


@group.command()
def stat(folder: Folder, as_json: AsJson = False) -> None:
    """Chunks and bytes, by model."""
    files = _opened(folder)
    models: dict[str, dict[str, Any]] = {}
    unreadable = 0
    for _, facts in _listed(files):
        if facts is None:
            unreadable += 1
            continue
        of_model = models.setdefault(facts.header.get("fingerprint", ""), dict(COUNTS))
        of_model["chunks"] += 1
        of_model["tokens"] += facts.num_tokens
        of_model["bytes"] += facts.size
    for fingerprint, counts in models.items():
        counts["base"], counts["adapter"] = _names(files, fingerprint)
    total = {name: sum(model[name] for model in models.values()) for name in COUNTS}
    record = total | {"unreadable": unreadable, "models": models}
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    damaged = f", {unreadable:,} unreadable" if unreadable else ""
    typer.echo(f"{_counted(total)}, {len(models)} models{damaged}")
    for fingerprint, counts in models.items():
        adapter = f" + {counts['adapter']}" if counts["adapter"] else ""
        typer.echo(f"  {fingerprint[:SHORT]}  {_counted(counts)}  {counts['base']}{adapter}")


@group.command()
def ls(folder: Folder, model: Model = "", as_json: AsJson = False) -> None:
    """List chunks, one a line: key, kind, tokens, bytes, last use, model."""
    for key, facts in _listed(_opened(folder)):
        if facts is None or not facts.header.get("fingerprint", "").startswith(model):
            continue
        record = _record(key, facts)
        if as_json:
            typer.echo(json.dumps(record))
        else:
            typer.echo(
                f"{key[:SHORT]}  {record['kind']:8} {facts.num_tokens:>7,} tokens "
                f"{_size(facts.size):>9}  {record['used']}  {record['fingerprint'][:SHORT]}"
            )


@group.command()
def show(folder: Folder, key: Key, as_json: AsJson = False) -> None:
    """One chunk: header, token ids, and whether it is sound."""
    from blocktune.cache.chunk_file import ChunkFile

    files = _opened(folder)
    key = _whole(files, key)
    facts = files.facts(key)
    record = _record(key, facts)
    problem = _problem(files, key)
    record |= {"sound": problem is None, "problem": problem}
    record |= {"signed": "signature" in facts.header}
    if problem is None:
        record["token_ids"] = ChunkFile(files, key).token_ids.tolist()
    if as_json:
        typer.echo(json.dumps(record))
    else:
        for name, value in record.items():
            typer.echo(f"{name:12} {value}")


@group.command()
def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Read every file, compare it with its checksums (and signature); exit code 1 if one fails."""
    files = _opened(folder)
    problems, count = {}, 0
    for key in files.keys():  # noqa: SIM118
        count += 1
        if problem := _problem(files, key):
            problems[key] = problem
    if as_json:
        typer.echo(json.dumps({"chunks": count, "damaged": problems}, indent=2))
    else:
        for key, problem in problems.items():
            typer.echo(f"{key}: {problem}")
        signed = "" if files.secret is None else " and signed"
        typer.echo(f"{count - len(problems):,} of {count:,} chunks are sound{signed}")
    if problems:
        raise typer.Exit(1)


@group.command()
def gc(
    folder: Folder,
    max_size: Annotated[
        str | None, typer.Option(help="Such as 50GB: remove what was used longest ago.")
    ] = None,
    unused_days: Annotated[
        float | None, typer.Option(min=0, help="Remove entries not used for this many days.")
    ] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Remove what does not verify, or is not signed.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove what stopped writers left, and chunks by size, age or damage."""
    limit = None if max_size is None else _bytes(max_size)
    files = _opened(folder)
    unfinished = 0 if dry_run else files.clean()
    kept, doomed = [], {}
    for key, facts in _listed(files):
        if damaged and _problem(files, key):
            doomed[key] = 0 if facts is None else facts.size
        elif facts is not None:
            kept.append((facts.used, key, facts.size))
    kept.sort()
    total = sum(size for _, _, size in kept)
    oldest = None if unused_days is None else time.time() - unused_days * 86400
    for used, key, size in kept:
        if (oldest is not None and used < oldest) or (limit is not None and total > limit):
            doomed[key] = size
            total -= size
    _remove(files, doomed, dry_run, as_json, {"unfinished": unfinished})


@group.command()
def rm(
    folder: Folder,
    keys: Annotated[list[str] | None, typer.Argument(help="Keys, or their first digits.")] = None,
    model: Model = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove chunks by their keys, or all of a model."""
    files = _opened(folder)
    if bool(keys) == bool(model):
        raise ValueError("give either keys of chunks or --model FINGERPRINT")
    wanted = [_whole(files, key) for key in keys or ()]
    doomed = {key: facts.size if facts else 0 for key, facts in _listed(files) if key in wanted}
    if model:
        fingerprint = _one(model, _fingerprints(files), "model")
        for key, facts in _listed(files):
            if facts is not None and facts.header.get("fingerprint") == fingerprint:
                doomed[key] = facts.size
    _remove(files, doomed, dry_run, as_json, {})


@group.command()
def manifest(folder: Folder, model: Model = "", as_json: AsJson = False) -> None:
    """What other programs need to use the chunks: model, tokenizer, wording, shapes, RoPE."""
    files = _opened(folder)
    wanted = [one for one in files.fingerprints() if one.startswith(model)]
    if not wanted:
        raise ValueError(
            f"no manifest{f' of {model}' if model else ''} in '{folder}'; "
            "`blocktune encode` and `answer --store` write one for each model"
        )
    records = [files.manifest(fingerprint) for fingerprint in wanted]
    if as_json:
        typer.echo(json.dumps(records, indent=2, ensure_ascii=False))
        return
    for record in records:
        for name, value in record.items():
            text = json.dumps(value, ensure_ascii=False)
            typer.echo(f"{name:14} {text if len(text) <= 300 else text[:300] + ' ... (--json)'}")
        typer.echo()


def _opened(folder: Path) -> ChunkFolder:
    from blocktune.cache.folder import ChunkFolder, secret_from_environment

    if not folder.is_dir():
        raise ValueError(f"no store at '{folder}'; `blocktune encode --store` makes one")
    return ChunkFolder(folder, secret_from_environment())


def _listed(files: ChunkFolder) -> Iterator[tuple[str, FileFacts | None]]:
    """All chunks; None for a header that cannot be read."""
    for key in files.keys():  # noqa: SIM118
        try:
            yield key, files.facts(key)
        except FileNotFoundError:  # another process removed it
            continue
        except (OSError, ValueError):
            yield key, None


def _problem(files: ChunkFolder, key: str) -> str | None:
    from blocktune.cache.chunk_file import ChunkFile

    try:
        ChunkFile(files, key).verify()
    except FileNotFoundError:
        return None
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def _remove(
    files: ChunkFolder, doomed: dict[str, int], dry_run: bool, as_json: bool, more: dict[str, int]
) -> None:
    removed = {key: size for key, size in doomed.items() if dry_run or files.remove(key)}
    record = {"chunks": len(removed), "bytes": sum(removed.values()), "dry_run": dry_run} | more
    if as_json:
        typer.echo(json.dumps(record | {"keys": list(removed)}))
        return
    left = f", {more['unfinished']:,} unfinished files" if more.get("unfinished") else ""
    verb = "would remove" if dry_run else "removed"
    typer.echo(f"{verb} {len(removed):,} chunks ({_size(record['bytes'])}){left}")


def _whole(files: ChunkFolder, start: str) -> str:
    whole = len(start) == 64 and files.has(start)
    return start if whole else _one(start, files.keys(), "chunk")


def _one(start: str, among: Iterator[str] | list[str], what: str) -> str:
    if not re.fullmatch(rf"[0-9a-f]{{{LEAST_DIGITS},64}}", start):
        raise ValueError(f"a {what} is named by {LEAST_DIGITS} to 64 hex digits, got '{start}'")
    found = [one for one in among if one.startswith(start)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} of the store's {what}s begin with '{start}'; see `ls`")
    return found[0]


def _fingerprints(files: ChunkFolder) -> list[str]:
    facts = (facts for _, facts in _listed(files) if facts is not None)
    return sorted({one.header.get("fingerprint", "") for one in facts})


def _names(files: ChunkFolder, fingerprint: str) -> tuple[str, str | None]:
    try:
        record = files.manifest(fingerprint)
    except (OSError, ValueError):
        record = None
    if record is None:
        return "(no manifest)", None
    return record["base"]["name"], record["adapter"] and record["adapter"]["name"]


def _record(key: str, facts: FileFacts) -> dict[str, Any]:
    return {
        "key": key,
        "kind": facts.header.get("kind", ""),
        "tokens": facts.num_tokens,
        "bytes": facts.size,
        "used": time.strftime("%Y-%m-%d %H:%M", time.localtime(facts.used)),
        "fingerprint": facts.header.get("fingerprint", ""),
    }


def _counted(counts: dict[str, Any]) -> str:
    return f"{counts['chunks']:,} chunks, {counts['tokens']:,} tokens, {_size(counts['bytes'])}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count < 10**9 else f"{count / 1e9:,.1f} GB"


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kmgt]?)b?", text.strip().lower())
    if not found:
        raise ValueError(f"a size is a number with kB, MB, GB or TB, got '{text}'")
    return int(float(found[1]) * _UNITS[found[2]])
