"""Keys of earlier versions still load."""

import pytest

from blocktune import parsing
from blocktune.methods import build
from blocktune.methods.method_parser import build_entry
from blocktune.prompt import LayoutSpec


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
