"""Matrices of a model into a storage format and back: which modules, which format, and what is refused.

    packed(linear, format)   the linear as that format keeps it      dense(module)  its inverse, up to the rounding
    quantise(model, format)  every linear of the body, in place      densify(model) its inverse
    repack(model, before)    after a change, each linear in the format that it had before it was made dense
    format_of(model)         nf4, int8, fp8, of files also gptq and awq, or none

Stay as they are: the head and embeddings (tied ones too), norms, a score head, and linears whose weight the model reads
without calling them. Experts that are kept as one 3-D tensor are refused by name: a model whose larger part stayed
dense would not be what was asked for. Left out: choosing a format for each layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import ModelError
from luthier.models.packed_starts import Begun, Rounded
from luthier.models.shapes import shapes_of
from luthier.models.sites import replace
from luthier.models.weights import is_packed, read
from luthier.models.weights.fp8 import FP8Linear
from luthier.models.weights.int8 import Int8Linear
from luthier.models.weights.nf4 import NF4Linear
from luthier.models.weights.packed import Packed

FORMATS: dict[str, type[Packed]] = {"nf4": NF4Linear, "int8": Int8Linear, "fp8": FP8Linear}
_WHERE = "model.quantization"


def check_device(name: str, device: torch.device | str) -> None:
    """ModelError for a format that this device does not compute."""
    if name == "fp8" and torch.device(device).type == "cpu":
        raise ModelError("fp8 is a GPU's number format", where=_WHERE, value=name, remedy="on a CPU use nf4 or int8")


def quantisable(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> linear of everything that goes into a format; ModelError for experts in one tensor."""
    shapes = shapes_of(model)
    share, names = shapes.beyond_linears()
    if stacked := [name for name, _ in shapes.uncovered if "expert" in name and model.get_parameter(name).ndim == 3]:
        raise ModelError(
            f"{share:.0%} of this model's layers are experts in one 3-D tensor each, which no format here packs",
            where=_WHERE, value=stacked[0], remedy=f"set model.quantization: none ({', '.join(names)} stay dense)",
        )  # fmt: skip
    return {linear.path: model.get_submodule(linear.path) for linear in shapes.linears}


def packed(
    linear: Any, name: str, *, double: bool = True, start: Callable[[Tensor, Rounded], Begun | None] | None = None
) -> Packed:
    """One linear (or Conv1D) in a format; its bias is the same parameter. `start` sees the matrix before."""
    weight_OD = read(linear).contiguous()
    kind, begun = FORMATS[name], None
    if start is not None:
        begun = start(weight_OD, lambda matrix_OD: kind.pack(matrix_OD, None, double=double).matrix())
    made = kind.pack(weight_OD if begun is None else begun.matrix_OD, linear.bias, double=double)
    if begun is not None and begun.start:
        made.lift(begun.a_RD, begun.b_OR, begun.scale, begun.start)
    elif begun is not None:
        made.begun = (begun.a_RD, begun.b_OR)
    made.turned = isinstance(linear, Conv1D)
    return made.train(linear.training)


def dense(module: Packed, dtype: torch.dtype) -> nn.Module:
    """An ordinary frozen linear (or Conv1D, where it was one) with the numbers that the packed one computes with."""
    weight_OD = module.matrix(dtype)
    made: Any = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    if module.turned:
        made = Conv1D(0, 0)
        made.nx, made.nf, weight_OD = module.in_features, module.out_features, weight_OD.T.contiguous()
    made.weight = nn.Parameter(weight_OD, requires_grad=False)
    made.bias = module.bias
    return made.train(module.training)  # type: ignore[no-any-return]


@torch.no_grad()
def quantise(model: nn.Module, name: str, *, double: bool = True) -> nn.Module:
    """Every linear of the body into a format, in place, one after the other."""
    for path, linear in quantisable(model).items():
        if not is_packed(linear):
            replace(model, path, packed(linear, name, double=double))
    return model


@torch.no_grad()
def densify(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Every packed linear an ordinary one again, in place; in `dtype`, else in that of the model's other weights."""
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for path, module in packed_linears(model).items():
        replace(model, path, dense(module, dtype))
    return model


@torch.no_grad()
def repack(model: nn.Module, before: Mapping[str, Packed]) -> nn.Module:
    """Linears that were packed once, and may have changed since, each in the format that it had, in place."""
    for path, module in before.items():
        linear: Any = model.get_submodule(path)
        made = module.again(read(linear).contiguous(), linear.bias)
        made.turned = module.turned
        replace(model, path, made.train(linear.training))
    return model


def packed_linears(model: nn.Module) -> dict[str, Packed]:
    """Path -> linear of everything that is in a format."""
    return {path: module for path, module in model.named_modules() if is_packed(module)}


def format_of(model: nn.Module) -> str:
    """The format of the model's packed linears, none where there are none."""
    return next((module.format for module in model.modules() if isinstance(module, Packed)), "none")


def start_of(model: nn.Module) -> str:
    """The start that was taken off the matrices before they were packed, and is added again; empty where none was."""
    return next((module.start for module in model.modules() if isinstance(module, Packed) and module.start), "")


def lifts_digest(model: nn.Module) -> str | None:
    """Of what is added to unpacked matrices: it decides the base's numbers as the files do."""
    lifted = {path: module for path, module in packed_linears(model).items() if module.start}
    if not lifted:
        return None
    digest = hashlib.sha256()
    for path, module in lifted.items():
        digest.update(f"{path} {module.start} {module.lift_scale}".encode())
        for half in (module.lift_A, module.lift_B):
            assert half is not None
            digest.update(half.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_double(model: nn.Module) -> bool:
    """Whether scales are quantised too."""
    return any(getattr(module, "nested_absmax", None) is not None for module in model.modules())
