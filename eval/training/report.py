"""Renders the results of all recipes and seeds as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocktune.tables import Table, with_half

HEADINGS = (
    "recipe", "adjusted F1", "by seed", "of full prefill", "of control", "- 97 % of full",
    "- CacheBlend", "- naive", "- plain", "raw F1", "self-contained EM", "in full attention, EM",
    "tokens", "seconds", "trained",
)  # fmt: skip


def page_of(report: Mapping[str, Any]) -> str:
    """The page: title, verdict, table and provenance."""
    lines = ["# 2,000 samples, LoRA, disjoint worlds", "", _verdict(report), ""]
    rows = [
        _baseline(name.replace("_", "-"), report[name])
        for name in ("full_prefill", "cacheblend", "naive")
    ]
    for name, recipe in report["recipes"].items():
        bold = f"**{name}**" if name == report["best"]["recipe"] else name
        rows.append(_recipe(bold, recipe))
    if control := report["control"]:
        rows.append(_recipe(f"{control['recipe']}, by full prefill", control))
    filled = [i for i in range(len(HEADINGS)) if any(row[i] for row in rows)]
    shown = [[row[i] for i in filled] for row in (HEADINGS, *rows)]
    lines.append(Table(shown[0], shown[1:]).markdown())
    origin = report["provenance"]
    sources = sorted({adapter["data"] for adapter in origin["adapters"].values()})
    lines += [
        "",
        "No tokens are recomputed. Adjusted F1 in % is over the questions that the base model "
        "answers by full prefill, raw F1 over all, each ± half its 95 % interval. Differences are "
        "in points with paired intervals over questions, after averaging over seeds; plain is "
        "`block_attention`. Tokens and seconds are per seed, as logged in training. Trained on "
        f"{', '.join(sources)}; a sample is a context with `turns` questions. "
        f"Evaluated on {', '.join(report['asked_on'])}.",
        "",
        f"Made by `{origin['command']}` at commit `{origin['commit']}`, on {_machine(origin)}.",
    ]
    return "\n".join(lines) + "\n"


def _machine(origin: Mapping[str, Any]) -> str:
    parts = origin["hardware"]
    return ", ".join([*parts["gpus"], f"{parts['processor']} with {parts['cores']} cores"])


def _verdict(report: Mapping[str, Any]) -> str:
    best = report["best"]
    claims = [
        ("reaches 97 % of full prefill", best["minus_97_percent_of_full_prefill"]),
        ("beats CacheBlend at 15 %", best["minus_cacheblend"]),
        ("costs at most a point in full attention", best["full_attention"]["change"]),
    ]
    tests = [f"{text}: {'yes' if gap['met'] else 'no'} ({_span(gap)})" for text, gap in claims]
    seeds = best["seeds_minus_97_percent"].values()
    return (
        f"Best on {report['chosen_on']['source']}: `{best['recipe']}`, served by "
        f"`{best['method']}`, adjusted F1 {_percent(best['adjusted_f1'])} % on {best['n']:,} of "
        f"{best['asked']:,} held-out questions. By the interval, it " + "; it ".join(tests) + f". "
        f"{sum(seed['met'] for seed in seeds)} of its {len(seeds)} seeds reach 97 % by themselves. "
        f"On all questions, including those that full prefill fails, it has "
        f"{_share(best['raw_of_full_prefill'])} of full prefill's F1."
    )


def _baseline(name: str, numbers: Mapping[str, Any]) -> list[str]:
    alone = numbers["em"].get("self-contained")
    return [
        f"base, {name}", _score(numbers), *[""] * 7, _raw(numbers), _percent(alone), *[""] * 4,
    ]  # fmt: skip


def _recipe(name: str, numbers: Mapping[str, Any]) -> list[str]:
    full, cost = numbers.get("full_attention"), numbers["cost"]
    return [
        name,
        _score(numbers),
        ", ".join(_percent(seed) for seed in numbers["seeds"].values()),
        _share(numbers.get("of_full_prefill")),
        _share(numbers.get("of_control")),
        _span(numbers.get("minus_97_percent_of_full_prefill")),
        _span(numbers.get("minus_cacheblend")),
        _span(numbers.get("minus_naive")),
        _span(numbers.get("minus_plain")),
        _raw(numbers),
        _percent(numbers["em"].get("self-contained")),
        f"{_percent(full['em'])} ({_span(full['change'])})" if full else "",
        f"{cost['tokens']:,.0f}",
        f"{cost['seconds']:,.0f}",
        f"{cost['trainable_parameters']:,}",
    ]


def _score(numbers: Mapping[str, Any]) -> str:
    return with_half(numbers["adjusted_f1"], numbers["ci95"], 1)


def _raw(numbers: Mapping[str, Any]) -> str:
    return with_half(numbers["raw_f1"], numbers["raw_ci95"], 1)


def _span(numbers: Mapping[str, Any] | None) -> str:
    if numbers is None:
        return ""
    low, high = numbers["ci95"]
    return f"{100 * numbers['mean']:+.1f}, {100 * low:+.1f} to {100 * high:+.1f}"


def _share(numbers: Mapping[str, Any] | None) -> str:
    return f"{100 * numbers['mean']:.0f} %" if numbers else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
