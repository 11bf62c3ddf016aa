"""The model card: training, serving and results of an adapter."""

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
from blocktune.methods import BOTH_LEARNED, default_method
from blocktune.models.identity import adapter_fingerprint, same_base
from blocktune.parsing import load_json
from blocktune.prompt import LayoutSpec
from blocktune.provenance import public
from blocktune.tables import Table, with_interval, written

TEMPLATE = Path(__file__).with_name("card.md.jinja")
# By placement, the method for a document marker: one learned token on each side of a chunk.
MARKED = {"sequential": "turborag", "composite": "turborag positions=composite"}


@dataclass(frozen=True)
class CardFacts:
    """Facts for the card that the adapter's folder does not have."""

    base_model: str | None = None  # name of the base on the Hub; None: as named in the adapter
    license: str | None = None  # licence identifier of the Hub; None: that of the base
    datasets: tuple[str, ...] = ()  # names on the Hub, in addition to those of the run
    results: Path | None = None  # ``results.json`` of `blocktune eval`, or None


def card(
    repo: str,
    info: AdapterInfo,
    base: str,
    facts: CardFacts,
    checks: list[Check],
    results: str = "Not evaluated.",
) -> str:
    """The ``README.md`` of a repository; ``base`` is a name, ``results`` a section's text."""
    method, whole = served_by(info.layout), info.base_model == OWN_WEIGHTS
    summary = "to answer from passages that are encoded once, separately, and reused in any prompt"
    if not info.layout.block:
        summary = "on the same prompts in full attention, as a control"
    data = ModelCardData(
        base_model=base,
        datasets=sorted({*datasets_of(info.training), *facts.datasets}) or None,
        license=facts.license,
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation",
        tags=["blocktune", "rag", "kv-cache", method.partition(" ")[0]],
    )
    differences = [(check.name, f"{check.max_abs_diff:.1e}") for check in checks]
    text = ModelCard.from_template(
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
        checks=Table(("check", "difference of logits"), differences).markdown(),
    )
    return str(text)


def served_by(layout: LayoutSpec) -> str:
    """The method (for ``--method``) that serves an adapter without recomputing tokens."""
    if not layout.block:
        return "full-prefill"
    if layout.num_links and layout.num_headers + layout.num_trailers:
        raise ValueError(BOTH_LEARNED)
    if layout.num_headers == layout.num_trailers == 1 and layout.placement in MARKED:
        return MARKED[layout.placement]
    return default_method(layout).name


def _facts(info: AdapterInfo) -> str:
    defaults = LayoutSpec().to_dict()
    layout = {name: v for name, v in info.layout.to_dict().items() if v != defaults[name]}
    facts = {"layout": layout, "base_revision": info.base_revision, "rope": info.rope}
    facts |= {"link_mode": info.link_mode} if info.num_learned else {}
    facts |= {"scope": info.scope, "quantization": info.quantization}
    facts["training"] = public(info.training) | {"data_sets": datasets_of(info.training)}
    return yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=1000)


def datasets_of(training: Mapping[str, Any]) -> dict[str, str]:
    """Data sets on the Hub used by a run (`AdapterInfo.training`), with their licences."""
    licences, data = dict(training.get("data_sets") or {}), training.get("data") or ""
    parts = data.get("parts", ()) if isinstance(data, Mapping) else [{"source": data}]
    for part in parts:
        licences |= data_sets_in(part["source"])
    return licences


NOTE = (
    "Scores in %, with 95 % intervals in brackets. Adjusted F1: over the questions that full "
    "prefill of the base answers. Recomputed: share of context tokens. TTFT: time to first token, "
    "chunks cached."
)
SHOWN = ("EM", "F1")  # titles of main scores that always have a column of their own
INTERVALS = (("em", "ci95"), ("f1", "f1_ci95"))


def results_of(path: Path, folder: Path, info: AdapterInfo) -> str:
    """Markdown of the results of `blocktune eval` for the base and the adapter in ``folder``."""
    record = _read(path)
    origin = record.get("provenance") or {}
    if "base_fingerprint" not in origin:
        raise ValueError(f"{path} does not name the weights it measured; repeat `blocktune eval`")
    if not same_base(origin["base_fingerprint"], info.base_fingerprint):
        raise ValueError(
            f"{path} is of another base ({origin['base_fingerprint']}) than '{folder}' "
            f"({info.base_fingerprint}); evaluate this adapter"
        )
    fingerprints, fingerprint = origin.get("adapter_fingerprints", {}), adapter_fingerprint(folder)
    left_out, methods = [], {}
    for label, result in record["methods"].items():
        # A mean over seeds includes other adapters.
        is_same = fingerprints.get(result["adapter"]) == fingerprint
        if result["adapter"] is None or (is_same and len(result.get("seeds", ())) < 2):
            methods[label] = result
        else:
            left_out.append(label)
    whole = info.base_model == OWN_WEIGHTS  # then this model is the "base" of the evaluation
    if not (methods if whole else any(result["adapter"] for result in methods.values())):
        others = ", ".join(left_out) or "the base"
        raise ValueError(f"{path} measures no method with the adapter '{folder}', but {others}")
    titles = {task.get("title") for task in record.get("tasks", {}).values()}
    title = (titles.pop() if len(titles) == 1 else None) or "score of the task"
    has_own = title not in SHOWN and all("score" in result for result in methods.values())
    headings = ["method", "n", *[title] * has_own, *SHOWN]
    headings += ["adjusted F1", "recomputed", "TTFT / full prefill"]
    scores = (("score", "score_ci95"),) * has_own + INTERVALS
    rows = []
    for label, result in methods.items():
        cells = [with_interval("score", result.get(key), result.get(ends)) for key, ends in scores]
        cells += [written("score", result.get(key)) for key in ("adjusted_f1", "recompute_ratio")]
        ttft = written("ratio", result.get("ttft_over_full_prefill"))
        rows.append([label, f"{result['n']:,}", *cells, ttft])
    origin = public(origin)
    parts = [f"by `{origin['command']}`"] if origin.get("command") else []
    parts += [f"at commit `{origin['commit'][:12]}`"] if origin.get("commit") else []
    note = NOTE + (f" Made {', '.join(parts)}." if parts else "")
    if left_out:
        note += f" Left out, measured with other adapters: {', '.join(left_out)}."
    return Table(headings, rows).markdown(right=True) + "\n\n" + note


def _read(path: Path) -> Mapping[str, Any]:
    try:
        record = load_json(path)
        for result in record["methods"].values():
            _ = [result[key] for key in ("n", "em", "ci95", "adapter")]
    except OSError:
        raise ValueError(f"no results at '{path}'; make them with `blocktune eval`") from None
    except (TypeError, LookupError, AttributeError):
        raise ValueError(f"{path}: not a results.json of `blocktune eval`") from None
    return record
