"""All that a suite needs before its first question: loaded once, and refused now or never."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from blocktune.data import RagExample, load_examples
from blocktune.engine import Engine
from blocktune.evaluation.sanity import check_prompts
from blocktune.evaluation.suite import MethodSpec, Suite, TaskSpec
from blocktune.evaluation.ttft import fill
from blocktune.reuse import Method, build

Load = Callable[[Suite, str | None], Any]
"""``(suite, adapter) -> engine``."""


class Question(NamedTuple):
    """An example, the task it belongs to, and a name for it where it has no id."""

    task: TaskSpec
    example: RagExample
    name: str


@dataclass(frozen=True)
class Ready:
    """A suite that can run.

    Attributes:
        suite: What was asked for.
        methods: Label -> built method.
        engines: Adapter (None is the base) -> engine; all stay loaded, to be timed in turn.
        questions: Of all tasks, in order.
        timed: Examples that time to first token is measured on; empty if it is not.
    """

    suite: Suite
    methods: Mapping[str, Method]
    engines: Mapping[str | None, Any]
    questions: tuple[Question, ...]
    timed: tuple[RagExample, ...]

    def answer(self, spec: MethodSpec, examples: list[RagExample], **decoding) -> list[Any]:
        """Asks the engine that has the method's weights; see `Engine.answer`."""
        return self.engines[spec.adapter].answer(examples, self.methods[spec.label], **decoding)


def load_engine(suite: Suite, adapter: str | None) -> Engine:
    """The base model of a suite, with one of its adapters or none."""
    return Engine.from_pretrained(suite.model, adapter, dtype=suite.dtype, device=suite.device)


def prepare(suite: Suite, load: Load = load_engine) -> Ready:
    """Builds methods, reads questions, loads weights and checks that all of them fit together.

    Raises:
        ValueError: If a method is unknown or not made for its weights, a question has no answer,
            a prompt is unsound, or one does not fit into the model's context.
    """
    methods = {spec.label: build(spec.name, **spec.params) for spec in suite.methods}
    questions = _questions(suite)
    adapters = dict.fromkeys(spec.adapter for spec in suite.methods)
    engines = {adapter: load(suite, adapter) for adapter in adapters}
    ready = Ready(suite, methods, engines, questions, _timed(suite, questions))
    check_prompts({name or "base": e for name, e in engines.items()}, questions[0].example)
    _check_fit(ready)
    return ready


def _questions(suite: Suite) -> tuple[Question, ...]:
    questions = []
    for task in suite.tasks:
        for index, example in enumerate(load_examples(task.source, limit=task.limit)):
            if not example.answers:
                raise ValueError(f"{task.source}: question {index + 1} has no answer to score with")
            questions.append(Question(task, example, f"{task.name}/{index}"))
    if not questions:
        raise ValueError(f"no question in {', '.join(task.source for task in suite.tasks)}")
    return tuple(questions)


def _timed(suite: Suite, questions: tuple[Question, ...]) -> tuple[RagExample, ...]:
    if suite.ttft.num == 0:
        return ()
    first = [example for task, example, _ in questions if task is questions[0].task]
    return tuple(fill(first, suite.ttft.num, suite.ttft.chunks))


def _check_fit(ready: Ready) -> None:
    """Lays out every prompt once for each set of weights and kind of layout."""
    done = set()
    for spec in ready.suite.methods:
        method, make = ready.methods[spec.label], ready.engines[spec.adapter].prompts
        layout = make.spec(method)
        if (spec.adapter, layout) in done or not method.keeps_context:
            continue
        done.add((spec.adapter, layout))
        for task, example, _ in ready.questions:
            make.prompt(make.pieces(example, method), layout, task.max_new_tokens)
        for example in ready.timed:
            make.prompt(make.pieces(example, method), layout, 1)
