"""Writes tests/golden/bitsandbytes/*.safetensors: what bitsandbytes, and PEFT on top of it, make of numbers on a CPU.

    nf4      matrices: codes, scales, what they give back; the second quantisation of the scales; the dynamic maps
    int8     a matrix, row by row
    qlora    a small llama with PEFT's LoRA on bitsandbytes' Linear4bit: logits, and the gradients of the adapter
    loftq    PEFT's `loftq_init` on bitsandbytes' codes: what it leaves of a matrix, and the pair, after 1 and 5 rounds
    model/   that llama as transformers and bitsandbytes save it

In an environment that has bitsandbytes, peft, transformers and safetensors, with this repository's `tests` on the path:
PYTHONPATH=tests python tests/golden/make_bitsandbytes.py
"""

from __future__ import annotations

import types
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from peft import LoraConfig, get_peft_model
from peft.utils import loftq_utils
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tiny import tiny

SHAPES = {"small": (48, 64), "odd": (9, 37), "wide": (96, 192)}
HERE = Path(__file__).parent / "bitsandbytes"
SIZES = {"intermediate_size": 128, "num_hidden_layers": 1}  # bitsandbytes' CPU path wants rows of whole blocks


def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
    HERE.mkdir(exist_ok=True)
    made = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    save_file(made, HERE / f"{name}.safetensors", metadata={"bitsandbytes": bitsandbytes.__version__})


def matrices() -> None:
    tensors = {"map.signed": create_dynamic_map(signed=True), "map.unsigned": create_dynamic_map(signed=False)}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
        made = {"weight": weight, "codes": codes, "absmax": state.absmax, "back": dequantize_4bit(codes, state)}
        codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        made |= {
            "double.codes": codes, "double.absmax": state.absmax, "double.nested": state.state2.absmax,
            "double.offset": state.offset.view(1), "double.back": dequantize_4bit(codes, state),
        }  # fmt: skip
        tensors |= {f"{name}.{key}": value for key, value in made.items()}
    write("nf4", tensors)
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(7))
    codes, absmax, _ = int8_vectorwise_quant(weight.clone())
    write("int8", {"weight": weight, "codes": codes, "absmax": absmax})


def qlora() -> None:
    model = tiny("llama", **SIZES)
    plain = HERE / "plain"
    model.save_pretrained(plain)
    asked = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=asked, dtype=torch.float32)
    for file in plain.iterdir():
        file.unlink()
    plain.rmdir()
    model.save_pretrained(HERE / "model")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
            tensors[f"adapter.{name.replace('.default', '')}"] = parameter.data
    tokens = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(3))
    adapted.train()
    scores = adapted(input_ids=tokens).logits
    functional.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            tensors[f"gradient.{name.replace('.default', '')}"] = parameter.grad
    write("qlora", {**tensors, "tokens": tokens, "logits": scores})


def loftq() -> None:
    """PEFT's function moves the weight to a GPU; nothing in it needs one, so the same code runs here on "cpu"."""
    code = loftq_utils.loftq_init.__wrapped__.__code__
    here = code.replace(co_consts=tuple("cpu" if value == "cuda" else value for value in code.co_consts))
    loftq_init = torch.no_grad()(types.FunctionType(here, vars(loftq_utils), argdefs=(1,)))
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(4)) / 8
    tensors = {"weight": weight}
    for rounds in (1, 5):
        left, a, b = loftq_init(weight.clone(), num_bits=4, reduced_rank=6, num_iter=rounds)
        tensors |= {f"{rounds}.left": left, f"{rounds}.a": a, f"{rounds}.b": b}
    write("loftq", tensors)


if __name__ == "__main__":
    matrices()
    loftq()
    qlora()
