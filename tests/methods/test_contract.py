"""The contract that every preset and every value of an axis keeps, also the next one."""

import functools
from dataclasses import dataclass

import pytest
import torch

from blocktune.check import Subject, check_method, claims, subjects
from blocktune.check.serving import computed_columns, facts_served
from blocktune.methods import Method, build, compose
from blocktune.methods.reshape import Reshape
from blocktune.methods.select import Selection
from blocktune.methods.select.base import selectable
from blocktune.testing import small_engine

COMPOSITIONS = (
    "block-attention + deviation 15 %",
    "kvlink + epic 4",
    "kvlink + link0 + deviation 30 % + scaled-context",
    "kv-packet + first-k 4",
    "cache-craft + first-k 4",
    "cache-craft refresh=1.0",
    "kvlink + semsharekv",
    "kvlink + cache-craft",
    "cache-craft + scaled-context",
    "naive + semsharekv",
    "kv-packet + fusionrag",
)
SUBJECTS = subjects() | {name: build(name) for name in COMPOSITIONS}
ALIKE = {}
"""Of methods that are served alike, such as two names for one choice, only the first is checked."""
for _name, _method in SUBJECTS.items():
    ALIKE.setdefault(facts_served(_method), _name)
CASES = [(name, claim) for name in ALIKE.values() for claim in claims(SUBJECTS[name])]
ALONE = "one chunk alone, not reshaped = full prefill"


@functools.cache
def engine(weights, bare=False):
    return small_engine(weights, bare=bare)


@functools.cache
def results_of(weights):
    return {}


def subject(method: Method, **own) -> Subject:
    """On an engine, and earlier results, which all methods with these weights share."""
    engines = engine(method.weights), engine(method.weights, True)
    return Subject(method, *engines, **({"results": results_of(method.weights)} | own))


@pytest.mark.parametrize(("name", "claim"), CASES)
@torch.no_grad()
def test_every_method_keeps_its_contract(name, claim):
    check = claims(SUBJECTS[name])[claim](subject(SUBJECTS[name]))
    breaks = (name, claim) == ("cacheblend-lmcache-flash", "no token sees a later one")
    assert check.passed is not breaks, check  # it says so, and the check finds it


def test_a_chunk_is_alone_unless_something_is_beside_it_or_it_was_computed_elsewhere():
    presets = {name for name in subjects() if " + " not in name}
    never = {name for name in presets if ALONE not in claims(SUBJECTS[name])}
    exact = {"full-prefill", "no-context", "prefix-cache", "recycle"}
    beside = {"kv-packet", "kvlink", "turborag", "link0", "prompt-cache-schema", "psr", "s+p"}
    assert never == exact | beside | {"cache-craft", "fusionrag", "semsharekv"}


def test_what_keeps_or_hides_more_than_the_rule_says_so():
    kept = {n for n, m in SUBJECTS.items() if m.select().keeps_keys}
    seen = {n for n, m in SUBJECTS.items() if m.select().sees_future}
    together = {n for n, m in SUBJECTS.items() if (r := m.reshape()) and not r.keeps_causality}
    assert kept == {"cacheblend-paper", "cacheblend-repo", "naive + gradual-deviation"}
    assert seen == {"cacheblend-lmcache-flash"}
    assert together == {"sel", "naive + top-chunks"}


@dataclass(frozen=True)
class Leaky(Selection):
    """Recomputes with a mask that sees the future."""

    ratio: float = 0.5
    sees_future: bool = True

    def start(self, layout):
        return layout.is_context & (layout.offset % 2 == 0)


@dataclass(frozen=True)
class Greedy(Selection):
    """Says that it took a budget, and takes another."""

    ratio: float = 0.5

    def start(self, layout):
        return selectable(layout) & (layout.offset < 3)


@dataclass(frozen=True)
class Loud(Reshape):
    """Is not neutral when it says so."""

    def neutral(self):
        return self

    def scores(self, scores, seen, choice):
        return scores * 1.5


@dataclass(frozen=True)
class Late(Reshape):
    """Acts on a row that comes alone: on decoded ones."""

    def neutral(self):
        return self

    def scores(self, scores, seen, choice):
        return scores * (2 if scores.shape[2] == 1 else 1)


@dataclass(frozen=True)
class Forgetful(Selection):
    """Chooses by what stands beside a prompt in its batch."""

    def start(self, layout):
        return selectable(layout) & (layout.offset < layout.batch_size)


BROKEN = {
    "no token sees a later one": lambda: compose("naive", select=Leaky()),
    "a budget of nothing or all = nothing or all": lambda: compose("naive", select=Greedy()),
    "everything fresh = full prefill of the same rows": lambda: compose("naive", reshape=Loud()),
    "all but what wraps chunks fresh = one dense forward": lambda: compose(
        "kv-packet", reshape=Loud()
    ),
    "decoding = one forward": lambda: compose("naive", reshape=Late()),
    "a neutral reshape = none": lambda: compose("naive", reshape=Loud()),
    "batch = single": lambda: compose("naive", select=Forgetful()),
    ALONE: lambda: compose("naive", select=Leaky()),
}


@pytest.mark.parametrize("claim", BROKEN)
@torch.no_grad()
def test_a_method_that_breaks_a_claim_is_found_out(claim):
    broken = BROKEN[claim]()
    assert not claims(broken)[claim](subject(broken)).passed


@pytest.mark.parametrize("claim", ["nothing fresh = plain reuse, as one dense forward"])
@torch.no_grad()
def test_keys_that_stay_where_they_were_made_are_found_out(claim, monkeypatch):
    monkeypatch.setattr(
        "blocktune.engine.assemble.rotate_keys", lambda keys, rotation, out: out.copy_(keys)
    )
    assert not claims(build("naive"))[claim](subject(build("naive"), results={})).passed


@torch.no_grad()
def test_what_recalls_is_checked_on_chunks_that_it_recalls():
    checked = subject(build("cache-craft"))
    run = checked.run(checked.method)
    assert run.assembled.hits == [3]
    assert 0 < len(computed_columns(run)[0]) < int(run.batch.layout.is_context.sum())


def test_the_contract_of_one_method_can_be_asked_for():
    checks = check_method(build("epic", k=2))
    assert [check.name for check in checks] == list(claims(build("epic")))
    assert all(check.passed for check in checks)
