"""Bytes that torch's operations hold, followed from op to op: exact where a resident set is coarse.

A dispatch mode sees every operation of forward and backward (a CPU runs both in the calling thread), counts each
storage once from its making until it is freed, and keeps the peak. What exists before it is entered is not counted,
nor are buffers that a kernel takes and gives back within one operation.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """`with Allocated() as seen: step()`, then `seen.peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        found = func(*args, **kwargs)
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and _key(tensor) not in before:
                self._take(tensor.untyped_storage())
        return found

    def _take(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size
        weakref.finalize(storage, self._give, key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _give(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def held_bytes(model: Any, seen: Allocated) -> dict[str, int]:
    """What frozen weights and buffers take, and the most that was held beside them, the trained weights among it."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    size = {True: 0, False: 0}
    for tensor in tensors:
        size[tensor.requires_grad] += tensor.numel() * tensor.element_size()
    return {"weights": size[False], "above": size[True] + seen.peak}


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
