"""The recipe under FSDP2 on CPU processes, which accelerate has for GPUs only.

`AcceleratorState` turns FSDP on where the process group is MULTI_GPU or its kin and leaves
MULTI_CPU out, though torch's `fully_shard` works over gloo. So a group of CPU processes says here
that it is one of GPUs; the rest, device and backend, stays what it is.
"""

import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

RECIPE = Path(__file__).resolve().parents[3] / "recipes/train.py"
begin = PartialState.__init__


def begin_as_gpus(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = begin_as_gpus
    sys.argv[0] = str(RECIPE)
    runpy.run_path(str(RECIPE), run_name="__main__")
