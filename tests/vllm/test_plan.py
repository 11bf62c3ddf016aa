"""Plans of loads: read and written, their slots, heads and salts, and what is refused."""

import pytest

from blocktune.cache.store import fingerprint
from blocktune.methods import build
from blocktune.prompt import LayoutSpec
from blocktune.vllm.plan import LoadPlan, Segment, require_served, slots_of

MODEL = "a" * 64
PLAN = LoadPlan(MODEL, (Segment((5, 6, 7), 0), Segment((900, 8), 0, (4,)), Segment((9,), 5)))
PROMPT = [5, 6, 7, 0, 8, 9, 3, 2]


def test_a_plan_survives_json_and_sends_only_what_vllm_cannot_know():
    params = PLAN.params(PROMPT)
    learned = {"tokens": 2, "position": 0, "blanks": [4], "ids": [900, 8]}
    assert params == {"blocktune": {"fingerprint": MODEL, "segments": [3, learned, 1]}}
    assert LoadPlan.read(params, PROMPT) == PLAN
    assert LoadPlan.read(None, PROMPT) is None
    assert LoadPlan.read({"other": 1}, PROMPT) is None


@pytest.mark.parametrize(
    "segments",
    [
        *(None, [], [0], [True], ["3"], [3, 5], [8], [{"tokens": 3, "more": 1}]),
        *([{"tokens": 2, "ids": [1]}], [{"tokens": 2, "blanks": [-1]}], [{"position": 1}]),
        [{"tokens": 1, "ids": [1 << 63]}],
    ],
)
def test_what_is_no_plan_of_the_prompt_is_refused(segments):
    asked = {"blocktune": {"fingerprint": MODEL, "segments": segments}}
    with pytest.raises(ValueError, match=r"kv_transfer_params|longer prompt"):
        LoadPlan.read(asked, PROMPT)
    for name in ("x", "../" * 21 + "x", "A" * 64):
        with pytest.raises(ValueError, match="fingerprint"):
            LoadPlan.read({"blocktune": {"fingerprint": name, "segments": [3]}}, PROMPT)


def test_a_plan_is_served_whole_or_not_at_all():
    assert PLAN.num_tokens == 6
    assert PLAN.missing(set(PLAN.keys).__contains__) == []
    assert PLAN.missing(set(PLAN.keys[:1]).__contains__) == list(PLAN.segments[1:])
    # What vLLM has already need not be in the store.
    assert [list(PLAN.wanted(start)) for start in (0, 4, 5)] == [[0, 1, 2], [1, 2], [2]]


def test_the_salt_names_all_that_decides_cached_blocks():
    moved = LoadPlan(MODEL, (*PLAN.segments[:2], Segment((9,), 6)))
    joined = LoadPlan(MODEL, (Segment((5, 6, 7, 900, 8), 0), Segment((9,), 5)))
    other = LoadPlan("b" * 64, PLAN.segments)
    blank = LoadPlan(MODEL, (*PLAN.segments[:2], Segment((9,), 5, (1,))))
    salts = [plan.salt() for plan in (PLAN, moved, joined, other, blank)]
    assert len({*salts, PLAN.salt("mine")}) == 6
    assert PLAN.salt() == LoadPlan.read(PLAN.params(PROMPT), PROMPT).salt()


@pytest.mark.parametrize(("length", "computed"), [(200, 1), (2000, 2)])
def test_keys_of_short_segments_are_remembered_by_all_requests(monkeypatch, length, computed):
    made, real = [], fingerprint.chunk_key
    monkeypatch.setattr(fingerprint, "chunk_key", lambda *how: made.append(how) or real(*how))
    keys = {Segment(tuple(range(700, 700 + length)), 0).key("d" * 64) for _ in range(2)}
    assert (len(keys), len(made)) == (1, computed)


def test_slots_leave_out_what_lies_outside_of_a_window():
    rows, slots = slots_of([7, 0, 3], 4, 2, 11)
    assert rows.tolist() == [2, 3, 8, 9, 10]
    assert slots.tolist() == [30, 31, 12, 13, 14]
    assert slots_of([7], 4, 4, 4)[0].tolist() == []


@pytest.mark.parametrize(
    ("method", "trained", "reason"),
    [
        ("kvlink", LayoutSpec(num_links=2), "link tokens"),
        ("cacheblend", None, "recomputes"),
        ("naive + deviation 15 %", None, "recomputes"),
        ("ape", None, "attended to"),
        ("sel", None, "attended to"),
        ("full-prefill", None, "no chunks from a cache"),
        ("prefix-cache", None, "no chunks from a cache"),
        ("prompt-cache-schema", None, "'reserved'"),
        ("cache-craft", None, "earlier prompts"),
    ],
)
def test_a_method_that_does_more_than_reuse_is_refused_in_one_line(method, trained, reason):
    built = build(method)
    with pytest.raises(ValueError, match=reason) as error:
        require_served(built, built.layout_for(trained))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        *(("naive", None), ("link0", None), ("naive + layout shared_prefix=true", None)),
        *(("naive + layout bos=drop", None), ("block-attention", LayoutSpec())),
        *((name, LayoutSpec(num_headers=1)) for name in ("kv-packet", "turborag")),
    ],
)
def test_a_method_that_only_reuses_is_served(method, trained):
    built = build(method)
    require_served(built, built.layout_for(trained))
