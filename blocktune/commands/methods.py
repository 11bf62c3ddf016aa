"""`blocktune methods`."""

from __future__ import annotations

import json

import typer

from blocktune.commands import options as opt
from blocktune.commands.application import command


@command(
    "methods",
    "blocktune methods",
    "blocktune methods --plugin mine.py",
    "blocktune methods --json | jq '.[] | select(.kind == \"method\") | .name'",
    "Methods can be composed: 'kvlink + epic', 'block-attention + deviation 15 %'.",
)
def methods(
    as_json: opt.AsJson = False,
) -> None:
    """List methods, selectors, reshapes and layouts with their requirements and parameters."""
    from blocktune.methods.describe import describe_all

    found = describe_all()
    if as_json:
        typer.echo(json.dumps([entry._asdict() for entry in found], indent=2))
    else:
        _print_groups(found)


def _print_groups(found: list) -> None:
    """One line with name, weights and parameters, then what it does, indented."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from blocktune.methods.describe import GROUPS

    console = Console(highlight=False)
    for group, heading in GROUPS.items():
        entries = [entry for entry in found if entry.group == group]
        if not entries:
            continue
        console.print(Text(f"\n{heading}", style="bold"))
        for entry in entries:
            parts = [(entry.name, "cyan")]
            if entry.weights != "any":
                parts.append((f"  for {entry.weights}", "magenta"))
            for name, value in entry.parameters.items():
                parts.append((f"  {name}=" + json.dumps(value).strip('"'), ""))
            console.print(Padding(Text.assemble(*parts), (0, 0, 0, 2)))
            console.print(Padding(Text(entry.summary, style="dim"), (0, 0, 0, 6)))
