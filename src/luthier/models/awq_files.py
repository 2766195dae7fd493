"""AWQ checkpoints as frozen bases: what their configuration must say, and the tensors of each linear, checked.

`quantization_config` (or the quant_config.json of older files) has four bits, a group size, zero points and the layout
gemm. Refused in one line each: the layouts gemv, gemv_fast, marlin and llm-awq's own, which keep the words in an order
for one kernel, other bits, and files without zero points.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from luthier.contracts.errors import ModelError
from luthier.models.gptq_files import check_bias, check_group, check_tensors, linears_of
from luthier.models.quantised_load import Wanted
from luthier.models.stored_tensors import Places, tensors_of, turned
from luthier.models.weights import awq
from luthier.models.weights.packed import Packed

_DENSE = "load the dense model with model.quantization: nf4"


def stored_linears(said: Mapping[str, Any], where: str, places: Places) -> Wanted:
    """The linears of the files and how each is read; ModelError for what is not read here."""
    layout = str(said.get("version") or said.get("format") or said.get("checkpoint_format") or "gemm").lower()
    layout = "llm-awq" if said.get("backend") == "llm-awq" else layout
    if layout != "gemm":
        raise ModelError("an AWQ checkpoint in this layout is not read here", where=where, value=layout,
                         remedy=f"fetch it in the layout gemm, or {_DENSE}")  # fmt: skip
    bits, group = said.get("bits", said.get("w_bit")), said.get("group_size", said.get("q_group_size"))
    if bits != awq.BITS:
        raise ModelError("an AWQ checkpoint of other than four bits is not read here", where=where, value=bits,
                         remedy=_DENSE)  # fmt: skip
    if not said.get("zero_point", True):
        raise ModelError("an AWQ checkpoint without zero points is not read here", where=where, value=False,
                         remedy=_DENSE)  # fmt: skip
    check_group(group, where)
    paths = linears_of(places, where)
    return Wanted("awq", stored={path: partial(_read, path, places, dict(said), int(group)) for path in paths})  # type: ignore[arg-type]


def _read(path: str, places: Places, said: Mapping[str, Any], group: int, linear: Any) -> Packed:
    found = tensors_of(path, places, ("qweight", "qzeros", "scales"))
    inputs, outputs = linear.in_features, linear.out_features
    groups = 1 if group == -1 else -(-inputs // group)
    shapes = {"qweight": (inputs, outputs // 8), "qzeros": (groups, outputs // 8), "scales": (groups, outputs)}
    check_tensors(path, found, shapes)
    check_bias(path, places, linear)
    return turned(awq.AWQLinear(awq.read(found, group), linear.bias, said), linear)
