"""Loads and checks everything that a suite needs before its first question, to fail early."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from typing import Any

from blocktune.adapter import find_release
from blocktune.data import RagExample, load_examples
from blocktune.engine import Engine
from blocktune.evaluation.rows import scores_of
from blocktune.evaluation.suite import MethodSpec, Suite, TaskSpec
from blocktune.methods import Method, build_entry
from blocktune.models.identity import adapter_fingerprint, base_fingerprint
from blocktune.models.load import adapter_folder
from blocktune.prompt import PromptFormat, make_pieces

VIEW = "view it with `blocktune answer --show-prompt`"
logger = logging.getLogger("blocktune")

Load = Callable[[Suite, str | None], Any]  # ``(suite, adapter) -> engine``
Worded = Mapping[tuple[str | None, str], Any]  # engines in a task's wording by (adapter, task)


@dataclass(frozen=True)
class Ready:
    """A suite that is loaded, checked and ready to run."""

    suite: Suite  # the suite itself
    methods: Mapping[str, Method]  # label -> built method
    engines: Mapping[str | None, Any]  # by adapter (None: base); all loaded, to be timed in turns
    questions: tuple[tuple[TaskSpec, RagExample], ...]  # of all tasks, in order
    timed: tuple[RagExample, ...]  # examples to time; empty without timing
    worded: Worded

    def engine(self, spec: MethodSpec, task: TaskSpec) -> Any:
        """The engine with the method's weights and the task's wording."""
        return self.worded[spec.adapter, task.name]

    def of(self, task: TaskSpec, limit: int | None = None) -> list[RagExample]:
        """The examples of a task, at most ``limit``."""
        return [example for own, example in self.questions if own is task][:limit]

    def fingerprints(self) -> dict[str, Any]:
        """Digests of the base model and of adapters that are not releases, for the provenance."""
        if None in self.engines:
            base = base_fingerprint(self.engines[None].model)
        else:  # adapters are merged into the model; each was checked against the base
            base = next(iter(self.engines.values())).adapter.base_fingerprint
        named = [name for name in self.engines if name is not None and find_release(name) is None]
        adapters = {name: adapter_fingerprint(adapter_folder(name)) for name in named}
        return {"base_fingerprint": base, "adapter_fingerprints": adapters}


def load_engine(suite: Suite, adapter: str | None) -> Engine:
    """Loads the base model of a suite, with one of its adapters or none."""
    options = {"dtype": suite.dtype, "device": suite.device, "quantize": suite.quantize}
    options["recurrent"] = not any(build_entry(m.entry()).reuses_chunks for m in suite.methods)
    return Engine.from_pretrained(suite.model, adapter, store=suite.store, **options)


def prepare(suite: Suite, load: Load = load_engine) -> Ready:
    """Builds methods, reads questions, loads weights and checks that they fit together.

    ValueError: a method is unknown or does not suit its weights, or a question or prompt is wrong.
    """
    methods = {spec.label: build_entry(spec.entry()) for spec in suite.methods}
    adapters = dict.fromkeys(spec.adapter for spec in suite.methods)
    engines = {adapter: load(suite, adapter) for adapter in adapters}
    _refuse_kept_prompts(methods, engines.values())
    tokenizer = next(iter(engines.values())).tokenizer
    questions = _questions(suite, tokenizer)
    first = [example for task, example in questions if task is suite.tasks[0]]
    # One engine per wording, so that tasks with the same wording share exact prefix caches.
    built: dict[tuple, Any] = {(name, engine.format): engine for name, engine in engines.items()}
    worded = {}
    for task, (adapter, engine) in product(suite.tasks, engines.items()):
        words = task.worded(engine.format)
        worded[adapter, task.name] = built.setdefault((adapter, words), engine.reworded(words))
    tell_rewording(engines, worded)
    num, wanted = min(suite.ttft.num, len(first)), suite.ttft.chunks or 0
    if num and sum(len(example.chunks) for example in first) < wanted:  # read beyond the limit
        source, limit = suite.tasks[0].full_source(), max(len(first), wanted)
        first = load_examples(source, limit=limit, tokenizer=tokenizer)
    timed = tuple(fill(first, num, suite.ttft.chunks)) if num else ()
    ready = Ready(suite, methods, engines, questions, timed, worded)
    for task in suite.tasks:
        named = {adapter or "base": worded[adapter, task.name] for adapter in engines}
        check_prompts(named, ready.of(task, 1)[0])
    _check_fit(ready)
    return ready


def _refuse_kept_prompts(methods: Mapping[str, Method], engines: Iterable[Any]) -> None:
    """Raises ValueError for a store with files if a method would find earlier runs' prompts in it.

    Chunks in it are the same in every run, but such prompts would cost less at each repetition.
    """
    place = next((engine.store.place for engine in engines if engine.store.place), None)
    for label, method in methods.items():
        if place and (method.history or type(method).prefixes is not Method.prefixes):
            found = f"would find the prompts of earlier runs in the store '{place}'"
            raise ValueError(f"method '{label}' {found}; leave the store out")


def tell_rewording(engines: Mapping[str | None, Any], worded: Worded) -> None:
    """Warns if a task's wording (``worded``) differs from the one an adapter was trained with."""
    for (adapter, task), engine in worded.items():
        fields = _differing(engines[adapter].format, engine.format)
        if adapter is not None and fields:
            how = f"task '{task}' asks '{adapter}' in other words than it was trained in ({fields})"
            logger.warning("%s: train with these keys, or leave them out of the task's prompt", how)


def _differing(first: PromptFormat, second: PromptFormat) -> str:
    before, after = first.to_dict(), second.to_dict()
    return ", ".join(key for key in after if after[key] != before[key])


def _questions(suite: Suite, tokenizer: Any) -> tuple[tuple[TaskSpec, RagExample], ...]:
    questions = []
    for task in suite.tasks:
        source = task.full_source()
        examples, lost = load_examples(source, limit=task.limit, tokenizer=tokenizer), []
        for number, example in enumerate(examples, start=1):
            score = partial(scores_of, task, example=example, tokenizer=tokenizer)
            answers = example.answers
            try:
                score("")  # outputs may be blank
                is_lost = bool(answers) and not any(score(a)[task.metric] for a in answers)
            except ValueError as error:
                place = f"{source}: question {number}"
                raise ValueError(f"{place} cannot be scored: {error}") from None
            if is_lost:
                lost.append(f"{answers[0]!r:.60} of question {number}")
            questions.append((task, example))
        if lost:
            told = f"even the accepted answer scores 0 by {task.metric}, such as {lost[0]}"
            count = f"task '{task.name}': for {len(lost)} of {len(examples)} questions"
            logger.warning("%s %s; choose another metric or 'stop'", count, told)
    return tuple(questions)


def fill(examples: Sequence[RagExample], num: int, chunks: int | None) -> list[RagExample]:
    """The first ``num`` examples, filled to ``chunks`` chunks, if given, by those after them."""
    if chunks is None:
        return list(examples[:num])
    if (held := sum(len(example.chunks) for example in examples)) < chunks:
        wanted = f"ttft needs prompts of {chunks} chunks, the task holds only {held}"
        raise ValueError(f"{wanted}; lower 'chunks' of ttft, or give the task more questions")
    filled = []
    for index, example in enumerate(examples[:num]):
        following = (c for e in (*examples[index:], *examples[:index]) for c in e.chunks)
        filled.append(replace(example, chunks=tuple(islice(following, chunks)), supporting=()))
    return filled


def _check_fit(ready: Ready) -> None:
    """Checks that all prompts fit into the context, once per adapter, wording and layout."""
    done, first = set(), ready.suite.tasks[0]
    prompts = [(task, example, task.max_new_tokens) for task, example in ready.questions]
    prompts += [(first, example, 1) for example in ready.timed]
    for spec in ready.suite.methods:
        method = ready.methods[spec.label]
        layout = ready.engine(spec, first).prompts.spec(method)
        if (spec.adapter, layout) not in done and method.keeps_context:
            done.add((spec.adapter, layout))
            for task, example, num_new in prompts:
                make = ready.engine(spec, task).prompts
                make.prompt(make.pieces(example, method), layout, num_new)


def check_prompts(engines: Mapping[str, Any], example: RagExample) -> None:
    """Checks that all engines build the same, well-formed prompt for a question, mode tags aside.

    ValueError: the prompt lacks or repeats the BOS of the tokenizer or its template, does not open
    the assistant's turn, or differs. The first two lower the scores of full prefill most.
    """

    def ids(engine: Any, words: PromptFormat) -> tuple[int, ...]:
        pieces = make_pieces(engine.tokenizer, words, example.chunks, example.question)
        return pieces.context + pieces.query

    for engine in engines.values():
        _check_prompt(engine.tokenizer, ids(engine, engine.format))
    prompts = {name: ids(engine, engine.format.untagged) for name, engine in engines.items()}
    first, *others = prompts
    for name in others:
        if prompts[name] != prompts[first]:
            fields = _differing(*(engines[key].format.untagged for key in (name, first)))
            reason = f"their wordings differ in {fields}" if fields else "their tokenizers differ"
            found = f"'{name}' and '{first}' build different prompts of a question ({reason})"
            raise ValueError(f"{found}; set the wording in the task's prompt, or train with it")


def _check_prompt(tokenizer, ids: tuple[int, ...]) -> None:
    bos, template, asked = tokenizer.bos_token_id, tokenizer.chat_template, ["", ""]
    if template is not None:
        messages = [{"role": "user", "content": "Where?"}]
        render = partial(tokenizer.apply_chat_template, messages, tokenize=False)
        asked = [render(add_generation_prompt=is_opened) for is_opened in (True, False)]
    if bos is not None:
        own = template is None or bos in tokenizer("a")["input_ids"]  # added to plain text
        wanted = max(own, asked[0].count(tokenizer.bos_token))
        if ids.count(bos) != wanted or (wanted and ids[0] != bos):
            wanted = f"should open with {tokenizer.bos_token!r} and hold it {wanted} times"
            found = f"opens with {tokenizer.decode(ids[:1])!r} and holds it {ids.count(bos)} times"
            raise ValueError(f"the prompt {wanted}; it {found}; {VIEW}")
    # White space is ignored, because some tokenizers do not restore it in decoding.
    opened, closed = ("".join(text.split()) for text in asked)
    opening = opened.removeprefix(closed) or opened.rpartition("?")[2]
    ending = "".join(tokenizer.decode(ids[-64:]).split())
    # It need not be at the very end: a template may add an empty thinking block after it.
    if opening not in ending:
        wanted = f"the prompt must open the assistant's turn with {opening!r}"
        raise ValueError(f"{wanted}, but it ends with {ending[-40:]!r}; {VIEW}")
