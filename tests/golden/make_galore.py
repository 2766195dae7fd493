"""Golden numbers of GaLore's own optimizer: `python make_galore.py DIRECTORY_OF_galore_torch`.

Fifty steps of galore_torch 1.0's AdamW on 0.5 |A (W - B)|^2, for every side of the projection and three shapes, with a
new subspace every 20 steps. Singular vectors are defined up to a sign and the moments outlive their subspace, so the
largest entry of each left vector is made positive; the test does the same to ours. `adamw.py` and `galore_projector.py`
are loaded alone: the package's own import wants bitsandbytes.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES = ((12, 7), (7, 12), (8, 8))
SIDES = ("std", "reverse_std", "right", "left", "full")
RANK, GAP, SCALE, STEPS, KEPT = 3, 20, 0.25, 50, (1, 20, 21, 50)
SETTINGS = {"lr": 0.02, "betas": (0.9, 0.999), "weight_decay": 0.1}
_SVD = torch.linalg.svd


def signed_svd(matrix: torch.Tensor, full_matrices: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch's, with the largest entry of each left vector positive."""
    u, s, v = _SVD(matrix, full_matrices=full_matrices)
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    return u * signs, s, v * signs.T


def problem(shape: tuple[int, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    draw = lambda *size: torch.randn(*size, generator=generator)
    return {"A": draw(shape[0], shape[0]), "B": draw(*shape), "start": draw(*shape)}


def loss(weight: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return 0.5 * (given["A"] @ (weight - given["B"])).square().mean()


def main(directory: Path) -> None:
    adamw = _alone(directory)
    torch.linalg.svd = signed_svd  # type: ignore[assignment]
    generator, found = torch.Generator().manual_seed(7), {}
    for shape in SHAPES:
        given = problem(shape, generator)
        found.update({f"{shape[0]}x{shape[1]}.{name}": tensor for name, tensor in given.items()})
        for side in SIDES:
            weight = torch.nn.Parameter(given["start"].clone())
            group = {"params": [weight], "rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "proj_type": side}
            optimizer = adamw.AdamW([group], **SETTINGS, no_deprecation_warning=True)
            for step in range(1, STEPS + 1):
                optimizer.zero_grad()
                loss(weight, given).backward()
                optimizer.step()
                if step in KEPT:
                    found[f"{shape[0]}x{shape[1]}.{side}.{step}"] = weight.detach().clone()
    save_file(found, Path(__file__).parent / "galore" / "adamw.safetensors")


def _alone(directory: Path) -> Any:
    """Two files of the package, without its __init__."""
    package = types.ModuleType("galore_torch")
    package.__path__ = [str(directory / "galore_torch")]
    sys.modules["galore_torch"] = package
    spec = importlib.util.spec_from_file_location("galore_torch.adamw", directory / "galore_torch" / "adamw.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(made)
    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]))
