"""What every file of engine/optimizers is: the rule of an update for a few numbers, and where it may be used.

    float32 weights     a piece of them is changed where it lies
    bfloat16 weights    a piece is widened, changed exactly and rounded back by chance (engine/stochastic_rounding.py)
    averages            a piece is widened to float32, changed, and goes back as it is kept (engine/averages.py)

`update` is the rule, on pieces of float32; the walk over groups, tensors and pieces is here, so the workspace is a few
pieces and never a matrix. A step of one tensor reads nothing of another's, so a step inside backward is the same step.
State is a dictionary of tensors for each parameter, made in `room`, which may be overridden to make it elsewhere.
A group's settings: lr, betas, eps, weight_decay, names, `seed` of the rounding, `table` (an embedding or a head: 32
bits), `projection` (engine/projected.py), `fused`. Left out: sparse gradients, closures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.engine.averages import SMALL, Slot, narrowed, slots_of, widened
from luthier.engine.stochastic_rounding import round_, stream

PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}  # numbers at once: a cache here, few kernels there; whole blocks of 256
Group = dict[str, Any]


class Stepping(torch.optim.Optimizer):
    """An optimizer of this house. A subclass says which averages it keeps and how a piece moves."""

    averages: ClassVar[Mapping[str, bool]] = {}  # name -> whether it has a sign
    eight_bits: ClassVar[bool] = False
    projects: ClassVar[bool] = False  # whether it steps groups with a projection

    def __init__(self, groups: Sequence[Group], *, lr: float, **settings: Any) -> None:
        defaults = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "fused": False, "seed": 0,
                    "table": False, "projection": None, "lr_scale": 1.0}  # fmt: skip
        super().__init__(groups, {**defaults, "lr": lr, **settings})

    # ---------------------------------------------------------------- what a subclass says

    @classmethod
    def check(cls, device: torch.device) -> None:
        """ResourceError where it cannot run on this device."""

    @classmethod
    def advice(cls, train: Any, device: torch.device) -> list[str]:
        """What a person should know before the first step; `train` is the recipe's section."""
        return []

    @classmethod
    def betas(cls, given: tuple[float, float]) -> tuple[float, float]:
        """From `train.adam_betas`."""
        return given

    def update(self, weight: Tensor, grad: Tensor, averages: dict[str, Tensor], group: Group, step: int) -> None:
        """Change a piece of a weight and of its averages in place, all float32; `step` counts from 1."""
        raise NotImplementedError

    def keeps(self, group: Group, parameter: Tensor) -> dict[str, Slot]:
        """Name -> shape and type of what is kept of a parameter, without `step`."""
        eight_bits = self.in_eight_bits(group, parameter.numel())
        return slots_of(self.averages, tuple(parameter.shape), eight_bits=eight_bits)

    def room(self, parameter: Tensor, slot: Slot) -> Tensor:
        """Zeros where the state of this parameter lies."""
        return torch.zeros(slot.shape, dtype=slot.dtype, device=parameter.device)

    # ---------------------------------------------------------------- the walk

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            self.step_group(group, [parameter for parameter in group["params"] if parameter.grad is not None])

    def step_group(self, group: Group, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            self.step_one(group, parameter)

    def step_one(self, group: Group, parameter: Tensor) -> None:
        """One step of one parameter, piece by piece."""
        state = self.opened(group, parameter)
        step, chance = self.counted(group, parameter, state)
        flat = parameter.detach().reshape(-1)  # a copy where the weights do not lie in one row
        assert parameter.grad is not None
        self.in_pieces(flat, parameter.grad.reshape(-1), state, group, (step, chance))
        if flat.data_ptr() != parameter.data_ptr():
            parameter.copy_(flat.view(parameter.shape))

    def in_pieces(
        self, flat: Tensor, grad: Tensor, state: dict[str, Any], group: Group, at: tuple[int, torch.Generator | None]
    ) -> None:
        """`at`: the number of the step, and the stream of chance where `flat` is bfloat16."""
        step, chance = at
        for piece in _pieces(flat):
            weight = flat[piece] if chance is None else flat[piece].float()
            averages = {name: widened(state, name, piece, signed=signed) for name, signed in self.averages.items()}
            self.update(weight, grad[piece].to(weight.dtype), averages, group, step)
            for name, signed in self.averages.items():
                narrowed(state, name, piece, averages[name], signed=signed)
            if chance is not None:
                round_(flat[piece], weight, chance)

    def rounded(self, parameter: Tensor, exact: Tensor, chance: torch.Generator) -> None:
        """A whole bfloat16 parameter becomes `exact`, piece by piece."""
        flat, numbers = parameter.detach().reshape(-1), exact.detach().reshape(-1)
        for piece in _pieces(flat):
            round_(flat[piece], numbers[piece], chance)
        if flat.data_ptr() != parameter.data_ptr():
            parameter.copy_(flat.view(parameter.shape))

    # ---------------------------------------------------------------- state

    def opened(self, group: Group, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter, made where there is none yet."""
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            state["step"] = self.counter(group, parameter)
            state.update({name: self.room(parameter, slot) for name, slot in self.keeps(group, parameter).items()})
        return state

    def counter(self, group: Group, parameter: Tensor) -> Tensor:
        """Steps done: beside the parameter where a fused kernel counts, else here, where reading it waits for none."""
        where = parameter.device if group["fused"] and self.is_torchs(group, parameter) else "cpu"
        return torch.zeros((), dtype=torch.float32, device=where)

    def counted(self, group: Group, parameter: Tensor, state: dict[str, Any]) -> tuple[int, torch.Generator | None]:
        """One more: its number, and the stream that rounds in it where the parameter is bfloat16."""
        state["step"] += 1
        step = int(state["step"])
        if parameter.dtype != torch.bfloat16:
            return step, None
        return step, stream(parameter.device, group["seed"], step, name_of(group, parameter))

    def in_eight_bits(self, group: Group, elements: int) -> bool:
        return self.eight_bits and not group["table"] and elements >= SMALL

    def is_torchs(self, group: Group, parameter: Tensor) -> bool:
        """Whether torch's own kernels step this parameter."""
        return False


def name_of(group: Group, parameter: Tensor) -> str:
    """The parameter's name in the model; its place in the group where groups were made without names."""
    place = next(index for index, one in enumerate(group["params"]) if one is parameter)
    return str(group["names"][place]) if "names" in group else f"#{place}"


def _pieces(flat: Tensor) -> Iterator[slice]:
    size = PIECE.get(flat.device.type, PIECE["cuda"])
    for start in range(0, flat.numel(), size):
        yield slice(start, min(start + size, flat.numel()))
