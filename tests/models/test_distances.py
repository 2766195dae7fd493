"""Squared distances: each fast form beside its plain twin, values and gradients, and memory in chunks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from luthier.models import distances
from luthier.models.distances import (
    distance,
    distance_plain,
    product_distance,
    product_distance_plain,
    product_square,
    product_square_plain,
)


def drawn(*shape: int, seed: int = 0, grown: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grown)


def same_as_its_twin(one: Callable[..., Tensor], other: Callable[..., Tensor], *args: Tensor | float | None) -> None:
    grown = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    a, b = one(*args), other(*args)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(3.0 * value, grown) for value in (a, b)]
    for mine, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_distance(weighted: bool) -> None:
    weight = drawn(6, 5, seed=2).abs() if weighted else None
    same_as_its_twin(distance, distance_plain, drawn(6, 5, grown=True), drawn(6, 5, seed=1), weight)


def test_distance_to_zero() -> None:
    same_as_its_twin(distance, distance_plain, drawn(6, 5, grown=True), torch.zeros(()), None)


def test_product_square() -> None:
    same_as_its_twin(
        product_square, product_square_plain, drawn(3, 7, grown=True), drawn(9, 3, seed=1, grown=True), 0.5
    )


@pytest.mark.parametrize("numbers", [1, 21, 1 << 20])
def test_product_distance_in_chunks(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_CHUNK_NUMBERS", numbers)
    weight = drawn(9, 7, seed=3).abs()
    a, b = drawn(3, 7, grown=True), drawn(9, 3, seed=1, grown=True)
    same_as_its_twin(product_distance, product_distance_plain, a, b, 2.0, weight)
    same_as_its_twin(product_distance, product_distance_plain, a, b, 2.0, drawn(7, 9, seed=3).abs().T)


def test_weights_of_half_precision_are_measured_in_full() -> None:
    w = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
    start = torch.full((1000,), 0.99609375, dtype=torch.bfloat16)
    found = distance(w, start)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(1000 * (1 - 0.99609375) ** 2, rel=1e-5)
    (slope,) = torch.autograd.grad(found, w)
    assert slope.dtype == torch.bfloat16
