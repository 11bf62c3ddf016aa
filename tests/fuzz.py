"""Random command lines, YAMLs and JSONLs, in this process: each works or is refused in one line.

    python tests/fuzz.py                # 10,000 tries, about an hour
    python tests/fuzz.py 3000 --seed 1  # prints each failure with the seed of its try

A failure is a traceback, an error of more than one line, or an exit code other than 0, 1 and 2.
No try trains, serves, uses the network or takes a large model.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import typer
import yaml
from tiny_llama import tiny_llama
from tiny_tokenizer import build_tokenizer
from typer.testing import CliRunner

from blocktune.commands import app

WORDS = ["", " ", "Anna", "0", "-1", "1.5", "1e999", "nan", "true", "null", "[", "{", "a: b", "\0"]
WORDS += ["\ud83d", "\ufeff", "é\u0301", "x" * 300, "../..", "/", "{title}", "{", "@", "?", "a?b=c"]
WORDS += ["naive + epic", "cacheblend ratio=2", "kvlink", "worlds:test?n=2", "worlds:dev?n=-1"]
WORDS += ["needle:", "hf:a/b?split=test", "nq", "--", "-x", "%", "q.jsonl?as=chat", "s.yaml"]
SKIPPED = ("serve", "bench", "vllm")
"""Commands that do not return, measure for seconds, or need vLLM."""
LEFT_OUT = {"--help", "--help-all", "--plugin", "--processes", "--families", "--follow"}
"""Options that end a command at once, take minutes, or do not return."""
SHAPES = {"eval": 0, "tune": 1, "train": 2}
"""Shape of the YAML that a command wants; others want a wording."""
OFTEN = ("--model", "--input", "--config", "--suite", "--output")
FITTING = {"--model": "model", "--device": "cpu", "--dtype": "float32", "--question": "Who?"}
FITTING |= {"--chunk": "Anna.", "--input": "q.jsonl", "--config": "s.yaml", "--suite": "s.yaml"}
FITTING |= {"--corpus": "q.jsonl", "--retrieved": "q.jsonl", "--tokenizer": "model"}
FITTING |= {"--max-new-tokens": "2", "--limit": "1", "--repo": "user/name", "--format": "s.yaml"}
FITTING |= {"--index": "0", "--most-layers": "1", "--budget": "0.5", "--layer-budget": "0.5"}
FITTING |= {"--param": "ratio=0.5", "--links": "table", "--fields": "question=input"}
YAML_KEYS = ["ttft", "fidelity", "pool", "dtype", "seed", "batch_size", "adapter", "titled"]
YAML_KEYS += ["system", "block_tag", "size", "draw", "x"]
KEYS = ["question", "chunks", "answers", "answer", "context", "text", "title", "messages", "input"]
KEYS += ["paragraphs", "data", "contexts", "documents", "id", "meta", "supporting", "followups"]


class Fuzzer:
    """Draws files and command lines."""

    def __init__(self, folder: Path):
        self.folder, self.runner = folder, CliRunner()
        self.codes: Counter[int] = Counter()
        self.commands = dict(_commands(typer.main.get_command(app), ()))
        tokenizer = build_tokenizer()
        tiny_llama(tokenizer, 256).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        self.names = ["q.jsonl", "c.csv", "s.yaml", "out", "model", "nothing"]

    def value(self, draw: random.Random, depth: int = 3):
        """A value as JSON or YAML may hold it."""
        kind = draw.randrange(8 if depth else 5)
        if kind < 3:
            return draw.choice(WORDS)
        if kind == 3:
            return draw.choice([None, True, False, 0, -1, 7, 1.5, float("inf"), 10**30])
        if kind == 4:
            return draw.choice(self.names)
        if kind == 5:
            return [self.value(draw, depth - 1) for _ in range(draw.randrange(4))]
        return {
            draw.choice([*KEYS, *WORDS]): self.value(draw, depth - 1)
            for _ in range(draw.randrange(5))
        }

    def record(self, draw: random.Random):
        """A record of a file: of a known shape with one field changed, or anything."""
        shapes = [
            {"question": "Who?", "chunks": ["Anna."], "answers": ["Anna"]},
            {"text": "Anna.", "title": "A"},
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Yo"},
                ]
            },
            {"input": "Who?", "context": "Anna.", "answers": ["Anna"]},
            {"title": "A", "paragraphs": [{"context": "Anna.", "qas": [{"question": "Who?"}]}]},
        ]
        record = draw.choice(shapes)
        for _ in range(draw.randrange(3)):
            record = record | {draw.choice([*record, *KEYS]): self.value(draw)}
        return record if draw.random() < 0.9 else self.value(draw)

    def write_files(self, draw: random.Random, shape: int) -> None:
        """The files that command lines name, new ones for every try; ``shape`` of the YAML."""
        lines = [json.dumps(self.record(draw)) for _ in range(draw.randrange(4))]
        if draw.random() < 0.2:
            lines.append(draw.choice(["{", "\ufeff{}", "not json", '{"a": 1, "a": 2}', "\ud800"]))
        text = "\n".join(lines)
        (self.folder / "q.jsonl").write_bytes(text.encode(errors="surrogatepass"))
        (self.folder / "c.csv").write_text("question,chunks\nWho?,Anna\n" * draw.randrange(3))
        (self.folder / "s.yaml").write_bytes(self.yaml(draw, shape).encode(errors="surrogatepass"))

    def yaml(self, draw: random.Random, shape: int) -> str:
        """A suite, a training run, a mixture or a wording, with some of it changed."""
        task = {"name": "t", "source": "q.jsonl", "max_new_tokens": 2}
        shapes = [
            {"model": "model", "methods": ["naive"], "tasks": [task], "ttft": {"num": 0}},
            {"model": "model", "method": "epic", "grid": {"k": [1]}, "task": task},
            {"train_data": "q.jsonl", "model_name_or_path": "model", "output_dir": "out"},
            {"parts": [{"source": "q.jsonl", "mode": "block"}], "draw": "sampling", "size": 2},
            {"instruction": "Answer.", "question": "Q: {question}"},
        ]
        record = dict(shapes[shape])
        for _ in range(draw.randrange(3)):
            more = _options() if shape == 2 else YAML_KEYS
            record[draw.choice([*record, draw.choice(more)])] = self.value(draw)
        try:
            text = yaml.safe_dump(record)
        except yaml.YAMLError:
            text = json.dumps(record)
        if draw.random() < 0.2:
            place = draw.randrange(len(text))
            text = text[:place] + draw.choice(["\t", ": ", "[", "&a *a", "\0", "\n"]) + text[place:]
        return text

    def line(self, draw: random.Random) -> list[str]:
        """A command line: a command with some of its options, most of them with fitting values."""
        group = draw.choice(sorted({path[0] for path in self.commands}))
        path = draw.choice(sorted(path for path in self.commands if path[0] == group))
        words = list(path)
        for name, kind, is_required in self.commands[path]:
            if draw.random() < (0.97 if is_required or name in OFTEN else 0.12):
                value = self.argument(draw, path, name, kind)
                words += [*([name] if name else []), *([] if value is None else [value])]
        if path == ("train",):
            words += ["--dry-run", "--report_to", "none"]
            for _ in range(draw.randrange(3)):
                words += [f"--{draw.choice(_options())}", str(self.value(draw, 0))]
        if path in {("answer",), ("eval",), ("tune",), ("profile-layers",)}:
            words += ["--limit", "1"]
        if draw.random() < 0.05:
            words.insert(draw.randrange(len(words) + 1), draw.choice(WORDS))
        return words

    def argument(self, draw: random.Random, path, name: str, kind: str) -> str | None:
        """A value for an option; None for a flag."""
        if kind == "flag":
            return None
        if draw.random() < 0.08:
            return str(self.value(draw, 0))
        if name == "":
            own = {"mix": "s.yaml", "report": "out", "compare": "out", "merge": "model"}
            other = draw.choice(["q.jsonl", "c.csv", "worlds:dev?n=2&passages=3&kinds=2-hop"])
            return own.get(path[-1], "out/s" if path[0] == "store" else other)
        known = {"--output": f"out/{draw.randrange(3)}", "--store": f"out/s{draw.randrange(2)}"}
        known |= {"--method": draw.choice(["naive", "epic k=2", "cacheblend", "kvlink"])}
        fitting = {"int": ["1", "2"], "float": ["0.5", "1"]}
        return (FITTING | known).get(name) or draw.choice(fitting.get(kind, self.names))

    def attempt(self, seed: int) -> str | None:
        """What is wrong with one try, or None."""
        draw = random.Random(seed)
        words = self.line(draw)
        shape = SHAPES.get(words[0], 4) if draw.random() < 0.9 else draw.randrange(5)
        self.write_files(draw, 3 if "mix" in words else shape)
        result = self.runner.invoke(app, words)
        self.codes[result.exit_code] += 1
        shown = json.dumps(words)
        error = result.exception
        if error is not None and not isinstance(error, SystemExit):
            trace = "".join(traceback.format_exception(error)[-4:])
            return f"{seed} {shown}\n{trace}"
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        if result.exit_code not in (0, 1, 2) or (result.exit_code == 2) != (len(errors) == 1):
            return f"{seed} {shown}\nexit code {result.exit_code}: {result.output[-500:]}"
        last = result.stderr.rstrip().splitlines()[-1:]
        if errors and last != errors:
            return f"{seed} {shown}\nmore than one line: {result.stderr[-500:]}"
        return None


def _commands(command, path):
    """Paths of all commands with their options: name, empty for arguments; kind; if required."""
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, (*path, name))
    if path and path[0] not in SKIPPED and not getattr(command, "no_args_is_help", False):
        yield (
            path,
            [
                (
                    parameter.opts[0] if parameter.opts[0].startswith("-") else "",
                    _kind(parameter),
                    parameter.required,
                )
                for parameter in command.params
                if not set(parameter.opts) & LEFT_OUT
            ],
        )


def _kind(parameter) -> str:
    is_flag = getattr(parameter, "is_flag", False)
    return "flag" if is_flag else type(parameter.default).__name__


def _options():
    from blocktune.training.config import BlockSFTConfig, DataArgs

    return [*DataArgs.__dataclass_fields__, *BlockSFTConfig.__dataclass_fields__]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tries", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first try")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        fuzzer = Fuzzer(Path(folder))
        for seed in range(asked.seed, asked.seed + asked.tries):
            if problem := fuzzer.attempt(seed):
                failures += 1
                print(problem, flush=True)
        os.chdir("/")
    print(f"{failures} of {asked.tries} tries failed; exit codes: {dict(fuzzer.codes)}")
    sys.exit(min(failures, 1))


if __name__ == "__main__":
    main()
