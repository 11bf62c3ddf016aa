"""Trains the included model: `python -m examples.tiny_model.pretrain --output data/tiny`."""

import argparse
from pathlib import Path

from examples.tiny_model.config import PretrainConfig
from examples.tiny_model.loop import go_on, pretrain
from examples.tiny_model.report import write_report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0, help="of weights, worlds and tokenizer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="CPU or one GPU")
    parser.add_argument("--readers", type=int, default=0, help="processes that prepare batches")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps of a stage")
    parser.add_argument("--eval-examples", type=int, default=500, help="test questions per kind")
    parser.add_argument(
        "--go-on", action="store_true", help="continue from a segment's end, or measure again"
    )
    args = parser.parse_args()
    workers = 1 if args.device == "cuda" else PretrainConfig.workers
    config = PretrainConfig(
        seed=args.seed, device=args.device, readers=args.readers, workers=workers
    )
    config = config.scaled(args.scale)
    (go_on if args.go_on else pretrain)(config, args.output)
    write_report(args.output, args.eval_examples, args.device)
