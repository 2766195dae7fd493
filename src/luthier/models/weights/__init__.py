"""Storage formats of a base's matrices, one a file, and the one place where a method may read a weight as numbers.

    read(base)       the weight as (out, in), whatever way round the module keeps it; a view where it is dense, a fresh
                     fp32 matrix where it is packed
    is_dense(base)   whether it is an ordinary floating point matrix, so that `read` gives the weight itself
    is_packed(base)  whether it is in one of our formats: the numbers that it computes with can be read, not trained
    numbers_of(m)    how many numbers a model's parameters stand for, packed ones counted as what they stand for
    state_of(base)   equal as long as nobody changed the weight: what a result kept beside it depends on

Most methods only call their base and need none of these. Those that must look (a start from singular vectors, a norm
of rows) ask here, so that a new format is a new file and not a new case in every method.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import ModelError
from luthier.models.weights.packed import Packed


def is_dense(base: nn.Module) -> bool:
    """An ordinary matrix of floating point numbers: not packed codes, not sharded, not computed on the fly."""
    weight = getattr(base, "weight", None)
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.ndim == 2


def is_packed(base: nn.Module) -> TypeGuard[Packed]:
    """Stored in few bits, and readable."""
    return isinstance(base, Packed)


def read(base: Any) -> Tensor:
    """(out, in) of a linear, detached; of an embedding (dim, vocabulary): one row for each number it puts out."""
    if is_packed(base):
        return base.matrix(torch.float32)
    if not is_dense(base):
        raise ModelError(
            f"the weight of a {type(base).__name__} cannot be read as a matrix", remedy="load the base unquantised"
        )
    weight: Tensor = base.weight.detach()
    return weight.T if isinstance(base, (Conv1D, nn.Embedding)) else weight


def numbers_of(model: nn.Module) -> int:
    """Parameters, tied ones once; a packed matrix counts as out * in, however few bytes it takes."""
    stands_for = {id(m.weight): m.in_features * m.out_features for m in model.modules() if is_packed(m)}
    return sum(stands_for.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def state_of(base: Any) -> tuple[Any, ...]:
    """The fingerprint of what the module keeps: its weight, or the codes."""
    return fingerprint(base.weight if is_packed(base) else read(base))


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Equal as long as nobody wrote into the tensor or put another in its place: what a kept result depends on."""
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device, tuple(tensor.shape)
