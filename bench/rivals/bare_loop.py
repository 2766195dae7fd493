"""transformers + PEFT in a bare loop: padded rows, full logits, torch's cross-entropy, AdamW, clipping.

What a careful person writes without a trainer: nothing of TRL's cost, nothing of packing. Settings: bench/work.py.
Leaves out gradient accumulation: the whole step is one padded batch.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import protocol, work


def steps(settings: dict[str, Any]) -> Generator[protocol.Reply, None, protocol.Reply]:
    from peft import get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(settings["threads"])
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32), work.lora_config()
    )
    work.fill_adapter(work.peft_tensors(model))
    rows = work.make_rows(settings["rows"], settings["vocabulary"], longest=settings["longest"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **work.ADAM)
    model.train()
    yield {}
    for plan in settings["plan"]:
        loss = model_loss(model, [rows[index] for index in plan])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, work.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield {"loss": loss.item()}
    file = str(Path(settings["directory"]) / "bare.safetensors")
    save_file({name: tensor.detach().contiguous() for name, tensor in work.peft_tensors(model).items()}, file)
    return {"tensors": file}


def model_loss(model: Any, rows: list[work.Row]) -> torch.Tensor:
    """Mean over the trained tokens of a padded batch."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), work.PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask[index, : len(row.ids)] = 1
        labels[index, row.prompt : len(row.ids)] = torch.tensor(row.ids[row.prompt :])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


if __name__ == "__main__":
    protocol.serve(steps)
