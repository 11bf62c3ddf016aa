"""`blocktune encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands.errors import resumable
from blocktune.commands.options import (
    PROMPT,
    Adapter,
    Device,
    Dtype,
    Format,
    Instruction,
    Model,
    Quantize,
    System,
    load_engine,
    rejected,
    reworded,
    teach,
)


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "encode",
        epilog=teach(
            "blocktune encode --input docs.jsonl --store cache/ --model data/tiny",
            "blocktune encode --input questions.jsonl --store cache/ --model M --adapter out/block",
            'A line of docs.jsonl: {"text": "...", "title": "..."}, or a question with "chunks".',
            "A stopped command continues where it stopped: repeat it.",
        ),
    )(encode)


def encode(
    documents: Annotated[
        Path,
        typer.Option("--input", "-i", help="Chunks or questions, JSONL.", rich_help_panel=PROMPT),
    ],
    store: Annotated[Path, typer.Option(help="Folder for the encoded chunks.")],
    instruction: Instruction = None,
    system: System = None,
    wording: Format = None,
    model: Model = None,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = None,
) -> None:
    """Encode chunks ahead of time into a folder that `answer --store` reads."""
    from rich.console import Console

    from blocktune.cache import ChunkStore
    from blocktune.data import load_chunks

    chunks = load_chunks(documents)
    if not chunks:
        raise ValueError(f"{documents}: no chunk in it; give one per line")
    # Before a model is loaded; on the CPU, since nothing is read back.
    kept = ChunkStore(folder=store, must_write=True)
    engine = load_engine(model, adapter, kept, dtype, device, quantize)
    engine = reworded(engine, instruction, system, wording)
    status = Console(stderr=True).status(f"encoding {len(chunks):,} chunks")
    with resumable(f"the chunks so far are in {store}"), status:
        report = engine.encode(chunks)
    known = report.num_chunks - report.num_encoded
    stats = kept.stats()
    written = stats.disk_bytes_written
    each = f", {written / report.num_tokens / 1e3:,.1f} kB a token" if report.num_tokens else ""
    typer.echo(
        f"encoded {report.num_encoded:,} chunks ({report.num_tokens:,} tokens) in "
        f"{report.encode_s:.1f} s, {known:,} were there; {written / 1e6:,.1f} MB written to "
        f"{store}{each}"
    )
    if problem := rejected(stats, store):
        typer.echo(problem, err=True)
