"""What SFT alone promises: transformers' own loss over accumulation, and its limits."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.contracts.objective import Scored
from luthier.data.collate import collate
from luthier.objectives.sft import SFT, sft_loss
from objectives.rig import rows


def test_sft_equals_transformers_loss_over_accumulation() -> None:
    """ForCausalLMLoss(num_items_in_batch=all trained tokens), one padded batch, values and gradients."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    samples, vocabulary = rows("Row", 6, (1.0,)), 50
    longest = max(sample.length for sample in samples)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(len(samples), longest, vocabulary, generator=generator).requires_grad_()
    labels = torch.full((len(samples), longest), -100)
    for index, sample in enumerate(samples):
        piece = sample.pieces[0]
        trained = torch.tensor(piece.weights) > 0
        labels[index, : sample.length][trained] = torch.tensor(piece.tokens)[trained]
    items = int((labels != -100).sum())
    theirs = ForCausalLMLoss(logits, labels, vocabulary, num_items_in_batch=items)
    (their_gradient,) = torch.autograd.grad(theirs, logits)
    batches = [collate(samples[:2]), collate(samples[2:])]
    weight = sum(SFT().weight(batch) for batch in batches)
    ours = torch.zeros(())
    for batch in batches:
        segment_row = [batch.samples[sample] for sample in batch.segment_sample]
        place = [(segment_row[s], i) for s, (a, b) in enumerate(zip(batch.forest.start, batch.forest.end, strict=True))
                 for i in range(b - a)]  # fmt: skip
        rows_N, places_N = zip(*[place[i] for i in batch.scored_N.tolist()], strict=True)
        logprobs = logits[list(rows_N), list(places_N)].log_softmax(-1)
        scored = Scored(logprobs.gather(1, batch.targets_N[:, None])[:, 0])
        ours = ours + SFT().loss(scored, batch, None).total / weight
    (our_gradient,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-8)


def test_sft_limits() -> None:
    assert float(sft_loss(torch.zeros(5), torch.ones(5))) == 0.0  # certain of every token
    uniform = torch.full((7,), -math.log(300))
    assert float(sft_loss(uniform, torch.ones(7)) / 7) == pytest.approx(math.log(300))
