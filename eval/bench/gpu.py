"""Measures attention, training and cached answers on a GPU, with the layers of Llama 3.1 8B.

The weights are random. `eval/bench/gpu.sh` runs it after the GPU tests; `--tiny` runs on a CPU.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from measure import measure_attention, measure_cached_answer, measure_machine, measure_training
from shape import LLAMA_8B, TINY

from blocktune.provenance import provenance

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu"


def main() -> None:
    args = parse()
    shape = args.shape
    machine = measure_machine(shape)
    matmul = machine["matmul_flops_per_s"]
    report = {
        "machine": machine,
        "attention": measure_attention(shape, matmul),
        "training": measure_training(shape, matmul),
        "cached_answer": measure_cached_answer(shape),
        "shape": asdict(shape),
        "provenance": provenance(0, ["bash", "eval/bench/gpu.sh", *sys.argv[1:]]),
    }
    text = json.dumps(report, indent=2)
    output = args.output or RESULTS / f"{'tiny' if args.tiny else 'llama-8b'}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\n")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--layers", type=int, help="depth of the model")
    parser.add_argument("--tokens", type=int, help="context tokens, a multiple of the chunk")
    parser.add_argument("--output", type=Path, help="JSON file; default: under eval/results/gpu/")
    args = parser.parse_args()
    changes = {"layers": args.layers, "tokens": args.tokens}
    try:
        base = TINY if args.tiny else LLAMA_8B
        args.shape = replace(base, **{k: v for k, v in changes.items() if v is not None})
    except ValueError as error:
        parser.error(str(error))
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny runs the same code on a CPU")
    return args


if __name__ == "__main__":
    main()
