"""`blocktune answer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands.options import (
    PROMPT,
    Adapter,
    AsJson,
    Device,
    Dtype,
    Format,
    Instruction,
    Limit,
    Model,
    Quantize,
    Store,
    System,
    load_engine,
    reworded,
    teach,
)

DECODING = "Decoding"


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "answer",
        epilog=teach(
            "blocktune answer -m data/tiny -q 'Where is Anna?' -c 'Anna is in Kirby.'",
            "blocktune answer -m M -i q.jsonl --method cacheblend --param ratio=0.3",
            "blocktune answer -m M -i q.jsonl --adapter A --method 'kvlink + deviation 15 %'",
            "blocktune answer -m M -i q.jsonl --system 'Be brief.' -o answers.jsonl",
            "Encode chunks once, reuse them in later runs, and write the answers to a file:",
            "blocktune answer -m M --adapter out/block --method block-attention",
            "    --store cache/ -i questions.jsonl -o answers.jsonl",
            "A stopped command that writes to a file continues where it stopped: repeat it.",
        ),
    )(answer)


def answer(
    question: Annotated[
        str | None,
        typer.Option("--question", "-q", help="One question.", rich_help_panel=PROMPT),
    ] = None,
    chunk: Annotated[
        list[str] | None,
        typer.Option(
            "--chunk", "-c", help="A passage for --question; repeatable.", rich_help_panel=PROMPT
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--input",
            "-i",
            help="Questions with their chunks: JSONL or any data source.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    limit: Limit = None,
    instruction: Instruction = None,
    system: System = None,
    wording: Format = None,
    show_prompt: Annotated[
        bool,
        typer.Option(
            "--show-prompt", help="Print the prompt, row by row, first.", rich_help_panel=PROMPT
        ),
    ] = False,
    model: Model = None,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = None,
    method: Annotated[
        str, typer.Option(help="Reuse method, see `blocktune methods`; 'A + B 15 %' composes.")
    ] = "naive",
    param: Annotated[
        list[str] | None, typer.Option(help="Parameter of the method, as name=value; repeatable.")
    ] = None,
    store: Store = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="JSONL file for the answers, written as they come. Questions that it already "
            "answers are skipped.",
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print one answer while it is generated.")
    ] = False,
    as_json: AsJson = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=DECODING)
    ] = 32,
    temperature: Annotated[
        float,
        typer.Option(
            help="0 picks the likeliest token; higher values sample more evenly.",
            rich_help_panel=DECODING,
        ),
    ] = 0.0,
    top_k: Annotated[
        int,
        typer.Option(
            help="Sample from the K likeliest tokens; 0: from all.", rich_help_panel=DECODING
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Nucleus sampling: keep tokens up to this cumulative probability.",
            rich_help_panel=DECODING,
        ),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Random seed for sampling.", rich_help_panel=DECODING)
    ] = 0,
) -> None:
    """Answer questions from separately cached chunks, and report what each answer cost."""
    from blocktune.commands import answering as ways

    examples = ways.read_examples(source, limit, question, chunk or [])
    if stream and (len(examples) > 1 or output or as_json):
        raise ValueError("--stream prints one answer; leave out --output and --json")
    built = ways.build_method(method, param or [])
    sampling = ways.Sampling(temperature, top_k, top_p, seed)
    held = store is not None and ways.holds_chunks(store)
    engine = load_engine(model, adapter, store, dtype, device, quantize)
    engine = reworded(engine, instruction, system, wording)
    run = ways.Run(engine, built, max_new_tokens, sampling, batch_size)
    run.require_room(examples)
    if show_prompt:
        run.print_prompts(examples)
    if stream:
        run.print_stream(examples[0])
    elif output is not None:
        run.write(examples, output, [" ".join(method.split()), *(param or [])])
    else:
        run.print_answers(examples, as_json)
    ways.report_store(engine.store, held)
