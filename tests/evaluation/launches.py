"""Runs of the evaluation in processes of their own, on a tiny random model."""

from pathlib import Path

import forked
import yaml
from tiny_llama import tiny_llama
from tiny_tokenizer import build_tokenizer


def write_suite(folder: Path) -> Path:
    """A model, and a suite of three methods and seven questions."""
    tokenizer = build_tokenizer()
    tiny_llama(tokenizer, 1024, initializer_range=0.2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    source = "worlds:test?seed=1&n=7&passages=2&kinds=self-contained"
    record = {
        "model": str(folder / "model"),
        "methods": ["full-prefill", "naive", "cacheblend"],
        "tasks": [{"name": "worlds", "source": source, "max_new_tokens": 4}],
        "batch_size": 2,
        "dtype": "float32",
        "ttft": {"num": 0},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(record))
    return folder / "suite.yaml"


def rows_of(output) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((output / "rows").iterdir())}


def start(output, suite, processes: int = 1) -> None:
    words = ["-m", "blocktune.cli", "eval", "--suite", suite, "--output", output]
    done = forked.run_ranks(processes, words)
    assert done.returncode == 0, done.stderr
