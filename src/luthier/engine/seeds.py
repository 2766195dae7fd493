"""Random streams are counters: the generator is reseeded from (seed, step) before every step.

So dropout is a pure function of the step number: a resume needs no generator state, and evaluation, saving
or a reader of events cannot shift training. `deterministic` asks torch for kernels whose sums have one order
(on a CPU, accumulating index writes are otherwise parallel and unordered).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*counters: int | str) -> int:
    """63 bits from any counters, the same on every machine."""
    text = "\x1f".join(str(counter) for counter in counters)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_step(seed: int, step: int) -> None:
    torch.manual_seed(seed_of("step", seed, step))


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Ordered sums on a CPU for the time of the run; on a GPU torch's defaults stay."""
    if device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
