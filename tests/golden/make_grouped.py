"""Writes tests/golden/grouped: what AutoGPTQ 0.7.1 and AutoAWQ 0.2.9 write for small matrices, and read back from them.

    gptq.safetensors   for bits 2, 3, 4, 8, groups of 32 and of all inputs, with and without act-order: the words, and
                       the matrix (in, out) that AutoGPTQ's own forward computes with in fp16
    awq.safetensors    the same of AutoAWQ's gemm layout, for groups of 32 and of all inputs
    gptq/, awq/        a small llama whose linears are packed by these programs, as its files look

Their packing runs on a CPU from their source files alone; the rest of the programs is not imported. In an environment
with torch and transformers, this repository's `src` and `tests` on the path, and the unpacked sources at hand:

PYTHONPATH=src:tests python tests/golden/make_grouped.py AUTOGPTQ/auto_gptq AUTOAWQ/awq
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tiny import tiny

HERE = Path(__file__).parent / "grouped"
INPUTS, OUTPUTS = 64, 32
SIZES = {"intermediate_size": 128, "num_hidden_layers": 1}


def module_of(name: str, file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def awq_module(directory: Path) -> Any:
    for name in ("awq", "awq.utils"):  # without what their packages import
        stub = types.ModuleType(name)
        stub.__path__ = [str(directory / name.partition(".")[2])]
        sys.modules[name] = stub
    return module_of("awq_gemm", directory / "modules/linear/gemm.py")


def grid(weight: Tensor, bits: int, group: int, places: Tensor | None, lowest: int) -> tuple[Tensor, Tensor]:
    """(scale, zero), (out, groups): from the extremes of each group; zeros of at least `lowest`."""
    count = weight.shape[1] // group
    places = torch.arange(weight.shape[1]) // group if places is None else places
    low = torch.stack([weight[:, places == g].amin(1) for g in range(count)], 1).clamp_max(0)
    high = torch.stack([weight[:, places == g].amax(1) for g in range(count)], 1).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    return scale, (-low / scale).round().clamp(lowest, 2**bits - 1)


def gptq_linear(qlinear: Any, weight: Tensor, bits: int, group: int, order: bool, bias: Tensor | None = None) -> Any:
    """Their module, packed. AutoGPTQ stores zeros minus one and cannot store a zero of nought."""
    outputs, inputs = weight.shape
    places = None
    if order:
        shuffled = torch.randperm(inputs, generator=torch.Generator().manual_seed(9))
        places = (torch.arange(inputs) // group)[shuffled].int()
    scale, zero = grid(weight, bits, group, places, lowest=1)
    linear = nn.Linear(inputs, outputs, bias=bias is not None)
    linear.weight.data = weight.half()
    if bias is not None:
        linear.bias.data = bias.half()
    made = qlinear.QuantLinear(bits, group, inputs, outputs, bias is not None, weight_dtype=torch.float16)
    linear.weight.data = linear.weight.data.float()
    made.pack(linear, scale.clone(), zero.clone(), places)
    made.scales = made.scales.half()
    return made


def awq_linear(gemm: Any, weight: Tensor, group: int, bias: Tensor | None = None) -> Any:
    outputs, inputs = weight.shape
    scale, zero = grid(weight, 4, group, None, lowest=0)
    linear = nn.Linear(inputs, outputs, bias=bias is not None)
    linear.weight.data = weight.clone()
    if bias is not None:
        linear.bias.data = bias.clone()
    return gemm.WQLinear_GEMM.from_linear(linear, 4, group, scales=scale.T.contiguous(), zeros=zero.T.contiguous())


def words(made: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: getattr(made, name).detach().contiguous().clone() for name in names}


def matrices(qlinear: Any, gemm: Any) -> None:
    found: dict[str, Tensor] = {}
    eye = torch.eye(INPUTS, dtype=torch.float16)
    for bits in (2, 3, 4, 8):
        for group in (32, INPUTS):
            for order in (False, True):
                if order and group == INPUTS:
                    continue
                weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(bits + group))
                made = gptq_linear(qlinear, weight, bits, group, order)
                name = f"{bits}.{group if group < INPUTS else -1}.{'order' if order else 'plain'}"
                found |= {f"{name}.{key}": value for key, value in words(made, GPTQ).items()}
                found[f"{name}.matrix"] = made(eye)
    save_file(found, HERE / "gptq.safetensors")
    found = {}
    for group in (32, INPUTS):
        weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(group))
        made = awq_linear(gemm, weight, group)
        name = str(group if group < INPUTS else -1)
        found |= {f"{name}.{key}": value for key, value in words(made, AWQ).items()}
        found[f"{name}.matrix"] = gemm.dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, group).contiguous()
    save_file(found, HERE / "awq.safetensors")


GPTQ = ("qweight", "qzeros", "scales", "g_idx")
AWQ = ("qweight", "qzeros", "scales")


def models(qlinear: Any, gemm: Any) -> None:
    """A llama in GPTQ with act-order, and a qwen2 (it has biases) in AWQ."""
    for name, family in (("gptq", "llama"), ("awq", "qwen2")):
        model = tiny(family, **SIZES)
        directory = HERE / name
        model.save_pretrained(directory)
        state = {}
        for path, tensor in model.state_dict().items():
            if path.endswith("_proj.weight"):
                linear = path.removesuffix(".weight")
                weight = tensor.float()
                if name == "gptq":
                    found = words(gptq_linear(qlinear, weight, 4, 32, True), GPTQ)
                else:
                    found = words(awq_linear(gemm, weight, 32), AWQ)
                state |= {f"{linear}.{key}": value for key, value in found.items()}
            else:
                state[path] = tensor.half()
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        said = {
            "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False,
                     "checkpoint_format": "gptq", "true_sequential": True},
            "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
                    "modules_to_not_convert": None},
        }[name]  # fmt: skip
        config = json.loads((directory / "config.json").read_text("utf-8"))
        config |= {"quantization_config": said, "dtype": "float16"}
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    theirs = module_of("qlinear_cuda", Path(sys.argv[1]) / "nn_modules/qlinear/qlinear_cuda.py")
    theirs_too = awq_module(Path(sys.argv[2]))
    matrices(theirs, theirs_too)
    models(theirs, theirs_too)
