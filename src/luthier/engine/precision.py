"""Device and number formats: what is stored, what is computed, what is kept exact.

          frozen weights   products   what trains, its gradients, the optimizer's averages
    fp32  float32          float32    float32
    bf16  bfloat16         bfloat16   float32: what trains is its own master copy
    fp16  float16          float16    float32, and a loss scale (engine/scaler.py): float16 ends at 65504 and 6e-8

Products run under autocast; norms, softmax, rotary angles, cross-entropy and routers compute in float32 wherever they
stand, and store what they were given. Nothing large is widened for training: embeddings and head of a frozen base stay
as they lie in its files (PEFT's `prepare_model_for_kbit_training` makes them float32, which costs an 8B model 2 GB);
only a LayerNorm's two vectors are float32, because its operation takes no weights narrower than its input.

`trained_dtype: bfloat16` stores matrices that train in bfloat16 too: half the memory of whole weights, for an optimizer
that rounds stochastically. Their gradients stay float32: a sum over microbatches in bfloat16 loses every part that is
less than 1/256 of it. Vectors (norms, biases, magnitudes) stay float32, they cost nothing; so do modules that say
`float32_only` (routers, gates, virtual tokens, orthonormal bases) and a score head. It wants products in bfloat16.

`auto` is bf16 on a GPU that computes it, else fp32 (on CPUs bfloat16 products are 10 times slower than float32 ones
unless the processor has AMX). fp16 is never taken unasked: activations of large models leave its range.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method, trains
from luthier.models.score_head import HEAD
from luthier.models.weights.narrow import narrow_parameters
from luthier.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Precision:
    name: str
    compute: torch.dtype
    frozen: torch.dtype
    trained: torch.dtype = torch.float32

    @contextmanager
    def autocast(self, device: torch.device, *, cache: bool = True) -> Iterator[None]:
        """Around forward passes; backward runs outside, in the types that forward chose."""
        if self.compute == torch.float32:
            yield
            return
        with torch.autocast(device.type, dtype=self.compute, cache_enabled=cache):
            yield

    @property
    def scales_loss(self) -> bool:
        """Whether gradients can leave the range of what they are computed in."""
        return self.compute == torch.float16


_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TRAINED = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}


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


def resolve_precision(name: str, device: torch.device, trained: str = "auto") -> Precision:
    """`trained`: engine.trained_dtype, whose bfloat16 decides an `auto` of the precision too."""
    if trained not in _TRAINED:
        raise RecipeError("cannot train in it", where="engine.trained_dtype", value=trained,
                          remedy=f"use {', '.join(_TRAINED)}")  # fmt: skip
    narrow = _TRAINED[trained] != torch.float32
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if native or narrow else "fp32"
    if name not in _NAMES:
        raise RecipeError("unknown precision", where="engine.precision", value=name,
                          remedy=f"use auto, {', '.join(_NAMES)}")  # fmt: skip
    if narrow and name != "bf16":
        raise RecipeError("weights in bfloat16 train with products in bfloat16", where="engine.trained_dtype",
                          value=f"{trained}, engine.precision {name}",
                          remedy="set engine.precision: bf16, or trained_dtype: float32")  # fmt: skip
    if narrow and not hasattr(torch.Tensor, "grad_dtype"):
        raise RecipeError("this torch keeps no float32 gradients of bfloat16 weights", where="engine.trained_dtype",
                          value=f"torch {torch.__version__}", remedy="install torch 2.10 or later")  # fmt: skip
    return Precision(name, _NAMES[name], _NAMES[name], _TRAINED[trained])


def precision_of(recipe: Recipe, method: Method, device: torch.device, notes: list[str]) -> Precision:
    """The recipe's words, which must not contradict each other: `model.dtype` and `engine.precision`, of which either
    may decide, and `engine.trained_dtype` and a method's own `adapter_dtype`."""
    said = {"auto": "auto", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[recipe.model.dtype]
    asked, trained = recipe.engine.precision, recipe.engine.trained_dtype
    if "auto" not in (said, asked) and said != asked:
        raise RecipeError(
            "model.dtype and engine.precision contradict each other", where="model.dtype", value=f"{said}, {asked}",
            remedy="leave one of them at auto",
        )  # fmt: skip
    narrow = getattr(method, "adapter_dtype", "fp32") == "bf16"
    if narrow and trained == "float32":
        raise RecipeError(
            "method.adapter_dtype and engine.trained_dtype contradict each other", where="method.adapter_dtype",
            value="bf16, float32", remedy="leave engine.trained_dtype at auto",
        )  # fmt: skip
    found = resolve_precision(said if asked == "auto" else asked, device, trained)
    if narrow and found.name == "bf16":
        return resolve_precision(found.name, device, "bfloat16")
    if narrow:
        what = "method.adapter_dtype bf16 needs engine.precision bf16"
        notes.append(f"{what}: at {found.name} adapters train in float32")
    return found


def settle(model: nn.Module, precision: Precision) -> nn.Module:
    """Store each parameter in its format, in place: what trains as `trained`, what is frozen as `frozen` says.

    Buffers keep their types: rotary frequencies and counters must stay exact. Integer (quantized) weights too, and
    frozen tables that are stored narrow and lose nothing by it.
    """
    stay_wide = (m for m in model.modules() if isinstance(m, nn.LayerNorm) or getattr(m, "float32_only", False))
    wide = {id(parameter) for module in stay_wide for parameter in module.parameters()}
    narrow = narrow_parameters(model)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or id(parameter) in narrow:
            continue
        wanted = precision.trained if trains(parameter) else precision.frozen
        if id(parameter) in wide or name.partition(".")[0] == HEAD or (trains(parameter) and parameter.ndim < 2):
            wanted = torch.float32
        if parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)
        if trains(parameter) and wanted != torch.float32:
            parameter.grad_dtype = torch.float32
    return model
