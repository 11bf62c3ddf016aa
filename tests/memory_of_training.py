"""One training step in a process of its own: python memory_of_training.py TOKENS PLAN COUNT.

Prints the peak of resident memory above what the process held before the step (bytes, COUNT
``rss``), or the elements of the largest tensor that was made (COUNT ``numel``).
"""

import json
import resource
import sys
from pathlib import Path

import torch
from largest_tensor import LargestTensor
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


def main(tokens, execution, count):
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    attach(model)
    step(model, 512, execution)  # what the first step loads is not the prompt's
    before = peak_bytes()
    if count == "rss":
        step(model, tokens, execution)
        return peak_bytes() - before
    with LargestTensor() as largest:
        step(model, tokens, execution)
    return largest.numel


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), *sys.argv[2:])))
