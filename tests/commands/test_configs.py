"""YAML files of every command: mistakes in one line with file, line and column."""

import pytest

DOORS = {
    "train": ("train", "--config"),
    "launcher": ("train", "--model_name_or_path", "m", "--train_data", "t.jsonl", "--launcher"),
    "eval": ("eval", "--output", "out", "--suite"),
    "tune": ("tune", "--output", "out", "--config"),
    "mix": ("data", "mix"),
    "format": ("answer", "-q", "Who?", "-c", "Anna.", "--format"),
}
MISTAKES = {
    "a: b: c\n": "line 1, column 5: mapping values are not allowed here",
    "a: [1\n": "line 2, column 1: expected",
    "a: 1\nb: 2\na: 3\n": "line 3, column 1: 'a' is given twice, first in line 1",
    "a: {b: 1, b: 2}\n": "line 1, column 11: 'b' is given twice",
    "a: *nothing\n": "line 1, column 4: found undefined alias",
    "a: !!python/object:os.system x\n": "line 1, column 4: could not determine a constructor",
    "- a\n": "must be a mapping",
    "": "must be a mapping",
}


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("door", DOORS)
def test_a_mistake_says_where_it_is(refused, model, tmp_path, door):
    path = tmp_path / "file.yaml"
    more = ("-m", model) if door == "format" else ()
    for text, words in MISTAKES.items():
        path.write_text(text)
        line = refused(*DOORS[door], path, *more)
        assert f"{path}: " in line
        assert words in line
    path.write_bytes("a: é\n".encode("latin-1"))
    assert f"{path}: not UTF-8 text" in refused(*DOORS[door], path, *more)
    path.write_bytes("a: b\n".encode("utf-16"))
    assert f"{path}: not UTF-8 text" in refused(*DOORS[door], path, *more)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.yaml"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_r: 1.5", "lora_r: invalid int value: '1.5'"),
        ("use_peft: perhaps", "use_peft: Truthy value expected"),
        ("max_steps: {a: 1}", "max_steps: must be one value"),
        ("train_data: [a, b]", "train_data: must be one value"),
        ("attention_execution: fast", "attention_execution: invalid choice: 'fast'"),
        ("1: 2", "unknown key or option '1'"),
        ('instruction: "bad \\ud83d"\ntrain_data: x', "'instruction' holds a lone surrogate"),
    ],
)
def test_a_value_of_the_wrong_kind(refused, tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    assert words in refused("train", "--config", "run.yaml")


def test_no_and_a_byte_order_mark_are_read(tmp_path):
    from blocktune.training.run import parse

    text = "\ufefftrain_data: worlds:train\nsave_strategy: no\nreport_to: [none]\nlora_r: 3\n"
    text += "model_name_or_path: m\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    data, args, choice = parse(["--config=run.yaml", "--lora_r", "4"])
    assert (data.train_data, args.save_strategy.value, choice.lora_r) == ("worlds:train", "no", 4)
