"""`blocktune data mix`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands.data.options import Counter, tokenizer_of
from blocktune.commands.options import teach


def add_to(group: typer.Typer) -> None:
    """Registers the command."""
    group.command(
        "mix",
        epilog=teach(
            "blocktune data mix mixture.yaml",
            "blocktune data mix mixture.yaml --tokenizer M -o mixed.jsonl",
            "A mixture in YAML: every example of two sources, one of them in both modes:",
            "  draw: duplication        # or sampling, with size: 10000 and weights as shares",
            "  seed: 0",
            "  parts:",
            "    - {source: '2wikimultihopqa?split=train', mode: both, limit: 20000}",
            "    - {source: 'tulu-3?split=train', mode: full, weight: 0.5, chunker: message}",
            "  A part may also hold augment: {shuffle: true, num_chunks: [4, 10]}.",
        ),
    )(mix)


def mix(
    mixture: Annotated[Path, typer.Argument(help="YAML file of the mixture.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the examples, JSON lines.")
    ] = None,
    tokenizer: Counter = None,
) -> None:
    """Draw a mixture of sources and say what each part gives, in block and in full attention."""
    from blocktune.data.mixture import load_mixture
    from blocktune.data.mixture import mix as draw

    read = load_mixture(mixture)
    mixed = draw(read, tokenizer=tokenizer_of(tokenizer))
    _print(mixed, mixture)
    if output is not None:
        _write(mixed, output, [part.source for part in read.parts])


def _print(mixed, mixture: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("source", title=str(mixture))
    for name in ("loaded", "block", "full", "share", "epochs"):
        table.add_column(name, justify="right")
    total = len(mixed.examples)
    for part in mixed.parts:
        numbers = (f"{part.loaded:,}", f"{part.block:,}", f"{part.full:,}")
        share = (part.block + part.full) / total
        table.add_row(part.source, *numbers, f"{share:.1%}", f"{part.epochs:.2f}")
    block, full = (sum(getattr(part, mode) for part in mixed.parts) for mode in ("block", "full"))
    table.add_row("in all", "", f"{block:,}", f"{full:,}", "100.0%", "")
    Console().print(table)


def _write(mixed, output: Path, sources: list[str]) -> None:
    from dataclasses import replace

    from blocktune.data import write_jsonl
    from blocktune.data.attribution import credited
    from blocktune.files import replacing

    def marked():
        for item in mixed.examples:
            [example] = credited([item.example], sources[item.part])
            yield replace(example, meta=example.meta | {"mode": item.mode})

    with replacing(output) as temporary:
        count = write_jsonl(temporary, marked())
    typer.echo(f'wrote {count:,} examples to {output}, each with its mode in "meta"')
