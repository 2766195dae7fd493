"""Gradients of trained matrices, added where they lie: for training that touches whole weights (method: full).

    plain     dW = dy^T x into new memory, then W.grad += dW         one more matrix written, faulted in, read
    here      W.grad = beta W.grad + dy^T x, beta 0 for the first     nothing besides W.grad, and W.grad stays

Fresh memory is dear: on a CPU the zeros for one microbatch's gradient of an embedding of 65 MB took 70 ms to fault in.
So while a strategy holds the room open, linears and embeddings with trained weights run under
functions that write their weight's gradient themselves, and on a CPU the gradients of one step are the room of the
next. The log-probabilities write the head's (models/logprobs.py). What reaches such a weight by another way still
counts: a hook clears what is left of the last step before autograd adds to it. Sums differ from autograd's in the
order of rounding only. Not for strategies that hang their work on autograd's accumulation (optimizer in backward).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from luthier.contracts.method import trains

ROOM = "luthier_gradient_room"


class GradientRoom:
    """Of one model, for what trains when it is made. `open` around forward and backward, `clear` after each step."""

    def __init__(self, model: nn.Module) -> None:
        self._open = False
        self._modules: list[Any] = [module for module in model.modules() if _suits(module)]
        self._weights: list[nn.Parameter] = list({id(m.weight): m.weight for m in self._modules}.values())
        self._old: set[int] = set()  # weights whose gradient is of an earlier step
        self._standing: dict[int, Tensor] = {}
        self._hooks = [_hook(weight, self._guard(weight)) for weight in self._weights]
        for module in self._modules:
            module.__dict__[ROOM] = self
            module.__dict__["forward"] = MethodType(_FORWARDS[type(module)], module)

    @property
    def weights(self) -> list[nn.Parameter]:
        return self._weights

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within it gradients are written here. After it, a weight that got none in this step has none."""
        self._open = True
        try:
            yield
        finally:
            self._open = False
        for weight in self._weights:
            if id(weight) in self._old:
                weight.grad = None
        self._old.clear()

    def clear(self) -> None:
        """What is there is of the past; on a CPU its memory stays for the next step."""
        for weight in self._weights:
            if weight.grad is not None and weight.device.type == "cpu":
                self._old.add(id(weight))
            else:
                weight.grad = None

    def undo(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            module.__dict__.pop(ROOM, None)
            module.__dict__.pop("forward", None)
        for weight in self._weights:
            if id(weight) in self._old:
                weight.grad = None
        self._modules, self._weights, self._hooks = [], [], []
        self._old.clear()
        self._standing.clear()

    def takes(self, weight: Tensor, *made_of: Tensor) -> bool:
        """Whether a product of these is this weight's gradient as it is, without casts."""
        whole = not made_of or _gradient_dtype(weight) == weight.dtype
        alike = whole and all(x.dtype == weight.dtype for x in made_of)
        return self._open and weight.requires_grad and weight.is_leaf and alike

    def begin(self, weight: Tensor) -> tuple[Tensor, bool]:
        """(its gradient, whether what lies there is of this step and is to be added to)."""
        if weight.grad is None:
            weight.grad = torch.empty_like(weight, dtype=_gradient_dtype(weight))
            return weight.grad, False
        begun = id(weight) not in self._old
        self._old.discard(id(weight))
        return weight.grad, begun

    def add_product(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """weight.grad += left @ right."""
        grad, begun = self.begin(weight)
        grad.addmm_(left, right) if begun else torch.mm(left, right, out=grad)

    def add_rows(self, weight: Tensor, ids: Tensor, rows: Tensor) -> None:
        """weight.grad[ids] += rows."""
        grad, begun = self.begin(weight)
        (grad if begun else grad.zero_()).index_add_(0, ids, rows.to(grad.dtype))

    def before_scale(self, weight: Tensor) -> Tensor:
        """Where to write a gradient whose factor is known later (`scale`): memory that is kept from call to call, or
        new memory while another call's gradient still waits in it."""
        kept = self._standing.pop(id(weight), None)
        return torch.empty_like(weight) if kept is None else kept

    def scale(self, weight: Tensor, made: Tensor, factor: Tensor) -> None:
        """weight.grad += factor * made; `made` is free again."""
        grad, begun = self.begin(weight)
        grad.addcmul_(made, factor) if begun else torch.mul(made, factor, out=grad)
        self._standing[id(weight)] = made

    def _guard(self, weight: nn.Parameter) -> Any:
        def before_autograd_adds(grad: Tensor | None) -> None:
            if grad is not None and id(weight) in self._old and weight.grad is not None:
                self._old.discard(id(weight))
                weight.grad.zero_()

        return before_autograd_adds


def _gradient_dtype(weight: Tensor) -> torch.dtype:
    """float32 for weights in bfloat16 that train (engine/precision.py)."""
    return getattr(weight, "grad_dtype", None) or weight.dtype


def _hook(weight: nn.Parameter, guard: Any) -> Any:
    """A hook on a parameter, one that rests at the moment included."""
    rests = not weight.requires_grad
    weight.requires_grad_(True)
    hook = weight.register_hook(guard)
    if rests:
        weight.requires_grad_(False)
    return hook


def room_of(module: nn.Module) -> GradientRoom | None:
    """The open room that this module's weight belongs to."""
    room: GradientRoom | None = module.__dict__.get(ROOM)
    return room if room is not None and room._open else None


def _suits(module: nn.Module) -> bool:
    """Plain and with a forward of its own class; a family's subclass may do something else."""
    if type(module) not in _FORWARDS or "forward" in module.__dict__:
        return False
    if type(module) is nn.Embedding and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
        return False
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and trains(weight)


def _linear_forward(self: Any, x: Tensor) -> Tensor:
    room = room_of(self)
    if room is None or not torch.is_grad_enabled() or not room.takes(self.weight, x) or _autocast(x):
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    made: Tensor = _Linear.apply(x, self.weight, self.bias, room, type(self) is Conv1D)
    return made


def _embedding_forward(self: Any, ids: Tensor) -> Tensor:
    room = room_of(self)
    if room is None or not torch.is_grad_enabled() or not room.takes(self.weight):
        return type(self).forward(self, ids)  # type: ignore[no-any-return]
    made: Tensor = _Embedding.apply(ids, self.weight, self.padding_idx, room)
    return made


_FORWARDS: dict[type, Any] = {nn.Linear: _linear_forward, Conv1D: _linear_forward, nn.Embedding: _embedding_forward}


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


class _Linear(torch.autograd.Function):
    """x W^T + b, or x W + b of a Conv1D (`turned`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, room: GradientRoom, turned: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.owner = weight  # where activations are recomputed, what was saved comes back as another tensor object
        ctx.room, ctx.turned, ctx.biased = room, turned, bias is not None
        return functional.linear(x, weight.t() if turned else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = db = None
        dy_TO, x_TD = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = (dy_TO @ (weight.t() if ctx.turned else weight)).view(x.shape)
        if ctx.needs_input_grad[1]:
            left, right = (x_TD, dy_TO) if ctx.turned else (dy_TO, x_TD)
            ctx.room.add_product(ctx.owner, left.t(), right)
        if ctx.biased and ctx.needs_input_grad[2]:
            db = dy_TO.sum(0)
        return dx, None, db, None, None


class _Embedding(torch.autograd.Function):
    """Rows of W; the row of `padding` gets no gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, room: GradientRoom) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.owner, ctx.room, ctx.padding = weight, room, padding
        return functional.embedding(ids, weight, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        ids_T, dy_TD = ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
        if ctx.padding is not None:
            dy_TD = dy_TD.masked_fill((ids_T == ctx.padding)[:, None], 0)
        ctx.room.add_rows(ctx.owner, ids_T, dy_TD)
        return None, None, None, None
