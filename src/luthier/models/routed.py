"""Modules of a mixture of low-rank experts: the router, the experts beside a linear, the block that routes for them.

    RoutedBlock   around a feed-forward block: its router reads the block's input, the gates lie ready for the experts
                  on the linears inside for the time of the call
    Experts       the delta of one linear (models/expert_mixture.py), with gates from its block or a router of its own

The router is fp32 whatever the base is. Its balance loss is no term of the graph: while a step is open (`begin`), a
node on the logits passes them through, and in the backward pass counts them and adds the term's gradient. So it
counts each microbatch once, recomputed activations or not, and nothing in evaluation or under no_grad.

    L = a E sum_e f_e P_e + z sum_t w_t logsumexp_t^2 / W        over all tokens of the step, W of them
    dL/dp_te = a E w_t f'_e / W                                  f' the load of the step BEFORE (buffer `load_E`)

With f of this step the gradient of the first microbatch would need the last one's counts. With f' every term is a sum
over tokens with a divisor known beforehand, so the split into microbatches, packing and shared prompts (a token
counts once for each path through it, w_t) cannot change the result; f' starts even, where the term pulls nowhere. The
loss as reported is the exact one of the step, and the gradient carries fp16's loss scale (models/loss_scale.py).
Buffered counts are usual where steps are accumulated (arXiv:2501.11873).
Left out: linears that see a part of the tokens (experts in a list), which the method refuses.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from luthier.contracts.errors import ModelError
from luthier.models.attention import forest_now
from luthier.models.expert_mixture import balance_gradient, balance_loss, mix_experts, route, routed
from luthier.models.loss_scale import loss_scale
from luthier.models.sites import Site, features

_DEVIATION = 0.02  # of a fresh router


class Router(nn.Module):
    """W_r (E, D) and what it gathers: the load of the last step (a persistent buffer), the sums of the open one."""

    float32_only: ClassVar[bool] = True
    load_E: Tensor
    counts_E: Tensor
    probabilities_E: Tensor
    squares: Tensor

    def __init__(self, width: int, experts: int, top_k: int, place: torch.device) -> None:
        super().__init__()
        drawn = torch.empty(experts, width, device=place if place.type == "meta" else "cpu")
        self.weight = nn.Parameter(nn.init.normal_(drawn, std=_DEVIATION).to(place))
        self.top_k, self.renormalise, self.jitter = top_k, True, 0.0
        self.balance_coefficient = self.z_coefficient = 0.0
        self.tokens: float | None = None  # of the open step; None outside one
        self.register_buffer("load_E", torch.full((experts,), top_k / experts, device=place))
        for name in ("counts_E", "probabilities_E"):
            self.register_buffer(name, torch.zeros(experts, device=place), persistent=False)
        self.register_buffer("squares", torch.zeros((), device=place), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """gates_TE of the rows of x (..., D)."""
        with torch.autocast(x.device.type, enabled=False):
            x_TD = x.reshape(-1, x.shape[-1]).float()
            if self.training and self.jitter:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
            logits_TE: Tensor = functional.linear(x_TD, self.weight)
            if self.tokens is not None and torch.is_grad_enabled():
                logits_TE = _Balanced.apply(logits_TE, self, _times(logits_TE))  # type: ignore[no-untyped-call]
            return route(logits_TE, self.top_k, self.renormalise)

    def begin(self, tokens: float) -> None:
        """A step over so many tokens; what an attempt at it left is dropped."""
        self.tokens = tokens
        for sums in (self.counts_E, self.probabilities_E, self.squares):
            sums.zero_()

    def end(self) -> None:
        """The step is done: its load is what the next one is balanced by."""
        if self.tokens is not None:
            self.load_E.copy_(self.counts_E / self.tokens)
            self.tokens = None

    def loss(self) -> Tensor:
        """Balance and z-loss of the open step, so far as its backward passes have come; no gradient."""
        assert self.tokens is not None
        balance = balance_loss(self.counts_E, self.probabilities_E, self.tokens)
        return self.balance_coefficient * balance + self.z_coefficient * self.squares / self.tokens

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"lora_router.weight": self.weight, "lora_router.load": self.load_E}


def _times(logits_TE: Tensor) -> Tensor | None:
    """How often each token counts: the paths through it in a packed forest; None: once."""
    forest = forest_now()
    if forest is None:
        return None
    if forest.tokens != len(logits_TE):
        raise ModelError("a router must see every token of a step, and one here sees a part of them",
                         value=f"{len(logits_TE)} rows of {forest.tokens}",
                         remedy="leave out linears that only some tokens reach (method.exclude_modules)")  # fmt: skip
    if forest.roots_only:
        return None
    lengths = [end - start for start, end in zip(forest.start, forest.end, strict=True)]
    paths_S = torch.tensor(forest.paths_S, dtype=torch.float32)
    return paths_S.repeat_interleave(torch.tensor(lengths)).to(logits_TE.device)


class _Balanced(torch.autograd.Function):
    """Logits as they are; the backward pass counts them and adds the gradient of the step's balance and z-loss.

    The weights are an attribute, not a saved tensor: a recompute runs outside the context that they were read from.
    """

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, router: Router, weights_T: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits_TE)
        ctx.router, ctx.weights_T, ctx.scale = router, weights_T, loss_scale()
        return logits_TE.view_as(logits_TE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor | None, None, None]:
        router, weights_T = ctx.router, ctx.weights_T
        if router.tokens is None:
            return dlogits_TE, None, None
        (logits_TE,) = ctx.saved_tensors
        found = routed(logits_TE, router.top_k, weights_T)
        router.counts_E += found.counts_E
        router.probabilities_E += found.probabilities_E
        router.squares += found.squares
        balance = router.balance_coefficient / router.tokens * ctx.scale
        z = router.z_coefficient / router.tokens * ctx.scale
        added_TE = balance_gradient(logits_TE, router.load_E, balance, z)
        return dlogits_TE + (added_TE if weights_T is None else added_TE * weights_T[:, None]), None, None


class Given:
    """Where a block lays the gates for the experts inside it, for the time of one call."""

    gates_TE: Tensor | None = None


class RoutedBlock(Site):
    """A feed-forward block whose experts share one router, the delta: it reads the block's input."""

    def __init__(self, base: nn.Module, delta: Router, given: Given) -> None:
        super().__init__(base)
        self.delta, self.given = delta, given
        delta.train(base.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.on:
            return self.base_layer(*args, **kwargs)
        self.given.gates_TE = self.delta(args[0] if args else kwargs["hidden_states"])
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            self.given.gates_TE = None


class Experts(nn.Module):
    """E low-rank pairs beside one linear: lora_A (E, R, D), lora_B (E, O, R)."""

    scale: float
    dropout: float = 0.0

    def __init__(self, base: nn.Module, experts: int, rank: int, gates: Router | Given) -> None:
        """A as LoRA's, B zero: drawn in fp32 by torch's CPU generator, so that every device starts alike."""
        super().__init__()
        place = next(base.parameters()).device
        inputs, outputs = features(base)
        drawn = torch.empty(experts, rank, inputs, device=place if place.type == "meta" else "cpu")
        for a_RD in drawn:
            nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5))
        self.lora_A = nn.Parameter(drawn.to(place))
        self.lora_B = nn.Parameter(torch.zeros(experts, outputs, rank, device=place))
        self.router = gates if isinstance(gates, Router) else None
        self.given = gates if isinstance(gates, Given) else None

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        gates_TE = self.router(x) if self.router is not None else self._given(x)
        dropped = functional.dropout(x, self.dropout) if self.training and self.dropout else x
        return mix_experts(y, dropped, gates_TE, self.lora_A, self.lora_B, self.scale)

    def _given(self, x: Tensor) -> Tensor:
        gates_TE = None if self.given is None else self.given.gates_TE
        if gates_TE is None or len(gates_TE) != x.numel() // x.shape[-1]:
            raise ModelError("a linear with experts is called outside its block, or with other rows than the block's",
                             value=None if gates_TE is None else f"{tuple(x.shape)} for {len(gates_TE)} gates",
                             remedy="use router_scope: linear, or leave it out (method.exclude_modules)")  # fmt: skip
        return gates_TE

    def peft_tensors(self) -> dict[str, Tensor]:
        """Expert by expert, and the router where it is this linear's own."""
        found = {} if self.router is None else self.router.peft_tensors()
        for name in ("lora_A", "lora_B"):
            found |= {f"{name}.{e}.weight": one for e, one in enumerate(getattr(self, name).detach())}
        return found


def routers(model: nn.Module) -> list[Router]:
    """All routers, in model order."""
    return [module for module in model.modules() if isinstance(module, Router)]
