"""The pre-training loop: on one GPU, or in several single-threaded processes on a CPU."""

from __future__ import annotations

import ctypes
import json
import math
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from blocktune.data.worlds import WorldConfig, generate_examples
from blocktune.prompt import PromptFormat
from blocktune.provenance import provenance
from examples.tiny_model.config import PretrainConfig
from examples.tiny_model.contexts import Lessons, given_ids, loader
from examples.tiny_model.gradients import Tally
from examples.tiny_model.measure import by_kind, correct
from examples.tiny_model.model import new_model, save
from examples.tiny_model.stepping import Stepper
from examples.tiny_model.tokenizer import train_tokenizer, world_texts

LOG = "log.jsonl"
LOG_EVERY = 50


def pretrain(config: PretrainConfig, output: Path) -> None:
    """Trains tokenizer and model from scratch; saves both, the model in bfloat16.

    Args:
        config: The settings; the same settings give the same data.
        output: Folder for model, tokenizer and ``log.jsonl``.
    """
    output.mkdir(parents=True, exist_ok=True)
    origin = provenance()
    header = {"config": asdict(config), "command": origin["command"], "commit": origin["commit"]}
    (output / LOG).write_text(json.dumps(header) + "\n")
    texts = world_texts(PromptFormat(), config.seed, config.aliased)
    train_tokenizer(texts, config.vocab_size).save_pretrained(output)
    go_on(config, output)


def go_on(config: PretrainConfig, output: Path) -> None:
    """Continues from the weights in ``output``, which must be those of the end of a segment.

    Raises:
        ValueError: If the last step in the log is not the end of a segment, or the run was started
            with other settings; stages may be added, and the device may change.
    """
    lines = (output / LOG).read_text().splitlines()
    _require_same_run(json.loads(lines[0])["config"], config, output)
    done = json.loads(lines[-1]).get("step", 0)
    left = [part for part in config.segments if part.start >= done]
    if done != config.total_steps and (not left or left[0].start != done):
        ends = ", ".join(str(part.stop) for part in config.segments)
        raise ValueError(f"{output} has step {done}; a run can continue only from steps {ends}")
    for steps in left:
        _launch(config, output, steps)


def _launch(config: PretrainConfig, output: Path, steps: range) -> None:
    if config.device == "cuda":
        torch.set_float32_matmul_precision("high")
    if config.workers == 1:
        _train(0, config, output, steps)
    else:
        with tempfile.TemporaryDirectory() as folder:
            args = config, output, folder, steps
            torch.multiprocessing.spawn(_worker, args, nprocs=config.workers)


def keep_memory() -> None:
    """Makes glibc keep freed memory; otherwise page faults double the time of a step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # no glibc: only slower
        return
    trim, top_pad, mmap = -1, -2, -3  # M_TRIM_THRESHOLD and so on, in <malloc.h>
    for option, size in ((mmap, 2_000_000_000), (trim, 2_000_000_000), (top_pad, 100_000_000)):
        libc.mallopt(option, size)


def _worker(rank: int, config: PretrainConfig, output: Path, folder: str, steps: range) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    keep_memory()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=config.workers
    )
    try:
        _train(rank, config, output, steps)
    finally:
        dist.destroy_process_group()


def _train(rank: int, config: PretrainConfig, output: Path, steps: range) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    if steps.start:
        model = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    else:
        model = new_model(config, tokenizer)
    model.to(config.device)
    lessons = Lessons(config, tokenizer, rank)
    given = torch.tensor(given_ids(tokenizer), device=config.device)
    step_with = Stepper(model, config, given)
    tokens, seconds = _so_far(output)
    started, console = time.perf_counter() - seconds, Console(quiet=rank > 0)
    dev, recent = dev_examples(config), []
    for stage, span in zip(config.stages, config.spans, strict=True):
        if span.start not in steps:
            continue
        for step, batches in zip(span, loader(lessons, span), strict=True):
            recent.append(step_with(batches, config.rate(step)))
            done, last = step + 1, step + 1 == steps.stop
            measured = last or done % config.eval_every == 0
            if not measured and done % LOG_EVERY:
                continue
            tally = Tally(*torch.stack(recent).sum(0).tolist())
            recent.clear()
            _require_finite(tally.loss, done, output)
            tokens, right = tokens + int(tally.tokens), tally.right / tally.answers
            entry = {"step": done, "passages": stage.passages}
            entry |= {"loss": tally.loss / tally.weight, "answer_accuracy": right}
            if measured:
                entry["dev"] = _measure(rank, config, model, tokenizer, dev)
                if rank == 0:
                    save(model, output)
            seconds = time.perf_counter() - started
            entry |= {"tokens": tokens, "tokens_per_s": tokens / seconds, "seconds": seconds}
            if rank == 0:
                _report(entry, config, output, console)
            if right >= stage.until and span.stop < steps.stop:
                break


def _require_finite(loss: float, step: int, output: Path) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at step {step} of {output}; start again with another --seed"
        )


_MAY_CHANGE = ("stages", "device", "workers", "readers", "eval_every", "eval_examples")


def _require_same_run(old: dict, config: PretrainConfig, output: Path) -> None:
    new = json.loads(json.dumps(asdict(config)))
    for key in new.keys() - set(_MAY_CHANGE):
        if old.get(key) != new[key]:
            raise ValueError(
                f"{output} was started with {key} = {old.get(key)}, not {new[key]}; continue with "
                "the same settings, or start again in another folder"
            )


def _so_far(output: Path) -> tuple[int, float]:
    """Tokens and seconds of the run so far."""
    last = json.loads((output / LOG).read_text().splitlines()[-1])
    return last.get("tokens", 0), last.get("seconds", 0.0)


def dev_examples(config: PretrainConfig):
    """Questions over 10 chunks, with names that occur in no training world."""
    worlds = WorldConfig(
        split="dev",
        seed=config.seed,
        num_examples=config.eval_examples,
        kinds=config.kinds,
        aliased=config.aliased,
    )
    return list(generate_examples(worlds))


def _measure(rank, config, model, tokenizer, examples) -> dict[str, dict]:
    """Evaluates on dev questions. Each process answers a share; all get the result."""
    model.eval()
    result = {}
    for setting in ("full", "naive"):
        share = correct(model, tokenizer, examples[rank :: config.workers], setting)
        shares: list = [share] * config.workers
        if dist.is_initialized():
            dist.all_gather_object(shares, share)
        right = [shares[i % config.workers][i // config.workers] for i in range(len(examples))]
        result[setting] = by_kind(examples, right)
    model.train()
    return result


def _report(entry: dict, config: PretrainConfig, output: Path, console: Console) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()}
    with open(output / LOG, "a", encoding="utf-8") as log:
        log.write(json.dumps(rounded) + "\n")
    console.print(
        f"step [bold]{entry['step']}[/]/{config.total_steps}  passages 1-{entry['passages']}  "
        f"loss {entry['loss']:.3f}  answers {entry['answer_accuracy']:.3f}  "
        f"{entry['tokens_per_s']:,.0f} tokens/s  {entry['seconds'] / 60:.1f} min"
    )
    for setting, kinds in entry.get("dev", {}).items():
        line = "  ".join(f"{k} {v['em']:.2f}" for k, v in kinds.items() if "/" not in k)
        console.print(f"   [cyan]dev, {setting:6}[/] {line}")
