"""`blocktune data passages`, `answer` and `mix`: make training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option, echo

from blocktune.commands import data
from blocktune.commands import options as opt
from blocktune.commands.application import command, resumable
from blocktune.commands.data import Counter, Fields, Limit, Output, Source, Split, group

if TYPE_CHECKING:
    from blocktune.data import RagExample


@command(
    "passages",
    "BM25 over a corpus, one passage a record:",
    "blocktune data passages nq --split train --corpus wiki.jsonl -o nq.jsonl",
    "Your own retriever's file, one {id or question, passages} a line, best first:",
    "blocktune data passages questions.jsonl --retrieved dpr.jsonl -o out.jsonl",
    "The best of a question's own passages, such as TriviaQA's evidence:",
    "blocktune data passages triviaqa --own --k 10 -o triviaqa.jsonl",
    of=group,
)
def passages(
    source: Source,
    output: Output,
    corpus: Annotated[
        Path | None, Option(help="Search these passages by BM25: a file of passages.")
    ] = None,
    retrieved: Annotated[
        Path | None, Option(help="Take the passages that your retriever found: a file.")
    ] = None,
    own: Annotated[
        bool, Option("--own", help="Keep the best of each question's own passages, by BM25.")
    ] = False,
    embedder: Annotated[
        str | None,
        Option(
            metavar="MODEL",
            help="Search --corpus by sentence embeddings of this model instead of BM25, such as "
            "sentence-transformers/all-MiniLM-L6-v2.",
        ),
    ] = None,
    store: Annotated[
        str | None,
        Option(metavar="PLACE[,NAME=VALUE...]", help="Keep the embeddings, as `answer --store`."),
    ] = None,
    k: Annotated[int, Option(min=1, help="Passages per question.")] = 10,
    answerable: Annotated[
        bool, Option("--answerable", help="Leave out questions whose passages hold no answer.")
    ] = False,
    limit: Limit = None,
    split: Split = None,
    fields: Fields = None,
) -> None:
    """Give questions their passages: by BM25, from your own retriever, or the best of their own."""
    if [corpus is not None, retrieved is not None, own].count(True) != 1:
        raise ValueError("give one of --corpus FILE, --retrieved FILE and --own")
    if (embedder is not None and corpus is None) or (store is not None and embedder is None):
        raise ValueError("--embedder searches --corpus, and --store keeps what it embeds")
    opt.quiet_libraries()
    from blocktune.data import load_chunks, retrieval
    from blocktune.data.sources.options import with_fields

    whole = embed = None
    if embedder is not None:
        from blocktune.cache import ChunkStore
        from blocktune.cache.records import Embedder

        embed = Embedder(embedder, store and ChunkStore.open(store))
    if own:
        whole = data.load_from(source, fields, limit=limit, split=split)
        examples = list(retrieval.from_own(whole, k))
    else:
        mapped = with_fields(source, fields)
        questions = retrieval.read_questions(mapped, limit=limit, split=split)
        if corpus is not None:
            examples = retrieval.from_corpus(questions, load_chunks(corpus), k, embed)
        else:
            examples = list(retrieval.from_retriever(questions, retrieved, k))
    _write_found(source, output, examples, whole, answerable)


def _write_found(
    source: str,
    output: Path,
    examples: list[RagExample],
    whole: list[RagExample] | None,
    answerable: bool,
) -> None:
    """Writes questions with their passages; ``whole``: the same with all of their own."""
    from blocktune.data.answers import holds_answer, is_verdict

    held = list(map(holds_answer, examples, whole or repeat(None)))
    kept = [e for e, holds in zip(examples, held, strict=True) if holds or not answerable]
    if not kept:
        raise ValueError(f"{source}: none of {len(examples)} questions is left; nothing is written")
    data.write_lines(output, kept)
    untold = sum(map(is_verdict, examples)) if whole is None else 0
    echo(
        f"wrote {len(kept):,} questions to {output}; an answer is found in the passages of "
        f"{sum(held) / len(held):.1%} of {len(examples):,}"
        + (f" ({untold:,} ask for yes or no, which no passage tells)" if untold else "")
    )


@command(
    "answer",
    "blocktune data answer train.jsonl --model M -o own-words.jsonl",
    "blocktune data answer '2wikimultihopqa?split=train' --limit 2000 -m M -o w.jsonl",
    "blocktune data answer q.jsonl -m M -o a.jsonl --temperature 0.7 --only-correct",
    "To continue a run that was stopped, repeat the command.",
    of=group,
)
def answer(
    source: Source,
    output: Output,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    limit: Limit = None,
    split: Split = None,
    fields: Fields = None,
    max_new_tokens: opt.MaxNewTokens = 200,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    seed: opt.Seed = 0,
    batch_size: opt.BatchSize = 16,
    only_correct: Annotated[
        bool, Option("--only-correct", help="Leave out answers that mention no accepted one.")
    ] = False,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
) -> None:
    """Let a model write the answers that it will be trained on, reading all chunks in full."""
    from blocktune.methods import build

    full = build("full-prefill")
    engine = opt.load_engine(model, adapter, None, dtype, device, method=full)
    from rich.console import Console
    from rich.progress import Progress

    from blocktune.data.answers import regenerate
    from blocktune.engine import Sampling

    examples = data.load_from(source, fields, limit=limit, split=split, tokenizer=engine.tokenizer)
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    facts = {"model": model, "adapter": adapter, "weights": engine.fingerprint}
    facts |= {"max_new_tokens": max_new_tokens, "temperature": temperature}
    facts |= {"top_p": top_p, "seed": seed}

    def ask(batch: Sequence[RagExample], number: int) -> list[str]:
        """Answers a batch; its number moves the seed, or every batch would draw alike."""
        drawn = replace(sampling, seed=sampling.seed + number)
        length = {"max_new_tokens": max_new_tokens, "batch_size": len(batch)}
        return [a.text for a in engine.answer(batch, full, sampling=drawn, **length)]

    kept = resumable(f"the answers so far are in {output}.part")
    with kept, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("answering", total=len(examples))
        done = regenerate(
            examples,
            ask,
            output,
            facts={key: value for key, value in facts.items() if value is not None},
            batch_size=batch_size,
            only_correct=only_correct,
            on_batch=lambda count: progress.update(bar, completed=count),
        )
    echo(
        f"wrote {done.written:,} examples to {output} ({done.resumed:,} answered before, "
        f"{done.empty:,} empty and {done.wrong:,} wrong ones left out)"
    )


@command(
    "mix",
    "blocktune data mix mixture.yaml",
    "blocktune data mix mixture.yaml --tokenizer M -o mixed.jsonl",
    "A mixture in YAML: every example of two sources, one of them in both modes:",
    "  draw: duplication        # or sampling, with size: 10000 and weights as shares",
    "  seed: 0",
    "  parts:",
    "    - {source: '2wikimultihopqa?split=train', mode: both, limit: 20000}",
    "    - {source: 'tulu-3?split=train', mode: full, weight: 0.5, chunker: message}",
    "  A part may also hold augment: {shuffle: true, num_chunks: [4, 10]}.",
    of=group,
)
def mix(
    mixture: Annotated[Path, Argument(help="YAML file of the mixture.")],
    output: Annotated[
        Path | None, opt.in_file("--output", "-o", help="Also write the examples, JSON lines.")
    ] = None,
    tokenizer: Counter = None,
) -> None:
    """Draw a mixture of sources and say what each part gives, in block and in full attention."""
    from blocktune.data.mixture import load_mixture
    from blocktune.data.mixture import mix as draw
    from blocktune.data.sources.catalog import with_data_sets
    from blocktune.tables import Table

    read = load_mixture(mixture)
    mixed = draw(read, tokenizer=data.tokenizer_of(tokenizer))
    total = len(mixed.examples)
    rows = []
    for source, loaded, block, full, epochs in mixed.parts:
        share = f"{(block + full) / total:.1%}"
        rows.append((source, f"{loaded:,}", f"{block:,}", f"{full:,}", share, f"{epochs:.2f}"))
    block, full = (f"{sum(getattr(p, mode) for p in mixed.parts):,}" for mode in ("block", "full"))
    rows.append(("in all", "", block, full, "100.0%", ""))
    headings = ("source", "loaded", "block", "full", "share", "epochs")
    Table(headings, rows, title=str(mixture)).show()
    if output is None:
        return

    def marked():
        for item in mixed.examples:
            [example] = with_data_sets([item.example], read.parts[item.part].source)
            yield replace(example, meta=example.meta | {"mode": item.mode})

    count = data.write_lines(output, marked())
    echo(f'wrote {count:,} examples to {output}, each with its mode in "meta"')
