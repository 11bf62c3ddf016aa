"""`blocktune answer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands.options import (
    Adapter,
    AsJson,
    Device,
    Dtype,
    Model,
    Quantize,
    Store,
    load_engine,
    teach,
)


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "answer",
        epilog=teach(
            "blocktune answer -m data/tiny -q 'Where is Anna?' -c 'Anna is in Kirby.'",
            "blocktune answer -m M -i q.jsonl --method cacheblend --param ratio=0.3",
            "blocktune answer -m M -i q.jsonl --adapter A --method 'kvlink + deviation 15 %'",
            "blocktune answer -m M -i 'worlds:test?n=3' --method naive --show-prompt",
            "Chunks encoded once and read again, with an adapter; the answers go to a file:",
            "blocktune answer -m M --adapter out/block --method block-attention",
            "    --store cache/ -i questions.jsonl -o answers.jsonl",
        ),
    )(answer)


def answer(
    model: Model = None,
    adapter: Adapter = None,
    store: Store = None,
    method: Annotated[str, typer.Option(help="See `blocktune methods`; 'A + B 15 %' composes.")] = (
        "naive"
    ),
    param: Annotated[
        list[str] | None, typer.Option(help="Parameter of the method, as name=value; repeatable.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--input", "-i", help="Questions, JSONL or any data source.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file for the answers.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="One question.")] = None,
    chunk: Annotated[
        list[str] | None, typer.Option("--chunk", "-c", help="A passage to it; repeatable.")
    ] = None,
    show_prompt: Annotated[
        bool, typer.Option("--show-prompt", help="Print each row of the prompt first.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the answer while it is made.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from so much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 8,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Answer questions from chunks that are cached alone, and say what each answer cost."""
    from blocktune.commands import answering as ways

    examples = ways.read_examples(source, limit, question, chunk or [])
    if stream and (len(examples) > 1 or output or as_json):
        raise ValueError("--stream prints one answer; leave out --output and --json")
    built = ways.build_method(method, param or [])
    sampling = ways.build_sampling(temperature, top_k, top_p, seed)
    held = store is not None and ways.holds_chunks(store)
    engine = load_engine(model, adapter, store, dtype, device, quantize)
    if show_prompt:
        ways.print_prompts(engine, examples, built)
    decoding = {"max_new_tokens": max_new_tokens, "sampling": sampling}
    if stream:
        ways.print_stream(engine.stream(examples[0], built, **decoding))
        ways.tell_store(engine.store, held)
        return
    answers = ways.answer_all(engine, examples, built, batch_size=batch_size, **decoding)
    ways.deliver(examples, answers, built.name, output, as_json)
    ways.tell_store(engine.store, held)
