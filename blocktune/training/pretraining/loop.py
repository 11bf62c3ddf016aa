"""The pre-training loop: a few single-threaded processes that average their gradients."""

from __future__ import annotations

import ctypes
import json
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
from blocktune.training.pretraining.config import Curriculum, PretrainConfig
from blocktune.training.pretraining.contexts import ContextSource
from blocktune.training.pretraining.gradients import backward, make_optimizers
from blocktune.training.pretraining.measure import by_kind, correct
from blocktune.training.pretraining.model import new_model, save
from blocktune.training.pretraining.tokenizer import train_tokenizer, world_texts

LOG = "log.jsonl"


def pretrain(config: PretrainConfig, output: Path) -> None:
    """Trains tokenizer and model from nothing, then anneals; saves both, the model in bfloat16.

    Args:
        config: What to train; the same configuration draws the same data.
        output: Folder for model, tokenizer and ``log.jsonl``.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / LOG).write_text(json.dumps({"config": asdict(config)}) + "\n")
    texts = world_texts(PromptFormat(), config.seed)
    train_tokenizer(texts, config.vocab_size).save_pretrained(output)
    _launch(config, output, range(config.steady_steps))
    anneal(config, output)


def anneal(config: PretrainConfig, output: Path) -> None:
    """Goes on from the weights that the stages left in ``output``, at falling rates.

    Raises:
        ValueError: If ``output`` does not hold the stages' last weights and their log.
    """
    last = json.loads((output / LOG).read_text().splitlines()[-1])
    if last.get("step") != config.steady_steps:
        raise ValueError(
            f"{output} holds no model of step {config.steady_steps}, where annealing starts; "
            "train from nothing"
        )
    _launch(config, output, range(config.steady_steps, config.total_steps))


def _launch(config: PretrainConfig, output: Path, steps: range) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (config, output, folder, steps), nprocs=config.workers)


def keep_memory() -> None:
    """Tells glibc to keep freed memory, else every step pays for page faults (twice the time)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # not glibc: slower, nothing else
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
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    if steps.start:
        model = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    else:
        model = new_model(config, tokenizer)
    try:
        _train(rank, config, output, model, tokenizer, steps)
    finally:
        dist.destroy_process_group()


def _train(rank, config, output, model, tokenizer, steps: range) -> None:
    source = ContextSource(config, tokenizer, f"{rank}/{steps.start}" if steps.start else f"{rank}")
    optimizers = make_optimizers(model, config)
    tokens, seconds = _so_far(output)
    started, console = time.perf_counter() - seconds, Console(quiet=rank > 0)
    dev = dev_examples(config)
    curriculum = Curriculum(config.stages[-1:] if steps.start else config.stages)
    for step in steps:
        stage = curriculum.stage
        sequences = source.draw(stage, config.tokens_per_step // config.workers)
        tally = backward(model, config, sequences, tokenizer.pad_token_id, source.given)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * config.rate(step)
            optimizer.step()
        model.zero_grad()
        curriculum.advance(tally.right / tally.answers)
        tokens += int(tally.tokens)
        entry = {"step": step + 1, "passages": stage.passages}
        entry |= {"loss": tally.loss / tally.weight, "answer_accuracy": tally.right / tally.answers}
        last = step + 1 == steps.stop
        if last or (step + 1) % config.eval_every == 0:
            entry["dev"] = _measure(rank, config, model, tokenizer, dev)
            if rank == 0:
                save(model, output)
        seconds = time.perf_counter() - started
        entry |= {"tokens": tokens, "tokens_per_s": tokens / seconds, "seconds": seconds}
        if rank == 0 and (last or (step + 1) % 20 == 0):
            _report(entry, config, output, console)


def _so_far(output: Path) -> tuple[int, float]:
    """Tokens and seconds of the run before."""
    last = json.loads((output / LOG).read_text().splitlines()[-1])
    return last.get("tokens", 0), last.get("seconds", 0.0)


def dev_examples(config: PretrainConfig):
    """Questions over 10 chunks whose names no training world holds."""
    worlds = WorldConfig(split="dev", seed=config.seed, num_examples=config.eval_examples)
    return list(generate_examples(worlds))


def _measure(rank, config, model, tokenizer, examples) -> dict[str, dict]:
    """Each process answers its share; all get the result."""
    model.eval()
    result = {}
    for setting in ("full", "naive"):
        share = correct(model, tokenizer, examples[rank :: config.workers], setting)
        shares: list = [None] * config.workers
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
