"""The page: sentences, pictures and tables of one ``results.json``."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from blocktune.evaluation.compare import load_results
from blocktune.evaluation.findings import findings, power_notes
from blocktune.evaluation.report import tables
from blocktune.evaluation.report.charts import Chart, charts_of
from blocktune.evaluation.report.style import DARK, LIGHT, Ground, to_png, to_svg
from blocktune.evaluation.results import ORACLE, plain_label
from blocktune.files import replace_text

PAGE, PICTURES = "report.html", "report"
"""What is written into the folder of a run: the page, and a folder of PNGs."""
ADJUSTED = (
    "Adjusted F1 (arXiv:2603.20218) keeps the questions that full prefill scores on. The filter "
    "conditions on full prefill's own luck: F1 that a method earns elsewhere is dropped. 'Filter "
    "hides' is that F1 per kept question, by which the adjusted gap to full prefill is wider than "
    "the raw one; 'reversed' is full prefill's F1 under the same filter reversed."
)
DIFFERENCES = (
    "p is McNemar's exact test, or sign flips where scores are not 0 or 1; Holm's correction is "
    "over all pairs of methods of this run, and verdicts follow it. Intervals are of one "
    "difference alone. 'Detectable' is the smallest difference in points that this many questions "
    "show with 80 % power after the correction."
)
BUDGET = (
    "Methods whose recomputed shares of layer-tokens differ by at most two points. The share "
    "counts layers that a method computes in full."
)


class Part(NamedTuple):
    """A section of the page."""

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Mapping[str, str]] = ()
    tables: Sequence[tables.Table] = ()


def write_report(folder: str | Path, title: str | None = None) -> Path:
    """Writes the report of a finished run beside its results.

    Args:
        folder: The run's.
        title: Of the page; by default the folder's name.

    Returns:
        The page's path.

    Raises:
        ValueError: If the folder holds no results.
    """
    folder = Path(folder)
    results = load_results(folder)
    charts = charts_of(results)
    for chart in charts:
        to_png(chart.draw, folder / PICTURES / f"{chart.name}.png", chart.height)
    page = render(results, charts, title or folder.resolve().name)
    replace_text(folder / PAGE, page)
    return folder / PAGE


def render(results: Mapping[str, Any], charts: Sequence[Chart], title: str) -> str:
    """The page as one string of HTML."""
    text = files("blocktune.evaluation.report").joinpath("page.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(text).render(
        title=title,
        subtitle=_subtitle(results),
        sentences=[*findings(results), *power_notes(results)],
        parts=_parts(results, charts),
        provenance=json.dumps(results["provenance"], indent=2),
    )


def _parts(results: Mapping[str, Any], charts: Sequence[Chart]) -> list[Part]:
    named = {chart.name: _picture(chart) for chart in charts}
    groups = list(next(iter(results["methods"].values()))["tasks"])
    full = plain_label(results, ORACLE)
    parts = [
        Part("All methods", (_scores_of(results),), (), (tables.overview(results),)),
        Part("Score against cost", (), _starting(named, "score-by-")),
    ]
    if results["budget"]["matched"]:
        parts.append(Part("At the same budget", (BUDGET,), (), (tables.same_budget(results),)))
    for group, chart in zip(groups, _starting(named, "task-"), strict=True):
        parts.append(Part(group, (), (chart,), (tables.by_group(results, group),)))
    if full:
        parts.append(
            Part("Against full prefill", (DIFFERENCES,), (), (tables.differences(results, full),))
        )
        parts.append(Part("F1, raw and adjusted", (ADJUSTED,), (), (tables.adjusted(results),)))
    if sweeps := _starting(named, "sweep-"):
        parts.append(Part("Position and length", (), sweeps))
    if (closeness := tables.fidelity(results)).rows:
        parts.append(Part("Closeness to full prefill", (), (), (closeness,)))
    return parts


def _scores_of(results: Mapping[str, Any]) -> str:
    named = [
        f"{name}: {about['title']} (task version {about['version']})"
        for name, about in results["tasks"].items()
    ]
    return (
        f"Score is each task's headline metric in %, {'; '.join(named)}. Brackets are 95 % "
        "intervals of one mean (Wilson) or one paired difference, not corrected for their number."
    )


def _subtitle(results: Mapping[str, Any]) -> str:
    counts = {summary["n"] for summary in results["methods"].values()}
    return f"{len(results['methods'])} methods on {max(counts):,} questions each"


def _starting(named: Mapping[str, Mapping[str, str]], prefix: str) -> list[Mapping[str, str]]:
    return [picture for name, picture in named.items() if name.startswith(prefix)]


def _picture(chart: Chart) -> dict[str, str]:
    return {
        "light": _data_uri(chart, LIGHT),
        "dark": _data_uri(chart, DARK),
        "about": f"{chart.title}. {chart.about}",
    }


def _data_uri(chart: Chart, ground: Ground) -> str:
    svg = to_svg(chart.draw, ground, chart.height)
    return f"data:image/svg+xml;base64,{b64encode(svg).decode()}"
