"""CUDA's managed memory for an optimizer's state: pages move to the host when the device is full, and back.

bitsandbytes asks the driver for it (`get_paged`) and hands it out as a tensor of the host; here it becomes a tensor of
the device over the same memory, so the update is the one of every other optimizer and its numbers are the same. What
was asked for stays until the process ends, as in bitsandbytes. Small tensors lie in the device's own memory: paging
goes by pages of 2 MiB. On a CPU there is nothing to page. Left out: prefetching before a step.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from luthier.contracts.errors import ResourceError
from luthier.engine.averages import Slot

SMALLEST = 100_000  # elements from which a tensor is paged, bitsandbytes' number
_TYPES = {torch.float32: "<f4", torch.uint8: "|u1"}


class Managed:
    """Mixed into an optimizer: its state is made in managed memory on a CUDA device."""

    @classmethod
    def check(cls, device: torch.device) -> None:
        if device.type == "cuda" and find_spec("bitsandbytes") is None:
            raise ResourceError(
                "paged optimizers take CUDA's managed memory by way of bitsandbytes, which is not installed",
                where="train.optimizer", remedy="pip install bitsandbytes, or take the name without `paged_`",
            )  # fmt: skip

    @classmethod
    def advice(cls, train: Any, device: torch.device) -> list[str]:
        if device.type == "cuda":
            return []
        plain = train.optimizer.removeprefix("paged_")
        return [f"there is nothing to page on a CPU: train.optimizer {train.optimizer} is {plain} here"]

    def room(self, parameter: Tensor, slot: Slot) -> Tensor:
        if parameter.device.type != "cuda" or torch.Size(slot.shape).numel() < SMALLEST:
            return torch.zeros(slot.shape, dtype=slot.dtype, device=parameter.device)
        return managed(slot, parameter.device)


class _Pages:
    """Memory as torch takes it over from other libraries."""

    def __init__(self, host: Tensor) -> None:
        self.host = host  # kept: the memory is its
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape), "typestr": _TYPES[host.dtype], "data": (host.data_ptr(), False), "version": 3,
        }  # fmt: skip


def managed(slot: Slot, device: torch.device) -> Tensor:
    """Zeros in managed memory, as a tensor of the device."""
    from bitsandbytes.functional import get_paged  # asked for by name only

    with torch.cuda.device(device):
        host = get_paged(*slot.shape, dtype=slot.dtype, device=device)
        made = torch.as_tensor(_Pages(host), device=device)
    if made.data_ptr() != host.data_ptr():
        raise ResourceError("torch copies CUDA's managed memory here", where="train.optimizer", value=str(device),
                            remedy="take the name without `paged_`")  # fmt: skip
    return made.zero_()
