"""Tables of a base with packed linears, kept in bf16 where that loses nothing: the embedding, and the head tied to it.

Published weights are bf16 numbers. Computing in fp32 they are widened, which doubles what they take; of a base in four
bits the table of a large vocabulary is then the larger part. `narrow_tables` stores a table in bf16 if every number of
it comes back the same, and gives its module a forward of its own that widens what it reads: the looked-up rows of an
embedding, a few thousand rows of a head at a time. What comes out is the same to the bit (models/logprobs.py widens
tile by tile). A table that would be rounded, or whose module does more, stays as it is; one that a method trains later
is float32 again (engine/precision.py).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_ROWS = 8192  # widened at once


def narrow_tables(model: Any) -> int:
    """Embedding and head of a float32 model; the bytes that are saved."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    saved = 0
    for weight in {id(end.weight): end.weight for end in ends if end is not None}.values():
        users = [module for module in model.modules() if module._parameters.get("weight") is weight]
        if not all(map(_is_plain, users)) or not _exact(weight):
            continue
        weight.data = weight.data.to(torch.bfloat16)
        saved += weight.numel() * 2
        for module in users:
            forward = _looked_up if isinstance(module, nn.Embedding) else _logits
            module.__dict__["forward"] = MethodType(forward, module)  # bound, so that a copy is bound to the copy
    return saved


def narrow_parameters(model: nn.Module) -> set[int]:
    """Ids of the frozen weights that are stored so."""
    narrow = [module.weight for module in model.modules() if _is_narrow(module)]
    return {id(weight) for weight in narrow if not weight.requires_grad}  # type: ignore[union-attr]


def _is_narrow(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) in (_looked_up, _logits)


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (nn.Embedding, nn.Linear) and "forward" not in module.__dict__


def _exact(weight: Tensor) -> bool:
    if weight.dtype != torch.float32:
        return False
    return all(torch.equal(rows.to(torch.bfloat16).float(), rows) for rows in weight.detach().split(_ROWS))


def _looked_up(self: nn.Embedding, ids: Tensor) -> Tensor:
    return nn.Embedding.forward(self, ids).float()


def _logits(self: nn.Linear, x: Tensor) -> Tensor:
    if self.weight.dtype == x.dtype or self.weight.requires_grad or torch.is_autocast_enabled(x.device.type):
        return nn.Linear.forward(self, x)
    parts = [functional.linear(x, rows.to(x.dtype)) for rows in self.weight.split(_ROWS)]
    made = torch.cat(parts, -1)
    return made if self.bias is None else made + self.bias.to(x.dtype)
