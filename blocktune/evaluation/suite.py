"""Suites: which model answers which questions by which methods, as strict YAML.

Tasks, in versioned files, say how questions are worded, cut, decoded and scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from blocktune.evaluation.metrics import METRICS, Metric, require_metrics
from blocktune.methods.composition import KEEP
from blocktune.parsing import entries, load_spec, load_yaml, mapping, read, refuse_doubles
from blocktune.prompt import PromptFormat
from blocktune.registry import require_count

SEED = "{seed}"  # placeholder of the seed in the adapter's folder of an entry with ``seeds``


@dataclass(frozen=True)
class MethodSpec:
    """One row of the table: a method, its parameters, and the weights it runs on."""

    name: str  # a registered method, or a composition as text (``kvlink + epic``)
    adapter: str | None = None  # folder of the adapter it runs with; None runs the base
    label: str = ""  # its name in results; ``name`` unless given
    # fields of the method that differ from their defaults
    params: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None  # the method to change by the keys below; then ``name`` is a label
    select: Any = KEEP  # which tokens are recomputed: NAME, or ``{NAME: {parameter: value}}``
    repair: Any = KEEP  # how reused keys and values are changed, likewise; null: not at all
    reshape: Any = KEEP  # how later rows see reused keys, likewise; null leaves them as they are
    # fields of the layout to set: where chunks are placed, what they are encoded after
    layout: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None  # share of the context tokens that the selector may choose
    layer_budget: float | None = None  # share of layer-tokens to spend, instead

    def __post_init__(self):
        if not self.label:
            object.__setattr__(self, "label", self.name)
        if "/" in self.label or self.label.startswith("."):
            raise ValueError(f"label must name a file, got '{self.label}'; leave out slashes")

    def entry(self) -> dict[str, Any]:
        """What `blocktune.methods.build_entry` makes the method of: the keys that were given."""
        given = {"name": self.name, "select": self.select}
        given |= {"repair": self.repair, "reshape": self.reshape}
        for key in ("preset", "params", "layout", "budget", "layer_budget"):
            given[key] = KEEP if getattr(self, key) in (None, {}) else getattr(self, key)
        return {key: value for key, value in given.items() if value is not KEEP}

    @property
    def is_plain(self) -> bool:
        """Whether it is a registered method with its defaults, on the base model."""
        return self.adapter is None and set(self.entry()) == {"name"}


@dataclass(frozen=True)
class TaskSpec:
    """One set of questions and how they are asked and scored."""

    name: str  # its name in results
    source: str  # what `load_examples` reads: a path, ``musique``, ``worlds:test?n=300``
    version: int = 1  # of the task file; raised whenever a change moves scores
    limit: int | None = None  # use only the first ones; None uses all
    # wording, keys of `PromptFormat`; what it leaves out is each model's own, such as the tag of a
    # mode that an adapter was trained with
    prompt: Mapping[str, Any] | None = None
    # how the source cuts: a chunker and its parameters, ``{chunker: fixed, size: 512}``, or a
    # generator's ``{chunk: 128}``; empty leaves it to the source
    chunking: Mapping[str, Any] = field(default_factory=dict)
    answer_marker: str | None = None  # the text after it is scored; None scores the whole output
    stop: tuple[str, ...] = ()  # the output ends before the first of these texts
    max_new_tokens: int = 32  # longest answer, in tokens
    metric: str = "em"  # its headline score, a name of `METRICS`
    metrics: tuple[str, ...] = ()  # further scores
    by_kind: bool = True  # whether results are also given for each kind of question
    cite: str = ""  # where data and wording come from

    def __post_init__(self):
        for name in ("limit", "max_new_tokens", "version"):
            if (value := getattr(self, name)) is not None:
                require_count(name, value, 1)
        require_metrics((self.metric, *self.metrics))
        self.worded(PromptFormat())  # a wrong key is refused here, not in the middle of a run

    @property
    def headline(self) -> Metric:
        """The metric that tables and pictures show."""
        return METRICS[self.metric]

    def worded(self, own: PromptFormat) -> PromptFormat:
        """How a model is asked whose own wording is ``own``."""
        return PromptFormat.from_dict(own.to_dict() | dict(self.prompt or {}))

    def full_source(self) -> str:
        """The source with the chunking among its options."""
        name, _, options = self.source.partition("?")
        if not self.chunking:
            return self.source
        merged = dict(parse_qsl(options)) | dict(self.chunking)
        return f"{name}?{urlencode(merged, safe='/:,')}"

    def cut(self, text: str) -> str:
        """The part of an output that is scored by metrics with rules of their own."""
        for stop in self.stop:
            text = text.partition(stop)[0]
        return text.rpartition(self.answer_marker)[2] if self.answer_marker else text

    def decides(self) -> dict[str, Any]:
        """All that decides a row, as JSON; where questions come from and how many does not."""
        ignored = ("source", "limit", "by_kind", "cite", "chunking")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ignored}


@dataclass(frozen=True)
class TtftSpec:
    """How time to first token is measured."""

    num: int = 20  # prompts of the first task; 0 measures none
    chunks: int | None = None  # fill prompts up to this many chunks with those that follow

    def __post_init__(self):
        require_count("num", self.num)
        require_count("chunks", 1 if self.chunks is None else self.chunks, 1)


@dataclass(frozen=True)
class FidelitySpec:
    """How closeness of the answer's distribution to full prefill's is measured."""

    num: int = 0  # questions of each task; 0 measures none
    tokens: int = 4  # of full prefill's own answer, each compared given those before

    def __post_init__(self):
        require_count("num", self.num)
        require_count("tokens", self.tokens, 1)


@dataclass(frozen=True)
class Suite:
    """A whole comparison; see ``eval/suites/`` for examples."""

    model: str  # path or hub name of the base model
    methods: tuple[MethodSpec, ...]  # what is compared, in the order of the table
    tasks: tuple[TaskSpec, ...]  # what is asked
    dtype: str = "auto"  # of weights and caches; ``auto`` takes the checkpoint's
    quantize: str | None = None  # of the base as it is loaded: ``nf4`` or ``int8``
    device: str | None = None  # where to run; None takes a GPU when there is one
    store: str | None = None  # place and limits of chunks (`ChunkStore.open`); None: memory
    seed: int = 0  # of the sign-flip test, and recorded with the results
    batch_size: int = 16  # prompts answered at a time; timing always runs one
    ttft: TtftSpec = TtftSpec()  # how time to first token is measured
    fidelity: FidelitySpec = FidelitySpec()  # how closeness to full prefill is measured
    # name -> labels of methods that differ in a seed only; the results show their mean instead. An
    # entry of a method with ``seeds`` makes its own, see `parse_methods`
    pool: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        require_count("batch_size", self.batch_size, 1)
        refuse_doubles("method label", [m.label for m in self.methods], "give one a 'label'")
        check_pools(self.pool, [m.label for m in self.methods])
        refuse_doubles("task name", [t.name for t in self.tasks], "rename one")


def load_suite(path: str | Path) -> Suite:
    """Reads a suite, with the errors of `load_spec`; relative paths start from where one is."""
    return load_spec(path, "suite", "see eval/suites/ for examples", parse_suite)


def changed(
    suite: Suite,
    limit: int | None = None,
    model: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    store: str | None = None,
) -> Suite:
    """A suite with values of the command line; None keeps the suite's own."""
    given = {"model": model, "device": device, "quantize": quantize, "store": store}
    if limit is not None:
        given["tasks"] = tuple(replace(task, limit=limit) for task in suite.tasks)
    return replace(suite, **{key: value for key, value in given.items() if value})


def parse_suite(record: Any, where: str = "suite") -> Suite:
    """Builds a suite from decoded YAML; ``where`` opens every error, a ValueError."""
    values = dict(mapping(record, where))
    if "methods" in values:
        values["methods"], seeds = parse_methods(values["methods"], f"{where}: methods")
        values["pool"] = seeds | dict(mapping(values.get("pool", {}), f"{where}: pool"))
    if "tasks" in values:
        found = enumerate(entries(values["tasks"], f"{where}: tasks"))
        values["tasks"] = tuple(parse_task(e, f"{where}: tasks[{i}]") for i, e in found)
    for name, spec in (("ttft", TtftSpec), ("fidelity", FidelitySpec)):
        if name in values:
            values[name] = read(spec, values[name], f"{where}: {name}")
    return read(Suite, values, where)


def parse_methods(record: Any, where: str) -> tuple[tuple[MethodSpec, ...], dict[str, list[str]]]:
    """Builds the methods of a suite, names alone or mappings of their keys, and the pools of seeds.

    An entry with ``seeds`` is one method for each: ``{name: kvlink, adapter: "out/kvlink-{seed}",
    seeds: [0, 1]}`` is ``kvlink-0`` and ``kvlink-1``, pooled as ``kvlink``. ``where`` opens every
    error, a ValueError.
    """
    methods, pools = [], {}
    for index, entry in enumerate(entries(record, where)):
        place = f"{where}[{index}]"
        entry = {"name": entry} if isinstance(entry, str) else entry
        own = [entry]
        if isinstance(entry, Mapping) and "seeds" in entry:
            own = _of_seeds(entry, place)
            pools[entry.get("label") or entry.get("name")] = [one["label"] for one in own]
        methods += [read(MethodSpec, one, place) for one in own]
    return tuple(methods), pools


def _of_seeds(entry: Mapping, where: str) -> list[dict[str, Any]]:
    seeds = entries(entry["seeds"], f"{where}: seeds")
    adapter, label = entry.get("adapter"), entry.get("label") or entry.get("name")
    if any(type(seed) is not int for seed in seeds):
        raise ValueError(f"{where}: seeds must be a list of whole numbers, got {seeds!r:.60}")
    if not isinstance(adapter, str) or SEED not in adapter:
        raise ValueError(
            f"{where}: with seeds, 'adapter' must hold {SEED}, such as 'out/kvlink-{SEED}', got "
            f"{adapter!r:.60}"
        )
    kept = {key: value for key, value in entry.items() if key != "seeds"}
    return [
        kept | {"adapter": adapter.replace(SEED, str(seed)), "label": f"{label}-{seed}"}
        for seed in seeds
    ]


def check_pools(pools: Any, labels: Sequence[str]) -> None:
    """Refuses a pool that is not a list of two or more labels, or whose name is taken."""
    for name, members in mapping(pools, "pool").items():
        if name in labels:
            raise ValueError(f"pool '{name}' has the label of a method; rename it")
        if not isinstance(members, list) or len(members) < 2 or not set(members) <= set(labels):
            raise ValueError(
                f"pool '{name}' must be a list of two or more method labels, got {members!r:.60}; "
                f"there are {', '.join(labels)}"
            )


def parse_task(record: Any, where: str = "task") -> TaskSpec:
    """Builds a task from an entry of a suite; ``where`` opens every ValueError.

    The entry holds the task's own keys; or ``task`` (a file), ``variant`` (one of its variants) and
    keys that replace the file's.
    """
    record = dict(mapping(record, where))
    path, variant = (record.pop(key, None) for key in ("task", "variant"))
    if path is None:
        if variant is not None:
            raise ValueError(f"{where}: 'variant' needs 'task', the file that has the variants")
        return read(TaskSpec, record, where)
    return read(TaskSpec, {**load_task(path, variant), **record}, where)


def load_task(path: str | Path, variant: str | None = None) -> dict[str, Any]:
    """Keys of a task file, with those of one of its variants over them.

    Besides the keys of `TaskSpec` a file may hold ``variants``: name -> keys; results of a variant
    are named ``NAME-VARIANT``. Raises ValueError if it is not YAML or has no such variant.
    """
    values = dict(mapping(load_yaml(path, "task", "see eval/tasks/ for examples"), str(path)))
    variants = mapping(values.pop("variants", {}), f"{path}: variants")
    if variant is None:
        return values
    if variant not in variants:
        known = ", ".join(variants) or "none"
        raise ValueError(f"{path}: unknown variant '{variant}'; it has: {known}")
    changed = {"name": f"{values.get('name')}-{variant}", **mapping(variants[variant], str(path))}
    return values | changed
