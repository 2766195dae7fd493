"""One process, one device. The smallest strategy, and the meaning that the others must reproduce.

Each microbatch's total is divided by the weight of the whole step before its backward, so gradients are those
of one large batch whatever the split. Totals stay on the device until the last microbatch is done: one
synchronisation per step. Gradients of whole trained matrices are added where they lie (models/gradient_room.py).
Losses and penalties are multiplied by `loss_scale` (fp16, engine/scaler.py; else 1), gradients divided by it in `clip`,
before their norm is taken. Left out: anything with a second rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.contracts.strategy import LossOf
from luthier.engine.precision import Precision, settle
from luthier.engine.sums import Sums
from luthier.models.gradient_room import GradientRoom
from luthier.models.loss_scale import loss_scaled


class Single:
    """`place` the model, `bind` the optimizer made from what then trains, and step; `release` the model at the end."""

    adds_in_place: ClassVar[bool] = True  # gradients of trained matrices are written where they lie

    def __init__(self, device: torch.device, precision: Precision) -> None:
        self.device, self.precision, self.loss_scale = device, precision, 1.0
        self.optimizer: torch.optim.Optimizer | None = None
        self._model: nn.Module | None = None
        self._room: GradientRoom | None = None

    @property
    def half_done(self) -> str:
        """Nothing: the optimizer comes after the guard."""
        return ""

    def release(self) -> None:
        if self._room is not None:
            self._room.undo()
            self._room = None

    def place(self, model: nn.Module) -> nn.Module:
        self._model = settle(model.to(self.device), self.precision)
        return self._model

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        if self.adds_in_place and self._model is not None:
            self.release()
            self._room = GradientRoom(self._model)

    def all_reduce(self, value: float) -> float:
        return value

    def forward_backward(
        self, microbatches: Sequence[Batch], loss: LossOf, divisor: float
    ) -> tuple[float, dict[str, tuple[float, float]]]:
        sums = Sums()
        with nullcontext() if self._room is None else self._room.open():
            for batch in microbatches:
                with loss_scaled(self.loss_scale), self.precision.autocast(self.device):
                    found = loss(batch.to(self.device))
                scaled = found.total / divisor * self.loss_scale
                if scaled.requires_grad:
                    scaled.backward()
                sums.add(found)
        return sums.total() / divisor, sums.metrics()

    def backward(self, penalty: Tensor | float) -> float:
        if isinstance(penalty, Tensor):
            if penalty.requires_grad:
                (penalty * self.loss_scale).backward()
            return float(penalty.detach())
        return float(penalty)

    def clip(self, max_norm: float) -> float:
        """Off with the loss scale; the norm before clipping; a `max_norm` of 0 only measures."""
        moved = [p for group in self._groups() for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in moved]
        if self.loss_scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, 1.0 / self.loss_scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        if max_norm and torch.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(moved, max_norm, norm)
        return float(norm)

    def step(self) -> None:
        if self.optimizer is None:
            raise RuntimeError("bind an optimizer before the first step")
        self.optimizer.step()

    def zero(self) -> None:
        kept = set() if self._room is None else {id(weight) for weight in self._room.weights}
        for group in self._groups():
            for parameter in group["params"]:
                if id(parameter) not in kept:
                    parameter.grad = None
        if self._room is not None:
            self._room.clear()

    def state(self) -> dict[str, Any]:
        return {"strategy": "single", "world": 1, "device": self.device.type, "precision": self.precision.name}

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups
