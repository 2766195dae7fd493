"""Writes bitsandbytes/optimizers.safetensors: steps of bitsandbytes' optimizers on a CPU, number by number.

    adamw_8bit    codes, scales and weights after steps 1 and 40      lion_8bit    the same of its one average
    lion          weights and average after step 40, all in 32 bits

Two groups with rates and decays of their own; a tensor of 4,615 elements (a block of 7 at its end), one of 4,096, one
that is too small for 8 bits; a step without any gradient, blocks without any, blocks of tiny ones. Gradients depend on
nothing but the step, so an error of one step does not hide in the next.

`lookup` is how its CPU kernel finds a code, found out by trial: at the nearest of 65,536 even steps over [-1, 1]; it
agrees with the kernel on every one of 262,144 numbers of a normal distribution and on their squares (checked here).
In an environment that has bitsandbytes: PYTHONPATH=src:tests python tests/golden/make_bitsandbytes_optimizers.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES = {"odd": (65, 71), "whole": (64, 64), "small": (33,)}
GROUPS: tuple[dict[str, Any], ...] = (
    {"names": ["odd", "small"], "lr": 1e-2, "weight_decay": 0.1}, {"names": ["whole"], "lr": 3e-3, "weight_decay": 0.0},
)  # fmt: skip
STEPS, SILENT = 40, 4
BETAS = {"adamw_8bit": (0.9, 0.99), "lion_8bit": (0.9, 0.99), "lion": (0.9, 0.99)}
KEPT = {"adamw_8bit": (1, STEPS), "lion_8bit": (1, STEPS), "lion": (STEPS,)}
SLOTS = {"state1": "exp_avg", "absmax1": "exp_avg_absmax", "state2": "exp_avg_sq", "absmax2": "exp_avg_sq_absmax"}
FILE = Path(__file__).parent / "bitsandbytes" / "optimizers.safetensors"


def start() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def gradient(name: str, step: int) -> torch.Tensor:
    """Of a step, counted from 1."""
    shape, seed = SHAPES[name], 1000 * step + list(SHAPES).index(name)
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    flat = made.view(-1)
    if name != "small":
        flat[:256] = 0
        flat[256:512] *= 1e-12
        flat[512:768] *= 1e3
        flat[2048 : 2048 + 256 * (step % 3)] = 0
    return torch.zeros(shape) if step == SILENT else made


def groups_of(weights: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**group, "params": [weights[key] for key in group["names"]]} for group in GROUPS]


def lookup(scaled: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Codes (uint8) of numbers in [-1, 1], as the CPU kernel finds them in a map."""
    grid = -1 + torch.arange(1 << 16).float() * (2 / 65535)
    nearest = torch.bucketize(grid.double(), (values[:-1].double() + values[1:].double()) / 2)
    place = ((scaled + 1) * 0.5 * 65535 + 0.5).floor().long().clamp(0, 65535)
    return nearest[place].to(torch.uint8)


def steps_of(name: str) -> dict[str, torch.Tensor]:
    """`adamw_8bit.40.odd.exp_avg` -> tensor."""
    from bitsandbytes.optim import AdamW8bit, Lion, Lion8bit

    weights = {key: torch.nn.Parameter(value) for key, value in start().items()}
    kind: Any = {"adamw_8bit": AdamW8bit, "lion_8bit": Lion8bit, "lion": Lion}[name]
    optimizer, found = kind(groups_of(weights), betas=BETAS[name]), {}
    for step in range(1, STEPS + 1):
        for key, weight in weights.items():
            weight.grad = gradient(key, step)
        optimizer.step()
        if step in KEPT[name]:
            for key, weight in weights.items():
                found[f"{name}.{step}.{key}.weight"] = weight.detach().clone()
                for slot, ours in SLOTS.items():
                    if slot in optimizer.state[weight]:
                        found[f"{name}.{step}.{key}.{ours}"] = optimizer.state[weight][slot].clone()
    return found


def check_lookup() -> None:
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

    drawn = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    for signed, numbers in ((True, drawn), (False, drawn.square())):
        codes, state = quantize_blockwise(numbers.clone(), code=create_dynamic_map(signed), blocksize=256)
        scaled = (numbers.view(-1, 256) * (1 / state.absmax)[:, None]).view(-1)
        assert torch.equal(lookup(scaled, create_dynamic_map(signed)), codes)


def main() -> None:
    import bitsandbytes

    check_lookup()
    found = {key: tensor for name in BETAS for key, tensor in steps_of(name).items()}
    save_file(found, FILE, metadata={"bitsandbytes": bitsandbytes.__version__})


if __name__ == "__main__":
    main()
