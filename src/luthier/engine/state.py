"""What changes while a run goes on, besides weights and moments: numbers small enough for JSON.

Everything that a decision of the loop depends on is here, because a resumed run must decide the same: how far it
is, which evaluation was done, the best so far, the guard's window, the microbatch split, the thread count.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.contracts.errors import CheckpointError
from luthier.contracts.method import trains
from luthier.models.weights import is_packed


@dataclass
class TrainState:
    step: int = 0  # optimizer steps done or skipped
    passed_over: int = 0  # steps of data left out by rollbacks: step s reads the stream at s - 1 + passed_over
    evaluated: int = 0  # the step of the last evaluation
    eval_loss: float | None = None  # of the last evaluation, None where not finite
    best_loss: float | None = None
    best_step: int | None = None
    skips: list[int] = field(default_factory=list)  # steps the guard refused, within its window
    rollbacks: int = 0
    microbatch_tokens: int | None = None  # the split now, halved when memory ran out
    recompute: bool = False  # activations are computed again in backward
    threads: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    loss_scale: float = 1.0  # of the next step (engine/scaler.py); 1 where nothing is scaled
    good_steps: int = 0  # since it last changed

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TrainState:
        names = {entry.name for entry in fields(cls)}
        if set(record) != names:
            raise CheckpointError("the saved state has other fields", value=sorted(set(record) ^ names))
        return cls(**record)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint carries of the model: trainable parameters and persistent buffers, by their names.

    The scales of packed weights are part of the base, which no checkpoint carries.

    `named_parameters` names a tied tensor once, so tied weights stay one object through save and load.
    """
    tensors = {name: p.detach() for name, p in model.named_parameters() if trains(p)}
    scales = {f"{path}.{name}" for path, base in model.named_modules() if is_packed(base) for name in base._buffers}
    kept = set(model.state_dict(keep_vars=True)) - scales
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `trained_tensors`: same names, shapes and types, or CheckpointError; written in place."""
    here = trained_tensors(model)
    if set(here) != set(tensors):
        raise CheckpointError("the checkpoint trains other tensors", value=sorted(set(here) ^ set(tensors))[:5])
    for name, target in here.items():
        source = tensors[name]
        if source.shape != target.shape or source.dtype != target.dtype:
            raise CheckpointError(
                f"{name} is {source.dtype} {tuple(source.shape)} in the checkpoint",
                value=f"{target.dtype} {tuple(target.shape)} in the model",
            )
        with torch.no_grad():
            target.copy_(source)


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(torch generators as uint8 tensors, Python's and numpy's as JSON numbers)."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (other libraries use it)
    numbers = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }
    return tensors, numbers


def load_random_state(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Inverse of `random_state`, for the devices that are here."""
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
