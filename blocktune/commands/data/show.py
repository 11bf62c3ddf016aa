"""`blocktune data show`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from blocktune.commands.data.options import Source, Split, tokenizer_of
from blocktune.commands.options import teach


class Mode(StrEnum):
    """The attention that the rows are shown for."""

    block = "block"
    full = "full"


def add_to(group: typer.Typer) -> None:
    """Registers the command."""
    group.command(
        "show",
        epilog=teach(
            "blocktune data show musique --index 3",
            "blocktune data show 'worlds:train?n=5' --model data/tiny",
            "blocktune data show chat.jsonl --model M --adapter out/kvlink",
        ),
    )(show)


def show(
    source: Source,
    index: Annotated[int, typer.Option(min=0, help="Which example, from 0.")] = 0,
    split: Split = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Show the rows that this model gets.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="With the wording and layout of this adapter.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Attention in which the example is laid out.")] = (
        Mode.block
    ),
) -> None:
    """Show one example: as text, or with --model row by row as the model sees it."""
    if adapter is not None and model is None:
        raise ValueError("--adapter says how rows are laid out; add --model, whose tokens they are")
    tokenizer = tokenizer_of(model)
    from blocktune.data import load_examples

    examples = load_examples(source, limit=index + 1, split=split, tokenizer=tokenizer)
    if len(examples) <= index:
        raise ValueError(f"{source} has {len(examples)} examples; --index starts from 0")
    if tokenizer is None:
        _as_text(examples[index])
    else:
        _as_rows(examples[index], tokenizer, adapter, mode)


def _as_text(example) -> None:
    facts = [("id", example.id), ("kind", example.kind)]
    typer.echo("  ".join(f"{name}: {value}" for name, value in facts if value))
    for number, chunk in enumerate(example.chunks):
        mark = ", evidence" if number in example.supporting else ""
        title = f"{chunk.title}\n" if chunk.title else ""
        typer.echo(f"[chunk {number}{mark}]\n{title}{chunk.text}")
    typer.echo(f"[question]\n{example.question}")
    typer.echo(f"[accepted answers]\n{' | '.join(example.answers) or '(unknown)'}")
    if example.response is not None:
        typer.echo(f"[the model writes]\n{example.response}")


def _as_rows(example, tokenizer, adapter: str | None, mode: Mode) -> None:
    from dataclasses import replace

    from blocktune.adapter import AdapterInfo
    from blocktune.prompt import LayoutSpec, PromptFormat, lay_out, make_pieces
    from blocktune.prompt import batch as rows_of

    info = AdapterInfo.load(adapter) if adapter else None
    fmt = info.format if info else PromptFormat()
    spec = info.layout if info and mode == Mode.block else LayoutSpec(block=mode == Mode.block)
    if spec.num_blanks:  # blanks are hidden rows of serving, and no example's own
        spec = replace(spec, num_blanks=0)
    known = example.response is not None or example.answers
    target = example.target if known else None
    pieces = make_pieces(
        tokenizer,
        fmt,
        example.chunks,
        example.question,
        target,
        block=mode == Mode.block,
        followups=example.followups,
    )
    prompt = lay_out(pieces, spec, link_base=len(tokenizer), bos_id=tokenizer.bos_token_id)
    typer.echo(rows_of(tokenizer, prompt))
    total = pieces.num_tokens
    typer.echo(f"\n{total:,} tokens in {len(pieces.chunks)} chunks; {len(prompt.ids):,} rows")
