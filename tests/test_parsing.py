"""Strict mappings: what does not fit is refused in one line that says where."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from blocktune import parsing
from blocktune.methods import build
from blocktune.methods.method_parser import build_entry
from blocktune.parsing import build_config, first_line, load_spec, parse_yaml, read, split_name
from blocktune.prompt import LayoutSpec


@dataclass(frozen=True)
class Spec:
    name: str
    count: int = 1
    share: float | None = None
    on: bool = False
    words: tuple[str, ...] = ()
    sizes: tuple[float, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


def parse(record, where):
    return read(Spec, record, where)


def test_yaml_and_json_give_the_same(tmp_path):
    expected = Spec("a", share=2, words=("x", "y"), sizes=(1, 2.5))
    for text in (
        "name: a\nshare: 2\nwords: [x, y]\nsizes: [1, 2.5]\n",
        '{"name": "a", "share": 2, "words": ["x", "y"], "sizes": [1, 2.5]}',
    ):
        (tmp_path / "s.yaml").write_text(text)
        assert load_spec(tmp_path / "s.yaml", "spec", "", parse) == expected


def test_numbers_are_read_as_in_yaml_1_2():
    """PyYAML's 1.1 takes 1e-3 for text, 010 for 8 and 1:30 for 90."""
    texts = ["1e-3", "2E5", "1.5e3", ".5", "-0x1f", "1_000", "010", "1:30", "1:30.5", ".inf"]
    wanted = [1e-3, 2e5, 1500.0, 0.5, -31, 1000, "010", "1:30", "1:30.5", float("inf")]
    assert parse_yaml(f"[{', '.join(texts)}]", "s.yaml") == wanted
    assert read(Spec, parse_yaml("{name: 007, share: 1e-3}", "s.yaml"), "s") == Spec("007", 1, 1e-3)
    with pytest.raises(ValueError, match="'count' must be a whole number, got '010'"):
        read(Spec, parse_yaml("{name: a, count: 010}", "s.yaml"), "s")
    with pytest.raises(ValueError, match="'name' must be text, got False; put it in quotes"):
        read(Spec, parse_yaml("name: no", "s.yaml"), "s")


def test_option_strings_are_read_by_the_type_of_their_field():
    options = {"name": "7", "count": "3", "share": "0.5", "on": "1", "words": "x,y"}
    assert build_config(Spec, options, "s") == Spec("7", 3, 0.5, True, ("x", "y"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ncount: 2\nname: b\n", "s.yaml: not YAML: line 3, column 1: 'name' is given"),
        ("name: {x: 1, x: 2}\n", "line 1, column 14: 'x' is given twice, first in line 1"),
        ("name: a\n  b: c\n", "s.yaml: not YAML: line 2, column 4"),
        ("name: [", "s.yaml: not YAML: line 1, column 8"),
    ],
)
def test_yaml_errors_have_line_and_column(text, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared below
        parse_yaml(text, "s.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_merged_keys_may_be_overridden():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}\n", "s")["b"] == {"x": 2}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "s: must be a mapping"),
        ({"nam": "a"}, "unknown key 'nam'; known: name, count"),
        ({"count": 2}, "'name' is missing"),
        ({"name": "a", "count": True}, "'count' must be a whole number"),
        ({"name": "a", "count": 1.5}, "'count' must be a whole number"),
        ({"name": "a", "on": 1}, "'on' must be true or false"),
        ({"name": "a", "words": "x"}, "'words' must be a list of texts"),
        ({"name": "a", "words": [1]}, "'words' must be a list of texts"),
        ({"name": "a", "sizes": [True]}, "'sizes' must be a list of numbers"),
        ({"name": "a", "weights": "x"}, "'weights' must be a mapping of names to numbers"),
        ({"name": "a", "count": 0}, "s: count must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        read(Spec, record, "s")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nam": "a"}, "unknown option 'nam' of 's'; known: name"),
        ({"name": "a", "count": "x"}, "s: 'count' must be a whole number, got 'x'"),
        ({"name": "a", "sizes": "1,x"}, "'sizes' must be numbers, with commas, got '1,x'"),
        ({"name": "a", "on": "yes"}, "'on' must be 1 or 0"),
        ({"count": "1"}, "'name' is missing"),
        ({"name": "a", "count": "0"}, "s: count must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_config(Spec, options, "s")


@pytest.fixture(autouse=True)
def _nothing_reported(monkeypatch):
    monkeypatch.setattr(parsing, "_reported", set())


def test_an_old_key_loads_everywhere_and_its_new_name_is_said_once(caplog):
    assert LayoutSpec.from_dict({"num_ghosts": 2}) == LayoutSpec(num_blanks=2)
    entry = {"name": "naive", "layout": {"num_ghosts": 1}}
    for method in (build_entry(entry), build("naive + layout num_ghosts=1")):
        assert method.layout(LayoutSpec()).num_blanks == 1
    (line,) = caplog.messages
    assert "'num_ghosts' is now called 'num_blanks'" in line


def test_both_names_of_a_key_are_refused_and_a_key_that_is_known_is_kept():
    with pytest.raises(ValueError, match="drop 'num_ghosts'"):
        LayoutSpec.from_dict({"num_ghosts": 1, "num_blanks": 1})
    assert parsing.current_keys({"num_ghosts": 1}, ("num_ghosts", "num_blanks"), "it") == {
        "num_ghosts": 1
    }


@pytest.mark.parametrize("name", ["name", "self"])
def test_a_parameter_named_as_an_argument_of_the_registry_is_unknown_as_any_other(name):
    with pytest.raises(ValueError, match=f"'epic' takes k, .* got unknown {name}"):
        build_entry({"name": "epic", "params": {name: 3}})


@pytest.mark.parametrize(
    ("text", "line"), [("one\ntwo", "one"), ("", "OSError"), (" \n", "OSError")]
)
def test_an_error_without_text_is_named_by_its_type(text, line):
    assert first_line(OSError(text)) == line


def test_a_path_that_exists_is_no_name_whatever_it_contains(tmp_path):
    path = str(tmp_path / "lr=0.1")
    assert split_name(path) == (str(tmp_path / "lr"), "0.1")
    (tmp_path / "lr=0.1").mkdir()
    assert split_name(path) == ("", path)
    assert split_name(f"legal={path}") == ("legal", path)
    for alone in ("USER/NAME@main", "name=", "=path"):
        assert split_name(alone) == ("", alone)
