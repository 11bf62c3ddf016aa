"""`blocktune data list`, `show` and `write`: find, inspect and convert data."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument

from blocktune.commands import options as opt
from blocktune.commands.application import new_group
from blocktune.commands.options import option

HELP = """Find, make and inspect data.

Every command names a data source in the same way: a file (JSON, JSON lines,
CSV, Parquet or Arrow, recognized by its fields), the short name of a data set
(musique, tulu-3), hf:OWNER/NAME[:CONFIG] or hf:FOLDER, or a generator
(worlds:test, needle:). Options follow a question mark:
'tulu-3?split=train&chunker=message', 'rows.csv?fields=question:q,chunks:docs'.
"""

Source = Annotated[str, Argument(help="File, data set or generator; see `blocktune data --help`.")]
Output = opt.to_file("JSONL file to write.", kind=Path)
Limit = option(int | None, "Use only the first N examples.", min=1)
Split = option(str | None, "Split of a data set. Default: validation, or train if it has none.")
Fields = option(str | None, "Rename fields: question=input,chunks=docs.", metavar="NEW=OLD,...")
Counter = option(str | None, "To measure lengths: a folder or a name on the Hub.", "--tokenizer")

data_command = new_group(
    "data",
    HELP,
    "blocktune data show 'worlds:test?n=3' --model data/tiny",
    "blocktune data write rows.parquet --fields question=q,chunks=docs -o rows.jsonl",
)


@data_command(
    "blocktune data list",
    "blocktune data list --json",
    "A data set is downloaded from the Hugging Face Hub when it is first read.",
    name="list",
)
def show_list(as_json: opt.AsJson = False) -> None:
    """List data sets with their licences, generators, record shapes and chunkers."""
    from blocktune.data.chunking import CHUNKERS
    from blocktune.data.sources.catalog import CATALOG
    from blocktune.data.sources.options import generators
    from blocktune.data.sources.shapes import SHAPES
    from blocktune.registry import summary_of

    sources, classes = generators(), sorted(CHUNKERS.table().items())
    chunkers = {name: summary_of(cls).replace("``", "") for name, cls in classes}
    facts = {
        "data_sets": {name: asdict(entry) for name, entry in CATALOG.items()},
        "generators": {n: {"example": e.example, "becomes": e.becomes} for n, e in sources.items()},
        "shapes": {s.key: {"fields": list(s.keys), "chunker": s.chunker} for s in SHAPES},
        "chunkers": chunkers,
    }
    data_sets = [(name, e.at, e.licence, e.becomes) for name, e in CATALOG.items()]
    examples = [(e.example, e.becomes) for e in sources.values()]
    shapes = [
        (s.key, " or ".join(map(", ".join, s.keys)) or "(name it)", s.chunker or "(has chunks)")
        for s in SHAPES
    ]
    tables = (
        opt.Table(("name", "on the Hub", "licence", "a record becomes"), data_sets, "data sets"),
        opt.Table(("source", "an example contains"), examples, "generators"),
        opt.Table(("as=", "recognized by its fields", "cut by"), shapes, "record shapes of files"),
        opt.Table(("chunker=", "what it does"), list(chunkers.items()), "chunkers"),
    )
    opt.tell(as_json, facts, *(table._replace(left=table.headings) for table in tables))


@data_command(
    "blocktune data show musique --index 3",
    "blocktune data show 'worlds:train?n=5' --model data/tiny",
    "blocktune data show chat.jsonl --model M --adapter out/kvlink",
)
def show(
    source: Source,
    index: option(int, "Which example, from 0.", min=0) = 0,
    split: Split = None,
    fields: Fields = None,
    model: option(str | None, "Show the input rows of this model.", "--model -m") = None,
    adapter: option(str | None, "Use the prompt format and layout of this adapter.") = None,
    mode: option(Literal["block", "full"], "Kind of attention to lay it out for.") = "block",
) -> None:
    """Show one example: as text, or with --model row by row as the model sees it."""
    if adapter is not None and model is None:
        raise ValueError("--adapter sets the layout of rows; add --model for the tokenizer")
    tokenizer = tokenizer_of(model)
    examples = load_from(source, fields, limit=index + 1, split=split, tokenizer=tokenizer)
    if len(examples) <= index:
        raise ValueError(f"{source} has {len(examples)} examples; --index starts from 0")
    if tokenizer is None:
        _show_text(examples[index])
    else:
        _show_rows(examples[index], tokenizer, adapter, mode == "block")


def _echo(text: str) -> None:
    """Prints a text, with control characters as escapes, since a terminal may obey them."""
    control = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # tab and line feed are printed
    typer.echo(re.sub(control, lambda found: f"\\x{ord(found[0]):02x}", text))


def _show_text(example) -> None:
    header = {"id": example.id, "kind": example.kind}
    _echo("  ".join(f"{name}: {value}" for name, value in header.items() if value))
    for number, chunk in enumerate(example.chunks):
        mark = ", evidence" if number in example.supporting else ""
        title = f"{chunk.title}\n" if chunk.title else ""
        _echo(f"[chunk {number}{mark}]\n{title}{chunk.text}")
    answers = " | ".join(example.answers) or "(unknown)"
    _echo(f"[question]\n{example.question}\n[accepted answers]\n{answers}")
    if example.response is not None:
        _echo(f"[response to train on]\n{example.response}")
    for question, response in example.followups:
        _echo(f"[then]\n{question}\n{response}")


def _show_rows(example, tokenizer, adapter: str | None, block: bool) -> None:
    from blocktune.adapter import AdapterInfo
    from blocktune.data.example import own_wording
    from blocktune.models.load import adapter_folder
    from blocktune.prompt import LayoutSpec, PromptFormat, lay_out, make_pieces
    from blocktune.prompt.batch import show as rows_of

    info = AdapterInfo.load(adapter_folder(adapter)) if adapter else None
    format = info.format if info else PromptFormat()
    spec = info.layout if info and block else LayoutSpec(block=block)
    spec = replace(spec, num_blanks=0)  # serving adds these rows; training examples have none
    target = example.target if example.response is not None or example.answers else None
    fields = example.chunks, example.question, target, block, example.followups
    pieces = make_pieces(tokenizer, own_wording(example, format) or format, *fields)
    prompt = lay_out(pieces, spec, link_base=len(tokenizer), bos_id=tokenizer.bos_token_id)
    _echo(rows_of(tokenizer, prompt))
    counts = f"{pieces.num_tokens:,} tokens in {len(pieces.chunks)} chunks"
    typer.echo(f"\n{counts}; {len(prompt.ids):,} rows")


@data_command(
    "blocktune data write 'needle:?lengths=1024,4096' --tokenizer M -o needle.jsonl",
    "blocktune data write 'tulu-3?split=train' --limit 20000 -o chat.jsonl",
    "blocktune data write rows.csv --fields question=input,chunks=context -o rows.jsonl",
)
def write(
    source: Source,
    output: Output,
    limit: Limit = None,
    split: Split = None,
    fields: Fields = None,
    tokenizer: Counter = None,
) -> None:
    """Write any source as JSON lines: one example with its chunks per line."""
    from blocktune.data import write_jsonl

    check_output(output, source)
    options = {"limit": limit, "split": split, "tokenizer": tokenizer_of(tokenizer)}
    count = write_jsonl(output, load_from(source, fields, **options))
    typer.echo(f"wrote {count:,} examples to {output}")


def check_output(output: Path, *sources: str | Path | None) -> None:
    """Raises ValueError if an output is one of the files that are read, or of another format."""
    if output.suffix in (".csv", ".tsv", ".parquet", ".arrow", ".gz") or output == Path("-"):
        raise ValueError(f"--output '{output}': JSON lines are written; name it NAME.jsonl")
    places = [Path(str(source).partition("?")[0]).expanduser() for source in sources if source]
    if output.is_file() and any(p.is_file() and p.samefile(output) for p in places):
        raise ValueError(f"--output '{output}' is also read; name another file")


def tokenizer_of(name: str | None):
    """Loads the tokenizer of that name; None for None."""
    opt.quiet_libraries()
    from blocktune.models.load import read_tokenizer

    return None if name is None else read_tokenizer(name)


def load_from(source: str, fields: str | None = None, **options: Any) -> list:
    """Loads the examples of a source. Their ``meta`` names the data set."""
    from blocktune.data import load_examples
    from blocktune.data.sources.catalog import with_data_sets
    from blocktune.data.sources.options import with_fields

    return list(with_data_sets(load_examples(with_fields(source, fields), **options), source))
