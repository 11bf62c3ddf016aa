"""`blocktune data`: every command teaches itself, does its work, and refuses in one line."""

import json
import sys

import pytest
from source_records import MUSIQUE
from transformers import AutoTokenizer

from blocktune.adapter import AdapterInfo
from blocktune.data import RagExample, load_examples
from blocktune.data.needle import _words
from blocktune.data.sources.catalog import data_sets_of
from blocktune.data.sources.records import Record
from blocktune.engine import Engine
from blocktune.prompt import LayoutSpec, PromptFormat

DOCS = [
    {"text": "Anna Belt was born in Kirby.", "title": "Anna Belt"},
    {"text": "Kirby is a small town with a museum."},
    {"text": "Nothing to see here."},
]
QUESTIONS = [
    {"question": "Where was Anna Belt born?", "answer": ["Kirby"]},
    {"question": "Who paid?", "answer": ["nobody known"]},
]
COMMANDS = ("list", "show", "write", "passages", "answer", "mix")


def lines(path, records):
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path):
    return lines(tmp_path / "q.jsonl", QUESTIONS)


@pytest.fixture
def corpus(tmp_path):
    return lines(tmp_path / "wiki.jsonl", DOCS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(blocktune, command):
    shown = blocktune("data", command, "--help").stdout
    assert "Examples" in shown
    assert f"blocktune data {command}" in shown


def test_help_of_the_group_says_what_a_source_is(blocktune):
    shown = blocktune("data", "--help").stdout
    assert all(command in shown for command in COMMANDS)
    assert "names a data source in the same way" in shown


def test_list_names_sets_licences_generators_shapes_and_chunkers(blocktune):
    shown = blocktune("data", "list").stdout
    for word in ("musique", "CC BY 4.0", "needle:", "as=", "few-shot", "sentence"):
        assert word in shown
    facts = json.loads(blocktune("data", "list", "--json").stdout)
    assert facts["data_sets"]["nq"]["hub"] == "google-research-datasets/nq_open"
    assert facts.keys() == {"data_sets", "generators", "shapes", "chunkers"}


def test_rows_are_shown_in_the_wording_of_an_adapter(
    blocktune, refused, model, tmp_path, monkeypatch
):
    words = PromptFormat(instruction="In its own words.", titled="{title}: {text}\n")
    AdapterInfo("base", "0" * 16, "0" * 16, LayoutSpec(), words).save(tmp_path)
    show = ("data", "show", "worlds:test?n=1", "--model", model, "--adapter")
    assert "In its own words." in blocktune(*show, tmp_path).stdout
    monkeypatch.setattr("blocktune.models.load.snapshot_download", lambda *_, **__: tmp_path)
    assert "In its own words." in blocktune(*show, "user/name").stdout
    monkeypatch.undo()
    assert "no adapter 'none/such': it is not a local folder" in refused(*show, "none/such")


def test_the_system_turn_of_a_row_is_shown_as_it_is_trained(blocktune, tmp_path, model):
    said = zip(("system", "user", "assistant"), ("In rhymes.", "Who?", "Ann."), strict=True)
    row = {"messages": [{"role": r, "content": t} for r, t in said], "documents": ["It is Ann."]}
    shown = blocktune("data", "show", lines(tmp_path / "s.jsonl", [row]), "--model", model).stdout
    assert "In rhymes." in shown.split("[chunk 0")[0]


def test_show_as_text(blocktune):
    shown = blocktune("data", "show", "worlds:test?n=4&passages=3&turns=2", "--index", "2").stdout
    assert shown.count("[then]") == 1
    assert "[chunk 0" in shown
    assert ", evidence]" in shown
    assert "[question]\n" in shown
    assert "[accepted answers]" in shown


def test_show_hands_no_control_character_to_the_terminal(blocktune, tmp_path, model):
    text = "a\x1b[2Jb\rc\x9bd\te\nf"
    row = {"question": text, "chunks": [{"title": text, "text": text}], "answers": [text]}
    path = lines(tmp_path / "odd.jsonl", [row | {"id": text, "response": text}])
    for more in ((), ("--model", model)):
        shown = blocktune("data", "show", path, *more).stdout
        assert shown.count(r"a\x1b[2Jb\x0dc") == (4 if more else 6)
        assert not {"\x1b", "\r", "\x9b"} & set(shown)
        assert "d\te\nf" in shown


@pytest.mark.parametrize(("mode", "sees"), [("block", "sees itself"), ("full", "sees all before")])
def test_show_as_the_model_sees_it(blocktune, model, mode, sees):
    source = "worlds:test?n=1&passages=2&kinds=self-contained"
    shown = blocktune("data", "show", source, "--model", model, "--mode", mode).stdout
    assert "[chunk 1: " in shown
    assert sees in shown.split("[chunk 1: ")[1].split("]")[0]
    assert "[answer: " in shown
    assert " tokens in 2 chunks; " in shown


def test_write(blocktune, tmp_path, model):
    out = tmp_path / "out.jsonl"
    result = blocktune("data", "write", "worlds:test?n=5&passages=4", "-o", out, "--limit", 3)
    assert result.stdout == f"wrote 3 examples to {out}\n"
    assert load_examples(out) == load_examples("worlds:test?n=3&passages=4")
    source = "needle:?lengths=500&depths=50&n=2"
    blocktune("data", "write", source, "-o", out, "--tokenizer", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert load_examples(out) == load_examples(source, tokenizer=tokenizer)


def test_passages_from_a_corpus(blocktune, questions, corpus, tmp_path):
    out = tmp_path / "out.jsonl"
    result = blocktune("data", "passages", questions, "--corpus", corpus, "--k", 2, "-o", out)
    assert "wrote 2 questions" in result.stdout
    assert "an answer for 50.0% of 2" in result.stdout
    first = load_examples(out)[0]
    assert first.chunks[0].title == "Anna Belt"
    assert len(first.chunks) == 2
    command = ("data", "passages", questions, "--corpus", corpus, "-o", out, "--answerable")
    assert "wrote 1 questions" in blocktune(*command).stdout


def test_passages_from_a_retriever_and_of_their_own(blocktune, questions, tmp_path):
    found = [{"question": q["question"], "passages": ["one", "two"]} for q in QUESTIONS]
    retrieved = lines(tmp_path / "dpr.jsonl", found)
    out = tmp_path / "out.jsonl"
    blocktune("data", "passages", questions, "--retrieved", retrieved, "--k", 1, "-o", out)
    assert [[c.text for c in e.chunks] for e in load_examples(out)] == [["one"], ["one"]]
    again = tmp_path / "again.jsonl"
    blocktune("data", "passages", "worlds:test?n=3&passages=5", "--own", "--k", 2, "-o", again)
    assert [len(e.chunks) for e in load_examples(again)] == [2, 2, 2]


def test_mix(blocktune, tmp_path):
    path, out = tmp_path / "m.yaml", tmp_path / "out.jsonl"
    part = {"source": "worlds:test?n=6", "mode": "both"}
    path.write_text(json.dumps({"parts": [part, {"source": "worlds:dev?n=4", "mode": "full"}]}))
    shown = blocktune("data", "mix", path, "-o", out).stdout
    assert "75.0%" in shown
    assert "wrote 16 examples" in shown
    modes = [example.meta["mode"] for example in load_examples(out)]
    assert (modes.count("block"), modes.count("full")) == (6, 10)


@pytest.mark.parametrize("out", ["wiki.jsonl", "o.csv", "-"])
def test_an_output_that_loses_data_is_refused(blocktune, questions, corpus, out, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    before = corpus.read_text()
    result = blocktune("data", "passages", questions, "--corpus", corpus, "-o", out)
    assert result.exit_code == 2
    assert out in result.stderr
    assert (corpus.read_text(), len(list(corpus.parent.iterdir()))) == (before, 2)


@pytest.fixture
def musique(monkeypatch):
    """The Hub, which knows but MuSiQue."""
    rows = [Record(f"record {index}", MUSIQUE) for index in range(4)]
    for where in ("retrieval", "sources.load"):  # the second is imported by the first
        monkeypatch.setattr(f"blocktune.data.{where}.open_records", lambda *_: iter(rows))
    return {"dgslibisey/MuSiQue": "CC BY 4.0"}


def test_files_made_on_the_way_keep_the_data_sets_name(
    blocktune, musique, model, tmp_path, monkeypatch, replies_end
):
    corpus, out, again = lines(tmp_path / "wiki.jsonl", DOCS), tmp_path / "o", tmp_path / "a"
    mixture = tmp_path / "m.yaml"
    mixture.write_text(json.dumps({"parts": [{"source": "musique", "mode": "full"}]}))
    for command in (
        ("write", "musique"),
        ("passages", "musique", "--own", "--k", 2),
        ("passages", "musique", "--corpus", corpus),
        ("answer", "musique", "--model", model, "--max-new-tokens", 2),
        ("mix", mixture),
    ):
        assert blocktune("data", *command, "-o", out).exit_code == 0
        assert [data_sets_of([one]) for one in load_examples_of(out)] == [musique] * 4
    monkeypatch.undo()
    for command in (
        ("write", out),
        ("passages", out, "--own", "--k", 1),
        ("passages", out, "--corpus", corpus),
        ("answer", out, "--model", model, "--max-new-tokens", 2),
    ):
        assert blocktune("data", *command, "-o", again).exit_code == 0
        assert data_sets_of(load_examples(again)) == musique


def load_examples_of(path):
    return [RagExample.from_json(json.loads(line)) for line in path.read_text().splitlines()]


def test_answer_goes_on_after_a_stop(blocktune, model, tmp_path, replies_end, monkeypatch):
    command = (
        "data",
        "answer",
        "worlds:test?n=5&passages=2&kinds=self-contained",
        "--model",
        model,
        "--batch-size",
        2,
    )
    command += ("--max-new-tokens", 4, "--temperature", 0.9)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert "0 answered before" in blocktune(*command, "-o", whole).stdout
    facts = load_examples(whole)[0].meta["answered_by"]
    assert (facts["model"], facts["temperature"], facts["max_new_tokens"]) == (model, 0.9, 4)
    answer, batches = Engine.answer, []

    def stops_at_the_second_batch(self, batch, *args, **options):
        batches.append(len(batch))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return answer(self, batch, *args, **options)

    monkeypatch.setattr(Engine, "answer", stops_at_the_second_batch)
    assert blocktune(*command, "-o", out).exit_code != 0
    assert not out.exists()
    result = blocktune(*command, "-o", out)
    assert "2 answered before" in result.stdout
    assert batches == [2, 2, 2, 1]
    assert out.read_bytes() == whole.read_bytes()


def test_answer_in_the_words_of_the_engine(blocktune, model, tmp_path, replies_end):
    out = tmp_path / "out.jsonl"
    source = "worlds:test?n=3&passages=2&kinds=self-contained"
    blocktune(*("data", "answer", source, "-m", model, "--max-new-tokens", 3, "-o", out))
    engine = Engine.from_pretrained(model)
    answers = engine.answer(load_examples(source), "full-prefill", max_new_tokens=3)
    wanted = [answer.text.strip() for answer in answers if answer.text.strip()]
    assert [example.response for example in load_examples(out)] == wanted


def test_replies_that_were_cut_are_counted_and_left_out(blocktune, model, tmp_path):
    source = "worlds:test?n=3&passages=2&kinds=self-contained"
    words = ("data", "answer", source, "-m", model, "--max-new-tokens", 3, "-o", tmp_path / "o")
    done = blocktune(*words)
    assert done.exit_code == 2
    counts = "of 3 answers, 0 are empty, 0 are wrong, 3 are cut; allow more new tokens"
    assert counts in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "none.jsonl"), "no file 'none.jsonl'; a source is"),
        (("show", "worlds:test?n=2", "--index", "5"), "has 2 examples; --index"),
        (("show", "worlds:test", "--adapter", "x"), "add --model"),
        (("show", "worlds:test", "--model", "none"), "cannot load a tokenizer from 'none'"),
        (("write", "needle:", "-o", "x"), "needle: lengths are in tokens"),
        (("passages", "nq", "-o", "x"), "give one of --corpus FILE, --retrieved FILE and --own"),
        (("mix", "none.yaml"), "no mixture at 'none.yaml'"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    refused, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert message in refused("data", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("bm25s", ("passages", "worlds:test?n=1", "--own", "-o", "x")),
        ("sentencex", ("show", "docs.jsonl?as=document&chunker=sentence")),
        ("wonderwords", ("write", "needle:?lengths=900&n=1", "-o", "x")),
    ],
)
def test_a_missing_package_names_its_extra(
    refused, model, tmp_path, monkeypatch, package, arguments
):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "docs.jsonl", [{"text": "One. Two. Three. Four. Five. Six."}])
    monkeypatch.setitem(sys.modules, package, None)
    if package == "wonderwords":
        arguments += ("--tokenizer", model)
        _words.cache_clear()
    line = refused("data", *arguments)
    assert f"this needs the package '{package}'; run pip install 'blocktune[data]'" in line
