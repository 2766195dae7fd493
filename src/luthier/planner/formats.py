"""Bytes of a weight by how it is stored, and of an optimizer's state by its name: the two tables of a plan.

    nf4    4 bits and a scale for each 64 weights: 32 / 64 bits, or doubly quantised 8 / 64 + 32 / (64 * 256) = 0.127
    int8   8 bits and a float32 scale for each output row          fp8 the same
    gptq, awq    the files' bits, and a scale and a zero of two bytes each for every group
    AdamW  two float32 averages, 8 bytes; in 8 bits 2 (1 + 4 / 256), tensors below 4,096 elements and embeddings in 32
    GaLore both averages in the subspace and the subspace (models/projection.py counts them)

methods.md A3, D5, E1. The counters of steps and the code books of a few kilobytes are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.contracts.errors import RecipeError
from luthier.planner.trained import Tensor

BLOCK = 64  # weights of NF4 that share a scale
NESTED = 256  # scales that share one of their own
SMALL = 4096  # elements below which 8-bit optimizers keep 32 bits
BLOCK_8BIT = 256  # numbers of an 8-bit average that share a scale
PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}  # numbers that are stepped at once where a rule goes piece by piece
_BUFFERS = {"adamw_8bit": 7, "paged_adamw_8bit": 7, "lion_8bit": 6, "lion": 2}  # float32 pieces held at once (measured)


@dataclass(frozen=True, slots=True)
class Stored:
    """How frozen linear weights lie in memory."""

    name: str  # none, nf4, int8, fp8; of files that are packed already also gptq, awq
    double: bool = True
    dense: int = 4  # bytes of a number that no format packs
    bits: int = 4  # of gptq and awq
    group: int = 128  # weights that share a scale there; -1: those of a row
    tables: int = 4  # bytes of a number of embedding and head under packed linears, where the files hold them narrower

    def linears(self, elements: int, rows: int) -> int:
        """Bytes of all linears together."""
        if self.name == "none":
            return elements * self.dense
        if self.name == "nf4":
            scales = elements / BLOCK
            return math.ceil(elements / 2 + (scales + 4 * scales / NESTED if self.double else 4 * scales))
        if self.name in ("int8", "fp8"):
            return elements + 4 * rows
        if self.name in ("gptq", "awq"):
            groups = rows if self.group == -1 else elements / self.group
            return math.ceil(elements * self.bits / 8 + 4 * groups)
        raise RecipeError("no such storage", where="model.quantization", value=self.name,
                          remedy="use none, nf4, int8 or fp8")  # fmt: skip

    def workspace(self, largest: int, compute: int) -> int:
        """One matrix in the dtype that computes."""
        return 0 if self.name == "none" else largest * compute


def nf4_bits(*, double: bool) -> float:
    """Bits of one weight, scales included."""
    return 4 + (8 / BLOCK + 32 / (BLOCK * NESTED) if double else 32 / BLOCK)


def state_bytes(optimizer: str, tensors: Sequence[Tensor]) -> int:
    """What an optimizer keeps for these tensors from the end of its first step on."""
    if optimizer not in OPTIMIZERS:
        raise RecipeError("the plan knows no such optimizer", where="train.optimizer", value=optimizer,
                          remedy=f"what it knows: {', '.join(OPTIMIZERS)}")  # fmt: skip
    return math.ceil(sum(OPTIMIZERS[optimizer](tensor) for tensor in tensors))


def workspace_bytes(optimizer: str, largest: int, device: str) -> int:
    """What a step holds at once besides; `largest`: elements of the largest tensor."""
    if optimizer == "adafactor":
        return 4 * largest  # the estimate of a whole matrix
    return _BUFFERS.get(optimizer, 0) * 4 * min(largest, PIECE[device])


def _adamw(tensor: Tensor) -> float:
    return 4.0 * tensor.states


def _adamw_8bit(tensor: Tensor) -> float:
    average = (tensor.states - tensor.subspace) // 2
    return 4.0 * tensor.subspace + 2 * _one_8bit(average, tensor.embedding)


def _lion(tensor: Tensor) -> float:
    return 4.0 * tensor.elements


def _lion_8bit(tensor: Tensor) -> float:
    return _one_8bit(tensor.elements, tensor.embedding)


def _one_8bit(elements: int, table: bool) -> float:
    """One average: a byte for each element and a scale for each block, in 32 bits where it is small or a table's."""
    return 4.0 * elements if table or elements < SMALL else elements + 4.0 * math.ceil(elements / BLOCK_8BIT)


def _adafactor(tensor: Tensor) -> float:
    if len(tensor.shape) < 2:
        return 4.0 * tensor.elements
    rows, columns = tensor.shape[-2], tensor.shape[-1]
    return 4.0 * tensor.elements / (rows * columns) * (rows + columns)


OPTIMIZERS = {
    "adamw": _adamw, "adamw_8bit": _adamw_8bit, "paged_adamw": _adamw, "paged_adamw_8bit": _adamw_8bit,
    "lion": _lion, "lion_8bit": _lion_8bit, "adafactor": _adafactor, "sgd": lambda tensor: 0.0,
}  # fmt: skip
