"""Runs a suite on random weights of a large model's configuration, cut in depth (and width).

    python eval/dry_run.py --model llama-3.1-8b --suite eval/suites/open-ends.yaml --output out/dry

It shows before a GPU is rented that every method, task and report of a suite runs on the shape of
the model: its RoPE, head sizes, groups and norms. What it answers is noise. Tasks that would be
downloaded are left out. `--shrink 1` keeps the full width (2 GiB a layer with embeddings).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from blocktune import plugins
from blocktune.evaluation.report.page import write_report
from blocktune.evaluation.report.terminal import run_and_show
from blocktune.evaluation.suite import load_suite

TOKENIZER = "data/tiny"
GENERATED = ("needle:", "worlds:", "dialogue:", "code:")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# As the models' own config.json state them.
CONFIGS = {
    "llama-3.1-8b": (
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": LLAMA3_ROPE,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-8b": (
        Qwen3Config,
        {
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "tie_word_embeddings": False,
        },
    ),
    "mistral-7b-v0.3": (
        MistralConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
}


def cut_config(name: str, vocab_size: int, layers: int, shrink: int) -> PreTrainedConfig:
    """The configuration with fewer layers; `shrink` divides widths and keeps the groups."""
    kind, values = CONFIGS[name]
    widths = ("hidden_size", "intermediate_size", "head_dim")
    cut = {key: value // shrink if key in widths else value for key, value in values.items()}
    return kind(**cut, vocab_size=vocab_size, num_hidden_layers=layers)


def make_model(name: str, folder: Path, layers: int, shrink: int) -> Path:
    """Writes random weights and a small tokenizer as a model's folder."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = cut_config(name, len(tokenizer), layers, shrink)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=CONFIGS, required=True)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=16)
    parser.add_argument("--limit", type=int, default=2)
    given = parser.parse_args(arguments)
    plugins.add(str(Path(__file__).parent / "study/probes.py"))
    suite = load_suite(given.suite)
    tasks = [task for task in suite.tasks if task.source.startswith(GENERATED)]
    if not tasks:
        raise SystemExit(
            f"{given.suite}: every task is downloaded; name a suite with generated ones"
        )
    folder = make_model(given.model, given.output / "model", given.layers, given.shrink)
    suite = replace(
        suite,
        model=str(folder),
        dtype="float32",
        tasks=tuple(replace(task, limit=given.limit) for task in tasks),
        ttft=replace(suite.ttft, num=min(suite.ttft.num, given.limit), chunks=None),
    )
    if run_and_show(suite, given.output, f"{given.model}, {given.layers} layers, random weights"):
        print(write_report(given.output))


if __name__ == "__main__":
    main()
