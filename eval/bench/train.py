"""LoRA training in block attention against stock TRL: tokens per second and peak memory.

    python eval/bench/train.py --model out/smollm2 --tokens 700 4000 --output out/train.json

Rows are passages of data/passages.jsonl with a question and its answer. Each run has a process of
its own, one after the other, and its first step is not timed. Stock is TRL's `SFTTrainer` with the
loss on the answer. Both use the same token ids, LoRA, batch size and precision, no checkpointing.
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
"""Approximate tokens per step; a longer row makes a step by itself."""


class Clock(TrainerCallback):
    """Records the end time of each step."""

    def __init__(self):
        self.ends = [time.perf_counter()]

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())


def make_rows(tokenizer, length: int, count: int) -> list[RagExample]:
    """Makes questions over as many passages as fit into ``length`` tokens; may repeat passages."""
    lines = PASSAGES.read_text(encoding="utf-8").splitlines()
    passages = cycle([json.loads(line) for line in lines])
    rows = []
    for _ in range(count):
        gold = next(passages)
        question = gold["questions"][0]
        chunks = [Chunk(gold["text"], gold["title"])]
        while True:
            other = next(passages)
            row = RagExample(question["question"], tuple(chunks), (question["answer"],))
            extended = (*chunks, Chunk(other["text"], other["title"]))
            if len(ids_of(tokenizer, row, extended)[0]) > length:
                break
            chunks = list(extended)
        rows.append(row)
    return rows


def ids_of(tokenizer, row: RagExample, chunks=None) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer, and a mask that is 1 for the answer."""
    pieces = make_pieces(
        tokenizer, PromptFormat(), chunks or row.chunks, row.question, row.answers[0], block=False
    )
    prompt = [*pieces.prefix, *(i for chunk in pieces.chunks for i in chunk), *pieces.query]
    return [*prompt, *pieces.answer], [0] * len(prompt) + [1] * len(pieces.answer)


def run(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Trains a few steps in this process and measures them."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    from blocktune import BlockSFTConfig, BlockSFTTrainer

    set_seed(0)
    torch.set_num_threads(args.threads)
    [length], cuda = args.tokens, torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    batch = max(1, STEP_TOKENS // length)
    rows = make_rows(tokenizer, length, batch * (args.steps + 1))
    coded = [ids_of(tokenizer, row) for row in rows]
    options = {
        "max_steps": args.steps + 1,
        "per_device_train_batch_size": batch,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": args.bf16 or cuda,
        "use_cpu": not cuda,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": cuda,
    }
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    clock, folder = Clock(), str(args.output.parent / "runs")
    if kind == "block":
        config = BlockSFTConfig(folder, **options)
        trainer = BlockSFTTrainer(
            model, config, train_dataset=rows, processing_class=tokenizer, peft_config=lora
        )
    else:
        config = SFTConfig(folder, max_length=None, completion_only_loss=True, **options)
        data = [{"input_ids": ids, "completion_mask": mask} for ids, mask in coded]
        trainer = SFTTrainer(
            model, config, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
            peft_config=lora,
        )  # fmt: skip
    trainer.add_callback(clock)
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else _resident()
    tokens = [sum(len(ids) for ids, _ in coded[i : i + batch]) for i in range(0, len(coded), batch)]
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    speeds = [count / took for count, took in zip(tokens[1:], seconds[1:], strict=True)]
    return {
        "tokens_per_s": median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "tokens_a_row": median(len(ids) for ids, _ in coded),
        "rows_a_step": batch,
        "peak_bytes": peak,
    }


def _resident() -> int:
    """Peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or name on the Hub")
    add("--tokens", type=int, nargs="+", default=[700, 4000], help="maximum tokens per row")
    add("--steps", type=int, default=2, help="timed steps per run")
    add("--rank", type=int, default=32, help="rank of LoRA")
    add("--threads", type=int, default=2, help="threads of PyTorch")
    add("--bf16", action="store_true", help="bfloat16 on a CPU, as always on a GPU")
    add("--output", type=Path, default=Path("out/train/train.json"))
    add("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.one, args)))
        return 0
    results: dict = {}
    for length in args.tokens:
        runs = {}
        for kind in KINDS:
            argv = ["--tokens", str(length), "--one", kind, "--model", args.model]
            argv += ["--steps", str(args.steps), "--rank", str(args.rank)]
            argv += ["--threads", str(args.threads), "--output", str(args.output)]
            argv += ["--bf16"] if args.bf16 else []
            job = subprocess.run([sys.executable, __file__, *argv], capture_output=True, text=True)
            if job.returncode:
                print(f"error: {kind} at {length}: {job.stderr.strip()[-400:]}", file=sys.stderr)
                return 2
            runs[kind] = json.loads(job.stdout.splitlines()[-1])
            result = runs[kind]
            print(
                f"{length:>6,} tokens  {kind:<6} {result['tokens_per_s']:8,.0f} tokens/s "
                f"({result['slowest']:,.0f} to {result['fastest']:,.0f}), peak "
                f"{result['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
        ratio = {k: runs["block"][k] / runs["stock"][k] for k in ("tokens_per_s", "peak_bytes")}
        print(f"        block over stock: {ratio['tokens_per_s']:.2f}, {ratio['peak_bytes']:.2f}")
        results[str(length)] = runs | {"block_over_stock": ratio}
    setting = {"model": Path(args.model).name, "rank": args.rank, "threads": args.threads}
    setting["bf16"] = args.bf16 or torch.cuda.is_available()
    replace_json(args.output, {"lengths": results, "setting": setting, **provenance(0)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
