"""`blocktune data list`."""

from __future__ import annotations

import json

import typer

from blocktune.commands.options import AsJson, teach


def add_to(group: typer.Typer) -> None:
    """Registers the command."""
    group.command(
        "list",
        epilog=teach(
            "blocktune data list",
            "blocktune data list --json",
            "A data set is downloaded when it is first read, from the Hugging Face Hub.",
        ),
    )(show_list)


def show_list(as_json: AsJson = False) -> None:
    """List data sets with their licences, generators, record shapes and chunkers."""
    if as_json:
        typer.echo(json.dumps(_facts(), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for table in _tables():
        console.print(table)
        console.print()


def _facts() -> dict:
    from dataclasses import asdict

    from blocktune.data.chunking import CHUNKERS
    from blocktune.data.sources import CATALOG, GENERATORS, SHAPES
    from blocktune.registry import summary_of

    return {
        "data_sets": {name: asdict(entry) for name, entry in CATALOG.items()},
        "generators": {
            name: {"example": entry.example, "becomes": entry.becomes}
            for name, entry in GENERATORS.items()
        },
        "shapes": {
            shape.key: {"fields": list(shape.keys), "chunker": shape.chunker} for shape in SHAPES
        },
        "chunkers": {name: summary_of(cls) for name, cls in sorted(CHUNKERS.table().items())},
    }


def _tables():
    facts = _facts()
    table = _table("data sets", "name", "on the Hub", "licence", "a record becomes")
    for name, entry in facts["data_sets"].items():
        hub = entry["hub"] + (f":{entry['config']}" if entry["config"] else "")
        table.add_row(name, hub, entry["licence"], entry["becomes"])
    yield table
    table = _table("generators", "source", "an example is")
    for entry in facts["generators"].values():
        table.add_row(entry["example"], entry["becomes"])
    yield table
    table = _table("record shapes of files", "as=", "told by the fields", "cut by")
    for name, entry in facts["shapes"].items():
        fields = " or ".join(", ".join(keys) for keys in entry["fields"])
        table.add_row(name, fields or "(name it)", entry["chunker"] or "(has chunks)")
    yield table
    table = _table("chunkers", "chunker=", "what it does")
    for name, summary in facts["chunkers"].items():
        table.add_row(name, summary.replace("``", ""))
    yield table


def _table(title: str, *columns: str):
    """A table that folds what is too long: names are there to be copied."""
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
