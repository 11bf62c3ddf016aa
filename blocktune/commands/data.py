"""`blocktune data list`, `show` and `write`: find, look at and convert data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from blocktune.commands import options as opt
from blocktune.commands.application import command, new_group

if TYPE_CHECKING:
    from blocktune.data import RagExample

HELP = """Find, make and look at data.

A source is one word, wherever a command asks for one: a file (JSON, JSON lines, CSV, Parquet or
Arrow, told apart by its fields), a data set's short name (musique, tulu-3),
hf:OWNER/NAME[:CONFIG] or hf:FOLDER, or a generator (worlds:test, needle:). Options follow a
question mark: 'tulu-3?split=train&chunker=message', 'rows.csv?fields=question:q,chunks:docs'.
"""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What may command a terminal: all control characters but tab and line break."""

Source = Annotated[str, Argument(help="Where examples come from; see `blocktune data list`.")]
Output = Annotated[Path, opt.in_file("--output", "-o", help="JSONL file to write.")]
Limit = Annotated[int | None, Option(min=1, help="Only the first examples.")]
Split = Annotated[
    str | None, Option(help="Split of a data set on the Hub; default validation, if it has one.")
]
Fields = Annotated[
    str | None,
    Option(
        metavar="NEW=OLD,...", help="Rename fields: question=input,chunks=context,answers=a.value."
    ),
]
Counter = Annotated[
    str | None,
    Option(
        "--tokenizer", help="Tokenizer used to measure lengths: a folder or a name on the HF Hub."
    ),
]


group = new_group(
    "data",
    HELP,
    "blocktune data list",
    "blocktune data show 'worlds:test?n=3' --model data/tiny",
    "blocktune data write rows.parquet --fields question=q,chunks=docs -o rows.jsonl",
    "blocktune data passages nq --corpus wiki.jsonl --k 10 -o nq.jsonl",
    "blocktune data answer nq.jsonl --model M -o nq-own-words.jsonl",
    "blocktune data mix mixture.yaml",
)


@command(
    "list",
    "blocktune data list",
    "blocktune data list --json",
    "A data set is downloaded from the Hugging Face Hub when it is first read.",
    of=group,
)
def show_list(as_json: opt.AsJson = False) -> None:
    """List data sets with their licences, generators, record shapes and chunkers."""
    from dataclasses import asdict

    from blocktune.data.chunking import CHUNKERS
    from blocktune.data.sources.catalog import CATALOG
    from blocktune.data.sources.options import generators
    from blocktune.data.sources.shapes import SHAPES
    from blocktune.registry import summary_of
    from blocktune.tables import Table

    made, chunkers = generators(), {}
    for name, cls in sorted(CHUNKERS.table().items()):
        chunkers[name] = summary_of(cls).replace("``", "")
    told = {one.key: " or ".join(map(", ".join, one.keys)) or "(name it)" for one in SHAPES}
    facts = {
        "data_sets": {name: asdict(entry) for name, entry in CATALOG.items()},
        "generators": {n: {"example": e.example, "becomes": e.becomes} for n, e in made.items()},
        "shapes": {one.key: {"fields": list(one.keys), "chunker": one.chunker} for one in SHAPES},
        "chunkers": chunkers,
    }

    def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
        return Table(columns, list(rows), title, left=columns)

    opt.tell(
        as_json,
        facts,
        table(
            "data sets",
            ("name", "on the Hub", "licence", "a record becomes"),
            ((name, e.at, e.licence, e.becomes) for name, e in CATALOG.items()),
        ),
        table(
            "generators",
            ("source", "an example is"),
            [(e.example, e.becomes) for e in made.values()],
        ),
        table(
            "record shapes of files",
            ("as=", "told by the fields", "cut by"),
            ((one.key, told[one.key], one.chunker or "(has chunks)") for one in SHAPES),
        ),
        table("chunkers", ("chunker=", "what it does"), chunkers.items()),
    )


@command(
    "show",
    "blocktune data show musique --index 3",
    "blocktune data show 'worlds:train?n=5' --model data/tiny",
    "blocktune data show chat.jsonl --model M --adapter out/kvlink",
    of=group,
)
def show(
    source: Source,
    index: Annotated[int, Option(min=0, help="Which example, from 0.")] = 0,
    split: Split = None,
    fields: Fields = None,
    model: Annotated[
        str | None, Option("--model", "-m", help="Show the rows that this model gets.")
    ] = None,
    adapter: Annotated[
        str | None, Option(help="With the wording and layout of this adapter.")
    ] = None,
    mode: Annotated[
        Literal["block", "full"], Option(help="Attention in which the example is laid out.")
    ] = "block",
) -> None:
    """Show one example: as text, or with --model row by row as the model sees it."""
    if adapter is not None and model is None:
        raise ValueError("--adapter says how rows are laid out; add --model for its tokens")
    tokenizer = tokenizer_of(model)
    examples = load_from(source, fields, limit=index + 1, split=split, tokenizer=tokenizer)
    if len(examples) <= index:
        raise ValueError(f"{source} has {len(examples)} examples; --index starts from 0")
    if tokenizer is None:
        _show_text(examples[index])
    else:
        _show_rows(examples[index], tokenizer, adapter, mode == "block")


def _echo(text: str) -> None:
    """Prints text of a row; control characters as hexadecimal escapes."""
    typer.echo(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text))


def _show_text(example: RagExample) -> None:
    facts = [("id", example.id), ("kind", example.kind)]
    _echo("  ".join(f"{name}: {value}" for name, value in facts if value))
    for number, chunk in enumerate(example.chunks):
        mark = ", evidence" if number in example.supporting else ""
        title = f"{chunk.title}\n" if chunk.title else ""
        _echo(f"[chunk {number}{mark}]\n{title}{chunk.text}")
    _echo(f"[question]\n{example.question}")
    _echo(f"[accepted answers]\n{' | '.join(example.answers) or '(unknown)'}")
    if example.response is not None:
        _echo(f"[the model writes]\n{example.response}")


def _show_rows(example: RagExample, tokenizer, adapter: str | None, block: bool) -> None:
    from blocktune.adapter import AdapterInfo
    from blocktune.prompt import LayoutSpec, PromptFormat, lay_out, make_pieces
    from blocktune.prompt.batch import show as rows_of

    info = AdapterInfo.load(adapter) if adapter else None
    fmt = info.format if info else PromptFormat()
    spec = info.layout if info and block else LayoutSpec(block=block)
    if spec.num_blanks:  # hidden rows of serving, which no example has
        spec = replace(spec, num_blanks=0)
    known = example.response is not None or example.answers
    pieces = make_pieces(
        tokenizer,
        fmt,
        example.chunks,
        example.question,
        example.target if known else None,
        block=block,
        followups=example.followups,
    )
    prompt = lay_out(pieces, spec, link_base=len(tokenizer), bos_id=tokenizer.bos_token_id)
    _echo(rows_of(tokenizer, prompt))
    total = pieces.num_tokens
    typer.echo(f"\n{total:,} tokens in {len(pieces.chunks)} chunks; {len(prompt.ids):,} rows")


@command(
    "write",
    "blocktune data write 'needle:?lengths=1024,4096' --tokenizer M -o needle.jsonl",
    "blocktune data write 'tulu-3?split=train' --limit 20000 -o chat.jsonl",
    "blocktune data write rows.csv --fields question=input,chunks=context -o rows.jsonl",
    of=group,
)
def write(
    source: Source,
    output: Output,
    limit: Limit = None,
    split: Split = None,
    fields: Fields = None,
    tokenizer: Counter = None,
) -> None:
    """Write any source as JSON lines, one example with its chunks a line."""
    how = {"limit": limit, "split": split, "tokenizer": tokenizer_of(tokenizer)}
    count = write_lines(output, load_from(source, fields, **how))
    typer.echo(f"wrote {count:,} examples to {output}")


def tokenizer_of(name: str | None):
    """The tokenizer of that name, or None for None."""
    opt.quiet_libraries()
    from blocktune.data.sources.options import load_tokenizer

    return None if name is None else load_tokenizer(name)


def load_from(source: str, fields: str | None = None, **how: Any) -> list[RagExample]:
    """Examples of a source; their ``meta`` names its data set."""
    from blocktune.data import load_examples
    from blocktune.data.sources.catalog import with_data_sets
    from blocktune.data.sources.options import with_fields

    return list(with_data_sets(load_examples(with_fields(source, fields), **how), source))


def write_lines(output: Path, examples) -> int:
    """Writes examples into a file that appears whole or not at all."""
    from blocktune.data import write_jsonl
    from blocktune.files import replacing

    with replacing(output) as temporary:
        return write_jsonl(temporary, examples)
