"""Trains as the recipe does and leaves the trained model's logits beside the adapter."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from blocktune.training.run import build, parse

FILE = "trained_logits.safetensors"


def probe(vocab_size: int, num_links: int) -> torch.Tensor:
    """Token ids with every link among them, ``(1, S)``."""
    links = range(vocab_size, vocab_size + num_links)
    return torch.tensor([[*range(10, 30), *links, *range(30, 50)]])


if __name__ == "__main__":
    data, args, choice = parse(sys.argv[1:])
    trainer = build(data, args, choice)
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        ids = probe(model.config.vocab_size, args.num_links)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        save_file({"logits": logits.contiguous()}, Path(args.output_dir) / FILE)
    trainer.accelerator.wait_for_everyone()
