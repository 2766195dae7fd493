"""Checkpoints that are packed already: which program wrote one, who reads it here, and how a packed model is saved.

    bitsandbytes  nf4, int8             models/bnb_files.py       gptq, awq    models/gptq_files.py, awq_files.py

The configuration's `quantization_config` says which; files of before it was there have quantize_config.json (GPTQ) or
quant_config.json (AWQ). Every other method is refused by name, with what to do instead. Codes are never dequantised on
the way in, and a packed model goes out under the names it came with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from luthier.contracts.errors import ModelError
from luthier.models import awq_files, bnb_files, gptq_files
from luthier.models.directory import read_json
from luthier.models.quantised_load import Wanted
from luthier.models.stored_tensors import places_of
from luthier.models.weights.awq import AWQLinear
from luthier.models.weights.gptq import GPTQLinear
from luthier.models.weights.packed import Packed

READERS = {
    "bitsandbytes": bnb_files.stored_linears, "gptq": gptq_files.stored_linears, "awq": awq_files.stored_linears,
}  # fmt: skip
_OLDER = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_DENSE = "pass the unquantised model with model.quantization: nf4, or a checkpoint in GPTQ, AWQ or bitsandbytes' nf4"
_REMEDIES = {
    "fp8": "pass the bf16 release of the model; on a GPU with model.quantization: fp8",
    "fbgemm_fp8": "pass the bf16 release of the model; on a GPU with model.quantization: fp8",
    "mxfp4": "pass a bf16 release of the model with model.quantization: nf4",
}


def stored_linears(directory: Path) -> Wanted | None:
    """What the files keep packed; None where they are dense; ModelError for a format that is not read here."""
    said, where = _said(directory)
    if said is None:
        return None
    if not isinstance(said, dict) or (method := said.get("quant_method") or "bitsandbytes") not in READERS:
        method = said.get("quant_method") if isinstance(said, dict) else said
        raise ModelError(f"a checkpoint quantised by {method} is not read here", where=where, value=method,
                         remedy=_REMEDIES.get(str(method), _DENSE))  # fmt: skip
    return READERS[method](said, where, places_of(directory))


def _said(directory: Path) -> tuple[Any, str]:
    """(the quantization_config, where it stands), (None, "") where nothing says that the files are packed."""
    if (said := read_json(directory / "config.json").get("quantization_config")) is not None:
        return said, f"{directory / 'config.json'}: quantization_config"
    for name, method in _OLDER.items():
        if (directory / name).is_file() and isinstance(said := read_json(directory / name), dict):
            return {**said, "quant_method": method}, str(directory / name)
    return None, ""


def save_packed(model: Any, directory: Path) -> None:
    """`save_pretrained` of a model with packed linears: the format's names in the files, its words in config.json."""
    dtype = model.get_input_embeddings().weight.dtype
    linears = {path: module for path, module in model.named_modules() if isinstance(module, Packed)}
    own = {f"{path}.{name}" for path, module in linears.items() for name in ("weight", *module._buffers)}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    for path, module in linears.items():
        state |= _tensors(path, module, dtype)
    model.save_pretrained(directory, state_dict=state)
    file = directory / "config.json"
    said = {**read_json(file), "quantization_config": _configuration(model, dtype)}
    file.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tensors(path: str, module: Packed, dtype: Any) -> dict[str, Tensor]:
    if isinstance(module, (GPTQLinear, AWQLinear)):
        return {f"{path}.{name}": tensor.cpu().contiguous() for name, tensor in module.tensors().items()}
    return bnb_files.packed_tensors(path, module, dtype)


def _configuration(model: nn.Module, dtype: Any) -> dict[str, Any]:
    first = next(module for module in model.modules() if isinstance(module, Packed))
    if isinstance(first, (GPTQLinear, AWQLinear)):
        return dict(first.said)
    return bnb_files.quantization_config(model, dtype)
