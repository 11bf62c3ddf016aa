"""`blocktune data passages`."""

from __future__ import annotations

from itertools import repeat
from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands.data.options import Limit, Output, Source, Split
from blocktune.commands.options import quiet_libraries, teach


def add_to(group: typer.Typer) -> None:
    """Registers the command."""
    group.command(
        "passages",
        epilog=teach(
            "BM25 over a corpus, one {text, title} a line:",
            "blocktune data passages nq --split train --corpus wiki.jsonl -o nq.jsonl",
            "Your own retriever's file, one {id or question, passages} a line, best first:",
            "blocktune data passages questions.jsonl --retrieved dpr.jsonl -o out.jsonl",
            "The best of a question's own passages, such as TriviaQA's evidence:",
            "blocktune data passages triviaqa --own --k 10 -o triviaqa.jsonl",
        ),
    )(passages)


def passages(
    source: Source,
    output: Output,
    corpus: Annotated[
        Path | None, typer.Option(help="Search these passages by BM25; JSON lines.")
    ] = None,
    retrieved: Annotated[
        Path | None, typer.Option(help="Take the passages that your retriever found; JSON lines.")
    ] = None,
    own: Annotated[
        bool, typer.Option("--own", help="Keep the best of each question's own passages, by BM25.")
    ] = False,
    k: Annotated[int, typer.Option(min=1, help="Passages per question.")] = 10,
    answerable: Annotated[
        bool,
        typer.Option("--answerable", help="Leave out questions whose passages hold no answer."),
    ] = False,
    limit: Limit = None,
    split: Split = None,
) -> None:
    """Give questions their passages: by BM25, from your own retriever, or the best of their own."""
    if [corpus is not None, retrieved is not None, own].count(True) != 1:
        raise ValueError("give one of --corpus FILE, --retrieved FILE and --own")
    quiet_libraries()
    from blocktune.data import load_chunks, load_examples, retrieval, write_jsonl
    from blocktune.data.answers import holds_answer, is_verdict
    from blocktune.data.attribution import credited
    from blocktune.files import replacing

    whole = None
    if own:
        whole = list(credited(load_examples(source, limit=limit, split=split), source))
        examples = retrieval.from_own(whole, k)
    else:
        questions = retrieval.read_questions(source, limit=limit, split=split)
        if corpus is not None:
            examples = retrieval.from_corpus(questions, load_chunks(corpus), k)
        else:
            examples = retrieval.from_retriever(questions, retrieval.read_retrieved(retrieved), k)
    examples = list(examples)
    held = list(map(holds_answer, examples, whole or repeat(None)))
    kept = [e for e, holds in zip(examples, held, strict=True) if holds or not answerable]
    if not kept:
        raise ValueError(f"{source}: none of {len(examples)} questions is left; nothing is written")
    with replacing(output) as temporary:
        write_jsonl(temporary, kept)
    share = sum(held) / len(held)
    untold = sum(map(is_verdict, examples)) if whole is None else 0
    typer.echo(
        f"wrote {len(kept):,} questions to {output}; an answer stands in the passages of "
        f"{share:.1%} of {len(examples):,}"
        + (f" ({untold:,} ask for yes or no, which no passage tells)" if untold else "")
    )
