"""Packed linears in bitsandbytes' files: read to the bit, and written so that transformers and bitsandbytes read them.

    nf4    weight ((n + 1) / 2, 1) uint8        weight.absmax, weight.quant_map
           with double quantisation             weight.nested_absmax, weight.nested_quant_map
           weight.quant_state.bitsandbytes__nf4 JSON as bytes: shape, block sizes, dtype, nested_offset
    int8   weight (out, in) int8                SCB (out,) fp32, weight_format

`stored_linears` says which linears the files keep packed, FP4 is refused by name. Codes are never dequantised on the
way. Left out: codes kept in tensors of other than bytes, which only sharded training needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.contracts.errors import ModelError
from luthier.models.quantised_load import Wanted
from luthier.models.stored_tensors import Places, misfit, tensors_of, turned
from luthier.models.weights import dynamic_map, nf4
from luthier.models.weights.dynamic_map import Mapped
from luthier.models.weights.int8 import Int8Linear
from luthier.models.weights.nf4 import NF4, NF4Linear
from luthier.models.weights.packed import Packed

_STATE = "quant_state.bitsandbytes__nf4"
_OTHERS = {"weight.quant_state.bitsandbytes__fp4": "fp4"}


def stored_linears(said: Mapping[str, Any], where: str, places: Places) -> Wanted:
    """The linears of the files and how each is read; ModelError for what is not read here."""
    if other := sorted(name for name in places if any(name.endswith(ending) for ending in _OTHERS)):
        raise ModelError("a checkpoint in fp4 is not read here", where=where, value=other[0],
                         remedy="quantise the dense model to nf4")  # fmt: skip
    four = [name.removesuffix(f".weight.{_STATE}") for name in places if name.endswith(f".weight.{_STATE}")]
    eight = [name.removesuffix(".SCB") for name in places if name.endswith(".SCB")]
    if bool(four) == bool(eight):
        raise ModelError("the files hold no quantised linears of one kind", where=where, remedy="was it saved whole?")
    read, kind = (_read_nf4, "nf4") if four else (_read_int8, "int8")
    return Wanted(kind, stored={path: partial(read, path, places) for path in sorted(four or eight)})


def _read_nf4(path: str, places: Places, linear: Any) -> Packed:
    names = ("absmax", "nested_absmax", "quant_map", "nested_quant_map", _STATE)
    found = tensors_of(path, places, ("weight", *(f"weight.{name}" for name in names)))
    state = json.loads(bytes(found[f"weight.{_STATE}"].tolist()).decode("utf-8"))
    shape, block = tuple(state["shape"]), int(state["blocksize"])
    codes, absmax = found["weight"], found["weight.absmax"]
    good = codes.dtype == torch.uint8 and codes.numel() == (shape[0] * shape[1] + 1) // 2
    if not good or shape != (linear.out_features, linear.in_features):
        raise misfit(path, f"{tuple(codes.shape)} {shape}")
    if not torch.equal(found["weight.quant_map"].float(), torch.tensor(nf4.CODE)):
        raise ModelError("the packed weight has a table of its own", where=path, remedy="quantise the dense model")
    nested = None
    if (scales := found.get("weight.nested_absmax")) is not None:
        same = torch.equal(found["weight.nested_quant_map"].float(), dynamic_map.create_dynamic_map())
        if not same or state.get("nested_blocksize") != dynamic_map.BLOCK:
            raise ModelError("the scales have a table of their own", where=path, remedy="quantise the dense model")
        nested = (Mapped(absmax.view(-1), scales.float().view(-1)), torch.tensor(float(state["nested_offset"])))
    stored = NF4(codes.view(-1), absmax.view(-1) if nested else absmax.float().view(-1), shape, block, nested)
    return turned(NF4Linear(stored, linear.bias), linear)


def _read_int8(path: str, places: Places, linear: Any) -> Packed:
    found = tensors_of(path, places, ("weight", "SCB"))
    codes, absmax = found["weight"], found["SCB"].float().view(-1)
    if codes.dtype != torch.int8 or tuple(codes.shape) != (linear.out_features, linear.in_features):
        raise misfit(path, f"{tuple(codes.shape)}")
    return turned(Int8Linear(codes, absmax, linear.bias), linear)


def packed_tensors(path: str, module: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear under bitsandbytes' names, without the bias; ModelError where it has no names."""
    if isinstance(module, Int8Linear):
        return {f"{path}.weight": module.weight.detach(), f"{path}.SCB": module.SCB,
                f"{path}.weight_format": torch.tensor(0, dtype=torch.uint8)}  # fmt: skip
    if not isinstance(module, NF4Linear):
        raise ModelError(f"{module.format} has no file that other programs read", where="model.quantization",
                         value=module.format, remedy="merge with --into dense")  # fmt: skip
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": module.block, "dtype": str(dtype).removeprefix("torch."),
                             "shape": [module.out_features, module.in_features]}  # fmt: skip
    found = {"weight": module.weight.detach(), "weight.absmax": module.absmax,
             "weight.quant_map": torch.tensor(nf4.CODE)}  # fmt: skip
    if module.nested_absmax is not None and module.nested_offset is not None:
        found |= {"weight.nested_absmax": module.nested_absmax,
                  "weight.nested_quant_map": dynamic_map.create_dynamic_map()}  # fmt: skip
        state |= {"nested_blocksize": dynamic_map.BLOCK, "nested_dtype": "float32",
                  "nested_offset": float(module.nested_offset)}  # fmt: skip
    found[f"weight.{_STATE}"] = torch.tensor(list(json.dumps(state).encode("utf-8")), dtype=torch.uint8)
    return {f"{path}.{name}": tensor.cpu().contiguous() for name, tensor in found.items()}


def quantization_config(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of a model with packed linears, in transformers' words."""
    modules = [module for module in model.modules() if isinstance(module, Packed)]
    four = isinstance(modules[0], NF4Linear)
    more = {
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_use_double_quant": getattr(modules[0], "nested_absmax", None) is not None,
        "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    return {"quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four, **(more if four else {})}
