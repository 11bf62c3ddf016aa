"""Refreshes the blocks of a Markdown page from results; everything outside of them stays.

    python eval/study/refresh_page.py eval/results/worlds/STUDY.md --runs out/study

```text
<!-- table: {show: scores, run: study/untuned, methods: [naive, epic]} -->
...replaced...
<!-- end of table -->
```
``run`` is a JSON file beside the page, without its suffix. A ``figure`` has ``file``, the picture's
path beside the page, and ``about``, which is said of it; further keys are those of its kind.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml
from page_figures import FIGURES
from page_tables import TABLES

from blocktune.files import replace_text

BLOCK = re.compile(
    r"(?P<open><!-- (?P<kind>table|figure): (?P<keys>\{.*?\}) -->\n)"
    r"(?P<body>.*?)(?P<close><!-- end of (?P=kind) -->)",
    re.DOTALL,
)
KINDS: Mapping[str, Mapping[str, Callable]] = {"table": TABLES, "figure": FIGURES}


def refresh(path: str | Path, runs: str | Path | None = None) -> list[str]:
    """Replaces a page's tables and pictures.

    Args:
        path: The page.
        runs: Folder of runs; those that the page names (by the last part of ``run``) and that are
            finished there become the results beside the page first.

    Returns:
        The runs of the page that have no results yet.

    Raises:
        ValueError: If there is no block, one cannot be read or asks for what its results do not
            have, or there is no such folder.
        FileNotFoundError: If there is no page.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    named = dict.fromkeys(_keys(block, path)["run"] for block in BLOCK.finditer(text))
    if not named:
        raise ValueError(
            f"{path} holds no block of a table or a figure; see eval/results/worlds/STUDY.md"
        )
    if runs is not None and not Path(runs).is_dir():
        raise ValueError(f"no folder of runs at '{runs}'")
    for name in named if runs else ():
        keep(Path(runs) / Path(name).name, path.parent / f"{name}.json")
    replace_text(path, refreshed(text, path, draw=True))
    return [name for name in named if not (path.parent / f"{name}.json").is_file()]


def refreshed(text: str, path: str | Path, *, draw: bool = False) -> str:
    """A page's text with every block replaced; the same text if nothing has changed.

    Args:
        text: Of the page.
        path: Where it lies: results and pictures are looked up from there.
        draw: Whether pictures are written too.

    Raises:
        ValueError: See `refresh`.
    """
    return BLOCK.sub(lambda block: _made(block, Path(path), draw), text)


def _made(block: re.Match, path: Path, draw: bool) -> str:
    keys = _keys(block, path)
    show, run = keys.pop("show"), keys.pop("run")
    source = path.parent / f"{run}.json"
    if not source.is_file():
        body = f"*Not measured yet: there is no `{run}.json`.*"
    else:
        results = json.loads(source.read_text(encoding="utf-8"))
        try:
            body = _body(block["kind"], show, results, keys, path.parent, draw)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: '{show}' of {run}: {error!r}; see {source}") from None
    return f"{block['open']}{body}\n{block['close']}"


def _body(
    kind: str, show: str, results: Mapping[str, Any], keys: dict, folder: Path, draw: bool
) -> str:
    if kind == "table":
        return TABLES[show](results, **keys)
    file, about = keys.pop("file"), keys.pop("about")
    if draw:
        FIGURES[show](results, folder / file, **keys)
    return f"![{about}]({file})"


def _keys(block: re.Match, path: Path) -> dict[str, Any]:
    kind, keys = block["kind"], yaml.safe_load(block["keys"])
    wanted = {"show", "run"} | ({"file", "about"} if kind == "figure" else set())
    if missing := sorted(wanted - keys.keys()):
        raise ValueError(f"{path}: a {kind} lacks '{missing[0]}': {block['keys']:.60}")
    if keys["show"] not in KINDS[kind]:
        raise ValueError(
            f"{path}: no {kind} shows '{keys['show']}'; available: {', '.join(KINDS[kind])}"
        )
    return keys


SOURCES = ("results.json", "traces.json")
DROPPED = ("em_minus", "sweeps", "budget")
"""Large, and read by no table; differences of the headline score stay, but not by kind."""


def keep(run: Path, path: Path) -> bool:
    """Writes what is kept of a run's results; returns whether the run has any.

    Args:
        run: The --output folder of a run.
        path: The JSON file to write.
    """
    for source in SOURCES:
        if (run / source).is_file():
            results = json.loads((run / source).read_text(encoding="utf-8"))
            replace_text(path, _lines(kept(results)) + "\n")
            return True
    return False


def kept(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``results.json`` or ``traces.json`` that is committed."""
    found = json.loads(json.dumps({k: v for k, v in results.items() if k not in DROPPED}))
    for summary in found.get("methods", {}).values():
        summary.pop("em_minus", None)
        for cell in summary["tasks"].values():
            for name in ("em_minus", "score_minus"):
                cell.pop(name, None)
    command = found["provenance"].get("command")
    if command:
        found["provenance"]["command"] = shlex.join(map(_no_path, shlex.split(command)))
    return found


def _lines(value: Any, depth: int = 2) -> str:
    """JSON with a line for every method: small, and yet a diff shows which have changed."""
    if depth == 0 or not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = (f"{json.dumps(key)}: {_lines(one, depth - 1)}" for key, one in value.items())
    return "{\n" + ",\n".join(inner) + "\n}"


def _no_path(word: str) -> str:
    """The last part of an absolute path: the others are of one machine."""
    return PurePath(word).name if PurePath(word).is_absolute() else word


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path, help="Markdown with blocks of tables and figures")
    parser.add_argument("--runs", type=Path, help="folder of finished runs to take results from")
    given = parser.parse_args(arguments)
    try:
        missing = refresh(given.page, given.runs)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.page}: " + (f"not measured: {', '.join(missing)}" if missing else "complete"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
