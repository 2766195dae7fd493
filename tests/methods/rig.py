"""What the tests of methods share: tiny bases made once, a few training steps, batches of plain rows."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.contracts.method import Method
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.pack import collate
from tiny import VOCABULARY, tiny

FAMILIES = ("llama", "qwen2", "gpt2", "qwen3_moe")
TOKENS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


@cache
def _made(family: str, tied: bool) -> nn.Module:
    changes = {"tie_word_embeddings": True} if tied and family != "gpt2" else {}
    return tiny(family, **changes)


def base(family: str, *, tied: bool = False) -> nn.Module:
    """A fresh copy of the family's tiny model (gpt2 is always tied)."""
    return copy.deepcopy(_made(family, tied))


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def loss(model: nn.Module) -> Tensor:
    scores = model(input_ids=TOKENS).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(scores.float(), TOKENS[:, 1:].flatten())


def optimizer(method: Method, model: nn.Module) -> torch.optim.Optimizer:
    keys = ("params", "weight_decay")
    groups = [{key: group[key] for key in keys if key in group} for group in method.groups(model)]
    return torch.optim.AdamW(groups, lr=10 * method.default_learning_rate)


def train(method: Method, model: nn.Module, steps: int = 3, *, first: int = 0, optim: object = None) -> None:
    """Steps in the engine's order: backward, penalty, step, after_step, zero."""
    optim = optim or optimizer(method, model)
    for step in range(first, first + steps):
        (loss(model) + method.penalty(model)).backward()
        optim.step()
        method.after_step(model, step + 1, 10)
        optim.zero_grad()


def stir(model: nn.Module, scale: float = 0.1) -> None:
    """Every trainable tensor moved by seeded noise."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)


def sample(tokens: list[int], index: int) -> Sample:
    piece = Piece(tokens, [0.0] + [1.0] * (len(tokens) - 1))
    return Sample((piece,), Source("rows.jsonl", index + 1), id=index)


def rows_as_batches() -> tuple[Batch, list[Batch]]:
    """(all rows packed in one batch, each row alone)."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (7, 3, 11)]
    samples = [sample(row, i) for i, row in enumerate(rows)]
    return collate(samples), [collate([one]) for one in samples]
