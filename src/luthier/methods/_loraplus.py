"""LoRA+'s groups of parameters, PEFT's four (`create_loraplus_optimizer`): which rate each tensor gets.

A           the run's rate          A of linears, and every other matrix that trains (full copies of modules)
embedding   a peak rate of its own  both matrices of an adapter on an embedding
B           ratio times the rate    B of linears, and DoRA's magnitudes (as in PEFT, weight decay reaches them)
B kept      ratio times the rate    biases and layer norms: no weight decay
"""

from __future__ import annotations

from typing import Any

from torch import nn

from luthier.contracts.method import trains
from luthier.models.sites import AdaptedEmbedding, sites


def loraplus_groups(model: nn.Module, ratio: float, embedding_rate: float) -> list[dict[str, Any]]:
    """The groups that are not empty, in the order above."""
    embedded = [site.delta for site in sites(model) if isinstance(site, AdaptedEmbedding)]
    apart = {id(p) for delta in embedded for p in delta.parameters() if p.ndim > 1}
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    made: dict[str, dict[str, Any]] = {
        "A": {},
        "embedding": {"lr": embedding_rate},
        "B": {"lr_scale": ratio},
        "B kept": {"lr_scale": ratio, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if not trains(parameter):
            continue
        kind = "embedding" if id(parameter) in apart else "A"
        if kind == "A" and ("lora_B" in name or parameter.ndim == 1):
            kind = "B kept" if "bias" in name or id(parameter) in norms else "B"
        made[kind].setdefault("params", []).append(parameter)
        made[kind].setdefault("names", []).append(name)
    return [group for group in made.values() if "params" in group]
