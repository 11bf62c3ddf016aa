"""The examples that the help shows run, one after the other, with small stand-ins for names."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer

from blocktune.cli import app

ROOT = Path(__file__).resolve().parents[2]
RECORD = {
    "question": "Where is Anna?",
    "chunks": ["Anna is in Kirby.", "No."],
    "answers": ["Kirby"],
}
STAND_INS = {
    "M": "data/tiny",
    "meta-llama/Llama-3.1-8B-Instruct": "data/tiny",
    "Qwen/Qwen3-8B": "data/tiny",
    "A": "out/kvlink",
    "R.yaml": "recipes/block_attention.yaml",
    "eval/suites/quick.yaml": "quick.yaml",
    "eval/tuning/psr.yaml": "psr.yaml",
    "/mnt/slow": "slow",
}
LEFT_OUT = re.compile(
    r"\b(nq|musique|tulu-3|triviaqa|2wikimultihopqa)\b|USER/NAME|^serve|--follow|"
    r"vllm|--families|--processes|--launcher|3f2a91"
)
"""What needs the Hub or vLLM, does not return, starts several processes or sweeps classes (these
have tests of their own), or names a model that was made up."""
LESS_WORK = {
    "train": ["--max_steps", "1", "--overwrite", "true"],
    "answer": ["--max-new-tokens", "2"],
    "bench attention": ["--tokens", "256", "--chunk", "64", "--repeats", "1"],
    "bench reuse": ["--tiny", "--repeats", "1"],
    "bench loading": ["--tiny", "--repeats", "1"],
    "eval": ["--limit", "1"],
    "tune": ["--limit", "1"],
    "profile-layers": ["--limit", "1", "--most-layers", "1"],
}
PLUGIN = '''
from dataclasses import dataclass

from blocktune.methods import Method, register


@register("mine")
@dataclass(frozen=True)
class Mine(Method):
    """Plain reuse."""
'''


def examples(command, path=()):
    """Words of every example of a command and those below it, without the program's name."""
    lines = re.sub(r"\[/?\w+\]", "", command.epilog or "").replace("\\[", "[").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  blocktune "):
            more = lines[number + 1] if number + 1 < len(lines) else ""
            line += more if more.startswith("      --") else ""
            yield shlex.split(line.partition(" | ")[0], comments=True)[1:]
    for name, below in getattr(command, "commands", {}).items():
        yield from examples(below, (*path, name))


@pytest.fixture
def there(tmp_path, monkeypatch, blocktune):
    """A clone's folders, the files that the examples name, and two adapters."""
    for name in ("data", "recipes", "eval"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    text = json.dumps(RECORD) + "\n"
    for name in ("q", "questions", "train", "mine", "held_out", "nq", "rows"):
        Path(f"{name}.jsonl").write_text(text)
    Path("docs.jsonl").write_text('{"text": "Anna is in Kirby.", "title": "Anna"}\n')
    Path("wiki.jsonl").write_text('{"text": "Anna is in Kirby.", "title": "Anna"}\n' * 12)
    retrieved = {"question": RECORD["question"], "passages": RECORD["chunks"]}
    Path("dpr.jsonl").write_text(json.dumps(retrieved) + "\n")
    chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Kirby."}]
    Path("chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    Path("rows.csv").write_text('input,context\nWhere?,"[""Anna is in Kirby.""]"\n')
    Path("mine.py").write_text(PLUGIN)
    Path("mixture.yaml").write_text("parts: [{source: train.jsonl}, {source: q.jsonl}]\n")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"q": "Where?", "docs": ["Anna."]}]), "rows.parquet")
    suite = (ROOT / "eval/suites/quick.yaml").read_text()
    Path("quick.yaml").write_text(suite.replace("num: 20, chunks: 60", "num: 1, chunks: 30"))
    grid = (ROOT / "eval/tuning/psr.yaml").read_text()
    Path("psr.yaml").write_text(re.sub(r"\[0\.8, 0\.9, 1\.0\]", "[1.0]", grid))
    for name, recipe in (("block", "block_attention"), ("kvlink", "kvlink")):
        own = ("--max_steps", "1", "--train_data", "train.jsonl", "--output_dir", f"out/{name}")
        done = blocktune("train", "--config", f"recipes/{recipe}.yaml", *own)
        assert done.exit_code == 0, done.output
    for name in ("news", "legal"):
        shutil.copytree("out/block", f"out/{name}")
    return tmp_path


@pytest.mark.alone
def test_every_example_runs(there, blocktune):
    shown = list(examples(typer.main.get_command(app)))
    assert len(shown) > 50
    # What reads the results of others comes after them, and the store before it is listed.
    last = ("eval compare", "eval report", "store")
    shown.sort(key=lambda words: " ".join(words).startswith(last))
    ran = set()
    for words in shown:
        line = " ".join(words)
        if LEFT_OUT.search(line) or line in ran:
            continue
        ran.add(line)
        if line.startswith("eval compare") and not Path("out/before").exists():
            for name in ("before", "after", "eval"):
                shutil.copytree("out/quick", f"out/{name}")
        if line.startswith("answer") and "out/merged" in line:
            assert Path("out/merged").exists()
        name = next((n for n in LESS_WORK if f"{line} ".startswith(f"{n} ")), "")
        less = (
            LESS_WORK.get(name, []) if not line.startswith(("eval compare", "eval report")) else []
        )
        done = blocktune(*(STAND_INS.get(word, word) for word in words), *less)
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
    assert len(ran) > 35
