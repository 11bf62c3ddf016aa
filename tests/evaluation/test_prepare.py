"""Before the first question: wording, tags and prompts are sound, or nothing runs."""

import copy
import json
from types import SimpleNamespace

import pytest
from tiny_llama import tiny_llama
from tiny_tokenizer import build_tokenizer

from blocktune.data import RagExample
from blocktune.engine import Engine
from blocktune.evaluation.metrics import METRICS, Metric
from blocktune.evaluation.prepare import _questions, check_prompts, prepare
from blocktune.evaluation.suite import TaskSpec, parse_suite
from blocktune.prompt import Chunk, PromptFormat, make_pieces

ASKED = {"instruction": "Answer in a few words.", "question": "Q: {question}"}


def ready(prompt: dict | None, **trained):
    """A suite over a base and an adapter that was trained in its own wording."""
    tokenizer = build_tokenizer()
    base = Engine(tiny_llama(tokenizer, 2048), tokenizer)
    tuned = copy.copy(base).reworded(PromptFormat(**trained))
    task = {
        "name": "worlds",
        "source": "worlds:test?n=2&passages=2&kinds=self-contained",
        "prompt": prompt,
    }
    methods = ["full-prefill", {"name": "naive", "adapter": "out/tuned"}]
    suite = parse_suite(
        {"model": "random", "methods": methods, "tasks": [task], "ttft": {"num": 0}}
    )
    return prepare(suite, lambda _, adapter: tuned if adapter else base)


def test_an_adapter_keeps_the_tag_that_the_task_does_not_name(caplog):
    made = ready(ASKED, block_tag="[Block]", full_tag="[Full]")
    tuned, base = (made.worded[adapter, "worlds"].format for adapter in ("out/tuned", None))
    assert tuned == PromptFormat(**ASKED, block_tag="[Block]", full_tag="[Full]")
    assert base == PromptFormat(**ASKED)
    assert "other words than it was trained in (instruction, question)" in caplog.text


def test_an_adapter_asked_as_it_was_trained_is_no_news(caplog):
    made = ready(ASKED, **ASKED, block_tag="[Block]")
    assert made.worded["out/tuned", "worlds"].format.block_tag == "[Block]"
    assert not caplog.text


@pytest.mark.parametrize(("answer", "lost"), [("A", True), ("Kirby", False)])
def test_answers_that_no_output_can_match_are_told(caplog, tmp_path, answer, lost):
    """Normalisation drops articles, and with them the answer "A" of a multiple choice."""
    record = {"question": "Which?", "chunks": ["A is blue. B is red."], "answers": [answer]}
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    task = {"name": "mine", "source": str(tmp_path / "q.jsonl"), "metric": "qa_f1"}
    suite = parse_suite({"model": "random", "methods": ["naive"], "tasks": [task]})
    _questions(suite, None)
    told = "for 1 of 1 questions even the accepted answer scores 0 by qa_f1, such as 'A' of"
    assert (told in caplog.text) == lost


@pytest.mark.parametrize(
    "metric", [Metric("two", lambda output, answers: 1.0), Metric("none", lambda *_: None), len]
)
def test_a_metric_of_a_plug_in_that_is_none_is_refused_in_one_line(monkeypatch, metric):
    monkeypatch.setitem(METRICS, "mine", metric)
    task = TaskSpec("t", "worlds:test?n=1&passages=2&kinds=self-contained", metric="mine")
    with pytest.raises(ValueError, match="question 1 cannot be scored: metric 'mine' must be a"):
        _questions(SimpleNamespace(tasks=[task]), None)


@pytest.mark.parametrize("prompt", [None, ASKED])
def test_a_wording_that_the_base_does_not_get_is_refused(prompt):
    with pytest.raises(ValueError, match=r"build different prompts .*wordings differ in system"):
        ready(prompt, **ASKED if prompt else {}, system="Be brief.")
    ready(dict(ASKED, system="Be brief."), **ASKED, system="Be brief.")


EXAMPLE = RagExample("Where was Anna born?", (Chunk("Anna was born in Kirby."),), ("Kirby",))
CLOSING = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"  # as Mistral's


def engine(tokenizer, **fmt):
    return SimpleNamespace(tokenizer=tokenizer, format=PromptFormat(**fmt))


@pytest.mark.parametrize(
    "tokenizer",
    [
        build_tokenizer(),
        build_tokenizer(adds_bos=True),
        build_tokenizer(template=None),
        build_tokenizer(template=CLOSING, bos_token=None),
    ],
    ids=["template writes BOS", "both add BOS", "no template", "no BOS, turn opened by closing"],
)
def test_sound_prompts_pass(tokenizer):
    engines = {"base": engine(tokenizer), "tuned": engine(tokenizer)}
    assert check_prompts(engines, EXAMPLE) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, bos: p._replace(prefix=(bos, *p.prefix)), "holds it 2 times"),
        (lambda p, bos: p._replace(prefix=p.prefix[1:]), "holds it 0 times"),
        (lambda p, bos: p._replace(prefix=p.prefix[1:], query=(bos, *p.query)), "it opens with"),
        (lambda p, bos: p._replace(query=p.query[:-2]), "open the assistant's turn"),
    ],
    ids=["two BOS", "no BOS", "BOS elsewhere", "turn not opened"],
)
def test_unsound_prompts_are_refused(monkeypatch, change, message):
    def broken(tokenizer, *arguments):
        return change(make_pieces(tokenizer, *arguments), tokenizer.bos_token_id)

    monkeypatch.setattr("blocktune.evaluation.prepare.make_pieces", broken)
    with pytest.raises(ValueError, match=message):
        check_prompts({"base": engine(build_tokenizer())}, EXAMPLE)


def test_weights_with_different_prompts_are_refused():
    engines = {
        "base": engine(build_tokenizer()),
        "out/other": engine(build_tokenizer(), instruction="Be brief."),
    }
    message = "'out/other' and 'base' build different prompts .*wordings differ in instruction"
    with pytest.raises(ValueError, match=message):
        check_prompts(engines, EXAMPLE)


def test_the_tag_of_a_mode_is_no_difference():
    tagged = engine(build_tokenizer(), block_tag="[Block]", full_tag="[Full]")
    engines = {"base": engine(build_tokenizer()), "out/tagged": tagged}
    assert check_prompts(engines, EXAMPLE) is None
