"""LoRA training by block attention beside stock TRL: tokens a second and peak memory, same rows.

    python eval/bench/train.py --model out/smollm2 --tokens 700 4000 --output out/train.json

Rows are passages of data/passages.jsonl with a question and its answer, as token ids the same for
both. Each run has a process of its own, one after the other: its first step is not timed. Stock
is TRL's `SFTTrainer` with the loss on the answer; both use the same LoRA, batch and precision, no
checkpointing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from transformers import TrainerCallback

from blocktune import Chunk, RagExample
from blocktune.files import replace_json
from blocktune.prompt import PromptFormat, make_pieces
from blocktune.provenance import provenance

PASSAGES = Path(__file__).resolve().parents[2] / "data/passages.jsonl"
KINDS = ("stock", "block")
STEP_TOKENS = 1400
"""Tokens of a step; a longer row is a step by itself."""


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self):
        self.ends = [time.perf_counter()]

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())


def make_rows(tokenizer, length: int, count: int) -> list[RagExample]:
    """Questions over as many passages as fit ``length`` tokens; long rows repeat passages."""
    lines = PASSAGES.read_text(encoding="utf-8").splitlines()
    passages = cycle([json.loads(line) for line in lines])
    rows = []
    for _ in range(count):
        asked = next(passages)
        ask = asked["questions"][0]
        chunks = [Chunk(asked["text"], asked["title"])]
        while True:
            new = next(passages)
            row = RagExample(ask["question"], tuple(chunks), (ask["answer"],))
            wider = (*chunks, Chunk(new["text"], new["title"]))
            if len(ids_of(tokenizer, row, wider)[0]) > length:
                break
            chunks = list(wider)
        rows.append(row)
    return rows


def ids_of(tokenizer, row: RagExample, chunks=None) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer, and which of them are the answer's."""
    pieces = make_pieces(
        tokenizer, PromptFormat(), chunks or row.chunks, row.question, row.answers[0], block=False
    )
    prompt = [*pieces.prefix, *(i for chunk in pieces.chunks for i in chunk), *pieces.query]
    return [*prompt, *pieces.answer], [0] * len(prompt) + [1] * len(pieces.answer)


def run(kind: str, given: argparse.Namespace) -> dict[str, float]:
    """Trains a few steps in this process."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    from blocktune import BlockSFTConfig, BlockSFTTrainer

    set_seed(0)
    torch.set_num_threads(given.threads)
    [length], cuda = given.tokens, torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    batch = max(1, STEP_TOKENS // length)
    rows = make_rows(tokenizer, length, batch * (given.steps + 1))
    made = [ids_of(tokenizer, row) for row in rows]
    options = {
        "max_steps": given.steps + 1,
        "per_device_train_batch_size": batch,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": cuda,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": cuda,
    }
    lora = LoraConfig(r=given.rank, lora_alpha=2 * given.rank, target_modules="all-linear")
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    clock, folder = Clock(), str(given.output.parent / "runs")
    if kind == "block":
        config = BlockSFTConfig(folder, **options)
        trainer = BlockSFTTrainer(
            model, config, train_dataset=rows, processing_class=tokenizer, peft_config=lora
        )
    else:
        config = SFTConfig(folder, max_length=None, completion_only_loss=True, **options)
        data = [{"input_ids": ids, "completion_mask": mask} for ids, mask in made]
        trainer = SFTTrainer(
            model, config, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
            peft_config=lora,
        )  # fmt: skip
    trainer.add_callback(clock)
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else _resident()
    tokens = [sum(len(ids) for ids, _ in made[i : i + batch]) for i in range(0, len(made), batch)]
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    speeds = [count / took for count, took in zip(tokens[1:], seconds[1:], strict=True)]
    return {
        "tokens_per_s": median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "tokens_a_row": median(len(ids) for ids, _ in made),
        "rows_a_step": batch,
        "peak_bytes": peak,
    }


def _resident() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or name on the Hub")
    add("--tokens", type=int, nargs="+", default=[700, 4000], help="of a row, at most")
    add("--steps", type=int, default=2, help="timed steps of each run")
    add("--rank", type=int, default=32, help="of LoRA")
    add("--threads", type=int, default=2, help="that PyTorch may use")
    add("--output", type=Path, default=Path("out/train/train.json"))
    add("--one", choices=KINDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(run(given.one, given)))
        return 0
    found: dict = {}
    for length in given.tokens:
        runs = {}
        for kind in KINDS:
            own = ["--tokens", str(length), "--one", kind, "--model", given.model]
            own += ["--steps", str(given.steps), "--rank", str(given.rank)]
            own += ["--threads", str(given.threads), "--output", str(given.output)]
            done = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True)
            if done.returncode:
                print(f"error: {kind} at {length}: {done.stderr.strip()[-400:]}", file=sys.stderr)
                return 2
            runs[kind] = json.loads(done.stdout.splitlines()[-1])
            one = runs[kind]
            print(
                f"{length:>6,} tokens  {kind:<6} {one['tokens_per_s']:8,.0f} tokens/s "
                f"({one['slowest']:,.0f} to {one['fastest']:,.0f}), peak "
                f"{one['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
        over = {k: runs["block"][k] / runs["stock"][k] for k in ("tokens_per_s", "peak_bytes")}
        print(f"        block over stock: {over['tokens_per_s']:.2f}, {over['peak_bytes']:.2f}")
        found[str(length)] = runs | {"block_over_stock": over}
    setting = {"model": Path(given.model).name, "rank": given.rank, "threads": given.threads}
    replace_json(given.output, {"lengths": found, "setting": setting, **provenance(0)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
