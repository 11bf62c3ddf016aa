"""Counts the bytes of all tensors that live at once while a piece of code runs."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Records the greatest sum over the storages that operations made and nobody has freed yet.

    What autograd saves lives as long as its graph, so it counts; so do the gradients.
    """

    peak = 0

    def __init__(self):
        super().__init__()
        self._live = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._book(leaf.untyped_storage())
        return result

    def _book(self, storage):
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            weakref.finalize(storage, self._live.pop, key, None)
            self.peak = max(self.peak, sum(self._live.values()))
