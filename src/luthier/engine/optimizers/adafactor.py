"""Adafactor (arXiv:1804.04235) by torch: the second average of a matrix as one row and one column of it.

    R = b2 R + (1-b2) mean_columns(g^2);  C = b2 C + (1-b2) mean_rows(g^2);  b2 = 1 - t^-0.8
    u = g / sqrt(R C / mean(R));  p <- p (1 - lr wd) - lr max(1, rms(p)) u / max(1, rms(u))

4 (rows + columns) bytes of state in place of 8 rows columns. torch's rate is relative, max(eps2, rms(p)) lr. Here eps2
is 1, which makes it absolute for all but the tensors whose weights are larger than 1 on average, so
`train.learning_rate` means what it means for AdamW, and what transformers' trainer makes of `optim: adafactor`. eps1 is
1e-15, the root of the paper's 1e-30: torch's default would take the small gradients of a language model for rounding.
torch's cap of the rate at 1 / sqrt(t) is beyond every rate that fine-tuning uses. `train.adam_betas` mean nothing here.
bfloat16 weights: one matrix at a time in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.engine.averages import Slot
from luthier.engine.stepping import Group, Stepping

EPS = (1e-15, 1.0)


class Adafactor(Stepping):
    def keeps(self, group: Group, parameter: Tensor) -> dict[str, Slot]:
        shape = tuple(parameter.shape)
        if len(shape) < 2:
            return {"variance": Slot(shape, torch.float32)}
        row, column = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
        return {"row_var": Slot(row, torch.float32), "col_var": Slot(column, torch.float32)}

    def step_one(self, group: Group, parameter: Tensor) -> None:
        state = self.opened(group, parameter)
        before = state["step"].clone()
        _, chance = self.counted(group, parameter, state)
        state["step"].copy_(before)  # torch counts
        assert parameter.grad is not None
        exact = nn.Parameter(parameter.detach().float())  # float32 stays the very same memory
        exact.grad = parameter.grad.float()
        one = torch.optim.Adafactor([exact], lr=group["lr"], eps=EPS, weight_decay=group["weight_decay"])
        one.state[exact] = state
        one.step()
        if chance is not None:
            self.rounded(parameter, exact, chance)
        elif exact.dtype != parameter.dtype:
            parameter.copy_(exact)
