"""transformers (+ PEFT) in a bare loop: padded rows, full logits, torch's cross-entropy, AdamW, clipping.

What a careful person writes without a trainer: nothing of TRL's cost, nothing of packing. Settings: bench/work.py.
The whole step is one padded batch, or `rows_per_batch` rows at a time where that does not fit a machine's memory.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import protocol, work


def steps(settings: dict[str, Any]) -> Generator[protocol.Reply, None, protocol.Reply]:
    torch.set_num_threads(settings["threads"])
    rows = work.rows_of(settings)
    loop = Loop(settings)
    yield {}
    for plan in settings["plan"]:
        chosen = [rows[index] for index in plan]
        weight = sum(len(row.ids) - row.prompt for row in chosen)
        together, loss = settings.get("rows_per_batch") or len(plan), 0.0
        for first in range(0, len(plan), together):
            part = row_losses(loop.model, chosen[first : first + together]) / weight
            part.backward()
            loss += part.item()
        loop.update()
        yield {"loss": loss}
    return {"tensors": work.save_trained(loop.model, settings)}


class Loop:
    """Model, what of it trains, AdamW, and the end of a step."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.model, adapter = work.opened(settings)
        if adapter is not None:
            from peft import get_peft_model

            self.model = get_peft_model(self.model, adapter)
            work.fill_adapter(work.peft_tensors(self.model))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=settings["learning_rate"], **work.ADAM)
        self.model.train()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, work.MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


def row_losses(model: Any, rows: Sequence[work.Row]) -> Tensor:
    """Sum over the trained tokens of a padded batch."""
    ids, mask, labels = padded([(row.ids, row.prompt) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def padded(rows: Sequence[tuple[Sequence[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, labels) of (ids, prompt length) rows; prompts and padding are labelled -100."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), width), work.PAD)
    mask, labels = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -100)
    for index, (ids, prompt) in enumerate(rows):
        ids_BT[index, : len(ids)] = torch.tensor(ids)
        mask[index, : len(ids)] = 1
        labels[index, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return ids_BT, mask, labels


if __name__ == "__main__":
    protocol.serve(steps)
