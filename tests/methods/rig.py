"""What the tests of methods share: tiny bases made once, a few training steps, batches of plain rows."""

from __future__ import annotations

import copy
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from luthier.contracts.batch import Batch
from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.collate import collate
from luthier.engine.optimizer import build_optimizer
from luthier.models.probe import open_trunk
from luthier.models.quantise import quantise
from luthier.models.trunk import Trunk, TrunkFacts
from luthier.recipe import resolve
from tiny import VOCABULARY, tiny

STORIES = Path(os.environ.get("LUTHIER_TEST_DATA", Path(__file__).resolve().parents[3] / "shared/data"))
STORIES = STORIES / "models/stories260K-chatml"
NAMES = resolve.names("methods")
Made = tuple[Method, nn.Module, str]
QUANTISED = ("llama-nf4", "llama-int8")  # the same llama in a storage format
FAMILIES = ("llama", "qwen2", "gpt2", "qwen3_moe", "stories", *QUANTISED)  # stories: small, but really trained
TOKENS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


@cache
def _made(family: str, tied: bool) -> nn.Module:
    if family == "stories":
        if not STORIES.is_dir():
            pytest.skip(f"no {STORIES}")
        return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    if family in QUANTISED:
        return quantise(tiny("llama"), family.removeprefix("llama-"))
    changes = {"tie_word_embeddings": True} if tied and family != "gpt2" else {}
    return tiny(family, **changes)


def base(family: str, *, tied: bool = False) -> nn.Module:
    """A fresh copy of the family's tiny model (gpt2 is always tied)."""
    return copy.deepcopy(_made(family, tied))


@cache
def _facts(family: str, attention: str) -> TrunkFacts:
    return open_trunk(base(family), attention=attention).facts


def trunk_of(model: nn.Module, family: str, attention: str = "auto") -> Trunk:
    """A trunk from what `open_trunk` found of the bare family, asked once."""
    return Trunk(model, _facts(family, attention))


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def loss(model: nn.Module) -> Tensor:
    scores = model(input_ids=TOKENS).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(scores.float(), TOKENS[:, 1:].flatten())


def optimizer(method: Method, model: nn.Module) -> torch.optim.Optimizer:
    """The engine's own, at ten times the method's rate and no more than 0.05: few steps must show."""
    spec = SimpleNamespace(optimizer="adamw", weight_decay=0.01, adam_betas=(0.9, 0.999))
    return build_optimizer(method, model, spec, min(0.05, 10 * method.default_learning_rate))


def train(method: Method, model: nn.Module, steps: int = 3, *, first: int = 0, optim: object = None) -> None:
    """Steps in the engine's order: before_step, begin_step, backward, penalty, step, after_step, zero."""
    optim = optim or optimizer(method, model)
    rows = collate([sample(row, i) for i, row in enumerate(TOKENS.tolist())])
    for step in range(first, first + steps):
        method.before_step(model, step + 1, 10)
        method.begin_step(model, [rows])
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


def shared_as_batches() -> tuple[Batch, list[Batch]]:
    """(two trees, each a prompt with two answers, the prompt once; the same four paths as whole rows, one a batch)."""
    generator = torch.Generator().manual_seed(6)
    draw = lambda n: torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()
    trees, paths = [], []
    for index, sizes in enumerate(((6, 4, 3), (3, 5, 2))):
        prompt, *answers = [draw(n) for n in sizes]
        root = Piece(prompt, [0.0] * len(prompt))
        leaves = [Piece(answer, [1.0] * len(answer), parent=0) for answer in answers]
        trees.append(Sample((root, *leaves), Source("trees.jsonl", index + 1), id=index, sequences=(1, 2)))
        for answer in answers:
            whole = Piece([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer))
            paths.append(Sample((whole,), Source("paths.jsonl", len(paths) + 1), id=len(paths)))
    return collate(trees), [collate([path]) for path in paths]


def rows_as_batches() -> tuple[Batch, list[Batch]]:
    """(all rows packed in one batch, each row alone)."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (7, 3, 11)]
    samples = [sample(row, i) for i, row in enumerate(rows)]
    return collate(samples), [collate([one]) for one in samples]


def refused(method: Method, model: nn.Module) -> RecipeError | None:
    """Attach, or what the method says against it."""
    try:
        method.attach(model)
    except RecipeError as error:
        return error
    return None
