"""The recipe's runs, one after the other in the processes of one launch: a configuration each.

Each leaves its trained model's logits beside its output, where a process holds the whole model.
"""

import sys
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from blocktune.hub import Publisher
from blocktune.training.run import leave, train

# DeepSpeed would compile it for a minute; only inference uses it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

FILE = "trained_logits.safetensors"


def probe(vocab_size: int, num_links: int) -> torch.Tensor:
    """Token ids with every link among them, ``(1, S)``."""
    links = range(vocab_size, vocab_size + num_links)
    return torch.tensor([[*range(10, 30), *links, *range(30, 50)]])


class LeaveLogits(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **_):
        if state.is_world_process_zero and not is_deepspeed_zero3_enabled():
            ids = probe(model.config.vocab_size, args.num_links)
            with torch.no_grad():
                logits = model.eval()(ids, use_cache=False).logits
            save_file({"logits": logits.contiguous()}, Path(args.output_dir).with_name(FILE))


if __name__ == "__main__":
    for config in sys.argv[1:]:
        train(["--config", config], callbacks=[LeaveLogits()], publisher=Publisher())
    leave()
