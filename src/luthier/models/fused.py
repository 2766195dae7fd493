"""Fused RMSNorm, SwiGLU and rotary positions in the place of a family's own, found by structure, proven in numbers.

A module with one weight vector and an epsilon that computes RMSNorm (w or 1 + w) on random rows, and a module of
gate_proj, up_proj, down_proj that computes down(silu(gate) * up), get a `forward` of their own on the instance. No
module is exchanged: names, sites, saving and copies are unaffected, and what stands under gate_proj later (an
adapter) is what is called. `undo` takes them off again. What does not match, raises, or is called with more than one
argument keeps its own code. Rotary positions have their place in models/rotary_places.py.

Which of them a device gets is said in one place, `KINDS`: on a CPU only what was measured to pay in a whole step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.models.adapted_mlp import KEEPS, adapted_mlp, give_room, room_for
from luthier.models.kernels.rms_norm import rms_norm, rms_norm_plain
from luthier.models.kernels.swiglu import swiglu, swiglu_plain
from luthier.models.kernels.triton_norm import Norm
from luthier.models.rotary_places import Forward, rotary_forward
from luthier.models.shared_input import as_block
from luthier.models.weights import numbers_of

KINDS = {"cpu": ("norm", "swiglu"), "cuda": ("norm", "swiglu", "rotary")}
_EPSILONS = ("variance_epsilon", "eps", "norm_eps", "epsilon")
_MLP = ("gate_proj", "up_proj", "down_proj")
_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_NORM = "luthier_norm"


class Fused:
    """Within its life the model's RMSNorms and SwiGLUs run fused; `modules` counts them."""

    def __init__(self, model: nn.Module, kinds: Sequence[str] | None = None) -> None:
        if kinds is None:
            kinds = KINDS.get(next((p.device.type for p in model.parameters()), "meta"), ())
        self._changed: list[nn.Module] = []
        proven: dict[type[nn.Module], bool] = {}
        rotaries: dict[Forward, Forward | None] = {}
        with torch.no_grad(), torch.random.fork_rng([]):
            torch.manual_seed(0)
            for module in model.modules():
                if "forward" in module.__dict__ or not _known_parameters(module):
                    continue
                if "norm" in kinds and (norm := _as_norm(module)) is not None:
                    setattr(module, _NORM, norm)
                    self._change(module, _norm_forward)
                elif "swiglu" in kinds and _as_mlp(module, proven):
                    self._change(module, _mlp_forward)
                elif "rotary" in kinds and (forward := rotary_forward(module, rotaries)) is not None:
                    self._change(module, forward)

        mlps = [module for module in self._changed if hasattr(module, "gate_proj")]
        give_room(mlps, room_for(numbers_of(model)))

    @property
    def modules(self) -> int:
        return len(self._changed)

    def undo(self) -> None:
        for module in self._changed:
            module.__dict__.pop("forward", None)
            module.__dict__.pop(_NORM, None)
        self.keep_all()
        self._changed.clear()

    def keep_all(self) -> None:
        """From now on feed-forward blocks make nothing again: their room is without end."""
        for module in self._changed:
            module.__dict__.pop(KEEPS, None)

    def _change(self, module: nn.Module, forward: Any) -> None:
        module.__dict__["forward"] = MethodType(forward, module)  # bound, so that a deep copy is bound to the copy
        self._changed.append(module)


def _known_parameters(module: nn.Module) -> bool:
    """Codes of packed weights are no numbers to be near to."""
    known = (p.dtype in _CLOSE or not p.is_floating_point() for p in module.parameters())
    return all(known) and all(p.device.type != "meta" for p in module.parameters())


def _norm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 1 or kwargs:
        return type(self).forward(self, *args, **kwargs)
    return rms_norm(args[0], self.weight, getattr(self, _NORM))


def _mlp_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 1 or kwargs:
        return type(self).forward(self, *args, **kwargs)
    x = args[0]
    if x.device.type == "cpu" and (found := as_block(x, self)) is not None:
        block, compute = found
        return adapted_mlp(x, block, compute, x.shape[:-1].numel() <= getattr(self, KEEPS, math.inf))
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _as_norm(module: nn.Module) -> Norm | None:
    """How this module normalises, or None where it is no RMSNorm."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or len(module._parameters) > 1 or len(module._modules):
        return None
    eps = next((found for name in _EPSILONS if isinstance(found := getattr(module, name, None), float)), None)
    if eps is None:
        return None
    x_MD = torch.randn(4, len(weight), device=weight.device) * torch.tensor([[3.0], [1.0], [1e-2], [eps**0.5]]).to(
        weight.device
    )
    narrow = x_MD.to(torch.bfloat16)
    try:
        found, rounded = module(x_MD), module(narrow)
    except Exception:  # noqa: BLE001 not this kind of module
        return None
    for offset in (0.0, 1.0):
        if not _same(found, rms_norm_plain(x_MD, weight, Norm(eps, offset, True)).to(found.dtype), weight.dtype):
            continue
        for cast_first in (True, False):
            norm = Norm(eps, offset, cast_first)
            made = rms_norm_plain(narrow, weight, norm)
            if made.dtype == rounded.dtype and torch.equal(made, rounded):
                return norm
    return None


def _as_mlp(module: nn.Module, proven: dict[type[nn.Module], bool]) -> bool:
    """Whether down(silu(gate) * up) is what it computes: the activation of each, the rest once for a class."""
    children = dict(module.named_children())
    others = [child for name, child in children.items() if name not in _MLP]
    if not set(_MLP) <= set(children) or module._parameters or len(others) != 1 or list(others[0].children()):
        return False
    act, gate = others[0], children["gate_proj"]
    if list(act.parameters()) or not isinstance(gate, nn.Linear):
        return False
    kind = type(module)
    try:
        dtype = gate.weight.dtype if gate.weight.is_floating_point() else torch.float32  # packed: any will do
        probe = torch.linspace(-6.0, 6.0, 64, device=gate.weight.device)
        if not _same(act(probe), functional.silu(probe), torch.float32):
            return False
        if kind not in proven:
            x = torch.randn(1, 2, gate.in_features, device=gate.weight.device, dtype=dtype)
            plain = children["down_proj"](swiglu_plain(gate(x), children["up_proj"](x)))
            proven[kind] = _same(module(x), plain, dtype)
    except Exception:  # noqa: BLE001 not this kind of module
        return False
    return proven[kind]


def _same(found: Any, expected: Tensor, dtype: torch.dtype) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    off = (found.float() - expected.float()).abs().max()
    return bool(off <= _CLOSE[dtype] * expected.float().abs().max())
