"""Renders ``results.json`` as an HTML page of sentences, charts and tables, with a template."""

from __future__ import annotations

import json
from base64 import b64encode
from functools import reduce
from importlib.resources import files
from operator import getitem
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, UndefinedError
from markupsafe import Markup

from blocktune.evaluation.compare import findings, load_results, power_notes, verdict
from blocktune.evaluation.report.charts import charts_of
from blocktune.evaluation.report.style import DARK, LIGHT, mark, to_png, to_svg
from blocktune.evaluation.results import ORACLE, RESULTS, plain_label
from blocktune.files import replace_text
from blocktune.tables import ABSENT, written

PAGE, PICTURES = "report.html", "report"  # written to the folder of a run; a folder of PNG files


def write_report(folder: str | Path, title: str | None = None) -> Path:
    """Writes the report of a finished run into its folder and returns the page's path.

    Each number has its full value and its path in ``results.json``.
    """
    folder = Path(folder)
    results = load_results(folder)

    def number(form: str, *keys: Any) -> str:
        keys = [key for part in keys for key in (part if isinstance(part, list) else [part])]
        if (value := reduce(getitem, keys, results)) is None:
            return ABSENT
        data = '<data value="{}" data-path="{}" data-form="{}">{}</data>'
        return Markup(data).format(repr(value), pointer(*keys), form, written(form, value))

    def interval(form: str, *keys: Any) -> Markup:
        low, high = (number(form, *keys, end) for end in (0, 1))
        return Markup("<small>({} to {})</small>").format(low, high)

    template = files("blocktune.evaluation.report").joinpath("page.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    try:
        charts = []
        for chart in charts_of(results):
            to_png(chart.draw, folder / PICTURES / f"{chart.name}.png", chart.height)
            svgs = (to_svg(chart.draw, ground, chart.height) for ground in (LIGHT, DARK))
            urls = (f"data:image/svg+xml;base64,{b64encode(svg).decode()}" for svg in svgs)
            charts.append(chart._asdict() | dict(zip(("light", "dark"), urls, strict=True)))
        grounds, labels = (LIGHT, DARK), results["methods"]
        page = environment.from_string(template).render(
            title=title or folder.resolve().name,
            results=results,
            sentences=[*findings(results), *power_notes(results)],
            charts=charts,
            looks={label: [mark(ground, label)["color"] for ground in grounds] for label in labels},
            full=plain_label(results, ORACLE),
            provenance=json.dumps(results["provenance"], indent=2),
            **{"number": number, "interval": interval, "verdict": verdict},
        )
    except (LookupError, TypeError, AttributeError, StopIteration, UndefinedError) as error:
        reason = f"edited, or of another version ({error!r}); repeat the evaluation"
        raise ValueError(f"{folder / RESULTS}: {reason}") from error
    replace_text(folder / PAGE, page)
    return folder / PAGE


def pointer(*keys: str | int) -> str:
    """The JSON pointer (RFC 6901) of a value in ``results.json``, given its keys."""
    return "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in keys)
