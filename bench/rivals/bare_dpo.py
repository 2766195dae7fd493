"""DPO by transformers + PEFT in a bare loop: chosen and rejected padded together, full logits, log-softmax, gather.

    loss = -log sigmoid(beta ((logp_c - ref_c) - (logp_r - ref_r))), mean over the pairs of the step

The reference is the model with its adapter disabled, run in the same step without gradient; `cached` runs it over
all pairs before the first step. What a careful person writes without a trainer.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import protocol, work
from bench.rivals.bare_loop import Loop, padded


def steps(settings: dict[str, Any]) -> Generator[protocol.Reply, None, protocol.Reply]:
    torch.set_num_threads(settings["threads"])
    pairs = work.make_pairs(settings["rows"], settings["vocabulary"], longest=settings["longest"])
    loop = Loop(settings)
    batches = [[pairs[index] for index in plan] for plan in settings["plan"]]
    known = [reference(loop.model, batch) for batch in batches] if settings["cached"] else None
    yield {}
    for number, batch in enumerate(batches):
        base = known[number] if known else reference(loop.model, batch)
        loss = dpo_loss(answer_logprobs(loop.model, batch), base)
        loss.backward()
        loop.update()
        yield {"loss": loss.item()}
    return {"tensors": work.save_trained(loop.model, settings)}


def reference(model: Any, batch: Sequence[work.Pair]) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        return answer_logprobs(model, batch)


def answer_logprobs(model: Any, batch: Sequence[work.Pair]) -> Tensor:
    """Summed log-probability of each answer: all chosen, then all rejected."""
    rows = [(pair.prompt + pair.chosen, len(pair.prompt)) for pair in batch]
    rows += [(pair.prompt + pair.rejected, len(pair.prompt)) for pair in batch]
    ids, mask, labels = padded(rows)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    found = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (found * (targets >= 0)).sum(-1)


def dpo_loss(policy: Tensor, base: Tensor) -> Tensor:
    chosen, rejected = (policy - base).chunk(2)
    return -F.logsigmoid(work.BETA * (chosen - rejected)).mean()


if __name__ == "__main__":
    protocol.serve(steps)
