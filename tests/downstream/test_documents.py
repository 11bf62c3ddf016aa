"""What README and docs tell a user to type exists, and their snippets run as they are written."""

import functools
import itertools
import json
import re
import shlex
from pathlib import Path

import forked
import pytest
import trl
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from blocktune.commands import app
from blocktune.data import load_examples
from blocktune.evaluation.suite import parse_suite
from blocktune.methods import build, describe_all
from blocktune.methods.describe import GROUPS
from blocktune.tables import Table
from blocktune.testing import small_engine
from blocktune.training.dataset import to_sample
from blocktune.training.run import Parser
from examples.tiny_model.report import readme

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
DOCUMENTS = [
    *PAGES,
    *sorted(ROOT.glob("recipes/**/*.md")),
    *sorted(ROOT.glob("eval/*.md")),
    *sorted(ROOT.glob("eval/*/README.md")),
]
DOCUMENTS += [ROOT / "data/tiny/README.md", *sorted(ROOT.glob("eval/results/**/*.md"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """Command lines of blocktune, comments and continuations resolved."""
    lines = text.replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True)
        for line in map(str.strip, lines)
        if line.startswith("blocktune ") or "recipes/train.py" in line
    ]


def unknown_options(words: list[str]) -> list[str]:
    """Options that the command does not have."""
    known = {"--help", "--plugin", "--config"}
    training = {option for action in Parser()._actions for option in action.option_strings}
    if words[0] == "accelerate":
        given = words[words.index("recipes/train.py") + 1 :]
        known |= training
    else:
        command, given = get_command(app), words[1:]
        known |= _options(command)
        if given[0] == "--plugin":
            given = given[2:]
        assert given[0].startswith("-") or given[0] in command.commands, words
        while given and given[0] in getattr(command, "commands", ()):
            command, given = command.commands[given[0]], given[1:]
            known |= _options(command) | (training if command.name == "train" else set())
    return [word for word in given if word.startswith("-") and word.partition("=")[0] not in known]


def _options(command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


# Pages of results name the commands of their commit, in the text.
@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_options_of_every_command_that_is_shown(path):
    for block in blocks(path, "bash"):
        for words in commands(block):
            assert not unknown_options(words), words


def test_options_of_every_command_that_opens_a_file():
    for path in [*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("eval/suites/*.yaml")]:
        opening = [line[2:] for line in path.read_text().splitlines()[:3] if line.startswith("# ")]
        for words in commands("\n".join(opening)):
            assert not unknown_options(words), words


def test_an_option_or_a_command_that_does_not_exist_is_found():
    assert unknown_options(["blocktune", "answer", "--modle", "x"]) == ["--modle"]
    assert unknown_options(["blocktune", "train", "--num_linx=3"]) == ["--num_linx=3"]
    with pytest.raises(AssertionError):
        unknown_options(["blocktune", "anser"])


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_file_that_is_shown_exists(path):
    """Files of this repository in commands: recipes, suites, tasks, examples."""
    text = "\n".join([*blocks(path, "bash"), *blocks(path, "yaml")])
    names = re.findall(r"(?<![\w/.-])(?:recipes|eval|examples|data)/[\w./-]+\w", text)
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


METHODS = (ROOT / "docs/methods.md", "<!-- methods -->\n", "\n<!-- end of methods -->")


def table_of_methods() -> str:
    found = describe_all()
    entries = [e for group in GROUPS for e in found if e.group == group and e.kind == "method"]
    rows = []
    for one in entries:
        decides = [*one.axes, *([f"weights: {one.weights}"] if one.weights != "any" else [])]
        place = one.source.removeprefix("https://").removeprefix("arxiv.org/abs/")
        source = f"[{place}]({one.source})"
        rows.append((f"`{one.name}`", one.summary, ", ".join(decides) or "-", source))
    return Table(("method", "what it does", "decides", "source"), rows).markdown()


def test_the_docs_hold_the_table_of_methods():
    path, start, end = METHODS
    table = path.read_text(encoding="utf-8").partition(start)[2].partition(end)[0]
    assert table == table_of_methods(), "python tests/downstream/test_documents.py writes it"


def test_the_card_of_the_tiny_model_states_its_numbers():
    folder = ROOT / "data/tiny"
    numbers = json.loads((folder / "numbers.json").read_text())
    _, *log = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert (folder / "README.md").read_text(encoding="utf-8") == readme(numbers, log)


RECORDS = [(path, text) for path in PAGES for text in blocks(path, "json")]


@pytest.mark.parametrize(("path", "text"), RECORDS, ids=[name_of(path) for path, _ in RECORDS])
def test_records_that_are_shown_load(path, text, tmp_path):
    record = json.loads(text)
    if "documents" in record:
        engine = small_engine()
        example = to_sample(record, engine.tokenizer, engine.format).example
    else:
        (tmp_path / "mine.jsonl").write_text(json.dumps(record))
        (example,) = load_examples(tmp_path / "mine.jsonl")
    assert len(example.chunks) == 2
    assert example.target


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """A folder that looks like a clone to a snippet, and keeps what it writes."""
    for name in ("data", "recipes", "eval", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PYTHON = [(path, text) for path in PAGES for text in blocks(path, "python")]
APART = ("@register", "SFTTrainer", "blocktune.vllm")
"""Marks of blocks that other tests run: below, and tests/vllm in an environment with vLLM."""
PLAIN = [(p, text) for p, text in PYTHON if not any(mark in text for mark in APART)]
PLUGINS = [(path, text) for path, text in PYTHON if "@register" in text]


@pytest.mark.parametrize(("path", "text"), PLAIN, ids=[name_of(path) for path, _ in PLAIN])
def test_python_that_is_shown_runs(path, text, there):
    names = {}
    exec(compile(text, name_of(path), "exec"), names)
    assert names.keys() > {"__builtins__"}  # it ran to its end and left something behind


def test_the_readmes_trl_script_trains_and_is_served(there, monkeypatch):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from blocktune import Engine

    (text,) = (block for block in blocks(ROOT / "README.md", "python") if "SFTTrainer" in block)
    on_a_cpu = {"bf16": False, "use_cpu": True, "report_to": "none", "max_steps": 1}
    monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, **on_a_cpu))
    rows = [example.to_json() for example in load_examples("worlds:train?seed=1&n=2")]
    names = {
        "model": AutoModelForCausalLM.from_pretrained("data/tiny", dtype="float32"),
        "tokenizer": AutoTokenizer.from_pretrained("data/tiny"),
        "dataset": Dataset.from_list(rows),
    }
    exec(compile(text, "README.md", "exec"), names)
    trainer = names["trainer"]
    assert type(trainer) is trl.SFTTrainer
    (answer,) = Engine.from_pretrained(adapter="out").answer(rows[:1], "block-attention")
    assert answer.usage.recompute_ratio == 0


def test_the_method_that_is_shown_keeps_the_contract(tmp_path):
    assert len(PLUGINS) == 2
    assert len({text for _, text in PLUGINS}) == 1  # so that it is run once
    (tmp_path / "mine.py").write_text(PLUGINS[0][1])
    words = ["check", "--method", "sinks", "--plugin", "mine.py"]
    # A plug-in stays in the process that loads it.
    done = forked.run(["-m", "blocktune.cli", *words], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


SHOWN = {
    value
    for path in PAGES
    for words in commands("\n".join(blocks(path, "bash")))
    for option, value in itertools.pairwise(words)
    if option == "--method" and value not in ("sinks", "METHOD")
}


@pytest.mark.parametrize("method", sorted(SHOWN))
def test_methods_that_are_shown_can_be_built(method):
    assert method.startswith(build(method).name)


SUITES = [(p, text) for p in PAGES for text in blocks(p, "yaml") if "tasks:" in text]


@pytest.mark.parametrize(("path", "text"), SUITES, ids=[name_of(path) for path, _ in SUITES])
def test_suites_that_are_shown_are_suites(path, text):
    assert parse_suite(yaml.safe_load(text)).methods


def test_the_quickstart_trains_and_asks_with_one_instruction():
    page = ROOT / "docs/quickstart.md"
    (text,) = blocks(page, "yaml")
    (trained,) = (
        words[words.index("--instruction") + 1]
        for words in commands("\n".join(blocks(page, "bash")))
        if "--instruction" in words
    )
    assert parse_suite(yaml.safe_load(text)).tasks[0].prompt["instruction"] == trained


LEFT_OUT = ("USER/NAME", "release:", "eval/suites/", "out/quick", "serve", "3f2a91", "9c01ab4e")
LEFT_OUT += ("s3://", "mooncake")
"""The Hub, the golden record's suite, a server that runs until stopped, what is made up."""
LLAMA, TINY = "meta-llama/Llama-3.1-8B-Instruct", "data/tiny"
STAND_INS = {"$MODEL": TINY, LLAMA: TINY}
LESS_WORK = {
    "train": ["--max_steps", "1", "--use_cpu", "true"],
    "eval": ["--limit", "1"],
    "answer": ["--max-new-tokens", "2"],
}


RUN = {name: {"encode", "answer"} for name in ("README", "docs/quickstart", "docs/serving")}
RUN["docs/store"] = {"answer", "replay", "store"}
"""Commands that at least run of a page."""


@pytest.mark.parametrize("name", RUN)
def test_the_commands_of_a_page_run_one_after_the_other(name, there):
    """With the tiny model for 8B ones, one step and few questions; nothing is sent to the Hub."""
    (record,) = blocks(ROOT / "README.md", "json")
    for file in ("train", "questions", "test", "docs"):
        (there / f"{file}.jsonl").write_text(record)
    page = ROOT / f"{name}.md"
    for text in blocks(page, "yaml"):
        (there / "mine.yaml").write_text(text.replace(LLAMA, TINY))
    ran = []
    shown = commands("\n".join(blocks(page, "bash")))
    for words in sorted(shown, key=lambda words: words[1] == "store"):  # once there is one
        if any(part in word for word in words for part in LEFT_OUT):
            continue
        own = [STAND_INS.get(word, word) for word in words[1:]]
        done = CliRunner().invoke(app, own + LESS_WORK.get(own[0], []) * (own[1] != "report"))
        assert done.exit_code == 0, f"{words}\n{done.output}\n{done.exception!r}"
        ran.append(own[0])
    assert RUN[name] <= set(ran)


if __name__ == "__main__":
    path, start, end = METHODS
    head, _, rest = path.read_text(encoding="utf-8").partition(start)
    tail = rest.partition(end)[2]
    path.write_text(head + start + table_of_methods() + end + tail, encoding="utf-8")
