"""A method, a selector and a reshape of somebody else: one file, and they are everywhere."""

import json
import os
import sys

import pytest
import yaml
from commands.conftest import *  # noqa: F403

from blocktune import plugins
from blocktune.check import check_method, claims, subjects
from blocktune.check.serving import ASK
from blocktune.data import RagExample, load_examples, write_jsonl
from blocktune.evaluation.metrics import METRICS
from blocktune.evaluation.rows import code_digest, scores_of
from blocktune.evaluation.suite import TaskSpec
from blocktune.methods import Repair, Reshape, Selection, build, compose
from blocktune.testing import small_engine

PLUGIN = '''
from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.methods import RESHAPES, SELECTORS, Method, Reshape, Selection, register, selectable


@SELECTORS.register("every-nth")
@dataclass(frozen=True)
class EveryNth(Selection):
    """Every n-th token of each chunk."""

    source: ClassVar[str] = "https://example.org/nth"
    n: int = 2

    def start(self, layout):
        return selectable(layout) & (layout.offset % self.n == 0)


@RESHAPES.register("damped")
@dataclass(frozen=True)
class Damped(Reshape):
    """Scores of reused keys, times a factor."""

    factor: float = 0.9

    def neutral(self):
        return Damped(1.0)

    def scores(self, scores, seen, choice):
        return scores.where(~seen.reused[:, None, None], scores * self.factor)


@register("late")
class Late(Method):
    """Encodes each chunk after three blanks."""

    def layout(self, spec):
        return replace(spec, num_blanks=3)


@register("nth")
@dataclass(frozen=True)
class Nth(Method):
    """Recomputes every n-th token of each chunk, to see what evenness is worth."""

    source: ClassVar[str] = "https://example.org/nth"
    n: int = 2

    def select(self):
        return EveryNth(self.n)
'''


@pytest.fixture
def file(clean, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return path


def installed(folder, text):
    """What `pip install` leaves of a package with an entry point."""
    (folder / "nth_package.py").write_text(text)
    info = folder / "nth-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nth\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[blocktune.plugins]\nnth = nth_package\n")


def test_an_option_finds_it_before_and_after_the_command(blocktune, file):
    for arguments in (
        ("--plugin", file, "methods", "--json"),
        ("methods", "--json", "--plugin", file),
    ):
        listed = json.loads(blocktune(*arguments).stdout)
        assert {"nth", "every-nth", "damped"} <= {entry["name"] for entry in listed}
    assert os.environ[plugins.VARIABLE] == str(file)  # once, and child processes inherit it


def test_an_entry_point_finds_it(blocktune, clean, tmp_path, monkeypatch):
    installed(tmp_path, PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    assert build("nth").select().n == 2
    monkeypatch.delitem(sys.modules, "nth_package")


def test_it_composes_and_keeps_its_contract(file):
    plugins.add(str(file))
    known = subjects()
    wanted = {"nth", "late", "naive + every-nth", "naive + damped"}
    assert wanted <= known.keys()
    for name in wanted:
        checks = check_method(known[name])
        assert [check.name for check in checks] == list(claims(known[name]))
        assert all(check.passed for check in checks)
    assert build("kvlink + every-nth 3").select().n == 3


def test_the_command_checks_it(blocktune, file):
    done = blocktune("check", "--method", "nth n=3", "--plugin", file, "--json")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["checks"]) >= 6


def test_a_suite_runs_it(blocktune, refused, model, file, tmp_path):
    questions = tmp_path / "q.jsonl"
    write_jsonl(questions, load_examples("worlds:test?n=2&passages=2&kinds=self-contained"))
    suite = {
        "model": model,
        "methods": ["full-prefill", "nth", {"name": "naive + every-nth 3", "label": "third"}],
        "tasks": [{"name": "mine", "source": str(questions), "max_new_tokens": 2}],
        "ttft": {"num": 0},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(suite))
    arguments = ("eval", "--suite", tmp_path / "s.yaml", "--output", tmp_path / "out")
    assert "unknown reuse method 'nth'" in refused(*arguments)
    done = blocktune(*arguments, "--plugin", file)
    assert done.exit_code == 0, done.output
    methods = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert methods["nth"]["recompute_ratio"] > methods["third"]["recompute_ratio"] > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no plug-in at '"),
        ("import nothing_of_that_name", "cannot be loaded: No module named 'nothing_of_that"),
        ("def broken(:", "cannot be loaded: invalid syntax"),
        (PLUGIN.replace('"nth"', '"epic"'), "reuse method 'epic' of .* is already taken by"),
        (PLUGIN.replace("n: int = 2", "n: int"), "parameter 'n' needs a default"),
        ("raise SystemExit('parsed the arguments')", "cannot be loaded: parsed the arguments"),
    ],
)
def test_what_is_wrong_with_it_is_one_clear_line(refused, clean, tmp_path, text, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    line = refused("methods", "--plugin", path)
    assert message.partition(" of .*")[0] in line


def test_a_module_by_name_that_is_not_there(refused, clean):
    assert "plug-in 'not.there' cannot be loaded" in refused("methods", "--plugin", "not.there")


@pytest.mark.parametrize(
    ("code", "reason"),
    [("{}['k']", "KeyError: 'k'"), ("int('k')", "invalid literal for int()")],
)
def test_where_it_fails_is_one_clear_line(refused, file, code, reason):
    file.write_text(PLUGIN.replace("EveryNth(self.n)", code))
    line = refused("check", "--method", "nth", "--plugin", file)
    number = 1 + file.read_text().splitlines().index(f"        return {code}")
    assert reason in line
    assert line.endswith(f"(plug-in '{file}', line {number} in select)\n")


class Broken(Selection, Repair, Reshape):
    def __init__(self, *made):
        self.made = made

    def start(self, layout):
        return self.made[0](layout)

    def offset(self, seen):
        return seen.change[0]

    def neutral(self):
        return self

    def scores(self, scores, seen, choice):
        return None


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"select": Broken(lambda layout: layout.is_context[0])}, "selector .*must return"),
        ({"select": Broken(lambda layout: layout.order.float())}, "selector .*float32"),
        ({"select": Broken(lambda layout: ~layout.is_context)}, "selector .*chose rows outside"),
        ({"select": "first-k", "repair": Broken()}, "repair 'Broken' must return"),
        ({"reshape": Broken()}, "reshape 'Broken' must return .*NoneType"),
    ],
)
def test_what_it_returns_wrongly_is_refused(method, message):
    with pytest.raises(ValueError, match=message):
        small_engine().answer([ASK, ASK], compose("naive", **method, name="broken"))


def test_its_metric_scores_and_decides_the_rows(clean, tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "mine", None)
    del METRICS["mine"]
    path, digests = tmp_path / "mine.py", set()
    for score in ("0.5", "5"):
        path.write_text(
            "from blocktune.evaluation.metrics import METRICS, Metric\n"
            f"METRICS['mine'] = Metric('Mine', lambda output, answers, tokenizer: {score})\n"
        )
        monkeypatch.setattr(plugins, "_loaded", set())
        monkeypatch.setenv(plugins.VARIABLE, str(path))
        METRICS.pop("mine", None)
        task, asked = TaskSpec("t", "q.jsonl", metric="mine"), RagExample("Who?", ("A",), ("She",))
        digests.add(code_digest(build("naive"), ["mine"]))
        if score == "5":
            with pytest.raises(ValueError, match=r"metric 'mine' must be a share .* got 5\.0"):
                scores_of(task, "", asked, None)
        else:
            assert scores_of(task, "", asked, None) == {"mine": 0.5}
    assert len(digests | {code_digest(build("naive"), ["f1"])}) == 3
