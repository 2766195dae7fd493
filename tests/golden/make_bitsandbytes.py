"""Writes tests/golden/bitsandbytes/nf4.safetensors: what bitsandbytes makes of two random matrices, on a CPU.

In an environment that has bitsandbytes, torch and safetensors: python tests/golden/make_bitsandbytes.py
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file

SHAPES = {"small": (48, 64), "odd": (9, 37)}


def main() -> None:
    tensors = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
        made = {"weight": weight, "codes": codes, "absmax": state.absmax, "back": dequantize_4bit(codes, state)}
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in made.items()}
    target = Path(__file__).parent / "bitsandbytes/nf4.safetensors"
    target.parent.mkdir(exist_ok=True)
    save_file(tensors, target, metadata={"bitsandbytes": bitsandbytes.__version__})


if __name__ == "__main__":
    main()
