"""The work of `blocktune answer`: read questions, run the engine, show answers and their cost."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from blocktune.cache import ChunkStore, StoreStats
from blocktune.cache.store.config import StoreConfig
from blocktune.cache.store.folder import ChunkFolder
from blocktune.commands.application import resumable
from blocktune.commands.options import tracked
from blocktune.data import RagExample, load_examples
from blocktune.engine import Answer, EncodeReport, Engine
from blocktune.files import append_lines, resumed, truncate_lines
from blocktune.methods import Method, parse_method
from blocktune.models.identity import digest_of
from blocktune.parsing import parse_yaml
from blocktune.prompt import Chunk, show

if TYPE_CHECKING:
    from blocktune.evaluation.runner import Processes


def read_examples(
    source: str | None, limit: int | None, question: str | None, chunks: Sequence[str]
) -> list[RagExample]:
    """Reads the questions from a source, or the one given on the command line."""
    if (source is None) == (question is None):
        raise ValueError("give either --input FILE or --question Q with --chunk TEXT, not both")
    if source is not None:
        if chunks:
            raise ValueError("--chunk belongs to --question; the chunks of --input are in its file")
        return load_examples(source, limit=limit)
    if not chunks:
        raise ValueError("a question needs at least one chunk; add --chunk TEXT")
    for option, text in (("--question", question), *(("--chunk", chunk) for chunk in chunks)):
        if re.fullmatch(r"@\S+", text):
            raise ValueError(
                f"{option} must be a text, got '{text}'; for the contents of a file write "
                f'{option} "$(cat {text[1:]})", or put question and chunks into --input FILE'
            )
    return [RagExample(question, tuple(Chunk(text) for text in chunks))]


def build_method(name: str | None, parameters: Sequence[str]) -> Method | None:
    """Builds a method from its name and pairs (YAML values); ValueError for pairs without name."""
    if name is None and parameters:
        raise ValueError("--param sets a parameter of a method; add --method")
    values: dict[str, Any] = {}
    for text in parameters:
        key, _, value = (part.strip() for part in text.partition("="))
        if not (key and value):
            raise ValueError(f"--param must be name=value, got '{text}'")
        if key in values:
            raise ValueError(f"--param '{key}' is given 2 times; give it once")
        values[key] = parse_yaml(value, f"--param {key}")
    return None if name is None else parse_method(name, values)


@dataclass(frozen=True)
class Run:
    """An engine with the settings of one `blocktune answer` command."""

    engine: Engine
    method: Method
    decoding: Mapping[str, Any]  # ``max_new_tokens`` and ``sampling``
    batch_size: int

    def lay_out(self, examples: Sequence[RagExample], shown: bool) -> None:
        """Raises ValueError if a prompt is too long; prints them row by row if ``shown``."""
        prompts, room = self.engine.prompts, self.decoding["max_new_tokens"]
        for number, example in enumerate(examples, start=1):
            try:
                pieces = prompts.pieces(example, self.method)
                prompt = prompts.prompt(pieces, prompts.spec(self.method), room)
            except ValueError as error:
                place = f"question {number} ('{example.question:.40}'): " * (len(examples) > 1)
                raise ValueError(f"{place}{error}") from None
            if shown:
                typer.echo(show(self.engine.tokenizer, prompt) + "\n")

    def print_answers(self, examples: Sequence[RagExample], as_json: bool) -> None:
        """Prints the answers of each batch when it is done, as JSON lines or as panels."""
        console = Console()
        for example, answer in self._answers(examples, quiet=not as_json):
            if as_json:
                typer.echo(_line(self._record(example, answer)))
            else:
                console.print(_panel(example, answer, self.method.name))

    def write(self, examples: Sequence[RagExample], output: Path, method: Sequence[str]) -> None:
        """Appends answers to a JSONL file, each with its `_key`, and skips those already in it."""
        keys = [self._key(example, method) for example in examples]
        with resumed(output) as lines, resumable(f"the answers so far are in {output}"):
            done = _count_answered(output, lines, keys)
            # Start at a batch boundary: batches and samples are then as in an unstopped run.
            done -= done % self.batch_size if done < len(keys) else 0
            truncate_lines(output, done)
            for number, pair in enumerate(self._answers(examples, done), start=done):
                record = self._record(*pair) | {"key": keys[number]}
                append_lines(output, [_line(record)])
        before = f"; {done:,} were already there" if done else ""
        typer.echo(f"wrote {len(keys) - done:,} answers to {output}{before}")

    def _answers(
        self, examples: Sequence[RagExample], done: int = 0, quiet: bool = False
    ) -> Iterator[tuple[RagExample, Answer]]:
        starts = range(done, len(examples), self.batch_size)
        for start in tracked(starts, "answering", shown=not quiet and len(starts) > 1):
            batch = examples[start : start + self.batch_size]
            # Batches with the same seed would draw the same numbers.
            sampling = self.decoding["sampling"]
            sampling = replace(sampling, seed=(sampling.seed or 0) + start)
            options = {**self.decoding, "sampling": sampling, "batch_size": len(batch)}
            answers = self.engine.answer(batch, self.method, **options)
            yield from zip(batch, answers, strict=True)

    def _record(self, example: RagExample, answer: Answer) -> dict[str, Any]:
        usage = answer.usage
        derived = {"recompute_ratio": usage.recompute_ratio, "ttft_s": usage.ttft_s}
        record = {"id": example.id or None, "question": example.question, "answer": answer.text}
        record |= {"method": self.method.name, "usage": asdict(usage) | derived}
        if any(chunk.metadata for chunk in answer.chunks):
            record["chunks"] = [dict(chunk.metadata) for chunk in answer.chunks]
        return record

    def _key(self, example: RagExample, method: Sequence[str]) -> str:
        """A digest of all that determines an answer, with ``method`` as typed."""
        engine, responses = self.engine, self.engine.responses
        length, sampling = self.decoding["max_new_tokens"], self.decoding["sampling"]
        sampled = [asdict(sampling), self.batch_size] if sampling.temperature else []
        similar = responses and responses.threshold and [responses.threshold, responses.model]
        caches = [engine.store.config.codec, str(engine.state.decode_cache), similar]
        weights = [engine.fingerprint, engine.format.to_dict()]
        return digest_of([weights, caches, method, length, sampled, example.to_json()])


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str)


def _count_answered(output: Path, lines: Sequence[str], keys: Sequence[str]) -> int:
    """Number of answers in a file. Raises ValueError if one does not belong to its question."""
    for number, line in enumerate(lines):
        with suppress(ValueError, KeyError, TypeError, IndexError):
            if json.loads(line)["key"] == keys[number]:
                continue
        what = f"'{output}', line {number + 1}: not an answer of this command with these settings"
        raise ValueError(f"{what}; choose another --output or remove it")
    return len(lines)


def encode(
    engine: Engine,
    chunks: Sequence[Chunk],
    processes: Processes,
    place: str,
    method: Method | None = None,
) -> None:
    """Encodes this process's share of the chunks; ValueError: the store did not take some."""
    from blocktune.evaluation.runner import progress_bars

    own, store = set(processes.share(list(dict.fromkeys(chunks)))), engine.store
    mine = [chunk for chunk in chunks if chunk in own]
    on_stop = resumable(f"the chunks so far are in {store.place}")
    with on_stop, progress_bars(shown=processes.is_main and sys.stderr.isatty()) as bars:
        task, report = bars.add_task("encoding", total=None), EncodeReport(0, 0, 0, 0.0)
        if mine:
            show = lambda done, total: bars.update(task, completed=done, total=total)  # noqa: E731
            report = engine.encode(mine, show, method)
    who = f"process {processes.rank + 1} of {processes.count}: " if processes.count > 1 else ""
    stats, old = store.stats(), len(own) - report.num_encoded
    files, written = stats.files, stats.files.bytes_written
    each = f", {written / report.num_tokens / 1e3:,.1f} kB a token" if report.num_tokens else ""
    if left := files.evictions:
        each += f"; {left:,} chunks were evicted to stay within its limits"
    typer.echo(
        f"{who}encoded {report.num_encoded:,} chunks ({report.num_tokens:,} tokens) in "
        f"{report.encode_s:.1f} s, {old:,} were already there; {written / 1e6:,.1f} MB written to "
        f"{store.place}{each}"
    )
    _report_rejected(stats, store.place)
    processes.wait()
    if lost := store.stats().files.unwritten:
        limits = f"the limits of --store '{place}' (disk, remote_bytes, quota)"
        raise ValueError(f"{lost:,} chunks were not stored: they exceed {limits}; raise them")


def holds_chunks(store: str | None) -> bool:
    """Whether a store is a folder that holds chunks already."""
    folder = StoreConfig.parse(store or "").folder
    return folder is not None and any(ChunkFolder(folder).keys())


def report_store(store: ChunkStore, had_chunks: bool) -> None:
    """Reports how many chunks came from a store; ``had_chunks``: it was not empty before."""
    if store.place is None:
        return
    store.flush()
    stats = store.stats()
    counts = f"{stats.files.hits:,} chunks read from {store.place}, {stats.misses:,} encoded now"
    line = f"{counts} (with the prompts' starts)"
    if had_chunks and stats.misses > stats.rejected and not stats.files.hits:
        line += (
            "; the store's chunks are other passages, or of another model, adapter, dtype, "
            "quantization or prompt format"
        )
    for name, tier in stats.tiers.items():
        if tier.unwritten:
            line += f", {tier.unwritten:,} not stored in the {name}: it is full or out of reach"
    typer.echo(line, err=True)
    _report_rejected(stats, store.place)


def _report_rejected(stats: StoreStats, place: str) -> None:
    if stats.rejected:
        typer.echo(
            f"{stats.rejected:,} stored chunks could not be used and were encoded again; the "
            f"first: {stats.first_rejected}; list all with: blocktune store verify {place}",
            err=True,
        )


def _panel(example: RagExample, answer: Answer, method: str) -> Panel:
    table, usage = Table.grid("", "", padding=(0, 1)), answer.usage
    table.columns[0].style = "dim"
    per_layer = ", ".join(map(str, usage.layer_tokens))
    parts = [(name[:-2].replace("_", " "), s) for name, s in asdict(usage.ttft).items() if s]
    split = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in parts)
    table.add_row("context", f"{usage.context_tokens:,} of {usage.prompt_tokens:,} tokens")
    table.add_row("recomputed", f"{usage.recompute_ratio:.1%} (tokens per layer: {per_layer})")
    if usage.prefix_tokens:
        disk = f", {usage.prefix_disk_tokens:,} from disk" if usage.prefix_disk_tokens else ""
        table.add_row("prefix", f"{usage.prefix_tokens:,} tokens of earlier prompts{disk}")
    table.add_row("chunks", f"{usage.chunk_hits} cached, {usage.chunk_misses} encoded now")
    table.add_row("read", f"{usage.bytes_read / 1e6:,.2f} MB")
    table.add_row("first token", f"{1000 * usage.ttft_s:.1f} ms ({split})")
    text = Text(answer.text or "(no text)", style="bold")
    shown = Group(Text(example.question, style="dim"), text, "", table)
    return Panel(shown, title=Text(method), title_align="left", width=min(100, Console().width))
