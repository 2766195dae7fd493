"""One device, each parameter updated the moment its gradient is whole, the gradient freed at once.

    peak of gradients   one or two parameters' instead of all, where a step is one microbatch; with several, the
                        gradients are summed as usual until the last one, whose backward updates

The update is AdamW's, parameter by parameter, from the same state, so checkpoints are those of `Single`. What is given
up for the memory: no clipping by a norm over all parameters (it is known when the first ones are updated already), no
gradients for a method's penalty or `after_step`. The loss of the whole step is looked at before anything changes. A
gradient that is not finite ends the updates of its step: parameters nearer to the loss, whose gradients were finite,
have moved by then, and the skip says so. fp16 is refused for that reason: its loss scale is found by gradients that are
not finite, again and again, and such a step must not have moved anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.contracts.errors import RecipeError, ResourceError
from luthier.contracts.method import Method
from luthier.contracts.regularizer import Regularizer, adds_penalty
from luthier.contracts.strategy import LossOf
from luthier.engine.memory import is_out_of_memory
from luthier.engine.optimizer import of_one
from luthier.engine.precision import Precision
from luthier.engine.strategy.single import Single
from luthier.engine.sums import Sums

_FIELD = "train.optimizer_in_backward"


def check_in_backward(
    method: Method, max_grad_norm: float, regularizers: Sequence[Regularizer] = (), precision: Precision | None = None
) -> None:
    """RecipeError for what needs all gradients at once."""
    if precision is not None and precision.scales_loss:
        raise RecipeError(
            "fp16 looks at all gradients before the first update, and this way updates one by one", where=_FIELD,
            value=f"true, engine.precision {precision.name}", remedy="set it to false, or engine.precision to bf16",
        )  # fmt: skip
    if max_grad_norm:
        raise RecipeError(
            "clipping needs the norm of all gradients before the first update, and this way frees them one by one",
            where="train.max_grad_norm", value=max_grad_norm, remedy=f"set it to 0, or {_FIELD} to false",
        )  # fmt: skip
    if type(method).after_step is not Method.after_step:
        raise RecipeError(
            "this method reads gradients after the step, when they are gone", where=_FIELD, value=True,
            remedy="set it to false",
        )  # fmt: skip
    if late := [type(one).__name__ for one in regularizers if adds_penalty(one)]:
        raise RecipeError(
            "a regularizer adds a penalty, whose gradient would come too late", where=_FIELD, value=", ".join(late),
            remedy="set it to false, or take the regularizer out",
        )  # fmt: skip


class InBackward(Single):
    """`Single`, with the optimizer's step inside the last backward."""

    adds_in_place: ClassVar[bool] = False  # the hooks hang on autograd's own accumulation

    def __init__(self, device: torch.device, precision: Precision) -> None:
        super().__init__(device, precision)
        self._open = False  # whether gradients that become whole are final
        self._updated = False
        self._hooks: list[Any] = []
        self._squares = torch.zeros((), dtype=torch.float32, device=device)

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """One small optimizer for each parameter, all with the state of the one that checkpoints know."""
        super().bind(optimizer)
        for group in self._groups():
            for parameter in group["params"]:
                hook = partial(self._update, group, of_one(optimizer, group, parameter))
                rests = not parameter.requires_grad  # until its turn in a method's schedule comes
                parameter.requires_grad_(True)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
                parameter.requires_grad_(not rests)

    def release(self) -> None:
        super().release()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def forward_backward(
        self, microbatches: Sequence[Batch], loss: LossOf, divisor: float
    ) -> tuple[float, dict[str, tuple[float, float]]]:
        self._updated = False
        self._squares.zero_()
        sums = Sums()
        for number, batch in enumerate(microbatches, 1):
            with self.precision.autocast(self.device):
                found = loss(batch.to(self.device))
            sums.add(found)
            self._open = number == len(microbatches)
            if self._open and not math.isfinite(sums.total()):
                break
            self._backward(found.total / divisor)
        self._open = False
        return sums.total() / divisor, sums.metrics()

    def backward(self, penalty: Tensor | float) -> float:
        if isinstance(penalty, Tensor) and penalty.requires_grad:
            raise RecipeError("the method adds a penalty, whose gradient would come too late", where=_FIELD, value=True,
                              remedy="set it to false")  # fmt: skip
        return super().backward(penalty)

    def clip(self, max_norm: float) -> float:
        """The norm of what was freed; it cannot be clipped any more."""
        return math.sqrt(float(self._squares))

    def step(self) -> None:
        """Done already."""

    @property
    def half_done(self) -> str:
        return "; tensors nearer to the loss were updated before it showed" if self._updated else ""

    def _backward(self, total: Tensor) -> None:
        if not total.requires_grad:
            return
        try:
            total.backward()
        except Exception as error:
            self._open = False
            if self._updated and is_out_of_memory(error):
                raise ResourceError(
                    "out of memory in the middle of an update, which cannot be done again",
                    where=_FIELD, value=True, remedy="lower train.microbatch_tokens and go on with --resume auto",
                ) from error  # fmt: skip
            raise

    def _update(self, group: dict[str, Any], one: Any, parameter: nn.Parameter) -> None:
        if not self._open or parameter.grad is None:
            return
        self._squares += parameter.grad.float().square().sum()
        if one.param_groups[0]["fused"] and parameter.is_cuda:  # the kernel looks: no wait for the device
            one.found_inf = (~torch.isfinite(self._squares)).float()
        elif not bool(torch.isfinite(self._squares)):
            parameter.grad = None
            return
        one.param_groups[0]["lr"] = group["lr"]
        one.step()
        parameter.grad = None
        self._updated = True
