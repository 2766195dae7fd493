"""Device and number formats: what is stored, what is computed, what is kept exact.

fp32: everything float32. bf16: frozen weights are stored in bfloat16; what trains, its gradients and the
optimizer's moments stay float32 (the trainables are their own master copy); matrix products run under
autocast in bfloat16. No loss scaler is needed: bfloat16 has float32's range.

fp16 is refused: its range needs a loss scaler whose state belongs to the checkpoint; it comes with a GPU
issue of its own. `auto` is bf16 on a GPU that computes it, else fp32 (on CPUs bfloat16 products are 10 times
slower than float32 ones unless the processor has AMX).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import trains
from luthier.models.weights.narrow import narrow_parameters


@dataclass(frozen=True, slots=True)
class Precision:
    name: str
    compute: torch.dtype
    frozen: torch.dtype

    @contextmanager
    def autocast(self, device: torch.device, *, cache: bool = True) -> Iterator[None]:
        """Around forward passes; backward runs outside, in the types that forward chose."""
        if self.compute == torch.float32:
            yield
            return
        with torch.autocast(device.type, dtype=self.compute, cache_enabled=cache):
            yield


_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """`auto` takes the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(
            "unknown device", where="engine.device", value=name, remedy="use auto, cpu or cuda"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise RecipeError("this device is not supported", where="engine.device", value=name, remedy="use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError("no GPU is visible to torch", where="engine.device", value=name, remedy="use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError("no such GPU", where="engine.device", value=name,
                          remedy=f"they are numbered 0 to {torch.cuda.device_count() - 1}")  # fmt: skip
    return device


def resolve_precision(name: str, device: torch.device) -> Precision:
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if name == "fp16":
        raise RecipeError(
            "fp16 needs a loss scaler, which is not built yet", where="engine.precision", value=name,
            remedy="use bf16 (same memory, float32's range) or fp32",
        )  # fmt: skip
    if name not in _NAMES:
        raise RecipeError("unknown precision", where="engine.precision", value=name, remedy="use auto, fp32 or bf16")
    return Precision(name, _NAMES[name], _NAMES[name])


def settle(model: nn.Module, precision: Precision) -> nn.Module:
    """Store each parameter in its format, in place: trainables float32, frozen ones as `precision` says.

    Buffers keep their types: rotary frequencies and counters must stay exact. Integer (quantized) weights too, and
    frozen tables that are stored narrow and lose nothing by it.
    """
    narrow = narrow_parameters(model)
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in narrow:
            wanted = torch.float32 if trains(parameter) else precision.frozen
            if parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted)
    return model
