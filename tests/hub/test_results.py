"""Results on a card: of this very adapter, or refused."""

import json
import re
from dataclasses import replace

import pytest
from hub.written import FACTS, write_results

from blocktune.evaluation.runner import run_suite
from blocktune.evaluation.suite import parse_suite
from blocktune.hub import prepare


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"base_fingerprint": "a-b-c"}, "is of another base"),
        ({"adapter_fingerprints": {"out": "1" * 16}}, r"measures no method .* but kvlink, other"),
        ({"adapter_fingerprints": {}}, "measures no method with the adapter"),
    ],
)
def test_results_of_other_weights_are_refused(run, tmp_path, changes, line):
    path = write_results(tmp_path / "results.json", run / "out", **changes)
    with pytest.raises(ValueError, match=line) as caught:
        prepare(run / "out", "me/mine", replace(FACTS, results=path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"methods": {"naive": {"em": 1.0}}}, r"not a results\.json of `blocktune eval`"),
        (
            {"methods": {"a": {"n": 1, "em": 0, "ci95": [0, 0], "adapter": None}}},
            "does not say which weights it measured, since an older blocktune wrote it",
        ),
    ],
)
def test_results_that_tell_too_little_are_refused(run, tmp_path, record, line):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=line):
        prepare(run / "out", "me/mine", replace(FACTS, results=path))


def test_what_eval_writes_is_taken(run, tmp_path):
    tasks = [{"name": "w", "source": f"{run / 'train.jsonl'}", "max_new_tokens": 2, "limit": 3}]
    tuned = {"name": "kvlink", "adapter": str(run / "out")}
    suite = {"model": str(run / "base"), "methods": ["full-prefill", tuned], "tasks": tasks}
    suite |= {"ttft": {"num": 0}, "device": "cpu"}
    tasks[0]["metric"] = "rouge_l"
    run_suite(parse_suite(suite), tmp_path)
    facts = replace(FACTS, results=tmp_path / "results.json")
    card = prepare(run / "out", "me/mine", facts).card
    assert "| method | n | ROUGE-L | EM | F1 |" in card
    assert re.search(r"\| kvlink \| 3 \| [\d.]+ \([\d.]+ to [\d.]+\) \|", card)
