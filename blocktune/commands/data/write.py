"""`blocktune data write`."""

from __future__ import annotations

import typer

from blocktune.commands.data.options import Counter, Limit, Output, Source, Split, tokenizer_of
from blocktune.commands.options import teach


def add_to(group: typer.Typer) -> None:
    """Registers the command."""
    group.command(
        "write",
        epilog=teach(
            "blocktune data write 'ruler:vt?length=4096&n=50' --tokenizer M -o vt.jsonl",
            "blocktune data write 'needle:?lengths=1024,4096' --tokenizer M -o needle.jsonl",
            "blocktune data write 'ruler:qa_1?file=squad.json&n=50' --tokenizer M -o q.jsonl",
            "blocktune data write 'tulu-3?split=train' --limit 20000 -o chat.jsonl",
            "blocktune data write 'code:?n=200&files=8' -o code.jsonl",
        ),
    )(write)


def write(
    source: Source,
    output: Output,
    limit: Limit = None,
    split: Split = None,
    tokenizer: Counter = None,
) -> None:
    """Write any source as JSON lines, one example with its chunks a line."""
    counter = tokenizer_of(tokenizer)
    from blocktune.data import load_examples, write_jsonl
    from blocktune.data.attribution import credited
    from blocktune.files import replacing

    examples = load_examples(source, limit=limit, split=split, tokenizer=counter)
    with replacing(output) as temporary:
        count = write_jsonl(temporary, credited(examples, source))
    typer.echo(f"wrote {count:,} examples to {output}")
