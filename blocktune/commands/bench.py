"""`blocktune bench`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands.options import AsJson, teach

Tokens = Annotated[int, typer.Option(min=2, help="Length of the prompt, in tokens.")]
ChunkTokens = Annotated[int, typer.Option(min=1, help="Tokens per chunk.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")]
Output = Annotated[Path | None, typer.Option(help="JSON file to write as well.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="A toy model and prompt, for a quick try.")]


def add_to(app: typer.Typer) -> None:
    """Registers the group."""
    group = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
    group.command("attention", epilog=teach("blocktune bench attention --json"))(attention)
    group.command(
        "reuse",
        epilog=teach(
            "blocktune bench reuse --tokens 4096 --repeats 3 --output out/reuse.json",
            "blocktune bench reuse --tiny   # takes seconds",
        ),
    )(reuse)
    group.command(
        "loading",
        epilog=teach(
            "blocktune bench loading --folder /mnt/slow   # the disk to measure",
            "blocktune bench loading --tiny --json",
        ),
    )(loading)
    app.add_typer(group, name="bench")


def attention(
    tokens: Tokens = 8192,
    chunk: ChunkTokens = 512,
    repeats: Repeats = 5,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time split attention, forward and backward, against full causal and dense-mask SDPA."""
    from blocktune.bench import bench_attention

    _show(bench_attention(tokens, chunk, repeats), as_json, output)


def reuse(
    tokens: Tokens = 8192,
    chunk: ChunkTokens = 512,
    repeats: Repeats = 5,
    tiny: Tiny = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time cacheblend, epic and naive reuse of cached chunks against a full prefill."""
    from blocktune.bench import TINY, ReuseBench, bench_reuse

    setting = replace(TINY, repeats=repeats) if tiny else ReuseBench(tokens, chunk, repeats=repeats)
    _show(bench_reuse(setting), as_json, output)


def loading(
    tokens: Tokens = 8192,
    chunk: ChunkTokens = 512,
    repeats: Repeats = 5,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the chunks. Default: the system's temporary one."),
    ] = None,
    tiny: Tiny = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time cacheblend with chunks on disk: loaded before computing, or while computing."""
    from blocktune.bench import LOADING, TINY, bench_loading

    setting = TINY if tiny else replace(LOADING, tokens=tokens, chunk=chunk)
    _show(bench_loading(replace(setting, repeats=repeats), folder), as_json, output)


def _show(found: dict, as_json: bool, output: Path | None) -> None:
    from blocktune.files import replace_json

    if output is not None:
        replace_json(output, found)
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


def _lines(found: dict, indent: str = "") -> list[str]:
    """Names and values, mappings as indented blocks."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"{indent}{name}: {shown}")
    return lines
