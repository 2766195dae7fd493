"""How much of a matrix is signal: Spectrum's ratio of singular values above and below the noise of a random matrix.

    S       singular values of W (n, m), largest first, in float32
    sigma   (q75(S) - q25(S)) / 1.349          a spread that a few large values do not move
    eps     sigma (1 + sqrt(min(n, m) / max(n, m)))          the edge of Marchenko and Pastur's law
    snr     sum of S above eps / sum of S not above it / S_max

arXiv:2406.06623. Where nothing lies below eps the divisor is 1, where what lies there is zero the ratio is infinite,
and a matrix that has no finite singular values (NaN, all zero) has the ratio NaN: it is never chosen. `scan` keeps
its results in the user's cache, under a digest of the very weights: a decomposition of each matrix takes minutes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FORMAT = 1
_NORMAL_SPREAD = 1.349  # distance of the quartiles of a standard normal


def noise_edge(values_K: Tensor, rows: int, columns: int) -> Tensor:
    """eps of a matrix of that size with these singular values (K,); a scalar."""
    upper, lower = torch.quantile(values_K, torch.tensor([0.75, 0.25], dtype=values_K.dtype, device=values_K.device))
    return (upper - lower) / _NORMAL_SPREAD * (1 + math.sqrt(min(rows, columns) / max(rows, columns)))


def signal_ratio(weight: Tensor) -> float:
    """snr of one matrix (n, m)."""
    try:
        values_K = torch.linalg.svdvals(weight.detach().float())
    except torch.linalg.LinAlgError:
        return math.nan
    largest = float(values_K[0])
    if not math.isfinite(largest) or largest == 0.0:
        return math.nan
    above = values_K > noise_edge(values_K, *weight.shape)
    signal, noise = float(values_K[above].sum()), float(values_K[~above].sum()) if bool((~above).any()) else 1.0
    return signal / noise / largest if noise else math.inf


def scan(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Name -> snr of every matrix, from the cache where these very weights were scanned before.

    Weights without values (on the meta device) all count 0.
    """
    if any(weight.is_meta for weight in weights.values()):
        return dict.fromkeys(weights, 0.0)
    file = cache_directory() / f"{digest(weights)}.json"
    kept = _read(file, set(weights))
    if kept is not None:
        return kept
    found = {name: signal_ratio(weight) for name, weight in weights.items()}
    _write(file, found)
    return found


def chosen(ratios: Mapping[str, float], percent: float, *, highest: bool) -> list[str]:
    """Of each type (the name without its layer) int(n percent / 100) names, at least one; ties by order; never NaN."""
    types: dict[str, list[str]] = {}
    for name in ratios:
        types.setdefault(type_of(name), []).append(name)
    found: list[str] = []
    for names in types.values():
        usable = [name for name in names if not math.isnan(ratios[name])]
        ranked = sorted(usable, key=lambda name: -ratios[name] if highest else ratios[name])
        found += ranked[: max(1, int(len(names) * percent / 100))]
    return found


def type_of(path: str) -> str:
    """What follows the first number in a module's path: `model.layers.3.mlp.up_proj` -> `mlp.up_proj`."""
    parts = path.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[first + 1 :])


def digest(weights: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and every bit."""
    found = hashlib.sha256(f"snr {_FORMAT}".encode())
    for name, weight in weights.items():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        bits: Any = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
        found.update(bits)
    return found.hexdigest()


def cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "luthier" / "spectrum"


def _read(file: Path, names: set[str]) -> dict[str, float] | None:
    """What an earlier scan left, None where there is none or it is not whole."""
    try:
        value: Any = json.loads(file.read_text("utf-8"))
        found = {str(name): float(ratio) for name, ratio in value.items()}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, AttributeError):
        warnings.warn(f"{file} is not a scan and is made again", stacklevel=2)
        return None
    return found if set(found) == names else None


def _write(file: Path, found: Mapping[str, float]) -> None:
    """Wholly there or not at all; a cache that cannot be written costs the next run its time, and a warning."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(dict(found), stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        warnings.warn(f"the scan is not kept: {error.strerror} {file.parent}", stacklevel=2)
