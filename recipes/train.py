"""Trains an adapter: `accelerate launch recipes/train.py --config recipes/block_attention.yaml`."""

import os
import sys

from blocktune.hub import Publisher
from blocktune.training.run import leave, train

if __name__ == "__main__":
    try:
        train(sys.argv[1:], publisher=Publisher())
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    leave()
