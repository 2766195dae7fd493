"""What the tests of ReFT share: a method of every variant, models with one attached, batches with longer prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.collate import collate
from luthier.methods.direft import DiReFT
from luthier.methods.loreft import LoReFT
from luthier.models.reft import Intervention
from methods.rig import base, train

VARIANTS = [LoReFT(variant=v) for v in LoReFT.variants] + [DiReFT(variant=v) for v in DiReFT.variants]


OTHERS = [
    LoReFT(positions="f3", dropout=0.0), LoReFT(positions="l2", layers=(1,)), LoReFT(positions="all", r=2),
    LoReFT(positions="f2+l5", share_weights=True, layers=(0,)), DiReFT(act_fn="gelu", r=8),
]  # fmt: skip


ALL = [*VARIANTS, *OTHERS]


named = lambda method: f"{method.variant}-{method.positions}-{method.act_fn}"


def attached(method: LoReFT, family: str = "llama", steps: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = base(family)
    method.attach(model)
    train(method, model, steps)
    return model


def samples_of(*sizes: tuple[int, int], seed: int = 8) -> list[Sample]:
    """Rows of (prompt, answer) tokens."""
    made = torch.Generator().manual_seed(seed)
    samples = []
    for index, (prompt, answer) in enumerate(sizes):
        tokens = torch.randint(0, 256, (prompt + answer,), generator=made).tolist()
        piece = Piece(tokens, [0.0] * prompt + [1.0] * answer)
        samples.append(Sample((piece,), Source("rows.jsonl", index + 1), id=index))
    return samples


def batch_of(*sizes: tuple[int, int]) -> Batch:
    return collate(samples_of(*sizes))


LONG = ((16, 3), (5, 4), (1, 6), (21, 2))


def gradients(model: nn.Module, total: Tensor) -> list[Tensor]:
    grown = [p for p in model.parameters() if p.requires_grad]
    return [torch.zeros_like(p) if g is None else g
            for p, g in zip(grown, torch.autograd.grad(total, grown, allow_unused=True), strict=True)]  # fmt: skip


def same_numbers(found: Any, expected: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


def part_of(model: nn.Module, layer: int, place: str) -> Intervention:
    found = model.model.layers[layer].delta.parts[place]
    assert isinstance(found, Intervention)
    return found
