"""The tensors of packed files, asked for one linear at a time: what the readers of every packed format share.

`Places` says in which file each tensor lies; nothing is read before it is asked for, and then this tensor only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import ModelError
from luthier.models.directory import tensor_header, weight_files
from luthier.models.weights.packed import Packed

Places = dict[str, Path]  # name of a tensor -> its file


def places_of(directory: Path) -> Places:
    """Every tensor of a model's files."""
    return {name: file for file in weight_files(directory) for name in json.loads(tensor_header(file))}


def tensors_of(path: str, places: Places, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the names that a linear has."""
    found = {}
    for name in names:
        if (file := places.get(f"{path}.{name}")) is not None:
            with safe_open(file, framework="pt") as opened:
                found[name] = opened.get_tensor(f"{path}.{name}")
    return found


def misfit(path: str, value: object) -> ModelError:
    """Shapes in the files that are not the model's."""
    return ModelError("the packed weight does not fit the model", where=path, value=value,
                      remedy="is the config.json this checkpoint's?")  # fmt: skip


def turned(made: Packed, awaited: Any) -> Packed:
    """Knowing whether it stands for a Conv1D."""
    made.turned = issubclass(awaited.linear, Conv1D)
    return made
