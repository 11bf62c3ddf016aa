"""The model card: what was trained on what, how it is served, and what was measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from blocktune.adapter import OWN_WEIGHTS, AdapterInfo
from blocktune.check import Check
from blocktune.hub.files import public
from blocktune.hub.results import Measured, datasets_of, results_table
from blocktune.methods import BOTH_LEARNED, Weights, available, build
from blocktune.prompt import LayoutSpec
from blocktune.tables import Table

TEMPLATE = Path(__file__).with_name("card.md.jinja")
MARKED = "turborag"
"""Serves one learned token on each side of a chunk, a document marker; KV Packet has several."""


@dataclass(frozen=True)
class CardFacts:
    """What the adapter's folder does not know.

    Attributes:
        base_model: The base's name on the Hub; None: as the adapter says.
        license: Identifier that the Hub knows; None: the base's own.
        datasets: Names on the Hub, besides those that the adapter's provenance names.
        results: ``results.json`` of `blocktune eval`, or None.
    """

    base_model: str | None = None
    license: str | None = None
    datasets: tuple[str, ...] = ()
    results: Path | None = None


def card(
    repo: str,
    info: AdapterInfo,
    base: str,
    facts: CardFacts,
    checks: list[Check],
    measured: Measured | None = None,
) -> str:
    """The whole ``README.md`` of a repository.

    ``base`` is the base's name on the Hub, ``facts`` has its licence filled in.
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
        results=results_table(measured),
        layout=_table(_layout(info)),
        training=_table(_training(info)),
        checks=_table(
            {one.name: f"{one.max_abs_diff:.1e}" for one in checks},
            ("check", "difference of logits"),
        ),
    )
    return str(made)


def served_by(layout: LayoutSpec) -> str:
    """The method, as ``--method`` takes it, that serves an adapter with nothing recomputed.

    Raises:
        ValueError: If none does.
    """
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


def _layout(info: AdapterInfo) -> Mapping[str, Any]:
    spec = info.layout.to_dict()
    rows = {name: value for name, value in spec.items() if value != getattr(LayoutSpec(), name)}
    rows = rows or {"layout": "block attention, sequential positions"}
    if info.num_learned:
        rows |= {"learned tokens": info.num_learned, "kept as": info.link_mode}
    if info.rope:
        rows |= {"RoPE": info.rope.get("rope_type", "by layer type")}
    return rows | {"base revision": info.base_revision or "not pinned"}


def _training(info: AdapterInfo) -> Mapping[str, Any]:
    made = public(info.training)
    versions, licences = made.get("versions", {}), datasets_of(info.training)
    data = made.get("data")
    if isinstance(data, Mapping):  # a mixture
        data = ", ".join(f"`{part.get('source')}`" for part in data.get("parts", ()))
    rows = {
        "command": f"`{made['command']}`" if made.get("command") else None,
        "data": data,
        "licences of the data": "; ".join(f"{k}: {v}" for k, v in licences.items()) or None,
        "examples": made.get("examples"),
        "seed": made.get("seed"),
        "processes": made.get("world_size"),
        "quantised base": info.quantization,
        "blocktune": versions.get("blocktune"),
        "commit": made.get("commit"),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _table(rows: Mapping[str, Any], heading: tuple[str, str] = ("", "")) -> str:
    return Table(heading, [(name, str(value)) for name, value in rows.items()]).markdown()
