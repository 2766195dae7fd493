"""The loops behind models/logprobs.py on a GPU: all columns of some rows, softmax and derivative by one kernel.

    z = h W^T (a product)  ->  logprob, and d logprob / d z over z in its place (kernels/triton_softmax.py)
      ->  d h = pull W,  dW = pull^T h (products)

A GPU has no cache to tile for and its products want many columns, so a chunk is some rows with the whole vocabulary,
in the dtype that computes: one chunk of memory, two or three products. The target's logit is read where the norm's
are, so that rounding to bfloat16 shifts both alike. float16 has no numbers below 6e-8, and a softmax over a large
vocabulary has: where the loss scale is not in the derivative yet (it is made in the forward pass), the pull is 256
times as large in the products and their results are taken back. The functions are those of logprob_tiles.py, which
serves the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from luthier.models.kernels import gpu
from luthier.models.kernels.triton_softmax import softmax_pull_, softmax_pull_plain_
from luthier.models.logprob_tiles import Gradients, Head

_LIFT = 256.0


def values(head: Head, hidden_ND: Tensor, targets_N: Tensor, jacobian_ND: Tensor | None) -> tuple[Tensor, Tensor]:
    """(logprobs_N, norm_N), and d logprob / d hidden into `jacobian_ND` where it is given."""
    logprobs_N, norm_N = (hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(2))
    lift = _lift(hidden_ND)
    lifted_N = None if lift == 1.0 else torch.full_like(norm_N, lift)
    for part, raw in _chunks(head, hidden_ND):
        grad = None if lifted_N is None else lifted_N[part]
        logprobs_N[part], norm_N[part] = _pull_(head, raw, targets_N[part], grad, jacobian_ND is not None)
        if jacobian_ND is not None:
            _product(raw, head.weight_VD, jacobian_ND[part], lift)
    return logprobs_N, norm_N


def stored(head: Head, hidden_ND: Tensor, targets_N: Tensor, grad_N: Tensor, into: Gradients) -> Tensor:
    """logprobs_N, and into `into` the gradients of sum_n grad_n logprob_n."""
    return _stored(head, hidden_ND, targets_N, grad_N, into, _lift(hidden_ND))


def _stored(head: Head, hidden_ND: Tensor, targets_N: Tensor, grad_N: Tensor, into: Gradients, lift: float) -> Tensor:
    logprobs_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
    for part, raw in _chunks(head, hidden_ND):
        logprobs_N[part], _ = _pull_(head, raw, targets_N[part], grad_N[part] * lift, True)
        if into.hidden_ND is not None:
            _product(raw, head.weight_VD, into.hidden_ND[part], lift)
        if into.weight_VD is not None:
            rows = hidden_ND[part] if lift == 1.0 else hidden_ND[part] / lift
            head.add_product(into.weight_VD, raw.t(), rows, fresh=part.start == 0 and not into.begun)
        if into.bias_V is not None:
            summed = raw.sum(0, dtype=torch.float32) / lift
            into.bias_V.copy_(summed if part.start == 0 else into.bias_V + summed)
    return logprobs_N


def again(head: Head, hidden_ND: Tensor, targets_N: Tensor, norm_N: Tensor, grad_N: Tensor, into: Gradients) -> None:
    """The gradients from a second pass; the norm comes out of the kernel's first pass anyway."""
    _stored(head, hidden_ND, targets_N, grad_N, into, 1.0)


def _chunks(head: Head, hidden_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their raw logits, in a buffer that the next chunk overwrites."""
    size = max(1, min(head.tile.rows, len(hidden_ND)))
    buffer = torch.empty(size, len(head.weight_VD), dtype=hidden_ND.dtype, device=hidden_ND.device)
    for first in range(0, len(hidden_ND), size):
        part = slice(first, min(first + size, len(hidden_ND)))
        raw = buffer[: part.stop - part.start]
        yield part, torch.mm(hidden_ND[part], head.weight_VD.t(), out=raw)


def _pull_(head: Head, raw: Tensor, targets: Tensor, grad: Tensor | None, pull: bool) -> tuple[Tensor, Tensor]:
    made = softmax_pull_ if gpu.refusal(raw) is None else softmax_pull_plain_
    return made(raw, targets, head.bias_V, (head.head_map.scale, head.head_map.softcap), grad, pull=pull)


def _lift(hidden: Tensor) -> float:
    return _LIFT if hidden.dtype == torch.float16 else 1.0


def _product(left: Tensor, right: Tensor, into: Tensor, lift: float) -> None:
    if into.dtype == left.dtype:
        torch.mm(left, right, out=into)
    else:
        into.copy_(left @ right)
    if lift != 1.0:
        into.div_(lift)
