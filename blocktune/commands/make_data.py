"""`blocktune data passages`, `answer` and `mix`: make training data."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Annotated

from typer import Argument, echo

from blocktune.commands import data
from blocktune.commands import options as opt
from blocktune.commands.application import resumable
from blocktune.commands.data import Counter, Fields, Limit, Output, Source, Split, data_command
from blocktune.commands.options import option


@data_command(
    "Search a corpus, one passage per record, by BM25:",
    "blocktune data passages nq --split train --corpus wiki.jsonl -o nq.jsonl",
    "Results of your retriever, one {id or question, passages} per line, best first:",
    "blocktune data passages questions.jsonl --retrieved dpr.jsonl -o out.jsonl",
    "Keep the best of each question's own passages, as the evidence in TriviaQA:",
    "blocktune data passages triviaqa --own --k 10 -o triviaqa.jsonl",
)
def passages(
    source: Source,
    output: Output,
    corpus: option(Path | None, "Passages to search: FILE, or FILE?chunker=sentence.") = None,
    retrieved: option(Path | None, "File with the passages that your retriever found.") = None,
    own: option(bool, "Keep the best of each question's own passages, by BM25.", "--own") = False,
    embedder: option(str | None, "Search by this Sentence Transformer.", metavar="MODEL") = None,
    store: option(str | None, "Store of the embeddings; see `answer`.", metavar=opt.PLACE) = None,
    k: option(int, "Passages per question.", min=1) = 10,
    answerable: option(bool, "Skip questions without the answer.", "--answerable") = False,
    limit: Limit = None,
    split: Split = None,
    fields: Fields = None,
) -> None:
    """Add passages to questions: by BM25, from your own retriever, or the best of their own."""
    if [corpus is not None, retrieved is not None, own].count(True) != 1:
        raise ValueError("give one of --corpus FILE, --retrieved FILE and --own")
    if (embedder is not None and corpus is None) or (store is not None and embedder is None):
        raise ValueError("--embedder needs --corpus, and --store needs --embedder; add it")
    data.check_output(output, source, corpus, retrieved)
    opt.quiet_libraries()
    from blocktune.data import load_chunks, retrieval
    from blocktune.data.sources.options import with_fields

    originals = embed = None
    if embedder is not None:
        from blocktune.cache import ChunkStore
        from blocktune.cache.store.records import Embedder

        embed = Embedder(embedder, ChunkStore.open(store or ""))
    if own:
        originals = data.load_from(source, fields, limit=limit, split=split)
        examples = list(retrieval.from_own(originals, k))
    else:
        mapped = with_fields(source, fields)
        questions = list(retrieval.read_questions(mapped, limit=limit, split=split))
        if corpus is not None:
            examples = retrieval.from_corpus(questions, load_chunks(corpus), k, embed)
        else:
            examples = list(retrieval.from_retriever(questions, retrieved, k))
    _write_examples(source, output, examples, originals, answerable)


def _write_examples(
    source: str, output: Path, examples: list, originals: list | None, answerable: bool
) -> None:
    """Writes questions with their passages. ``originals``: the same with all own passages."""
    from blocktune.data import write_jsonl
    from blocktune.data.answers import holds_answer, is_verdict

    answered = list(map(holds_answer, examples, originals or repeat(None)))
    kept = [e for e, found in zip(examples, answered, strict=True) if found or not answerable]
    if not kept:
        raise ValueError(f"{source}: none of {len(examples)} questions is left; nothing is written")
    write_jsonl(output, kept)
    yes_no = sum(map(is_verdict, examples)) if originals is None else 0
    share = f"{sum(answered) / len(answered):.1%} of {len(examples):,}"
    note = f" ({yes_no:,} ask for yes or no, which passages do not contain)" if yes_no else ""
    echo(f"wrote {len(kept):,} questions to {output}; passages contain an answer for {share}{note}")


@data_command(
    "blocktune data answer train.jsonl --model M -o own-words.jsonl",
    "blocktune data answer '2wikimultihopqa?split=train' --limit 2000 -m M -o w.jsonl",
    "blocktune data answer q.jsonl -m M -o a.jsonl --temperature 0.7 --only-correct",
    "A stopped command continues where it stopped: repeat it.",
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
    only_correct: option(bool, "Skip answers without an accepted one.", "--only-correct") = False,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
) -> None:
    """Let a model write its own training answers, with full attention over all chunks."""
    from blocktune.data.answers import regenerate
    from blocktune.engine import Sampling
    from blocktune.evaluation.runner import progress_bars
    from blocktune.methods import build

    data.check_output(output, source)
    full, sampling = build("full-prefill"), Sampling(temperature, top_p=top_p, seed=seed)
    engine = opt.load_engine(model, adapter, None, dtype, device, method=full)
    examples = data.load_from(source, fields, limit=limit, split=split, tokenizer=engine.tokenizer)
    settings = {"model": model, "adapter": adapter, "weights": engine.fingerprint}
    settings |= {"max_new_tokens": max_new_tokens, "temperature": temperature}
    settings |= {"top_p": top_p, "seed": seed}
    stop_ids = engine.state.stop_ids()

    def ask(batch: Sequence, number: int) -> list[str | None]:
        """Answers a batch. Its number is added to the seed, so that batches differ."""
        seeded = replace(sampling, seed=seed + number)
        sizes = {"max_new_tokens": max_new_tokens, "batch_size": len(batch)}
        answers = engine.answer(batch, full, sampling=seeded, **sizes)
        return [a.text if a.token_ids[-1] in stop_ids else None for a in answers]

    on_stop = resumable(f"the answers so far are in {output}.part")
    with on_stop, progress_bars() as progress:
        bar = progress.add_task("answering", total=len(examples))
        counts = regenerate(
            examples,
            ask,
            output,
            facts={key: value for key, value in settings.items() if value is not None},
            batch_size=batch_size,
            only_correct=only_correct,
            on_batch=lambda count: progress.update(bar, completed=count),
        )
    echo(
        "wrote {written:,} examples to {output} ({resumed:,} answered before, left out: {empty:,} "
        "empty, {wrong:,} wrong, {cut:,} cut at --max-new-tokens)".format(output=output, **counts)
    )


@data_command(
    "blocktune data mix mixture.yaml",
    "blocktune data mix mixture.yaml --tokenizer M -o mixed.jsonl",
    "A mixture in YAML. Every example of two sources, one of them in both modes:",
    "  draw: duplication   # or sampling, with a size; weights are then shares",
    "  seed: 0",
    "  parts:",
    "    - {source: 2wikimultihopqa, split: train, mode: both, limit: 20000}",
    "    - {source: tulu-3, split: train, mode: full, weight: 0.5}",
    "  A part may also hold augment: {shuffle: true, num_chunks: [4, 10]}.",
)
def mix(
    mixture: Annotated[Path, Argument(help="YAML file of the mixture.")],
    output: opt.to_file("JSONL file to write the examples to.") = None,
    tokenizer: Counter = None,
) -> None:
    """Draw a mixture of sources; show how many block and full examples each part gives."""
    from blocktune.data import write_jsonl
    from blocktune.data.mixture import load_mixture
    from blocktune.data.mixture import mix as draw
    from blocktune.data.sources.catalog import with_data_sets

    mixture_spec = load_mixture(mixture)
    if output is not None:
        data.check_output(output, mixture, *(part.source for part in mixture_spec.parts))
    mixed = draw(mixture_spec, tokenizer=data.tokenizer_of(tokenizer))
    rows = []
    for source, loaded, block, full, epochs in mixed.parts:
        share = f"{(block + full) / len(mixed.examples):.1%}"
        rows.append((source, f"{loaded:,}", f"{block:,}", f"{full:,}", share, f"{epochs:.2f}"))
    block, full = (f"{sum(getattr(p, mode) for p in mixed.parts):,}" for mode in ("block", "full"))
    rows.append(("total", "", block, full, "100.0%", ""))
    headings = ("source", "loaded", "block", "full", "share", "epochs")
    opt.Table(headings, rows, title=str(mixture)).show()
    if output is None:
        return

    def with_modes():
        for item in mixed.examples:
            [example] = with_data_sets([item.example], mixture_spec.parts[item.part].source)
            yield replace(example, meta=example.meta | {"mode": item.mode})

    count = write_jsonl(output, with_modes())
    echo(f'wrote {count:,} examples to {output}, each with its mode in "meta"')
