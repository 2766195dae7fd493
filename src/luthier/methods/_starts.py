"""Starts of a LoRA pair that need the base's weight: which there are, what they refuse, and carrying one out.

    pissa, pissa_niter_N, olora   the pair starts as part of the weight, and that start is taken off again
    orthogonal                    neither matrix is zero and their product is
    loftq, loftq_niter_N          the pair makes up for what rounding the base lost, after one round or N
    eva                           as `true`, until rows were seen (methods/_eva.py)

The maths is in models/low_rank_starts.py. A dense base is read once, here, and stays as it is but for loftq, which
puts it into NF4 in place: its original is kept beside it, so that `off` and the reference policy are the base as it
was loaded (those matrices are in memory twice). A base that is packed while it is read (`model.quantization`) is asked
matrix by matrix before that, and carries its start from then on (models/packed_starts.py). LoftQ's further rounds are
for that only: on a dense base they end in a base of their own, which no small file can name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import RecipeError
from luthier.models import low_rank_starts, packed_starts, weights
from luthier.models.low_rank import LowRank
from luthier.models.packed_starts import Before, Begun, Rounded
from luthier.models.sites import features, put_in_place
from luthier.models.weights import nf4

PLAIN = (True, False, "gaussian")
NAMED = ("pissa", "olora", "loftq", "eva", "orthogonal")
LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}  # PEFT's words for what is done here, and all that a file can stand for
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")  # PEFT's starts that leave base weights alone
_OTHERS = {
    "corda": "it needs covariances of the inputs; eva also starts from the rows",
    "lora_ga": "it needs gradients of the base; pissa and eva start from its weights and from the rows",
    "mica": "it freezes B; olora and orthogonal start both matrices apart from zero",
}
_WHERE = "method.init_lora_weights"


def is_difference(init: bool | str) -> bool:
    """The pair starts away from zero, and what trains is the difference to that start."""
    return isinstance(init, str) and (init == "olora" or init.startswith("pissa"))


def reads_weight(init: bool | str) -> bool:
    """The start is made of the base's weight."""
    return is_difference(init) or (isinstance(init, str) and init.startswith("loftq"))


def before_packing(init: str, wanted: Mapping[str, tuple[int, float]], dtype: torch.dtype) -> Before:
    """What this start does with the matrices of some paths (rank and scale of each) before they are packed."""

    def before(path: str, weight_OD: Tensor, rounded: Rounded) -> Begun | None:
        if path not in wanted:
            return None
        return packed_starts.begin(init, weight_OD, *wanted[path], dtype, rounded)

    return before


def again_before_packing(
    start: str, scales: Callable[[str], float], tensors: Mapping[str, Tensor], prefix: str
) -> Before:
    """The same from the second halves of a file's pairs: [A; A0] and [B, -B0]."""

    def before(path: str, weight_OD: Tensor, rounded: Rounded) -> Begun | None:
        a_RD, b_OR = (tensors.get(f"{prefix}{path}.lora_{letter}.weight") for letter in "AB")
        if a_RD is None or b_OR is None:
            return None
        half = len(a_RD) // 2
        return packed_starts.again(start, weight_OD, a_RD[half:], -b_OR[:, half:], scales(path), rounded)

    return before


def check_name(init: bool | str, doc: str) -> None:
    """RecipeError for a start that is not one of ours; PEFT's others by name."""
    if (
        init in PLAIN
        or init in NAMED
        or (isinstance(init, str) and re.fullmatch(r"(pissa|loftq)_niter_[1-9]\d{0,2}", init))
    ):
        return
    reason = _OTHERS.get(init) if isinstance(init, str) else None
    raise RecipeError(
        "this start is not one of ours" if reason else "init_lora_weights cannot be that", where=_WHERE, value=init,
        remedy=reason or doc,
    )  # fmt: skip


def check_start(path: str, base: nn.Module, rank: int, init: bool | str) -> None:
    """RecipeError where this module cannot have this start."""
    if init in PLAIN or init == "eva":
        return
    if isinstance(base, nn.Embedding):
        raise RecipeError(
            f"{path} is an embedding, and this start is for linear layers", where=_WHERE, value=init,
            remedy="leave the embedding out of method.target_modules, or use init_lora_weights: true",
        )  # fmt: skip
    if init != "orthogonal" and not weights.is_dense(base) and not _lifted(base):
        raise RecipeError(
            f"{path} is stored as {type(base).__name__}, and this start needs the weight before it was rounded",
            where=_WHERE, value=init, remedy="give the dense model as model.path (model.quantization: nf4 packs it "
            "after the start), or set model.quantization: none, or use init_lora_weights: true or eva",
        )  # fmt: skip
    if str(init).startswith("loftq_niter") and not _lifted(base):
        raise RecipeError("loftq goes round more than once only on a base that is packed", where=_WHERE, value=init,
                          remedy="set model.quantization: nf4, or use init_lora_weights: loftq")  # fmt: skip
    if init == "orthogonal" and rank % 2:
        raise RecipeError(f"an orthogonal start needs an even rank, and {path} has {rank}", where=_WHERE, value=init,
                          remedy=f"use a rank of {rank + 1}")  # fmt: skip
    check_rank(path, base, rank)


def _lifted(base: Any) -> bool:
    """Packed after its start was taken off."""
    return weights.is_packed(base) and bool(base.start)


def check_rank(path: str, base: Any, rank: int) -> None:
    """RecipeError for a rank that the matrix itself does not have."""
    sizes = tuple(base.weight.shape) if isinstance(base, nn.Embedding) else features(base)
    if rank > min(sizes):
        leaf = path.rpartition(".")[2]
        raise RecipeError(
            f"the rank is larger than {path}, a matrix of {sizes[0]} by {sizes[1]}", where="method.r", value=rank,
            remedy=f"lower it, or write rank_pattern: {{{leaf}: {min(sizes)}}}, or exclude_modules: [{leaf}]",
        )  # fmt: skip


def start(made: LowRank, base: Any, init: bool | str) -> None:
    """Give a fresh pair its start."""
    if init in PLAIN or init == "eva":
        return
    if made.lora_A.is_meta:  # shapes alone
        made.begin(made.lora_A, made.lora_B, as_base=is_difference(init))
        return
    if init == "orthogonal":
        inputs, outputs = features(base)
        made.begin(*low_rank_starts.orthogonal(inputs, outputs, made.rank))
        return
    if _lifted(base):  # it was made before the base was packed
        made.begin(base.lift_A, base.lift_B, as_base=True)
        return
    weight_OD = weights.read(base)
    if init == "loftq":
        rounded = nf4.rounded(base.weight)
        rounded_OD = rounded.T if isinstance(base, Conv1D) else rounded
        made.begin(*low_rank_starts.loftq(weight_OD, rounded_OD, made.rank, made.scale))
        put_in_place(base, "weight", rounded)
    elif init == "olora":
        made.begin(*low_rank_starts.olora(weight_OD, made.rank), as_base=True)
    else:
        niter = int(str(init).removeprefix("pissa_niter_")) if init != "pissa" else None
        made.begin(*low_rank_starts.pissa(weight_OD, made.rank, made.scale, niter), as_base=True)
