"""`blocktune data`: one file per command."""

from __future__ import annotations

import typer

from blocktune.commands.data import answer, listing, mix, passages, show, worlds, write
from blocktune.commands.options import teach

HELP = """Find, make and look at data.

A source is one word, wherever a command asks for one: a file (JSON or JSON lines, told apart by
its fields), a data set's short name (musique, tulu-3), hf:OWNER/NAME[:CONFIG] or hf:FOLDER, or a
generator (worlds:test, ruler:vt, needle:, dialogue:, code:). Options follow a question mark:
'tulu-3?split=train&chunker=message', 'docs.jsonl?as=document&chunker=sentence&size=3'.
"""


def add_to(app: typer.Typer) -> None:
    """Registers the group."""
    group = typer.Typer(
        no_args_is_help=True,
        help=HELP,
        rich_markup_mode="rich",
        epilog=teach(
            "blocktune data list",
            "blocktune data show 'worlds:test?n=3' --model data/tiny",
            "blocktune data write 'dialogue:?n=200&turns=8' -o turns.jsonl",
            "blocktune data passages nq --corpus wiki.jsonl --k 10 -o nq.jsonl",
            "blocktune data answer nq.jsonl --model M -o nq-own-words.jsonl",
            "blocktune data mix mixture.yaml",
        ),
    )
    for command in (listing, show, write, worlds, passages, answer, mix):
        command.add_to(group)
    app.add_typer(group, name="data")
