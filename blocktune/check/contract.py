"""The contract of a method: invariants (claims) that every method must satisfy."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from blocktune.check import serving
from blocktune.check.serving import ALONE, ASK, LAST, OTHER, SHORT, Ask, Check, Subject
from blocktune.engine import Engine
from blocktune.engine.generation import Generation
from blocktune.layout import Kind
from blocktune.methods import Cached, Method, Weights, available, build, compose
from blocktune.methods.repair import REPAIRS
from blocktune.methods.reshape import RESHAPES
from blocktune.methods.select import SELECTORS, Everything, FirstK, takes_budget
from blocktune.positions import PLACEMENTS
from blocktune.prompt import LayoutSpec
from blocktune.prompt.layout_spec import BOS
from blocktune.testing import small_engine

LAYOUTS = (  # each value of the layout axis; a slot of 64 positions has room for any chunk here
    *({"placement": name} | ({"slot": 64} if name == "reserved" else {}) for name in PLACEMENTS),
    *({"bos": name} for name in BOS),
    *({"num_blanks": 3}, {"shared_prefix": True}),
)


def subjects() -> dict[str, Method]:
    """All presets with their defaults, and each value of each axis in a composition, by name."""
    composed = [compose("naive", select=name) for name in SELECTORS.available()]
    composed += [compose("epic", repair=name) for name in REPAIRS.available()]
    composed += [compose("naive", reshape=name) for name in RESHAPES.available()]
    composed += [compose("naive", layout=layout) for layout in LAYOUTS]
    presets = {name: build(name) for name in available()}
    return presets | {method.name: method for method in composed}


POSITIONS = 256  # up to which the tolerance holds; then errors of float32 RoPE angles grow
Pairs = Iterator[tuple[Tensor, Tensor]]  # tensors that must be equal
Claim = Callable[[Subject], Check]


def check_method(method: Method, engine: Engine | None = None) -> list[Check]:
    """Checks every claim that applies to a method.

    The ``engine``, whose caches are emptied, must have weights that suit it. None: a small random
    model, which the claim about a single chunk always uses.
    """
    bare = small_engine(method.weights, bare=True)
    subject = Subject(method, engine or small_engine(method.weights), bare)
    with torch.no_grad():
        return [check(subject) for check in claims(method).values()]


def claims(method: Method) -> dict[str, Claim]:
    """The claims that apply to a method, by name."""
    pairs: dict[str, Callable[[Subject], Pairs]] = {
        "no token sees a later one": _no_future,
        "batch = single": _batch_is_single,
        "decoding = one forward": _decoding_is_one_forward,
    }
    if method.cached is not Cached.CHUNKS:
        pairs["served = one dense forward"] = partial(_is_dense, method=method)
    else:
        plain = partial(_is_dense, method=compose(method, select=None, reshape=None))
        pairs["nothing fresh = plain reuse, as one dense forward"] = plain
        pairs["order of stored chunks does not matter"] = _order_of_storing
        name, rows = "everything fresh = full prefill of the same rows", serving.all_visible
        if method.weights is Weights.WRAPS:  # learned tokens around chunks stay as stored
            name, rows = "all but what wraps chunks fresh = one dense forward", serving.all_fresh
        all_selected = _neutral(compose(method, select=Everything()))
        pairs[name] = partial(_is_dense, method=all_selected, rows=rows)
        if method.history is not None and method.history.begins_in_full:
            pairs["without a history = full prefill"] = _without_history
        if takes_budget(method.select()):
            pairs["a budget of nothing or all = nothing or all"] = _budget_ends
        if method.reshape() is not None:
            pairs["a neutral reshape = none"] = _neutral_reshape
        spec = method.layout(LayoutSpec())
        learned = method.weights in (Weights.LINKS, Weights.WRAPS) or spec.num_blanks
        if not (learned or spec.bos != "none" or spec.slot or method.history is not None):
            pairs["one chunk alone, not reshaped = full prefill"] = _one_chunk_alone
    return {name: partial(_equal, name, compared) for name, compared in pairs.items()}


def _equal(name: str, pairs: Callable[[Subject], Pairs], subject: Subject) -> Check:
    """Checks that the tensors of all pairs are equal. A NaN fails."""
    diffs, tolerance = [], 0.0
    for left, right in pairs(subject):
        diffs.append(serving.difference(left, right))
        tolerance = max(tolerance, serving.tolerance_of(subject.engine, right))
    layout = serving.batch_of(subject.engine, subject.method).layout
    tolerance *= max(1.0, int(layout.position.max()) / POSITIONS)
    return Check(name, all(diff <= tolerance for diff in diffs), max(diffs), tolerance)


def _is_dense(subject: Subject, method: Method, rows: serving.RowChange | None = None) -> Pairs:
    yield subject.logits(method), subject.dense_logits(method, rows)


def _one_chunk_alone(subject: Subject) -> Pairs:
    method, bare = compose(subject.method, reshape=None), subject.bare
    bare.forget()
    yield bare.next_logits([ALONE], method), bare.next_logits([ALONE], "full-prefill")


def _without_history(subject: Subject) -> Pairs:
    """Must hold also with a selector that selects few tokens."""
    for method in _with_fixed_choices(subject.method)[:2]:
        engine = subject.begin(history=())
        yield engine.next_logits([ASK], method), engine.next_logits([ASK], "full-prefill")


def _budget_ends(subject: Subject) -> Pairs:
    method = subject.method
    everything, full_budget = compose(method, select=Everything()), compose(method, budget=1.0)
    yield subject.logits(full_budget), subject.logits(everything)
    if not method.select().keeps_keys:  # else the keys that it compares stay in the cache
        nothing, no_budget = compose(method, select=None), compose(method, budget=0.0)
        yield subject.logits(no_budget), subject.logits(nothing)


def _neutral_reshape(subject: Subject) -> Pairs:
    neutral, none = _neutral(subject.method), compose(subject.method, reshape=None)
    left, right = subject.run(neutral), subject.run(none)
    yield left.prefill.logits, right.prefill.logits
    (ids, after), (same, expected) = left.continued(3), right.continued(3)
    assert ids == same, "equal logits decode alike"
    yield after, expected


def _no_future(subject: Subject) -> Pairs:
    """Replaces the question or the last chunk; the states of columns before it must not change."""

    def computed(run: Generation, stop: int) -> list[list[int]]:
        return [[c for c in columns if c < stop] for columns in serving.computed_columns(run)]

    for method in _with_fixed_choices(subject.method):
        one = subject.serve(method)
        layout = one.batch.layout
        question = layout.order[layout.kind == Kind.QUERY]
        last = layout.order[layout.is_encoded & (layout.chunk == layout.chunk.max())]
        for ask, columns in ((OTHER, question), (LAST, last if len(last) else question)):
            other, start = subject.serve(method, ask), int(columns.min())
            if computed(one, start) == computed(other, start):  # else the selection changed
                for left, right in zip(one.cache.layers, other.cache.layers, strict=True):
                    yield left.keys[:, :, :start], right.keys[:, :, :start]
                    yield left.values[:, :, :start], right.values[:, :, :start]


def _order_of_storing(subject: Subject) -> Pairs:
    method, expected = subject.method, subject.logits(subject.method)
    engine = subject.begin(serving.HISTORY[::-1])
    for chunk in reversed(ASK.chunks):
        engine.next_logits([Ask("Why?", (chunk, *SHORT.chunks))], method)
    yield engine.next_logits([ASK], method)[0], expected


def _batch_is_single(subject: Subject) -> Pairs:
    method = subject.method
    single = torch.stack([subject.logits(method, ask) for ask in (ASK, SHORT)])
    yield subject.begin().next_logits([ASK, SHORT], method), single


def _decoding_is_one_forward(subject: Subject) -> Pairs:
    """Compares decoding a few tokens with giving the same tokens after the question."""
    for method in _with_fixed_choices(subject.method):
        run = subject.run(method)
        computed = serving.computed_columns(run)
        ids, logits = run.continued(3)
        forward = subject.run(method, answer=ids)
        if serving.computed_columns(forward) == computed:  # else a share is more tokens now
            yield logits, forward.prefill.logits
            return
    raise AssertionError("every selector chose other tokens for the longer prompt")


def _with_fixed_choices(method: Method) -> list[Method]:
    if method.cached is not Cached.CHUNKS:
        return [method]
    return [method, *(compose(method, select=s) for s in (FirstK(k=3), Everything()))]


def _neutral(method: Method) -> Method:
    reshape = method.reshape()
    return compose(method, reshape=None if reshape is None else reshape.neutral())
