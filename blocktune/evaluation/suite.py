"""Suites and tasks, read from strict YAML: models, methods and questions; wording and metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from blocktune import plugins
from blocktune.data.sources.options import parse_source
from blocktune.evaluation.metrics import METRICS
from blocktune.methods.composition import KEEP
from blocktune.methods.method_parser import ENTRY_KEYS
from blocktune.parsing import entries, load_spec, load_yaml, mapping, read, refuse_doubles
from blocktune.prompt import PromptFormat
from blocktune.registry import require_count, require_one_of

SEED = "{seed}"  # placeholder for the seed in ``adapter``, if the method has ``seeds``


@dataclass(frozen=True)
class MethodSpec:
    """One method of a suite: its parameters and the adapter it runs with."""

    name: str  # a registered method, or a composition as text (``kvlink + epic``)
    adapter: str | None = None  # folder of the adapter; None: the base model
    label: str = ""  # its name in results; default: ``name``
    params: Mapping[str, Any] = field(default_factory=dict)  # those that are not the defaults
    preset: str | None = None  # method that the keys below modify; ``name`` is then only a label
    select: Any = KEEP  # selector of recomputed tokens: NAME, or ``{NAME: {parameter: value}}``
    repair: Any = KEEP  # correction of reused keys and values, same form; null: none
    reshape: Any = KEEP  # change of the attention to reused keys, same form; null: none
    layout: Mapping[str, Any] = field(default_factory=dict)  # fields of `LayoutSpec` to set
    budget: float | None = None  # share of the context tokens that the selector may choose
    layer_budget: float | None = None  # in place of ``budget``: share of layer-tokens

    def __post_init__(self):
        if not self.label:
            object.__setattr__(self, "label", self.name)
        if "/" in self.label or self.label.startswith(".") or ".part" in self.label:
            wanted = "name a file, without slashes, a leading dot and '.part'"
            raise ValueError(f"label must {wanted}, got '{self.label}'")

    def entry(self) -> dict[str, Any]:
        """The keys that were given, as `blocktune.methods.build_entry` takes them."""
        default = MethodSpec(self.name)
        given = [key for key in ENTRY_KEYS if getattr(self, key) != getattr(default, key)]
        return {"name": self.name} | {key: getattr(self, key) for key in given}


@dataclass(frozen=True)
class TaskSpec:
    """One set of questions, and how they are asked and scored."""

    name: str  # its name in results
    source: str  # for `load_examples`: a path, ``musique``, ``worlds:test?n=300``
    version: int = 1  # of the task file; raised with every change that affects scores
    limit: int | None = None  # number of questions to use, from the first; None: all
    # wording, as keys of `PromptFormat`; those left out keep the model's own, such as a mode tag
    prompt: Mapping[str, Any] | None = None
    # options of the source that split documents: ``{chunker: fixed, size: 512}``, ``{chunk: 128}``
    chunking: Mapping[str, Any] = field(default_factory=dict)
    answer_marker: str | None = None  # only the text after it is scored; None: the whole output
    stop: tuple[str, ...] = ()  # the output is cut before the first of these texts
    max_new_tokens: int = 32  # longest answer, in tokens
    metric: str = "em"  # headline metric, a key of `METRICS`
    metrics: tuple[str, ...] = ()  # further metrics
    by_kind: bool = True  # whether results are also given for each kind of question
    cite: str = ""  # source of the data and the wording

    def __post_init__(self):
        for name in ("limit", "max_new_tokens", "version"):
            require_count(name, 1 if (value := getattr(self, name)) is None else value, 1)
        if not METRICS.keys() >= {self.metric, *self.metrics}:
            plugins.load_all()
        for name in (self.metric, *self.metrics):
            require_one_of("metric", name, METRICS)
        if "" in self.stop:
            raise ValueError("'stop' has an empty text, which ends every output; drop it")
        self.worded(PromptFormat())  # raises on a wrong key now, not in the middle of a run

    def worded(self, own: PromptFormat) -> PromptFormat:
        """The task's prompt format for a model whose own format is ``own``."""
        return PromptFormat.from_dict(own.to_dict() | dict(self.prompt or {}))

    def full_source(self) -> str:
        """The source, with ``chunking`` added to its options."""
        if not self.chunking:
            return self.source
        source = parse_source(self.source)
        options = source.options | {k: v for k, v in self.chunking.items() if v is not None}
        return f"{source.name}?{urlencode(options, safe='/:,')}"

    def cut(self, text: str) -> str:
        """The scored part: before a stop text (blank ones only after a word), after the marker."""
        start = len(text) - len(text.lstrip())
        for stop in self.stop:
            kept = 0 if stop.strip() else start
            text = text[:kept] + text[kept:].partition(stop)[0]
        return text.rpartition(self.answer_marker)[2] if self.answer_marker else text

    def decides(self) -> dict[str, Any]:
        """The fields that affect a row, as JSON; those that only choose questions do not."""
        ignored = ("source", "limit", "by_kind", "cite", "chunking")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ignored}


@dataclass(frozen=True)
class TtftSpec:
    """How time to first token is measured."""

    num: int = 20  # prompts of the first task to time; 0: no timing
    chunks: int | None = None  # chunks per prompt, filled from the next questions; None: its own

    def __post_init__(self):
        require_count("num", self.num)
        require_count("chunks", 1 if self.chunks is None else self.chunks, 1)


@dataclass(frozen=True)
class FidelitySpec:
    """How a method's next-token distributions are compared with full prefill's."""

    num: int = 0  # questions of each task to compare; 0: none
    tokens: int = 4  # number of tokens of full prefill's answer to compare, teacher-forced

    def __post_init__(self):
        require_count("num", self.num)
        require_count("tokens", self.tokens, 1)


@dataclass(frozen=True)
class Suite:
    """A whole comparison; see ``eval/suites/`` for examples."""

    model: str  # path or Hub name of the base model
    methods: tuple[MethodSpec, ...]  # methods to compare, in table order
    tasks: tuple[TaskSpec, ...]  # questions to ask
    dtype: str = "auto"  # of weights and caches; ``auto``: as in the checkpoint
    quantize: str | None = None  # quantise the base model on loading: ``nf4`` or ``int8``
    device: str | None = None  # None: a GPU if there is one
    store: str | None = None  # where chunks are stored, for `ChunkStore.open`; None: in memory
    seed: int = 0  # of the sign-flip test; also recorded in the results
    batch_size: int = 16  # prompts answered at a time; timing always uses 1
    ttft: TtftSpec = TtftSpec()  # how time to first token is measured
    fidelity: FidelitySpec = FidelitySpec()  # how closeness to full prefill is measured
    # name -> labels of methods that differ only in the seed (see `parse_methods`), to average
    pool: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        require_count("batch_size", self.batch_size, 1)
        require_count("seed", self.seed)
        # labels name files, and file systems may ignore case
        refuse_doubles("method label", [m.label.casefold() for m in self.methods], "give a 'label'")
        check_pools(self.pool, [m.label for m in self.methods])
        refuse_doubles("task name", [t.name for t in self.tasks], "rename one")


def load_suite(path: str | Path) -> Suite:
    """Reads a suite; raises as `load_spec`. Paths in it are relative to the working directory."""
    return load_spec(path, "suite", "see eval/suites/ for examples", parse_suite)


def changed(suite: Suite, limit: int | None = None, **given: str | None) -> Suite:
    """Overrides fields of a suite, for the command line; None keeps the suite's value."""
    if limit is not None:
        suite = replace(suite, tasks=tuple(replace(task, limit=limit) for task in suite.tasks))
    return replace(suite, **{key: value for key, value in given.items() if value})


def parse_suite(record: Any, where: str = "suite") -> Suite:
    """Builds a suite from decoded YAML. Messages of a ValueError begin with ``where``."""
    values = dict(mapping(record, where))
    if "methods" in values:
        values["methods"], seeds = parse_methods(values["methods"], f"{where}: methods")
        values["pool"] = seeds | dict(mapping(values.get("pool", {}), f"{where}: pool"))
    if "tasks" in values:
        tasks = enumerate(entries(values["tasks"], f"{where}: tasks"))
        values["tasks"] = tuple(parse_task(task, f"{where}: tasks[{i}]") for i, task in tasks)
    for name, spec in (("ttft", TtftSpec), ("fidelity", FidelitySpec)):
        if name in values:
            values[name] = read(spec, values[name], f"{where}: {name}")
    return read(Suite, values, where)


def parse_methods(record: Any, where: str) -> tuple[tuple[MethodSpec, ...], dict[str, list[str]]]:
    """Builds the methods of a suite, each a name or a mapping, and the pools of their seeds.

    With ``seeds``, an entry is one method per seed: ``{name: kvlink, adapter: "out/{seed}", seeds:
    [0, 1]}`` is ``kvlink-0`` and ``kvlink-1``, pooled as ``kvlink``. Errors begin with ``where``.
    """
    methods, pools = [], {}
    for index, entry in enumerate(entries(record, where)):
        place = f"{where}[{index}]"
        given = {"name": entry} if isinstance(entry, str) else dict(mapping(entry, place))
        seeds = entries(given.pop("seeds"), f"{place}: seeds") if "seeds" in given else []
        spec = read(MethodSpec, given, place)
        if not seeds:
            methods.append(spec)
            continue
        if spec.label in pools:
            raise ValueError(f"{place}: '{spec.label}' has seeds above; give this a 'label'")
        if any(type(seed) is not int for seed in seeds):
            raise ValueError(f"{place}: seeds must be a list of whole numbers, got {seeds!r:.60}")
        if SEED not in (spec.adapter or ""):
            wanted = f"with seeds, 'adapter' must hold {SEED}, such as 'out/kvlink-{SEED}'"
            raise ValueError(f"{place}: {wanted}, got {spec.adapter!r:.60}")
        pools[spec.label] = [f"{spec.label}-{seed}" for seed in seeds]
        adapters = [spec.adapter.replace(SEED, str(seed)) for seed in seeds]
        named = zip(adapters, pools[spec.label], strict=True)
        methods += [replace(spec, adapter=adapter, label=label) for adapter, label in named]
    return tuple(methods), pools


def check_pools(pools: Any, labels: Sequence[str]) -> None:
    """Raises ValueError unless pools, not named as a label, list two or more, each in one only."""
    for name, members in mapping(pools, "pool").items():
        if name in labels:
            raise ValueError(f"pool '{name}' has the label of a method; rename the pool")
        known = isinstance(members, list) and all(member in labels for member in members)
        if not known or len(members) < 2:
            wanted = f"must be a list of two or more method labels, got {members!r:.60}"
            raise ValueError(f"pool '{name}' {wanted}; there are {', '.join(labels)}")
    refuse_doubles("pool member", [m for own in pools.values() for m in own], "pool it once")


def parse_task(record: Any, where: str = "task") -> TaskSpec:
    """Builds a task from an entry of a suite. Messages of a ValueError begin with ``where``.

    It has the keys of `TaskSpec`, which override those of ``task``, a file, and its ``variant``,
    which is named ``NAME-VARIANT``.
    """
    record = dict(mapping(record, where))
    path, variant = (record.pop(key, None) for key in ("task", "variant"))
    for key, value in (("task", path), ("variant", variant)):
        if not isinstance(value, str | None):
            raise ValueError(f"{where}: '{key}' must be text, got {value!r:.60}")
    if path is None and variant is not None:
        raise ValueError(f"{where}: 'variant' needs 'task', the file that has the variants")
    if path is None:
        return read(TaskSpec, record, where)
    values = dict(mapping(load_yaml(path, "task", "see eval/tasks/ for examples"), path))
    variants = mapping(values.pop("variants", {}), f"{path}: variants")
    if variant is not None:
        if variant not in variants:
            known = ", ".join(variants) or "none"
            raise ValueError(f"{path}: unknown variant '{variant}'; it has: {known}")
        values["name"] = f"{values.get('name')}-{variant}"
        values |= mapping(variants[variant], path)
    return read(TaskSpec, values | record, where)
