"""What `blocktune answer` does: read questions, ask the engine, show answers and their cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text

from blocktune.cache import ChunkStore
from blocktune.data import RagExample, load_examples
from blocktune.engine import Answer, Engine, Sampling, Usage
from blocktune.files import replace_text
from blocktune.methods import Method, parse_method
from blocktune.prompt import Chunk, show


def read_examples(
    source: str | None, limit: int | None, question: str | None, chunks: Sequence[str]
) -> list[RagExample]:
    """The questions, from a source or from the command line.

    Raises:
        ValueError: If both or none are given, there is no chunk, or the source is wrong.
    """
    if (source is None) == (question is None):
        raise ValueError("give either --input FILE or --question Q with --chunk TEXT, not both")
    if source is not None:
        if chunks:
            raise ValueError("--chunk belongs to --question; chunks of --input stand in the file")
        if examples := load_examples(source, limit=limit):
            return examples
        raise ValueError(f"{source}: no question in it")
    if not chunks:
        raise ValueError("a question needs at least one chunk; add --chunk TEXT")
    return [RagExample(question, tuple(Chunk(text) for text in chunks))]


def build_method(name: str, parameters: Sequence[str]) -> Method:
    """Builds a method from what one says of it and ``name=value`` pairs, read as YAML.

    Raises:
        ValueError: If one is not a pair, or the method refuses it.
    """
    values = {}
    for parameter in parameters:
        key, equals, value = parameter.partition("=")
        if not equals:
            raise ValueError(f"--param must be name=value, got '{parameter}'")
        values[key] = yaml.safe_load(value)
    return parse_method(name, values)


def build_sampling(temperature: float, top_k: int, top_p: float, seed: int) -> Sampling:
    """How tokens are picked."""
    return Sampling(temperature, top_k, top_p, seed)


def answer_all(
    engine: Engine, examples: Sequence[RagExample], method: Method, *, batch_size: int, **decoding
) -> list[Answer]:
    """Answers in batches, with a progress bar where there are several.

    Raises:
        ValueError: Before the first answer, if any prompt does not fit into the model's context.
    """
    make = engine.prompts
    for example in examples:
        make.prompt(make.pieces(example, method), make.spec(method), decoding["max_new_tokens"])
    starts = range(0, len(examples), batch_size)
    console = Console(stderr=True)
    answers: list[Answer] = []
    for start in track(starts, "answering", console=console, disable=len(starts) == 1):
        batch = examples[start : start + batch_size]
        answers += engine.answer(batch, method, batch_size=batch_size, **decoding)
    return answers


def print_prompts(engine: Engine, examples: Sequence[RagExample], method: Method) -> None:
    """Prints every row of the prompts as the model sees them."""
    make = engine.prompts
    for example in examples:
        prompt = make.prompt(make.pieces(example, method), make.spec(method))
        typer.echo(show(engine.tokenizer, prompt) + "\n")


def print_stream(pieces: Iterator[str]) -> None:
    """Prints pieces of text as they come."""
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


def holds_chunks(folder: Path) -> bool:
    """Whether chunks were encoded into a folder before."""
    return next(folder.glob("*/*/*.safetensors"), None) is not None


def tell_store(store: ChunkStore, held: bool) -> None:
    """Says on standard error what a folder of chunks was good for.

    Args:
        store: That the answers were made from.
        held: Whether its folder held chunks before.
    """
    if store.folder is None:
        return
    stats = store.stats()
    line = f"{stats.disk_hits:,} chunks read from {store.folder}, {stats.misses:,} encoded anew"
    if held and stats.misses and not stats.disk_hits:
        line += (
            "; those that it held are other passages, or of another model, adapter, dtype, "
            "quantisation or wording"
        )
    typer.echo(line, err=True)


def deliver(
    examples: Sequence[RagExample],
    answers: Sequence[Answer],
    method: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Writes answers to a file, or prints them as JSON lines or as panels."""
    pairs = list(zip(examples, answers, strict=True))
    lines = [json.dumps(_record(e, a, method), ensure_ascii=False) for e, a in pairs]
    if output is not None:
        replace_text(output, "".join(line + "\n" for line in lines))
        typer.echo(f"wrote {len(lines):,} answers to {output}")
    elif as_json:
        typer.echo("\n".join(lines))
    else:
        console = Console()
        for example, answer in pairs:
            console.print(_panel(example, answer, method))


def _record(example: RagExample, answer: Answer, method: str) -> dict[str, Any]:
    usage = answer.usage
    derived = {"recompute_ratio": usage.recompute_ratio, "ttft_s": usage.ttft_s}
    return {
        "id": example.id,
        "question": example.question,
        "answer": answer.text,
        "method": method,
        "usage": asdict(usage) | derived,
    }


def _panel(example: RagExample, answer: Answer, method: str) -> Panel:
    text = Text(answer.text or "(no text)", style="bold")
    return Panel(
        Group(Text(example.question, style="dim"), text, "", _usage_table(answer.usage)),
        title=method,
        title_align="left",
        width=min(100, Console().width),
    )


def _usage_table(usage: Usage) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    per_layer = ", ".join(map(str, usage.layer_tokens))
    times = {
        name.removesuffix("_s").replace("_", " "): f"{1000 * seconds:.1f}"
        for name, seconds in asdict(usage.ttft).items()
        if seconds
    }
    table.add_row("context", f"{usage.context_tokens:,} of {usage.prompt_tokens:,} tokens")
    table.add_row("recomputed", f"{usage.recompute_ratio:.1%} (tokens per layer: {per_layer})")
    table.add_row("chunks", f"{usage.chunk_hits} cached, {usage.chunk_misses} encoded now")
    table.add_row("read", f"{usage.bytes_read / 1e6:,.2f} MB")
    split = ", ".join(f"{name} {value}" for name, value in times.items())
    table.add_row("first token", f"{1000 * usage.ttft_s:.1f} ms ({split})")
    return table
