"""`blocktune data answer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blocktune.commands.data.options import Limit, Output, Source, Split
from blocktune.commands.options import Adapter, Device, Dtype, Model, load_engine, teach

if TYPE_CHECKING:
    from blocktune.data import RagExample
    from blocktune.data.regenerate import Regenerated
    from blocktune.engine import Engine, Sampling

Ask = Callable[[Sequence["RagExample"], int], list[str]]
"""``(batch, its number) -> answers``."""


def add_to(group: typer.Typer) -> None:
    """Registers the command."""
    group.command(
        "answer",
        epilog=teach(
            "blocktune data answer train.jsonl --model M -o own-words.jsonl",
            "blocktune data answer '2wikimultihopqa?split=train' --limit 2000 -m M -o w.jsonl",
            "blocktune data answer q.jsonl -m M -o a.jsonl --temperature 0.7 --only-correct",
            "A run that was stopped goes on where it was: repeat the command.",
        ),
    )(answer)


def answer(
    source: Source,
    output: Output,
    model: Model = None,
    adapter: Adapter = None,
    limit: Limit = None,
    split: Split = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy; KVLink took 0.7.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from so much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 16,
    only_correct: Annotated[
        bool,
        typer.Option("--only-correct", help="Leave out answers that mention no accepted one."),
    ] = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Let a model write the answers that it will be trained on, reading all chunks in full."""
    engine = load_engine(model, adapter, None, dtype, device)
    from blocktune.data import load_examples
    from blocktune.data.attribution import credited
    from blocktune.engine import Sampling

    loaded = load_examples(source, limit=limit, split=split, tokenizer=engine.tokenizer)
    examples = list(credited(loaded, source))
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    facts = {"model": model, "adapter": adapter, "weights": engine.fingerprint}
    facts |= {"max_new_tokens": max_new_tokens, "temperature": temperature}
    facts |= {"top_p": top_p, "seed": seed}
    done = _regenerated(
        examples,
        _asking(engine, sampling, max_new_tokens),
        output,
        facts={key: value for key, value in facts.items() if value is not None},
        batch_size=batch_size,
        only_correct=only_correct,
    )
    typer.echo(
        f"wrote {done.written:,} examples to {output} ({done.resumed:,} answered before, "
        f"{done.empty:,} empty and {done.wrong:,} wrong ones left out)"
    )


def _asking(engine: Engine, sampling: Sampling, max_new_tokens: int) -> Ask:
    """How a batch is answered; its number moves the seed, else every batch would draw alike."""

    def ask(batch: Sequence[RagExample], number: int) -> list[str]:
        answers = engine.answer(
            batch,
            "full-prefill",
            max_new_tokens=max_new_tokens,
            sampling=replace(sampling, seed=sampling.seed + number),
            batch_size=len(batch),
        )
        return [answer.text for answer in answers]

    return ask


def _regenerated(examples: Sequence[RagExample], ask: Ask, output: Path, **how: Any) -> Regenerated:
    """Runs `regenerate` under a progress bar."""
    from rich.console import Console
    from rich.progress import Progress

    from blocktune.data.regenerate import regenerate

    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("answering", total=len(examples))
        return regenerate(
            examples,
            ask,
            output,
            on_batch=lambda count: progress.update(bar, completed=count),
            **how,
        )
