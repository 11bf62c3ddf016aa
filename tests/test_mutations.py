"""The list of mutations is in step with the code and the tests that it names."""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_every_mutation_finds_its_line_and_its_tests():
    listed = yaml.safe_load((ROOT / "tests/mutations/mutations.yaml").read_text())
    assert len(listed) >= 40
    stale = []
    for one in listed:
        text = (ROOT / one["file"]).read_text()
        for test in one["tests"].split():
            path, _, name = test.partition("::")
            defined = not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()
            if text.count(one["old"]) != 1 or one["old"] == one["new"] or not defined:
                stale.append((one["name"], text.count(one["old"]), test))
    assert stale == []
