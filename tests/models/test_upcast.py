"""The upcast law: narrow numbers only where they cost nothing. Every method, bf16 and fp16, dense and packed bases.

watched    no softmax, norm statistic, angle, exponential or logarithm is computed in bfloat16 or float16, forward
           or backward; a LayerNorm's own kernel and GPT-2's cubic gelu are float32 inside and are left out
stored     what trains is float32 (or `trained_dtype`), frozen embeddings and heads are never widened
numbers    loss within 2e-2 of float32's, gradients with a cosine above 0.99, of every tensor above 0.98
flow       gradients of activations pass through frozen and packed weights down to the first layer
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.contracts.method import trains
from luthier.engine.precision import resolve_precision, settle
from luthier.models import logprob_chunks, logprob_tiles
from luthier.models.logprob_tiles import Gradients, Head, HeadMap, Tile
from luthier.models.logprobs import token_logprobs, token_logprobs_plain
from luthier.models.loss_scale import loss_scaled
from luthier.models.probe import open_trunk
from luthier.models.quantise import densify, quantise
from luthier.models.trunk import Trunk, TrunkFacts
from luthier.models.weights import is_packed
from luthier.recipe import resolve
from methods.rig import NAMES, base, refused, rows_as_batches, stir
from tiny import tiny

CPU = torch.device("cpu")
NARROW = (torch.bfloat16, torch.float16)
STATISTICS = {
    "_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "logsumexp", "logaddexp", "exp",
    "exp_", "log", "log1p", "log_", "log_sigmoid_forward", "rsqrt", "rsqrt_", "sqrt", "sqrt_", "cos", "sin", "mean",
    "var", "var_mean", "square", "square_", "cumsum", "linalg_vector_norm", "norm", "nll_loss_forward", "rms_norm",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "addmm_", "baddbmm"}
SCALE = {"bf16": 1.0, "fp16": 2.0**16}
DAY = {
    ("lora", "llama-nf4"), ("full", "llama"), ("molora", "llama"), ("unipelt", "llama"), ("bitfit", "gpt2"),
    ("spectrum", "gpt2"), ("prefix", "llama-int8"),
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Counts statistics that read narrow numbers, and products by what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics: Counter[str] = Counter()
        self.products: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.overloadpacket.__name__, [a for a in args if isinstance(a, Tensor)]
        if name in STATISTICS and any(tensor.dtype in NARROW for tensor in given):
            self.statistics[name] += 1
        if name in PRODUCTS:
            self.products[given[-1].dtype] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Ran:
    model: nn.Module
    loss: float
    gradients: dict[str, Tensor]
    watch: Watch


def run(name: str, family: str, precision: str, trained: str = "auto") -> Ran:
    """One step's gradients of a stirred method, the loss scale taken off; or skipped with the method's reason."""
    model, method = base(family), resolve.load("methods", name)()
    torch.manual_seed(0)
    if (refusal := refused(method, model)) is not None:
        pytest.skip(refusal.line())
    stir(model, 0.05)
    chosen, scale = resolve_precision(precision, CPU, trained), SCALE.get(precision, 1.0)
    trunk, (rows, _) = Trunk(model, facts(family)), rows_as_batches()
    settle(model, chosen)
    method.before_step(model, 1, 10)
    method.begin_step(model, [rows])
    with Watch() as watch:
        with loss_scaled(scale), chosen.autocast(CPU):
            loss = -trunk.logprobs(rows).dot(rows.weights_N) / rows.weights_N.sum()
        (loss * scale).backward()
    trunk.close()
    gradients = {n: p.grad.float() / scale for n, p in model.named_parameters() if p.grad is not None}
    return Ran(model, float(loss.detach()), gradients, watch)


@cache
def facts(family: str) -> TrunkFacts:
    """Found out once: a method changes nothing of them."""
    trunk = open_trunk(base(family))
    trunk.close()
    return trunk.facts


def cosine(one: Tensor, two: Tensor) -> float:
    return float(torch.cosine_similarity(one.flatten().double(), two.flatten().double(), 0))


def check(exact: Ran, rough: Ran, compute: torch.dtype, trained: torch.dtype) -> None:
    assert not rough.watch.statistics
    assert rough.watch.products[compute] > rough.watch.products[torch.float32] / 2, "products run narrow"
    stored = {id(p) for m in rough.model.modules() if is_packed(m) for p in m.parameters()}
    for name, parameter in rough.model.named_parameters():
        if trains(parameter):
            assert parameter.dtype in {torch.float32, trained}, name
            assert parameter.grad is None or parameter.grad.dtype == torch.float32, name
        elif parameter.ndim > 1 and id(parameter) not in stored:
            assert parameter.dtype == compute, f"{name} was widened"
    assert rough.loss == pytest.approx(exact.loss, abs=2e-2)
    assert rough.gradients.keys() == exact.gradients.keys()
    names = list(exact.gradients)
    one, two = (torch.cat([ran.gradients[name].flatten() for name in names]) for ran in (exact, rough))
    assert cosine(one, two) > 0.99
    for name in names:
        if exact.gradients[name].numel() > 1 and exact.gradients[name].norm() > 1e-4 * one.norm():
            assert cosine(exact.gradients[name], rough.gradients[name]) > 0.98, name
    if packed := [n for n, m in rough.model.named_modules() if is_packed(m)]:
        first = packed[0].partition(".self_attn")[0]
        reached = [g for n, g in rough.gradients.items() if n.startswith(first)] or list(rough.gradients.values())
        assert any(float(g.abs().max()) > 0 for g in reached), "no gradient through packed weights"


def _cases() -> list[Any]:
    families = ("llama", "gpt2", "qwen3_moe", "llama-nf4", "llama-int8")
    return [
        pytest.param(name, family, id=f"{name}-{family}",
                     marks=[] if (name, family) in DAY else [pytest.mark.nightly])
        for name in NAMES for family in families
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "family"), _cases())
def test_no_method_breaks_the_upcast_rules(name: str, family: str) -> None:
    """Also with what trains in bfloat16, on the families of the day."""
    exact = run(name, family, "fp32")
    for precision, compute in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        check(exact, run(name, family, precision), compute, torch.float32)
    check(exact, run(name, family, "bf16", "bfloat16"), torch.bfloat16, torch.bfloat16)


def test_the_law_sees_a_softmax_in_bf16() -> None:
    """The watch is no decoration."""
    with Watch() as watch:
        x = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
        (torch.softmax(x, -1).sum() + torch.log_softmax(x.float(), -1).sum()).backward()
    assert watch.statistics == {"_softmax": 1, "_softmax_backward_data": 1}


# ------------------------------------------------------------------ packed bases


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_packed_base_is_its_dense_twin_in_the_computing_dtype(format: str, precision: str) -> None:
    """Log-probabilities and adapter gradients of LoRA: equal to those of the unpacked matrices to rounding."""
    found = []
    for dense in (False, True):
        model = quantise(tiny("llama"), format)
        if dense:
            densify(model)
        method = resolve.load("methods", "lora")(r=4)
        torch.manual_seed(0)
        method.attach(model)
        stir(model, 0.05)
        chosen, trunk = resolve_precision(precision, CPU), Trunk(model, facts("llama"))
        settle(model, chosen)
        rows, _ = rows_as_batches()
        with chosen.autocast(CPU):
            logprobs_N = trunk.logprobs(rows)
        (logprobs_N.mean() * SCALE[precision]).backward()
        found.append((logprobs_N.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (one, mine), (two, theirs) = found
    tolerance = {"bf16": 2e-2, "fp16": 2e-3}[precision]
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)
    assert len(mine) == 28
    for name, grad in theirs.items():
        assert (mine[name] - grad).norm() <= tolerance * grad.norm(), name


# ------------------------------------------------------------------ the head


def flat_head(vocabulary: int = 60_000, width: int = 16, rows: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """A softmax over a large vocabulary that is nearly even: each probability is far below float16's 6e-5."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(vocabulary, width, generator=generator) * 0.1
    hidden_ND = torch.randn(rows, width, generator=generator)
    return weight_VD, hidden_ND, torch.randint(vocabulary, (rows,), generator=generator)


def of_plain(weight_VD: Tensor, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs_N, d sum / d hidden, d sum / d weight) in float64."""
    weight, hidden = weight_VD.double().requires_grad_(), hidden_ND.double().requires_grad_()
    made = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets_N[:, None])[:, 0]
    return made.detach(), *torch.autograd.grad(made.sum(), (hidden, weight))


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("loops", [logprob_tiles, logprob_chunks])
def test_a_flat_softmax_in_fp16_keeps_its_gradients(loops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in the forward pass, before a loss scale could lift them: hidden rows' and the head's."""
    weight_VD, hidden_ND, targets_N = (x.half() if x.is_floating_point() else x for x in flat_head())
    logprobs_N, d_hidden, d_weight = of_plain(weight_VD, hidden_ND, targets_N)
    head = Head(weight_VD, None, HeadMap(), Tile(16, 1024 if loops is logprob_tiles else len(weight_VD), 16))

    def errors() -> list[float]:
        jacobian_ND = torch.empty_like(hidden_ND)
        values_N, _ = loops.values(head, hidden_ND, targets_N, jacobian_ND)
        into = Gradients(torch.zeros(hidden_ND.shape), torch.zeros(weight_VD.shape), None)
        loops.stored(head, hidden_ND, targets_N, torch.ones(len(targets_N)), into)
        unseen = torch.ones(len(weight_VD), dtype=torch.bool).index_fill(0, targets_N, False)  # softmax alone
        assert (values_N - logprobs_N).abs().max() < 5e-3
        return [
            off(jacobian_ND, d_hidden),
            off(into.hidden_ND, d_hidden),
            off(into.weight_VD[unseen], d_weight[unseen]),
        ]

    lifted = errors()
    assert max(lifted) < 1e-3
    if loops is logprob_chunks:
        monkeypatch.setattr(logprob_chunks, "_LIFT", 1.0)
        assert errors()[2] > 2 * lifted[2], "without the lift the softmax is below float16's normal numbers"


def test_a_jacobian_takes_a_scale_beyond_float16() -> None:
    """2^17 is no float16: the scale meets the jacobian in float32, and the product is rounded once."""
    weight_VD, hidden_ND, targets_N = flat_head(300)
    hidden = hidden_ND.half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        (token_logprobs(hidden, weight_VD.half(), targets_N).sum() * 2.0**17).backward()
    exact = hidden_ND.half().float().requires_grad_()
    token_logprobs_plain(exact, weight_VD.half().float(), targets_N).sum().backward()
    assert hidden.grad is not None and exact.grad is not None
    assert bool(torch.isfinite(hidden.grad).all())
    torch.testing.assert_close(hidden.grad.float() / 2.0**17, exact.grad, atol=1e-4, rtol=2e-3)
