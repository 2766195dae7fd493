"""Forest attention in one flash call on CUDA: torch's variable-length attention with gathered keys.

Queries are the packed rows as they are. Keys and values are gathered along every segment's chain, so segment s
has lengths (own rows, rows of its whole chain); the kernel aligns the causal diagonal to the lower right corner,
which is exactly "causal to itself, full to its ancestors". A window of w positions is (w - 1, 0) there.
Left to the per-segment path: float32, soft caps, sinks, chunks, attention dropout, heads wider than 256.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.contracts.batch import Forest


@dataclass(frozen=True, eq=False)
class VarlenPlan:
    """Lengths and the key gather of a forest; tensors are made once per device."""

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    key_rows: tuple[int, ...] | None  # None: keys are the packed rows themselves (roots only)
    _made: dict[torch.device, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(forest: Forest) -> VarlenPlan:
        own = tuple(end - start for start, end in zip(forest.start, forest.end, strict=True))
        if forest.roots_only:
            return VarlenPlan(own, own, None)
        chains = [forest.chain(segment) for segment in range(len(forest))]
        rows = tuple(row for c in chains for s in c for row in range(forest.start[s], forest.end[s]))
        return VarlenPlan(own, tuple(sum(own[s] for s in chain) for chain in chains), rows)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        if device not in self._made:
            rows = None if self.key_rows is None else torch.tensor(self.key_rows, device=device)
            self._made[device] = (_cumulative(self.query_lengths, device), _cumulative(self.key_lengths, device), rows)
        return self._made[device]


def varlen_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the one-call kernel cannot be used here, or None where it can."""
    if device.type != "cuda":
        return f"no variable-length kernel on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the variable-length kernel has no {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the variable-length kernel needs compute capability 8.0"
    return None


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, window: int | None, scaling: float | None
) -> Tensor:
    """(1, H, T, D), (1, K, T, D), (1, K, T, E) in, (T, H, E) out."""
    from torch.nn.attention.varlen import varlen_attn

    width = value.shape[-1]
    if width < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    ends_q, ends_k, rows = plan.on(query.device)
    if rows is not None:
        k, v = k.index_select(0, rows), v.index_select(0, rows)
    out = varlen_attn(
        q, k, v, ends_q, ends_k, max(plan.query_lengths), max(plan.key_lengths),
        scale=scaling, window_size=(window - 1 if window else -1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[..., :width]


def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    ends = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    ends[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    return ends.to(device)
