"""What the backward pass needs, and what the optimizer keeps, in the host's memory instead of the device's.

    activations   each tensor that autograd saves goes to the host as it is saved and comes back for the backward;
                  where it is asked for, the ones saved before it are fetched ahead, because they are asked for next
    states        one parameter's averages at a time come to the device, are stepped there, and go back

What stays on the device: parameters and buffers (also seen through a view), what is smaller than 1 MB, what is no
float. A tensor that several operations saved is kept on the host once. Copies are asynchronous, from and to pinned
memory. Numbers do not change, nor does the place of any product; the update stays on the device because its numbers
are then those of a run without this, and a host's cores are slower at it than the copies are: 16 bytes a weight for
AdamW, over PCIe. On a CPU both are refused: the host's memory is the device's there. Left out: offload of the
weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from luthier.contracts.errors import RecipeError
from luthier.engine.optimizer import of_one

SMALL = 1 << 20  # bytes below which a tensor stays
AHEAD = 16  # saved tensors that are fetched before they are asked for: about those of one block


def check_offload(device: torch.device, engine: Any, *, in_backward: bool) -> None:
    """RecipeError where there is no other memory, or no moment to fetch it."""
    for name in ("offload_activations", "offload_optimizer"):
        if getattr(engine, name) and device.type == "cpu":
            raise RecipeError("the host's memory is the device's here", where=f"engine.{name}", value=True,
                              remedy="set it to false, and engine.checkpoint_activations to true")  # fmt: skip
    if engine.offload_optimizer and in_backward:
        raise RecipeError("the update inside backward has its state on the device", where="engine.offload_optimizer",
                          value=True, remedy="set it or train.optimizer_in_backward to false")  # fmt: skip


class Host:
    """The host's memory: pinned, copied to and from on a stream of its own. A test puts another in its place."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._events: dict[int, Any] = {}  # id of what is on its way -> when it is there

    def take(self, tensor: Tensor) -> Tensor:
        """A copy on the host; the tensor may be let go at once."""
        kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        if not tensor.is_cuda:
            return kept.copy_(tensor)
        side = self._stream(tensor.device)
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(side):
            kept.copy_(tensor, non_blocking=True)
        tensor.record_stream(side)
        return kept

    def give(self, kept: Tensor, device: torch.device) -> Tensor:
        """On its way back; `arrived` before it is read."""
        if device.type != "cuda":
            return kept.to(device)
        with torch.cuda.stream(self._stream(device)):
            found = kept.to(device, non_blocking=True)
            self._events[id(found)] = torch.cuda.current_stream(device).record_event()
        return found

    def arrived(self, tensor: Tensor) -> Tensor:
        """The tensor, once what computes next may read it."""
        if (event := self._events.pop(id(tensor), None)) is not None:
            here = torch.cuda.current_stream(tensor.device)
            here.wait_event(event)
            tensor.record_stream(here)
        return tensor

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


@dataclass(eq=False)
class _Stored:
    """One saved tensor on the host, on its way back once it was fetched. `users`: operations that still ask for it."""

    kept: Any
    device: torch.device
    source: weakref.ref[Any]  # the memory that it was copied from
    users: int = 1
    fetched: Tensor | None = None


class OffloadedActivations:
    """`with offloaded.open(): forward, backward`."""

    def __init__(self, model: nn.Module, host: Host | None = None, *, small: int = SMALL, ahead: int = AHEAD) -> None:
        self._model, self._host, self._small, self._ahead = model, host or Host(), small, ahead
        self._stays: set[int] = set()
        self._order: list[weakref.ref[_Stored]] = []
        self._places: dict[int, int] = {}
        self._known: dict[tuple[Any, ...], weakref.ref[_Stored]] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        self._stays = {_storage(tensor) for tensor in (*self._model.parameters(), *self._model.buffers())}
        with saved_tensors_hooks(self._pack, self._unpack):
            try:
                yield
            finally:
                self._forget()

    def _forget(self) -> None:
        self._order.clear()
        self._places.clear()
        self._known.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Stored:
        if not self._moves(tensor):
            return tensor
        key = (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype)
        before = self._known.get(key)
        if before is not None and (found := before()) is not None and found.source() is not None:
            found.users += 1
            return found
        stored = _Stored(self._host.take(tensor.detach()), tensor.device, weakref.ref(tensor.untyped_storage()))
        self._known[key] = weakref.ref(stored)
        self._places[id(stored)] = len(self._order)
        self._order.append(weakref.ref(stored))
        return stored

    def _unpack(self, packed: Tensor | _Stored) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        found = self._host.arrived(self._fetched(packed))
        packed.users -= 1
        packed.fetched = found if packed.users > 0 else None
        place = self._places.get(id(packed), 0)
        for reference in self._order[max(0, place - self._ahead) : place]:
            if (one := reference()) is not None and one.users > 0:
                one.fetched = self._fetched(one)
        return found

    def _fetched(self, stored: _Stored) -> Tensor:
        return self._host.give(stored.kept, stored.device) if stored.fetched is None else stored.fetched

    def _moves(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or not tensor.is_floating_point() or 0 in tensor.stride():
            return False
        return tensor.numel() * tensor.element_size() >= self._small and _storage(tensor) not in self._stays


class OffloadedStates:
    """An optimizer whose state lies on the host between the steps of single parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, host: Host | None = None) -> None:
        self._optimizer, self._host = optimizer, host or Host()
        self._singles: dict[nn.Parameter, torch.optim.Optimizer] = {}
        self._here: set[Tensor] = set()  # whose state is on the device

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def step(self) -> None:
        """Of each parameter alone: its state comes while the one before is stepped, and goes again."""
        todo = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for (group, parameter), (_, after) in zip(todo, [*todo[1:], (None, None)], strict=True):
            slots = self._come(parameter)
            if after is not None:
                self._come(after)
            for name, value in slots.items():
                slots[name] = self._host.arrived(value) if isinstance(value, Tensor) else value
            one = self._singles.setdefault(parameter, of_one(self._optimizer, group, parameter))
            one.param_groups[0].update({key: value for key, value in group.items() if key not in ("params", "names")})
            one.step()
            self.rest(parameter)

    def rest(self, parameter: Tensor) -> None:
        """Its state to the host; single numbers stay where they are."""
        self._here.discard(parameter)
        slots = self._optimizer.state.get(parameter, {})
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.ndim:
                slots[name] = self._host.take(value)

    def rest_all(self) -> None:
        """After a checkpoint was taken up, which puts everything beside the weights."""
        for parameter in list(self._optimizer.state):
            self.rest(parameter)

    def _come(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Its state on the device, or on its way there; once."""
        slots: dict[str, Any] = self._optimizer.state[parameter]
        if parameter not in self._here:
            self._here.add(parameter)
            for name, value in slots.items():
                if getattr(value, "ndim", 0):
                    slots[name] = self._host.give(value, parameter.device)
        return slots


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
