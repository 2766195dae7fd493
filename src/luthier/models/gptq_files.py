"""GPTQ checkpoints as frozen bases: what their configuration must say, and the tensors of each linear, checked.

`quantization_config` (or the quantize_config.json of older files) has bits 2, 3, 4 or 8, a group size (-1: all inputs),
`checkpoint_format` gptq or gptq_v2, and act-order in `g_idx`. Refused in one line each: layouts for one kernel only
(marlin, bitblas), words of other than 32 bits, bits that change from module to module, a packed language head. Old
files give every linear a bias, of zeros where the model has none: zeros are passed over, anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from luthier.contracts.errors import ModelError
from luthier.models.quantised_load import Wanted
from luthier.models.stored_tensors import Places, misfit, tensors_of, turned
from luthier.models.weights import gptq
from luthier.models.weights.grouped import BITS
from luthier.models.weights.packed import Packed

_DENSE = "load the dense model with model.quantization: nf4"


def stored_linears(said: Mapping[str, Any], where: str, places: Places) -> Wanted:
    """The linears of the files and how each is read; ModelError for what is not read here."""
    version = (
        "marlin" if said.get("is_marlin_format") else said.get("checkpoint_format") or said.get("format") or "gptq"
    )
    if version not in gptq.VERSIONS:
        raise ModelError("a GPTQ checkpoint laid out for one kernel is not read here", where=where, value=version,
                         remedy=f"fetch it in the format gptq or gptq_v2, or {_DENSE}")  # fmt: skip
    bits, group = said.get("bits"), said.get("group_size")
    if bits not in BITS:
        raise ModelError("a GPTQ checkpoint of this many bits is not read here", where=where, value=bits,
                         remedy=f"2, 3, 4 and 8 are, or {_DENSE}")  # fmt: skip
    check_group(group, where)
    if said.get("dynamic"):
        raise ModelError("a GPTQ checkpoint whose bits change from module to module is not read here", where=where,
                         value="dynamic", remedy=_DENSE)  # fmt: skip
    if said.get("pack_dtype", "int32") != "int32":
        raise ModelError("only words of 32 bits are read here", where=where, value=said["pack_dtype"], remedy=_DENSE)
    paths = linears_of(places, where)
    read = {path: partial(_read, path, places, dict(said), int(bits), int(group)) for path in paths}  # type: ignore[arg-type]
    return Wanted("gptq", stored=read)


def check_group(group: object, where: str) -> None:
    if type(group) is not int or (group < 1 and group != -1):
        raise ModelError("not a group size", where=where, value=group, remedy="a number of inputs, or -1 for all")


def linears_of(places: Places, where: str) -> list[str]:
    """Paths of the linears that are packed words; ModelError where there is none, and for other things with scales."""
    paths = sorted(name.removesuffix(".qweight") for name in places if name.endswith(".qweight"))
    if not paths:
        raise ModelError("the files hold no packed linears", where=where, remedy="was it saved whole?")
    for path in paths:
        if path.rpartition(".")[2] in ("lm_head", "embed_out"):
            raise ModelError("a packed language head is not read here", where=where, value=path, remedy=_DENSE)
    known = set(paths)
    for name in places:
        if name.endswith(".scales") and name.removesuffix(".scales") not in known:
            raise ModelError("the files scale something that is no packed linear, and the model has no place for that",
                             where=where, value=name, remedy=_DENSE)  # fmt: skip
    return paths


def _read(path: str, places: Places, said: Mapping[str, Any], bits: int, group: int, linear: Any) -> Packed:
    found = tensors_of(path, places, ("qweight", "qzeros", "scales", "g_idx"))
    inputs, outputs = linear.in_features, linear.out_features
    groups = 1 if group == -1 else -(-inputs // group)
    shapes = {"qweight": (inputs * bits // 32, outputs), "qzeros": (groups, outputs * bits // 32),
              "scales": (groups, outputs), "g_idx": (inputs,)}  # fmt: skip
    check_tensors(path, found, shapes, optional=("g_idx",))
    places_I = found.get("g_idx")
    if places_I is not None and not bool(((places_I >= 0) & (places_I < groups)).all()):
        raise misfit(f"{path}.g_idx", f"{int(places_I.min())} to {int(places_I.max())} of {groups} groups")
    check_bias(path, places, linear)
    grid = gptq.read(found, bits, group, gptq.offset_of(said))
    return turned(gptq.GPTQLinear(grid, linear.bias, said), linear)


def check_tensors(
    path: str, found: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], optional: tuple[str, ...] = ()
) -> None:
    """Every tensor there, of its shape, words of 32 bits and scales in floats."""
    for name, shape in shapes.items():
        tensor = found.get(name)
        if tensor is None and name in optional:
            continue
        if tensor is None or tuple(tensor.shape) != shape:
            raise misfit(f"{path}.{name}", "missing" if tensor is None else f"{tuple(tensor.shape)} for {shape}")
        good = tensor.is_floating_point() if name == "scales" else tensor.dtype in (torch.int32, torch.int64)
        if not good or (name in ("qweight", "qzeros") and tensor.dtype != torch.int32):
            raise misfit(f"{path}.{name}", tensor.dtype)


def check_bias(path: str, places: Places, linear: Any) -> None:
    """ModelError for a bias that the model has no place for; zeros are none."""
    if linear.bias is None and bool(tensors_of(path, places, ("bias",)).get("bias", torch.zeros(1)).any()):
        raise misfit(f"{path}.bias", "the model has no bias there")
