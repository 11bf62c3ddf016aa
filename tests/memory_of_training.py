"""Training steps in a process of their own: python memory_of_training.py TOKENS..., ascending.

Prints, for each length, the peak of resident memory above what the process held before (bytes).
"""

import contextlib
import ctypes
import json
import resource
import sys
from pathlib import Path

import torch
from layouts import layout, prompt
from transformers import LlamaConfig, LlamaForCausalLM

from blocktune.attention import attach, make_plan

CHUNKS = 32
QUERY = 64
SHAPE = {
    "vocab_size": 1200,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
}


def chunked(tokens):
    length, rest = divmod(tokens - QUERY, CHUNKS)
    return layout(prompt(rest, (length,) * CHUNKS, QUERY))


def step(model, tokens, execution):
    some = chunked(tokens)
    ids = torch.randint(SHAPE["vocab_size"], some.kind.shape)
    plan = make_plan(execution, some)
    # Logits of the query alone: over all tokens the vocabulary would be what is measured.
    out = model(ids, position_ids=some.position, plan=plan, use_cache=False, logits_to_keep=QUERY)
    out.logits.logsumexp(-1).mean().backward()


def peak_bytes():
    status = Path("/proc/self/status")
    if not status.exists():  # macOS counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux hands ru_maxrss of the parent down through exec; the high-water mark is our own.
    mark = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(mark.split()[1]) * 1024


def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    attach(model)
    return model


def give_back_at_once():
    """glibc keeps what is freed, else: the peak differs by a quarter from run to run."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-8, 1), (-3, 1 << 16), (-1, 1 << 16)):  # ARENA_MAX, MMAP_, TRIM_
            mallopt(option, value)


def main(lengths):
    give_back_at_once()
    one, peaks = model(), []
    step(one, 512, "split")  # what the first step loads is not the prompt's
    before = peak_bytes()
    for tokens in lengths:
        step(one, tokens, "split")
        peaks.append(peak_bytes() - before)
    return peaks


if __name__ == "__main__":
    lengths = [int(word) for word in sys.argv[1:]]
    assert lengths == sorted(lengths), "a peak is of all steps so far"
    print(json.dumps(main(lengths)))
