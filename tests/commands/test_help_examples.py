"""The examples that the help shows run, one after the other, with small stand-ins for names."""

import gc
import gzip
import json
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import typer
from rich.text import Text

from blocktune.commands import app

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300
"""An example that takes longer hangs."""
RECORD = {
    "question": "Where is Anna?",
    "chunks": ["Anna is in Kirby.", "No."],
    "answers": ["Kirby"],
}
STAND_INS = {
    "M": "data/tiny",
    "Qwen/Qwen3-8B": "data/tiny",
    "A": "out/kvlink",
    "R.yaml": "block.yaml",
    "recipes/block_attention.yaml": "block.yaml",
    "recipes/kvlink.yaml": "kvlink.yaml",
    "eval/suites/quick.yaml": "quick.yaml",
    "eval/tuning/psr.yaml": "psr.yaml",
    "droidspeak first_layer=9 ratio=0.125": "droidspeak first_layer=1 ratio=0.5",
    "worlds:test?n=500": "worlds:test?n=5",
    "worlds:dev?n=32": "worlds:dev?n=2",
    "needle:?lengths=1024,4096": "needle:?lengths=1024&n=1&depths=0",
    "/mnt/slow": "slow",
    "/mnt/nvme": "slow",
}
LEFT_OUT = re.compile(
    r"(?<!\S)(nq|musique|tulu-3|triviaqa|2wikimultihopqa)(\s|\?|$)|USER/NAME|s3://|KVShareArena|"
    r"^serve|--only-correct|--follow|vllm|--families|--processes|--launcher|3f2a91|"
    "9c01ab4e"
)
"""What needs the Hub, a clone, vLLM or a model that answers well, does not return, starts several
processes or sweeps classes (these have tests of their own), or names a model that was made up."""
LESS_WORK = {
    "train": ["--max_steps", "1", "--overwrite", "true"],
    "answer": ["--max-new-tokens", "2"],
    "data answer": ["--max-new-tokens", "2"],
    "bench attention": ["--tokens", "256", "--chunk", "64", "--repeats", "1"],
    "bench reuse": ["--tiny", "--repeats", "1"],
    "bench store": ["--tiny"],
    "bench ttft": ["--tokens", "64", "--repeats", "1"],
    "eval --suite": ["--limit", "1"],
    "tune": ["--limit", "1"],
    "profile-layers": ["--limit", "1", "--most-layers", "1"],
    "replay": ["--limit", "10"],
}
PLUGIN = '''
from dataclasses import dataclass

from blocktune.methods import Method, register


@register("mine")
@dataclass(frozen=True)
class Mine(Method):
    """Plain reuse."""
'''


def text(command):
    """The examples of a command as a terminal shows them."""
    return Text.from_markup(command.epilog or "").plain


def walk(command):
    """A command and those below it."""
    yield command
    for below in getattr(command, "commands", {}).values():
        yield from walk(below)


def examples(command):
    """Words of every example of a command and those below it, without the program's name."""
    for line in text(command).replace("\\\n", " ").splitlines():
        if line.startswith("  blocktune "):
            yield shlex.split(line.partition(" | ")[0], comments=True)[1:]
    for below in getattr(command, "commands", {}).values():
        yield from examples(below)


def write_smaller(source, target, pattern, smaller):
    """A file of the clone with less to do."""
    text, count = re.subn(pattern, smaller, (ROOT / source).read_text())
    assert count == 1, source
    Path(target).write_text(text)


@pytest.fixture
def there(tmp_path, monkeypatch, blocktune, small_benches, clean):
    """A clone's folders, the files that the examples name, and adapters."""
    for name in ("data", "recipes", "eval"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for name in ("q", "questions", "train", "mine", "held_out", "nq"):
        Path(f"{name}.jsonl").write_text(json.dumps(RECORD) + "\n")
    passage = '{"text": "Anna is in Kirby.", "title": "Anna"}\n'
    Path("docs.jsonl").write_text(passage)
    Path("wiki.jsonl").write_text(passage * 12)
    retrieved = {"question": RECORD["question"], "passages": RECORD["chunks"]}
    Path("dpr.jsonl").write_text(json.dumps(retrieved) + "\n")
    chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Kirby."}]
    Path("chat.jsonl").write_text(json.dumps({"messages": chat * 2}) + "\n")
    Path("rows.csv").write_text('input,context\nWhere?,"[""Anna is in Kirby.""]"\n')
    trace = json.dumps({"timestamp": 0, "input_length": 1000, "hash_ids": [1, 2]}) + "\n"
    Path("trace.jsonl").write_text(trace * 3)
    Path("mooncake_trace.jsonl.gz").write_bytes(gzip.compress(trace.encode() * 3))
    Path("slow").mkdir()
    Path("mine.py").write_text(PLUGIN)
    Path("mixture.yaml").write_text("parts: [{source: train.jsonl}, {source: q.jsonl}]\n")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"q": "Where?", "docs": ["Anna."]}]), "rows.parquet")
    write_smaller("eval/suites/quick.yaml", "quick.yaml", "num: 20, chunks: 60", "num: 1")
    write_smaller("eval/tuning/psr.yaml", "psr.yaml", r"temperature: .*\n.*", "scale: [1.0]")
    for name, recipe in (("block", "block_attention"), ("kvlink", "kvlink")):
        write_smaller(f"recipes/{recipe}.yaml", f"{name}.yaml", r"n=2000&turns=8", "n=16")
        own = ("--max_steps", "1", "--output_dir", f"out/{name}")
        done = blocktune("train", "--config", f"{name}.yaml", *own)
        assert done.exit_code == 0, done.output
    gc.collect()
    gc.freeze()  # as tests/conftest.py, since all of this is one test
    return tmp_path


def stop(*_):
    raise TimeoutError(f"took longer than {LIMIT_S} s")


def test_every_command_has_examples_that_can_be_copied_from_80_columns():
    for command in walk(typer.main.get_command(app)):
        lines = [line for line in text(command).splitlines() if line.startswith(" ")]
        assert lines, command.name
        assert max(map(len, lines)) < 79, command.name


@pytest.mark.alone
def test_every_example_runs(there, blocktune, replies_end):
    """In one process, which imports torch once; an example may use what those before it wrote."""
    shown = {" ".join(words): words for words in examples(typer.main.get_command(app))}
    assert len(shown) > 80
    ran = {line: words for line, words in shown.items() if not LEFT_OUT.search(line)}
    assert len(ran) > 50
    signal.signal(signal.SIGALRM, stop)
    failed = []
    # What reads the results of others comes after them.
    last = ("eval compare", "eval report", "store")
    for line in sorted(ran, key=lambda line: line.startswith(last)):
        if line.startswith("eval compare"):
            for name in ("before", "after"):
                shutil.copytree("out/quick", f"out/{name}")
        less = next((more for name, more in LESS_WORK.items() if line.startswith(name)), [])
        signal.alarm(LIMIT_S)
        started = time.process_time()
        done = blocktune(*(STAND_INS.get(word, word) for word in ran[line]), *less)
        signal.alarm(0)
        print(f"{time.process_time() - started:6.1f} s  blocktune {line}")
        if done.exit_code:
            failed.append(f"blocktune {line}\n{done.output}\n{done.exception!r}")
    assert not failed, "\n\n".join(failed)
