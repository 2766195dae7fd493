"""Incremental PCA against PEFT's and against the PCA of all rows at once; sharing ranks; what is settled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.models import row_pca

MOST = 5


def batches(count: int = 6, rows: int = 40, width: int = 16) -> list[Tensor]:
    """Rows with a mean, a drift of it, and directions of falling weight."""
    generator = torch.Generator().manual_seed(0)
    turned, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    weights = 0.7 ** torch.arange(width)
    draw = lambda n: (torch.randn(rows, width, generator=generator) * weights) @ turned + 1 + 0.1 * n
    return [draw(n) for n in range(count)]


def test_it_is_pefts() -> None:
    pca = pytest.importorskip("peft.utils.incremental_pca")
    theirs, known = pca.IncrementalPCA(n_components=MOST), None
    for rows in batches():
        theirs.partial_fit(rows.clone())
        known = row_pca.take(known, rows, MOST)
        torch.testing.assert_close(known.directions_ND, theirs.components_.float(), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(known.singular_N, theirs.singular_values_.float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(known.mean_D, theirs.mean_, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(known.variance_D, theirs.var_, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(known.explained_N, theirs.explained_variance_ratio_.double(), atol=1e-4, rtol=1e-3)


def test_all_directions_kept_is_the_pca_of_all_rows() -> None:
    known, width = None, 16
    for rows in batches():
        known = row_pca.take(known, rows, width)
    together = torch.cat(batches()).double()
    _, singular, directions = torch.linalg.svd(together - together.mean(0), full_matrices=False)
    torch.testing.assert_close(known.singular_N.double(), singular, atol=1e-4, rtol=1e-4)
    assert (known.directions_ND.double() * directions).sum(1).abs().min() > 0.9999
    torch.testing.assert_close(known.explained_N.sum(), torch.tensor(1.0, dtype=torch.float64), atol=1e-5, rtol=0)


def test_wide_rows_at_random_find_the_same_and_disturb_nothing() -> None:
    rows = batches(1, rows=400, width=64)[0]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    made = row_pca.take(None, rows, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert min(rows.shape) > 4 * 2 * 4  # not decomposed exactly
    _, singular, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    torch.testing.assert_close(made.singular_N, singular[:4], atol=1e-3, rtol=1e-3)
    assert (made.directions_ND * directions[:4]).sum(1).abs().min() > 0.999


def test_settled_is_what_did_not_turn() -> None:
    first = row_pca.take(None, batches()[0], MOST)
    assert not row_pca.settled(None, first).any()
    assert row_pca.settled(first, first).all()
    known = first
    for rows in batches(30)[1:]:
        before, known = known, row_pca.take(known, rows, MOST)
    assert row_pca.settled(before, known).all()


def test_ranks_go_where_most_is_explained() -> None:
    layers = [torch.tensor([0.9, 0.05]), torch.tensor([0.4, 0.3]), torch.tensor([0.01, 0.001])]
    assert row_pca.share(layers, 3) == [1, 2, 0]
    assert row_pca.share(layers, 4) == [2, 2, 0]
    assert row_pca.share([layers[0], layers[0]], 3) == [2, 1]  # equal ones in the order of layers
    assert sum(row_pca.share(layers, 6)) == 6
