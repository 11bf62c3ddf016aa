"""The model card: what was trained on what, how it is served, and what was measured.

Results must be of the very adapter.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from blocktune.adapter import OWN_WEIGHTS, AdapterInfo
from blocktune.adapter.scope import SCOPED_ROWS
from blocktune.check import Check
from blocktune.data.sources.catalog import data_sets_in
from blocktune.methods import BOTH_LEARNED, Weights, available, build
from blocktune.models.identity import adapter_fingerprint, same_base
from blocktune.parsing import load_json
from blocktune.prompt import LayoutSpec
from blocktune.provenance import public
from blocktune.tables import Table, with_interval, written

TEMPLATE = Path(__file__).with_name("card.md.jinja")
MARKED = "turborag"
"""Serves one learned token on each side of a chunk, a document marker; KV Packet has several."""


@dataclass(frozen=True)
class CardFacts:
    """What the adapter's folder does not know."""

    base_model: str | None = None  # the base's name on the Hub; None: as the adapter says
    license: str | None = None  # identifier that the Hub knows; None: the base's own
    datasets: tuple[str, ...] = ()  # names on the Hub, besides those of its provenance
    results: Path | None = None  # ``results.json`` of `blocktune eval`, or None


def card(
    repo: str,
    info: AdapterInfo,
    base: str,
    facts: CardFacts,
    checks: list[Check],
    results: str = "Not evaluated.",
) -> str:
    """The whole ``README.md`` of a repository.

    ``base`` is the base's name on the Hub, ``facts`` has its licence filled in, ``results`` are the
    section of that name.
    """
    method, whole = served_by(info.layout), info.base_model == OWN_WEIGHTS
    summary = (
        "with retrieved passages encoded once, each by itself, and reused in any prompt"
        if info.layout.block
        else "trained on the same prompts with full attention, as a control"
    )
    data = ModelCardData(
        base_model=base,
        datasets=sorted({*datasets_of(info.training), *facts.datasets}) or None,
        license=facts.license,
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation",
        tags=["blocktune", "rag", "kv-cache", method.partition(" ")[0]],
    )
    made = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=repo.partition("/")[2],
        repo=repo,
        base=base,
        kind="A model made from" if whole else "An adapter for",
        summary=summary,
        extras="serve,gpu" if info.quantization else "serve",
        method=method,
        quoted_method=shlex.quote(method),
        quantization=info.quantization,
        results=results,
        rows=SCOPED_ROWS.get(info.scope),
        facts=_facts(info),
        checks=Table(
            ("check", "difference of logits"),
            [(one.name, f"{one.max_abs_diff:.1e}") for one in checks],
        ).markdown(),
    )
    return str(made)


def served_by(layout: LayoutSpec) -> str:
    """The method, as ``--method`` takes it, that serves an adapter with nothing recomputed."""
    if not layout.block:
        return "full-prefill"
    if layout.num_links and layout.num_headers + layout.num_trailers:
        raise ValueError(BOTH_LEARNED)
    if layout.num_headers == layout.num_trailers == 1:
        for method in (MARKED, f"{MARKED} positions=composite"):
            if _serves(method, layout):
                return method
    for name in available():
        if build(name).weights is not Weights.ANY and _serves(name, layout):
            return name
    raise ValueError(f"no method of blocktune serves the layout {layout}; see `blocktune methods`")


def _serves(name: str, layout: LayoutSpec) -> bool:
    try:
        return build(name).layout_for(layout) == layout
    except ValueError:
        return False


def _facts(info: AdapterInfo) -> str:
    """What the adapter's file says of layout and training, as YAML without what is default."""
    plain = LayoutSpec().to_dict()
    layout = {name: v for name, v in info.layout.to_dict().items() if v != plain[name]}
    facts = {"layout": layout, "base_revision": info.base_revision, "rope": info.rope}
    facts |= {"link_mode": info.link_mode} if info.num_learned else {}
    facts |= {"scope": info.scope, "quantization": info.quantization}
    facts["training"] = public(info.training) | {"data_sets": datasets_of(info.training)}
    return yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=1000)


def datasets_of(training: Mapping[str, Any]) -> dict[str, str]:
    """Data sets on the Hub that a run (`AdapterInfo.training`) trained on, with their licences."""
    found, data = dict(training.get("data_sets") or {}), training.get("data") or ""
    parts = data.get("parts", ()) if isinstance(data, Mapping) else [{"source": data}]
    for part in parts:
        found |= data_sets_in(part["source"])
    return found


NOTE = (
    "Scores in %, with 95 % intervals in brackets. Adjusted F1: over the questions that full "
    "prefill of the base answers. Recomputed: share of context tokens. TTFT: time to first token, "
    "chunks cached."
)
SHOWN = ("EM", "F1")  # titles of headline scores that have a column in any case
INTERVALS = (("em", "ci95"), ("f1", "f1_ci95"))


def results_of(path: Path, folder: Path, info: AdapterInfo) -> str:
    """Markdown of what `blocktune eval` measured of the base and of the adapter in ``folder``."""
    record = _read(path)
    made = record.get("provenance", {})
    if "base_fingerprint" not in made:
        raise ValueError(
            f"{path} does not say which weights it measured, since an older blocktune wrote it, "
            "so nothing ties it to this adapter; repeat its `blocktune eval`"
        )
    if not same_base(made["base_fingerprint"], info.base_fingerprint):
        raise ValueError(
            f"{path} is of another base ({made['base_fingerprint']}) than '{folder}' "
            f"({info.base_fingerprint}); evaluate this adapter"
        )
    known, own = made.get("adapter_fingerprints", {}), adapter_fingerprint(folder)
    others, methods = [], {}
    for label, one in record["methods"].items():
        # A mean over seeds is of several adapters; the others' score is not this one's.
        alone = known.get(one["adapter"]) == own and len(one.get("seeds", ())) < 2
        if one["adapter"] is None or alone:
            methods[label] = one
        else:
            others.append(label)
    whole = info.base_model == OWN_WEIGHTS  # then the "base" of the run is this very model
    if not (methods if whole else any(one["adapter"] for one in methods.values())):
        raise ValueError(
            f"{path} measures no method with the adapter '{folder}' alone, but "
            f"{', '.join(others) or 'the base'}; evaluate this adapter"
        )
    titles = {task.get("title") for task in record.get("tasks", {}).values()}
    title = titles.pop() if len(titles) == 1 else "score of the task"
    has_own = title not in SHOWN and all("score" in one for one in methods.values())
    headings = ["method", "n", *([title or "score of the task"] if has_own else []), "EM", "F1"]
    headings += ["adjusted F1", "recomputed", "TTFT / full prefill"]
    scores = (("score", "score_ci95"),) * has_own + INTERVALS
    rows = []
    for label, one in methods.items():
        cells = [with_interval("score", one.get(key), one.get(ends)) for key, ends in scores]
        cells += [written("score", one.get(key)) for key in ("adjusted_f1", "recompute_ratio")]
        ttft = written("ratio", one.get("ttft_over_full_prefill"))
        rows.append([label, f"{one['n']:,}", *cells, ttft])
    made = public(made)
    parts = [f"by `{made['command']}`"] if made.get("command") else []
    parts += [f"at commit `{made['commit'][:12]}`"] if made.get("commit") else []
    told = NOTE + (f" Made {', '.join(parts)}." if parts else "")
    if others:
        told += f" Left out, measured with other adapters: {', '.join(others)}."
    return Table(headings, rows).markdown(right=True) + "\n\n" + told


def _read(path: Path) -> Mapping[str, Any]:
    try:
        record = load_json(path)
    except OSError:
        raise ValueError(f"no results at '{path}'; make them with `blocktune eval`") from None
    methods = record.get("methods") if isinstance(record, dict) else None
    wanted = {"n", "em", "ci95", "adapter"}
    if not isinstance(methods, dict) or not all(wanted <= own.keys() for own in methods.values()):
        raise ValueError(
            f"{path}: not a results.json of `blocktune eval`; it needs 'methods', each with "
            "n, em, ci95 and adapter"
        )
    return record
