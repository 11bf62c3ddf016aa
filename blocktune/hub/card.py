"""The model card: what was trained on what, how it is served, and what was measured."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from blocktune.adapter import OWN_WEIGHTS, AdapterInfo
from blocktune.check import Check
from blocktune.hub.files import public
from blocktune.hub.results import Measured, datasets_of, results_section
from blocktune.methods import BOTH_LEARNED, Weights, available, build
from blocktune.prompt import LayoutSpec

MARKED = "turborag"
"""What one learned token on each side of a chunk is: a document marker. KV Packet has several."""


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

    Args:
        repo: ``USER/NAME``.
        info: The adapter's.
        base: The base's name on the Hub.
        facts: With the licence filled in.
        checks: What `blocktune.check` found; all passed.
        measured: The results, if there are any.

    Raises:
        ValueError: If no method serves the adapter.
    """
    sections = (
        f"---\n{_metadata(info, base, facts)}\n---",
        f"# {repo.partition('/')[2]}",
        _what(info, base),
        _use(repo, info),
        results_section(measured),
        _layout(info),
        _training(info, facts),
        _checks(checks),
    )
    return "\n\n".join(sections) + "\n"


def served_by(layout: LayoutSpec) -> str:
    """The method that serves an adapter as it was trained, with nothing computed afresh.

    Returns:
        A preset's name, with the parameters that it needs: as ``--method`` takes it.

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


def _metadata(info: AdapterInfo, base: str, facts: CardFacts) -> str:
    datasets = sorted({*datasets_of(info.training), *facts.datasets})
    whole = info.base_model == OWN_WEIGHTS
    return ModelCardData(
        base_model=base,
        datasets=datasets or None,
        license=facts.license,
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation",
        tags=["blocktune", "rag", "kv-cache", served_by(info.layout).partition(" ")[0]],
    ).to_yaml()


def _what(info: AdapterInfo, base: str) -> str:
    kind = "A model made from" if info.base_model == OWN_WEIGHTS else "An adapter for"
    told = (
        "in which retrieved passages are encoded once, each by itself, and reused in any prompt"
        if info.layout.block
        else "trained on the same prompts in full attention: the control of such adapters"
    )
    return f"{kind} [{base}](https://huggingface.co/{base}), {told}, by blocktune."


def _use(repo: str, info: AdapterInfo) -> str:
    method = served_by(info.layout)
    quantised = f" --quantize {info.quantization}" if info.quantization else ""
    note = (
        f"\n\nIt was trained on a base in {info.quantization}: `--quantize {info.quantization}` "
        "serves that; the plain base is another model, and a little off."
        if info.quantization
        else ""
    )
    extras = "serve,train,gpu" if info.quantization else "serve"
    return f"""## Use

```bash
pip install 'blocktune[{extras}]'
blocktune answer --adapter {repo} --method {shlex.quote(method)}{quantised} \\
  --question "Where was Anna born?" --chunk "Anna was born in Kirby." --chunk "Kirby is a harbour."
```

```python
from blocktune import Chunk, Engine, RagExample

engine = Engine.from_pretrained(adapter="{repo}"{_argument(info.quantization)})
chunks = (Chunk("Anna was born in Kirby."), Chunk("Kirby is a harbour."))
print(engine.answer([RagExample("Where was Anna born?", chunks)], "{method}")[0].text)
```{note}"""


def _argument(quantization: str | None) -> str:
    return f', quantize="{quantization}"' if quantization else ""


def _layout(info: AdapterInfo) -> str:
    spec = info.layout.to_dict()
    changed = {name: value for name, value in spec.items() if value != getattr(LayoutSpec(), name)}
    rows = changed or {"layout": "block attention, sequential positions"}
    if info.num_learned:
        rows |= {"learned tokens": info.num_learned, "kept as": info.link_mode}
    if info.rope:
        rows |= {"RoPE": info.rope.get("rope_type", "by layer type")}
    rows |= {"base revision": info.base_revision or "not pinned"}
    return "## Served as trained\n\n`blocktune.json` carries all of it.\n\n" + _table(rows.items())


def _training(info: AdapterInfo, facts: CardFacts) -> str:
    made = public(info.training)
    versions, licences = made.get("versions", {}), datasets_of(info.training)
    rows = {
        "command": f"`{made['command']}`" if made.get("command") else None,
        "data": _sources(info.training),
        "licences of the data": "; ".join(f"{k}: {v}" for k, v in licences.items()) or None,
        "examples": made.get("examples"),
        "seed": made.get("seed"),
        "processes": made.get("world_size"),
        "quantised base": info.quantization,
        "blocktune": versions.get("blocktune"),
        "commit": made.get("commit"),
    }
    known = [(name, value) for name, value in rows.items() if value is not None]
    return "## Training\n\n" + _table(known)


def _sources(training: Mapping[str, Any]) -> str | None:
    """The one source, or those of a mixture's parts."""
    data = public(training.get("data"))
    if not isinstance(data, Mapping):
        return data
    return ", ".join(f"`{part.get('source')}`" for part in data.get("parts", ()))


def _checks(checks: list[Check]) -> str:
    rows = [(one.name, f"{one.max_abs_diff:.1e}") for one in checks]
    told = "`blocktune check` holds cached serving to dense attention on this very model.\n\n"
    return "## Checks\n\n" + told + _table(rows, ("claim", "difference of logits"))


def _table(rows: Iterable[tuple[str, Any]], heading: tuple[str, str] = ("", "")) -> str:
    lines = [f"| {heading[0]} | {heading[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])
